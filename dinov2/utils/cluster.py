"""What submitting a job needs to know about the cluster.

Nothing is guessed from host names, and no partition or folder is assumed. A site states its own in
environment variables or in one YAML file named by ``DINOV2_CLUSTER_CONFIG``; options of the command line win
over variables, and variables over the file. docs/launching.md shows a file with every key.
"""

import getpass
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from dinov2.errors import ConfigError, nearest

CONFIG_VARIABLE = "DINOV2_CLUSTER_CONFIG"
VARIABLES = {
    "cluster": "DINOV2_CLUSTER",
    "partition": "DINOV2_SLURM_PARTITION",
    "account": "DINOV2_SLURM_ACCOUNT",
    "qos": "DINOV2_SLURM_QOS",
    "constraint": "DINOV2_SLURM_CONSTRAINT",
    "checkpoint_path": "DINOV2_CHECKPOINT_PATH",
    "cpus_per_task": "DINOV2_CPUS_PER_TASK",
    "mem_gb": "DINOV2_MEM_GB",
    "timeout": "DINOV2_TIMEOUT",
    "signal_delay": "DINOV2_SIGNAL_DELAY",
}
# Smallest value of each number.
NUMBERS = {"cpus_per_task": 1, "mem_gb": 0, "timeout": 1, "signal_delay": 1, "max_timeouts": 0}


class ClusterType(Enum):
    """Kinds of cluster that differ in what a job asks for; every member but ``GENERIC`` is upstream's."""

    GENERIC = "generic"
    AWS = "aws"
    FAIR = "fair"
    RSC = "rsc"


@dataclass(frozen=True)
class ClusterSettings:
    """A site's own choices; None means that nothing was said.

    Attributes:
        cluster: A :class:`ClusterType` by its value.
        partition, account, qos, constraint: As of ``sbatch``.
        checkpoint_path: Folder that all users share for results.
        cpus_per_task: CPU cores of each process, that is, of each GPU.
        mem_gb: Memory of a node; 0 means all of it.
        gres: Name of the GPUs, such as ``gpu:a100``: asks ``--gres=gpu:a100:<n>`` instead of
            ``--gpus-per-node=<n>``.
        timeout: Minutes until a job is queued again.
        signal_delay: Seconds before that at which the job is told to save.
        max_timeouts: How often a job that ran into its limit is queued again.
        python: Command that starts Python in the job, such as one of a container.
        setup: Shell commands of the batch script before the job starts, such as ``module load cuda``.
        environment: Variables of the jobs, such as ``NCCL_SOCKET_IFNAME``.
        srun_args: Further arguments of ``srun``.
        executor_parameters: Anything else that submitit understands, in the words of its ``AutoExecutor``.
    """

    cluster: str = ClusterType.GENERIC.value
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    checkpoint_path: str | None = None
    cpus_per_task: int | None = None
    mem_gb: int | None = None
    gres: str | None = None
    timeout: int | None = None
    signal_delay: int | None = None
    max_timeouts: int | None = None
    python: str | None = None
    setup: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    srun_args: tuple[str, ...] = ()
    executor_parameters: dict[str, Any] = field(default_factory=dict)


