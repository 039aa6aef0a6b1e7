"""From augmented samples to one training batch.

This is where the order of crops is decided: crop-major. Rows 0..B-1 of the global crops are the first view
of every sample and rows B..2B-1 the second; local crops likewise, so row ``crop * B + sample``.

Letters: B samples per rank, L local crops, N patches of a global crop, M masked patches in the batch.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def collate_data_and_cast(
    samples_list: Sequence[tuple[dict[str, Any], Any]],
    mask_ratio_tuple: Sequence[float],
    mask_probability: float,
    dtype: torch.dtype,
    n_tokens: int | None = None,
    mask_generator: Callable[[int], Any] | None = None,
) -> dict[str, Any]:
    """Stack the crops of a batch and draw the masks of its global crops (iBOT, arXiv:2111.07832).

    ``int(2B * mask_probability)`` of the 2B global crops get a mask, but at least one when the probability
    is not zero. Their ratios are spread evenly over ``mask_ratio_tuple``, one draw from each of as many
    equal intervals. The masks are then shuffled over all crops, so the two views of an image are masked
    independently.

    Args:
        samples_list: B pairs ``(crops, target)`` from :class:`~dinov2.data.DataAugmentationDINO`; targets
            are dropped.
        mask_ratio_tuple: smallest and largest share of patches to mask in a masked crop, 0..1.
        mask_probability: share of global crops that get a mask, 0..1.
        dtype: of the crops.
        n_tokens: N, patches of a global crop.
        mask_generator: called with a number of patches, returns a boolean mask of N cells.

    Note:
        Crops of the ``device`` pipeline stay uint8, and what is to happen to their colours comes with them:
        ``collated_global_photometrics`` [2B, P], ``collated_local_photometrics`` [L*B, P] and
        ``normalisation`` [2, 3]; :func:`dinov2.data.device_crops.finish_batch` turns them into ``dtype``.

    Returns:
        ``collated_global_crops`` [2B, 3, H, W], ``collated_local_crops`` [L*B, 3, h, w] (no rows without
        local crops), ``collated_masks`` [2B, N] bool, ``mask_indices_list`` [M] int64 positions in the
        flattened masks, ``masks_weight`` [M] float32 = 1 / (masked patches of the same crop),
        ``upperbound`` an int >= M that hardly changes between batches, ``n_masked_patches`` [1] int64 = M.
    """
    crops = [sample[0] for sample in samples_list]
    global_crops = _stack_crop_major([sample["global_crops"] for sample in crops])
    local_crops = _stack_crop_major([sample["local_crops"] for sample in crops])
    if local_crops is None:
        local_crops = global_crops.new_empty((0, *global_crops.shape[1:]))
    masks, upperbound = _draw_masks(
        len(global_crops), mask_ratio_tuple, mask_probability, n_tokens, mask_generator
    )
    mask_indices = masks.flatten().nonzero().flatten()
    masked_per_crop = masks.sum(dim=1, keepdim=True).clamp(min=1)
    unfinished = _collate_unfinished(crops)
    if not unfinished:
        global_crops, local_crops = global_crops.to(dtype), local_crops.to(dtype)
    return {
        "collated_global_crops": global_crops,
        "collated_local_crops": local_crops,
        **unfinished,
        "collated_masks": masks,
        "mask_indices_list": mask_indices,
        "masks_weight": (1.0 / masked_per_crop).expand_as(masks)[masks],
        "upperbound": max(upperbound, len(mask_indices)),
        "n_masked_patches": torch.full((1,), len(mask_indices), dtype=torch.long),
    }


def _stack_crop_major(crops_by_sample: list[list[Tensor]]) -> Tensor | None:
    """Stack crop 0 of every sample, then crop 1 of every sample, and so on; None without crops."""
    in_order = [crop for same_crop in zip(*crops_by_sample, strict=True) for crop in same_crop]
    if not in_order or in_order[0].is_contiguous():
        return torch.stack(in_order) if in_order else None
    # 8-bit crops lie channels last; stacking them as they lie is a plain copy.
    return torch.stack([crop.permute(1, 2, 0) for crop in in_order]).permute(0, 3, 1, 2)


def _collate_unfinished(crops: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return what the ``device`` pipeline has still to do, rows in the order of the crops; {} for others."""
    if "global_photometrics" not in crops[0]:
        return {}
    rows = {
        f"collated_{kind}_photometrics": torch.stack(
            [sample[f"{kind}_photometrics"] for sample in crops], dim=1
        ).flatten(0, 1)
        for kind in ("global", "local")
    }
    return {**rows, "normalisation": crops[0]["normalisation"]}


def _draw_masks(
    n_crops: int,
    ratio_range: Sequence[float],
    probability: float,
    n_tokens: int | None,
    mask_generator: Callable[[int], Any] | None,
) -> tuple[Tensor, int]:
    """Return boolean masks [n_crops, N] and an upper bound of how many patches they can mask together."""
    if n_tokens is None or (mask_generator is None and probability > 0):
        raise TypeError("collate_data_and_cast needs n_tokens, and a mask_generator where crops are masked")
    masks = torch.zeros(n_crops, n_tokens, dtype=torch.bool)
    n_masked = int(n_crops * probability)
    if n_masked == 0 and probability > 0:
        # A small batch rounds to no masked crop at all; the iBOT term would then have nothing to average.
        n_masked = 1
    # float32 like the recorded batches: the bound is sensitive to the last bit of an edge.
    edges = torch.linspace(*ratio_range, n_masked + 1)
    upperbound = 0
    for row, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        requested = int(n_tokens * random.uniform(low, high))
        masks[row] = torch.as_tensor(mask_generator(requested)).reshape(-1)
        upperbound += int(n_tokens * high)
    order = list(range(n_crops))
    random.shuffle(order)
    masks = masks[order]
    if n_masked and not masks.any():
        # On grids of a few patches every request can round to zero.
        masks[random.randrange(n_crops), random.randrange(n_tokens)] = True
    return masks, upperbound
