"""What a run starts from and what it leaves: restoring, checkpoints and exports."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dinov2 import distributed
from dinov2.data.data_order import DataOrder
from dinov2.errors import OutputError
from dinov2.fsdp import FSDPCheckpointer
from dinov2.train.export import export_networks
from dinov2.train.same_config import require_same_config, settings_of
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2")

METRICS_FILE = "training_metrics.json"


def do_test(cfg: DictConfig, model: SSLMetaArch, iteration: str | int) -> None:
    """Export teacher and student to ``<output_dir>/eval/<iteration>``, e.g. ``training_9999``.

    Raises:
        OutputError: it cannot be written, on all processes.
    """
    folder = Path(cfg.train.output_dir) / "eval" / str(iteration)
    export_to(cfg, model, folder)
    logger.info("exported teacher and student to %s", folder)


def export_to(cfg: DictConfig, model: SSLMetaArch, folder: Path) -> None:
    """Export teacher and student to ``folder``; see :func:`do_test`."""
    centers = None
    if cfg.train.centering == "centering":
        model.finish_center_updates()
        centers = {name: loss.center for name, loss in model.centers().items()}
    export_networks(model.student, model.teacher, folder, centers=centers)


class Restored(NamedTuple):
    """What a run starts from."""

    checkpointer: FSDPCheckpointer
    continues: bool  # from a checkpoint in the output directory
    iterations_done: int  # by the run that wrote what was loaded; 0 if nothing was
    data_order: dict[str, Any] | None  # of the run that is continued; None if it was not written down


def restore(
    cfg: DictConfig,
    model: SSLMetaArch,
    *,
    resume: bool,
    resume_anyway: bool = False,
    may_write: Callable[[], None] = lambda: None,
    **state: Any,
) -> Restored:
    """Load the newest state of the output directory, else the weights of ``MODEL.WEIGHTS``, if any.

    Args:
        cfg: resolved config.
        model: networks to load into.
        resume: look for checkpoints in the output directory; else only ``MODEL.WEIGHTS`` counts.
        resume_anyway: continue a run although its config differs in what decides the result.
        may_write: raises a UserError where the output directory has become another run's.
        state: what a checkpoint holds beside the model, e.g. ``optimizer``. Without an optimizer the run is
            not continued, and any config will do.

    Raises:
        ConfigError: the run to continue had another config.
        WeightsError: there are checkpoints but none can be read, or one does not fit.
    """
    is_training = "optimizer" in state
    if model.fp16_scaler is not None:
        state["fp16_scaler"] = model.fp16_scaler
    checkpointer = FSDPCheckpointer(
        model,
        cfg.train.output_dir,
        max_to_keep=cfg.checkpointing.max_to_keep,
        keep_every=cfg.checkpointing.keep_every,
        asynchronous=cfg.checkpointing.asynchronous,
        may_write=may_write,
        **state,
    )
    continues = resume and checkpointer.has_checkpoint()
    accept = partial(require_same_config, cfg, distributed.get_global_size(), anyway=resume_anyway)
    loaded = checkpointer.resume_or_load(
        cfg.MODEL.WEIGHTS, resume=resume, accept=accept if is_training else None
    )
    data_order = loaded.get("data_order") if continues else None
    iterations_done = loaded.get("iteration", -1) + 1
    if resume and is_training and distributed.is_main_process():
        # A run that was killed before its first checkpoint begins again, but has written rows.
        start = iterations_done if continues else cfg.optim.start_iter
        drop_rows_from(Path(cfg.train.output_dir, METRICS_FILE), start)
    return Restored(checkpointer, continues, iterations_done, data_order)


def drop_rows_from(path: Path, iteration: int) -> None:
    """Take rows out of a metrics file whose iterations are done again, and one that a kill cut short.

    A file that cannot be written keeps them, with a warning.
    """
    if not path.is_file():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _iteration_of(line) < iteration]
    if len(kept) == len(lines):
        return
    logger.info("%d rows of %s are written again", len(lines) - len(kept), path)
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_bytes(b"".join(kept))
        aside.replace(path)
    except OSError as error:
        logger.warning("the rows that are written again stay in %s: %s", path, error)


def _iteration_of(line: bytes) -> float:
    """Return the iteration of a row, infinity for what is no whole row."""
    try:
        return json.loads(line)["iteration"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def save_if_due(
    cfg: DictConfig,
    model: SSLMetaArch,
    checkpointer: FSDPCheckpointer,
    iteration: int,
    *,
    is_last: bool,
    order: DataOrder,
    healthy: bool = True,
) -> bool:
    """Checkpoint and export after the zero-based ``iteration``, by their periods and at the end.

    After a step that was skipped no periodic checkpoint is written: a run whose steps keep failing goes back
    to one from before that.

    Returns:
        Whether a checkpoint was begun.

    Raises:
        OutputError: the checkpoint or the export of the end cannot be written, on all processes. One before
            may fail, see the log.
    """
    done = iteration + 1
    period = cfg.checkpointing.period or 3 * cfg.train.OFFICIAL_EPOCH_LENGTH
    keep_every = cfg.checkpointing.keep_every
    periodic = done % period == 0 or (keep_every and done % keep_every == 0)
    due = is_last or bool(healthy and periodic)
    if due:
        save_now(cfg, model, checkpointer, iteration, order, is_last=is_last)
    if is_last:
        checkpointer.wait(must_succeed=True)
    export_period = cfg.evaluation.eval_period_iterations
    if export_period > 0 and (done % export_period == 0 or is_last):
        try:
            do_test(cfg, model, f"training_{iteration}")
        except OutputError as error:  # on all processes
            if is_last:
                raise
            if distributed.is_main_process():
                logger.error(
                    "the export after iteration %d has failed, the run goes on: %s", iteration, error
                )
    return due


def save_now(
    cfg: DictConfig,
    model: SSLMetaArch,
    checkpointer: FSDPCheckpointer,
    iteration: int,
    order: DataOrder,
    *,
    is_last: bool = False,
) -> None:
    """Begin to write a checkpoint from which the run can go on after the zero-based ``iteration``."""
    model.finish_center_updates()
    name = "model_final" if is_last else f"model_{iteration:07d}"
    settings = settings_of(cfg, distributed.get_global_size())
    checkpointer.save(name, iteration=iteration, data_order=order.state(), **settings)
