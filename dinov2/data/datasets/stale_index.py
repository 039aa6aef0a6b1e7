"""Tells an index that is older than the tiles it lists, at the cost of a few looks at folders."""

import logging
import os
from collections.abc import Callable

import numpy as np
from torch.utils.data import get_worker_info

from dinov2 import distributed
from dinov2.utils.log_once import log_once

FOLDERS_LOOKED_AT = 16
TOLERANCE_SECONDS = 5.0  # clocks of file servers differ, and a build may end right after the tiles were cut


def warn_if_stale(index_path: str, count: int, folder_of: Callable[[int], str], build: str) -> None:
    """Log one warning if slide folders have changed since their index was written.

    Only the main process looks, and only at folders of rows spread evenly, so the cost does not grow. Adding,
    removing or replacing a tile changes its folder's time; writing into an existing file does not.

    Args:
        index_path: file of the index.
        count: number of its rows, at least 1.
        folder_of: row -> folder of its tile.
        build: the advice how to build it again.
    """
    if get_worker_info() is not None or not distributed.is_main_process():
        return
    rows = np.linspace(0, count - 1, min(count, FOLDERS_LOOKED_AT)).astype(np.int64).tolist()
    folders = list(dict.fromkeys(folder_of(row) for row in rows))
    try:
        limit = os.stat(index_path).st_mtime + TOLERANCE_SECONDS  # noqa: PTH116
    except OSError:  # removed by a rebuild just now
        return
    newer = [folder for folder in folders if _modified(folder) > limit]
    if newer:
        log_once(
            logging.WARNING,
            f'the index "{index_path}" is older than the tiles of "{newer[0]}" ({len(newer)} of '
            f"{len(folders)} slide folders looked at have changed since): what it lists may be missing and "
            f"new tiles are not drawn; {build}, which lists only the slides that have changed",
        )


def _modified(folder: str) -> float:
    try:
        return os.stat(folder).st_mtime  # noqa: PTH116
    except OSError:  # missing: reading its tiles says so
        return 0.0
