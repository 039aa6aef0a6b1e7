"""What a run starts from: heads in folders and files, an earlier run's export, architectures of weights."""

import json
import shutil

import pytest
import torch

from dinov2.errors import ConfigError, WeightsError
from dinov2.train import SSLMetaArch
from dinov2.train import train as trainer
from dinov2.train.head_files import find_files
from tests.train.conftest import written_config

SEPARATE = (
    "ibot.separate_head=true",
    "ibot.head_n_prototypes=24",
    "ibot.head_hidden_dim=32",
    "ibot.head_bottleneck_dim=16",
)
PREFIX = "dinov2_vits_NCT_10k_training_1999_"


@pytest.fixture
def exported(tiny, tmp_path):
    """A run of six iterations with one export in its middle, after the third."""
    tiny.start(tmp_path / "first", *SEPARATE)
    return tmp_path / "first" / "eval" / "training_2"


@pytest.fixture
def prefixed(exported, tmp_path):
    """The same files under the names of the model farm."""
    folder = tmp_path / "farm"
    folder.mkdir()
    for file in exported.iterdir():
        shutil.copy(file, folder / f"{PREFIX}{file.name}")
    return folder


@pytest.fixture
def losses(monkeypatch):
    """The losses of every step of this process; the metrics file holds medians over windows of them."""
    steps, real = [], trainer.train_step

    def recording(*args):
        result = real(*args)
        steps.append(result.losses)
        return result

    monkeypatch.setattr(trainer, "train_step", recording)
    return steps


@pytest.mark.parametrize("separate", [False, True], ids=["shared", "separate"])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_continuing_gives_the_losses_of_the_uninterrupted_run(tiny, tmp_path, losses, centering, separate):
    """A round trip train -> export -> continue; drop path is on."""
    options = (f"train.centering={centering}", *(SEPARATE if separate else ()))
    tiny.start(tmp_path / "whole", *options)
    whole = losses[:]
    losses.clear()
    folder, again = tmp_path / "whole" / "eval" / "training_2", tmp_path / "continued"
    tiny.start(again, *options, f"head.head_path={folder}", "optim.start_iter=3")
    assert len(whole) == 6 and len(losses) == 3
    # AdamW's moments begin at zero, so only the first step is the same.
    assert losses[0] == pytest.approx(whole[3], rel=1e-6)
    report = json.loads((again / "load_report.json").read_text())
    heads = ["dino_head", "ibot_head"] if separate else ["dino_head"]
    assert set(report) == {f"{n}.{p}" for n in ("student", "teacher") for p in ("backbone", *heads)}
    lines = (again / "training_metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [3, 4, 5]


def test_a_continued_run_keeps_teacher_and_student_apart(tiny, exported):
    cfg = tiny.resolve(*SEPARATE, f"head.head_path={exported}")
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    for network in ("student", "teacher"):
        stored = torch.load(exported / f"{network}_checkpoint.pth", weights_only=True)[network]
        state = getattr(model, network).state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())
    assert not torch.equal(model.student.backbone.norm.weight, model.teacher.backbone.norm.weight)
    centers = torch.load(exported / "centers_checkpoint.pth", weights_only=True)
    assert torch.equal(model.dino_loss.center, centers["dino_loss.center"]) and model.dino_loss.center.any()


def test_a_named_backbone_counts_more_than_those_beside_the_heads(tiny, exported):
    teacher = exported / "teacher_checkpoint.pth"
    cfg = tiny.resolve(*SEPARATE, f"head.head_path={exported}", f"student.pretrained_weights={teacher}")
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    assert torch.equal(model.student.backbone.norm.weight, model.teacher.backbone.norm.weight)
    assert not torch.equal(model.student.dino_head.mlp[0].weight, model.teacher.dino_head.mlp[0].weight)
    assert not model.dino_loss.center.any()  # these are not the networks that the centres belong to


@pytest.mark.parametrize(
    "named", ["", "student_dino_head_checkpoint.pth", "teacher_ibot_head_checkpoint.pth"]
)
def test_the_names_of_the_model_farm_are_found(tiny, prefixed, named):
    place = prefixed / f"{PREFIX}{named}" if named else prefixed
    cfg = tiny.resolve(*SEPARATE, f"head.head_path={place}")
    model = SSLMetaArch(cfg)
    stored = torch.load(prefixed / f"{PREFIX}teacher_ibot_head_checkpoint.pth", weights_only=True)
    assert torch.equal(model.teacher.ibot_head.mlp[0].weight, stored["teacher_ibot_head"]["mlp.0.weight"])
    assert len(model.initial_weights.parts) == 6


def test_two_sets_of_prefixed_files_are_not_mixed(prefixed):
    for file in list(prefixed.iterdir()):
        shutil.copy(file, prefixed / file.name.replace("1999", "2999"))
    with pytest.raises(WeightsError, match="several files that end in"):
        find_files(str(prefixed))
    files = find_files(str(prefixed / f"{PREFIX}student_dino_head_checkpoint.pth"))
    assert {path.name.split("training_")[1][:4] for path in files.heads.values()} == {"1999"}


def test_heads_inside_whole_network_files_are_found(tiny, exported):
    for file in exported.glob("*_head_checkpoint.pth"):
        file.unlink()
    model = SSLMetaArch(tiny.resolve(*SEPARATE, f"head.head_path={exported}"))
    assert {"student.ibot_head", "teacher.dino_head"} <= model.initial_weights.parts.keys()


