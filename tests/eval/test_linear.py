"""The linear evaluation from end to end on real tissue windows: learning, files, resuming, bad input."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from dinov2.data.transforms import make_classification_eval_transform
from dinov2.errors import ConfigError, DatasetError, WeightsError
from dinov2.eval import linear
from dinov2.eval.linear import run_eval_linear
from dinov2.eval.metrics import MetricType


@pytest.fixture()
def run(tiny_case, tiny_backbone, tmp_path):
    """:func:`run_eval_linear` with a small grid; six iterations unless told otherwise."""
    return partial(
        run_eval_linear,
        model=tiny_backbone,
        output_dir=str(tmp_path),
        train_dataset_str=tiny_case.train,
        val_dataset_str=tiny_case.val,
        batch_size=8,
        epochs=3,
        epoch_length=2,
        num_workers=0,
        save_checkpoint_frequency=2,
        eval_period_iterations=4,
        learning_rates=[1e-3, 1.0],
        autocast_dtype=torch.float,
    )


def test_files_and_result(run, tiny_case, tmp_path):
    result = run(test_dataset_strs=[tiny_case.train], pretrained_weights="tiny.pth")
    assert list(result) == ["best_classifier", f"{tiny_case.val}_accuracy", f"{tiny_case.train}_accuracy"]
    assert result["best_classifier"].startswith("classifier_")
    lines = (tmp_path / "results_eval_linear.json").read_text().splitlines()
    assert lines[0::3] == ["iter: 4", "iter: 6", "iter: 6"]
    assert lines[2::3] == ["", "", ""]
    final, test = (json.loads(line)["best_classifier"] for line in lines[4::3])
    assert final["name"] == test["name"] == result["best_classifier"]
    assert result[f"{tiny_case.val}_accuracy"] == pytest.approx(100 * final["accuracy"])
    assert result[f"{tiny_case.train}_accuracy"] == pytest.approx(100 * test["accuracy"])
    summary = json.loads((tmp_path / "results_eval_linear_summary.json").read_text())
    assert summary["best_classifier"] == result["best_classifier"]
    rows = summary["results"]
    assert [(row["role"], row["dataset"]) for row in rows] == [
        ("val", tiny_case.val),
        ("test", tiny_case.train),
    ]
    for row in rows:
        assert row["setting"] == {"classifier": result["best_classifier"]}
        assert 100 * row["scores"]["accuracy"] == pytest.approx(result[f"{row['dataset']}_accuracy"])
        assert row["intervals"]["accuracy"][0] <= row["scores"]["accuracy"] <= row["intervals"]["accuracy"][1]
    assert len(list((tmp_path / "features").iterdir())) == 2  # the test set is the training set


def test_checkpoints_and_resuming(run, tmp_path):
    torch.manual_seed(3)
    run()
    names = {path.name for path in tmp_path.glob("*.pth")}
    assert names == {"model_0000003.pth", "model_final.pth", "running_checkpoint_linear_eval.pth"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert set(final) == {"model", "optimizer", "scheduler", "iteration"}
    assert final["iteration"] == 5
    assert "classifiers_dict.classifier_4_blocks_avgpool_True_lr_0_03125.linear.weight" in final["model"]

    run()  # a finished run is scored again, not trained further
    again = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert all(torch.equal(final["model"][name], value) for name, value in again["model"].items())

    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    run()
    resumed = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert resumed["iteration"] == 5
    assert resumed["scheduler"]["last_epoch"] == 6
    assert resumed["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.0, abs=1e-12)


def test_a_checkpoint_to_start_from(run, tmp_path):
    run()
    elsewhere = tmp_path / "second"
    elsewhere.mkdir()
    first = run(resume=False, output_dir=str(elsewhere), classifier_fpath=str(tmp_path / "model_final.pth"))
    assert first == run()
    assert not list(elsewhere.glob("*.pth"))  # nothing was left to train


def test_it_learns_the_training_windows(run, tiny_case):
    result = run(epochs=12, epoch_length=5, eval_period_iterations=1000, val_dataset_str=tiny_case.train)
    assert result[f"{tiny_case.train}_accuracy"] > 60  # three equal classes: chance is 33


def test_class_mapping_and_metric_types(run, tiny_case, tmp_path):
    mapping = tmp_path / "mapping.npy"
    np.save(mapping, np.array([0, 1, 2]))
    result = run(
        val_class_mapping_fpath=str(mapping),
        val_metric_type=MetricType.PER_CLASS_ACCURACY,
        test_dataset_strs=[tiny_case.val, tiny_case.train],
        test_class_mapping_fpaths=["None", str(mapping)],
        test_metric_types=[MetricType.MEAN_PER_CLASS_ACCURACY],
    )
    assert 0 <= result[f"{tiny_case.val}_accuracy"] <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs of the linear evaluation is 0"),
        ({"val_class_mapping_fpath": "missing.npy"}, 'class mapping "missing.npy" cannot be read'),
        (
            {"test_dataset_strs": ["a", "b", "c"], "test_metric_types": [MetricType.MEAN_ACCURACY] * 2},
            "3 test datasets but 2 metric types",
        ),
    ],
)
def test_unusable_options(run, options, message):
    with pytest.raises(ConfigError, match=message):
        run(**options)


def test_checkpoints_that_do_not_fit(run, tmp_path):
    run()
    with pytest.raises(WeightsError, match="belongs to other classifiers"):
        run(learning_rates=[1e-3, 0.5])
    (tmp_path / "model_final.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match="model_final.pth of linear classifiers cannot be read"):
        run()
    run(resume=False)


def test_labels_have_to_be_there(run, tiny_case, tmp_path):
    picture = f"{tiny_case.train.removeprefix('ImageFolder:root=')}/neoplastic/0.png"
    csv = tmp_path / "images.csv"
    csv.write_text(f"path\n{picture}\n")
    with pytest.raises(DatasetError, match="has no labels"):
        run(train_dataset_str=f"CustomImageDataset:extra={csv}")
    csv.write_text(f"path,label\n{picture},0\n{picture},9\n")
    with pytest.raises(DatasetError, match=r"label 9 is not among the classes 0\.\.2"):
        run(val_dataset_str=f"CustomImageDataset:extra={csv}")


def test_features_are_computed_once_unless_images_are_augmented(run, tiny_backbone, monkeypatch):
    calls, forward = [], tiny_backbone.get_intermediate_layers
    monkeypatch.setattr(
        tiny_backbone,
        "get_intermediate_layers",
        lambda images, *args, **options: calls.append(len(images)) or forward(images, *args, **options),
    )
    torch.manual_seed(0)
    first = run(resume=False)
    assert sum(calls) == 33 + 15
    calls.clear()
    torch.manual_seed(0)
    assert run(resume=False) == first
    assert calls == []  # they are there already
    augmented = run(resume=False, augment=True)
    assert sum(calls) > 6 * 8
    assert set(augmented) == set(first)


def test_stored_features_train_the_classifiers_that_images_train(run, tiny_case, monkeypatch):
    monkeypatch.setattr(
        linear, "make_classification_train_transform", lambda **_: make_classification_eval_transform()
    )
    torch.manual_seed(0)
    stored = run(resume=False)
    weights = torch.load(run.keywords["output_dir"] + "/model_final.pth", weights_only=True)["model"]
    torch.manual_seed(0)
    assert run(resume=False, augment=True) == stored
    again = torch.load(run.keywords["output_dir"] + "/model_final.pth", weights_only=True)["model"]
    for name, value in weights.items():
        torch.testing.assert_close(again[name], value, rtol=1e-3, atol=1e-5)


def test_augmented_images_have_no_stored_features(run, tmp_path):
    with pytest.raises(ConfigError, match="leave out either --augment or --features"):
        run(augment=True, features=str(tmp_path))
