"""Logistic regression from end to end: how C is chosen, what is fitted, files, bad input."""

import json
from functools import partial

import pytest
import torch
from sklearn.linear_model import LogisticRegression as Oracle

from dinov2.data.transforms import make_classification_eval_transform
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval import log_regression
from dinov2.eval.data import make_labelled_dataset
from dinov2.eval.log_regression import C_POWER_RANGE, eval_log_regression_with_model, get_args_parser
from dinov2.eval.metrics import MetricType
from dinov2.eval.utils import extract_features


@pytest.fixture()
def few_values(monkeypatch):
    monkeypatch.setattr(log_regression, "C_POWER_RANGE", torch.tensor([-3.0, -1.0, 0.0, 1.0]))


@pytest.fixture()
def evaluate(tiny_case, tiny_backbone, few_values):
    return partial(eval_log_regression_with_model, tiny_backbone, tiny_case.train, tiny_case.val)


@pytest.fixture(scope="module")
def features(tiny_case, tiny_backbone):
    transform = make_classification_eval_transform(resize_size=224, crop_size=224)
    return [
        extract_features(tiny_backbone, make_labelled_dataset(string, transform), 16, 0)
        for string in (tiny_case.train, tiny_case.val)
    ]


def _accuracy_of_oracle(train, test, C: float) -> float:
    model = Oracle(C=C, tol=1e-10, max_iter=10_000).fit(train[0].double().numpy(), train[1].numpy())
    return model.score(test[0].double().numpy(), test[1].numpy())


def test_the_grid_of_upstream():
    assert len(C_POWER_RANGE) == 45
    assert (C_POWER_RANGE[0].item(), C_POWER_RANGE[-1].item(), C_POWER_RANGE.dtype) == (-6, 5, torch.float32)


def test_choice_on_validation_equals_scikit_learn(evaluate, features):
    result = evaluate(finetune_on_val=True)
    scores = {C: _accuracy_of_oracle(*features, C) for C in (1e-3, 0.1, 1.0, 10.0)}
    assert result["best_C"] == pytest.approx(max(scores, key=scores.get))
    assert result["top-1"] == pytest.approx(100 * max(scores.values()))
    assert set(result) == {"top-1", "best_C"}  # three classes: no top-5


def test_choice_on_a_tenth_of_the_training_set_and_final_fit_on_all_of_it(evaluate, features):
    train, val = features
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    kept, held_out = ([part[rows] for part in train] for rows in (order[3:], order[:3]))
    scores = {C: _accuracy_of_oracle(kept, held_out, C) for C in (1e-3, 0.1, 1.0, 10.0)}
    best = max(scores, key=scores.get)  # the first of equals, as here
    result = evaluate()
    assert result["best_C"] == pytest.approx(best)
    assert result["top-1"] == pytest.approx(100 * _accuracy_of_oracle(train, val, best))


def test_a_dataset_to_choose_on_joins_the_final_fit(evaluate, tiny_case, monkeypatch):
    sizes = []
    fit = log_regression.fit_logistic_regression

    def counted(features, *args, **options):
        sizes.append(len(features))
        return fit(features, *args, **options)

    monkeypatch.setattr(log_regression, "fit_logistic_regression", counted)
    evaluate(finetune_dataset_str=tiny_case.val)
    assert sizes == [33, 33, 33, 33, 48]
    sizes.clear()
    evaluate()
    assert sizes == [30, 30, 30, 30, 33]


def test_summary_and_per_class_recalls(evaluate, tmp_path):
    result = evaluate(metric_type=MetricType.PER_CLASS_ACCURACY, output_dir=str(tmp_path))
    assert len(result["top-1"]) == 3
    summary = json.loads((tmp_path / "results_eval_log_regression_summary.json").read_text())
    assert summary["evaluation"] == "log_regression"
    (row,) = summary["results"]
    assert row["accuracies_percent"] == {"top-1": result["top-1"]}
    assert row["setting"] == {"C": result["best_C"]}
    assert 100 * row["scores"]["balanced_accuracy"] == pytest.approx(sum(result["top-1"]) / 3)


