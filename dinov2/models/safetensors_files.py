"""Files in the safetensors format: a table of contents first, each tensor when it is needed."""

from pathlib import Path

import torch
from torch import Tensor

from dinov2.errors import WeightsError
from dinov2.models.integrity import damaged
from dinov2.models.stored import StoredTensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


def list_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a file, none of them read yet, and the words its writer left with them.

    Raises:
        WeightsError: The file is damaged or has tensors of a type that is not read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            table = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise damaged(path, error) from error
    unknown = {name: dtype for name, (_, dtype) in table.items() if dtype not in DTYPES}
    if unknown:
        name, dtype = next(iter(unknown.items()))
        raise WeightsError(
            f'The weight file "{path}" has {len(unknown)} tensors of a type that is not read (the first is '
            f"{name}, {dtype}): convert them to float32, float16 or bfloat16."
        )
    tensors = {name: _stored(path, name, shape, DTYPES[dtype]) for name, (shape, dtype) in table.items()}
    return tensors, metadata


def _stored(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> StoredTensor:
    def read() -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            # The copy lets go of the file's mapping, which would otherwise stay in memory as a whole.
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name).clone()
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise damaged(path, error) from error

    return StoredTensor(shape, dtype, read, (name,), file=str(path))
