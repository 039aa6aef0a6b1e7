"""Log lines that one process writes once, however many datasets, samplers or loaders it makes."""

import logging
from functools import lru_cache


@lru_cache(maxsize=4096)
def log_once(level: int, text: str) -> None:
    """Log ``text`` at ``level`` unless this process has done so already."""
    logging.getLogger("dinov2").log(level, "%s", text)
