"""Which launcher's variables count, and how Slurm's node lists are read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinov2.distributed.environment import ProcessEnvironment, parse_node_list, resolve
from dinov2.errors import ConfigError

TORCHRUN = {
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
}


def test_no_launcher_is_a_single_process():
    assert resolve({"HOME": "/root"}) == ProcessEnvironment()


def test_torchrun_variables_are_read():
    assert resolve(TORCHRUN) == ProcessEnvironment("torchrun", "10.0.0.1", 29500, 5, 8, 1, 4)


def test_complete_torchrun_variables_win_over_slurm():
    assert resolve(SLURM | TORCHRUN).launcher == "torchrun"


def test_slurm_tasks_are_read():
    environment = resolve(SLURM)
    assert environment.launcher == "slurm"
    assert (environment.rank, environment.world_size) == (3, 4)
    assert (environment.local_rank, environment.local_world_size) == (1, 2)
    assert environment.master_addr == "gpu07"


def test_all_slurm_tasks_of_a_job_agree_on_a_port_and_jobs_differ():
    ports = {resolve(SLURM | {"SLURM_PROCID": str(rank)}).master_port for rank in range(4)}
    assert len(ports) == 1
    assert all(20_000 <= port <= 60_000 for port in ports)
    assert resolve(SLURM | {"SLURM_JOB_ID": "4712"}).master_port not in ports


def test_slurm_uses_the_port_that_is_given_and_its_own_first_node():
    environment = resolve(SLURM | {"MASTER_PORT": "12345", "MASTER_ADDR": "elsewhere"})
    assert (environment.master_addr, environment.master_port) == ("gpu07", 12345)


@pytest.mark.parametrize("change", [{"SLURM_NTASKS": "1"}, {"SLURM_PROCID": ""}, {"SLURM_NTASKS": ""}])
def test_one_slurm_task_or_a_shell_inside_an_allocation_is_a_single_process(change):
    assert resolve(SLURM | change).launcher == "single"


def test_variables_round_trip_through_the_environment():
    environment = resolve(SLURM)
    assert resolve(environment.variables()).rank == environment.rank
    assert resolve(TORCHRUN).variables() == TORCHRUN


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR, MASTER_PORT, LOCAL_RANK, LOCAL_WORLD_SIZE"),
        ({name: TORCHRUN[name] for name in list(TORCHRUN)[:-1]}, "not LOCAL_WORLD_SIZE"),
        (TORCHRUN | {"RANK": "two"}, "RANK must be an integer, not 'two'"),
        (TORCHRUN | {"RANK": "8"}, "as 8 and 8"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "as -1 and 4"),
        (SLURM | {"SLURM_JOB_NODELIST": ""}, "SLURM_JOB_NODELIST is not set"),
        (SLURM | {"SLURM_NTASKS": "5"}, "5 tasks on 2 nodes"),
        (SLURM | {"SLURM_LOCALID": "x"}, "SLURM_LOCALID must be an integer"),
    ],
)
def test_incomplete_or_impossible_variables_are_named(environ, expected):
    with pytest.raises(ConfigError, match=expected):
        resolve(environ)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("hosta", ["hosta"]),
        ("hosta,hostb", ["hosta", "hostb"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("gpu[098-101]-ib", ["gpu098-ib", "gpu099-ib", "gpu100-ib", "gpu101-ib"]),
        ("rack[1-2]n[08-09],login", ["rack1n08", "rack1n09", "rack2n08", "rack2n09", "login"]),
    ],
)
def test_node_lists(text, hosts):
    assert parse_node_list(text) == hosts


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True), st.integers(1, 4))
def test_node_list_of_numbers_equals_the_list_written_out(numbers, width):
    short = "n[" + ",".join(f"{number:0{width}d}" for number in numbers) + "]"
    assert parse_node_list(short) == parse_node_list(",".join(f"n{number:0{width}d}" for number in numbers))


@pytest.mark.parametrize("text", ["", "n[1-3", "n1-3]", "n[1-x]", "n[1,[2]]", ","])
def test_a_node_list_that_cannot_be_read_is_refused(text):
    with pytest.raises(ConfigError, match="SLURM_JOB_NODELIST"):
        parse_node_list(text)
