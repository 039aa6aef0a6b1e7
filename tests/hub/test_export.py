"""The export command: weights that come back unchanged, snippets that run, refusals, whole files or none."""

import hashlib
import json
import re
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from dinov2 import cli
from dinov2.errors import ConfigError, OutputError, UserError, WeightsError
from dinov2.hub import export, export_targets
from dinov2.hub.export_files import write_aside, write_safetensors
from dinov2.hub.export_layout import Normalisation
from dinov2.hub.export_timm import timm_layout
from dinov2.models.digest import tensors_digest
from dinov2.models.pretrained import build_from_weights
from tests.conftest import REPO
from tests.hub.variants import HEADS, SIZE, VARIANTS, all_tokens, saved, variant
from tests.models.test_real_vits14 import tile
from tests.models.vits import tiny

OUTPUTS = {
    "dinov2": "out.pth",
    "safetensors": "out.safetensors",
    "timm": "timm",
    "transformers": "transformers",
    "onnx": "out.onnx",
    "torchscript": "out.pt",
    "torch.export": "out.pt2",
}
READ_BACK = ("dinov2", "safetensors", "timm", "transformers")
SMALL = ("--num-heads", str(HEADS))


def exported(source, to, folder, *options) -> Path:
    output = folder / OUTPUTS[to]
    export.main(["--checkpoint", str(source), "--to", to, "--output", str(output), *options])
    return output


def failed(arguments, capsys) -> tuple[str, str]:
    """What a command says that ends with status 1, on standard output and error."""
    with pytest.raises(SystemExit) as end:
        cli.run(export.main, arguments)
    assert end.value.code == 1
    return tuple(capsys.readouterr())


def rest_of_the_folder(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "weights.pth")


@pytest.fixture
def weights(tmp_path):
    return saved(variant(), tmp_path / "weights.pth")


@pytest.fixture
def small_weights(tmp_path):
    """Of one block, as following a graph takes time with every block."""
    return saved(variant(depth=1), tmp_path / "weights.pth")


# --- what comes back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("to", ["dinov2", "safetensors"])
def test_our_own_layouts_come_back_bit_for_bit(to, name, tmp_path):
    model = variant(**VARIANTS[name])
    flat = variant(**{**VARIANTS[name], "block_chunks": 0}).state_dict()
    output = exported(saved(model, tmp_path / "weights.pth"), to, tmp_path, *SMALL)
    content = torch.load(output, weights_only=True) if to == "dinov2" else load_file(output)
    assert content.keys() == flat.keys()
    assert all(torch.equal(tensor, content[key]) for key, tensor in flat.items())
    again = build_from_weights(str(output), num_heads=HEADS).eval()
    assert torch.equal(all_tokens(again, tile(SIZE)), all_tokens(model, tile(SIZE)))


def test_torch_hub_loads_what_is_written(real_vits14, tmp_path):
    released = load_file(real_vits14)
    for to in READ_BACK:
        path = str(exported(real_vits14, to, tmp_path))
        model = torch.hub.load(str(REPO), "dinov2_vits14", source="local", weights=path)
        for name, tensor in model.state_dict().items():
            if (to, name) != ("timm", "mask_token"):
                assert torch.equal(tensor, released[name]), (to, name)


def test_safetensors_carry_their_digest(weights, tmp_path):
    path = exported(weights, "safetensors", tmp_path, *SMALL, "--dtype", "bfloat16")
    with safe_open(path, "pt") as file:
        names = sorted(file.keys())
        assert file.metadata() == {
            "format": "pt",
            "dinov2_tensors_sha256": tensors_digest((name, file.get_tensor(name)) for name in names),
        }
        assert {file.get_tensor(name).dtype for name in names} == {torch.bfloat16}


