"""Does the training work at all? A small ViT, from scratch, on scikit-learn's 1,797 real digits.

The ViT is trained self-supervised on 1,297 pictures by the ordinary trainer and judged by 20-NN accuracy on
the other 500, beside the same ViT untrained. Labels are used by the judge alone.

    python -m scripts.learn_digits --output-dir results/digits --seeds 0 1 2

Writes ``digits.json`` and ``digits.svg``, the curves that docs/learning.md shows.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from dinov2 import cli
from dinov2.configs import resolve_config
from dinov2.models.pretrained import load_backbone
from dinov2.train import SSLMetaArch
from dinov2.utils.utils import fix_random_seeds
from scripts.digits import REPO, DigitJudge, train, write_training_part
from scripts.panels import picture
from scripts.quickstart.curves import line_chart

RECIPE = REPO / "dinov2" / "configs" / "train" / "vit-digits.yaml"
PIXELS = 32
NUM_NEIGHBOURS = 20
# The recipe is Sinkhorn-Knopp's. A running centre does not stop a very sharp, fast teacher from sending all
# pictures to a few prototypes; it wants a slightly softer, slower one, and features that KoLeo spreads early.
CENTERINGS = {
    "sinkhorn_knopp": [],
    "centering": [
        "train.centering=centering",
        "teacher.warmup_teacher_temp=0.025",
        "teacher.teacher_temp=0.025",
        "teacher.momentum_teacher=0.97",
        "dino.koleo_loss_weight=1.0",
    ],
}


def accuracy_curve(output_dir: Path, seed: int, overrides: Sequence[str]) -> list[tuple[int, float]]:
    """Return (iterations done, accuracy) for the untrained ViT and every exported teacher."""
    fix_random_seeds(seed)  # as the trainer does before it builds the networks
    backbone = SSLMetaArch(resolve_config(str(RECIPE), overrides)).student["backbone"]
    judge = DigitJudge(PIXELS)
    points = [(0, *judge.accuracy(backbone, [NUM_NEIGHBOURS]))]
    for file in output_dir.glob("eval/training_*/teacher_checkpoint.pth"):
        load_backbone(backbone, str(file), entry="teacher")
        iterations = int(file.parent.name.split("_")[1]) + 1
        points.append((iterations, *judge.accuracy(backbone, [NUM_NEIGHBOURS])))
    return sorted(points)


def dino_share_of_uniform(metrics: list[dict], cfg: DictConfig) -> list[tuple[int, float]]:
    """Return (iteration, DINO loss of the global crops / its value for uniform guesses).

    1 is the collapse in which student and teacher spread every picture evenly over all prototypes.
    """
    terms = 2 * cfg.crops.local_crops_number + 2
    uniform = math.log(cfg.dino.head_n_prototypes) * 2 / terms
    return [(row["iteration"], row["dino_global_crops_loss"] / uniform) for row in metrics]


def run_once(folder: Path, centering: str, seed: int, extra_overrides: Sequence[str] = ()) -> dict:
    """Train with one centering and seed; return the curves and the gain in points."""
    overrides = [*CENTERINGS[centering], f"train.seed={seed}", *extra_overrides]
    output_dir = folder / f"{centering}_{seed}"
    metrics = train(RECIPE, write_training_part(folder, PIXELS), output_dir, overrides)
    curve = accuracy_curve(output_dir, seed, overrides)
    return {
        "centering": centering,
        "seed": seed,
        "accuracy": curve,
        "gain": curve[-1][1] - curve[0][1],
        "dino": dino_share_of_uniform(metrics, resolve_config(str(RECIPE), overrides)),
    }


def draw(results: list[dict]) -> str:
    """Return one SVG picture: for each centering, accuracy and DINO term over the run, a line per seed."""
    charts = []
    for centering in dict.fromkeys(result["centering"] for result in results):
        runs = [result for result in results if result["centering"] == centering]
        for key, title in (("accuracy", "20-NN %"), ("dino", "DINO loss / uniform")):
            lines = {f"seed {run['seed']}": tuple(zip(*run[key], strict=True)) for run in runs}
            charts.append(line_chart(f"{centering}: {title}", lines, x_label="iteration", y_label=title))
    return picture(charts, columns=2)


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
            start, end = result["accuracy"][0][1], result["accuracy"][-1][1]
            print(
                f"{centering:15s} seed {seed}: 20-NN {start:.1f} -> {end:.1f} % ({result['gain']:+.1f}), "
                f"DINO term at {result['dino'][-1][1]:.3f} of uniform",
                flush=True,
            )
            results.append(result)
    (args.output_dir / "digits.json").write_text(json.dumps(results, indent=1))
    (args.output_dir / "digits.svg").write_text(draw(results))


if __name__ == "__main__":
    cli.run(main)
