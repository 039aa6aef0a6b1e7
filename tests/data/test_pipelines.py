"""The fast pipelines against the reference: the same crops under the same seed, the same distributions."""

from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as ops

from dinov2.data import DataAugmentationDINO, MaskingGenerator, collate_data_and_cast
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.data.datasets.tensor_decoder import to_tensor
from dinov2.data.device_crops import finish_batch, finish_sample
from dinov2.errors import ConfigError, ImageReadError

SCALES = ((0.32, 1.0), (0.05, 0.32))
PIPELINES = ("reference", "fast", "device")
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
GEOMETRY_ONLY = {"color_jitter_prob": 0.0, "grayscale_prob": 0.0, "solarize_prob": 0.0}

OPTIONS = {
    "default": {},
    "nominal blur": {"gaussian_blur": "nominal"},
    "tissue": {"vertical_flip_prob": 0.5, "quarter_turn_prob": 0.75, "solarize_prob": 0.0},
    "stains": {"hed_jitter": 0.1, "hed_jitter_prob": 0.7, "color_jitter_prob": 0.0},
    "strong": {"color_jitter": (0.8, 0.8, 0.8, 0.5), "color_jitter_prob": 1.0, "grayscale_prob": 0.0},
    "no hue": {"color_jitter": (0.4, 0.0, 0.2, 0.0), "aspect_ratio": (0.5, 2.0)},
    "context": {"scale_reference": "crop"},
}


def make(pipeline, *, local=2, sizes=(56, 28), scales=SCALES, **options):
    return DataAugmentationDINO(*scales, local, *sizes, pipeline=pipeline, **options)


def crops_of(augmentation, image, seed):
    torch.manual_seed(seed)
    sample = finish_sample(augmentation(image))
    return sample["global_crops"] + sample["local_crops"]


@pytest.mark.parametrize("name", OPTIONS)
def test_same_seed_same_crops(tiles, name):
    """One level in a resized pixel is the only difference to begin with; later steps amplify it."""
    reference, fast, device = (make(pipeline, **OPTIONS[name]) for pipeline in PIPELINES)
    differences = []
    for seed, tile in enumerate(tiles):
        wanted, got, finished = (crops_of(made, tile, seed) for made in (reference, fast, device))
        for one, other, third in zip(wanted, got, finished, strict=True):
            differences.append((other - one) * STD)
            torch.testing.assert_close(third, other, rtol=0, atol=0)
    levels = torch.cat([difference.flatten() for difference in differences])
    assert levels.abs().max() <= 9
    assert (levels.abs() > 2.5).float().mean() < 4e-3
    assert abs(levels.mean()) < 5e-3


@pytest.mark.parametrize("options", [GEOMETRY_ONLY, {**GEOMETRY_ONLY, "quarter_turn_prob": 0.75}])
def test_without_colours_crops_differ_by_one_level_at_most(tiles, options):
    reference, fast = (make(pipeline, **options) for pipeline in PIPELINES[:2])
    for seed, tile in enumerate(tiles):
        for one, other in zip(crops_of(reference, tile, seed), crops_of(fast, tile, seed), strict=True):
            # The blur rounds once more.
            assert ((other - one) * STD).abs().max() <= 2.01


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_steps_of_probability_0_draw_nothing(tiles, pipeline):
    """Their strengths do not matter then, nor do they shift what is drawn for other steps."""
    plain = make(pipeline)
    other = make(pipeline, hed_jitter=0.3, hed_jitter_prob=0.0, quarter_turn_prob=0.0)
    for one, same in zip(crops_of(plain, tiles[0], 3), crops_of(other, tiles[0], 3), strict=True):
        assert torch.equal(one, same)


