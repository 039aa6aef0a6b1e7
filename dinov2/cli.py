"""What every command-line entry point shares: a user's mistake ends in one sentence and exit status 1."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dinov2.errors import UserError

# torchrun stops every process as soon as one fails. The others wait this long, so that the one that
# speaks has spoken before it is stopped.
SILENT_RANK_DELAY_SECONDS = 2.0


def run(main: Callable[..., Any], *args: Any) -> None:
    """Call ``main(*args)``; on :class:`UserError` print its text once per machine and exit with status 1."""
    try:
        main(*args)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
            time.sleep(SILENT_RANK_DELAY_SECONDS)
        else:
            print(f"error: {error}", file=sys.stderr, flush=True)
            _tell_torchrun(str(error))
        sys.exit(1)


def _tell_torchrun(text: str) -> None:
    """Leave the text where torchrun looks for it, so that its closing report names the cause, too."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        details = {"py_callstack": f"error: {text}", "timestamp": str(int(time.time()))}
        report = {"message": f"error: {text}", "errorCode": 1, "extraInfo": details}
        Path(file).write_text(json.dumps({"message": report}))
