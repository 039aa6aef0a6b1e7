"""Training of an aggregator on bags, and its scores of patients.

Bags are read from their files when they are needed, by worker processes if there are any: memory holds a few
bags, whatever their number. Letters: N tiles, O outputs, C classes, P patients.
"""

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.scores import Predictions, score
from dinov2.eval.slides.bags import read_bag
from dinov2.eval.slides.cohort import Patient

logger = logging.getLogger("dinov2")

SLIDES, JOINED = "slides", "joined"
SELECT_BY = ("loss", "auroc")


@dataclass(frozen=True)
class BagReading:
    """How bags are read.

    Attributes:
        patient_bag: ``slides`` makes a bag of each slide, and the logits of a patient the mean over slides;
            ``joined`` makes one bag of the tiles of all slides of a patient.
        half: keep the features in float16 on their way to the device, where they become float32.
        workers: processes that read; 0 reads in the process itself.
        seed: of the tiles that are drawn.
    """

    patient_bag: str = SLIDES
    half: bool = False
    workers: int = 0
    seed: int = 0

    def features_of(self, path: Path) -> Tensor:
        """Return the features (N, D) of a bag, in the format in which they travel.

        Raises:
            DatasetError: it cannot be read.
        """
        return read_bag(path, dtype=torch.float16 if self.half else torch.float32).features


@dataclass(frozen=True)
class FitOptions:
    """How an aggregator is trained.

    Attributes:
        learning_rate, weight_decay: of AdamW, constant.
        epochs: the most; an epoch takes each bag of the training patients once.
        patience: epochs without a better validation value after which training ends.
        select_by: the validation value, ``loss`` (smaller is better) or ``auroc``.
        max_tiles: bags with more are thinned out to this many tiles at training, drawn anew each epoch;
            0 takes all. Validation and tests always take all.
        seed: of weights, dropout and the order of bags.
    """

    learning_rate: float
    weight_decay: float
    epochs: int
    patience: int
    select_by: str = "loss"
    max_tiles: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """What training led to.

    Attributes:
        epoch: the one whose weights were kept, from 1.
        epochs: that were run.
        history: by epoch, the mean training loss and the validation loss and AUROC.
    """

    epoch: int
    epochs: int
    history: list[dict[str, float]]


@dataclass(frozen=True)
class _Unit:
    """One bag: the files that make it up, the class, and how much it counts, 1 for a whole patient."""

    patient: int
    paths: tuple[Path, ...]
    label: int
    weight: float


class _BagFiles(Dataset):
    """Bags by (epoch, number): number and features (N, D), at most ``max_tiles`` of them."""

    def __init__(self, units: Sequence[_Unit], reading: BagReading, max_tiles: int) -> None:
        self.units, self.reading, self.max_tiles = units, reading, max_tiles

    def __len__(self) -> int:
        return len(self.units)

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor]:
        epoch, number = key
        parts = [self.reading.features_of(path) for path in self.units[number].paths]
        features = parts[0] if len(parts) == 1 else torch.cat(parts)
        if 0 < self.max_tiles < len(features):
            generator = np.random.default_rng([self.reading.seed, epoch, number])
            kept = np.sort(generator.choice(len(features), self.max_tiles, replace=False))
            features = features[torch.from_numpy(kept)]
        return number, features


