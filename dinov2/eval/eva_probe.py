"""The linear probe of kaiko's eva benchmark: one classifier on the cls token, with early stopping.

AdamW at a rate of 3e-4 (a third of it in the first five epochs), batches of 256, at most 12,500 steps. After
every epoch the balanced accuracy on the validation set is taken; training stops when it has not risen for a
fifth of the epochs there could be, and the best epoch counts. Five runs with different seeds are averaged.

Shapes: S samples, D width, C classes.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2 import distributed
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.errors import DatasetError
from dinov2.eval.cli import check_draws
from dinov2.eval.data import make_labelled_datasets
from dinov2.eval.extract import cls_extraction
from dinov2.eval.feature_store import transform_text
from dinov2.eval.identity import identity_of
from dinov2.eval.metrics import balanced_accuracy
from dinov2.eval.neighbors import count_classes
from dinov2.eval.results import ResultTable
from dinov2.eval.scores import DRAWS, Predictions, score
from dinov2.eval.utils import extract_features

logger = logging.getLogger("dinov2")

SLOW_EPOCHS = 5
SLOW_FACTOR = 1 / 3
RESIZE_SIZE = 224


@dataclass(frozen=True)
class EvaProtocol:
    """The numbers of the protocol.

    Args:
        learning_rate, weight_decay: Of AdamW.
        batch_size: Samples per step.
        max_steps: Steps per run at most.
        patience: Share of the possible epochs to wait for a better one.
        runs: How many, with the seeds 0, 1, ...
    """

    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    batch_size: int = 256
    max_steps: int = 12_500
    patience: float = 0.2
    runs: int = 5

    def patience_epochs(self, samples: int) -> int:
        """Return the epochs to wait for a better one, with so many training samples."""
        return math.ceil(self.patience * self.max_steps / math.ceil(samples / self.batch_size))


class Probe(NamedTuple):
    """A trained classifier: weight (C, D) and bias (C,), the epoch they are of, and how many there were."""

    weight: Tensor
    bias: Tensor
    best_epoch: int
    epochs: int

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the class probabilities (S, C) of features (S, D), float64."""
        return functional.linear(features, self.weight, self.bias).double().softmax(dim=1)


