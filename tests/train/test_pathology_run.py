"""The forks' way of training, from a tree of tiles to two processes: index, path map, a few iterations."""

import json
import os
import subprocess
import sys

import numpy as np
import yaml

from tests.conftest import REPO
from tests.data.conftest import encoded, tile_tree, tiles  # noqa: F401 - fixtures

TINY = {
    "student": {"arch": "vit_tiny", "embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 14},
    "crops": {"global_crops_size": 28, "local_crops_size": 14, "local_crops_number": 2},
    "dino": {"head_n_prototypes": 32, "head_hidden_dim": 32, "head_bottleneck_dim": 16},
    "ibot": {"head_n_prototypes": 32, "head_hidden_dim": 32, "head_bottleneck_dim": 16},
    "train": {"batch_size_per_gpu": 2, "num_workers": 1, "device": "cpu", "OFFICIAL_EPOCH_LENGTH": 2},
    "optim": {"epochs": 2, "warmup_epochs": 0},
}


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_from_tiles_to_two_processes(tile_tree):  # noqa: F811
    """The paths were recorded as on the forks' host 11; ``train.path_map`` says where they are here."""
    (tile_tree / "entry.csv").unlink()
    said = run("scripts/build_index.py", "--patches", str(tile_tree / "patches"), "--extra", str(tile_tree))
    assert "8 tiles of 3 slides" in said
    assert len(np.load(tile_tree / "entries-TRAIN.npy")) == 8

    (tile_tree / "entry.csv").write_text("patches_path\n/data/tcga/patches\n")
    config = tile_tree / "config.yaml"
    config.write_text(yaml.safe_dump(TINY))
    run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "dinov2/train/train.py"),
        *("--no-resume", "--config-file", str(config), "--output-dir", str(tile_tree / "out")),
        "train.dataset_path=Pathology:split=TRAIN:root=/data/tcga:extra=/data/tcga:sshid=13",
        f"train.path_map={{/data/tcga: {tile_tree}}}",
    )
    lines = (tile_tree / "out" / "training_metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines][-1] == 3
    assert all(np.isfinite(json.loads(line)["total_loss"]) for line in lines)
