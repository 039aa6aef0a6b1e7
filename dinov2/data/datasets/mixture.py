"""Several datasets as one: one behind the other, or at given shares of the draws."""

import logging
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from math import ceil
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dinov2.errors import DatasetError, some_of

logger = logging.getLogger("dinov2")

LONGEST_PASS = 1 << 48


class MixtureDataset(Dataset):
    """Several datasets as one map-style dataset.

    Without weights the datasets stand one behind the other, and a pass draws every image once.

    With weights they are drawn at shares in proportion to the weights, whatever their sizes. A pass is then
    the shortest in which every image of every dataset comes at least once: a dataset of n images has
    c = round(share * pass) >= n places, and an image comes floor(c/n) or ceil(c/n) times. Those that come
    once more than others are spread evenly over their dataset and are the same in every pass.

    Place -> image is a formula, ``image = place * n // c``, so samplers, resuming and the memory needed are
    as for a single dataset of that length.

    Args:
        datasets: at least one; each with the transforms that it should apply.
        names: of the datasets, for messages.
        weights: relative shares of the draws, one per dataset; None for no weights.
        transform, target_transform: those that the datasets apply, to read back.

    Raises:
        DatasetError: a dataset is empty, or a pass would be too long.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        names: Sequence[str],
        weights: Sequence[Fraction] | None = None,
        *,
        transform: Callable | None = None,
        target_transform: Callable | None = None,
    ) -> None:
        self.datasets = list(datasets)
        self.names = list(names)
        self.transform = transform
        self.target_transform = target_transform
        self.weights = weights
        self._sizes = [len(dataset) for dataset in datasets]
        if 0 in self._sizes:
            raise DatasetError(f'the part "{self.names[self._sizes.index(0)]}" of the mixture is empty')
        self._counts = self._sizes if weights is None else places_in_a_pass(self._sizes, weights)
        self._ends = list(accumulate(self._counts))
        if self._ends[-1] > LONGEST_PASS:
            raise DatasetError(
                f"with the weights of the mixture {' + '.join(self.names)} it takes {self._ends[-1]:.1e} "
                "draws to see every image once: bring the weights closer to the sizes of the datasets"
            )
        self._labels_checked = False
        logger.info("%s", self._summary())

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Any:
        number, inner = self.locate(index)
        return self.datasets[number][inner]

    @property
    def classes(self) -> list[str] | None:
        """Class names if all datasets name the same ones, else None."""
        found = [getattr(dataset, "classes", None) for dataset in self.datasets]
        return found[0] if all(found) and all(list(other) == list(found[0]) for other in found) else None

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the dataset and the sample within it that a place of the pass holds."""
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        place = index - (self._ends[number - 1] if number else 0)
        return number, place * self._sizes[number] // self._counts[number]

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a sample."""
        number, inner = self.locate(index)
        return self.datasets[number].get_image_data(inner)

    def get_image_path(self, index: int) -> str:
        """Return where the image of a sample lies; empty where its dataset does not say."""
        number, inner = self.locate(index)
        dataset = self.datasets[number]
        return dataset.get_image_path(inner) if hasattr(dataset, "get_image_path") else ""

    def get_target(self, index: int) -> Any:
        """Return the label of a sample, None where its dataset has no labels.

        Raises:
            DatasetError: the labels of the datasets do not go together, see :meth:`get_targets`.
        """
        number, inner = self.locate(index)
        target = self.datasets[number].get_target(inner)
        if target is not None:
            self._check_labels()
        return target

    def get_targets(self) -> np.ndarray:
        """Return the labels of all samples.

        Raises:
            DatasetError: there are weights, a dataset has no labels, or their classes differ.
        """
        self._check_labels()
        return np.concatenate([np.asarray(dataset.get_targets()) for dataset in self.datasets])

    def _check_labels(self) -> None:
        """See to it that a label means the same in all datasets, once."""
        if self._labels_checked:
            return
        if self.weights is not None:
            raise DatasetError(
                f"the mixture {' + '.join(self.names)} has weights, which have no meaning where every "
                "labelled sample counts once: leave them out"
            )
        seen = [_classes_of(dataset, name) for dataset, name in zip(self.datasets, self.names, strict=True)]
        for classes, name in zip(seen, self.names, strict=True):
            if classes != seen[0]:
                raise DatasetError(
                    f"{self.names[0]} has {_described(seen[0])} and {name} has {_described(classes)}, so a "
                    "label does not mean the same in both: evaluate them one by one, or give both the same "
                    "classes"
                )
        self._labels_checked = True

    def _summary(self) -> str:
        """Say in a line what a pass consists of."""
        total = len(self)
        parts = [
            f"{name} {size} images, {count / total:.2%} of draws, each {count / size:.3g} times a pass"
            for name, size, count in zip(self.names, self._sizes, self._counts, strict=True)
        ]
        return f"mixture of {len(parts)} datasets, a pass is {total} draws: {'; '.join(parts)}"


def places_in_a_pass(sizes: Sequence[int], weights: Sequence[Fraction]) -> list[int]:
    """Return how often each dataset is drawn in the shortest pass that has every image at least once.

    The counts are exact to one draw: c = max(n, round(share * pass)).
    """
    total = sum(weights)
    length = max(size * total / weight for size, weight in zip(sizes, weights, strict=True))
    return [
        max(size, ceil(length * weight / total - Fraction(1, 2)))
        for size, weight in zip(sizes, weights, strict=True)
    ]


def _classes_of(dataset: Dataset, name: str) -> list[str] | int:
    """Return the names of the classes, or their number where they have none."""
    targets = dataset.get_targets() if hasattr(dataset, "get_targets") else None
    if targets is None:
        raise DatasetError(f"the part {name} of the mixture has no labels: leave it out")
    named = getattr(dataset, "classes", None)
    return list(named) if named else int(np.max(targets)) + 1


def _described(classes: list[str] | int) -> str:
    return f"{classes} classes" if isinstance(classes, int) else f"the classes {some_of(classes, 10)}"
