"""Does the training work at all? A small ViT, from scratch, on scikit-learn's 1,797 real digits.

The ViT is trained self-supervised on 1,297 pictures by the ordinary trainer and judged by 20-NN accuracy on
the other 500, beside the same ViT untrained. Labels are used by the judge alone.

    python -m scripts.learn_digits --output-dir results/digits --seeds 0 1 2

Writes ``digits.json`` and ``digits.svg``, the curve of accuracy and losses that docs/learning.md shows.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinov2.configs import resolve_config
from dinov2.data.transforms import make_normalize_transform
from dinov2.eval.neighbors import knn_predict
from dinov2.models import build_model_from_cfg
from dinov2.models.pretrained import load_backbone
from dinov2.utils.seeding import seed_everything

REPO = Path(__file__).resolve().parents[1]
RECIPE = REPO / "dinov2" / "configs" / "train" / "vit-digits.yaml"
NUM_TRAIN = 1297
PIXELS = 32
NUM_NEIGHBOURS = 20
CENTERINGS = ("sinkhorn_knopp", "centering")


def load_digit_images() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits as [1797, 32, 32, 3] uint8 pictures in a fixed random order, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    small = (digits.images[order] / 16 * 255).astype(np.uint8)
    pictures = [Image.fromarray(image).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC) for image in small]
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]), digits.target[order]


def write_training_part(folder: Path) -> Path:
    """Write the training pictures as one class folder (their labels are not used) and return its root."""
    root = folder / "digits"
    (root / "unlabelled").mkdir(parents=True, exist_ok=True)
    pictures, _ = load_digit_images()
    for number, picture in enumerate(pictures[:NUM_TRAIN]):
        Image.fromarray(picture).save(root / "unlabelled" / f"{number:04d}.png")
    return root


def knn_accuracy(backbone: torch.nn.Module) -> float:
    """Return the 20-NN accuracy, in percent, of the backbone's normalised cls tokens."""
    pictures, labels = load_digit_images()
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        backbone.eval()
        tokens = torch.cat([backbone(batch) for batch in make_normalize_transform()(pixels).split(256)])
    features = torch.nn.functional.normalize(tokens, dim=1)
    labels = torch.from_numpy(labels)
    scores = knn_predict(
        features[:NUM_TRAIN], labels[:NUM_TRAIN], features[NUM_TRAIN:], NUM_NEIGHBOURS, num_classes=10
    )
    return 100 * (scores.argmax(dim=1) == labels[NUM_TRAIN:]).float().mean().item()


def accuracy_curve(output_dir: Path, seed: int, overrides: list[str]) -> list[tuple[int, float]]:
    """Return (iterations done, accuracy) for the untrained ViT and every exported teacher."""
    cfg = resolve_config(str(RECIPE), overrides)
    seed_everything(seed)
    backbone, _ = build_model_from_cfg(cfg, only_teacher=True)
    points = [(0, knn_accuracy(backbone))]
    for file in output_dir.glob("eval/training_*/teacher_checkpoint.pth"):
        load_backbone(backbone, str(file), entry="teacher")
        points.append((int(file.parent.name.split("_")[1]) + 1, knn_accuracy(backbone)))
    return sorted(points)


def train(data_root: Path, output_dir: Path, overrides: list[str]) -> list[dict]:
    """Run the ordinary trainer in a process of its own and return its metrics."""
    command = [sys.executable, str(REPO / "dinov2" / "train" / "train.py"), "--config-file", str(RECIPE)]
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


def run_once(folder: Path, centering: str, seed: int, extra_overrides: list[str]) -> dict:
    """Train with one centering and seed; return the curve, the losses and the gain in points."""
    overrides = [f"train.centering={centering}", f"train.seed={seed}", *extra_overrides]
    output_dir = folder / f"{centering}_{seed}"
    metrics = train(write_training_part(folder), output_dir, overrides)
    curve = accuracy_curve(output_dir, seed, overrides)
    kept = ("iteration", "total_loss", "dino_global_crops_loss", "dino_local_crops_loss", "ibot_loss")
    return {
        "centering": centering,
        "seed": seed,
        "curve": curve,
        "gain": curve[-1][1] - curve[0][1],
        "losses": [{key: row[key] for key in kept if key in row} for row in metrics],
        "prototypes": resolve_config(str(RECIPE), overrides).dino.head_n_prototypes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("results/digits"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--centerings", nargs="+", default=list(CENTERINGS), choices=CENTERINGS)
    parser.add_argument("opts", nargs="*", help="further config overrides, key=value")
    args = parser.parse_args()
    results = []
    for centering in args.centerings:
        for seed in args.seeds:
            result = run_once(args.output_dir, centering, seed, args.opts)
            start, end = result["curve"][0][1], result["curve"][-1][1]
            print(f"{centering:15s} seed {seed}: 20-NN {start:.1f} -> {end:.1f} % ({result['gain']:+.1f})")
            results.append(result)
    (args.output_dir / "digits.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