def train_probe(
    features: Tensor,
    labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    seed: int,
    protocol: EvaProtocol = EvaProtocol(),  # noqa: B008 - it cannot change
) -> Probe:
    """Train one classifier and keep that of the best epoch.

    Args:
        features, labels: (S, D) and (S,) to train on, on one device with those to validate on.
        seed: Of the initial weights and the order of samples.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = features.shape[1] ** -0.5
    start = torch.empty(num_classes, features.shape[1] + 1).uniform_(-bound, bound, generator=generator)
    weight, bias = (
        nn.Parameter(part.contiguous().to(features.device)) for part in (start[:, :-1], start[:, -1])
    )
    optimizer = torch.optim.AdamW(
        [weight, bias], lr=protocol.learning_rate, weight_decay=protocol.weight_decay
    )
    patience = protocol.patience_epochs(len(features))
    best, best_score, epoch, steps = None, -1.0, 0, 0
    while steps < protocol.max_steps and (best is None or epoch - best.best_epoch < patience):
        for group in optimizer.param_groups:
            group["lr"] = protocol.learning_rate * (SLOW_FACTOR if epoch < SLOW_EPOCHS else 1.0)
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for rows in order.split(protocol.batch_size)[: protocol.max_steps - steps]:
            loss = functional.cross_entropy(functional.linear(features[rows], weight, bias), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        epoch += 1
        with torch.no_grad():
            predicted = functional.linear(val_features, weight, bias).argmax(dim=1)
        found = balanced_accuracy(predicted, val_labels, num_classes)
        if found > best_score:
            best_score = found
            best = Probe(weight.detach().clone(), bias.detach().clone(), epoch, epoch)
    return best._replace(epochs=epoch)


def run_eval_eva(
    model: nn.Module,
    output_dir: str,
    train_dataset_str: str,
    val_dataset_str: str,
    autocast_dtype: torch.dtype = torch.float,
    test_dataset_strs: Sequence[str] | None = None,
    *,
    batch_size: int = 128,
    num_workers: int = 8,
    pretrained_weights: str | None = None,
    normalisation: Mapping[str, Sequence[float]] | None = None,
    path_map: Mapping[str, str] | None = None,
    resize_size: int | None = None,
    features: str | None = None,
    bootstrap_draws: int = DRAWS,
    save_predictions: bool = False,
    protocol: EvaProtocol = EvaProtocol(),  # noqa: B008 - it cannot change
) -> dict[str, float]:
    """Evaluate a backbone by eva's protocol and write the summary of the linear evaluation.

    Processes share out the runs, so the results do not depend on their number.

    Args:
        model: Maps images to features (B, D).
        autocast_dtype: Number format of the backbone; probes are trained in float32.
        test_dataset_strs: More datasets to report on, with the epochs chosen on the validation set.
        batch_size, num_workers: Of the extraction.
        resize_size: Shorter side of the images before the central 224 pixels are taken; None is 224.

    For the other arguments see :func:`dinov2.eval.linear.run_eval_linear`.

    Returns:
        ``<dataset>_accuracy``, the mean balanced accuracy in percent, per dataset.
    """
    check_draws(bootstrap_draws)
    transform = make_classification_eval_transform(
        resize_size=resize_size or RESIZE_SIZE, **(normalisation or {})
    )
    strings = {"train": train_dataset_str, "val": val_dataset_str}
    strings |= {
        "test" if number == 1 else f"test_{number}": dataset_str
        for number, dataset_str in enumerate(test_dataset_strs or [], 1)
    }
    datasets = make_labelled_datasets(strings, transform, path_map)
    extractor, datasets, num_workers = cls_extraction(
        model, datasets, strings, transform, autocast_dtype, features, num_workers
    )
    samples = {
        role: extract_features(extractor, dataset, batch_size, num_workers)
        for role, dataset in datasets.items()
    }
    num_classes = count_classes(samples["train"][1])
    _check_labels(samples["val"][1], num_classes)
    probes = _train_probes(samples["train"], samples["val"], num_classes, protocol)
    table = ResultTable(
        "linear",
        output_dir,
        classes=getattr(datasets["train"], "classes", None),
        draws=bootstrap_draws,
        save_predictions=save_predictions,
    )
    results = {}
    for role in list(datasets)[1:]:
        inputs, labels = samples[role]
        tries = [Predictions(labels.cpu(), probe.probabilities(inputs).cpu()) for probe in probes]
        mean = 100 * sum(score(predictions)["balanced_accuracy"] for predictions in tries) / len(tries)
        results[f"{strings[role]}_accuracy"] = mean
        table.add(
            {"protocol": "eva"},
            {"balanced accuracy": mean},
            tries,
            role=role,
            dataset_str=strings[role],
            dataset=datasets[role],
        )
    table.write(
        {
            "pretrained_weights": pretrained_weights,
            "model": identity_of(model),
            "train_dataset": train_dataset_str,
            "val_dataset": val_dataset_str,
            "protocol": {
                "name": "eva",
                **asdict(protocol),
                "patience_epochs": protocol.patience_epochs(len(datasets["train"])),
                "best_epochs": [probe.best_epoch for probe in probes],
                "epochs": [probe.epochs for probe in probes],
                "transform": transform_text(transform),
                "autocast": str(autocast_dtype).removeprefix("torch."),
            },
            "train_samples": len(datasets["train"]),
            "features": features,
        }
    )
    return results


def _check_labels(labels: Tensor, num_classes: int) -> None:
    if labels.ndim > 1 or labels.max() >= num_classes:
        raise DatasetError(
            f"the validation labels go beyond the classes 0..{num_classes - 1} of the training data, or are "
            "several per image: evaluate on a dataset with the same classes"
        )


def _train_probes(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], num_classes: int, protocol: EvaProtocol
) -> list[Probe]:
    """Return the probes of all runs; process r of W trains the runs r, r + W, ..."""
    own = {}
    for seed in range(distributed.get_global_rank(), protocol.runs, distributed.get_global_size()):
        own[seed] = train_probe(*train, *val, num_classes, seed, protocol)
        logger.info("run %d: best epoch %d of %d", seed, own[seed].best_epoch, own[seed].epochs)
    moved = {
        seed: probe._replace(weight=probe.weight.cpu(), bias=probe.bias.cpu()) for seed, probe in own.items()
    }
    found: dict[int, Probe] = {}
    for part in distributed.all_gather_objects(moved):
        found |= part
    device = train[0].device
    return [
        found[seed]._replace(weight=found[seed].weight.to(device), bias=found[seed].bias.to(device))
        for seed in range(protocol.runs)
    ]
