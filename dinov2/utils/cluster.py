"""What submitting a job needs to know about the cluster.

Nothing is guessed from host names, and no partition or folder is assumed. A site states its own in
environment variables or in one YAML file named by ``DINOV2_CLUSTER_CONFIG``; variables win over the file::

    cluster: generic                  # DINOV2_CLUSTER: generic, aws, fair or rsc
    partition: gpu                    # DINOV2_SLURM_PARTITION
    checkpoint_path: /shared/models   # DINOV2_CHECKPOINT_PATH
    cpus_per_task: 12                 # DINOV2_CPUS_PER_TASK
    mem_gb: 0                         # DINOV2_MEM_GB; 0 means all memory of a node
    executor_parameters:              # anything else that submitit understands
      slurm_account: pathology
"""

import getpass
import os
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
    "checkpoint_path": "DINOV2_CHECKPOINT_PATH",
    "cpus_per_task": "DINOV2_CPUS_PER_TASK",
    "mem_gb": "DINOV2_MEM_GB",
}


class ClusterType(Enum):
    """Kinds of cluster that differ in what a job asks for; every member but ``GENERIC`` is upstream's."""

    GENERIC = "generic"
    AWS = "aws"
    FAIR = "fair"
    RSC = "rsc"


@dataclass(frozen=True)
class ClusterSettings:
    """A site's own choices; None means that nothing was said."""

    cluster: str = ClusterType.GENERIC.value
    partition: str | None = None
    checkpoint_path: str | None = None
    cpus_per_task: int | None = None
    mem_gb: int | None = None
    executor_parameters: dict[str, Any] = field(default_factory=dict)


def read_settings(environ: Mapping[str, str] | None = None) -> ClusterSettings:
    """Return the site's settings, from the file that ``environ`` names and from its variables.

    Args:
        environ: None means this process's.

    Raises:
        ConfigError: The file is absent or has an unknown key, or a number is not one.
    """
    environ = os.environ if environ is None else environ
    values = _read_file(environ[CONFIG_VARIABLE]) if environ.get(CONFIG_VARIABLE) else {}
    values |= {key: environ[name] for key, name in VARIABLES.items() if environ.get(name)}
    for key in ("cpus_per_task", "mem_gb"):
        if values.get(key) is not None:
            values[key] = _integer(key, values[key])
    return ClusterSettings(**values)


def _read_file(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
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


def _integer(key: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f'the cluster setting {key} is "{value}", but must be a whole number: correct {VARIABLES[key]} '
            f"or the file named by {CONFIG_VARIABLE}"
        ) from error


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
    parameters = {
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
    return parameters | settings.executor_parameters | kwargs
