"""Datasets of images behind the dataset string; the CSV dataset is in its module ``CustomImageDataset``."""

from dinov2.data.datasets.image_folder import NCTCRC, ImageFolder
from dinov2.data.datasets.image_net import ImageNet
from dinov2.data.datasets.image_net_22k import ImageNet22k
from dinov2.data.datasets.pathology import Pathology
from dinov2.data.datasets.slides import Slides

__all__ = ["NCTCRC", "ImageFolder", "ImageNet", "ImageNet22k", "Pathology", "Slides"]