def test_heads_without_backbones_leave_the_backbone_as_configured(tiny, exported):
    for network in ("student", "teacher"):
        (exported / f"{network}_checkpoint.pth").unlink()
    model = SSLMetaArch(tiny.resolve(*SEPARATE, f"head.head_path={exported}"))
    assert {name.split(".")[1] for name in model.initial_weights.parts} == {"dino_head", "ibot_head"}


@pytest.mark.parametrize(
    ("removed", "overrides", "words"),
    [
        ("teacher_dino_head", (), "lacks teacher_dino_head_checkpoint.pth, while the other network's"),
        ("*_dino_head", SEPARATE, "has iBOT heads: set dino.loss_weight=0"),
        ("*_ibot_head", SEPARATE, "has DINO heads: set ibot.separate_head=false"),
        ("", ("dino.head_n_prototypes=48",), "set dino.head_n_prototypes=32 (it is 48)"),
        ("", ("dino.head_hidden_dim=24",), "set dino.head_hidden_dim=32 (it is 24)"),
        ("", ("student.embed_dim=16",), "backbone of width 32"),
    ],
)
def test_heads_that_are_missing_or_do_not_fit_stop_the_run(tiny, exported, removed, overrides, words):
    for network in ("student", "teacher"):
        (exported / f"{network}_checkpoint.pth").unlink()
    for file in exported.glob(f"{removed}_checkpoint.pth") if removed else ():
        file.unlink()
    with pytest.raises(WeightsError) as caught:
        SSLMetaArch(tiny.resolve(f"head.head_path={exported}", *overrides))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_reinit_starts_a_missing_head_afresh_and_says_so(tiny, exported, caplog):
    for file in [*exported.glob("*_ibot_head_checkpoint.pth"), *exported.glob("*t_checkpoint.pth")]:
        file.unlink()
    (exported / "teacher_checkpoint.pth").unlink()
    cfg = tiny.resolve(*SEPARATE, f"head.head_path={exported}", "head.on_missing=reinit")
    with caplog.at_level("WARNING", logger="dinov2"):
        model = SSLMetaArch(cfg)
    assert "ibot_head: random weights in student and teacher" in caplog.text
    model.prepare_for_distributed_training()
    assert torch.equal(model.student.ibot_head.mlp[0].weight, model.teacher.ibot_head.mlp[0].weight)
    assert {"student.dino_head", "teacher.dino_head"} == model.initial_weights.parts.keys()


def test_a_fresh_head_of_a_continued_run_starts_with_a_centre_of_zero(tiny, exported):
    for file in exported.glob("*_ibot_head_checkpoint.pth"):
        file.unlink()
    for network in ("student", "teacher"):  # the whole networks hold them, too
        path = exported / f"{network}_checkpoint.pth"
        state = torch.load(path, weights_only=True)[network]
        torch.save({network: {k: t for k, t in state.items() if not k.startswith("ibot_head.")}}, path)
    more = (*SEPARATE[:1], "ibot.head_n_prototypes=16", *SEPARATE[2:])
    model = SSLMetaArch(tiny.resolve(*more, f"head.head_path={exported}", "head.on_missing=reinit"))
    assert model.dino_loss.center.any() and not model.ibot_patch_loss.center.any()
    assert "teacher.ibot_head" not in model.initial_weights.parts


def test_start_iter_has_to_lie_inside_the_run(tiny, tmp_path):
    with pytest.raises(ConfigError, match="optim.start_iter 6 is not before the end"):
        tiny.start(tmp_path / "run", "optim.start_iter=6")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(WeightsError, match="neither a folder nor a file"):
        find_files(str(tmp_path / "nothing"))


# --- student.arch auto --------------------------------------------------------------------------------


def test_auto_builds_what_the_weights_are_and_writes_it_down(tiny, exported, tmp_path):
    source = exported / "teacher_checkpoint.pth"
    for name, override in (
        ("weights", f"student.pretrained_weights={source}"),
        ("other spelling", f"train.init_weights_from_chkpt={source}"),
        ("run", f"head.head_path={exported}"),
    ):
        out = tmp_path / name
        tiny.start(
            out, *SEPARATE, override, "student.arch=auto", "student.qkv_bias=false",
            "student.embed_dim=null", "student.depth=null", "student.num_heads=null", "student.patch_size=16",
            "optim.max_iterations=3",
        )  # fmt: skip
        student = written_config(out).student
        assert (student.arch, student.embed_dim, student.depth, student.num_heads) == ("vit_large", 32, 2, 2)
        assert (student.patch_size, student.qkv_bias, student.drop_path_rate) == (8, True, 0.2)


def test_auto_needs_weights_and_crops_that_fit(tiny, exported, tmp_path):
    with pytest.raises(ConfigError, match="no weights are named"):
        tiny.start(tmp_path / "a", "student.arch=auto")
    with pytest.raises(ConfigError, match="crops.global_crops_size is 36, which student.patch_size 8"):
        tiny.start(
            tmp_path / "b", "student.arch=auto", f"student.pretrained_weights={exported}",
            "crops.global_crops_size=36",
        )  # fmt: skip


def test_a_contradiction_of_config_and_weights_stops_with_both_values(tiny, exported):
    with pytest.raises(WeightsError) as caught:
        SSLMetaArch(
            tiny.resolve(
                f"student.pretrained_weights={exported}", "student.qkv_bias=false", "student.num_heads=4"
            )
        )
    message = str(caught.value)
    assert "qkv bias is True in the weights and False in the model (student.qkv_bias)" in message
    assert "num heads is 2 in the weights and 4 in the model (student.num_heads)" in message
    assert "student.arch=auto" in message
