"""Submission of jobs through submitit: to Slurm, or to this machine for a trial.

A job is a :class:`~dinov2.run.task.Task`, a sweep several of them with different values. What can be wrong is
looked for before anything is queued. docs/launching.md tells users about all of it.
"""

import argparse
import copy
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dinov2 import cli
from dinov2.errors import ConfigError, OutputError, counted
from dinov2.run import executors, sweep
from dinov2.run.task import JOB_ID, Task
from dinov2.utils.cluster import get_slurm_executor_parameters, get_user_checkpoint_path, read_settings

__all__ = ["Task", "check_config", "get_args_parser", "get_shared_folder", "main", "submit_jobs"]

logger = logging.getLogger("dinov2")

CLUSTERS = ("slurm", "local", "debug")
TIMEOUT_MINUTES = 2800
MAX_TIMEOUTS = 30
# Enough to finish a step and to save. Slurm may give the signal up to a minute earlier than asked.
SIGNAL_DELAY_SECONDS = 120


def get_args_parser(
    description: str | None = None,
    parents: Sequence[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return the options of a submission, together with those of the ``parents`` (the task's own parser).

    Raises:
        ConfigError: The site's settings, which give some defaults, are wrong.
    """
    site = read_settings()
    parser = argparse.ArgumentParser(
        description=description,
        # A parser that brings its own --help would collide with this one's.
        parents=list(parents or ()),
        add_help=add_help,
    )
    add = parser.add_argument
    add(
        "--ngpus",
        "--gpus",
        "--gpus-per-node",
        default=8,
        type=int,
        help="GPUs per node, one process each; 0 runs one process on the CPU (default: 8)",
    )
    add("--nodes", "--nnodes", default=1, type=int, help="number of machines (default: 1)")
    add(
        "--timeout",
        default=_stated(site.timeout, TIMEOUT_MINUTES),
        type=int,
        help="minutes until the job is requeued (default: %(default)s)",
    )
    add(
        "--signal-delay",
        default=_stated(site.signal_delay, SIGNAL_DELAY_SECONDS),
        type=int,
        metavar="SECONDS",
        help="how long before that the job is told to save (default: %(default)s)",
    )
    add(
        "--max-timeouts",
        default=_stated(site.max_timeouts, MAX_TIMEOUTS),
        type=int,
        metavar="N",
        help="how often a job that ran into its time limit is requeued (default: %(default)s)",
    )
    add("--partition", default=None, type=str, help="Slurm partition (default: the site's)")
    add("--account", default=None, type=str, help="Slurm account (default: the site's)")
    add("--qos", default=None, type=str, help="Slurm quality of service (default: the site's)")
    add("--constraint", default=None, type=str, help="features that nodes must have (default: the site's)")
    add("--use-volta32", action="store_true", help='ask for nodes with the feature "volta32gb"')
    add("--comment", default="", type=str, help="comment shown in the queue")
    add("--exclude", default="", type=str, help="nodes to avoid, comma-separated")
    add(
        "--cluster",
        choices=CLUSTERS,
        default=None,
        help="where to run: slurm, local (processes on this machine) or debug (inside this process); "
        "default: slurm where there is one, else local",
    )
    add(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="one job per value; given several times, one per combination",
    )
    add("--max-parallel", default=None, type=int, metavar="N", help="jobs of a sweep that may run at once")
    add("--dry-run", action="store_true", help="check everything, print the job script, submit nothing")
    return parser


def get_shared_folder() -> Path:
    """Return the folder for the outputs of jobs that were given none.

    Raises:
        ConfigError: The site has not named a shared folder.
    """
    path = get_user_checkpoint_path()
    if path is None:
        raise ConfigError(
            "no output folder was given and this cluster has no shared one: use --output-dir, or set "
            "DINOV2_CHECKPOINT_PATH"
        )
    return path / "experiments"


def check_config(args: argparse.Namespace) -> Sequence[str]:
    """Hold the config and the overrides against the schema, as the job would hours later.

    Returns:
        What to warn about.

    Raises:
        ConfigError: Something is wrong; the text lists all of it.
    """
    from dinov2.configs import resolve

    return resolve(
        args.config_file or "", list(args.opts or []), output_dir=args.output_dir, lenient=args.lenient_config
    ).warnings


def submit_jobs(
    task_class: Callable[[argparse.Namespace], Task],
    args: argparse.Namespace,
    name: str,
    *,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> Any:
    """Submit ``task_class(args)`` under ``name``, or one such task per combination of ``args.sweep``.

    On this machine (``local``, ``debug``) the jobs of a sweep run ``args.max_parallel`` at a time, by default
    one, and this function returns when all are done.

    Args:
        args: From a parser with :func:`get_args_parser` among its parents; not changed.
        parents: Parsers of the job's own options, over which a sweep may go.

    Returns:
        submitit's job, a list of them for a sweep, or None for a dry run.

    Raises:
        ConfigError: The config file does not exist or the request cannot be met.
        OutputError: The output folder cannot be made.
    """
    args = _independent_copy(args)
    rows = sweep.combinations(args.sweep) if args.sweep else []
    if rows and JOB_ID in args.output_dir:
        raise ConfigError(
            f'a sweep writes the table of its jobs into its output folder, which "{args.output_dir}" is not '
            f"before the number for {JOB_ID} is known: use --output-dir without {JOB_ID}"
        )
    _check_numbers(args)
    tasks = [task_class(one) for one in _arguments_per_job(args, rows, parents)]
    _check(tasks, rows)
    request = _request(args, name)
    if args.dry_run:
        _show(args, request, rows)
        return None
    executor = executors.make_executor(executors.find_cluster(args.cluster), request)
    _make_folder(Path(args.output_dir.split(JOB_ID)[0]))
    with executors.submission_environment(request):
        if rows:
            return _submit_sweep(executor, tasks, rows, args)
        job = executor.submit(tasks[0])
    logger.info(
        "submitted job %s: its log is %s, results come to %s",
        job.job_id,
        job.paths.stdout,
        args.output_dir.replace(JOB_ID, job.job_id),
    )
    return job


def _stated(value: int | None, default: int) -> int:
    return default if value is None else value


def _independent_copy(args: argparse.Namespace) -> argparse.Namespace:
    """Return a copy with an output folder and without dependence on the current directory."""
    args = copy.deepcopy(args)
    if getattr(args, "config_file", None):  # not all tasks have a config
        if not Path(args.config_file).is_file():
            raise ConfigError(f"the config file {args.config_file} does not exist: check --config-file")
        args.config_file = str(Path(args.config_file).resolve())
    args.output_dir = str(Path(args.output_dir or get_shared_folder() / JOB_ID).absolute())
    return args


def _check_numbers(args: argparse.Namespace) -> None:
    for option, value, smallest in (
        ("--ngpus", args.ngpus, 0),
        ("--nodes", args.nodes, 1),
        ("--timeout", args.timeout, 1),
        ("--signal-delay", args.signal_delay, 1),
        ("--max-timeouts", args.max_timeouts, 0),
        ("--max-parallel", args.max_parallel, 1),
    ):
        if value is not None and value < smallest:
            raise ConfigError(f"{option} is {value}, but must be at least {smallest}")
    if args.signal_delay >= 60 * args.timeout:
        raise ConfigError(
            f"--signal-delay is {args.signal_delay} seconds, but the job ends after --timeout {args.timeout} "
            f"minutes: use less than {60 * args.timeout}"
        )
    if args.max_parallel is not None and not args.sweep:
        raise ConfigError("--max-parallel is for the jobs of a --sweep: give one, or leave it out")


def _arguments_per_job(
    args: argparse.Namespace, rows: Sequence[sweep.Combination], parents: Sequence[argparse.ArgumentParser]
) -> list[argparse.Namespace]:
    if not rows:
        return [args]
    jobs = [sweep.assigned(args, row.values, parents) for row in rows]
    for one, row in zip(jobs, rows, strict=True):
        one.output_dir = str(Path(args.output_dir) / row.folder)
    return jobs


def _check(tasks: Sequence[Task], rows: Sequence[sweep.Combination]) -> None:
    """Check every job; one error holds the problems of all, each said once."""
    problems: dict[str, list[str]] = {}
    warnings: dict[str, None] = {}
    for number, task in enumerate(tasks):
        try:
            warnings |= dict.fromkeys(task.check() or ())
        except ConfigError as error:
            if not rows:
                raise
            problems.setdefault(str(error), []).append(rows[number].folder)
    if problems:
        lines = [
            f"  in {'all jobs' if len(jobs) == len(tasks) else ', '.join(jobs)}: {text}"
            for text, jobs in problems.items()
        ]
        raise ConfigError("\n".join(["the sweep cannot be submitted:", *lines]))
    for warning in warnings:
        logger.warning("%s", warning)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the output folder {path} cannot be made ({error.strerror}): choose another --output-dir"
        ) from error


def _request(args: argparse.Namespace, name: str) -> executors.Request:
    site = read_settings()
    constraint = args.constraint or ""
    if args.use_volta32:
        constraint = "&".join(filter(None, [constraint, "volta32gb"]))
    options = {
        "slurm_partition": args.partition,
        "slurm_account": args.account,
        "slurm_qos": args.qos,
        "slurm_constraint": constraint,
        "slurm_comment": args.comment,
        "slurm_exclude": args.exclude,
        "slurm_array_parallelism": args.max_parallel,
    }
    parameters = get_slurm_executor_parameters(
        nodes=args.nodes,
        num_gpus_per_node=args.ngpus,
        name=name,
        timeout_min=args.timeout,
        slurm_signal_delay_s=args.signal_delay,
        # What was not asked for is left to the site's settings.
        **{key: value for key, value in options.items() if value},
    )
    return executors.Request(
        folder=args.output_dir,
        parameters=parameters,
        max_timeouts=args.max_timeouts,
        environment=site.environment,
        python=site.python,
    )


def _show(args: argparse.Namespace, request: executors.Request, rows: Sequence[sweep.Combination]) -> None:
    """Print what would be submitted: the script of Slurm, unless another place was asked for."""
    if args.cluster == "debug":
        cli.say(f"# nothing is submitted: this process itself would run the job, in {args.output_dir}")
    elif args.cluster == "local":
        number = request.parameters["tasks_per_node"]
        cli.say(f"# on this machine, {number} {'process' if number == 1 else 'processes'} of:")
        cli.say(executors.local_command(request))
    else:
        if executors.find_cluster(None) != "slurm":
            logger.info("there is no Slurm here: without --cluster slurm the job would run on this machine")
        cli.say(executors.job_script(request, len(rows) or 1).rstrip())
    if rows:
        cli.say("\n" + sweep.table(rows))


def _submit_sweep(
    executor: Any, tasks: Sequence[Task], rows: Sequence[sweep.Combination], args: argparse.Namespace
) -> list[Any]:
    folder = Path(args.output_dir)
    if executors.find_cluster(args.cluster) == "slurm":
        jobs = executor.submit_array(tasks)
        sweep.record(folder, rows, [job.job_id for job in jobs])
        logger.info(
            "submitted %s as %s to %s; %s says which is which",
            *(counted(len(jobs), "job"), jobs[0].job_id, jobs[-1].job_id, folder / sweep.FILE_NAME),
        )
        return jobs
    jobs = []
    width = args.max_parallel or 1
    for start in range(0, len(tasks), width):
        group = [executor.submit(task) for task in tasks[start : start + width]]
        jobs += group
        sweep.record(folder, rows[: len(jobs)], [job.job_id for job in jobs])
        for job, row in zip(group, rows[start:], strict=False):
            logger.info("job %s: %s", job.job_id, row.folder)
            job.wait()
    return jobs


def main(task_class: type[Task], parents: Sequence[argparse.ArgumentParser], name: str) -> None:
    """The command line of an entry script: parse, submit."""
    from dinov2.logging import setup_logging

    args = get_args_parser(f"Submit a {name} job", parents).parse_args()
    setup_logging(level=logging.INFO)
    job = submit_jobs(task_class, args, name=name, parents=parents)
    if args.cluster == "debug" and job is not None and not args.sweep:
        job.wait()  # it has not begun yet
    if args.sweep and job and executors.find_cluster(args.cluster) == "local":
        failed = [one.job_id for one in job if one.exception() is not None]
        if failed:
            logger.error("%s of the sweep failed: %s", counted(len(failed), "job"), ", ".join(failed))
            sys.exit(1)
