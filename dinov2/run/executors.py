"""submitit's executors, set up from one request in the words of its ``AutoExecutor``.

The script for Slurm can be written on a machine without Slurm, for ``--dry-run``. Jobs find the package that
submitted them, also where it is a checkout that nobody installed.
"""

import contextlib
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dinov2
from dinov2.errors import ConfigError, UserError

# What submitit names differently in each executor.
GENERIC = (
    "name",
    "timeout_min",
    "mem_gb",
    "nodes",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "stderr_to_stdout",
)


@dataclass(frozen=True)
class Request:
    """What to ask of an executor.

    Attributes:
        folder: For logs, scripts and results; ``%j`` stands for the job's number.
        parameters: In the words of submitit's ``AutoExecutor``.
        max_timeouts: How often a job that ran into its limit is queued again.
        environment: Variables that the jobs shall have.
        python: Command that starts Python in the job; None means this one.
    """

    folder: str
    parameters: dict[str, Any]
    max_timeouts: int
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None


class SubmissionError(UserError, RuntimeError):
    """Slurm does not take a job."""


def find_cluster(name: str | None) -> str:
    """Return ``name``, or ``slurm`` where there is one and else ``local``."""
    return name or ("slurm" if shutil.which("srun") else "local")


def package_root() -> str | None:
    """Return the folder that Python has to search for this package, None where it does so anyway."""
    root = Path(dinov2.__file__).resolve().parents[1]
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    return None if root in installed else str(root)


def make_executor(cluster: str, request: Request) -> Any:
    """Return an executor of submitit: ``slurm``, ``local`` (processes here) or ``debug`` (this process).

    Raises:
        ConfigError: There is no Slurm here, or submitit does not know a parameter.
    """
    import submitit

    if cluster == "debug":
        return submitit.AutoExecutor(folder=request.folder, cluster="debug")
    if cluster == "local":
        if request.parameters["nodes"] > 1:
            raise ConfigError(
                f"--nodes is {request.parameters['nodes']}, but this machine is only one: use --nodes 1"
            )
        executor = submitit.LocalExecutor(
            folder=request.folder, max_num_timeout=request.max_timeouts, python=request.python
        )
        executor.update_parameters(**_local_parameters(request.parameters))
        return executor
    if not shutil.which("srun"):
        raise ConfigError(
            "--cluster is slurm, but there is no srun here: submit from a machine of the cluster, or use "
            "--cluster local"
        )
    return _slurm_executor(submitit.SlurmExecutor, request)


def job_script(request: Request, jobs: int) -> str:
    """Return the batch script that submitit would give to ``sbatch``; there need be no Slurm here.

    Args:
        jobs: Number of jobs; more than one become an array.

    Raises:
        ConfigError: submitit does not know a parameter.
    """
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    class ScriptWriter(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1  # the executor refuses to be made where this is 0: without Slurm

    writer = _slurm_executor(ScriptWriter, request)
    return _make_sbatch_string(
        command=writer._submitit_command_str,
        folder=writer.folder,
        **writer.parameters,
        **({"map_count": jobs} if jobs > 1 else {}),
    )


def local_command(request: Request) -> str:
    """Return the command line that every process of a job on this machine runs."""
    python = request.python or shlex.quote(sys.executable)
    return f"{python} -u -m submitit.core._submit {shlex.quote(request.folder)}"


@contextlib.contextmanager
def submission_environment(request: Request) -> Iterator[None]:
    """Let a job inherit the right variables.

    Those of an allocation or a torchrun in which the submitting process may sit itself describe that one and
    not the job; Slurm's commands even take some of them for options.

    Raises:
        SubmissionError: the cluster does not take what is submitted inside of the ``with``.
    """
    import submitit

    kept = {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS") if name in os.environ}
    variables = dict(request.environment) | kept
    root = package_root()
    if root:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with submitit.helpers.clean_env(), submitit.helpers.environment_variables(**variables):
        try:
            yield
        except submitit.core.utils.FailedJobError as error:
            # What the command said, already on the terminal.
            said = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
            raise SubmissionError(
                f"the job was not taken ({said or 'for no stated reason'}): see whether the cluster answers "
                "(sinfo) and knows --partition, --nodes, --ngpus and the like; --dry-run prints the script"
            ) from error


def _local_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    values = {
        key: parameters[key]
        for key in ("nodes", "tasks_per_node", "timeout_min", "stderr_to_stdout")
        if key in parameters
    }
    # Every process is given a GPU, so their number is that of the processes, unless there is none.
    values["gpus_per_node"] = parameters.get("gpus_per_node", parameters["tasks_per_node"])
    values["signal_delay_s"] = parameters["slurm_signal_delay_s"]
    if "local_setup" in parameters:
        values["setup"] = parameters["local_setup"]
    return values


def _slurm_executor(kind: type, request: Request) -> Any:
    executor = kind(folder=request.folder, max_num_timeout=request.max_timeouts, python=request.python)
    stated = {key: value for key, value in request.parameters.items() if value is not None}
    if not stated.get("gpus_per_node"):
        stated.pop("gpus_per_node", None)  # sbatch of a cluster without GPUs does not take a 0
    generic = {key: value for key, value in stated.items() if key in GENERIC}
    special = {key.removeprefix("slurm_"): value for key, value in stated.items() if key.startswith("slurm_")}
    unknown = [
        key for key in stated if key not in generic and not key.startswith(("slurm_", "local_", "debug_"))
    ]
    if unknown:
        raise ConfigError(
            f"submitit knows no parameter {', '.join(unknown)}: in executor_parameters write "
            f"{', '.join(GENERIC)}, or slurm_ in front of one of Slurm's"
        )
    setup = [*_export_lines(request.environment), *_listed(special.pop("setup", ()))]
    if setup:
        special["setup"] = setup
    try:
        executor.update_parameters(**executor._convert_parameters(generic) | special)
    except ValueError as error:
        raise ConfigError(f"executor_parameters of the site's settings: {error}") from error
    return executor


def _export_lines(environment: Mapping[str, str]) -> list[str]:
    """The variables again, in the script: sites may keep jobs from inheriting those of the submitter."""
    lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    root = package_root()
    if root:
        lines.append(f"export PYTHONPATH={shlex.quote(root)}${{PYTHONPATH:+:$PYTHONPATH}}")
    return lines


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