@pytest.mark.parametrize("to", READ_BACK)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_file(to, dtype, weights, tmp_path):
    half = build_from_weights(str(exported(weights, to, tmp_path, *SMALL, "--dtype", dtype)), num_heads=HEADS)
    rounded = variant().to(getattr(torch, dtype)).float()
    assert (all_tokens(half.eval(), tile(SIZE)) - all_tokens(rounded, tile(SIZE))).abs().max() < 1e-6
    file = tmp_path / OUTPUTS[to]
    file = file / "model.safetensors" if file.is_dir() else file
    bytes_of_weights = 2 * sum(parameter.numel() for parameter in rounded.parameters())
    assert 0.9 * bytes_of_weights < file.stat().st_size < 1.3 * bytes_of_weights


@pytest.mark.parametrize("options", [{}, {"num_register_tokens": 4}])
def test_positions_are_laid_out_for_the_size_asked_for(options, tmp_path):
    """In the way the released models with and without registers resample them."""
    released = {"interpolate_offset": 0.0, "interpolate_antialias": True} if options else {}
    model = variant(**options, **released)
    output = exported(saved(model, tmp_path / "weights.pth"), "dinov2", tmp_path, *SMALL, "--img-size", "42")
    again = build_from_weights(str(output), num_heads=HEADS).eval()
    assert again.pos_embed.shape == (1, 1 + 3 * 3, 48)
    assert torch.equal(all_tokens(again, tile(42)), all_tokens(model, tile(42)))


def test_the_way_to_resample_can_be_chosen(weights, tmp_path):
    size = ("--img-size", "42")
    for index, (offset, same) in enumerate((("0.1", True), ("0", False))):
        (tmp_path / str(index)).mkdir()
        output = exported(
            weights, "dinov2", tmp_path / str(index), *SMALL, *size, "--interpolate-offset", offset
        )
        again = build_from_weights(str(output), num_heads=HEADS).eval()
        assert torch.equal(all_tokens(again, tile(42)), all_tokens(variant(), tile(42))) is same


# --- where it comes from ------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    """What a training leaves: both networks with their heads, and the resolved config."""
    folder = tmp_path / "run" / "eval" / "training_9"
    folder.mkdir(parents=True)
    head = {"dino_head.last_layer.weight_v": torch.zeros(4, 8)}
    for network, options in (("teacher", {}), ("student", {"init_values": None})):
        state = {f"backbone.{name}": tensor for name, tensor in variant(**options).state_dict().items()}
        torch.save({network: {**state, **head}}, folder / f"{network}_checkpoint.pth")
    config = {
        "student": {"num_heads": HEADS},
        "crops": {"mean": [0.7, 0.6, 0.5], "std": [0.2, 0.3, 0.4]},
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("to", READ_BACK)
def test_a_training_output_says_everything_itself(to, run_folder, tmp_path, capsys):
    output = exported(run_folder, to, tmp_path)
    said = capsys.readouterr().out
    assert "mean (0.7, 0.6, 0.5) and std (0.2, 0.3, 0.4) (those of " in said and "run/config.yaml" in said
    again = build_from_weights(str(output), num_heads=HEADS).eval()
    assert (all_tokens(again, tile(SIZE)) - all_tokens(variant(), tile(SIZE))).abs().max() < 1e-6


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_the_networks_of_a_run(to, run_folder, tmp_path):
    file = "config.json" if to == "timm" else "preprocessor_config.json"
    constants = json.loads((exported(run_folder, to, tmp_path) / file).read_text())
    constants = constants.get("pretrained_cfg", constants)
    assert constants.get("mean", constants.get("image_mean")) == [0.7, 0.6, 0.5]
    student = exported(run_folder, to, tmp_path / "student", "--entry", "student")
    again = build_from_weights(str(student), num_heads=HEADS).eval()
    assert (
        all_tokens(again, tile(SIZE)) - all_tokens(variant(init_values=None), tile(SIZE))
    ).abs().max() < 1e-6


@pytest.mark.parametrize("first", ["timm", "transformers"])
def test_settings_travel_from_one_library_to_the_other(first, weights, tmp_path):
    second = {"timm": "transformers", "transformers": "timm"}[first]
    constants = ("--mean", "0.7", "0.6", "0.5", "--std", "0.2", "0.3", "0.4")
    start = exported(weights, first, tmp_path, *SMALL, *constants)
    end = exported(start, second, tmp_path)  # without --num-heads
    if second == "timm":
        config = json.loads((end / "config.json").read_text())
        assert (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]) == (
            [0.7, 0.6, 0.5],
            [0.2, 0.3, 0.4],
        )
        assert config["model_args"]["num_heads"] == HEADS
    else:
        images = json.loads((end / "preprocessor_config.json").read_text())
        assert (images["image_mean"], images["image_std"]) == ([0.7, 0.6, 0.5], [0.2, 0.3, 0.4])


