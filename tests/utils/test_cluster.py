"""What a site can say about its cluster, and that nothing is assumed when it says nothing."""

import os
from pathlib import Path

import pytest

from dinov2.errors import ConfigError
from dinov2.utils import cluster
from dinov2.utils.cluster import ClusterType


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for name in list(os.environ):
        if name.startswith("DINOV2_"):
            monkeypatch.delenv(name)


def test_without_settings_nothing_is_assumed():
    assert cluster.get_cluster_type() is ClusterType.GENERIC
    assert cluster.get_slurm_partition() is None
    assert cluster.get_checkpoint_path() is None
    assert cluster.get_user_checkpoint_path() is None
    assert cluster.get_slurm_executor_parameters(2, 8) == {
        "mem_gb": 0,
        "gpus_per_node": 8,
        "tasks_per_node": 8,
        "cpus_per_task": 10,
        "nodes": 2,
        "slurm_partition": None,
    }


@pytest.mark.parametrize(
    ("kind", "cpus", "asks_for_memory"),
    [(ClusterType.FAIR, 10, True), (ClusterType.RSC, 12, True), (ClusterType.AWS, 12, False)],
)
def test_upstreams_clusters_can_still_be_named(kind, cpus, asks_for_memory):
    parameters = cluster.get_slurm_executor_parameters(1, 4, kind)
    assert parameters["cpus_per_task"] == cpus
    assert ("mem_gb" in parameters) is asks_for_memory
    assert parameters["slurm_partition"] is None


def test_arguments_win_and_a_machine_without_gpus_runs_one_task():
    parameters = cluster.get_slurm_executor_parameters(1, 0, cpus_per_task=3, slurm_comment="x")
    assert (parameters["gpus_per_node"], parameters["tasks_per_node"]) == (0, 1)
    assert (parameters["cpus_per_task"], parameters["slurm_comment"]) == (3, "x")


def test_variables_win_over_the_file(monkeypatch, tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "cluster: aws\npartition: slow\ncpus_per_task: 6\ncheckpoint_path: /shared\n"
        "executor_parameters: {slurm_account: lab}\n"
    )
    monkeypatch.setenv("DINOV2_CLUSTER_CONFIG", str(file))
    monkeypatch.setenv("DINOV2_SLURM_PARTITION", "fast")
    monkeypatch.setenv("DINOV2_MEM_GB", "120")
    monkeypatch.setenv("LOGNAME", "ada")
    assert cluster.get_cluster_type() is ClusterType.AWS
    assert cluster.get_user_checkpoint_path() == Path("/shared/ada")
    assert cluster.get_slurm_executor_parameters(1, 2) == {
        "mem_gb": 120,
        "gpus_per_node": 2,
        "tasks_per_node": 2,
        "cpus_per_task": 6,
        "nodes": 1,
        "slurm_partition": "fast",
        "slurm_account": "lab",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("partitions: fast", '"partitions".*did you mean "partition"'),
        ("cpus_per_gpu: 3", '"cpus_per_gpu".*did you mean "cpus_per_task"'),
        ("cpus_per_task: many", 'cpus_per_task is "many"'),
        ("cpus_per_task: 0", "at least 1"),
        ("timeout: 1.5", 'timeout is "1.5".*DINOV2_TIMEOUT'),
        ("partition: [a]", "partition is .* but must be a text"),
        ("setup: {a: b}", "setup is .* a list of texts"),
        ("environment: [A=1]", "environment is .* a mapping"),
        ("environment: {A-B: 1}", 'environment is "A-B".*names of variables'),
        ("environment: {A: yes}", 'environment.A is "True".*in quotes'),
        ("executor_parameters: x", "executor_parameters is .* a mapping"),
        ("cluster: aw", '"aw" is not known'),
        ("a: [", "no readable YAML file"),
        ("- fast", "no mapping"),
    ],
)
def test_mistakes_in_the_file_are_named(monkeypatch, tmp_path, text, expected):
    (tmp_path / "cluster.yaml").write_text(text)
    monkeypatch.setenv("DINOV2_CLUSTER_CONFIG", str(tmp_path / "cluster.yaml"))
    with pytest.raises(ConfigError, match=expected):
        cluster.get_cluster_type()


def test_gpus_can_be_asked_for_by_their_name(monkeypatch, tmp_path):
    (tmp_path / "cluster.yaml").write_text("gres: gpu:a100\nsetup: module load cuda\nqos: long\n")
    monkeypatch.setenv("DINOV2_CLUSTER_CONFIG", str(tmp_path / "cluster.yaml"))
    parameters = cluster.get_slurm_executor_parameters(1, 4, slurm_qos="short")
    assert parameters["slurm_gres"] == "gpu:a100:4"
    assert "gpus_per_node" not in parameters
    assert (parameters["slurm_setup"], parameters["slurm_qos"]) == (["module load cuda"], "short")
    assert "slurm_gres" not in cluster.get_slurm_executor_parameters(1, 0)


def test_an_absent_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DINOV2_CLUSTER_CONFIG", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match=r"none\.yaml, which is no readable YAML file"):
        cluster.read_settings()
