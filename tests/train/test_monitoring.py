"""Evaluation in the loop, in whole runs: the records, that training does not notice, resuming, bad input."""

import json
import math
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov2.data.transforms import make_classification_eval_transform
from dinov2.errors import ConfigError, DatasetError, Interrupted
from dinov2.eval import health
from dinov2.train import SSLMetaArch
from dinov2.train.monitoring.images import Images, open_sources, pixels
from dinov2.train.monitoring.judge import Decision, Judge
from dinov2.train.monitoring.monitor import START_FILE, Monitor
from dinov2.train.monitoring.probe import cls_features, normalized, untouched
from dinov2.train.monitoring.records import RECORDS_FILE, read_records
from tests.checkpoints import read_state

MONITORED = ("evaluation.monitor_period=2", "train.self_check=off")
TIMED = {"iter_time", "data_time", "images_per_second"}


@pytest.fixture(scope="session")
def labelled_folder(tile_folder, tmp_path_factory):
    """The tiles in two classes that stand for nothing, and a third that only one folder has."""
    root = tmp_path_factory.mktemp("labelled")
    for number, tile in enumerate(sorted((tile_folder / "nest").iterdir())):
        split, name = ("train", "val")[number % 2], ("even", "odd")[number // 2 % 2]
        (root / split / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(tile, root / split / name)
    (root / "other" / "third").mkdir(parents=True)
    (root / "single" / "even").mkdir(parents=True)
    shutil.copy(tile, root / "other" / "third")
    shutil.copy(tile, root / "single" / "even")
    return root


def labels(root, train="train", val="val"):
    return (
        f"evaluation.train_dataset_path=ImageFolder:root={root / train}",
        f"evaluation.val_dataset_path=ImageFolder:root={root / val}",
        "evaluation.nb_knn=3",
    )


def rows_of(out):
    rows = [json.loads(line) for line in (out / "training_metrics.json").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def tensors(out):
    return read_state(out / "model_final")["model"]


def assert_equal_records(got, expected):
    assert [record.iteration for record in got] == [record.iteration for record in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.line() == other.line()


@pytest.fixture(scope="session")
def monitored(tile_folder, labelled_folder, tmp_path_factory):
    """(TinyRun, folder of a run that was evaluated, its overrides)"""
    from tests.train.conftest import TinyRun

    folder = tmp_path_factory.mktemp("monitored")
    run = TinyRun(folder, tile_folder)
    overrides = (*MONITORED, *labels(labelled_folder), "checkpointing.period=2", "optim.max_iterations=5")
    run.start(folder / "run", *overrides)
    return run, folder / "run", overrides


def test_a_run_is_scored_at_its_start_each_period_and_its_end(monitored):
    _, out, _ = monitored
    records = read_records(out / RECORDS_FILE)
    assert [record.iteration for record in records] == [0, 2, 4, 5]
    knn = {f"knn_{name}" for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc")}
    both = knn | {"rankme", "rankme_centered", "alpha_req", "feature_std", "mean_cosine", "feature_norm"}
    use = ("prototype_entropy", "prototype_usage_entropy", "prototype_perplexity", "prototypes_used")
    names = both | {f"student_{name}" for name in both}
    names |= {f"{network}_{name}" for network in ("teacher", "student") for name in use}
    names |= {"agreement", "teacher_student_kl", "drift_cosine", "drift_cka"}
    for record in records:
        assert set(record.signals) == names
        undefined = {name for name, value in record.signals.items() if not math.isfinite(value)}
        assert undefined <= {"alpha_req", "student_alpha_req"}  # of 16 images there is none
        assert set(record.intervals) == knn | {f"student_{name}" for name in knn}
        low, high = record.intervals["knn_accuracy"]
        assert low <= record.signals["knn_accuracy"] <= high
        assert record.collapse == ()
    start, end = records[0].signals, records[-1].signals
    assert start["drift_cosine"] == pytest.approx(1) and start["drift_cka"] == pytest.approx(1)
    assert start["agreement"] == pytest.approx(1)  # the teacher begins as a copy of the student
    assert end["drift_cosine"] < 1 - 1e-7 and end["agreement"] < 1 - 1e-6
    log = (out / "logs" / "log.txt").read_text()
    assert "evaluation after 0 iterations, the starting backbone: k-NN balanced accuracy" in log
    assert log.count("] evaluation after ") == 4


def test_training_does_not_notice_that_it_is_evaluated(monitored, tmp_path):
    run, out, overrides = monitored
    run.start(tmp_path / "quiet", *overrides, "evaluation.monitor_period=0")
    assert not (tmp_path / "quiet" / RECORDS_FILE).exists()
    assert rows_of(out) == rows_of(tmp_path / "quiet")
    expected, got = tensors(tmp_path / "quiet"), tensors(out)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert any("center" in name for name in expected)


def test_a_resumed_run_has_the_records_of_an_uninterrupted_one(monitored, tmp_path):
    run, out, overrides = monitored
    resumed = tmp_path / "run"
    resumed.mkdir()
    shutil.copytree(out / "model_0000001", resumed / "model_0000001")
    for name in (RECORDS_FILE, START_FILE):
        shutil.copy(out / name, resumed / name)
    with (resumed / RECORDS_FILE).open("a") as file:
        file.write('{"iteration": 2, "sig')  # a kill
    run.start(resumed, *overrides)
    assert_equal_records(read_records(resumed / RECORDS_FILE), read_records(out / RECORDS_FILE))


def test_a_missing_evaluation_is_made_up_for_and_a_lost_start_is_told(monitored, tmp_path):
    run, out, overrides = monitored
    resumed = tmp_path / "run"
    resumed.mkdir()
    shutil.copytree(out / "model_0000001", resumed / "model_0000001")
    run.start(resumed, *overrides)
    records = read_records(resumed / RECORDS_FILE)
    assert [record.iteration for record in records] == [2, 4, 5]
    expected = read_records(out / RECORDS_FILE)[1].signals
    assert records[0].signals["rankme"] == expected["rankme"]
    assert all(math.isnan(record.signals["drift_cka"]) for record in records)
    assert "drift from the starting backbone is not told" in (resumed / "logs" / "log.txt").read_text()


@pytest.mark.slow
def test_drift_is_not_told_of_other_images(monitored, tmp_path):
    run, out, overrides = monitored
    resumed = tmp_path / "run"
    resumed.mkdir()
    shutil.copytree(out / "model_0000001", resumed / "model_0000001")
    for name in (RECORDS_FILE, START_FILE):
        shutil.copy(out / name, resumed / name)
    run.start(resumed, *overrides, "evaluation.monitor_samples=17")
    assert math.isnan(read_records(resumed / RECORDS_FILE)[-1].signals["drift_cka"])
    assert "is of other images" in (resumed / "logs" / "log.txt").read_text()


@pytest.mark.slow
def test_a_new_run_sets_the_records_of_the_old_one_aside(monitored, tmp_path):
    run, out, overrides = monitored
    again = tmp_path / "run"
    shutil.copytree(out, again)
    run.start(again, *overrides, "optim.max_iterations=3", options=("--no-resume",))
    assert [r.iteration for r in read_records(again / RECORDS_FILE)] == [0, 2, 3]
    assert len(read_records(again / "before_1" / RECORDS_FILE)) == 4


def test_records_that_cannot_be_written_do_not_end_the_run(tiny, tmp_path):
    out = tmp_path / "run"
    for name in (RECORDS_FILE, START_FILE):
        (out / name).mkdir(parents=True)  # in the way
    tiny.start(out, *MONITORED, "optim.max_iterations=3")
    log = (out / "logs" / "log.txt").read_text()
    assert log.count("an evaluation in the loop is not written down, the run goes on") == 4
    assert "kept of the start: cosine 0.9" in log.replace("1.000", "0.9")
    assert (out / "model_final").is_dir()


def test_without_labels_there_is_no_knn(tiny, tmp_path):
    tiny.start(
        tmp_path, *MONITORED, "optim.max_iterations=3", "ibot.separate_head=true", "dino.loss_weight=0"
    )
    signals = read_records(tmp_path / RECORDS_FILE)[-1].signals
    assert not any("knn" in name or "prototype" in name for name in signals)
    assert math.isfinite(signals["student_rankme"])


@pytest.mark.slow
def test_an_adapted_student_is_evaluated(tiny, tmp_path):
    pytest.importorskip("peft")
    tiny.start(tmp_path, *MONITORED, "optim.max_iterations=3", "student.lora_rank=2")
    last = read_records(tmp_path / RECORDS_FILE)[-1].signals
    assert last["agreement"] < 1 - 1e-7 and last["drift_cosine"] < 1 - 1e-9
    assert last["rankme"] != last["student_rankme"]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ("single", "single", "are of one class"),
        ("train", "other", "classes of the datasets differ"),
        ("train", "nowhere", "nowhere"),
    ],
)
def test_labels_that_cannot_be_used_end_in_one_sentence(tiny, tmp_path, labelled_folder, train, val, message):
    with pytest.raises(DatasetError, match=message) as caught:
        tiny.start(tmp_path / "run", *MONITORED, *labels(labelled_folder, train, val))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "run" / "config.yaml").exists()  # nothing was built


def test_one_labelled_set_alone_is_refused(tiny, tmp_path, labelled_folder):
    with pytest.raises(ConfigError, match=r"evaluation\.val_dataset_path is empty"):
        tiny.resolve(labels(labelled_folder)[0])


def test_a_dataset_without_labels_is_refused(tiny, tmp_path, tile_folder):
    (tmp_path / "images.csv").write_text(f"path\n{next((tile_folder / 'nest').iterdir())}\n")
    unlabelled = f"CustomImageDataset:root={tmp_path}:extra={tmp_path / 'images.csv'}"
    with pytest.raises(DatasetError, match="has no labels"):
        tiny.start(
            tmp_path / "run",
            *MONITORED,
            f"evaluation.train_dataset_path={unlabelled}",
            f"evaluation.val_dataset_path={unlabelled}",
        )


class Stops(Judge):
    """Ends the run with the record of two iterations."""

    def collapse(self, record, start):
        assert start.iteration == 0
        return ("it is said to be",) if record.iteration else ()

    def on_record(self, records, **given):
        return Decision(records[-1].iteration == 2, "two are enough")


def test_a_judge_ends_the_run_and_a_restart_takes_no_step(tiny, tmp_path, monkeypatch):
    from dinov2.train import train as module

    def judged(*args, **kwargs):
        return Monitor(*args[:3], judge=Stops(), **kwargs)

    monkeypatch.setattr(module, "Monitor", judged)
    out = tmp_path / "run"
    tiny.start(out, *MONITORED)
    assert read_state(out / "model_final")["iteration"] == 1
    assert (out / "eval" / "training_1" / "teacher_checkpoint.pth").is_file()
    assert [record.collapse for record in read_records(out / RECORDS_FILE)] == [(), ("it is said to be",)]
    assert [row["iteration"] for row in rows_of(out)] == [0, 1]
    tiny.start(out, *MONITORED)
    assert [row["iteration"] for row in rows_of(out)] == [0, 1]
    log = (out / "logs" / "log.txt").read_text()
    assert "the run ends after iteration 1: two are enough" in log
    assert "no step is taken after iteration 1: two are enough" in log
    assert "COLLAPSED: it is said to be" in log


def prepared(cfg):
    torch.manual_seed(3)
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    return model.train()


def test_features_are_those_of_the_backbone_on_transformed_images(tiny):
    cfg = tiny.resolve(*MONITORED, "evaluation.batch_size=7", "evaluation.monitor_samples=20")
    model = prepared(cfg)
    images = Images(cfg, open_sources(cfg).monitored)
    assert [len(batch) for batch in images.batches] == [7, 7, 6]
    # Modes that no call of train() would set must survive, too.
    model.student["backbone"].blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    with untouched(model):
        features = cls_features(model, "student", images)
        torch.rand(3)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(before, torch.get_rng_state())
    assert not features.requires_grad
    whole = torch.cat(images.batches)
    assert whole.dtype == torch.uint8 and len(whole) == 20
    backbone = model.student["backbone"].eval()
    with torch.no_grad():
        expected = backbone(normalized(model, whole))
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


def test_pixels_are_those_of_the_evaluation_transform(tiny):
    from PIL import Image

    cfg = tiny.resolve()
    noise = np.random.default_rng(0).integers(0, 255, (48, 40, 3), dtype=np.uint8)
    transform = make_classification_eval_transform(
        resize_size=32, crop_size=32, mean=cfg.crops.mean, std=cfg.crops.std
    )
    got = normalized(prepared(cfg), pixels(32)(Image.fromarray(noise))[None])[0]
    torch.testing.assert_close(got, transform(Image.fromarray(noise)), rtol=1e-6, atol=1e-6)


def test_more_images_than_memory_should_hold_are_refused(tiny, monkeypatch):
    from dinov2.train.monitoring import images as module

    cfg = tiny.resolve(*MONITORED)
    dataset = open_sources(cfg).monitored
    held = -(-len(dataset) // cfg.evaluation.batch_size) * cfg.evaluation.batch_size * 3 * 32 * 32
    monkeypatch.setattr(module, "MOST_BYTES", held)
    module.require_room(cfg, [dataset])
    with pytest.raises(DatasetError, match="name fewer"):  # all of them together
        module.require_room(cfg, [dataset, dataset])
    monkeypatch.setattr(module, "MOST_BYTES", held - 1)
    with pytest.raises(DatasetError, match="name fewer"):
        Monitor(cfg, prepared(cfg), open_sources(cfg))


def test_prototypes_are_assigned_as_documented(tiny):
    from dinov2.train.monitoring.probe import prototype_signals

    for centering in ("centering", "sinkhorn_knopp"):
        cfg = tiny.resolve(*MONITORED, f"train.centering={centering}")
        model = prepared(cfg)
        model.dino_loss.center.normal_()
        features = {name: torch.randn(10, 32) for name in ("teacher", "student")}
        with untouched(model):
            got = prototype_signals(model, features, 0.05, batch_size=4)
        with torch.no_grad():
            logits = {name: getattr(model, name)["dino_head"](features[name]) for name in features}
        center = model.dino_loss.center if centering == "centering" else 0.0
        teacher = ((logits["teacher"] - center).double() / 0.05).softmax(-1)
        student = (logits["student"].double() / 0.1).softmax(-1)
        expected = health.prototype_signals([teacher])
        assert got["teacher_prototype_perplexity"] == pytest.approx(
            expected["prototype_perplexity"], rel=1e-5
        )
        assert got["teacher_student_kl"] == pytest.approx(
            health.kl_divergence(teacher, student).mean().item(), rel=1e-4
        )


@pytest.mark.slow
def test_a_signal_puts_the_evaluation_off_until_the_run_comes_back(tiny, tmp_path, monkeypatch):
    from dinov2.train import train as module

    class Signals(Judge):
        def on_record(self, records, **given):
            if len(records) == 2:  # during the evaluation after one iteration
                os.kill(os.getpid(), signal.SIGTERM)
            return Decision()

    def judged(*args, **kwargs):
        return Monitor(*args[:3], judge=Signals(), **kwargs)

    out, overrides = (
        tmp_path / "run",
        (*MONITORED[1:], "evaluation.monitor_period=1", "optim.max_iterations=4"),
    )
    tiny.start(tmp_path / "whole", *overrides)
    with monkeypatch.context() as patch:
        patch.setattr(module, "Monitor", judged)
        with pytest.raises(Interrupted, match="saved after iteration 1"):
            tiny.start(out, *overrides)
    assert [record.iteration for record in read_records(out / RECORDS_FILE)] == [0, 1]
    tiny.start(out, *overrides)
    assert_equal_records(read_records(out / RECORDS_FILE), read_records(tmp_path / "whole" / RECORDS_FILE))


@pytest.mark.slow
def test_a_run_that_goes_back_drops_the_records_it_makes_again(tiny, tmp_path, monkeypatch):
    from dinov2.train import loop as module

    real, calls = module.train_step, []

    def failing(*args, **kwargs):
        calls.append(None)
        result = real(*args, **kwargs)
        return replace(result, problem="a loss is said to be nan") if len(calls) in (4, 5) else result

    monkeypatch.setattr(module, "train_step", failing)
    monkeypatch.setattr(module, "diagnose", lambda *args, **kwargs: "no diagnosis")
    tiny.start(
        tmp_path,
        *("evaluation.monitor_period=1", "train.self_check=off", "checkpointing.period=2"),
        *("train.max_bad_steps=2", "optim.max_iterations=5"),
    )
    assert "goes back to iteration 2" in (tmp_path / "logs" / "log.txt").read_text()
    records = read_records(tmp_path / RECORDS_FILE)
    assert [record.iteration for record in records] == [0, 1, 2, 3, 4, 5]


def test_features_that_are_not_finite_are_a_record_and_a_warning(tiny, tmp_path, caplog, labelled_folder):
    cfg = tiny.resolve(*MONITORED, *labels(labelled_folder), f"train.output_dir={tmp_path}")
    model = prepared(cfg)
    model.teacher["backbone"].norm.weight.fill_(math.nan)
    Monitor(cfg, model, open_sources(cfg)).begin(0, continues=False, teacher_temp=0.05)
    (record,) = read_records(tmp_path / RECORDS_FILE)
    for name in ("rankme", "knn_accuracy", "teacher_prototype_entropy", "teacher_student_kl", "agreement"):
        assert math.isnan(record.signals[name]), name
    assert math.isfinite(record.signals["student_rankme"])
    assert "the teacher's features of 40 images are not finite" in caplog.text


def test_an_image_that_cannot_be_read_is_replaced_with_a_warning(tiny, tmp_path, tile_folder, caplog):
    shutil.copytree(tile_folder, tmp_path / "tiles")
    (tmp_path / "tiles" / "nest" / "03.png").write_bytes(b"")
    cfg = tiny.resolve(
        *MONITORED, "evaluation.monitor_samples=30", f"train.dataset_path=ImageFolder:root={tmp_path}/tiles"
    )
    images = Images(cfg, open_sources(cfg).monitored)
    assert images.count == 24
    assert "look at another image instead of" in caplog.text and "03.png" in caplog.text