# --- what is said -------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", OUTPUTS)
def test_files_are_named_with_their_checksums_and_the_snippet_runs(
    to, small_weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    export.main(["--checkpoint", small_weights, "--to", to, "--output", f"new/{OUTPUTS[to]}", *SMALL])
    lines = capsys.readouterr().out.splitlines()
    written = dict(
        re.match(r"wrote (\S+) \(\d+ bytes, sha256 (\w{64})\)", line).groups()
        for line in lines
        if "wrote" in line
    )
    assert {path for path in Path("new").rglob("*") if path.is_file()} == set(map(Path, written))
    for path, checksum in written.items():
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == checksum
        assert stat.S_IMODE(Path(path).stat().st_mode) == stat.S_IMODE(Path("weights.pth").stat().st_mode)
    images = tile(SIZE).numpy() if to == "onnx" else tile(SIZE)
    names = {"images": images}
    exec("\n".join(lines[-2:]), names)
    with torch.inference_mode():
        if to == "transformers":
            cls_token = names["model"](images).last_hidden_state[:, 0]
        else:
            cls_token = names["model"](images) if "model" in names else names["cls_token"]
    expected = all_tokens(variant(depth=1), tile(SIZE))[:, 0]
    assert (torch.as_tensor(cls_token) - expected).abs().max() < 1e-4


def test_a_mistake_on_the_command_line_is_one_sentence(weights, tmp_path, capsys):
    path = exported(weights, "dinov2", tmp_path, *SMALL)
    capsys.readouterr()
    arguments = ["--checkpoint", weights, "--to", "dinov2", "--output", str(path)]
    command = [sys.executable, "-m", "dinov2.hub.export", *arguments]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(r"error: .* width 48.*set student.num_heads\.\n", result.stderr)
    sentence = f"error: {path} exists already: choose another --output, or add --force to replace it.\n"
    assert failed([*arguments, *SMALL], capsys) == ("", sentence)


# --- what is refused ----------------------------------------------------------------------------------

REFUSALS = {
    "wrong suffix": (["--to", "dinov2", "--output", "a.safetensors"], ConfigError, r"must end in \.pth"),
    "no suffix": (["--to", "onnx", "--output", "a"], ConfigError, r"must end in \.onnx"),
    "file for a folder": (["--to", "timm", "--output", "a.pth"], ConfigError, "name a folder"),
    "size": (["--to", "dinov2", "--output", "a.pth", "--img-size", "60"], ConfigError, "such as 56"),
    "tiny size": (["--to", "dinov2", "--output", "a.pth", "--img-size", "5"], ConfigError, "such as 14"),
    "negative size": (
        ["--to", "dinov2", "--output", "a.pth", "--img-size", "-14"],
        ConfigError,
        "-14 does not",
    ),
    "entry": (["--to", "dinov2", "--output", "a.pth", "--entry", "student"], WeightsError, "student"),
    "heads": (
        ["--to", "dinov2", "--output", "a.pth", "--num-heads", "5"],
        WeightsError,
        "width 48, which 5 attention heads cannot share",
    ),
    "mean alone": (
        ["--to", "timm", "--output", "a", "--mean", "0", "0", "0"],
        ConfigError,
        "belong together",
    ),
    "no file": (
        ["--to", "dinov2", "--output", "a.pth", "--checkpoint", "absent.pth"],
        WeightsError,
        "does not exist",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_in_one_sentence_and_nothing_is_written(case, weights, tmp_path, monkeypatch):
    arguments, kind, words = REFUSALS[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words) as caught:
        export.main(["--checkpoint", weights, *SMALL, *arguments])
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    assert rest_of_the_folder(tmp_path) == []


@pytest.mark.parametrize("to", OUTPUTS)
def test_existing_files_are_replaced_only_when_told(to, small_weights, tmp_path):
    output = tmp_path / OUTPUTS[to]
    file = output if "." in output.name else output / "config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    (file.parent / "other").write_text("stays")
    with pytest.raises(OutputError, match="exists already.*--force"):
        exported(small_weights, to, tmp_path, *SMALL)
    assert file.read_text() == "precious" and not list(output.glob("*.safetensors"))
    exported(small_weights, to, tmp_path, *SMALL, "--force")
    assert b"precious" not in file.read_bytes() and (file.parent / "other").read_text() == "stays"


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b").write_text("old")

    def half(folder):
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
        raise OSError(28, "No space left on device")

    for name in ("folder", "new/folder"):
        with pytest.raises(OutputError, match=r"cannot be written to \(No space left on device\)"):
            write_aside(tmp_path / name, ["a", "b"], half, force=True)
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["b"]
    assert (tmp_path / "folder" / "b").read_text() == "old"
    assert not (tmp_path / "new" / "folder").exists() and not list((tmp_path / "new").iterdir())


@pytest.fixture
def full_disk():
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("to", OUTPUTS)
def test_a_full_disk_is_one_sentence(to, small_weights, full_disk, tmp_path, capsys):
    """Some writers of PyTorch would end the process, and with it the tests."""
    arguments = ["--checkpoint", small_weights, "--to", to, "--output", str(tmp_path / OUTPUTS[to]), *SMALL]
    out, sentence = failed(arguments, capsys)
    assert out == ""
    assert re.fullmatch(r"error: .* cannot be written to \(.*\): free some space.*\n", sentence)
    assert rest_of_the_folder(tmp_path) == []


def test_normalisation_of_published_models(real_vits14, weights, tmp_path, capsys):
    exported(real_vits14, "timm", tmp_path)
    assert "(0.229, 0.224, 0.225) (those of DINOv2 ViT-S/14)" in capsys.readouterr().out
    exported(weights, "timm", tmp_path / "other", *SMALL)
    assert "(0.229, 0.224, 0.225) (ImageNet's, as nothing says otherwise)" in capsys.readouterr().out


@pytest.mark.parametrize("to", READ_BACK)
def test_a_model_in_memory_may_have_chunks(to, tmp_path):
    model = variant(block_chunks=2)
    files, _ = export_targets.export(model, to, tmp_path / OUTPUTS[to])
    assert all(file.is_file() for file in files)
    again = build_from_weights(str(tmp_path / OUTPUTS[to]), num_heads=HEADS)
    assert (all_tokens(again, tile(SIZE)) - all_tokens(model, tile(SIZE))).abs().max() < 1e-6


def test_tensors_that_share_memory_or_lie_crosswise_are_written_as_they_read(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "rows": base[:2],
        "columns": base[:, 1:3].t(),
        "crosswise": torch.arange(6.0).reshape(2, 3).t(),
    }
    write_safetensors(tensors, tmp_path / "a.safetensors")
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(tensor, read[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize(("mean", "std"), [("0.5 0.5 0.5", "0 0 0"), ("128 128 128", "0.5 0.5 0.5")])
def test_impossible_constants_are_refused(tmp_path, mean, std):
    path = tmp_path / "weights.pth"
    torch.save(tiny().state_dict(), path)
    words = ["--checkpoint", str(path), "--to", "dinov2", "--output", str(tmp_path / "out.pth"), *SMALL]
    with pytest.raises(ConfigError, match="are no constants for channels of 0..1"):
        export.main([*words, "--mean", *mean.split(), "--std", *std.split()])
    assert not (tmp_path / "out.pth").exists()


def test_an_epsilon_that_timm_cannot_state_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="epsilon of 1e-12"):
        timm_layout(tiny(norm_eps=1e-12), Normalisation((0.5,) * 3, (0.5,) * 3))
