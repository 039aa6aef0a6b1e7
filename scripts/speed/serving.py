"""Answers what a :class:`scripts.speed.checkouts.Checkout` asks.

The program is started as ``python FILE REQUESTS ANSWERS SETTINGS``: two file descriptors, over which JSON
documents go line by line, and a JSON document. ``dinov2`` is imported from the checkout that PYTHONPATH names
first; the program and its neighbours are those of the benchmark.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(make: Callable[[dict[str, Any]], Any]) -> None:
    """Answer one request after the other, until there are no more, by the methods of what ``make`` returns.

    Args:
        make: called with the settings; what it returns has a method ``describe``.
    """
    requests, answers, settings = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as out:

        def attempt(function: Callable[[], Any]) -> tuple[Any, str]:
            try:
                return function(), ""
            except Exception as error:  # told to the process that asked, which ends this one
                return None, f"{type(error).__name__}: {error}"

        def answer(value: Any, failed: str) -> None:
            out.write(json.dumps({"answer": value, "failed": failed}) + "\n")
            out.flush()

        bench, failed = attempt(lambda: make(settings))
        answer(*((None, failed) if failed else attempt(bench.describe)))
        if failed:
            return
        for line in lines:
            request = json.loads(line)
            answer(*attempt(lambda request=request: getattr(bench, request["do"])(**request["with"])))


def check_origin(settings: dict[str, Any]) -> None:
    """Raise a RuntimeError unless ``dinov2`` is that of the checkout."""
    import dinov2

    if not Path(dinov2.__file__).is_relative_to(settings["tree"]):
        raise RuntimeError(f"dinov2 was imported from {dinov2.__file__}, not from {settings['tree']}")
