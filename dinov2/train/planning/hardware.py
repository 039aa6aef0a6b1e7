"""Peak arithmetic of GPUs, and speeds of links, from their makers' data sheets."""

import re
from dataclasses import dataclass

from dinov2.errors import ConfigError, nearest

# Dense matrix products, TFLOP/s: in 16 bits, and in float32 (TF32 where the GPU has it).
PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "v100": (125.0, 15.7),
    "a100": (312.0, 156.0),
    "a40": (149.7, 74.8),
    "l40s": (362.0, 183.0),
    "rtx4090": (165.2, 82.6),
    "h100": (989.0, 494.0),
    "h100-pcie": (756.0, 378.0),
    "h100-nvl": (835.0, 417.0),
    "h200": (989.0, 494.0),
    "b200": (2250.0, 1125.0),
}


@dataclass(frozen=True)
class Fabric:
    """Speeds between GPUs, one direction, in GB/s."""

    inside: float  # of one GPU to the others of its machine
    outside: float  # of a whole machine to the others
    latency: float  # of one collective inside a machine, seconds
    latency_outside: float  # across machines


# NVLink 4 (900 GB/s both ways) and eight 400 Gbit/s cards in each machine, and the same with a single card of
# 200 Gbit/s; latencies are round numbers for NCCL.
FABRICS = {
    "eight-cards": Fabric(450.0, 400.0, 15e-6, 40e-6),
    "one-card": Fabric(450.0, 25.0, 15e-6, 40e-6),
}


def gpu_key(device_name: str) -> str:
    """Return the name in :data:`PEAK_TFLOPS` of a GPU as its driver calls it; empty if it is not there."""
    words = re.findall("[a-z0-9]+", device_name.lower())
    words += [a + b for a, b in zip(words, words[1:], strict=False)]  # RTX 4090
    for key in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if set(key.split("-")) <= set(words):
            return key
    return ""


def peak_tflops(gpu: str, compute_bytes: int) -> float:
    """Return the peak of a named GPU for a number format of so many bytes.

    Raises:
        ConfigError: the GPU is not in the table.
    """
    if gpu not in PEAK_TFLOPS:
        raise ConfigError(
            f'--gpu "{gpu}" is not known{nearest(gpu, PEAK_TFLOPS)}: use one of {", ".join(PEAK_TFLOPS)}, or '
            "state --peak-tflops"
        )
    return PEAK_TFLOPS[gpu][0 if compute_bytes < 4 else 1]
