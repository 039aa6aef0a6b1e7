"""Decisions about crops against torchvision's, and the regions of scale-limited crops."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision import transforms

from dinov2.data import DataAugmentationDINO
from dinov2.data.augmentations import PIPELINES
from dinov2.data.crop_parameters import Photometrics, draw_box, draw_crop, from_row, to_row
from dinov2.data.datasets import ImageFolder
from dinov2.data.random_stream import RandomStream
from dinov2.errors import ImageReadError

RECIPE = DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 1).recipes["global_2"]


@pytest.mark.parametrize("size", [(224, 224), (512, 400), (600, 60), (60, 600), (3, 2)])
@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.9, 1.0), (0.05, 0.32)])
def test_boxes_equal_torchvisions(size, scale):
    """Long pictures exhaust the attempts, so that the box in the middle is met as well."""
    image, recipe = Image.new("RGB", size), replace(RECIPE, scale=scale)
    for seed in range(40):
        torch.manual_seed(seed)
        top, left, height, width = transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
        torch.manual_seed(seed)
        assert draw_box(recipe, *size, RandomStream()) == (top, left, height, width)


def test_a_row_says_the_same_as_its_record():
    records = [
        Photometrics(),
        Photometrics(grayscale=True, solarize=True),
        Photometrics((0.75, 1.25, 1.0, -0.5, 0.25, 0.0), (3, 0, 2, 1), (0.5, 1.5, 1.25, -0.125), sigma=0.5),
        Photometrics(order=(2,), factors=(1.0, 1.0, 0.75, 0.0)),
    ]
    rows = torch.tensor([to_row(record) for record in records])
    assert [from_row(row) for row in rows.tolist()] == records


def test_jitters_of_strength_0_do_not_happen():
    recipe = replace(RECIPE, color_jitter=(0.4, 0.0, 0.2, 0.0), color_jitter_prob=1.0)
    torch.manual_seed(0)
    drawn = [draw_crop(recipe, 224, 224, RandomStream()).photometrics for _ in range(30)]
    assert {frozenset(record.order) for record in drawn} == {frozenset((0, 2))}
    assert {record.order for record in drawn} == {(0, 2), (2, 0)}
    assert {record.factors[1] for record in drawn} == {1.0} and {record.factors[3] for record in drawn} == {
        0.0
    }


@pytest.mark.parametrize(("tile", "largest"), [(448, 2.0), (256, (256 / 224) ** 2)])
def test_scales_may_refer_to_the_crop(tile, largest):
    recipe = replace(RECIPE, scale=(0.5, 2.0), scale_reference="crop")
    torch.manual_seed(0)
    boxes = [draw_box(recipe, tile, tile, RandomStream()) for _ in range(400)]
    areas = torch.tensor([box.width * box.height / 224**2 for box in boxes])
    assert areas.min() > 0.49 and areas.max() < largest * 1.01
    if tile == 448:  # every region fits, so areas are uniform over the whole range
        assert areas.min() < 0.52 and areas.max() > 1.97
        assert areas.mean().item() == pytest.approx(1.25, abs=4 * 1.5 / (12 * 400) ** 0.5)


def test_a_tile_below_the_smallest_region_is_refused():
    recipe = replace(RECIPE, scale=(1.0, 2.0), scale_reference="crop")
    with pytest.raises(
        ImageReadError, match=r"223 x 224 pixels, a smaller area than the 224 x 224 .* use larger tiles"
    ):
        recipe.image_shares(223, 224)
    assert recipe.image_shares(224, 224) == (1.0, 1.0)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_tile_that_is_too_small_is_named_with_its_path(tmp_path, pipeline):
    path = tmp_path / "class" / "small.png"
    path.parent.mkdir()
    Image.new("RGB", (20, 30)).save(path)
    crops = DataAugmentationDINO((1, 3), (0.5, 1), 2, scale_reference="crop", pipeline=pipeline)
    dataset = ImageFolder(root=str(tmp_path), transform=crops)
    with pytest.raises(ImageReadError, match=r"sample 0 \(.*small\.png\): the image has 20 x 30") as caught:
        dataset[0]
    assert caught.value.path == str(path)
    assert caught.value.reason.startswith("the image has 20 x 30 pixels")
