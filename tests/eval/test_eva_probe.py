"""The protocol of eva: its numbers, early stopping, several runs and processes."""

import json
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from dinov2.errors import DatasetError
from dinov2.eval import eva_probe, linear
from dinov2.eval.eva_probe import EvaProtocol, run_eval_eva, train_probe
from dinov2.eval.linear import get_args_parser, main
from tests.distributed.launch import run_in_processes

SHORT = EvaProtocol(max_steps=40, runs=3)


# Training samples and the patience in the configs of eva.
@pytest.mark.parametrize(
    ("samples", "epochs"),
    [(100_000, 7), (2_175, 278), (268, 1250), (3_657, 167), (1_132, 500), (262_144, 3), (6_270, 100)],
)
def test_patience_is_that_of_the_published_configs(samples, epochs):
    assert EvaProtocol().patience_epochs(samples) == epochs


def digits():
    data, target = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    return data.float()[:1000], target[:1000], data.float()[1000:], target[1000:]


def test_a_probe_comes_near_logistic_regression():
    train, labels, val, val_labels = digits()
    probe = train_probe(
        train, labels, val, val_labels, 10, 0, replace(EvaProtocol(), learning_rate=3e-3, max_steps=1200)
    )
    accuracy = (probe.probabilities(val).argmax(dim=1) == val_labels).double().mean().item()
    oracle = LogisticRegression(max_iter=5000).fit(train.numpy(), labels.numpy())
    assert accuracy > oracle.score(val.numpy(), val_labels.numpy()) - 0.02


def test_it_stops_early_and_keeps_the_best_epoch(monkeypatch):
    found = iter([0.2, 0.5, 0.4, 0.5, 0.3, 0.9])
    monkeypatch.setattr(eva_probe, "balanced_accuracy", lambda *_: next(found))
    train, labels, val, val_labels = digits()
    protocol = replace(EvaProtocol(), max_steps=40)  # ten epochs of four steps, patience two
    probe = train_probe(train, labels, val, val_labels, 10, 0, protocol)
    assert (probe.best_epoch, probe.epochs) == (2, 4)
    again = train_probe(train, labels, val, val_labels, 10, 0, replace(protocol, max_steps=8))
    assert not torch.equal(again.weight, probe.weight) or again.epochs == 2


def test_the_steps_are_limited():
    train, labels, val, val_labels = digits()
    probe = train_probe(
        train, labels, val, val_labels, 10, 0, replace(EvaProtocol(), max_steps=6, patience=9.0)
    )
    assert probe.epochs == 2


def evaluate(model, case, folder, **options):
    return run_eval_eva(model, str(folder), case.train, case.val, num_workers=0, protocol=SHORT, **options)


def test_summary(tiny_case, tiny_backbone, tmp_path):
    result = evaluate(tiny_backbone, tiny_case, tmp_path, save_predictions=True)
    summary = json.loads((tmp_path / "results_eval_linear_summary.json").read_text())
    (row,) = summary["results"]
    assert result == {f"{tiny_case.val}_accuracy": pytest.approx(100 * row["scores"]["balanced_accuracy"])}
    assert row["tries"] == 3 and row["standard_deviations"]["accuracy"] >= 0
    assert sum(map(sum, row["confusion_matrix"])) == 3 * 15
    assert row["predictions"] == [f"predictions_linear_eva_try_{number}.csv" for number in range(3)]
    assert all((tmp_path / name).exists() for name in row["predictions"])
    assert summary["protocol"]["patience_epochs"] == 8
    assert len(summary["protocol"]["best_epochs"]) == 3


def test_labels_beyond_the_training_classes(tiny_case, tiny_backbone, tmp_path):
    picture = f"{tiny_case.train.removeprefix('ImageFolder:root=')}/neoplastic/0.png"
    csv = tmp_path / "images.csv"
    csv.write_text(f"path,label\n{picture},0\n{picture},9\n")
    with pytest.raises(DatasetError, match=r"label 9 is not among the classes 0\.\.2"):
        run_eval_eva(
            tiny_backbone, str(tmp_path), tiny_case.train, f"CustomImageDataset:extra={csv}", num_workers=0
        )


def _command_line(case, folder):
    main(get_args_parser().parse_args([*case.options(folder), "--protocol", "eva", "--bootstrap-draws", "0"]))


def test_the_command_line(tiny_case, tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "EvaProtocol", lambda: SHORT)
    _command_line(tiny_case, tmp_path)
    summary = json.loads((tmp_path / "results_eval_linear_summary.json").read_text())
    assert summary["protocol"]["name"] == "eva" and summary["protocol"]["runs"] == SHORT.runs
    assert summary["results"][0]["setting"] == {"protocol": "eva"}


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(tiny_case, tmp_path):
    summaries = []
    for name, processes in (("one", 1), ("two", 2)):
        run_in_processes(_command_line, tiny_case, tmp_path / name, world_size=processes)
        summaries.append(json.loads((tmp_path / name / "results_eval_linear_summary.json").read_text()))
    assert summaries[0] == summaries[1]
