"""Files of predictions, and the comparison of two of them."""

import json

import pytest
import torch

from dinov2.errors import DatasetError, OutputError
from dinov2.eval import paired
from dinov2.eval.knn import eval_knn_with_model
from dinov2.eval.predictions import PredictionCollector, read_predictions, write_predictions
from dinov2.eval.scores import score
from tests.eval.test_scores import make


def test_a_file_keeps_every_digit(tmp_path):
    predictions = make(40, 3)
    write_predictions(
        tmp_path / "a.csv", predictions, [f"tile {n},\udcff" for n in range(40)], ["a", "b", "c"]
    )
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0] == "index,sample,label,predicted,score a,score b,score c"
    assert lines[1].startswith('0,"tile 0,\\udcff",')
    found, samples = read_predictions(tmp_path / "a.csv")
    assert torch.equal(found.labels, predictions.labels) and torch.equal(found.scores, predictions.scores)
    assert len(samples) == 40


def test_collected_in_the_order_of_the_dataset():
    collector = PredictionCollector(logits=False)
    collector.update(torch.tensor([2, 0]), torch.tensor([[1.0, 3.0], [0.5, 0.0]]), torch.tensor([1, 0]))
    collector.update(torch.tensor([1]), torch.tensor([[2.0, 2.0]]), torch.tensor([1]))
    found = collector.gather()
    assert found.labels.tolist() == [0, 1, 1]
    assert found.scores.tolist() == [[1, 0], [0.5, 0.5], [0.25, 0.75]]


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(OutputError, match="predictions .* cannot be written"):
        write_predictions(tmp_path / "none" / "a.csv", make(2, 2), ["a", "b"], ["x", "y"])
    (tmp_path / "b.csv").write_text("path,label\na,1\n")
    with pytest.raises(DatasetError, match='b.csv" cannot be read .its columns are path, label'):
        read_predictions(tmp_path / "b.csv")
    with pytest.raises(DatasetError, match='c.csv" cannot be read'):
        read_predictions(tmp_path / "c.csv")


def test_two_settings_compared_on_the_command_line(tiny_case, tiny_backbone, tmp_path, capsys):
    eval_knn_with_model(
        tiny_backbone,
        str(tmp_path),
        tiny_case.train,
        tiny_case.val,
        [1, 9],
        num_workers=0,
        save_predictions=True,
    )
    summary = json.loads((tmp_path / "results_eval_knn_summary.json").read_text())
    files = [str(tmp_path / name) for row in summary["results"] for name in row["predictions"]]
    assert [file.rpartition("/")[2] for file in files] == [f"predictions_knn_full_{k}.csv" for k in (1, 9)]
    predictions, samples = read_predictions(files[0])
    assert samples[0].endswith("/test/connective/0.png")
    assert score(predictions) == pytest.approx(summary["results"][0]["scores"])
    paired.main(paired.get_args_parser().parse_args(files))
    table = json.loads(capsys.readouterr().out)
    first, second = (row["scores"]["accuracy"] for row in summary["results"])
    assert table["accuracy"]["difference"] == pytest.approx(second - first)
    write_predictions(tmp_path / "other.csv", predictions, [*samples[:-1], "elsewhere.png"], ["a", "b", "c"])
    with pytest.raises(DatasetError, match='not of the same images .sample 14 is .*"elsewhere.png"'):
        paired.main(paired.get_args_parser().parse_args([files[0], str(tmp_path / "other.csv")]))
