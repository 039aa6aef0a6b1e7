"""Training entry point and loop.

    torchrun --standalone --nproc-per-node=4 dinov2/train/train.py \
        --config-file dinov2/configs/train/vitl16-tcga-dino.yaml --output-dir ./results/run1 \
        train.dataset_path=Pathology:split=TRAIN:root=...:extra=...:sshid=13

One process needs no launcher: ``python dinov2/train/train.py ...``.
"""

import sys

if __name__ == "__main__":
    # A wrong config should stop the run in its first second; importing torch alone takes longer.
    from dinov2 import cli
    from dinov2.train.arguments import check_command_line

    cli.run(check_command_line, sys.argv[1:])

import argparse
import logging
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from dinov2 import distributed
from dinov2.configs.scaling import images_per_iteration
from dinov2.data.loader_errors import explained
from dinov2.errors import ConfigError, WeightsError
from dinov2.logging import MetricLogger
from dinov2.logging.sinks import open_sinks, require_packages
from dinov2.train.arguments import get_args_parser
from dinov2.train.cuda_graphs import records
from dinov2.train.initialization import settle_config, write_reports
from dinov2.train.input import build_dataset, find_order, require_same_length
from dinov2.train.loop import Place, TrainingLoop
from dinov2.train.monitoring.images import Sources, open_sources
from dinov2.train.monitoring.monitor import Monitor
from dinov2.train.monitoring.verdict import RunJudge
from dinov2.train.optimizer import apply_optim_scheduler, build_optimizer
from dinov2.train.output_lock import OutputLock
from dinov2.train.preemption import StopRequest
from dinov2.train.run_length import describe_run_length, settle_run_length, total_iterations
from dinov2.train.run_state import METRICS_FILE, do_test, restore
from dinov2.train.same_config import settings_of
from dinov2.train.schedules import build_schedulers
from dinov2.train.self_check import enforce, run_self_check
from dinov2.train.sharding import require_equal_groups
from dinov2.train.show_crops import show_crops
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.start_anew import set_aside, start_anew
from dinov2.train.step import NonFiniteLossError, train_step
from dinov2.train.watchdog import Watchdog
from dinov2.utils.config import setup, write_config
from dinov2.utils.device import resolve_device

__all__ = [
    "NonFiniteLossError",
    "apply_optim_scheduler",
    "build_optimizer",
    "build_schedulers",
    "do_test",
    "do_train",
    "get_args_parser",
    "main",
    "train_step",
]

logger = logging.getLogger("dinov2")


@explained()
def do_train(
    cfg: DictConfig,
    model: SSLMetaArch,
    resume: bool = False,
    *,
    dataset: Dataset | None = None,
    sources: Sources | None = None,
    resume_anyway: bool = False,
    lock: OutputLock | None = None,
    stop: StopRequest | None = None,
    watch: Watchdog | None = None,
) -> dict[str, float]:
    """Train ``model``, which is prepared and on its device, to the end of the configured run.

    Args:
        cfg: resolved config, learning rate scaled.
        model: networks to train.
        resume: continue from the newest checkpoint in the output directory; else checkpoints there are moved
            into a sub-folder.
        dataset: training set, if it is open already; by default the one the config names.
        sources: images of evaluations in the loop, if they are open already; likewise.
        resume_anyway: continue although the config differs in what decides the result.
        lock: that of the output directory, which is looked at before every checkpoint.
        stop: signals that ask for a stop; by default none are listened to.
        watch: is told what this process is doing; by default nobody is.

    Returns:
        Name of each metric -> its average over the run and all ranks.

    Raises:
        Interrupted: a signal came; the state after the latest step is saved.
        NonFiniteLossError: too many steps in a row failed (``train.max_bad_steps``); with the diagnosis.
        ConfigError: the run to continue had another config, in something that decides the result.
        OutputError: the checkpoint of the end could not be written.
        SelfCheckError: the run would not do what its config says (``train.self_check`` stop).
        DatasetError: the processes see datasets of different lengths.
        UnreadableImagesError: more images than ``train.max_bad_fraction`` are unreadable.
        DataLoadingError: a data loading process died or gave nothing for ``train.worker_timeout`` seconds.
    """
    stop, watch = stop or StopRequest(), watch or Watchdog(cfg.train.process_timeout)
    if not resume:
        set_aside(cfg)
    model.train()
    dataset = build_dataset(cfg) if dataset is None else dataset
    require_same_length(dataset)
    sources = open_sources(cfg) if sources is None else sources
    settle_run_length(cfg, len(dataset), distributed.get_global_size())
    optimizer = build_optimizer(cfg, model.get_params_groups())
    metrics = MetricLogger(delimiter="  ", output_file=str(Path(cfg.train.output_dir) / METRICS_FILE))
    restored = restore(
        cfg,
        model,
        resume=resume,
        resume_anyway=resume_anyway,
        may_write=(lock or OutputLock()).check,
        optimizer=optimizer,
        metrics=metrics,
    )
    write_config(cfg, cfg.train.output_dir)  # a run that is not continued leaves that of the old one
    # Weights alone begin a new run, whatever count of iterations stands in a file, unless the config says so.
    start_iteration = restored.iterations_done if restored.continues else cfg.optim.start_iter
    max_iterations = total_iterations(cfg)
    if not restored.continues:
        _begin(cfg, model, max_iterations)
    if start_iteration >= max_iterations:
        logger.info("this run is complete: %d of %d iterations are done", start_iteration, max_iterations)
        return {}

    world_size = distributed.get_global_size()
    logger.info("%s", describe_run_length(cfg, len(dataset), world_size))
    total_batch = images_per_iteration(cfg, world_size)
    if total_batch > len(dataset):
        logger.warning("a batch of %d images repeats some of the %d tiles", total_batch, len(dataset))
    order = find_order(cfg, dataset, start_iteration, restored.data_order)
    settings = settings_of(cfg, world_size)
    stop.stop_before_training()
    watch.phase("checking the run before its first step")
    restored.checkpointer.rehearse(iteration=start_iteration, data_order=order.state(), **settings)
    check = run_self_check(
        cfg,
        model,
        optimizer,
        dataset,
        initial=model.initial_weights,
        start_iteration=start_iteration,
        continues=restored.continues,
        order=order,
    )
    enforce(check, cfg.train.self_check)
    monitor = None
    if sources is not None:
        monitor = Monitor(
            cfg,
            model,
            sources,
            RunJudge(cfg, model),
            announce=watch.phase,
            publish=lambda iteration, scalars: metrics.sinks.write(iteration, scalars),
        )
    stop.stop_before_training()
    loop = TrainingLoop(
        cfg,
        model,
        dataset,
        optimizer,
        metrics,
        restored,
        max_iterations=max_iterations,
        stop=stop,
        watch=watch,
        monitor=monitor,
    )
    shown = OmegaConf.to_container(cfg, resolve=True)
    with open_sinks(
        cfg.tracking, cfg.train.output_dir, start_iteration=start_iteration, config=shown
    ) as metrics.sinks:
        loop.run(Place(start_iteration, order))
    metrics.synchronize_between_processes()
    return {name: meter.global_avg for name, meter in metrics.meters.items()}


