"""Whole runs of the trainer on real tiles: what it writes, how it resumes, what it refuses."""

import json
import shutil

import pytest
import torch

from dinov2 import cli
from dinov2.errors import ConfigError, DatasetError, OutputError, WeightsError
from dinov2.train import SSLMetaArch, compilation
from dinov2.train.train import NonFiniteLossError
from tests.checkpoints import read_state
from tests.train.conftest import written_config


def load(path):
    return torch.load(path, weights_only=True)


def metrics(folder):
    return [json.loads(line) for line in (folder / "training_metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("separate_head", [False, True], ids=["shared", "separate"])
def test_a_run_leaves_the_forks_files(tiny, tmp_path, separate_head):
    out = tmp_path / "run"
    tiny.start(out, f"ibot.separate_head={separate_head}", "ibot.head_n_prototypes=24", "train.num_workers=1")

    exports = out / "eval" / "training_5"
    heads = ["dino_head", "ibot_head"] if separate_head else ["dino_head"]
    expected = {f"{network}_checkpoint.pth" for network in ("teacher", "student")}
    expected |= {f"{network}_{head}_checkpoint.pth" for network in ("teacher", "student") for head in heads}
    expected |= {"centers_checkpoint.pth"}  # for continuing from here
    assert {path.name for path in exports.iterdir()} == expected
    for network in ("teacher", "student"):
        content = load(exports / f"{network}_checkpoint.pth")
        assert list(content) == [network]
        assert {name.split(".")[0] for name in content[network]} == {"backbone", *heads}
        for head in heads:
            name = f"{network}_{head}"
            alone = load(exports / f"{name}_checkpoint.pth")
            assert list(alone) == [name]
            for key, tensor in alone[name].items():
                assert torch.equal(tensor, content[network][f"{head}.{key}"])

    state = read_state(out / "model_final")
    assert state["iteration"] == 5
    assert {"dino_loss.center", "ibot_patch_loss.center"} <= state["model"].keys()
    assert (out / "last_checkpoint.rank_0").read_text() == "model_final"
    rows = metrics(out)
    assert [row["iteration"] for row in rows] == list(range(6))
    named = {"dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss", "total_loss", "lr"}
    assert named <= rows[0].keys()
    assert written_config(out).optim.lr == pytest.approx(0.004 * (4 / 1024) ** 0.5)
    log = (out / "logs" / "log.txt").read_text()
    assert "6 iterations of 4 images = 24 images = 1 passes over 24 tiles" in log


def test_total_loss_is_the_weighted_sum_that_is_minimised(tiny, tmp_path):
    tiny.start(tmp_path / "run", "dino.loss_weight=0.7", "ibot.loss_weight=1.3", "optim.max_iterations=3")
    row = metrics(tmp_path / "run")[0]
    dino = row["dino_local_crops_loss"] + row["dino_global_crops_loss"]
    expected = 0.7 * dino + 2 * row["koleo_loss"] + 1.3 * 2 * row["ibot_loss"]
    assert row["total_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_a_resumed_run_equals_an_uninterrupted_one(tiny, tmp_path, centering):
    overrides = (f"train.centering={centering}", "checkpointing.period=3")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    tiny.start(whole, *overrides)
    resumed.mkdir()
    shutil.copytree(whole / "model_0000002", resumed / "model_0000002")
    tiny.start(resumed, *overrides)

    expected = read_state(whole / "model_final")["model"]
    got = read_state(resumed / "model_final")["model"]
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    for row, other in zip(metrics(whole)[3:], metrics(resumed), strict=True):
        timed = {"iter_time", "data_time", "images_per_second"}
        assert {k: v for k, v in row.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }


def test_the_number_of_loader_workers_changes_nothing(tiny, tmp_path):
    for workers in (0, 2):
        tiny.start(tmp_path / str(workers), f"train.num_workers={workers}", "optim.max_iterations=3")
    first, second = (read_state(tmp_path / run / "model_final")["model"] for run in ("0", "2"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_seeds_differ_and_repeat(tiny, tmp_path):
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny.start(tmp_path / run, f"train.seed={seed}", "optim.max_iterations=3")
    a, b, c = (metrics(tmp_path / run)[0]["total_loss"] for run in "abc")
    assert a == b
    assert a != c


def test_restarting_a_finished_run_takes_no_step(tiny, tmp_path):
    tiny.start(tmp_path, "optim.max_iterations=3")
    before = (tmp_path / "model_final" / "manifest.json").read_bytes()
    tiny.start(tmp_path, "optim.max_iterations=3")
    assert (tmp_path / "model_final" / "manifest.json").read_bytes() == before
    assert len(metrics(tmp_path)) == 3


def test_eval_only_exports_the_newest_checkpoint(tiny, tmp_path, monkeypatch):
    tiny.start(tmp_path, "optim.max_iterations=3")
    # What asks for a compiler that is not there is of no concern to an export.
    monkeypatch.setattr(compilation, "_failure", lambda device: "there is none")
    tiny.start(tmp_path, "optim.max_iterations=3", "train.compile=true", options=("--eval-only",))
    trained = load(tmp_path / "eval/training_2/teacher_checkpoint.pth")["teacher"]
    exported = load(tmp_path / "eval/manual_3/teacher_checkpoint.pth")["teacher"]
    assert all(torch.equal(trained[name], exported[name]) for name in trained)


def test_eval_only_without_a_checkpoint_is_refused(tiny, tmp_path):
    with pytest.raises(WeightsError, match="found no checkpoint"):
        tiny.start(tmp_path / "empty", options=("--eval-only",))


def test_model_weights_start_a_new_run_at_iteration_0(tiny, tmp_path):
    tiny.start(tmp_path / "first", "optim.max_iterations=3")
    weights = tmp_path / "first" / "model_final"
    still = (
        *("optim.max_iterations=1", "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0"),
        *("optim.base_lr=1e-12", f"MODEL.WEIGHTS={weights}"),
    )
    tiny.start(tmp_path / "second", *still)
    assert [row["iteration"] for row in metrics(tmp_path / "second")] == [0]
    first, second = read_state(weights), read_state(tmp_path / "second" / "model_final")
    assert (first["iteration"], second["iteration"]) == (2, 0)
    for name, tensor in first["model"].items():
        if name.startswith("student."):
            torch.testing.assert_close(tensor, second["model"][name], rtol=1e-6, atol=1e-6)
    tiny.start(tmp_path / "export", *still, options=("--eval-only",))
    assert (tmp_path / "export" / "eval" / "manual_3" / "teacher_checkpoint.pth").is_file()


def test_the_option_eval_of_old_scripts_warns(tiny, tmp_path):
    tiny.start(tmp_path, "optim.max_iterations=3", options=("--eval", "knn"))
    assert '--eval "knn" has no effect' in (tmp_path / "logs" / "log.txt").read_text()


@pytest.mark.parametrize("separate_head", [False, True], ids=["shared", "separate"])
def test_backbone_and_heads_of_an_earlier_run_are_kept_apart(tiny, tmp_path, separate_head):
    head = f"ibot.separate_head={separate_head}"
    tiny.start(tmp_path / "first", "optim.max_iterations=3", head)
    exports = tmp_path / "first" / "eval" / "training_2"
    cfg = tiny.resolve(
        f"student.pretrained_weights={exports / 'teacher_checkpoint.pth'}", f"head.head_path={exports}", head
    )
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    student, teacher = load(exports / "student_checkpoint.pth"), load(exports / "teacher_checkpoint.pth")
    for name, tensor in model.student["backbone"].state_dict().items():
        assert torch.equal(tensor, teacher["teacher"][f"backbone.{name}"]), name
        assert torch.equal(tensor, model.teacher["backbone"].state_dict()[name]), name
    for network, content in (("student", student["student"]), ("teacher", teacher["teacher"])):
        for part in ("dino_head", "ibot_head") if separate_head else ("dino_head",):
            for name, tensor in getattr(model, network)[part].state_dict().items():
                assert torch.equal(tensor, content[f"{part}.{name}"]), (network, part, name)
    apart = "ibot_head.mlp.0.weight" if separate_head else "dino_head.mlp.0.weight"
    assert not torch.equal(student["student"][apart], teacher["teacher"][apart])


def test_run_length_in_images_or_passes(tiny, tmp_path):
    tiny.start(tmp_path / "images", "optim.max_images=14")
    assert written_config(tmp_path / "images").optim.max_iterations == 4
    tiny.start(tmp_path / "accumulated", "optim.max_images=28", "optim.accumulate_steps=2")
    assert written_config(tmp_path / "accumulated").optim.max_iterations == 4
    assert "4 iterations of 8 images = 32 images" in (tmp_path / "accumulated/logs/log.txt").read_text()
    tiny.start(tmp_path / "passes", "optim.max_passes=0.5")
    assert written_config(tmp_path / "passes").optim.max_iterations == 3
    tiny.start(tmp_path / "passes", "optim.max_passes=0.5")  # the same run again: nothing has changed
    assert not list((tmp_path / "passes").glob("config.*.yaml"))
    with pytest.raises(ConfigError, match="warm-up of 30 iterations"):
        tiny.start(tmp_path / "long", "optim.max_images=14", "optim.warmup_epochs=10")
    with pytest.raises(ConfigError, match="freezing of the last layer of 15 iterations"):
        tiny.start(tmp_path / "frozen", "optim.max_images=14", "optim.freeze_last_layer_epochs=5")


def test_a_loss_that_is_not_finite_stops_before_weights_move(tiny, tmp_path, monkeypatch):
    from dinov2.train import train as module

    models = []

    def poisoned(*args, **kwargs):
        model = SSLMetaArch(*args, **kwargs)
        model.student["dino_head"].mlp[0].bias.data[0] = float("nan")
        models.append((model, {name: value.clone() for name, value in model.student.state_dict().items()}))
        return model

    monkeypatch.setattr(module, "SSLMetaArch", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"iteration 1: .* a loss is not finite .*total_loss nan"):
        # The self-check would name it before the first step.
        tiny.start(tmp_path, "train.self_check=off", "train.max_bad_steps=2")
    model, before = models[0]
    after = model.student.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "dino_head.mlp.0.bias")


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("train.dataset_path=ImageFolde:root=x", DatasetError, "ImageFolde"),
        ("train.dataset_path=ImageFolder:root=/no/such/folder", DatasetError, "/no/such/folder"),
        ("student.pretrained_weights=/no/such/file.pth", WeightsError, "/no/such/file.pth"),
        ("head.head_path=/no/such/folder", WeightsError, "head.head_path"),
        ("optim.warmup_pochs=3", ConfigError, "warmup_epochs"),
    ],
)
def test_mistakes_end_in_one_sentence(tiny, tmp_path, override, error, message):
    with pytest.raises(error, match=message) as caught:
        tiny.start(tmp_path / "run", override)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_tile_stops_the_run_with_its_path_in_one_sentence(tiny, tmp_path, capsys, workers):
    folder = tmp_path / "tiles" / "class"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"broken_{number}.png").write_bytes(b"")
    dataset = f"train.dataset_path=ImageFolder:root={folder.parent}"
    with pytest.raises(SystemExit):
        cli.run(tiny.start, tmp_path / "run", dataset, f"train.num_workers={workers}")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "broken_" in line and "can not read image for sample" in line


def test_an_empty_dataset_is_refused(tiny, tmp_path):
    (tmp_path / "tiles" / "class").mkdir(parents=True)
    with pytest.raises(DatasetError, match="tiles"):
        tiny.start(tmp_path / "run", f"train.dataset_path=ImageFolder:root={tmp_path / 'tiles'}")


def test_an_output_directory_that_cannot_be_made_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        tiny.start(tmp_path / "file" / "run")


def test_weights_of_another_width_are_refused_with_both_values(tiny, tmp_path):
    tiny.start(tmp_path / "first", "optim.max_iterations=3")
    weights = tmp_path / "first" / "eval" / "training_2" / "teacher_checkpoint.pth"
    with pytest.raises(WeightsError, match=r"(?s)32.*64|64.*32"):
        tiny.start(tmp_path / "second", f"student.pretrained_weights={weights}", "student.embed_dim=64")