def read_settings(environ: Mapping[str, str] | None = None) -> ClusterSettings:
    """Return the site's settings, from the file that ``environ`` names and from its variables.

    Args:
        environ: None means this process's.

    Raises:
        ConfigError: The file is absent, has an unknown key or a value of the wrong kind.
    """
    environ = os.environ if environ is None else environ
    values = _read_file(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else {}
    values |= {key: environ[name] for key, name in VARIABLES.items() if environ.get(name)}
    convert = {"setup": _texts, "srun_args": _texts, "environment": _environment}
    convert |= dict.fromkeys(NUMBERS, _integer) | {"executor_parameters": _mapping}
    values = {key: convert.get(key, _text)(key, value) for key, value in values.items() if value is not None}
    return ClusterSettings(**values)


def _read_file(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{CONFIG_VARIABLE} names {path}, which is no readable YAML file: correct or unset it"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is a {type(values).__name__} and no mapping: write key: value lines")
    accepted = [item.name for item in fields(ClusterSettings)]
    for key in values:
        if key not in accepted:
            raise ConfigError(
                f'{path} has the unknown key "{key}"{nearest(key, accepted)}: use {", ".join(accepted)}'
            )
    return values


def _wrong(key: str, value: Any, wanted: str) -> ConfigError:
    places = [VARIABLES[key]] if key in VARIABLES else []
    return ConfigError(
        f'the cluster setting {key} is "{value}", but must be {wanted}: correct '
        f"{' or '.join([*places, 'the file named by ' + CONFIG_VARIABLE])}"
    )


def _integer(key: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError) as error:
        raise _wrong(key, value, "a whole number") from error
    if isinstance(value, (bool, float)) or number < NUMBERS[key]:
        raise _wrong(key, value, f"a whole number of at least {NUMBERS[key]}")
    return number


def _text(key: str, value: Any) -> str:
    if isinstance(value, (dict, list, bool)):
        raise _wrong(key, value, "a text")
    return str(value)


def _texts(key: str, value: Any) -> tuple[str, ...]:
    """One text, or a list of them."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise _wrong(key, value, "a list of texts")
    return tuple(values)


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(key, value, "a mapping, key: value lines below it")
    return dict(value)


def _environment(key: str, value: Any) -> dict[str, str]:
    for name, content in _mapping(key, value).items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
            raise _wrong(key, name, "a mapping whose keys are names of variables")
        if isinstance(content, (dict, list, bool)) or content is None:
            # YAML reads an unquoted `yes` as a truth value, and nobody knows what should become of it.
            raise _wrong(
                f"{key}.{name}", content, "a text or a number, in quotes where YAML takes it otherwise"
            )
    return {str(name): str(content) for name, content in value.items()}


def get_cluster_type(cluster_type: ClusterType | None = None) -> ClusterType:
    """Return ``cluster_type``, or the kind that the site's settings name.

    Raises:
        ConfigError: The settings name an unknown kind.
    """
    if cluster_type is not None:
        return cluster_type
    name = read_settings().cluster
    accepted = [member.value for member in ClusterType]
    if name not in accepted:
        raise ConfigError(
            f'the cluster "{name}" is not known{nearest(name, accepted)}: use {", ".join(accepted)}'
        )
    return ClusterType(name)


def get_checkpoint_path(cluster_type: ClusterType | None = None) -> Path | None:
    """Return the folder that all users share for checkpoints, None where the site has not named one.

    Args:
        cluster_type: Has no effect, as no kind of cluster has a folder of its own here.
    """
    path = read_settings().checkpoint_path
    return Path(path) if path else None


def get_user_checkpoint_path(cluster_type: ClusterType | None = None) -> Path | None:
    """Return this user's folder inside :func:`get_checkpoint_path`, None where there is none."""
    path = get_checkpoint_path(cluster_type)
    return path / getpass.getuser() if path else None


def get_slurm_partition(cluster_type: ClusterType | None = None) -> str | None:
    """Return the partition to submit to, None for the default one of the cluster."""
    return read_settings().partition


def get_slurm_executor_parameters(
    nodes: int, num_gpus_per_node: int, cluster_type: ClusterType | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Return what to ask submitit for.

    Args:
        nodes: Number of machines.
        num_gpus_per_node: GPUs of each; one process is started per GPU, and one where there is none.
        cluster_type: None means the one of the site's settings.
        kwargs: Further submitit parameters; they win over the site's settings.
    """
    settings, kind = read_settings(), get_cluster_type(cluster_type)
    default_cpus = 12 if kind in (ClusterType.AWS, ClusterType.RSC) else 10
    parameters: dict[str, Any] = {
        "mem_gb": settings.mem_gb if settings.mem_gb is not None else 0,
        "gpus_per_node": num_gpus_per_node,
        "tasks_per_node": max(num_gpus_per_node, 1),
        "cpus_per_task": settings.cpus_per_task or default_cpus,
        "nodes": nodes,
        "slurm_partition": get_slurm_partition(kind),
    }
    if kind is ClusterType.AWS and settings.mem_gb is None:
        # Its nodes are not shared, and its Slurm does not manage memory.
        del parameters["mem_gb"]
    if settings.gres and num_gpus_per_node:
        # Both together would be two requests.
        del parameters["gpus_per_node"]
        parameters["slurm_gres"] = f"{settings.gres}:{num_gpus_per_node}"
    for key in ("account", "qos", "constraint"):
        if getattr(settings, key):
            parameters[f"slurm_{key}"] = getattr(settings, key)
    for key in ("setup", "srun_args"):
        if getattr(settings, key):
            parameters[f"slurm_{key}"] = list(getattr(settings, key))
    return parameters | settings.executor_parameters | kwargs