def test_to_tensor_gives_the_pixels_as_they_lie_in_memory_of_its_own(tiles, recwarn):
    image = tiles[0].copy()
    pixels = to_tensor(image)
    assert torch.equal(pixels[0], ops.pil_to_tensor(image))
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    pixels.fill_(7)
    assert np.array_equal(np.asarray(image), np.asarray(tiles[0]))
    assert not recwarn.list  # torch warns where it gets memory that must not be written


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_datasets_decode_as_the_pipeline_wants_it(tiles, pipeline):
    buffer = BytesIO()
    tiles[0].save(buffer, "JPEG")

    class OneTile(ExtendedVisionDataset):
        def get_image_data(self, index):
            return buffer.getvalue()

        def get_target(self, index):
            return ()

    augment = make(pipeline)
    torch.manual_seed(0)
    sample, _ = OneTile("", transform=augment)[0]
    torch.manual_seed(0)
    with Image.open(buffer) as image:
        expected = augment(image.convert("RGB"))
    for one, same in zip(sample["global_crops"], expected["global_crops"], strict=True):
        assert torch.equal(one, same)
    seen = OneTile("", transform=augment).image_decoder(buffer.getvalue()).decode()
    assert isinstance(seen, Image.Image if pipeline == "reference" else torch.Tensor)


def test_layout_of_the_device_pipeline(tiles):
    sample = make("device", local=3)(tiles[0])
    assert [crop.dtype for crop in sample["global_crops"] + sample["local_crops"]] == [torch.uint8] * 5
    assert [crop.shape for crop in sample["local_crops"]] == [(3, 28, 28)] * 3
    assert len(sample["global_photometrics"]) == 2 and len(sample["local_photometrics"]) == 3
    finished = finish_sample(sample)
    assert set(finished) == {"global_crops", "global_crops_teacher", "local_crops", "offsets"}
    assert finished["global_crops"][0].dtype == torch.float32
    assert finish_sample(finished) is finished


@pytest.mark.parametrize("local", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_of_fast_and_device_are_equal(tiles, local, dtype):
    collate = partial(
        collate_data_and_cast,
        mask_ratio_tuple=(0.1, 0.5),
        mask_probability=0.0,
        dtype=dtype,
        n_tokens=16,
        mask_generator=MaskingGenerator((4, 4)),
    )
    batches = []
    for pipeline in ("fast", "device"):
        augmentation = make(pipeline, local=local)
        samples = []
        for seed, tile in enumerate(tiles[:3]):
            torch.manual_seed(seed)
            samples.append((augmentation(tile), ()))
        batches.append(collate(samples))
    fast, device = batches
    assert finish_batch(fast, torch.device("cpu"), dtype) is fast
    assert device["collated_global_crops"].dtype == torch.uint8
    finished = finish_batch(device, torch.device("cpu"), dtype)
    assert set(finished) == set(fast)
    for name in ("collated_global_crops", "collated_local_crops"):
        assert finished[name].dtype == fast[name].dtype == dtype
        torch.testing.assert_close(finished[name], fast[name], rtol=0, atol=0)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_quarter_turns(pipeline):
    """A picture that is bright at the top tells where the top has gone."""
    ramp = torch.linspace(1, 0, 32)[:, None].expand(3, 32, 32)
    augmentation = make(
        pipeline,
        local=240,
        scales=((1.0, 1.0), (1.0, 1.0)),
        sizes=(8, 8),
        horizontal_flip_prob=0.0,
        quarter_turn_prob=0.75,
        aspect_ratio=(1.0, 1.0),
        **GEOMETRY_ONLY,
    )
    crops = torch.stack(crops_of(augmentation, ops.to_pil_image(ramp), 0)).mean(dim=1)
    edges = [crops[:, 0], crops[:, :, 0], crops[:, -1], crops[:, :, -1]]  # top, left, bottom, right
    sides = torch.stack([edge.mean(dim=1) for edge in edges]).argmax(dim=0)
    shares = torch.bincount(sides, minlength=4) / len(crops)
    assert shares.min() > 0.15 and shares.max() < 0.35


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_small_tiles_are_refused_by_scale_limited_crops(tiles, pipeline):
    augmentation = make(pipeline, scales=((4.0, 5.0), (1.0, 2.0)), scale_reference="crop")
    with pytest.raises(ImageReadError, match="96 x 96 pixels"):
        augmentation(tiles[0])


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ({"pipeline": "refrence"}, r"use one of reference, fast, device \(did you mean \"reference\"\?\)"),
        ({"scale_reference": "tile"}, "scale_reference is 'tile'; use one of image, crop"),
    ],
)
def test_unknown_words_are_refused(option, word):
    with pytest.raises(ConfigError, match=word):
        DataAugmentationDINO(*SCALES, 2, **option)
