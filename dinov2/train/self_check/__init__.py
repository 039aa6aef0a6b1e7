"""A look at the run before its first step: does it do what its config says?

Many mistakes leave a run that trains without complaint: masks that a backbone ignores, a layer-wise decay
that finds no layers, a teacher that was overwritten. The checks therefore ask the modules and the optimizer
themselves, with a few of the run's own images, and leave everything as they found it.
"""

import logging
from collections.abc import Callable, Iterator

import torch
from omegaconf import DictConfig
from torch.utils.data import Dataset

from dinov2 import distributed
from dinov2.data.data_order import DataOrder
from dinov2.errors import UserError
from dinov2.train.initial_weights import InitialWeights
from dinov2.train.self_check.backbone import (
    check_architecture,
    check_crop_sizes_together,
    check_drop_path,
    check_masks,
    check_tokens,
)
from dinov2.train.self_check.images import check_crops, check_duplicates, check_normalisation
from dinov2.train.self_check.learning import check_learning
from dinov2.train.self_check.losses import check_first_loss, check_temperatures, check_terms
from dinov2.train.self_check.probe import Start, find_start, unchanged
from dinov2.train.self_check.record import Line, SelfCheck, SelfCheckError, enforce, merge
from dinov2.train.self_check.weights import check_heads, check_kept, check_teacher, check_weights
from dinov2.train.ssl_meta_arch import SSLMetaArch

__all__ = ["Line", "SelfCheck", "SelfCheckError", "enforce", "run_self_check"]

logger = logging.getLogger("dinov2")

# Checks without collectives. Those of duplicates and losses have some: every process runs them to their end.
ALONE: tuple[Callable[[Start], Iterator[Line]], ...] = (
    check_weights,
    check_kept,
    check_teacher,
    check_heads,
    check_learning,
    check_architecture,
    check_drop_path,
    check_masks,
    check_tokens,
    check_crop_sizes_together,
    check_crops,
    check_normalisation,
    check_terms,
    check_temperatures,
)
FAILED = "error"  # stands in the values of a line whose check could not be carried out


def run_self_check(
    cfg: DictConfig,
    model: SSLMetaArch,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    *,
    initial: InitialWeights,
    start_iteration: int,
    continues: bool = False,
    order: DataOrder | None = None,
) -> SelfCheck:
    """Check a run that is about to take its first step, log the table and write ``self_check.json``.

    Every process calls it and gets the same result. Weights, optimizer, random generators and loss centres
    are left as they were. With ``train.self_check`` off nothing is done.

    Args:
        cfg: resolved config, run length settled.
        model: networks with the weights to start from, prepared and on their device.
        optimizer: the one the run will use.
        dataset: training set with its augmentation.
        initial: what was loaded when the model was built.
        start_iteration: zero-based iteration of the first step.
        continues: whether a checkpoint in the output directory has replaced what was loaded.
        order: which images the run draws; None for a run without a checkpoint.

    Raises:
        UserError: an image of the first batch cannot be read, on any process.
        OutputError: the output directory cannot be written.
    """
    if cfg.train.self_check == "off":
        return SelfCheck([])
    with unchanged(model, optimizer):
        start = _find_start_together(
            cfg, model, optimizer, dataset, initial, start_iteration, continues, order
        )
        _ = start.student  # gathered here, together, so that checks may run it each on their own
        lines = [line for check in ALONE for line in _attempt(check, start)]
        lines += check_duplicates(start)
        if any(distributed.all_gather_objects(any(FAILED in line.values for line in lines))):
            lines.append(Line("first loss", "note", "not computed, as checks could not be carried out"))
        else:
            lines += check_first_loss(start)
    result = merge(distributed.all_gather_objects(lines))
    if distributed.is_main_process():
        logger.info("%s", result.table())
        result.write(cfg.train.output_dir)
    return result


def _find_start_together(*args) -> Start:
    """Fetch the probe images; a tile that one process cannot read stops all of them."""
    start, problem = None, None
    try:
        start = find_start(*args)
    except UserError as error:
        problem = error
    problems = [found for found in distributed.all_gather_objects(problem) if found is not None]
    if problems:
        raise problems[0]
    return start


def _attempt(check: Callable[[Start], Iterator[Line]], start: Start) -> list[Line]:
    """A check that a strange module makes fail is a finding, too."""
    lines: list[Line] = []
    try:
        lines.extend(check(start))
    except Exception as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        logger.debug("self-check %s failed", name, exc_info=True)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        lines.append(Line(name, "wrong", f"could not be carried out ({reason})", {FAILED: reason}))
    return lines
