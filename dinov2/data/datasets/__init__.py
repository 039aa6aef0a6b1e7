"""Datasets of images behind the dataset string; the CSV dataset is in its module ``CustomImageDataset``."""

from typing import TYPE_CHECKING

from dinov2.utils.lazy import lazy_names

if TYPE_CHECKING:
    from dinov2.data.datasets.image_folder import NCTCRC, ImageFolder
    from dinov2.data.datasets.image_net import ImageNet
    from dinov2.data.datasets.image_net_22k import ImageNet22k
    from dinov2.data.datasets.parquet import Parquet
    from dinov2.data.datasets.pathology import Pathology
    from dinov2.data.datasets.slides import Slides
    from dinov2.data.datasets.webdataset import WebDataset

__all__ = ["NCTCRC", "ImageFolder", "ImageNet", "ImageNet22k", "Parquet", "Pathology", "Slides", "WebDataset"]

# The classes derive from torchvision's; the modules beside them serve tools that need no torch.
__getattr__ = lazy_names(
    __name__,
    globals(),
    {
        "NCTCRC": "image_folder",
        "ImageFolder": "image_folder",
        "ImageNet": "image_net",
        "ImageNet22k": "image_net_22k",
        "Parquet": "parquet",
        "Pathology": "pathology",
        "Slides": "slides",
        "WebDataset": "webdataset",
    },
)
