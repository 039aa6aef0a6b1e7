"""From image files to collated batches of crops and masks."""

from typing import TYPE_CHECKING

from dinov2.utils.lazy import lazy_names

if TYPE_CHECKING:
    from dinov2.data.adapters import DatasetWithEnumeratedTargets
    from dinov2.data.augmentations import DataAugmentationDINO
    from dinov2.data.collate import collate_data_and_cast
    from dinov2.data.loaders import SamplerType, make_data_loader, make_dataset
    from dinov2.data.masking import MaskingGenerator

__all__ = [
    "DataAugmentationDINO",
    "DatasetWithEnumeratedTargets",
    "MaskingGenerator",
    "SamplerType",
    "collate_data_and_cast",
    "make_data_loader",
    "make_dataset",
]

# Cutting slides and indexing tiles need none of these, and no torch.
__getattr__ = lazy_names(
    __name__,
    globals(),
    {
        "DataAugmentationDINO": "augmentations",
        "DatasetWithEnumeratedTargets": "adapters",
        "MaskingGenerator": "masking",
        "SamplerType": "loaders",
        "collate_data_and_cast": "collate",
        "make_data_loader": "loaders",
        "make_dataset": "loaders",
    },
    modules=("datasets", "samplers", "transforms"),
)
