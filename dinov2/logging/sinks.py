"""Where metrics go beside the files of a run: TensorBoard and Weights & Biases, both optional packages.

    with open_sinks(cfg.tracking, cfg.train.output_dir) as metrics.sinks:  # gets the rows of the training
        metrics.sinks.write(iteration, {"eval/rankme": 31.4})  # and anything else

Only the main process has sinks; elsewhere :func:`open_sinks` returns an empty set of them.
"""

import importlib.util
import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dinov2 import distributed
from dinov2.errors import ConfigError

logger = logging.getLogger("dinov2")

RUN_ID_FILE = "wandb_run_id"
PACKAGES = {"tensorboard": "tracking.tensorboard true", "wandb": "tracking.wandb"}


class Sink(Protocol):
    """A receiver of metrics."""

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Take finite numbers by name."""

    def rewind(self, iteration: int) -> None:
        """Forget rows from this iteration on: they will be written again."""

    def close(self) -> None:
        """Write what is kept back."""


class TensorBoardSink:
    """Event files for TensorBoard.

    Args:
        folder: Where they go.
        start: First iteration to come; TensorBoard hides what an earlier process wrote from there on.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(folder))
        self._writer = self._open(purge_step=start)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Add a point to the curve of each name."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def rewind(self, iteration: int) -> None:
        """Begin an event file that hides what stands in earlier ones from ``iteration`` on."""
        self._writer.close()
        self._writer = self._open(purge_step=iteration)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbSink:
    """A run at Weights & Biases, or a folder that can be sent there later.

    A run that is resumed is continued: its id lies in ``wandb_run_id``. One that starts anew in the same
    folder gets an id of its own. Curves run over ``iteration``, so rows that are done again overlay the
    earlier ones.

    Args:
        folder: The output folder of the run; gives the name.
        continues: Whether the run goes on where one in that folder stopped.
        mode: ``offline`` or ``online``.
        project: Where the run goes.
        config: Settings to keep with it.
    """

    def __init__(
        self, folder: Path, mode: str, project: str, config: Mapping[str, Any], *, continues: bool = False
    ) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=_run_id(folder, continues=continues),
            dir=str(folder),
            mode=mode,
            resume="allow" if mode == "online" else None,
            config=dict(config),
        )
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Log one row."""
        self._run.log({"iteration": iteration, **scalars})

    def rewind(self, iteration: int) -> None:
        """Do nothing: a curve over ``iteration`` shows the rows that come later."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Sinks:
    """Several sinks as one; one that fails is left out from then on, with a warning.

    Args:
        members: The sinks; none is right, too.
    """

    def __init__(self, members: Sequence[Sink] = ()) -> None:
        self._members = list(members)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Give ``scalars`` to every sink; values that are not finite are left out."""
        finite = {name: float(value) for name, value in scalars.items() if math.isfinite(value)}
        self._each("write", lambda sink: sink.write(iteration, finite))

    def rewind(self, iteration: int) -> None:
        """Make every sink forget rows from ``iteration`` on."""
        self._each("go back", lambda sink: sink.rewind(iteration))

    def close(self) -> None:
        """Close every sink; there are none afterwards."""
        self._each("close", lambda sink: sink.close())
        self._members.clear()

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _each(self, what: str, act: Callable[[Sink], None]) -> None:
        for sink in list(self._members):
            try:
                act(sink)
            except Exception as error:  # a training must not end because its tracking does
                self._members.remove(sink)
                logger.warning(
                    "%s could not %s and gets no more metrics: %s", type(sink).__name__, what, error
                )


def require_packages(tracking: Any) -> None:
    """Check before a run that what its sinks need is installed.

    Args:
        tracking: The section ``tracking`` of the config.

    Raises:
        ConfigError: A package is missing.
    """
    wanted = [
        name for name, on in (("tensorboard", tracking.tensorboard), ("wandb", tracking.wandb != "off")) if on
    ]
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            off = "tracking.tensorboard=false" if name == "tensorboard" else "tracking.wandb=off"
            raise ConfigError(
                f'{PACKAGES[name]} needs the package {name}, which is not installed: pip install "{name}", '
                f"or set {off}"
            )


def open_sinks(
    tracking: Any,
    output_dir: str | Path,
    *,
    start_iteration: int = 0,
    config: Mapping[str, Any] | None = None,
) -> Sinks:
    """Open what the config asks for; call on all processes, the main one writes.

    Args:
        tracking: The section ``tracking`` of the config.
        output_dir: Of the run; gets the folders ``tensorboard`` and ``wandb``.
        start_iteration: First iteration to come, of a run that is continued.
        config: Settings to keep at Weights & Biases.

    Raises:
        ConfigError: A package is missing, or Weights & Biases refuses the run.
    """
    require_packages(tracking)
    members: list[Sink] = []
    problem = ""
    if distributed.is_main_process():
        folder = Path(output_dir)
        try:
            if tracking.tensorboard:
                members.append(TensorBoardSink(folder / "tensorboard", start_iteration))
        except OSError as error:
            problem = (
                f"{folder / 'tensorboard'} cannot be written ({error}): free some space or check permissions"
            )
        try:
            if tracking.wandb != "off" and not problem:
                members.append(
                    WandbSink(
                        folder,
                        tracking.wandb,
                        tracking.wandb_project,
                        config or {},
                        continues=start_iteration > 0,
                    )
                )
        except Exception as error:  # the package has its own, and those of the network
            problem = (
                f"Weights & Biases cannot be used ({error}): run `wandb login`, or set tracking.wandb=offline"
            )
    problem = distributed.broadcast_object(problem)
    if problem:
        raise ConfigError(problem)
    return Sinks(members)


def _run_id(folder: Path, *, continues: bool) -> str:
    """Return the id of the run in this folder, a new one for a run that does not continue."""
    file = folder / RUN_ID_FILE
    if continues and file.is_file():
        return file.read_text(encoding="ascii").strip()
    name = secrets.token_hex(8)
    file.write_text(f"{name}\n", encoding="ascii")
    return name
