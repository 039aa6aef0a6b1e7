"""Which number format each network computes in, and in which its gradients are averaged.

Weights, gradients, optimizer state and losses are float32. A network configured for fp16 or bf16
(``compute_precision.<student|teacher>.<part>.mixed_precision.param_dtype``) runs its forward pass under
autocast in that format; where it is sharded, its weights are sent in it. ``reduce_dtype`` is the format in
which gradients of sharded networks are sent and averaged.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig

from dinov2.models.checkpoint_names import HEADS, NETWORKS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PARTS = ("backbone", *HEADS)


def cpu_has_bf16() -> bool:
    """Tell whether this processor multiplies bfloat16 matrices in hardware (Linux only; else False)."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    words = set(cpuinfo.read_text().split())
    return bool(words & {"amx_bf16", "avx512_bf16", "bf16"})


def effective_dtype(configured: str, device: torch.device) -> torch.dtype:
    """Return the format in which a network configured as ``configured`` (a DTYPES key) runs on ``device``.

    fp16 matrix products are not usable on a CPU: there bf16 stands in where the processor has it, else fp32.
    """
    if device.type == "cpu" and configured == "fp16":
        return torch.bfloat16 if cpu_has_bf16() else torch.float32
    return DTYPES[configured]


def effective_reduce_dtype(configured: str, compute_dtype: torch.dtype) -> torch.dtype:
    """Return the format in which the gradients of a sharded network that computes in one are averaged.

    fp16, which DINOv2's configs state, holds only gradients that are scaled, and they are scaled only where
    a network computes in fp16. With another format it therefore stands for that format.
    """
    return compute_dtype if configured == "fp16" else DTYPES[configured]


class Precision:
    """The formats of all six networks, and the autocast contexts that apply them.

    Args:
        compute_precision: the config section of that name.
        device: where the networks run.
    """

    def __init__(self, compute_precision: DictConfig, device: torch.device) -> None:
        self.device = device
        self.configured = {
            (network, part): compute_precision[network][part].mixed_precision.param_dtype
            for network in NETWORKS
            for part in PARTS
        }
        self.dtypes = {key: effective_dtype(name, device) for key, name in self.configured.items()}
        self.reduce_dtypes = {
            (network, part): effective_reduce_dtype(
                compute_precision[network][part].mixed_precision.reduce_dtype, dtype
            )
            for (network, part), dtype in self.dtypes.items()
        }

    def autocast(self, network: str, part: str) -> torch.autocast:
        """Return the context in which to run e.g. ``("student", "backbone")``."""
        dtype = self.dtypes[network, part]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    @property
    def input_dtype(self) -> torch.dtype:
        """The format of the crops: the one both backbones share, to which autocast would round, else fp32."""
        student, teacher = self.dtypes["student", "backbone"], self.dtypes["teacher", "backbone"]
        return student if student == teacher else torch.float32

    @property
    def needs_grad_scaler(self) -> bool:
        """True if a student network runs in fp16, whose small gradients would vanish unscaled."""
        return any(self.dtypes["student", part] == torch.float16 for part in PARTS)

    def describe(self) -> str:
        """Return one line for the log: the format in use, and what it stands in for."""
        configured = " and ".join(sorted(set(self.configured.values())))
        used = " and ".join(sorted({str(dtype).removeprefix("torch.") for dtype in self.dtypes.values()}))
        line = f"compute precision on {self.device.type}: {used}"
        if any(DTYPES[name] != self.dtypes[key] for key, name in self.configured.items()):
            line += f" (configured: {configured}, which a CPU cannot use)"
        return line
