"""The protocol from bags and labels to results, on patients with a planted signal."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.errors import ConfigError, DatasetError, WeightsError
from dinov2.eval.predictions import read_predictions
from dinov2.eval.report import charts
from dinov2.eval.report.collect import collect
from dinov2.eval.slides import train
from dinov2.eval.slides.aggregators import recipe_of
from dinov2.eval.slides.cohort import Cohort, Columns, Patient, Problems, read_cohort
from dinov2.eval.slides.fitting import BagReading, _BagFiles, _units
from dinov2.eval.slides.folds import make_folds
from dinov2.eval.slides.models import load_model
from tests.eval.slides.planted import Planted, make, write_labels

QUICK = ["--epochs", "4", "--learning-rate", "1e-3", "--bootstrap-draws", "50"]


def run(planted: Planted, out: Path, *options: str):
    arguments = ["--bags", str(planted.bags), "--labels", str(planted.labels), "--target", "msi"]
    parser = train.get_args_parser()
    return train.main(parser.parse_args([*arguments, "--output-dir", str(out), "--device", "cpu", *options]))


def summary(out: Path):
    return json.loads((out / "results_eval_slides_summary.json").read_text())


def pooled(out: Path):
    return next(row for row in summary(out)["results"] if row["setting"]["fold"] == "pooled")


def attention_precision(planted: Planted, out: Path) -> float:
    """Mean share of marked tiles among as many most attended ones, in the slides that a fold tests."""
    with (out / "folds.csv").open() as file:
        tested = {row["patient"]: row["fold"] for row in csv.DictReader(file) if row["part"] == "test"}
    found = []
    for slide, marked in planted.marked.items():
        model = load_model(out / f"model_fold_{tested[slide.split('-')[0]]}.pt").model
        attention = model(torch.load(planted.bags / f"{slide}.pt", weights_only=True)).attention
        top = attention.topk(len(marked)).indices.tolist()
        found.append(len(set(top) & set(marked.tolist())) / len(marked))
    return float(np.mean(found))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Planted:
    folder = tmp_path_factory.mktemp("small")
    return make(folder, patients=40, tiles=50, width=16, slides=2, share=0.04, strength=14)


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    external = make(out / "external", patients=10, tiles=50, width=16, strength=14, seed=5, prefix="E")
    cohort = ["--external-bags", str(external.bags), "--external-labels", str(external.labels)]
    run(small, out, "--folds", "3", *QUICK, "--epochs", "3", *cohort)
    return out


def test_a_planted_signal_is_found_and_attended_to(small, trained):
    assert pooled(trained)["scores"]["auroc"] > 0.95
    assert attention_precision(small, trained) > 0.8


def test_the_results_hold_folds_pooled_and_external_scores(trained):
    results = summary(trained)
    names = [(row["role"], row["setting"]["fold"]) for row in results["results"]]
    folds = [f"fold {n}" for n in range(3)]
    assert names == [("val", n) for n in (*folds, "pooled")] + [("test", n) for n in (*folds, "ensemble")]
    assert results["patients"] == 40 and results["slides"] == 80
    row = pooled(trained)
    assert row["samples"] == 40
    for name in ("auroc", "auprc", "balanced_accuracy"):
        low, high = row["intervals"][name]
        assert low <= row["scores"][name] <= high
    means = [row["scores"]["auroc"] for row in results["results"] if row["setting"]["fold"] in folds]
    assert results["over_folds"]["val"]["auroc"]["mean"] == pytest.approx(np.mean(means[:3]))
    assert results["over_folds"]["test"]["auroc"]["mean"] == pytest.approx(np.mean(means[3:]))


def test_the_ensemble_is_the_mean_probability_of_the_fold_models(trained):
    parts = [read_predictions(trained / f"predictions_slides_fold-{n}_test.csv")[0] for n in range(3)]
    ensemble, names = read_predictions(trained / "predictions_slides_ensemble_test.csv")
    torch.testing.assert_close(ensemble.scores, torch.stack([part.scores for part in parts]).mean(dim=0))
    assert names == [f"E{n:03d}" for n in range(10)]


def test_the_score_of_a_patient_is_the_mean_logit_of_all_slides(small, trained):
    predictions, names = read_predictions(trained / "predictions_slides_fold-0.csv")
    model = load_model(trained / "model_fold_0.pt").model
    for name, scores in list(zip(names, predictions.scores, strict=True))[:3]:
        bags = [torch.load(small.bags / f"{name}-{n}.pt", weights_only=True) for n in range(2)]
        logit = sum(model(bag).logits.item() for bag in bags) / 2
        assert scores[1].logit().item() == pytest.approx(logit, abs=1e-4)


def test_a_joined_bag_holds_the_tiles_of_all_slides(small, tmp_path):
    run(small, tmp_path, "--folds", "2", *QUICK, "--epochs", "1", "--patient-bag", "joined")
    predictions, names = read_predictions(tmp_path / "predictions_slides_fold-0.csv")
    model = load_model(tmp_path / "model_fold_0.pt").model
    bag = torch.cat([torch.load(small.bags / f"{names[0]}-{n}.pt", weights_only=True) for n in range(2)])
    assert predictions.scores[0, 1].logit().item() == pytest.approx(model(bag).logits.item(), abs=1e-4)


def test_runs_repeat_with_and_without_workers_and_with_the_folds_of_a_file(small, tmp_path):
    options = ["--folds", "2", *QUICK, "--epochs", "1", "--max-tiles", "30"]
    run(small, tmp_path / "a", *options)
    run(small, tmp_path / "b", *options, "--workers", "1")
    with small.labels.open() as file:
        header, *rows = csv.reader(file)
    permuted = tmp_path / "permuted.csv"
    write_labels(permuted, rows[::-1])
    folds = str(tmp_path / "a" / "folds.csv")
    run(Planted(small.bags, permuted, {}), tmp_path / "c", *options, "--folds-file", folds)
    for other in "bc":
        for name in ("folds.csv", "predictions_slides_pooled.csv"):
            assert (tmp_path / other / name).read_text() == (tmp_path / "a" / name).read_text()


def test_several_classes_are_scored(tmp_path):
    planted = make(tmp_path, patients=18, tiles=10, width=8)
    write_labels(planted.labels, [(f"P{n:03d}", f"P{n:03d}-0", "abc"[n % 3]) for n in range(18)])
    run(planted, tmp_path / "out", "--folds", "2", *QUICK, "--epochs", "1", "--aggregator", "mean")
    assert len(pooled(tmp_path / "out")["per_class"]["recall"]) == 3
    assert load_model(tmp_path / "out" / "model_fold_1.pt").model.classifier.out_features == 3


def test_all_that_is_wrong_is_said_at_once_before_anything_is_written(tmp_path):
    planted = make(tmp_path, patients=12, tiles=5, width=8)
    torch.save(torch.randn(5, 9), planted.bags / "P000-0.pt")
    (planted.bags / "P011-0.pt").write_bytes(b"no bag")
    rows = [(f"P{n:03d}", f"P{n:03d}-0", ("no", "yes")[n % 2]) for n in range(12)]
    rows[2] = ("P002", "P002-0", "")
    rows[3] = ("P003", "lost", "yes")
    rows += [("P004", "P005-0", "no"), ("P006", "P006-0", "yes"), ("", "P007-0", "no")]
    rows.append(("X", "P009-0", "rare"))
    write_labels(planted.labels, rows)
    with pytest.raises(DatasetError) as caught:
        run(planted, tmp_path / "out", "--folds", "4")
    text = str(caught.value)
    for part in (
        "P002-0 of patient P002",
        "lost of patient P003",
        "P005-0 of P004, P005",
        "P009-0 of P009, X",
        "P006 (no, yes)",
        "P000-0 (9)",
        "P011-0.pt",
        "without a patient or slide: line 16",
        "rare (1)",
    ):
        assert part in text, f"{part!r} is not in {text}"
    assert not (tmp_path / "out").exists()


def test_only_suffixes_of_slides_and_bags_are_taken_off_their_names(tmp_path):
    planted = make(tmp_path, patients=4, tiles=5, width=8)
    slides = ("P000-0.SVS", "P001-0.h5", "P002-0", "P003-0.2")
    write_labels(planted.labels, [(f"P{n:03d}", slide, "ab"[n % 2]) for n, slide in enumerate(slides)])
    problems = Problems()
    cohort = read_cohort(planted.labels, planted.bags, Columns("msi"), problems)
    assert [[bag.stem for bag in patient.bags] for patient in cohort.patients[:3]] == [
        ["P000-0"],
        ["P001-0"],
        ["P002-0"],
    ]
    with pytest.raises(DatasetError, match="without a bag .*: P003-0.2 of patient P003$"):
        problems.stop()


def test_two_names_of_one_bag_are_refused(tmp_path):
    planted = make(tmp_path, patients=2, tiles=5, width=8)
    rows = [("P000", "P000-0.svs", "a"), ("P000", "P000-0.ndpi", "a"), ("P001", "P001-0", "b")]
    write_labels(planted.labels, rows)
    problems = Problems()
    read_cohort(planted.labels, planted.bags, Columns("msi"), problems)
    with pytest.raises(DatasetError, match=r"share a bag .*: P000-0.ndpi, P000-0.svs \(bag P000-0\)$"):
        problems.stop()


def test_one_class_is_refused(tmp_path):
    planted = make(tmp_path, patients=4, tiles=5, width=8)
    write_labels(planted.labels, [(f"P{n:03d}", f"P{n:03d}-0", "no") for n in range(4)])
    with pytest.raises(DatasetError, match="all patients are of one class, and two are needed: no"):
        run(planted, tmp_path / "out", "--folds", "2")


@pytest.mark.parametrize("counts", [(2, 2), (2, 3)])
def test_classes_too_small_to_validate_are_refused(tmp_path, counts):
    planted = make(tmp_path, patients=sum(counts), tiles=5, width=8)
    labels = [label for label, count in zip("ab", counts, strict=True) for _ in range(count)]
    write_labels(planted.labels, [(f"P{n:03d}", f"P{n:03d}-0", label) for n, label in enumerate(labels)])
    with pytest.raises(DatasetError, match="no patient is left to validate .* fold 0"):
        run(planted, tmp_path / "out", "--folds", "2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("small", [2, 3])
def test_a_class_of_four_leaves_a_patient_to_validate(small):
    patients = [
        Patient(f"{label}{n}", label, ()) for label, count in (("a", small), ("b", 4)) for n in range(count)
    ]
    for count in range(2, small + 1):
        for seed in range(5):
            assert all(fold.val for fold in make_folds(Cohort(tuple(patients), 8), count, seed))


def test_an_external_cohort_that_is_no_test_is_refused(tmp_path):
    planted = make(tmp_path / "own", patients=6, tiles=5, width=8)
    other = make(tmp_path / "other", patients=2, tiles=5, width=9)
    write_labels(other.labels, [("P000", "P000-0", "no"), ("Q", "P001-0", "maybe")])
    with pytest.raises(DatasetError) as caught:
        cohort = ["--external-bags", str(other.bags), "--external-labels", str(other.labels)]
        run(planted, tmp_path / "out", "--folds", "2", *cohort)
    for part in ("patients of both cohorts: P000", "Q (maybe)", "two widths: 8 and 9"):
        assert part in str(caught.value)


def test_slides_of_both_cohorts_are_refused_under_other_names_of_patients_and_files(tmp_path):
    planted = make(tmp_path / "own", patients=8, tiles=5, width=8)
    other = make(tmp_path / "other", patients=3, tiles=5, width=8, prefix="E")
    (other.bags / "E000-0.pt").rename(other.bags / "P000-0.pt")
    (other.bags / "E001-0.pt").unlink()
    (other.bags / "E001-0.pt").symlink_to(planted.bags / "P001-0.pt")
    write_labels(other.labels, [("A", "P000-0", "no"), ("B", "E001-0", "yes"), ("C", "E002-0", "no")])
    with pytest.raises(DatasetError) as caught:
        cohort = ["--external-bags", str(other.bags), "--external-labels", str(other.labels)]
        run(planted, tmp_path / "out", "--folds", "2", *cohort)
    assert "P000-0 of external patient A; E001-0 of external patient B" in str(caught.value)
    assert "E002" not in str(caught.value)


def name_encoder(planted: Planted, patient: str, encoder: str, pool: str | None = None) -> None:
    """Turn the bag of a patient into an HDF5 file that names what made it."""
    h5py = pytest.importorskip("h5py")
    old = planted.bags / f"{patient}-0.pt"
    with h5py.File(old.with_suffix(".h5"), "w") as file:
        file["features"] = torch.load(old, weights_only=True).numpy()
        file["features"].attrs["encoder"] = encoder
        if pool:
            file.attrs["recipe"] = json.dumps({"encoder": {"pool": pool}})
    old.unlink()


def test_features_of_two_encoders_of_one_width_are_refused(tmp_path):
    planted = make(tmp_path / "own", patients=8, tiles=5, width=8)
    other = make(tmp_path / "other", patients=2, tiles=5, width=8, prefix="E")
    for patient, encoder, pool in (
        ("P000", "ours", "cls"),
        ("P001", "ours", "cls"),
        ("P002", "theirs", None),
        ("P003", "ours", "mean"),
    ):
        name_encoder(planted, patient, encoder, pool)
    name_encoder(other, "E001", "theirs")
    cohort = ["--external-bags", str(other.bags), "--external-labels", str(other.labels)]
    with pytest.raises(DatasetError) as caught:
        run(planted, tmp_path / "out", "--folds", "2", *cohort)
    for part in (
        "another encoder than the ours (cls) of most: P003-0 (ours (mean)); P002-0 (theirs)",
        "two encoders: ours (cls) and theirs",
    ):
        assert part in str(caught.value)


def test_a_model_keeps_the_name_of_its_encoder_and_bags_without_one_are_taken(tmp_path):
    planted = make(tmp_path / "own", patients=8, tiles=5, width=8)
    name_encoder(planted, "P001", "ours")
    run(planted, tmp_path / "out", "--folds", "2", *QUICK, "--epochs", "1", "--aggregator", "mean")
    assert load_model(tmp_path / "out" / "model_fold_0.pt").encoder == "ours"
    assert summary(tmp_path / "out")["encoder"] == "ours"


def test_a_folds_file_that_leaks_is_refused(tmp_path):
    planted = make(tmp_path, patients=6, tiles=5, width=8)
    folds = tmp_path / "folds.csv"
    rows = [(0, "train", n) for n in ("P000", "P001", "P002")] + [(0, "val", "P002"), (0, "test", "P003")]
    rows += [(1, "train", n) for n in ("P000", "P002")] + [(1, "test", "P003"), (1, "test", "gone")]
    write_labels(folds, rows, ("fold", "part", "patient"))
    with pytest.raises(DatasetError) as caught:
        run(planted, tmp_path / "out", "--folds-file", str(folds))
    for part in (
        "tested in several folds: P003 (0, 1)",
        "P002 (fold 0: train, val)",
        "do not name: gone",
        "no fold of the folds file tests: P000; P001; P002; P004; P005",
        "val of fold 1",
        "yes in fold 1",
    ):
        assert part in str(caught.value), f"{part!r} is not in {caught.value}"


def test_options_out_of_range_are_refused(small, tmp_path):
    for option, value in (
        ("--epochs", "0"),
        ("--max-tiles", "-1"),
        ("--learning-rate", "nan"),
        ("--folds", "1"),
    ):
        with pytest.raises(ConfigError, match=value):
            run(small, tmp_path / "out", option, value)
    with pytest.raises(ConfigError, match="both --external-bags and --external-labels"):
        run(small, tmp_path / "out", "--external-bags", "x")
    with pytest.raises(DatasetError, match='no column "patientt".*did you mean "patient"'):
        run(small, tmp_path / "out", "--patient-column", "patientt")
    with pytest.raises(ConfigError, match='positive class is "maybe"'):
        run(small, tmp_path / "out", "--positive", "maybe")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'no column "patient", it is empty: give --target'),
        ("patient;slide;msi\na;b;c\n", "separate columns by commas, not by ;"),
        ("patient\tslide\tmsi\n", "separate columns by commas, not by tabs"),
    ],
)
def test_tables_of_another_form_are_told(small, tmp_path, text, message):
    table = tmp_path / "labels.csv"
    table.write_text(text)
    with pytest.raises(DatasetError, match=message):
        run(small, tmp_path / "out", "--labels", str(table))


def test_what_is_no_aggregator_is_refused_without_advice_to_trust_it(tmp_path):
    path = tmp_path / "table.pt"
    path.write_text("patient,slide\n")
    with pytest.raises(WeightsError, match="is not a trained aggregator") as caught:
        load_model(path)
    assert "weights_only" not in str(caught.value)


def test_thinning_takes_other_tiles_each_epoch_and_all_at_test(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(torch.arange(100.0)[:, None], path)
    reading = BagReading()
    units = _units([Patient("a", "no", (path,))], ["no", "yes"], reading)
    thinned = _BagFiles(units, reading, 10)
    first, again, second = (thinned[epoch, 0][1][:, 0].tolist() for epoch in (1, 1, 2))
    assert first == again != second and len(set(first)) == 10
    assert len(_BagFiles(units, reading, 0)[1, 0][1]) == 100


def signals(tmp_path: Path, aggregator: str, **options) -> Planted:
    return make(tmp_path / aggregator, patients=200, tiles=100, width=32, **options)


# Two folds and few epochs, at higher rates, to end in minutes.
FULL = {
    "abmil": ["--epochs", "12", "--learning-rate", "5e-4"],
    "transformer": ["--epochs", "6", "--learning-rate", "1e-4"],
    "mean": ["--epochs", "20"],
    "max": ["--epochs", "20"],
}


@pytest.mark.slow
@pytest.mark.parametrize("aggregator", ["abmil", "transformer", "mean", "max"])
def test_two_hundred_patients_with_two_percent_of_marked_tiles(tmp_path, aggregator):
    planted = signals(tmp_path, aggregator)
    run(planted, tmp_path / "out", "--folds", "2", "--aggregator", aggregator, *FULL[aggregator])
    scores = pooled(tmp_path / "out")["scores"]
    if aggregator in ("abmil", "transformer"):
        precision = attention_precision(planted, tmp_path / "out")
        assert scores["auroc"] > 0.95 and precision > 0.8, (scores, precision)
    else:
        assert 0.4 < scores["auroc"] <= 1


@pytest.mark.slow
def test_shuffled_labels_are_not_learned(tmp_path):
    outside = 0
    for seed in range(5):
        planted = signals(tmp_path / str(seed), "abmil", shuffled=True, seed=seed)
        run(planted, tmp_path / f"out{seed}", "--folds", "2", "--seed", str(seed), *FULL["abmil"])
        low, high = pooled(tmp_path / f"out{seed}")["intervals"]["auroc"]
        outside += not low <= 0.5 <= high
    assert outside <= 1  # of five intervals of 95 %


def test_recipes_are_those_documented():
    assert recipe_of("transformer")[1:4] == (2e-5, 2e-5, 8)


def test_a_report_does_not_take_features_without_a_name_for_a_random_network(trained):
    shown = charts.provenance([collect(trained, "run")])
    assert "not told by the bags" in shown and "random network" not in shown
