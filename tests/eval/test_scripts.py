"""The evaluations as a user starts them: scripts, several processes, exit status."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2 import distributed
from dinov2.errors import OutputError
from dinov2.eval import knn, linear, log_regression
from dinov2.eval.knn import KnnModule
from dinov2.eval.linear_classifiers import unwrapped
from dinov2.eval.results import append_lines, write_summary
from tests.conftest import load_golden_tensors
from tests.distributed.launch import run_in_processes
from tests.eval.conftest import run_script
from tests.eval.test_linear_classifiers import grid, tokens
from tests.eval.test_utils import Numbers, evaluate_and_extract, sample_labels

ROWS = (420, 70, 1)  # in two processes: even shares; shares smaller than k; a process without any
COUNTS = (7, 8, 1)
FEW_SHOT = ["--nb_knn", "3", "20", "--n-per-class-list", "-1", "4", "--n-tries", "2"]


def _votes(rows: int) -> dict[int, np.ndarray]:
    """Votes of this process's share of 102 queries."""
    golden = load_golden_tensors("knn.safetensors")
    module = KnnModule(
        golden["train_features"][:rows], golden["train_labels"][:rows], [3, 50], 0.07, "cpu", 7
    )
    share = golden["test_features"][:102][distributed.get_global_rank() :: distributed.get_global_size()]
    return {k: scores.numpy() for k, scores in module(share).items()}


def _trained_weights() -> dict[str, np.ndarray]:
    """Weights of a linear grid after four steps on this process's share of batches of six."""
    torch.manual_seed(0)
    size, rank = distributed.get_global_size(), distributed.get_global_rank()
    classifiers, groups = grid(batch_size=256 // size, learning_rates=(0.1, 1.0))
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for step in range(4):
        layers = [tuple(part[rank::size] for part in block) for block in tokens(batch=6, seed=step)]
        labels = torch.tensor([0, 2, 1, 1, 2, 0])[rank::size]
        losses = [
            torch.nn.functional.cross_entropy(logits, labels) for logits in classifiers(layers).values()
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return {name: value.numpy() for name, value in unwrapped(classifiers).state_dict().items()}


def _parts() -> dict:
    return {
        "votes": [_votes(rows) for rows in ROWS],
        "evaluation": [evaluate_and_extract(count) for count in COUNTS],
        "weights": _trained_weights(),
    }


def _everything(case, folder: Path) -> dict:
    log_regression.C_POWER_RANGE = torch.tensor([-2.0, 0.0, 1.0])
    for module, options in (
        (knn, FEW_SHOT),
        (log_regression, []),
        (linear, ["--epochs", "1", "--epoch-length", "2", "--batch-size", "4", "--learning-rates", "0.1"]),
    ):
        output_dir = folder / module.__name__.rpartition(".")[2]
        module.main(module.get_args_parser().parse_args([*case.options(output_dir), *options]))
    return _parts()


@pytest.fixture(scope="module")
def two_processes(tiny_case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    return folder, run_in_processes(_everything, tiny_case, folder)


def _check_parts(outcomes: list[dict]) -> None:
    """Compare what every process found with what one process finds."""
    whole = [_votes(rows) for rows in ROWS]
    for rank, outcome in enumerate(outcomes):
        for votes, expected in zip(outcome["votes"], whole, strict=True):
            assert set(votes) == set(expected)
            for k, scores in votes.items():
                np.testing.assert_allclose(scores, expected[k][rank :: len(outcomes)], rtol=1e-5, atol=1e-6)
        for count, (_, accuracy, features, labels) in zip(COUNTS, outcome["evaluation"], strict=True):
            dataset = Numbers(sample_labels(count))
            hits = (dataset.vectors.argmax(dim=1) == torch.tensor(dataset.labels)).double()
            assert accuracy == pytest.approx(hits.mean().item())  # repeats of the sampler count once
            assert np.array_equal(features, dataset.vectors.numpy())
            assert labels == dataset.labels


def test_votes_accuracies_and_features_do_not_depend_on_the_number_of_processes(two_processes):
    _check_parts(two_processes[1])


def test_linear_classifiers_train_as_in_one_process(two_processes):
    alone = _trained_weights()
    for outcome in two_processes[1]:
        assert set(outcome["weights"]) == set(alone)
        for name, weight in outcome["weights"].items():
            np.testing.assert_allclose(weight, alone[name], rtol=1e-5, atol=1e-6)


def test_command_lines_in_two_processes_give_the_numbers_of_one(
    two_processes, tiny_case, tiny_backbone, tmp_path, monkeypatch
):
    folder, _ = two_processes
    strings = (tiny_case.train, tiny_case.val)
    alone = knn.eval_knn_with_model(
        tiny_backbone, str(tmp_path), *strings, [3, 20], n_per_class_list=[-1, 4], n_tries=2, num_workers=0
    )
    lines = (folder / "knn" / "results_eval_knn.json").read_text().splitlines()
    assert {name: value for line in lines for name, value in json.loads(line).items()} == alone
    monkeypatch.setattr(log_regression, "C_POWER_RANGE", torch.tensor([-2.0, 0.0, 1.0]))
    alone = log_regression.eval_log_regression_with_model(tiny_backbone, *strings)
    summary = json.loads((folder / "log_regression" / "results_eval_log_regression_summary.json").read_text())
    (row,) = summary["results"]
    assert row["setting"] | row["accuracies_percent"] == {"C": alone["best_C"], "top-1": alone["top-1"]}
    assert summary["pretrained_weights"] == str(tiny_case.weights)


def test_one_process_writes_the_files(two_processes):
    folder, _ = two_processes
    linear_files = {path.name for path in (folder / "linear").iterdir()}
    assert {"model_final.pth", "last_checkpoint", "results_eval_linear_summary.json"} <= linear_files
    results = (folder / "linear" / "results_eval_linear.json").read_text()
    assert results.count("iter: 2") == 1
    assert (folder / "knn" / "config.yaml").exists()


@pytest.mark.slow
def test_three_processes():
    _check_parts(run_in_processes(_parts, world_size=3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn", "linear", "log_regression"])
def test_scripts_under_torchrun(name, tiny_case, tmp_path):
    short = {"linear": ["--epochs", "1", "--epoch-length", "2", "--batch-size", "8"]}.get(name, [])
    summaries = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        result = run_script(name, [*tiny_case.options(folder), *short], processes)
        assert result.returncode == 0, result.stderr
        summaries.append(json.loads((folder / f"results_eval_{name}_summary.json").read_text()))
    if name != "linear":  # there every process augments its own images
        assert summaries[0] == summaries[1]


def test_a_mistake_is_one_sentence_and_exit_status_1(tiny_case, tmp_path):
    options = tiny_case.options(tmp_path)
    options[options.index("--train-dataset") + 1] = f"ImageFolder:root={tmp_path}/missing"
    result = run_script("knn", options)
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    assert "missing" in result.stderr


def test_result_files_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="result file .* cannot be written"):
        append_lines(tmp_path / "none" / "results.json", ["{}"])
    with pytest.raises(OutputError, match="result file .* cannot be written"):
        write_summary(str(tmp_path / "none"), "knn", {})
