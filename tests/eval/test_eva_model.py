"""Against eva: its CRC task by one command on its folders, and a checkpoint as eva takes it."""

import importlib
import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from dinov2.data import make_dataset
from dinov2.data.datasets import NCTCRC
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.eval import linear
from dinov2.eval.eva_model import backbone
from dinov2.eval.eva_probe import EvaProtocol
from dinov2.eval.utils import extract_features
from tests.conftest import REPO

PER_CLASS = {"NCT-CRC-HE-100K": 6, "CRC-VAL-HE-7K": 3}


def test_eva_gets_the_backbone_of_the_evaluations(tiny_case, tiny_backbone):
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = tiny_backbone(images)
        for model in (
            backbone(str(tiny_case.weights), str(tiny_case.config)),
            backbone(str(tiny_case.weights), overrides=["student.num_heads=3"]),  # the rest is in the weights
        ):
            assert not model.training and not any(p.requires_grad for p in model.parameters())
            torch.testing.assert_close(model(images), expected)


def test_the_ready_config_has_the_numbers_of_the_protocol_and_names_the_function():
    config = yaml.safe_load((REPO / "docs" / "eva" / "crc.yaml").read_text())
    trainer, model, data = (config[name]["init_args"] for name in ("trainer", "model", "data"))
    ours = EvaProtocol()
    assert (trainer["n_runs"], trainer["max_steps"]) == (ours.runs, ours.max_steps)
    callbacks = {
        entry["class_path"].split(".")[-1]: entry.get("init_args", {}) for entry in trainer["callbacks"]
    }
    assert callbacks["EarlyStopping"]["patience"] == ours.patience_epochs(100_000)
    assert model["optimizer"]["init_args"] == {"lr": ours.learning_rate}
    assert data["dataloaders"]["train"] == {"batch_size": ours.batch_size, "shuffle": True}
    assert [entry["init_args"]["split"] for entry in data["datasets"]["predict"]] == ["train", "val"]
    named = callbacks["ClassificationEmbeddingsWriter"]["backbone"]["init_args"]
    module, _, name = named["path"].rpartition(".")
    inspect.signature(getattr(importlib.import_module(module), name)).bind(**named["arguments"])


@pytest.fixture()
def crc_root(tmp_path) -> Path:
    """Synthetic tiles in the folders and with the names of NCT-CRC-HE: a hue per class, and noise."""
    generator = np.random.default_rng(0)
    colors = generator.integers(60, 200, (9, 3))
    for split, count in PER_CLASS.items():
        for name, color in zip(NCTCRC.CLASSES, colors, strict=True):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                tile = np.clip(color + generator.normal(0, 25, (224, 224, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(tile).save(folder / f"{name}-{''.join(chr(65 + number) * 8)}.tif")
    return tmp_path


def test_the_crc_task_on_folders_of_its_layout(crc_root, tiny_case, tiny_backbone, monkeypatch):
    monkeypatch.setattr(linear, "EvaProtocol", lambda: EvaProtocol(learning_rate=0.05, max_steps=300, runs=2))
    out = crc_root / "out"
    train, val = (f"NCTCRC:split={split}:root={crc_root}" for split in ("TRAIN", "VAL"))
    options = tiny_case.options(out)
    for flag, value in (("--train-dataset", train), ("--val-dataset", val)):
        options[options.index(flag) + 1] = value
    fp32 = "compute_precision.teacher.backbone.mixed_precision.param_dtype=fp32"
    linear.main(
        linear.get_args_parser().parse_args(
            [*options, "--protocol", "eva", "--bootstrap-draws", "0", "--opts", fp32]
        )
    )
    summary = json.loads((out / "results_eval_linear_summary.json").read_text())
    row = summary["results"][0]
    assert summary["classes"] == list(NCTCRC.CLASSES) and row["per_class"]["support"] == [3] * 9
    transform = make_classification_eval_transform(resize_size=224)
    (x, y), (x_val, y_val) = (
        extract_features(tiny_backbone, make_dataset(dataset_str=text, transform=transform), 16, 0)
        for text in (train, val)
    )
    oracle = LogisticRegression(C=100, max_iter=5000).fit(x.numpy(), y.numpy())
    expected = balanced_accuracy_score(y_val.numpy(), oracle.predict(x_val.numpy()))
    assert expected > 0.5  # far above the ninth of chance: the tiles can be told apart
    assert row["scores"]["balanced_accuracy"] == pytest.approx(expected, abs=0.15)
