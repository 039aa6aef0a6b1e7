"""What the C library does with the memory that tensors on the CPU give back."""

import ctypes
import os
from functools import cache

# Parameters of mallopt(3), and the environment variables that set the same.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
NEVER = -1


@cache
def keep_freed_memory() -> None:
    """Let this process keep what is freed, to be used again.

    glibc gives large blocks back to the system at once and asks for them anew, and the system fills each of
    their pages with zeros: up to a sixth of the time of a forward pass on a CPU. A loop needs the same blocks
    in every round, so its peak grows little. Settings in the environment win; other C libraries, and other
    allocators that were loaded in advance, are left as they are.
    """
    if any(name in os.environ for name in (*VARIABLES, "GLIBC_TUNABLES")):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library of the process itself
        return
    mallopt(TRIM_THRESHOLD, NEVER)
    mallopt(MMAP_MAX, 0)
