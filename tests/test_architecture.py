"""The house rules that a program can check: who may import whom, and what no source file contains."""

import ast
import graphlib
from pathlib import Path

import pytest

from tests.conftest import REPO

PACKAGE = REPO / "dinov2"

# Part of the package -> the parts it may import; errors may be imported by all. Parts are the folders, and
# single files where a folder has members of several tiers.
MAY_IMPORT = {
    "errors": "",
    "cli": "",
    "terminal": "",
    "configs": "",
    "distributed": "",
    "compiled": "",
    "layers": "compiled",
    "models": "layers terminal",
    "models.inspect": "cli layers models",
    "loss": "compiled distributed layers",
    "logging": "distributed",
    "fsdp": "distributed",
    "fsdp.consolidate": "cli distributed fsdp",
    "utils": "distributed",
    "utils.config": "configs distributed logging utils",
    "data": "cli distributed terminal utils",
    "hub": "layers models",
    "hub.export": "cli hub layers models",
    "eval": "cli configs data distributed layers logging models utils utils.config",
    "train": "cli compiled configs data distributed eval fsdp layers logging loss models utils utils.config",
    "run": "cli configs data distributed eval logging train utils",
}

# An import inside a function that points upwards, and why.
EXCEPTIONS = {
    ("utils", "models"): "utils.load_pretrained_weights is upstream's path for a function of models"
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in SOURCES if path != PACKAGE / "__init__.py"]
WRITTEN = [
    *SOURCES,
    *sorted((REPO / "scripts").rglob("*.py")),
    *sorted((REPO / "scripts").rglob("*.sh")),
    *sorted(PACKAGE.rglob("*.yaml")),
    *(REPO / name for name in ("setup.py", "hubconf.py", "pyproject.toml", "conda.yaml", ".ci/run")),
]


def relative(path: Path) -> str:
    return str(path.relative_to(REPO))


def part_of(module: str) -> str:
    """dinov2.data.datasets.pathology -> data"""
    names = module.split(".")[1:3]
    joined = ".".join(names)
    return joined if joined in MAY_IMPORT else names[0]


def imports(tree: ast.AST):
    """(imported module, node, whether inside a function) of every import."""
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "dinov2":
            modules = [f"dinov2.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = ["." * node.level + (node.module or "")]
        else:
            continue
        for module in modules:
            yield module, node, id(node) in inside


def upward_arrows(path: Path, module: str, tree: ast.AST) -> list[str]:
    source = part_of(module)
    allowed = {"errors", source, *MAY_IMPORT[source].split()}
    found = []
    for imported, node, lazy in imports(tree):
        if not imported.startswith("dinov2."):
            continue
        target = part_of(imported)
        if target not in allowed and not (lazy and (source, target) in EXCEPTIONS):
            found.append(f"{path}:{node.lineno} {source} imports {target}")
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text("utf-8"))


def test_the_table_itself_has_no_circle():
    graph = {part: set(below.split()) for part, below in MAY_IMPORT.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(MAY_IMPORT)


def test_every_part_of_the_package_is_in_the_table():
    parts = {
        part_of(module_of(path)) for path in SOURCES if path.parent != PACKAGE or path.stem != "__init__"
    }
    assert parts == set(MAY_IMPORT)


def test_no_import_points_upwards():
    found = [arrow for path in MODULES for arrow in upward_arrows(path, module_of(path), parse(path))]
    assert found == []


@pytest.mark.parametrize(
    ("module", "code", "refused"),
    [
        ("dinov2.layers.mlp", "from dinov2 import distributed", True),
        ("dinov2.layers.mlp", "def f():\n    import dinov2.configs", True),
        ("dinov2.eval.knn", "from dinov2.train.train import do_train", True),
        ("dinov2.utils.dtype", "from dinov2.models import build_model", True),
        ("dinov2.utils.utils", "def f():\n    from dinov2.models import build_model", False),
        ("dinov2.utils.config", "from dinov2.configs import resolve_config", False),
        ("dinov2.models.pretrained", "from dinov2.errors import WeightsError", False),
        ("dinov2.run.submit", "from dinov2.train import main", False),
    ],
)
def test_the_check_itself(module, code, refused):
    assert bool(upward_arrows(Path("x.py"), module, ast.parse(code))) is refused


def test_imports_are_absolute():
    found = [
        relative(path) for path in SOURCES for name, _, _ in imports(parse(path)) if name.startswith(".")
    ]
    assert found == []


def test_optional_packages_are_imported_where_they_are_used():
    optional = {
        "xformers",
        "sklearn",
        "openslide",
        "tiffslide",
        "tifffile",
        "scipy",
        "skimage",
        "h5py",
        "pyarrow",
        "webdataset",
        "onnx",
        "onnxscript",
        "timm",
        "transformers",
        "submitit",
        "wandb",
        "tensorboard",
        "huggingface_hub",
        "peft",
    }
    found = [
        f"{relative(path)}:{node.lineno} {name}"
        for path in SOURCES
        for name, node, lazy in imports(parse(path))
        if name.split(".")[0] in optional and not lazy
    ]
    assert found == []


def calls(tree: ast.AST, name: str):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def test_the_library_does_not_print():
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in SOURCES
        if relative(path) != "dinov2/cli.py"
        for node in calls(parse(path), "print")
    ]
    assert found == []


def test_files_are_loaded_without_running_code():
    for path in [*SOURCES, *sorted((REPO / "scripts").rglob("*.py"))]:
        for node in calls(parse(path), "torch.load"):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("weights_only") == "True", f"{relative(path)}:{node.lineno}"


def test_no_error_is_swallowed_by_a_bare_except():
    found = [
        f"{relative(path)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert found == []


def test_every_module_says_what_it_is_for():
    assert [relative(path) for path in SOURCES if not ast.get_docstring(parse(path))] == []


@pytest.mark.parametrize("path", WRITTEN, ids=relative)
def test_sources_are_ascii(path):
    offending = [
        number for number, line in enumerate(path.read_bytes().splitlines(), 1) if not line.isascii()
    ]
    assert offending == []