def _begin(cfg: DictConfig, model: SSLMetaArch, max_iterations: int) -> None:
    """Say what a run that has nothing to resume starts from."""
    # MODEL.WEIGHTS has replaced what was loaded, of which the report would tell.
    if distributed.is_main_process() and not cfg.MODEL.WEIGHTS:
        write_reports(model.initial_weights, Path(cfg.train.output_dir))
    start = cfg.optim.start_iter
    if start >= max_iterations:
        raise ConfigError(
            f"optim.start_iter {start} is not before the end of the run of {max_iterations} iterations: "
            "lower it, or lengthen the run."
        )
    if start:
        logger.info(
            "schedules and data order begin at iteration %d (optim.start_iter), the optimizer's moments at 0",
            start,
        )


def export_only(cfg: DictConfig, model: SSLMetaArch, *, resume: bool) -> None:
    """Export the newest checkpoint (or MODEL.WEIGHTS) to ``eval/manual_<iterations done>``."""
    restored = restore(cfg, model, resume=resume)
    if not (restored.continues or cfg.MODEL.WEIGHTS):
        raise WeightsError(
            f"--eval-only found no checkpoint in {cfg.train.output_dir!r} and MODEL.WEIGHTS is empty; "
            "name the output directory of a run, or a checkpoint file with MODEL.WEIGHTS=..."
        )
    do_test(cfg, model, f"manual_{restored.iterations_done}")


def main(args: argparse.Namespace) -> None:
    """Run what the parsed command line asks for."""
    if args.show_crops:
        show_crops(args, Path(args.show_crops))
        return
    with StopRequest() as stop, OutputLock() as lock:
        # do_train writes the config, once the length of the run is settled. An export only reads.
        cfg = setup(args, write=False, claim=None if args.eval_only else lock.claim)
        resume = not args.no_resume
        if args.no_resume and not args.eval_only:
            resume = start_anew(cfg)  # at once: launchers that start the job again repeat the option
        with Watchdog(cfg.train.process_timeout) as watch:
            _run(args, cfg, lock, stop, watch, resume=resume)


def _run(
    args: argparse.Namespace,
    cfg: DictConfig,
    lock: OutputLock,
    stop: StopRequest,
    watch: Watchdog,
    *,
    resume: bool,
) -> None:
    """Train or export, in the output directory that belongs to this run meanwhile."""
    if args.eval:
        logger.warning('--eval "%s" has no effect: --eval-only exports a checkpoint', args.eval)
    torch.backends.cuda.matmul.allow_tf32 = True
    device = resolve_device(cfg.train.device)
    settle_config(cfg)
    if args.eval_only:  # the networks compute nothing
        cfg.train.compile, cfg.train.cuda_graphs = False, None
    if cfg.train.cuda_graphs:  # asked again when it is known whether the run compiles
        records(cfg, device, compiled=cfg.train.compile is not False)
    require_equal_groups(cfg.compute_precision)
    require_packages(cfg.tracking)
    # Before the networks are built: a wrong dataset string should not cost the time that takes.
    dataset = None if args.eval_only else build_dataset(cfg)
    sources = None if args.eval_only else open_sources(cfg)
    stop.stop_before_training()
    watch.phase("building the networks")
    model = SSLMetaArch(cfg).to(device)
    model.prepare_for_distributed_training()
    logger.info("%s", model.precision.describe())
    if args.eval_only:
        export_only(cfg, model, resume=resume)
    else:
        do_train(
            cfg,
            model,
            resume=resume,
            dataset=dataset,
            sources=sources,
            resume_anyway=args.resume_anyway,
            lock=lock,
            stop=stop,
            watch=watch,
        )


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args())
