"""Entry points of ``torch.hub.load``: backbones, and backbones with a linear ImageNet classifier.

``torch.hub.load(".", "dinov2_vits14", source="local", weights="path/to/weights.pth")`` works from a checkout
without a network. Only PyTorch is needed.
"""
# ruff: noqa: F401 - torch.hub looks the imported names up

from dinov2.hub.backbones import (
    dinov2_vitb14,
    dinov2_vitb14_reg,
    dinov2_vitg14,
    dinov2_vitg14_reg,
    dinov2_vitl14,
    dinov2_vitl14_reg,
    dinov2_vits14,
    dinov2_vits14_reg,
)
from dinov2.hub.classifiers import (
    dinov2_vitb14_lc,
    dinov2_vitb14_reg_lc,
    dinov2_vitg14_lc,
    dinov2_vitg14_reg_lc,
    dinov2_vitl14_lc,
    dinov2_vitl14_reg_lc,
    dinov2_vits14_lc,
    dinov2_vits14_reg_lc,
)

dependencies = ["torch"]
