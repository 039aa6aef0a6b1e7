"""The second half of the ``device`` pipeline: colours and normalisation of a whole batch at once.

A batch of this pipeline holds its crops as 8-bit numbers and beside them, for each crop, a row of numbers
that says what is to happen to its colours. The rows stay on the CPU, where they decide which operation runs
on which crops, so the device is never waited for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dinov2.data import photometric
from dinov2.data.crop_parameters import Photometrics, from_row
from dinov2.data.stains import adjust_stains

GLOBAL_RECORDS, LOCAL_RECORDS = "collated_global_photometrics", "collated_local_photometrics"
NORMALISATION = "normalisation"

# Columns of a row (crop_parameters.to_row).
_HED, _FACTORS, _SIGMA = slice(1, 7), 11, 16


def finish_batch(images: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return a collated batch with normalised crops; one whose crops are finished is returned as it is.

    Args:
        images: what ``collate_data_and_cast`` returns.
        device: where the crops are wanted and the work is done.
        dtype: of the crops.
    """
    if GLOBAL_RECORDS not in images:
        return images
    finished = dict(images)
    mean, std = finished.pop(NORMALISATION).to(device)
    pairs = (("collated_global_crops", GLOBAL_RECORDS), ("collated_local_crops", LOCAL_RECORDS))
    for crops, records in pairs:
        pixels = finished[crops].to(device, non_blocking=True)
        coloured = change_all_colours(pixels, finished.pop(records))
        finished[crops] = photometric.normalize(coloured, mean, std).to(dtype)
    return finished


def finish_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Return one augmented image with normalised float crops, whichever pipeline made it."""
    if "global_photometrics" not in sample:
        return sample
    finished = dict(sample)
    mean, std = finished.pop(NORMALISATION)
    for kind in ("global", "local"):
        crops, rows = finished[f"{kind}_crops"], finished.pop(f"{kind}_photometrics")
        if crops:
            coloured = change_all_colours(torch.stack(crops), rows)
            finished[f"{kind}_crops"] = list(photometric.normalize(coloured, mean, std))
    finished["global_crops_teacher"] = list(finished["global_crops"])
    return finished


def change_all_colours(crops: Tensor, rows: Tensor) -> Tensor:
    """Apply a record to each of N crops.

    Args:
        crops: uint8 [N, 3, H, W].
        rows: [N, ROW_LENGTH] on the CPU.

    Returns:
        Whole grey levels, float32 [N, 3, H, W].
    """
    records = [from_row(row) for row in rows.tolist()]
    if crops.device.type == "cpu":
        # One crop at a time stays in the cache of a core, and needs no gathering.
        one_by_one = [
            photometric.change_colours(crop[None].contiguous().float(), record)
            for crop, record in zip(crops, records, strict=True)
        ]
        return torch.cat(one_by_one) if one_by_one else crops.float()
    return change_colours_in_groups(crops, rows, records)


def change_colours_in_groups(
    crops: Tensor, rows: Tensor, records: Sequence[Photometrics], operations: "Operations | None" = None
) -> Tensor:
    """The same with every operation run once on all crops that need it at that point.

    Args:
        crops, rows: as for :func:`change_all_colours`.
        records: what the rows say.
        operations: the operations to run, e.g. compiled ones.
    """
    operations = operations or OPERATIONS
    x = crops.contiguous().float()
    steps = [(operation, chosen) for operation, chosen in _plan(operations, records) if chosen]
    if not steps:
        return x
    # One transfer for all indices, one for all numbers.
    indices = torch.tensor([index for _, chosen in steps for index in chosen])
    on_device = indices.to(x.device, non_blocking=True).split([len(chosen) for _, chosen in steps])
    numbers = rows.to(x.device, non_blocking=True)
    for (operation, _), index in zip(steps, on_device, strict=True):
        changed = operation(x.index_select(0, index), numbers.index_select(0, index))
        x.index_copy_(0, index, changed)
    return x


Operation = Callable[[Tensor, Tensor], Tensor]  # (crops [n, 3, H, W], their rows [n, ROW_LENGTH]) -> crops
Operations = dict[str, Operation]


def _of_number(function: Callable[[Tensor, Tensor], Tensor], column: int) -> Operation:
    return lambda x, rows: function(x, rows[:, column].view(-1, 1, 1, 1))


def _stains(x: Tensor, rows: Tensor) -> Tensor:
    factors, shifts = rows[:, _HED].view(-1, 2, 3).unbind(dim=1)
    return adjust_stains(x, factors, shifts)


OPERATIONS: Operations = {
    "stains": _stains,
    **{
        f"jitter_{step}": _of_number(function, _FACTORS + step)
        for step, function in enumerate(photometric.JITTERS)
    },
    "grayscale": lambda x, rows: photometric.grayscale(x),
    "blur": _of_number(photometric.gaussian_blur, _SIGMA),
    "solarize": lambda x, rows: photometric.solarize(x),
}


def _plan(operations: Operations, records: Sequence[Photometrics]) -> list[tuple[Operation, list[int]]]:
    """List the operations in the order in which they run, each with the crops that it concerns."""

    def where(condition: Callable[[Photometrics], Any]) -> list[int]:
        return [index for index, record in enumerate(records) if condition(record)]

    plan = [(operations["stains"], where(lambda record: record.hed))]
    for place in range(len(photometric.JITTERS)):
        for step in range(len(photometric.JITTERS)):
            chosen = where(lambda record, p=place, s=step: record.order[p : p + 1] == (s,))
            plan.append((operations[f"jitter_{step}"], chosen))
    return [
        *plan,
        (operations["grayscale"], where(lambda record: record.grayscale)),
        (operations["blur"], where(lambda record: record.sigma)),
        (operations["solarize"], where(lambda record: record.solarize)),
    ]
