"""Evaluation transforms against the recorded ones; blur probabilities."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from dinov2.data import transforms
from tests.conftest import load_golden_json, load_golden_tensors

CASES = load_golden_json("data.json")["eval_transform"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_evaluation_transform(case):
    tensors = load_golden_tensors("data.safetensors")
    image = Image.fromarray(tensors[f"{case['name']}.image"].numpy())
    transform = transforms.make_classification_eval_transform(
        resize_size=case["resize_size"], crop_size=case["crop_size"]
    )
    torch.testing.assert_close(
        transform(image), tensors[f"{case['name']}.out"], rtol=case["rtol"], atol=case["atol"]
    )


def test_evaluation_transform_defaults(tiles):
    output = transforms.make_classification_eval_transform()(tiles[0])
    assert output.shape == (3, 224, 224)
    resized = functional.center_crop(
        functional.resize(tiles[0], 256, functional.InterpolationMode.BICUBIC), 224
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_train_transform(tiles, flip):
    torch.manual_seed(0)
    transform = transforms.make_classification_train_transform(crop_size=64, hflip_prob=flip)
    assert transform(tiles[0]).shape == (3, 64, 64)
    assert len(transform.transforms) == (4 if flip else 3)


def test_maybe_to_tensor(tiles):
    tensor = torch.rand(3, 4, 4)
    assert transforms.MaybeToTensor()(tensor) is tensor
    assert transforms.MaybeToTensor()(tiles[0]).shape == (3, 96, 96)


@pytest.mark.parametrize(
    ("p", "nominal", "expected"),
    [(1.0, False, 0.0), (0.1, False, 0.9), (0.5, False, 0.5), (1.0, True, 1.0), (0.1, True, 0.1)],
)
def test_blur_probability(tiles, p, nominal, expected):
    torch.manual_seed(1)
    blur = transforms.GaussianBlur(p=p, radius_min=1.0, radius_max=2.0, nominal=nominal)
    image = tiles[0].resize((24, 24))
    blurred = np.mean([blur(image) is not image for _ in range(400)])
    assert blurred == pytest.approx(expected, abs=0.06)
