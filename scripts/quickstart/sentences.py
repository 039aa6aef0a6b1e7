"""What the quickstart says about its numbers, in words: outcome, noise, limits, and how the run was made."""

import torch

from scripts.quickstart.curves import read_metrics
from scripts.quickstart.evaluate import PROBES, Change, Score
from scripts.quickstart.training import Training, available_cores

Scores = dict[str, dict[str, Score]]  # representation -> probe -> score

METHOD = (
    "Balanced accuracy on windows of 112 px. Features are the cls token and the mean patch token; k-NN has "
    "k = 5 and cosine similarity, linear is a logistic regression on standardised features."
)
NOISE = (
    "Noise: +- is half of the 95 % bootstrap interval over the test windows, which overlap, so take "
    "differences below 0.08 for none; train and test windows are two halves of one picture, and colour alone "
    "(the histogram) solves the tissue task, so the scores do not tell how good the features are elsewhere."
)
LIMITS = [
    NOISE,
    "The nuclei windows are grey, with equal mean and contrast, so that the stain gives nothing away.",
    "Training used no labels. It saw the whole slide, and of the carcinoma picture only the part without "
    "test windows.",
]


def losses_sentence(runs: dict[str, dict[str, list[float]]]) -> str:
    """Say where the minimised loss of each run started and ended."""
    ends = {name: (run["total_loss"][0], run["total_loss"][-1]) for name, run in runs.items()}
    parts = [f"{first:.2f} to {last:.2f} ({name})" for name, (first, last) in ends.items()]
    return f"The total loss went from {', '.join(parts)}."


def change_sentence(task: str, changes: dict[str, Change]) -> str:
    """Say whether the scores of a task changed by more than the noise."""
    parts = []
    for probe, change in changes.items():
        judged = "within the noise" if change.within_noise else "beyond the noise of these windows"
        parts.append(f"{probe} {change.value:+.2f} +-{change.noise:.2f}, {judged}")
    return f"Change by finetuning on {task}: {'; '.join(parts)}."


def spread_sentence(task: str, before: dict[str, Score], after: dict[str, Score]) -> str:
    """Say how much the scores of a task depend on the training windows and on the seed of the training."""
    deviations = " and ".join(f"{before[probe].subset_spread:.3f} ({probe})" for probe in PROBES)
    text = (
        f"Probes fitted to three different three-quarters of the training windows of {task} give scores "
        f"before finetuning that vary with a standard deviation of {deviations}"
    )
    if len(after["k-NN"].by_seed) > 1:
        ranges = [f"{min(s.by_seed):.2f} to {max(s.by_seed):.2f} ({probe})" for probe, s in after.items()]
        text += f"; over the seeds of the training the scores after range from {' and from '.join(ranges)}"
    return f"{text}."


def run_facts(
    trainings: dict[int, Training], processes: int, device: torch.device, origin: str
) -> dict[str, str]:
    """Return, by name, what someone would need to judge or repeat the run."""
    first = trainings[0]
    metrics = read_metrics(first.metrics)
    images = metrics["current_batch_size"][-1] * processes
    crops = first.cfg.crops
    large, small = crops.global_crops_size, crops.local_crops_size
    return {
        "weights": origin,
        "recipe": "dinov2/configs/train/vits14-quickstart.yaml",
        "resolved configs": ", ".join(
            str(training.folder / "config.yaml") for training in trainings.values()
        ),
        "length": f"{metrics['iteration'][-1] + 1} iterations of {images:.0f} tiles on {processes} processes",
        "crops": f"2 global of {large} px and {crops.local_crops_number} local of {small} px per tile",
        "machine": f"{device.type}, {available_cores()} CPU cores, torch {torch.__version__}",
        "training time": ", ".join(
            f"{training.seconds:.0f} s (seed {seed}{', earlier' if training.reused else ''})"
            for seed, training in trainings.items()
        ),
    }
