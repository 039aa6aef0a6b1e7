"""What every command-line entry point shares: a user's mistake ends in one sentence and exit status 1."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dinov2.errors import Interrupted, UserError

# Most mistakes are found by every process alike. The first one of a machine speaks at once; the others give
# it this long, after which a launcher has stopped them. One that is still there was alone with its problem.
OTHER_RANKS_DELAY_SECONDS = 5.0

# How long the last words of a process that gives up may take.
LAST_WORDS_SECONDS = 5.0

# What sysexits.h calls a temporary failure: start the same command again. Launchers tell it from an error.
EXIT_START_AGAIN = 75


def run(main: Callable[..., Any], *args: Any) -> None:
    """Call ``main(*args)``; on :class:`UserError` print its text and exit with status 1.

    On :class:`Interrupted`, a run that saved its state on being asked to stop, the status is 75, or 0 under
    a torchrun that would start it again at once.
    """
    try:
        main(*args)
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Interrupted as stop:
        print(f"stopped: {stop}", file=sys.stderr, flush=True)
        sys.exit(0 if _torchrun_would_restart() else EXIT_START_AGAIN)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
            time.sleep(OTHER_RANKS_DELAY_SECONDS)
        text = _sentence(error)
        print(f"error: {text}", file=sys.stderr, flush=True)
        _tell_torchrun(text)
        sys.exit(1)


def abandon(text: str) -> NoReturn:
    """Print ``text`` as an error and end the process with status 1 now, from any thread.

    For a process that waits for others that will never come: no clean-up runs, as that might wait, too.
    """
    said = threading.Thread(target=_last_words, args=(text,), daemon=True)
    said.start()
    said.join(LAST_WORDS_SECONDS)  # the main thread may hold a lock of the output
    os._exit(1)


def _last_words(text: str) -> None:
    _tell_torchrun(text)
    print(f"error: {text}", file=sys.stderr, flush=True)
    logging.getLogger("dinov2").error("%s", text)
    logging.shutdown()
    sys.stdout.flush()


def say(text: str) -> None:
    """Print a line of a command's result; what it can not encode, as bytes of a path, is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _sentence(error: UserError) -> str:
    """Return the error's text; one that a loader's worker passed on carries a traceback in front of it."""
    text = str(error)
    if "Original Traceback" not in text:
        return text
    return text.strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")


def _torchrun_would_restart() -> bool:
    """Tell whether torchrun, which takes every status but 0 for a failure, has restarts left."""
    count, most = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return bool(count and most) and int(count) < int(most)


def _tell_torchrun(text: str) -> None:
    """Leave the text where torchrun looks for it, so that its closing report names the cause, too."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        details = {"py_callstack": f"error: {text}", "timestamp": str(int(time.time()))}
        report = {"message": f"error: {text}", "errorCode": 1, "extraInfo": details}
        Path(file).write_text(json.dumps({"message": report}))
