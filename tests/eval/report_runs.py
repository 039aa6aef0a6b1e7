"""Folders like those that trainings and evaluations leave, small enough to check by hand."""

import json
import math
from pathlib import Path

import torch
from PIL import Image

from dinov2.eval.results import ResultTable, write_summary
from dinov2.eval.scores import Predictions

CLASSES = ["gland", "lymph & <stroma>", "tumour"]


class Tiles:
    """Sixty named samples."""

    def __len__(self) -> int:
        return 60

    def get_image_path(self, index: int) -> str:
        return f"tiles/{index}.png"


def predictions(seed: int, certainty: float, classes: int = 3) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(60) % classes
    logits = torch.randn(60, classes, generator=generator, dtype=torch.float64)
    logits += certainty * torch.nn.functional.one_hot(labels, classes)
    return Predictions(labels, logits.softmax(dim=1))


def write_evaluation(folder: Path, *, seed: int = 0, certainty: float = 1.0, classes=CLASSES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = ResultTable("knn", str(folder), classes=classes, draws=100, save_predictions=True)
    for k in (5, 20):
        found = predictions(seed + k, certainty, len(classes))
        table.add(
            {"train_samples": "full", "k": k}, {"top-1": 1.0}, [found], dataset_str="Tiles", dataset=Tiles()
        )
    table.write(
        {"pretrained_weights": "w.pth", "model": {"weights_sha256": "ab12"}, "protocol": {"vote": "x"}}
    )


def write_slides(folder: Path, *, seed: int = 0) -> None:
    """Rows of folds, of all of them pooled, and on other patients of their ensemble, as slides have them."""
    folder.mkdir(parents=True, exist_ok=True)
    table = ResultTable("slides", str(folder), classes=["no", "yes"], draws=100, save_predictions=True)
    for number, (role, last) in enumerate((("val", "pooled"), ("test", "ensemble"))):
        for place, fold in enumerate(("fold 0", "fold 1", last)):
            found = predictions(seed + 10 * number + place, 1.0, 2)
            dataset = {"dataset_str": "labels.csv", "dataset": Tiles()}
            table.add({"fold": fold}, {"top-1": 1.0}, [found], role=role, **dataset)
            table.rows[-1]["scores"]["auprc"] = 0.5 + 0.1 * number + 0.01 * place
            table.rows[-1]["intervals"]["auprc"] = [0.4, 0.9]
    table.write({"target": "msi"})


def write_training(folder: Path, *, rows: int = 1200, rate: float = 1e-3, best: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "training_metrics.json").open("w") as file:
        for iteration in range(rows):
            loss = 8 * math.exp(-iteration / 300) + (50 if iteration == 777 else 0)
            row = {
                "iteration": iteration,
                "iter_time": 0.5,
                "lr": rate,
                "total_loss": loss,
                "koleo_loss": None,
            }
            file.write(json.dumps(row) + "\n")
    with (folder / "evaluation_metrics.json").open("w") as file:
        for step, value in enumerate((0.5, 0.8125, 0.7)):
            record = {
                "iteration": 400 * step,
                "signals": {"knn_balanced_accuracy": value, "rankme": 20.0 + step, "student_rankme": None},
                "intervals": {"knn_balanced_accuracy": [value - 0.1, value + 0.1]},
                "collapse": ["RankMe fell below 2"] if step == 2 else [],
            }
            file.write(json.dumps(record) + "\n")
    (folder / "config.yaml").write_text(
        f"optim: {{base_lr: {rate}}}\ntrain: {{output_dir: '{folder}', seed: 1}}\n"
    )
    if best:
        (folder / "best").mkdir(exist_ok=True)
        content = {"iteration": 400, "signal": "knn_balanced_accuracy", "value": 0.8125, "why": "highest"}
        (folder / "best" / "best.json").write_text(json.dumps(content | {"interval": [0.7, 0.9]}))


def write_robustness(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"perturbation": "stain", "strength": 0.1, "mean_cosine": 0.9321, "retrieval": 0.8765, "flips": None},
        {"perturbation": "jpeg", "strength": 50, "mean_cosine": 0.7431, "retrieval": 0.6543, "flips": 0.25},
    ]
    centers = {"centers": 3, "robustness_index": 0.6181, "robustness_index_interval": [0.5, 0.7]}
    summary = {"samples": 60, "random_pair_cosine": 0.1234, "perturbations": rows, "centers": centers}
    write_summary(str(folder), "robustness", summary)


def write_picture(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True)
    Image.new("RGB", (40, 30), (180, 90, 160)).save(folder / "pictures" / "pca.png")
    (folder / "pictures" / "captions.json").write_text(
        json.dumps({"pca.png": "Colours are <principal> parts."})
    )


def two_runs(folder: Path) -> list[Path]:
    """Two trainings with evaluations of the same images; the first has a picture."""
    runs = [folder / "first", folder / "second"]
    for number, run in enumerate(runs):
        write_training(run, rate=1e-3 * (number + 1), best=number == 0)
        write_evaluation(run / "eval" / "training_399" / "knn", seed=number, certainty=1.0 + number)
    write_robustness(runs[0] / "eval" / "training_399" / "knn")
    write_picture(runs[0])
    return runs
