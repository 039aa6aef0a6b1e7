"""Processes that do steps when asked, one at a time, and the two of them that are compared."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dinov2.errors import UserError

SIDE_FILE = Path(__file__).with_name("side.py")
WARM_UP_STEPS = 20  # at most; fp16 looks for its loss scale in the first ones


class SideError(UserError):
    """The process of a checkout has failed or ended."""


class Side:
    """A checkout in a process of its own, see ``side.py``; use in a ``with``.

    Args:
        tree: folder of the checkout, in which ``dinov2`` lies.
        config: YAML file of the resolved config.
        device: ``cpu`` or ``cuda``.
        threads: of the process; 0 for PyTorch's default.
        autocast: name of the dtype for code that leaves precision to FSDP.
    """

    def __init__(
        self, tree: Path, config: Path, device: str, threads: int, autocast: str = "float32"
    ) -> None:
        self.tree = tree.resolve()
        self.settings = {
            "tree": str(self.tree),
            "config": str(config),
            "device": device,
            "threads": threads,
            "autocast": autocast,
        }

    def __enter__(self) -> "Side":
        their_requests, our_requests = os.pipe()
        our_answers, their_answers = os.pipe()
        self.settings["began"] = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(self.tree)}
        if self.settings["threads"]:
            environment["OMP_NUM_THREADS"] = str(self.settings["threads"])
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(SIDE_FILE),
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
        if document["failed"]:
            raise SideError(f"{self.tree}: {document['failed']}")
        return document["answer"]

    def warm_up(self) -> None:
        """Do steps until one moves the weights, and one more.

        Raises:
            SideError: none does.
        """
        for _ in range(WARM_UP_STEPS):
            problem = self.ask("step")["problem"]
            if not problem:
                self.ask("step")
                return
        raise SideError(f"{self.tree}: {WARM_UP_STEPS} steps were skipped, the last because {problem}")
