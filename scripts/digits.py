"""scikit-learn's 1,797 real digits: training pictures and a k-NN test, for scripts that train on them."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.data.transforms import make_normalize_transform
from dinov2.errors import OutputError
from dinov2.eval.neighbors import knn_predict

REPO = Path(__file__).resolve().parents[1]
TRAINER = REPO / "dinov2" / "train" / "train.py"
NUM_TRAIN = 1297


def load_digit_images(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the digits in a fixed random order as [1797, H, W, 3] uint8 of that size, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    small = (digits.images[order] / 16 * 255).astype(np.uint8)
    pictures = [Image.fromarray(image).resize((pixels, pixels), Image.Resampling.BICUBIC) for image in small]
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]), digits.target[order]


def write_training_part(folder: Path, pixels: int) -> Path:
    """Write the training pictures as one class folder (their labels are not used) and return its root."""
    root = folder / "digits"
    (root / "unlabelled").mkdir(parents=True, exist_ok=True)
    pictures, _ = load_digit_images(pixels)
    for number, picture in enumerate(pictures[:NUM_TRAIN]):
        Image.fromarray(picture).save(root / "unlabelled" / f"{number:04d}.png")
    return root


class DigitJudge:
    """Tells by k nearest neighbours how far apart a backbone keeps the digits that it was not trained on.

    Args:
        pixels: side of the pictures.
        bank_size: labelled training pictures among which neighbours are looked for.
        num_judged: pictures out of the 500 others whose digit is told by their neighbours.
        first_judged: place of the first of them.
    """

    def __init__(
        self,
        pixels: int,
        bank_size: int = NUM_TRAIN,
        num_judged: int = 500,
        *,
        first_judged: int = NUM_TRAIN,
    ) -> None:
        pictures, labels = load_digit_images(pixels)
        chosen = np.r_[:bank_size, first_judged : first_judged + num_judged]
        raw = torch.from_numpy(pictures[chosen]).permute(0, 3, 1, 2).float() / 255
        self.bank_size = bank_size
        self.pictures = make_normalize_transform()(raw)
        self.labels = torch.from_numpy(labels[chosen])

    def accuracy(self, backbone: nn.Module, num_neighbours: Sequence[int]) -> list[float]:
        """Return the accuracy, in percent, of the normalised cls tokens for each number of neighbours."""
        with torch.inference_mode():
            backbone.eval()
            tokens = torch.cat([backbone(batch) for batch in self.pictures.split(256)])
        features = nn.functional.normalize(tokens, dim=1)
        return [self._accuracy(features, k) for k in num_neighbours]

    def _accuracy(self, features: Tensor, num_neighbours: int) -> float:
        bank, labels = features[: self.bank_size], self.labels[: self.bank_size]
        scores = knn_predict(bank, labels, features[self.bank_size :], num_neighbours, num_classes=10)
        return 100 * (scores.argmax(dim=1) == self.labels[self.bank_size :]).float().mean().item()


def train(
    recipe: Path, data_root: Path, output_dir: Path, overrides: Sequence[str], *, entry: Path = TRAINER
) -> list[dict]:
    """Run the trainer, or a program with its command line, in a process of its own; return its metrics."""
    if output_dir.exists():
        raise OutputError(f"{output_dir} holds an earlier run; name another --output-dir or delete it.")
    command = [sys.executable, str(entry), "--config-file", str(recipe)]
    command += [
        "--output-dir",
        str(output_dir),
        f"train.dataset_path=ImageFolder:root={data_root}",
        *overrides,
    ]
    environment = {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "2", **os.environ}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = (output_dir / "training_metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]
