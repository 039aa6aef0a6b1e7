"""What keeps a pretrained backbone good while fresh heads learn? The real ViT-S/14 on real digits, measured.

Each setting finetunes the same weights self-supervised, with fresh heads, by the ordinary trainer and the
recipe vits14-nct at a small scale; teacher and student are judged on the way by k-NN accuracy on digits that
were not trained on. Labels are used by the judge alone.

    python -m scripts.gentle_start --settings plain@3.5e-4 lora-8@3.5e-4 --seeds 0 1

Writes ``<setting>_<seed>.json`` per run, and from all runs named ``gentle.json`` and ``gentle.svg``, which
docs/finetuning.md shows. Finished runs are not repeated.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np

from dinov2 import cli
from dinov2.configs import resolve_config
from dinov2.models import build_model_from_cfg
from dinov2.models.pretrained import load_backbone
from dinov2.utils.utils import fix_random_seeds
from scripts.digits import REPO, DigitJudge, train, write_training_part
from scripts.panels import picture
from scripts.quickstart.curves import line_chart
from scripts.quickstart.weights import find_vits14

RECIPE = REPO / "dinov2" / "configs" / "train" / "vits14-nct.yaml"
PIXELS = 56
BANK_SIZE, NUM_JUDGED = 300, 300
NUM_NEIGHBOURS = (5, 20)
BATCH_SIZE = 8
# The recipe's thousands of iterations in 120, with warm-ups and a teacher's memory to match. The recipe's
# peak learning rate at its batch of 256 is 1e-4; the rule is switched off to keep that at a batch of 8.
SMALL_SCALE = (
    *(
        f"compute_precision.{network}.{part}.mixed_precision.param_dtype=fp32"
        for network in ("student", "teacher")
        for part in ("backbone", "dino_head", "ibot_head")
    ),
    f"train.batch_size_per_gpu={BATCH_SIZE}",
    "train.num_workers=0",
    "train.OFFICIAL_EPOCH_LENGTH=10",
    "train.log_period=10",
    "optim.max_iterations=120",
    "optim.warmup_epochs=1",
    "optim.scaling_rule=none",
    "optim.lr=1e-4",
    "teacher.warmup_teacher_temp_epochs=4",
    "teacher.momentum_teacher=0.97",
    "dino.head_n_prototypes=1024",
    "dino.head_hidden_dim=1024",
    f"crops.global_crops_size={PIXELS}",
    f"crops.local_crops_size={PIXELS // 2}",
    "crops.local_crops_number=2",
    # A digit that is mirrored or cut to a corner is another digit or none.
    "crops.global_crops_scale=[0.7,1.0]",
    "crops.local_crops_scale=[0.3,0.7]",
    "crops.horizontal_flip_prob=0.0",
    "crops.vertical_flip_prob=0.0",
    "evaluation.eval_period_iterations=30",
    "checkpointing.period=1000",
)
PLAIN = (
    "train.freeze_backbone_iterations=0",
    "train.freeze_blocks=0",
    "student.lora_rank=0",
    "optim.backbone_lr_mult=1.0",
    "optim.layerwise_decay=0.9",
)
HIGH_LR = "optim.lr=3.5e-4"  # DINOv2's base_lr 0.004, scaled by its rule to a batch of 8
MEASURES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "heads-first": ("train.freeze_backbone_iterations=40",),
    "lr-x0.3": ("optim.backbone_lr_mult=0.3",),
    "lr-x0.1": ("optim.backbone_lr_mult=0.1",),
    "half-frozen": ("train.freeze_blocks=6",),
    "lora-8": ("student.lora_rank=8",),
    "decay-0.5": ("optim.layerwise_decay=0.5",),
    "heads-first-lr-x0.3": ("train.freeze_backbone_iterations=40", "optim.backbone_lr_mult=0.3"),
}
LONG = ("optim.max_iterations=400", "evaluation.eval_period_iterations=100")
SETTINGS = {
    **{f"{name}@3.5e-4": (HIGH_LR, *overrides) for name, overrides in MEASURES.items()},
    **{f"{name}@1e-4": overrides for name, overrides in MEASURES.items()},
    **{f"{name}@1e-4-long": (*LONG, *overrides) for name, overrides in MEASURES.items()},
}


def judge_run(output_dir: Path, overrides: list[str], weights: Path, seed: int) -> dict[str, list]:
    """Return, per network, rows of [images seen, accuracy for each number of neighbours]."""
    judge = DigitJudge(PIXELS, BANK_SIZE, NUM_JUDGED)
    fix_random_seeds(seed)
    backbone, _ = build_model_from_cfg(resolve_config(str(RECIPE), overrides), only_teacher=True)
    load_backbone(backbone, str(weights))
    start = [0, *judge.accuracy(backbone, NUM_NEIGHBOURS)]
    curves = {"teacher": [start], "student": [start]}
    for network, points in curves.items():
        for file in output_dir.glob(f"eval/training_*/{network}_checkpoint.pth"):
            load_backbone(backbone, str(file), entry=network)
            images = BATCH_SIZE * (int(file.parent.name.split("_")[1]) + 1)
            points.append([images, *judge.accuracy(backbone, NUM_NEIGHBOURS)])
        points.sort()
    return curves


def run_once(folder: Path, setting: str, seed: int, weights: Path) -> dict:
    """Train and judge one setting with one seed, or return what an earlier call found."""
    name = f"{setting}_{seed}"
    finished = folder / f"{name}.json"
    if finished.is_file():
        return json.loads(finished.read_text("utf-8"))
    overrides = [*SMALL_SCALE, *PLAIN, *SETTINGS[setting], f"train.seed={seed}"]
    output_dir = folder / name
    begin = time.perf_counter()
    start = f"student.pretrained_weights={weights}"
    metrics = train(RECIPE, write_training_part(folder, PIXELS), output_dir, [*overrides, start])
    seconds = time.perf_counter() - begin
    result = {
        "setting": setting,
        "overrides": SETTINGS[setting],
        "seed": seed,
        "seconds": round(seconds),
        **judge_run(output_dir, overrides, weights, seed),
        "loss": [[row["iteration"], row["total_loss"]] for row in metrics],
    }
    finished.write_text(json.dumps(result), "utf-8")
    shutil.rmtree(output_dir)  # 2 GB of exports
    return result


def draw(results: list[dict]) -> str:
    """Return one SVG picture: per setting, teacher and student over the images seen, mean over the seeds."""
    charts = []
    for setting in dict.fromkeys(result["setting"] for result in results):
        runs = [result for result in results if result["setting"] == setting]
        lines = {}
        for network in ("student", "teacher"):
            rows = np.mean([run[network] for run in runs], axis=0)
            lines[network] = (rows[:, 0].tolist(), rows[:, -1].tolist())
        title = f"{setting} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
        # Beyond 100, so that the legend has room above the lines.
        axes = {"x_label": "images seen", "y_label": "20-NN %", "y_shown": (40.0, 105.0)}
        charts.append(line_chart(title, lines, **axes))
    return picture(charts, columns=3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("results/gentle"))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--weights", help="ViT-S/14 weights; by default those of scripts.quickstart.weights")
    args = parser.parse_args()
    weights = find_vits14(args.weights).path
    results = []
    for seed in args.seeds:
        for setting in args.settings:
            result = run_once(args.output_dir, setting, seed, weights)
            ends = ", ".join(
                f"{network} {result[network][0][-1]:.1f} -> {result[network][-1][-1]:.1f} % "
                f"(lowest {min(row[-1] for row in result[network]):.1f})"
                for network in ("teacher", "student")
            )
            results.append(result)
            print(f"{setting:24s} seed {seed}: 20-NN {ends}; {result['seconds']} s", flush=True)
    (args.output_dir / "gentle.json").write_text(json.dumps(results), "utf-8")
    (args.output_dir / "gentle.svg").write_text(draw(results), "utf-8")


if __name__ == "__main__":
    cli.run(main)
