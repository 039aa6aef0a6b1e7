"""A job: which module's ``main`` to call, with which arguments, and how it ends when it is asked to stop.

Slurm, or submitit's executor for one machine, sends a signal some time before it stops a job. Two cases:

- The module knows nothing of signals, such as an evaluation. submitit's own handler asks the task for a fresh
  copy of itself, queues that, and the copy starts anew.
- The module is the trainer. It has handlers of its own, saves on all processes at the end of a step, puts
  submitit's handlers back and raises :class:`~dinov2.errors.Interrupted`. Then the task calls submitit's
  handler, which does the same as above, and the copy continues from what was saved.
"""

import argparse
import copy
import importlib
import logging
import os
import signal
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from dinov2.cli import EXIT_START_AGAIN
from dinov2.errors import Interrupted

logger = logging.getLogger("dinov2")

# submitit's placeholder for the number that the job will get.
JOB_ID = "%j"


class Task:
    """A job: calls ``main(args)`` of the module named in ``module``.

    Args:
        args: Parsed arguments with ``output_dir``, in which ``%j`` stands for the job's number.
        starts: How often this job was started before.
    """

    module: ClassVar[str]
    # Whether the module itself finds out that its job was started before, and how far that start came.
    knows_restarts: ClassVar[bool] = False

    def __init__(self, args: argparse.Namespace, *, starts: int = 0) -> None:
        self.args = args
        self.starts = starts

    def check(self) -> Sequence[str]:
        """Raise ConfigError before submitting what would fail in the job; return what to warn about."""
        return ()

    def __call__(self) -> Any:
        """Run in the job; the module is imported only here.

        Raises:
            SystemExit: The run was asked to stop and has saved. The first process has queued the job again
                where the signal asks for that; the others leave quietly, with status 0, because one that
                fails could make Slurm stop the first one too early.
        """
        import submitit

        from dinov2.logging import setup_logging

        setup_logging(level=logging.INFO)  # into submitit's file, until `main` sets up the run's own
        logging.getLogger("submitit").propagate = False  # it writes there by itself
        job = submitit.JobEnvironment()
        args = self._arguments(job.job_id)
        if job.num_tasks > 1:
            # Not every executor starts its processes through srun, so say it in torchrun's words.
            submitit.helpers.TorchDistributedEnvironment().export(
                set_cuda_visible_devices=False, overwrite=True
            )
        logger.info(
            "process %d of %d of job %s, output in %s",
            job.global_rank,
            job.num_tasks,
            job.job_id,
            args.output_dir,
        )
        try:
            return importlib.import_module(self.module).main(args)
        except Interrupted as stop:
            _leave(stop, job)

    def checkpoint(self) -> Any:
        """Called by submitit before the job is stopped: what to queue in its place."""
        import submitit

        logger.info("the job is about to be stopped, queueing it again")
        return submitit.helpers.DelayedSubmission(type(self)(self.args, starts=self.starts + 1))

    def _arguments(self, job_id: str) -> argparse.Namespace:
        args = copy.deepcopy(self.args)
        args.output_dir = args.output_dir.replace(JOB_ID, str(job_id))
        # Slurm counts the starts that it causes by itself, after a pre-emption or the failure of a node.
        restarts = self.starts + int(os.environ.get("SLURM_RESTART_COUNT", 0))
        os.environ.update(DINOV2_JOB=str(job_id), DINOV2_JOB_RESTARTS=str(restarts))
        if getattr(args, "no_resume", False) and restarts and not self.knows_restarts:
            logger.info("--no-resume held for the first start of this job; now it continues what it began")
            args.no_resume = False
        return args


def _leave(stop: Interrupted, job: Any) -> NoReturn:
    """End a process whose run has saved, and queue the job again where somebody else will not.

    SIGTERM and SIGINT mean that the job is cancelled (nobody wants it again), or pre-empted (Slurm queues it
    by itself, where the site lets it). Every other signal is a warning ahead of the time limit.
    """
    requeue = signal.getsignal(getattr(signal, f"SIG{job.USR_SIG}"))
    if stop.signal_number in (signal.SIGTERM, signal.SIGINT) or not callable(requeue):
        logger.warning("%s", stop)
        raise SystemExit(EXIT_START_AGAIN)
    if job.global_rank != 0:
        logger.info("%s; the first process queues the job again", stop)
        raise SystemExit(0)
    logger.info("%s; queueing the job again", stop)
    # Counts the time-outs, writes the copy of this task, calls scontrol and exits; raises where the job may
    # not be queued again.
    requeue(stop.signal_number, None)
    raise SystemExit(EXIT_START_AGAIN)
