"""The linear and the logistic evaluation as a user runs them, against scikit-learn on the same features.

Features are handed over in feature stores: digits, and the real ViT-S/14's of windows round real nuclei. What
is compared:

- The same optimum. Without regularisation, and where no classifier is free of training errors, there is one
  best classifier. One batch is the whole training set here, so the grid gets there as scikit-learn does.
- The best of the grid, trained as long as DINOv2 does, and the best of scikit-learn's over values of C, both
  chosen on the test set. The two hold weights back in different ways, so this is closeness, not identity.
- Logistic regression with the same C.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from dinov2.data.transforms import make_classification_eval_transform
from dinov2.eval.extract import source_of
from dinov2.eval.feature_store import CLS, LABELS, PATCH_MEAN, StoreWriter, block_name
from dinov2.eval.linear import run_eval_linear
from dinov2.eval.log_regression import eval_log_regression_with_model
from tests.conftest import REAL_DATA

POINTS = 0.2
# Three of 897 digits, two of 524 windows: the highest learning rate of the grid stays short of the optimum.
GRID_POINTS = 0.4
BLOCKS = 4
PICTURE_SIZE = 224
NUCLEUS_WINDOW, NUCLEUS_INPUT = 64, 112


class Unused(nn.Module):
    """Stands for the backbone of stored features: it is identified, and never called."""

    n_blocks = BLOCKS


class Stores:
    """Folders of pictures of one pixel, which give the labels, and stores with their features."""

    def __init__(self, folder: Path, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:
        self.folder, self.model = folder, Unused()
        self.parts = {"train": self._sorted(*train), "test": self._sorted(*test)}
        self.strings = {part: self._write(part) for part in self.parts}

    @staticmethod
    def _sorted(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        order = labels.argsort(stable=True)  # as an image folder has them
        return features[order], labels[order]

    def _write(self, part: str) -> str:
        features, labels = self.parts[part]
        for row, label in enumerate(labels.tolist()):
            path = self.folder / part / str(label) / f"{row:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (1, 1)).save(path)
        dataset = f"ImageFolder:root={self.folder / part}"
        transform = make_classification_eval_transform(resize_size=PICTURE_SIZE)
        source = source_of(self.model, dataset, transform, torch.float32)
        store = self.folder / "features" / part
        writer = StoreWriter(store, source, len(labels), len(labels), details={}, notes={})
        names = [*(block_name(number) for number in range(BLOCKS - 1)), CLS, PATCH_MEAN]
        writer.write(0, {name: features.numpy() for name in names} | {LABELS: labels.numpy()})
        writer.finish()
        return dataset

    def _options(self, output_dir: Path) -> dict:
        return {
            "train_dataset_str": self.strings["train"],
            "val_dataset_str": self.strings["test"],
            "num_workers": 0,
            "autocast_dtype": torch.float32,
            "resize_size": PICTURE_SIZE,
            "features": str(self.folder / "features"),
            "output_dir": str(output_dir),
            "bootstrap_draws": 0,
            "save_predictions": True,
        }

    def linear(
        self, output_dir: Path, batch_size: int, iterations: int, learning_rates: Sequence[float]
    ) -> tuple[float, np.ndarray]:
        """Return the accuracy of the best classifier in percent, and its predictions."""
        output_dir.mkdir()
        torch.manual_seed(0)
        results = run_eval_linear(
            self.model,
            batch_size=batch_size,
            epochs=1,
            epoch_length=iterations,
            save_checkpoint_frequency=1,
            eval_period_iterations=iterations,
            learning_rates=learning_rates,
            **self._options(output_dir),
        )
        return results[f"{self.strings['test']}_accuracy"], self._predicted(output_dir, "linear")

    def log_regression(self, output_dir: Path, C: float) -> tuple[float, np.ndarray]:
        """Return the accuracy in percent and the predictions, with this C."""
        output_dir.mkdir()
        results = eval_log_regression_with_model(self.model, single_C=C, **self._options(output_dir))
        return results["top-1"], self._predicted(output_dir, "log_regression")

    def _predicted(self, output_dir: Path, evaluation: str) -> np.ndarray:
        summary = json.loads((output_dir / f"results_eval_{evaluation}_summary.json").read_text())
        (file,) = summary["results"][0]["predictions"]
        with (output_dir / file).open() as rows:
            return np.array([int(row["predicted"]) for row in csv.DictReader(rows)])

    def oracle(self, C: float) -> tuple[float, np.ndarray]:
        """Return scikit-learn's accuracy in percent and predictions."""
        (train, labels), (test, truth) = ([part.numpy() for part in self.parts[p]] for p in ("train", "test"))
        model = LogisticRegression(C=C, tol=1e-8, max_iter=20_000).fit(train, labels)
        predicted = model.predict(test)
        return 100 * float((predicted == truth).mean()), predicted


