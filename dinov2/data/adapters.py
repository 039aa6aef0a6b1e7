"""Wrappers that change what a dataset hands out."""

from typing import Any

from torch.utils.data import Dataset


class DatasetWithEnumeratedTargets(Dataset):
    """Hands out ``(image, (index, target))``, so that results gathered from all processes can be sorted.

    Samples without a target (None) carry their index in its place.

    Args:
        dataset: map-style dataset of ``(image, target)`` pairs.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    @property
    def unnumbered(self) -> Dataset:
        """The dataset itself."""
        return self._dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Any, tuple[int, Any]]:
        image, target = self._dataset[index]
        return image, self._numbered(index, target)

    def get_image_data(self, index: int) -> bytes:
        """Return the encoded image of a sample."""
        return self._dataset.get_image_data(index)

    def get_target(self, index: int) -> tuple[int, Any]:
        """Return ``(index, target)`` of a sample without reading its image."""
        return self._numbered(index, self._dataset.get_target(index))

    @staticmethod
    def _numbered(index: int, target: Any) -> tuple[int, Any]:
        return index, index if target is None else target
