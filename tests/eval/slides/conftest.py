"""Slides made from the real one, and a tiny backbone to extract their features with."""

import shutil
from dataclasses import replace

import pytest
import tifffile
import torch
from torch import nn

from dinov2.data.slides.output_folder import OutputFolder
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.data.slides.slide_list import SlideEntry, list_slides
from dinov2.eval.feature_store import transform_text
from dinov2.eval.identity import identity_of
from dinov2.eval.slides.extract import make_tile_transform
from dinov2.eval.slides.extraction import Encoder, Extraction
from dinov2.eval.slides.scouting import ScoutingOrder
from tests.conftest import REAL_DATA
from tests.data.slides.conftest import write_tiff

SVS = REAL_DATA / "cmu_small_region.svs"
NORMALISATION = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="session")
def pixels():
    """Level 0 of the real slide, (2967, 2220, 3) uint8, by a library that the reader does not use."""
    with tifffile.TiffFile(SVS) as file:
        return file.pages[0].asarray()


@pytest.fixture(scope="session")
def slides(tmp_path_factory, pixels):
    """A folder of three slides: the real one, and two pyramids with lossless tiles made of parts of it."""
    folder = tmp_path_factory.mktemp("slides")
    shutil.copy(SVS, folder / "real.svs")
    write_tiff(folder / "top.tiff", pixels[:1200, :1600], levels=(1, 2), compression="deflate")
    write_tiff(folder / "middle.tif", pixels[1200:2200, :1800], levels=(1, 2), compression="deflate")
    return folder


@pytest.fixture(scope="session")
def encoder(tiny_backbone) -> Encoder:
    return encoder_of(tiny_backbone)


def encoder_of(model: nn.Module, tile: int = 224, **options) -> Encoder:
    transform = make_tile_transform(tile, None, **NORMALISATION)
    return Encoder(model, transform, identity_of(model), transform_text(transform), "vit_tiny", **options)


@pytest.fixture
def extraction(slides, encoder, tmp_path):
    """Makes an extraction of those slides, or of others, in this process."""

    def make(
        source=slides, *, recipe=None, output=tmp_path / "bags", assumed_mpp=None, backend="auto", **given
    ):
        order = ScoutingOrder(recipe or TilingRecipe(), backend, assumed_mpp)
        entries = source if isinstance(source, list) else list_slides(str(source))
        run = Extraction(entries, order, encoder, OutputFolder(str(output)), workers=0)
        return replace(run, **given)

    return make


def entry(path, **options) -> SlideEntry:
    return SlideEntry(path.stem, str(path), **options)


def features_by_hand(model: nn.Module, windows) -> torch.Tensor:
    """Features of (n, H, W, 3) uint8 windows, normalised here."""
    mean, std = (torch.tensor(NORMALISATION[key]).view(3, 1, 1) for key in ("mean", "std"))
    images = torch.stack([torch.from_numpy(window.copy()).permute(2, 0, 1) for window in windows])
    with torch.inference_mode():
        return model((images / 255 - mean) / std)
