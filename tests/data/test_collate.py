"""Batches: recorded layout and masks, small batches, no local crops."""

import random
from functools import partial

import pytest
import torch

from dinov2.data import MaskingGenerator, collate_data_and_cast
from tests.conftest import load_golden_json, load_golden_tensors

CASES = load_golden_json("data.json")["collate"]


def samples_of(batch, global_size, local_size, n_local):
    def crops(base, sample, size, count):
        return [torch.full((3, size, size), float(base + 10 * sample + crop)) for crop in range(count)]

    return [
        (
            {
                "global_crops": crops(100, sample, global_size, 2),
                "global_crops_teacher": crops(100, sample, global_size, 2),
                "local_crops": crops(200, sample, local_size, n_local),
                "offsets": (),
            },
            (),
        )
        for sample in range(batch)
    ]


def collate(batch=4, n_local=4, probability=0.5, ratio=(0.1, 0.5), grid=4, dtype=torch.float32):
    generator = MaskingGenerator((grid, grid), max_num_patches=0.5 * grid * grid)
    samples = samples_of(batch, 4 * grid, 2 * grid, n_local)
    return collate_data_and_cast(
        samples, ratio, probability, dtype, n_tokens=grid * grid, mask_generator=generator
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_batch(case):
    generator = MaskingGenerator(
        (case["global_size"] // case["patch"],) * 2, max_num_patches=case["max_num_patches"]
    )
    random.seed(case["seed"])
    batch = collate_data_and_cast(
        samples_of(case["batch"], case["global_size"], case["local_size"], case["n_local"]),
        tuple(case["mask_ratio"]),
        case["mask_probability"],
        getattr(torch, case["dtype"]),
        n_tokens=case["n_tokens"],
        mask_generator=generator,
    )
    assert batch["upperbound"] == case["upperbound"]
    assert set(batch) == {*case["shapes"], "upperbound"}
    for key, shape in case["shapes"].items():
        assert str(batch[key].dtype) == case["dtypes"][key], key
        assert list(batch[key].shape) == shape, key
    assert batch["collated_global_crops"][:, 0, 0, 0].tolist() == case["global_order"]
    assert batch["collated_local_crops"][:, 0, 0, 0].tolist() == case["local_order"]
    assert batch["collated_masks"].any(dim=1).sum() == case["n_samples_masked"]
    recorded = load_golden_tensors("data.safetensors")
    for key in ("collated_masks", "mask_indices_list", "masks_weight", "n_masked_patches"):
        torch.testing.assert_close(batch[key], recorded[f"{case['name']}.{key}"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("n_tokens", "batch_size", "bound"), [(196, 64, 3771), (256, 64, 4941), (256, 32, 2496)]
)
def test_upperbound_of_the_published_configurations(n_tokens, batch_size, bound):
    side = int(n_tokens**0.5)
    batch = collate_data_and_cast(
        samples_of(batch_size, 2, 2, 1),
        (0.1, 0.5),
        0.5,
        torch.float16,
        n_tokens=n_tokens,
        mask_generator=MaskingGenerator(side, max_num_patches=n_tokens / 2),
    )
    assert batch["upperbound"] == bound
    assert batch["n_masked_patches"].item() <= bound


def test_mask_bookkeeping_agrees():
    random.seed(3)
    batch = collate(batch=8)
    masks = batch["collated_masks"]
    rows = batch["mask_indices_list"] // masks.shape[1]
    columns = batch["mask_indices_list"] % masks.shape[1]
    assert masks[rows, columns].all()
    assert batch["n_masked_patches"].tolist() == [int(masks.sum())]
    torch.testing.assert_close(batch["masks_weight"].sum(), masks.any(dim=1).sum().float())
    assert batch["upperbound"] >= int(masks.sum())


def test_no_local_crops():
    batch = collate(n_local=0)
    assert batch["collated_local_crops"].shape[0] == 0
    assert batch["collated_local_crops"].dtype == torch.float32
    assert batch["collated_global_crops"].shape[0] == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_the_callers(dtype):
    batch = collate(dtype=dtype)
    assert batch["collated_global_crops"].dtype == batch["collated_local_crops"].dtype == dtype


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("setting", [(1, 0.1, 4), (1, 0.4, 2), (2, 0.5, 2), (1, 1.0, 1)])
def test_a_batch_with_masking_always_masks_something(seed, setting):
    random.seed(seed)
    batch, probability, grid = setting
    result = collate(batch=batch, probability=probability, grid=grid)
    assert 0 < result["n_masked_patches"].item() <= result["upperbound"]
    assert result["masks_weight"].isfinite().all()


def test_no_masking_when_the_probability_is_zero():
    result = collate(probability=0.0)
    assert not result["collated_masks"].any()
    assert result["upperbound"] == result["n_masked_patches"].item() == 0
    without_generator = partial(collate_data_and_cast, dtype=torch.float32, n_tokens=16)
    assert not without_generator(samples_of(2, 8, 4, 1), (0.1, 0.5), 0.0)["collated_masks"].any()


def test_missing_generator_is_named():
    with pytest.raises(TypeError, match="mask_generator"):
        collate_data_and_cast(samples_of(2, 8, 4, 1), (0.1, 0.5), 0.5, torch.float32, n_tokens=16)