def check_options(options: FitOptions, reading: BagReading) -> None:
    """Stop at options that no training can use.

    Raises:
        ConfigError: one is out of its range.
    """
    for name in ("learning_rate", "epochs", "patience"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give more than 0")
    for name, value in (
        ("weight-decay", options.weight_decay),
        ("max-tiles", options.max_tiles),
        ("workers", reading.workers),
        ("seed", options.seed),
    ):
        if not value >= 0:
            raise ConfigError(f"--{name} is {value}: give 0 or more")


def class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Return a weight for the loss of each class (C,): both of two classes count alike, and so do C.

    With two classes it is 1 and the ratio of the negatives to the positives, as in HistoBistro; with more it
    is the number of patients over C times that of the class.
    """
    counts = torch.bincount(torch.tensor(labels), minlength=num_classes).float()
    if num_classes == 2:
        return torch.stack([torch.ones(()), counts[0] / counts[1]])
    return counts.sum() / (num_classes * counts)


def fit(
    model: nn.Module,
    train: Sequence[Patient],
    val: Sequence[Patient],
    classes: Sequence[str],
    options: FitOptions,
    reading: BagReading,
    *,
    level: int = logging.INFO,
) -> Fitted:
    """Train a model in place, one bag a step, and leave it with the weights of its best epoch.

    Losses are weighted by class, from the training patients alone, and each of several slides of a patient
    counts for its share.

    Args:
        model: maps features (N, D) to :class:`~dinov2.eval.slides.aggregators.Aggregated`, on its device.
        train, val: the patients.
        classes: their names, in order; of two the second is the positive one.
        options, reading: how.
        level: of the line about each epoch in the log.

    Raises:
        DatasetError: a bag cannot be read, or the loss is not finite.
    """
    units = _units(train, classes, reading)
    weights = class_weights([classes.index(patient.label) for patient in train], len(classes))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
    )
    best_value, best_epoch, best_weights, history = math.inf, 0, None, []
    for epoch in range(1, options.epochs + 1):
        order = np.random.default_rng([options.seed, epoch]).permutation(len(units)).tolist()
        losses = [
            _step(model, optimizer, features, units[number], weights)
            for number, features in _read(units, order, epoch, reading, options.max_tiles, _device(model))
        ]
        logits = patient_logits(model, val, classes, reading)
        judged = _judge(logits, val, classes, weights)
        history.append({"train_loss": sum(losses) / len(train), **judged})
        told = ", ".join(f"{k} {v:.4f}" for k, v in history[-1].items())
        logger.log(level, "epoch %d: %s", epoch, told)
        value = judged["val_loss"]
        # Without both classes there is no area: such validation patients go by the loss.
        if options.select_by == "auroc" and math.isfinite(judged["val_auroc"]):
            value = -judged["val_auroc"]
        if value < best_value:
            best_value, best_epoch = value, epoch
            best_weights = copy.deepcopy(model.state_dict())
        if epoch - best_epoch >= options.patience:
            break
    model.load_state_dict(best_weights)
    return Fitted(best_epoch, len(history), history)


@torch.no_grad()
def patient_logits(
    model: nn.Module, patients: Sequence[Patient], classes: Sequence[str], reading: BagReading
) -> Tensor:
    """Return the logits of patients, float64 (P, O): of the joined bag, or the mean over their slides.

    Args: see :func:`fit`; labels need not be among the classes.

    Raises:
        DatasetError: a bag cannot be read, or logits are not finite.
    """
    was_training = model.training
    model.eval()
    units = _units(patients, classes, reading)
    # Plain numbers: a small tensor kept per bag lies between the large ones in memory, which then grows by
    # about a bag each time.
    found: list[list[list[float]]] = [[] for _ in patients]
    for number, features in _read(units, range(len(units)), 0, reading, 0, _device(model)):
        logits = model(features).logits.double()
        if not logits.isfinite().all():
            raise DatasetError(
                f'the logits of "{units[number].paths[0]}" are not finite: check its features, or lower '
                "--learning-rate"
            )
        found[units[number].patient].append(logits.tolist())
    model.train(was_training)
    return torch.stack([torch.tensor(logits, dtype=torch.float64).mean(dim=0) for logits in found])


def probabilities(logits: Tensor) -> Tensor:
    """Return the probabilities of the classes (P, C) from logits (P, O)."""
    if logits.shape[1] == 1:
        return torch.cat([(-logits).sigmoid(), logits.sigmoid()], dim=1)
    return logits.softmax(dim=1)


def label_numbers(patients: Sequence[Patient], classes: Sequence[str]) -> Tensor:
    """Return the numbers of the patients' classes, int64 (P,)."""
    return torch.tensor([classes.index(patient.label) for patient in patients])


def _units(patients: Sequence[Patient], classes: Sequence[str], reading: BagReading) -> list[_Unit]:
    units = []
    for number, patient in enumerate(patients):
        label = classes.index(patient.label) if patient.label in classes else -1
        bags = [patient.bags] if reading.patient_bag == JOINED else [(path,) for path in patient.bags]
        units += [_Unit(number, paths, label, 1 / len(bags)) for paths in bags]
    return units


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _read(
    units: Sequence[_Unit],
    order: Sequence[int],
    epoch: int,
    reading: BagReading,
    max_tiles: int,
    device: torch.device,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the bags of ``order``: number and features (N, D), float32 on the device."""
    loader = DataLoader(
        _BagFiles(units, reading, max_tiles),
        sampler=[(epoch, number) for number in order],
        batch_size=None,
        num_workers=reading.workers,
        pin_memory=device.type == "cuda",
    )
    for number, features in loader:
        yield number, features.to(device, non_blocking=True).float()


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, features: Tensor, unit: _Unit, weights: Tensor
) -> float:
    """Take one step and return the weighted loss of the bag."""
    model.train()
    logits = model(features).logits
    label = torch.tensor(unit.label, device=logits.device)
    loss = _losses(logits[None], label[None], weights)[0] * unit.weight
    value = loss.item()
    if not math.isfinite(value):
        raise DatasetError(
            f'the loss of "{unit.paths[0]}" is {value}: check its features, or lower --learning-rate'
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return value


def _losses(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted losses (P,) of logits (P, O): binary cross-entropy, or that of C classes."""
    weights = weights.to(logits)
    if logits.shape[1] == 1:
        targets = labels.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(
            logits[:, 0], targets, pos_weight=weights[1], reduction="none"
        )
    return F.cross_entropy(logits, labels, weight=weights, reduction="none")


def _judge(
    logits: Tensor, patients: Sequence[Patient], classes: Sequence[str], weights: Tensor
) -> dict[str, float]:
    labels = label_numbers(patients, classes)
    return {
        "val_loss": _losses(logits, labels, weights).mean().item(),
        "val_auroc": score(Predictions(labels, probabilities(logits)))["auroc"],
    }
