"""What became of the weights a run starts from, kept so that a check can compare it with the networks."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dinov2.fsdp.sharding import whole_tensor
from dinov2.models.report import LoadReport

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Part:
    """What one submodule took from a file.

    Attributes:
        report: What became of every tensor of the file and of the submodule.
        fingerprint: :func:`fingerprint` of the submodule right after loading.
    """

    report: LoadReport
    fingerprint: str


@dataclass(frozen=True)
class InitialWeights:
    """The loaded submodules by name, e.g. ``student.backbone``; a name that is absent has random weights.

    Attributes:
        parts: What each of them took.
        centers: What became of the file of the losses' centres, if they were restored.
        fresh: Parts of the student that start with random weights, each with the names of its tensors.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    centers: LoadReport | None = None
    fresh: dict[str, list[str]] = field(default_factory=dict)

    @property
    def reports(self) -> dict[str, LoadReport]:
        """The reports of all files that something was taken from."""
        reports = {name: part.report for name, part in self.parts.items()}
        return {**reports, "centers": self.centers} if self.centers else reports


def fingerprint(module: nn.Module) -> str:
    """Return a digest of the names, shapes and bits of a module's state, the same on every device.

    It does not depend on whether the module is sharded; if it is, every process must call.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {_checksum(tensor)}\n".encode())
    return digest.hexdigest()


def _checksum(tensor: Tensor) -> int:
    """Sum the elements' bits, each times an odd number of its own, modulo 2^64: exact in any order.

    Hashing the bytes themselves would move a model of 5 GB from its GPU and take many seconds.
    """
    bits = whole_tensor(tensor.detach()).contiguous().view(_INTEGERS[tensor.element_size()]).flatten().long()
    return int((bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum())
