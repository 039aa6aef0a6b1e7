"""The trainer on a mixture of shards and loose tiles, in two processes."""

import json
import os
import subprocess
import sys

import pytest
import webdataset
import yaml

from dinov2.configs import resolve_config
from dinov2.data.datasets import Pathology
from dinov2.train.input import build_dataset
from tests.conftest import REPO
from tests.train.conftest import TINY


@pytest.fixture
def parts(tmp_path, tile_folder):
    """Dataset strings: six tiles in two shards, and eight tiles of one slide."""
    images = [path.read_bytes() for path in sorted((tile_folder / "nest").iterdir())]
    (tmp_path / "h+e").mkdir()
    with webdataset.ShardWriter(f"{tmp_path}/h+e/%02d.tar", maxcount=3, verbose=0) as writer:
        for number, data in enumerate(images[:6]):
            writer.write({"__key__": f"{number:03d}", "png": data})
    slide = tmp_path / "patches" / "slide"
    slide.mkdir(parents=True)
    for number, data in enumerate(images[6:14]):
        (slide / f"slide_patch_{number}.jpeg").write_bytes(data)
    (tmp_path / "entry.csv").write_text(f"patches_path\n{slide.parent}\n")
    Pathology(split="TRAIN", root=str(tmp_path), extra=str(tmp_path)).dump_extra()
    return [f"WebDataset:root={tmp_path}/h+e", f"2*Pathology:split=TRAIN:root={tmp_path}:extra={tmp_path}"]


@pytest.mark.slow
def test_two_processes_train_on_a_list_of_datasets(parts, tmp_path):
    config = yaml.safe_load(TINY)
    config["train"] |= {"dataset_path": parts, "num_workers": 1, "device": "cpu"}
    config["optim"] |= {"epochs": 1, "warmup_epochs": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(REPO / "dinov2/train/train.py"), "--config-file", str(tmp_path / "config.yaml")]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "training_metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2]
    log = (tmp_path / "run" / "logs" / "log.txt").read_text()
    assert "mixture of 2 datasets, a pass is 18 draws: WebDataset 6 images, 33.33% of draws" in log
    assert len(list((tmp_path / "h+e").glob("webdataset-*.npy"))) == 1


def test_the_command_line_takes_a_mixture_as_one_word(parts, tmp_path):
    (tmp_path / "config.yaml").write_text(TINY)
    override = f"train.dataset_path={parts[1]}+{parts[0]}"
    dataset = build_dataset(resolve_config(str(tmp_path / "config.yaml"), [override]))
    assert dataset.names == ["Pathology", "WebDataset"]
    assert len(dataset) == 18
    assert len(dataset[17][0]["global_crops"]) == 2