def test_contradictions_and_too_few_samples(evaluate, tiny_case, tiny_backbone, tmp_path):
    with pytest.raises(ConfigError, match="one dataset only"):
        evaluate(finetune_dataset_str=tiny_case.val, finetune_on_val=True)
    with pytest.raises(ConfigError, match="float32 or float64, not in torch.int64"):
        evaluate(train_dtype=torch.int64)
    folder = tiny_case.train.removeprefix("ImageFolder:root=")
    csv = tmp_path / "few.csv"
    csv.write_text(f"path,label\n{folder}/neoplastic/0.png,0\n{folder}/connective/0.png,1\n")
    few = f"CustomImageDataset:extra={csv}"
    with pytest.raises(DatasetError, match="has 2 samples, too few to hold out a tenth"):
        eval_log_regression_with_model(tiny_backbone, few, few)


def test_defaults_of_the_command_line():
    args = get_args_parser().parse_args([])
    assert (args.finetune_dataset_str, args.finetune_on_val) == (None, False)
    assert args.metric_type is MetricType.MEAN_ACCURACY
    assert (args.train_features_device, args.train_dtype, args.max_train_iters) == ("cpu", "float64", 1000)


@pytest.mark.parametrize(("given", "value"), [("uni", 48 * 3 / 100), (0.5, 0.5), ("0.5", 0.5)])
def test_a_single_value_is_fitted_to_all_training_samples(evaluate, features, tmp_path, given, value):
    result = evaluate(single_C=given, output_dir=str(tmp_path))
    assert result["best_C"] == pytest.approx(value)
    assert result["top-1"] == pytest.approx(100 * _accuracy_of_oracle(*features, value))
    protocol = json.loads((tmp_path / "results_eval_log_regression_summary.json").read_text())["protocol"]
    assert protocol["C"] == given and protocol["iterations"] > 0


@pytest.mark.parametrize("given", ["unl", "-1", 0, float("nan"), "inf"])
def test_unusable_values(evaluate, given):
    with pytest.raises(
        ConfigError, match="C of the logistic regression is .*: give a number above 0, or uni"
    ):
        evaluate(single_C=given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train_iters": 0}, "--max-train-iters is 0: give a whole number from 1 up"),
        ({"batch_size": 0}, "--batch-size of logistic regression is 0"),
        ({"num_workers": -1}, "--num-workers of logistic regression is -1"),
        ({"resize_size": 0}, "--resize-size of logistic regression is 0"),
    ],
)
def test_numbers_out_of_range(evaluate, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(**options)


def test_a_fit_that_is_cut_off_is_told(evaluate, caplog):
    with caplog.at_level("WARNING", logger="dinov2"):
        evaluate(single_C=1e5, max_train_iters=2)
    assert "stopped after 2 iterations, before it converged" in caplog.text


def test_bad_labels_and_draws(evaluate, tiny_case, tiny_backbone, tmp_path):
    picture = f"{tiny_case.train.removeprefix('ImageFolder:root=')}/neoplastic/0.png"
    csv = tmp_path / "images.csv"
    csv.write_text(f"path,label\n{picture},0\n{picture},9\n")
    dataset_str = f"CustomImageDataset:extra={csv}"
    with pytest.raises(DatasetError, match=r"label 9 is not among the classes 0\.\.2"):
        eval_log_regression_with_model(tiny_backbone, tiny_case.train, dataset_str, single_C=1.0)
    csv.write_text("path,label\n" + f"{picture},1\n" * 12)
    with pytest.raises(DatasetError, match="all 12 training samples have the label 1"):
        eval_log_regression_with_model(tiny_backbone, dataset_str, dataset_str, single_C=1.0)
    with pytest.raises(ConfigError, match="number of bootstrap draws is -1"):
        evaluate(bootstrap_draws=-1)
