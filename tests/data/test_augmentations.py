"""Multi-crop augmentation against torchvision's own operations, drawn by hand in the same order."""

import pickle

import pytest
import torch
from torchvision import transforms
from torchvision.transforms import functional as ops

from dinov2.data import DataAugmentationDINO
from dinov2.errors import ConfigError

JITTER = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
CHANGES = (ops.adjust_brightness, ops.adjust_contrast, ops.adjust_saturation, ops.adjust_hue)
SCALES = ((0.32, 1.0), (0.05, 0.32))


def chance(probability):
    return torch.rand(1).item() < probability


def augment_by_hand(image, size, scale, blur, solarize=None, flips=(0.5, None)):
    """One crop as the specification's table has it; ``blur`` is the effective probability."""
    box = transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
    image = ops.resized_crop(image, *box, [size, size], ops.InterpolationMode.BICUBIC)
    for flip, probability in zip((ops.hflip, ops.vflip), flips, strict=True):
        if probability is not None and chance(probability):
            image = flip(image)
    if torch.rand(1) <= 0.8:
        order, *amounts = transforms.ColorJitter.get_params(*JITTER.values())
        for step in order:
            image = CHANGES[step](image, amounts[step])
    if chance(0.2):
        image = ops.rgb_to_grayscale(image, num_output_channels=3)
    if torch.rand(1) <= blur:
        image = ops.gaussian_blur(image, [9, 9], [torch.empty(1).uniform_(0.1, 2.0).item()] * 2)
    if solarize is not None and chance(solarize):
        image = ops.solarize(image, 128)
    return ops.normalize(ops.to_tensor(image), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("flips", [(0.5, None), (0.5, 0.5), (None, 0.5)])
@pytest.mark.parametrize("mode", ["effective", "nominal"])
def test_equals_torchvision_under_the_same_seed(tiles, mode, flips):
    augmentation = DataAugmentationDINO(
        *SCALES,
        3,
        global_crops_size=56,
        local_crops_size=28,
        horizontal_flip_prob=flips[0] or 0.0,
        vertical_flip_prob=flips[1] or 0.0,
        gaussian_blur=mode,
    )
    blur = {"effective": (0.0, 0.9, 0.5), "nominal": (1.0, 0.1, 0.5)}[mode]
    for seed, tile in enumerate(tiles):
        torch.manual_seed(seed)
        crops = augmentation(tile)
        torch.manual_seed(seed)
        expected = [
            augment_by_hand(tile, 56, SCALES[0], blur[0], flips=flips),
            augment_by_hand(tile, 56, SCALES[0], blur[1], solarize=0.2, flips=flips),
            *(augment_by_hand(tile, 28, SCALES[1], blur[2], flips=flips) for _ in range(3)),
        ]
        for crop, wanted in zip(crops["global_crops"] + crops["local_crops"], expected, strict=True):
            torch.testing.assert_close(crop, wanted, rtol=0, atol=0)


def test_result_layout(tiles):
    crops = DataAugmentationDINO(*SCALES, 2)(tiles[0])
    assert set(crops) == {"global_crops", "global_crops_teacher", "local_crops", "offsets"}
    assert [crop.shape for crop in crops["global_crops"]] == [(3, 224, 224)] * 2
    assert [crop.shape for crop in crops["local_crops"]] == [(3, 96, 96)] * 2
    assert crops["offsets"] == ()
    for student, teacher in zip(crops["global_crops"], crops["global_crops_teacher"], strict=True):
        assert student is teacher


def test_no_local_crops(tiles):
    assert DataAugmentationDINO(*SCALES, 0, 28, 28)(tiles[0])["local_crops"] == []


@pytest.mark.parametrize(("horizontal", "vertical"), [(0.5, 0.0), (0.5, 0.5), (0.0, 1.0), (1.0, 0.2)])
def test_flip_frequencies(horizontal, vertical):
    """A picture that is darker at the left and brighter at the top tells how each crop was turned."""
    ramp = torch.linspace(0.2, 0.6, 32)
    image = ops.to_pil_image((ramp[None, :] - 0.3 * ramp[:, None] + 0.2).expand(3, 32, 32))
    augmentation = DataAugmentationDINO(
        (1.0, 1.0), (1.0, 1.0), 300, 16, 16, horizontal_flip_prob=horizontal, vertical_flip_prob=vertical
    )
    torch.manual_seed(0)
    crops = torch.stack(augmentation(image)["local_crops"]).mean(dim=1)
    turned = (crops[:, :, :8].mean(dim=(1, 2)) > crops[:, :, 8:].mean(dim=(1, 2))).float().mean()
    upside_down = (crops[:, :8].mean(dim=(1, 2)) < crops[:, 8:].mean(dim=(1, 2))).float().mean()
    assert turned == pytest.approx(horizontal, abs=0.12)
    assert upside_down == pytest.approx(vertical, abs=0.12)


@pytest.mark.parametrize(("mode", "expected"), [("effective", (0.0, 0.9, 0.5)), ("nominal", (1.0, 0.1, 0.5))])
def test_blur_frequencies(tiles, mode, expected, monkeypatch):
    blurred_sizes = []

    def count(blur, image):
        blurred_sizes.append(image.size[0])
        return image

    monkeypatch.setattr(transforms.GaussianBlur, "forward", count)
    augmentation = DataAugmentationDINO(*SCALES, 1, 16, 8, gaussian_blur=mode)
    torch.manual_seed(0)
    draws = 150
    for _ in range(draws):
        augmentation(tiles[0])
    assert blurred_sizes.count(16) / draws == pytest.approx(expected[0] + expected[1], abs=0.1)
    assert blurred_sizes.count(8) / draws == pytest.approx(expected[2], abs=0.12)


def test_pickles(tiles):
    augmentation = DataAugmentationDINO(*SCALES, 1, 28, 28)
    copy = pickle.loads(pickle.dumps(augmentation))
    torch.manual_seed(4)
    expected = augmentation(tiles[0])["local_crops"][0]
    torch.manual_seed(4)
    assert torch.equal(copy(tiles[0])["local_crops"][0], expected)


@pytest.mark.parametrize(
    ("arguments", "word"), [({"gaussian_blur": "normal"}, "effective, nominal"), ({}, "is -1; use 0")]
)
def test_refused(arguments, word):
    with pytest.raises(ConfigError, match=word):
        DataAugmentationDINO(*SCALES, 3 if arguments else -1, **arguments)
