"""Patients scored by their slides while a run goes on: whole runs, and all that is wrong said before them."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from dinov2.configs import resolve_config
from dinov2.data.slides.reader import open_slide
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.slides import scouting
from dinov2.train.monitoring.images import open_sources, pixels
from dinov2.train.monitoring.monitor import Monitor
from dinov2.train.monitoring.records import RECORDS_FILE, read_records
from dinov2.train.monitoring.slides import FOLDER
from tests.distributed.launch import run_script
from tests.train import monitoring_worker, slide_sets
from tests.train.test_monitoring import MONITORED, assert_equal_records, prepared, rows_of, tensors


@pytest.fixture(scope="session")
def slide_set(tmp_path_factory):
    """A folder of 13 slides of 12 patients with their labels, and the overrides that have them scored."""
    folder = tmp_path_factory.mktemp("slide_set") / "slides"
    return folder, slide_sets.make(folder, 12)


@pytest.fixture(scope="session")
def scored(tile_folder, slide_set, tmp_path_factory):
    """(TinyRun, folder of a run that scored them at 0, 4 and its end, its overrides)"""
    from tests.train.conftest import TinyRun

    folder = tmp_path_factory.mktemp("scored")
    run = TinyRun(folder, tile_folder)
    overrides = (
        *(*MONITORED, *slide_set[1], "checkpointing.period=2", "optim.max_iterations=5"),
        *("evaluation.slides.period=4", "evaluation.best_checkpoint=slide_auroc"),
    )
    run.start(folder / "run", *overrides)
    return run, folder / "run", overrides


@pytest.mark.slow
def test_patients_are_scored_at_the_start_each_period_and_the_end(scored):
    _, out, _ = scored
    records = read_records(out / RECORDS_FILE)
    assert [record.iteration for record in records] == [0, 2, 4, 5]
    with_slides = [record for record in records if "slide_auroc" in record.signals]
    assert [record.iteration for record in with_slides] == [0, 4, 5]
    for record in with_slides:
        low, high = record.intervals["slide_auroc"]
        # Darker tissue is told apart by a network that knows nothing.
        assert 0.5 < low <= record.signals["slide_auroc"] <= high <= 1
    best = json.loads((out / "best" / "best.json").read_text())
    assert best["signal"] == "slide_auroc" and best["value"] == with_slides[0].signals["slide_auroc"]
    log = (out / "logs" / "log.txt").read_text()
    assert log.count("slide AUROC 0.") + log.count("slide AUROC 1.") == 3
    assert "13 slides of 12 patients (no 6, yes 6), 78 tiles" in log
    assert "The patients have taken part in this choice" in log
    assert len(list((out / FOLDER).glob("*.png"))) == 13


@pytest.mark.slow
def test_training_does_not_notice_and_a_resumed_run_looks_for_no_tissue(scored, tmp_path, monkeypatch):
    run, out, overrides = scored
    run.start(tmp_path / "quiet", *overrides, "evaluation.slides.path=''", *nothing_scored())
    assert rows_of(out) == rows_of(tmp_path / "quiet")
    expected, got = tensors(tmp_path / "quiet"), tensors(out)
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    resumed = tmp_path / "run"
    resumed.mkdir()
    for name in ("model_0000001", FOLDER):
        shutil.copytree(out / name, resumed / name)
    for name in (RECORDS_FILE, "evaluation_start.npz"):
        shutil.copy(out / name, resumed / name)
    (resumed / FOLDER / "S03.json").write_text('{"corners": [[')  # cut short

    looked = []
    real = scouting.scout
    monkeypatch.setattr(
        scouting, "scout", lambda entry, order: looked.append(entry.name) or real(entry, order)
    )
    run.start(resumed, *overrides)
    assert looked == ["S03"]
    assert_equal_records(read_records(resumed / RECORDS_FILE), read_records(out / RECORDS_FILE))


def nothing_scored():
    return (
        *(f"evaluation.slides.{name}=''" for name in ("labels", "target")),
        "evaluation.best_checkpoint=none",
    )


@pytest.mark.slow
def test_tiles_are_those_of_the_slides_where_their_corners_lie(tiny, slide_set, tmp_path):
    cfg = tiny.resolve(*MONITORED, *slide_set[1], f"train.output_dir={tmp_path}", "evaluation.batch_size=5")
    slides = open_sources(cfg).slides
    kept = json.loads((tmp_path / FOLDER / "S02.json").read_text())
    assert len(kept["corners"]) == len(slides.rows["S02"]) == 6
    with open_slide(str(slide_set[0] / "S02.tiff")) as slide:
        for index, (x, y) in zip(slides.rows["S02"], kept["corners"], strict=True):
            tile, _ = slides.tiles[index]
            assert torch.equal(tile, pixels(32)(slide.read(x, y, 32, 0.5)))
    assert [patient.name for patient in slides.patients] == [f"P{n:02d}" for n in range(12)]
    assert len(slides.patients[-1].bags) == 2


@pytest.mark.slow
def test_attention_scores_them_too_and_random_numbers_stay(tiny, slide_set, tmp_path):
    overrides = ["evaluation.slides.aggregator=abmil", "train.num_workers=1"]
    cfg = tiny.resolve(*MONITORED, *slide_set[1], f"train.output_dir={tmp_path}", *overrides)
    monitor = Monitor(cfg, prepared(cfg), open_sources(cfg))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for done in (0, 2):
        monitor.evaluate(done, 0.05)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    first, second = monitor.records
    assert first.signals["slide_auroc"] == second.signals["slide_auroc"]  # of the same networks
    assert first.intervals["slide_auroc"] == second.intervals["slide_auroc"]


@pytest.mark.slow
def test_features_that_are_not_finite_have_no_score(tiny, slide_set, tmp_path):
    cfg = tiny.resolve(*MONITORED, *slide_set[1], f"train.output_dir={tmp_path}")
    model = prepared(cfg)
    model.teacher["backbone"].norm.weight.fill_(math.nan)
    monitor = Monitor(cfg, model, open_sources(cfg))
    monitor.begin(0, continues=False, teacher_temp=0.05)
    assert math.isnan(monitor.records[0].signals["slide_auroc"])
    assert "slide_auroc" not in monitor.records[0].intervals


@pytest.mark.slow
def test_two_processes_score_as_one_and_training_goes_on_as_without(tiny, slide_set, tmp_path):
    OmegaConf.save(
        tiny.resolve(*MONITORED, *slide_set[1], "evaluation.batch_size=4", "optim.warmup_epochs=0"),
        tmp_path / "config.yaml",
    )
    full = [
        f"compute_precision.{network}.{part}.sharding_strategy=FULL_SHARD"
        for network in ("student", "teacher")
        for part in ("backbone", "dino_head")
    ]
    cases = {
        "one": {"start": {"overrides": [], "evaluate": True, "steps": 0}},
        "two": {
            "start": {"overrides": full, "evaluate": True, "steps": 0},
            "evaluated": {"overrides": full, "evaluate": True, "steps": 4},
            "quiet": {"overrides": full, "evaluate": False, "steps": 4},
        },
    }
    found = {}
    for world_size, (name, own) in enumerate(cases.items(), 1):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "cases.json").write_text(json.dumps(own))
        arguments = [str(tmp_path / "config.yaml"), str(folder / "cases.json"), str(folder)]
        if world_size == 1:
            monitoring_worker.main(*arguments)
        else:
            run_script("tests/train/monitoring_worker.py", *arguments, world_size=world_size)
        found[name] = {case: torch.load(folder / f"{case}.pt", weights_only=True) for case in own}
    two = found["two"]
    assert two["start"]["records"] == found["one"]["start"]["records"]
    assert json.loads(two["start"]["records"][0])["signals"]["slide_auroc"] > 0.5
    assert len(list((tmp_path / "two" / "start" / FOLDER).glob("*.json"))) == 13
    assert two["evaluated"]["losses"] == two["quiet"]["losses"]
    expected = two["quiet"]["state"]
    assert all(torch.equal(value, expected[name]) for name, value in two["evaluated"]["state"].items())


@pytest.mark.slow
def test_all_that_is_wrong_is_said_at_once_before_the_networks_are_built(tiny, slide_set, tmp_path):
    source, overrides = slide_set
    folder = tmp_path / "slides"
    shutil.copytree(source, folder)
    glass = np.random.default_rng(0).normal(243, 1, (600, 600, 3)).clip(0, 255).astype(np.uint8)
    slide_sets.write_tiff(folder / "S00.tiff", glass)
    slide_sets.write_tiff(folder / "S01.tiff", glass, mpp=None)
    whole = (folder / "S02.tiff").read_bytes()
    (folder / "S02.tiff").write_bytes(whole[: len(whole) * 2 // 3])
    rows = [(f"P{n:02d}", f"S{n:02d}", ("no", "yes")[n % 2]) for n in range(10)]
    rows[3] = ("P03", "S03", "")
    rows += [("P10", "S99", "no"), ("P11", "S05", "yes"), ("P12", "S11", "rare"), ("P04", "S10", "yes")]
    slide_sets.write_table(folder / "patients.csv", rows)
    with pytest.raises(DatasetError) as caught:
        tiny.start(tmp_path / "run", *MONITORED, *slide_sets.overrides(folder))
    text = str(caught.value)
    for part in (
        "S00: none of the 324 places for a tile has at least 25% tissue",
        "S01: the slide",
        "does not say how large its pixels are",
        "S02: ",
        "S03 of patient P03 (line 5)",
        f'slides without a file in "{folder}" (add them, or delete their lines): S99 of patient P10',
        "slides of several patients: S05 of P05, P11",
        "P04 (no, yes)",
        "fewer patients than the 3 folds (lower evaluation.slides.folds): rare (1)",
    ):
        assert part in text, f"{part!r} is not in {text}"
    assert "S06" not in text
    assert not (tmp_path / "run" / RECORDS_FILE).exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["evaluation.slides.path=x"], "slides.labels and evaluation.slides.target are empty"),
        (["evaluation.slides.labels=x"], "slides.path and evaluation.slides.target are empty"),
        (["evaluation.slides.target=msi"], "slides.path and evaluation.slides.labels are empty"),
        (["evaluation.best_checkpoint=slide_auroc"], "is slide_auroc, which needs slides"),
        (["evaluation.slides.aggregator=transformer"], 'one of "mean", "abmil" is wanted'),
        (["evaluation.slides.folds=1"], "at least 2"),
        (
            [*slide_sets.overrides(Path("x")), "evaluation.monitor_period=0"],
            "nothing is evaluated",
        ),
        (
            [
                *slide_sets.overrides(Path("x")),
                "evaluation.monitor_period=4",
                "evaluation.slides.period=6",
            ],
            "the 4 iterations between evaluations in the loop .* do not divide: 8 fits",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused(overrides, sentence):
    with pytest.raises(ConfigError, match=sentence):
        resolve_config("", overrides)
