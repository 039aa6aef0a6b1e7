"""Each colour operation against torchvision on PIL images, level by level."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as ops

from dinov2.data import photometric
from dinov2.data.crop_parameters import from_row, to_row
from dinov2.data.device_crops import OPERATIONS, change_all_colours, change_colours_in_groups
from tests.data.records import draw_records

# Operation, PIL's counterpart, arguments (within and beyond the ranges of the recipe).
OPERATION_CASES = {
    "brightness": (photometric.adjust_brightness, ops.adjust_brightness, (0.0, 0.61, 1.0, 1.37, 3.0)),
    "contrast": (photometric.adjust_contrast, ops.adjust_contrast, (0.0, 0.61, 1.0, 1.37, 3.0)),
    "saturation": (photometric.adjust_saturation, ops.adjust_saturation, (0.0, 0.83, 1.0, 1.19, 3.0)),
    "hue": (photometric.adjust_hue, ops.adjust_hue, (-0.5, -0.1, -0.003, 0.0, 0.0437, 0.1, 0.5)),
    "blur": (
        photometric.gaussian_blur,
        lambda image, sigma: ops.gaussian_blur(image, [9, 9], [sigma, sigma]),
        (0.1, 0.21, 0.22, 0.4, 0.61, 1.0, 2.0),
    ),
    "grayscale": (
        lambda x, _: photometric.grayscale(x),
        lambda image, _: ops.rgb_to_grayscale(image, 3),
        (None,),
    ),
    "solarize": (lambda x, _: photometric.solarize(x), lambda image, _: ops.solarize(image, 128), (None,)),
}
# Largest difference in levels, and share of the values that may differ; all others are equal.
DIFFER = {"hue": (6, 0.002), "blur": (1, 0.004)}


def levels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()


@pytest.fixture(scope="module")
def pictures(tiles):
    """Tissue, noise, and every shade of grey."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=2).repeat(8, axis=1)
    return [tiles[0], tiles[5], Image.fromarray(noise), Image.fromarray(ramp)]


@pytest.mark.parametrize("name", OPERATION_CASES)
def test_equals_pil(pictures, name):
    ours, pils, arguments = OPERATION_CASES[name]
    most, share = DIFFER.get(name, (0, 0.0))
    for argument in arguments:
        for picture in pictures:
            difference = ours(levels(picture), argument) - levels(pils(picture, argument))
            assert difference.abs().max() <= most, argument
            assert (difference != 0).float().mean() <= share, argument
            assert abs(difference.mean()) <= 0.005, argument


@pytest.mark.parametrize("name", OPERATION_CASES)
def test_leaves_whole_levels_and_its_input(pictures, name):
    operation, _, arguments = OPERATION_CASES[name]
    x = levels(pictures[2])
    before = x.clone()
    for argument in arguments:
        result = operation(x, argument)
        assert torch.equal(result, result.clamp(0, 255).round())
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue", "blur"])
def test_one_argument_per_crop_equals_single_crops(pictures, name):
    operation, _, arguments = OPERATION_CASES[name]
    crops = torch.cat([levels(pictures[2]), levels(pictures[0]), levels(pictures[1])])
    chosen = torch.tensor(arguments[1:4])
    together = operation(crops, chosen.view(-1, 1, 1, 1))
    alone = [operation(crop[None], number) for crop, number in zip(crops, chosen.tolist(), strict=True)]
    difference = (together - torch.cat(alone)).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_weights_of_the_blur_add_up():
    for sigma in (0.1, 0.5, 2.0):
        middle, *sides = photometric.blur_weights(sigma)
        assert middle + 2 * sum(sides) == pytest.approx(1, abs=1e-4)
    assert len(photometric.blur_weights(2.0)) == 5 and len(photometric.blur_weights(0.2)) == 1


def test_normalize_equals_torchvision(tiles):
    constants = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = photometric.normalize(levels(tiles[0]), *map(torch.tensor, constants))[0]
    torch.testing.assert_close(ours, ops.normalize(ops.to_tensor(tiles[0]), *constants), rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def batch(tiles):
    """Crops whose records hold every operation, in many orders."""
    records = draw_records(36)
    crops = torch.cat([levels(tiles[number % len(tiles)]) for number in range(len(records))]).byte()
    return crops, torch.tensor([to_row(record) for record in records])


def test_groups_equal_single_crops(batch):
    crops, rows = batch
    records = [from_row(row) for row in rows.tolist()]
    difference = (change_all_colours(crops, rows) - change_colours_in_groups(crops, rows, records)).abs()
    # The weights of a blur differ in their last bit, and later steps amplify the level that this may cost.
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_an_operation_runs_on_the_crops_that_need_it(batch):
    crops, rows = batch
    records = [from_row(row) for row in rows.tolist()]
    seen = dict.fromkeys(OPERATIONS, 0)

    def counted(name):
        def run(x, rows):
            seen[name] += len(x)
            return OPERATIONS[name](x, rows)

        return run

    change_colours_in_groups(crops, rows, records, {name: counted(name) for name in OPERATIONS})
    wanted = {f"jitter_{step}": sum(step in record.order for record in records) for step in range(4)}
    assert seen == {
        "stains": sum(bool(record.hed) for record in records),
        **wanted,
        "grayscale": sum(record.grayscale for record in records),
        "blur": sum(record.sigma > 0 for record in records),
        "solarize": sum(record.solarize for record in records),
    }
    assert all(0 < count < len(records) for count in seen.values())


@pytest.mark.parametrize("name", OPERATIONS)
def test_can_be_compiled_in_one_piece(batch, name):
    crops, rows = batch
    compiled = torch.compile(OPERATIONS[name], backend="eager", fullgraph=True, dynamic=True)
    chosen = [number for number, row in enumerate(rows.tolist()) if from_row(row).sigma and from_row(row).hed]
    x = crops[chosen].float()
    torch.testing.assert_close(compiled(x, rows[chosen]), OPERATIONS[name](x, rows[chosen]), rtol=0, atol=1)


@pytest.mark.gpu
def test_cuda_equals_cpu(batch):
    crops, rows = batch
    torch.backends.cuda.matmul.allow_tf32 = True  # as the trainer has it
    difference = (change_all_colours(crops, rows) - change_all_colours(crops.cuda(), rows).cpu()).abs()
    assert difference.max() <= 8 and difference.mean() < 0.01
    assert (difference > 0).float().mean() < 0.01
