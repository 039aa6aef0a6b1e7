"""Processes of checkouts that do what they are asked, one at a time."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dinov2.errors import ConfigError, UserError


class SideError(UserError):
    """The process of a checkout has failed or ended."""


class Checkout:
    """A checkout in a process of its own, whose folder comes first in the import path; use in a ``with``.

    Args:
        tree: folder of the checkout, in which ``dinov2`` lies.
        program: file to run, which calls :func:`serving.serve`.
        settings: what it needs, as JSON; added are ``tree``, ``threads`` and ``began``, the time of the
            monotonic clock at which it was started.
        threads: of the process; 0 for PyTorch's default.
    """

    def __init__(self, tree: Path, program: Path, settings: dict[str, Any], threads: int = 0) -> None:
        self.tree, self.program = tree.resolve(), program
        self.settings = {**settings, "tree": str(self.tree), "threads": threads}

    def __enter__(self) -> "Checkout":
        their_requests, our_requests = os.pipe()
        our_answers, their_answers = os.pipe()
        self.settings["began"] = time.monotonic()
        path = [str(self.tree), *filter(None, [os.environ.get("PYTHONPATH")])]  # of what it may lack
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        if self.settings["threads"]:
            environment["OMP_NUM_THREADS"] = str(self.settings["threads"])
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(self.program),
                str(their_requests),
                str(their_answers),
                json.dumps(self.settings),
            ],
            pass_fds=(their_requests, their_answers),
            env=environment,
            cwd=self.tree,
            stdout=2,  # what it prints is no result
        )
        os.close(their_requests)
        os.close(their_answers)
        self.requests, self.answers = os.fdopen(our_requests, "w"), os.fdopen(our_answers)
        try:
            self.description = self._answer()
        except SideError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the process has ended by itself
            self.requests.close()
        self.process.wait()
        self.answers.close()

    def ask(self, what: str, **arguments: Any) -> Any:
        """Let the process do something and return its answer.

        Raises:
            SideError: it failed, or the process has ended.
        """
        try:
            self.requests.write(json.dumps({"do": what, "with": arguments}) + "\n")
            self.requests.flush()
        except BrokenPipeError:
            raise SideError(f"the process of {self.tree} has ended: see its messages above") from None
        return self._answer()

    def _answer(self) -> Any:
        line = self.answers.readline()
        if not line:
            raise SideError(f"the process of {self.tree} has ended: see its messages above")
        document = json.loads(line)
        if failed := document["failed"]:
            if failed.startswith("ModuleNotFoundError"):
                failed += ": install what that checkout needs, or name its folder in PYTHONPATH"
            raise SideError(f"{self.tree}: {failed}")
        return document["answer"]


def check_tree(tree: Path, part: str) -> None:
    """Raise a ConfigError unless a folder holds a part of a checkout, such as ``dinov2/train``."""
    if not (tree / part).exists():
        raise ConfigError(f"--against {str(tree)!r} holds no {part}: name a checkout's folder")
