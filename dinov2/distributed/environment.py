"""Who am I among the processes of this run? Reads the launcher's variables into one frozen record.

The order is: a complete set of torchrun variables, then Slurm when it started more than one task, then a
single process. torchrun comes first because inside a Slurm allocation both sets are present, and only
torchrun's describe the processes that were really started.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dinov2.errors import ConfigError

TORCHRUN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM_VARIABLES = ("SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_LOCALID")
# Above the well-known services; the end is included.
SLURM_PORT_RANGE = (20_000, 60_000)


@dataclass(frozen=True)
class ProcessEnvironment:
    """The place of one process in a run.

    Attributes:
        launcher: ``torchrun``, ``slurm`` or ``single`` (then no process group is needed).
        rank: Index among all processes, ``0..world_size - 1``.
        local_rank: Index among the processes of this machine; also the index of its CUDA device.
    """

    launcher: str = "single"
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def variables(self) -> dict[str, str]:
        """Return the record as the variables that ``init_process_group`` and child processes read."""
        return {name: str(getattr(self, name.lower())) for name in TORCHRUN_VARIABLES}


def resolve(environ: Mapping[str, str]) -> ProcessEnvironment:
    """Return the place of this process as the launcher's variables in ``environ`` describe it.

    Raises:
        ConfigError: Only some of torchrun's variables are set, or one of a set is not usable.
    """
    missing = [name for name in TORCHRUN_VARIABLES if not environ.get(name)]
    if not missing:
        return _from_torchrun(environ)
    # Without SLURM_PROCID the process sits in an allocation but was not started by srun: it is alone.
    if environ.get("SLURM_PROCID") and _integer(environ, "SLURM_NTASKS", default=1) > 1:
        return _from_slurm(environ)
    present = [name for name in TORCHRUN_VARIABLES if name not in missing]
    if present:
        raise ConfigError(
            f"the process environment sets {', '.join(present)} but not {', '.join(missing)}: "
            "start with torchrun, which sets all six, or unset them to run a single process"
        )
    return ProcessEnvironment()


def _from_torchrun(environ: Mapping[str, str]) -> ProcessEnvironment:
    return _checked(
        ProcessEnvironment(
            launcher="torchrun",
            master_addr=environ["MASTER_ADDR"],
            master_port=_integer(environ, "MASTER_PORT"),
            rank=_integer(environ, "RANK"),
            world_size=_integer(environ, "WORLD_SIZE"),
            local_rank=_integer(environ, "LOCAL_RANK"),
            local_world_size=_integer(environ, "LOCAL_WORLD_SIZE"),
        )
    )


def _from_slurm(environ: Mapping[str, str]) -> ProcessEnvironment:
    missing = [name for name in SLURM_VARIABLES if not environ.get(name)]
    if missing:
        raise ConfigError(
            f"this is a Slurm task (SLURM_PROCID={environ['SLURM_PROCID']}) but {', '.join(missing)} is not "
            "set: start it with srun or submitit, or use torchrun"
        )
    num_tasks = _integer(environ, "SLURM_NTASKS")
    num_nodes = _integer(environ, "SLURM_JOB_NUM_NODES")
    if num_tasks % num_nodes:
        raise ConfigError(
            f"Slurm started {num_tasks} tasks on {num_nodes} nodes, but every node must run equally many: "
            "use --ntasks-per-node"
        )
    if environ.get("MASTER_PORT"):
        port = _integer(environ, "MASTER_PORT")
    else:
        # All tasks must agree on a port without talking to each other; the job id is what they share.
        port = random.Random(environ.get("SLURM_JOB_ID", "0")).randint(*SLURM_PORT_RANGE)
    return _checked(
        ProcessEnvironment(
            launcher="slurm",
            master_addr=parse_node_list(environ["SLURM_JOB_NODELIST"])[0],
            master_port=port,
            rank=_integer(environ, "SLURM_PROCID"),
            world_size=num_tasks,
            local_rank=_integer(environ, "SLURM_LOCALID"),
            local_world_size=num_tasks // num_nodes,
        )
    )


def _checked(environment: ProcessEnvironment) -> ProcessEnvironment:
    for index, size, names in (
        (environment.rank, environment.world_size, "rank and world size"),
        (environment.local_rank, environment.local_world_size, "local rank and local world size"),
    ):
        if not 0 <= index < size:
            raise ConfigError(
                f"the {environment.launcher} variables give {names} as {index} and {size}, but the rank must "
                "be at least 0 and below the size: correct the launcher's settings"
            )
    return environment


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or default
    try:
        return int(text)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the environment variable {name} must be an integer, not {text!r}: correct or unset it"
        ) from error


def parse_node_list(text: str) -> list[str]:
    """Expand Slurm's short form of a list of hosts.

    ``hosta,hostb`` and ``n[1-3,7]`` and ``rack[1-2]-gpu[08-10]`` are all understood; leading zeros stay.

    Raises:
        ConfigError: Brackets do not match, or a range is not two numbers.
    """
    hosts = [host for item in _split_outside_brackets(text) for host in _expand(item, text)]
    if not hosts:
        raise ConfigError(f"the Slurm node list {text!r} names no host: check SLURM_JOB_NODELIST")
    return hosts


def _split_outside_brackets(text: str) -> list[str]:
    items = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(items) != text.strip(","):
        raise ConfigError(
            f"the Slurm node list {text!r} has brackets that do not match: check SLURM_JOB_NODELIST"
        )
    return [item.strip() for item in items]


def _expand(item: str, text: str) -> list[str]:
    """Expand the first bracket of one list item, and the rest by recursion."""
    head, bracket, tail = item.partition("[")
    if not bracket:
        return [item]
    inside, _, rest = tail.partition("]")
    numbers = [number for part in inside.split(",") for number in _expand_range(part, text)]
    return [f"{head}{number}{end}" for number in numbers for end in _expand(rest, text)]


def _expand_range(part: str, text: str) -> list[str]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
    if match is None:
        raise ConfigError(
            f"the Slurm node list {text!r} contains {part!r} where a number or a range such as 1-3 is "
            "expected: check SLURM_JOB_NODELIST"
        )
    first, last = match.group(1), match.group(2) or match.group(1)
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
