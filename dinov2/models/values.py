"""Whether the numbers in a weight file can be those of a trained network."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dinov2.errors import WeightsError
from dinov2.models.digest import DIGEST_KEY, tensors_digest
from dinov2.models.report import first_names
from dinov2.models.stored import StoredTensor

# A flipped bit in an exponent makes numbers like 1e38. The largest weights of published ViTs are below 1e3.
LARGEST_PLAUSIBLE = 1e6


def check_values(
    source: str,
    state: Mapping[str, StoredTensor],
    tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
) -> None:
    """Read every tensor once and raise :class:`WeightsError` if its values cannot be right.

    Args:
        source: Name of the file for messages.
        state: What is going to be loaded.
        tensors: All tensors of the file.
        metadata: What the file says about itself, among it perhaps digests of all its tensors or of those in
            one of several files; see :class:`dinov2.models.weight_files.OpenedFile`.
    """
    broken, huge, matrices = [], [], {}
    for name, stored in state.items():
        if not stored.numel:
            continue
        largest = _largest(source, name, stored.read())
        if stored.ndim > 1 and name.endswith("weight"):
            matrices[name] = largest
        if not math.isfinite(largest):
            broken.append(name)
        elif largest > LARGEST_PLAUSIBLE:
            huge.append(f"{name} {largest:.2g}")
    if broken:
        raise WeightsError(
            f"The weights in {source} contain NaN or infinity in {len(broken)} tensors "
            f"({first_names(broken)}): the run that wrote them diverged or the file is damaged; use an "
            "earlier checkpoint."
        )
    if huge:
        raise WeightsError(
            f"The weights in {source} contain values that no trained network has ({first_names(huge)}): the "
            "file is damaged; download or copy it again."
        )
    if matrices and not any(matrices.values()):
        raise WeightsError(
            f"All weight matrices in {source} are zero ({first_names(list(matrices))}): the file was "
            "never filled, or not written to its end; download or copy it again."
        )
    _check_digest(source, tensors, metadata)


def _largest(source: str, name: str, values: Tensor) -> float:
    try:
        low, high = torch.aminmax(values.float() if values.dtype.itemsize == 1 else values)
    except NotImplementedError as error:
        raise WeightsError(
            f"The tensor {name} in {source} has numbers of a type that is not read ({values.dtype}): convert "
            "them to float32, float16 or bfloat16."
        ) from error
    return torch.maximum(-low, high).item()  # NaN comes through


def _check_digest(source: str, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> None:
    for key, expected in metadata.items():
        digest_key, _, file = key.partition(" ")
        if digest_key != DIGEST_KEY:
            continue
        names = sorted(name for name, stored in tensors.items() if file in ("", stored.file))
        found = tensors_digest((name, tensors[name].read()) for name in names)
        if found != expected:
            raise WeightsError(
                f"The tensors in {file or source} have the digest {found} instead of {expected}, which the "
                "file states: it is damaged; download or copy it again."
            )
