"""Labelled datasets for evaluation and the loader that goes through them once."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, default_collate

from dinov2 import distributed
from dinov2.data import DatasetWithEnumeratedTargets, SamplerType, make_data_loader, make_dataset
from dinov2.errors import DatasetError, some_of
from dinov2.eval.metrics import NO_LABEL
from dinov2.eval.neighbors import count_classes

logger = logging.getLogger("dinov2")

CLASSES_SHOWN = 10


def make_labelled_dataset(
    dataset_str: str, transform: Callable | None = None, path_map: Mapping[str, str] | None = None
) -> Dataset:
    """Make a dataset from its string and see to it that its samples carry labels.

    Args:
        dataset_str, transform, path_map: See :func:`dinov2.data.make_dataset`.

    Raises:
        DatasetError: The string is wrong, or the dataset is empty or has no labels.
    """
    dataset = make_dataset(dataset_str=dataset_str, transform=transform, path_map=path_map)
    if label_of(dataset, 0) is None:
        raise DatasetError(
            f'the dataset "{dataset_str}" has no labels, which evaluation compares predictions with: '
            f"{_label_advice(dataset)}"
        )
    return dataset


def label_of(dataset: Dataset, index: int) -> Any:
    """Return the label of a sample, None without one, if possible without reading its image."""
    return dataset.get_target(index) if hasattr(dataset, "get_target") else dataset[index][1]


def _label_advice(dataset: Dataset) -> str:
    """Return how a dataset comes by labels, in its own words where it has any."""
    own = getattr(dataset, "how_to_label", "")
    general = "use a dataset with classes, such as ImageFolder:root=<folder with one subfolder per class>"
    return f"{own}, or {general}" if own else general


def check_same_classes(train_dataset: Dataset, other_dataset: Dataset) -> None:
    """Stop if both datasets name their classes and the names differ: their numbers would mean other things.

    Raises:
        DatasetError: The class names differ, or of two files of labels one has names and the other numbers.
    """
    datasets = (train_dataset, other_dataset)
    ours, theirs = (getattr(dataset, "classes", None) for dataset in datasets)
    if bool(ours) != bool(theirs) and all(hasattr(dataset, "classes") for dataset in datasets):
        named, numbered = ("training", "other") if ours else ("other", "training")
        names = some_of(ours or theirs, CLASSES_SHOWN)
        found = f"the {named} labels are names, {names}, and those of the {numbered} dataset are numbers"
        if type(train_dataset) is type(other_dataset):
            raise DatasetError(
                f"{found}: which number stands for which name can not be told, so write either in both (one "
                "label that is no whole number makes all of a file names)"
            )
        logger.warning("%s: names are taken to be numbered from 0 in the order of the alphabet", found)
    if ours and theirs and list(ours) != list(theirs):
        raise DatasetError(
            f"the classes of the datasets differ, {some_of(ours, CLASSES_SHOWN)} versus "
            f"{some_of(theirs, CLASSES_SHOWN)}: give both the same class folders, "
            "an empty one where a class has no image"
        )


def check_known_labels(train_dataset: Dataset, other_dataset: Dataset) -> None:
    """Stop if labels go beyond those of the training set, where both list them without reading images.

    Raises:
        DatasetError: Labels are not classes of the training set, or it has labels that are no classes.
    """
    known, labels = (_listed_labels(dataset) for dataset in (train_dataset, other_dataset))
    if known is None or labels is None:
        return
    num_classes = count_classes(torch.from_numpy(known))
    unknown = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(unknown):
        label = int(labels[unknown[0]])
        names = getattr(train_dataset, "classes", None) or []
        name = f" ({names[label]})" if 0 <= label < len(names) else ""
        raise DatasetError(
            f"the label {label}{name} is not among the classes 0..{num_classes - 1} of the training data; "
            f"{len(unknown)} of {len(labels)} samples have such labels, sample {unknown[0]} first: evaluate "
            "on a dataset with the same classes, or train with images of all of them"
        )


def warn_of_single_class(train_dataset: Dataset) -> None:
    """Warn if all training images are of one class, where their labels can be listed."""
    labels = _listed_labels(train_dataset)
    if labels is not None and len(labels) and labels.min() == labels.max():
        logger.warning(
            "all %d training samples have the label %d: with a single class there is nothing to tell apart, "
            "and every prediction is that class",
            len(labels),
            labels[0],
        )


def _listed_labels(dataset: Dataset) -> np.ndarray | None:
    """Return the labels (n,) of a dataset, None if it cannot list them or has several per image."""
    targets = dataset.get_targets() if hasattr(dataset, "get_targets") else None
    if targets is None or not len(targets) or np.ndim(targets[0]):
        return None
    return np.array(targets, dtype=np.int64)


def sample_names(dataset: Dataset) -> list[str]:
    """Return what tells each sample of a dataset from others: its path, else its number."""
    path_of = getattr(dataset, "get_image_path", str)
    return [path_of(index) or str(index) for index in range(len(dataset))]


def warn_of_shared_images(train_dataset: Dataset, other_dataset: Dataset, what: str) -> None:
    """Warn if images are in the training set and in one that is to judge it; only the main process looks.

    Args:
        what: The use of ``other_dataset``, such as ``validation``.
    """
    if not distributed.is_main_process() or not hasattr(train_dataset, "get_image_path"):
        return
    known = {Path(name).absolute() for name in sample_names(train_dataset)}
    shared = [name for name in sample_names(other_dataset) if Path(name).absolute() in known]
    if shared:
        logger.warning(
            "LEAK: %s of the %d %s images %s in the training set, too (such as %s): scores on them say "
            "nothing of new images, so evaluate on a dataset of other images",
            "all" if len(shared) == len(other_dataset) else len(shared),
            *(len(other_dataset), what, "is" if len(shared) == 1 else "are", shared[0]),
        )


def make_labelled_datasets(
    strings: Mapping[str, str | None],
    transform: Callable | None = None,
    path_map: Mapping[str, str] | None = None,
) -> dict[str, Dataset]:
    """Make a training set and those that are to judge what it teaches.

    Args:
        strings: Dataset strings by role: ``train`` first, then ``val``, which are needed, then others, which
            may be empty.
        transform, path_map: See :func:`make_labelled_dataset`.

    Returns:
        The datasets by role.

    Raises:
        DatasetError: One of them is wrong, their classes differ, or labels are not among those of training.
    """
    datasets = {
        role: make_labelled_dataset(text or "", transform, path_map)
        for role, text in strings.items()
        if text or role in ("train", "val")
    }
    warn_of_single_class(datasets["train"])
    for role in list(datasets)[1:]:
        check_same_classes(datasets["train"], datasets[role])
        check_known_labels(datasets["train"], datasets[role])
        use = "validation" if role == "val" else role.partition("_")[0]  # test_1 is a test, too
        warn_of_shared_images(datasets["train"], datasets[role], use)
    return datasets


def training_labels(dataset: Dataset, dataset_str: str) -> Tensor:
    """Return all labels of a dataset (n,) without reading its images.

    Raises:
        DatasetError: The dataset cannot list its labels.
    """
    if not hasattr(dataset, "get_targets"):
        raise DatasetError(
            f'the dataset "{dataset_str}" cannot list its labels (it has no get_targets()), by which '
            "linear evaluation counts classes: use a dataset with classes, such as ImageFolder:root=<folder>"
        )
    # A copy: labels of shards are mapped from a file that can not be written, of which torch warns.
    return torch.from_numpy(np.array(dataset.get_targets(), dtype=np.int64))


def make_evaluation_loader(dataset: Dataset, batch_size: int, num_workers: int) -> DataLoader:
    """Return a loader of ``(images, (indices, targets))`` that deals every sample to one process.

    Where the samples do not divide evenly, the first ones are dealt again so that all processes take equally
    many steps; the indices tell.
    """
    return make_data_loader(
        dataset=DatasetWithEnumeratedTargets(dataset),
        batch_size=batch_size,
        num_workers=num_workers,
        shuffle=False,
        sampler_type=SamplerType.DISTRIBUTED,
        drop_last=False,
        collate_fn=collate_padded,
    )


def collate_padded(samples: list[tuple[Tensor, tuple[int, Any]]]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Batch images, indices and targets; where samples have lists of labels, pad them with -1."""
    images, numbered = zip(*samples, strict=True)
    indices, targets = zip(*numbered, strict=True)
    rows = [torch.as_tensor(target).long() for target in targets]
    padded = (
        pad_sequence(rows, batch_first=True, padding_value=NO_LABEL) if rows[0].ndim else torch.stack(rows)
    )
    return default_collate(images), (torch.tensor(indices), padded)