def components(features: Tensor, fit_to: Tensor, count: int) -> Tensor:
    """Return the first principal components, with unit variance in the rows ``fit_to``."""
    mean = fit_to.mean(dim=0)
    directions = torch.linalg.svd(fit_to - mean, full_matrices=False).Vh[:count].T
    return (features - mean) @ directions / ((fit_to - mean) @ directions).std(dim=0)


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits in a fixed random order: 64 grey values from 0 to 1, and labels."""
    values, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(values / 16).float()[order], torch.from_numpy(labels).long()[order]


def few_digits(folder: Path) -> Stores:
    """Return three digits that are taken for each other, as two principal components."""
    values, labels = digits()
    kept = torch.isin(labels, torch.tensor([3, 8, 9]))
    values, labels = values[kept], labels[kept].unique(return_inverse=True)[1]
    values = components(values, values[:100], 2)
    return Stores(folder, (values[:100], labels[:100]), (values[100:], labels[100:]))


@pytest.fixture(scope="module")
def nuclei(real_vits14) -> dict[str, tuple[Tensor, Tensor]]:
    """The cls tokens of the real ViT-S/14 of windows round the nuclei of the carcinoma picture, by split."""
    from dinov2.models.pretrained import build_from_weights
    from scripts.quickstart.features import backbone_features

    picture = Image.open(REAL_DATA / "hgsc_nest.jpg").convert("RGB")
    with (REAL_DATA / "hgsc_nuclei.csv").open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["image"] == "hgsc_nest.jpg" and row["split"] in ("train", "test")
        ]
    windows = []
    for row in rows:
        left, top = (int(float(row[axis])) - NUCLEUS_WINDOW // 2 for axis in "xy")
        window = picture.crop((left, top, left + NUCLEUS_WINDOW, top + NUCLEUS_WINDOW))
        windows.append(np.asarray(window.resize((NUCLEUS_INPUT, NUCLEUS_INPUT), Image.Resampling.BICUBIC)))
    model = build_from_weights(str(real_vits14)).eval()
    features = backbone_features(model, np.stack(windows), device=torch.device("cpu"))[:, : model.embed_dim]
    kinds = sorted({row["label"] for row in rows})
    labels = torch.tensor([kinds.index(row["label"]) for row in rows])
    split = np.array([row["split"] for row in rows])
    return {part: (features[split == part], labels[split == part]) for part in ("train", "test")}


def test_the_grid_finds_the_optimum_that_scikit_learn_finds(tmp_path):
    stores = few_digits(tmp_path)
    expected, predicted = stores.oracle(C=1e8)
    accuracy, found = stores.linear(tmp_path / "out", 100, 160, [2 * 256 / 100])
    assert accuracy == pytest.approx(expected, abs=POINTS)
    assert (found == predicted).mean() >= 0.995
    assert 70 < expected < 95  # no classifier is free of errors, so that the optimum is the only one


@pytest.mark.parametrize("C", [0.01, 1.0])
def test_logistic_regression_on_digits(tmp_path, C):
    values, labels = digits()
    stores = Stores(tmp_path, (values[:300], labels[:300]), (values[300:], labels[300:]))
    expected, predicted = stores.oracle(C)
    accuracy, found = stores.log_regression(tmp_path / "out", C)
    assert accuracy == pytest.approx(expected, abs=POINTS)
    assert (found == predicted).mean() > 0.998


@pytest.mark.slow
def test_the_grid_finds_the_same_optimum_on_real_features(nuclei, tmp_path):
    (train, labels), (test, truth) = nuclei["train"], nuclei["test"]
    stores = Stores(tmp_path, (components(train, train, 16), labels), (components(test, train, 16), truth))
    expected, predicted = stores.oracle(C=1e8)
    accuracy, found = stores.linear(tmp_path / "out", len(labels), 600, [128 / len(labels)])
    assert accuracy == pytest.approx(expected, abs=POINTS)
    assert (found == predicted).mean() >= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("C", [1e-3, 0.1, 384 * 3 / 100])
def test_logistic_regression_on_real_features(nuclei, tmp_path, C):
    stores = Stores(tmp_path, nuclei["train"], nuclei["test"])
    expected, predicted = stores.oracle(C)
    accuracy, found = stores.log_regression(tmp_path / "out", C)
    assert accuracy == pytest.approx(expected, abs=POINTS)
    assert (found == predicted).mean() >= 0.998


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["digits", "nuclei"])
def test_the_best_of_the_grid_is_as_good_as_the_best_of_scikit_learn(kind, request, tmp_path):
    if kind == "nuclei":
        parts = request.getfixturevalue("nuclei")
        stores, rates = Stores(tmp_path, parts["train"], parts["test"]), (2e-3, 5e-3, 1e-2)
    else:
        values, labels = digits()
        stores, rates = (
            Stores(tmp_path, (values[:900], labels[:900]), (values[900:], labels[900:])),
            (0.05, 0.1),
        )
    expected = max(stores.oracle(C)[0] for C in (0.01, 0.1, 1.0, 10.0, 100.0))
    accuracy, _ = stores.linear(tmp_path / "out", 128, 12_500, rates)
    assert accuracy >= expected - GRID_POINTS
