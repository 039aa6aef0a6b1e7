"""What a run starts from and what it leaves: restoring, checkpoints and exports."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from dinov2.data.data_order import DataOrder
from dinov2.fsdp import FSDPCheckpointer
from dinov2.train.export import export_networks
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2")


def do_test(cfg: DictConfig, model: SSLMetaArch, iteration: str | int) -> None:
    """Export teacher and student to ``<output_dir>/eval/<iteration>``, e.g. ``training_9999``."""
    folder = Path(cfg.train.output_dir) / "eval" / str(iteration)
    centers = None
    if cfg.train.centering == "centering":
        model.finish_center_updates()
        centers = {name: loss.center for name, loss in model.centers().items()}
    export_networks(model.student, model.teacher, folder, centers=centers)
    logger.info("exported teacher and student to %s", folder)


class Restored(NamedTuple):
    """What a run starts from."""

    checkpointer: FSDPCheckpointer
    continues: bool  # from a checkpoint in the output directory
    iterations_done: int  # by the run that wrote what was loaded; 0 if nothing was
    data_order: dict[str, Any] | None  # of the run that is continued; None if it was not written down


def restore(cfg: DictConfig, model: SSLMetaArch, *, resume: bool, **state: Any) -> Restored:
    """Load the newest state of the output directory, else the weights of ``MODEL.WEIGHTS``, if any.

    Args:
        cfg: resolved config.
        model: networks to load into.
        resume: look for checkpoints in the output directory; else only ``MODEL.WEIGHTS`` counts.
        state: what a checkpoint holds beside the model, e.g. ``optimizer``.
    """
    if model.fp16_scaler is not None:
        state["fp16_scaler"] = model.fp16_scaler
    checkpointer = FSDPCheckpointer(
        model, cfg.train.output_dir, max_to_keep=cfg.checkpointing.max_to_keep, **state
    )
    continues = resume and checkpointer.has_checkpoint()
    loaded = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    data_order = loaded.get("data_order") if continues else None
    return Restored(checkpointer, continues, loaded.get("iteration", -1) + 1, data_order)


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
    """Export and checkpoint after the zero-based ``iteration``, by their periods and at the end.

    After a step that was skipped no periodic checkpoint is written: a run whose steps keep failing goes back
    to one from before that.

    Returns:
        Whether a checkpoint was written.
    """
    done = iteration + 1
    export_period = cfg.evaluation.eval_period_iterations
    if export_period > 0 and (done % export_period == 0 or is_last):
        do_test(cfg, model, f"training_{iteration}")
    period = cfg.checkpointing.period or 3 * cfg.train.OFFICIAL_EPOCH_LENGTH
    due = is_last or (healthy and done % period == 0)
    if due:
        save_now(model, checkpointer, iteration, order, is_last=is_last)
    return due


def save_now(
    model: SSLMetaArch,
    checkpointer: FSDPCheckpointer,
    iteration: int,
    order: DataOrder,
    *,
    is_last: bool = False,
) -> None:
    """Write the checkpoint of a run that has done the zero-based ``iteration``."""
    model.finish_center_updates()
    name = "model_final" if is_last else f"model_{iteration:07d}"
    checkpointer.save(name, iteration=iteration, data_order=order.state())


def settle(checkpointer: FSDPCheckpointer) -> None:
    """Wait until what was saved is on the disk; today's saving returns only then."""
    wait = getattr(checkpointer, "wait", None)
    if wait is not None:
        wait()
