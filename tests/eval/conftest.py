"""Small labelled folders of real tissue windows, and a tiny ViT with weights on disk to evaluate on them."""

import csv
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinov2.configs import resolve_config
from dinov2.models import build_model_from_cfg
from tests.conftest import REAL_DATA, REPO

WINDOW = 64
# Odd sizes: neither divides by two or three processes.
PER_CLASS = {"train": 11, "test": 5}
LABELS = ("connective", "inflammatory", "neoplastic")

TINY_CONFIG = """
student: {arch: vit_tiny, patch_size: 32, embed_dim: 48, depth: 4, num_heads: 3, layerscale: 1.0}
crops: {global_crops_size: 224, local_crops_size: 96}
train: {device: cpu}
"""


@dataclass(frozen=True)
class TinyCase:
    """What an evaluation needs on its command line."""

    config: Path
    weights: Path
    train: str
    val: str

    def options(self, output_dir: Path) -> list[str]:
        options = {
            "--config-file": self.config,
            "--pretrained-weights": self.weights,
            "--output-dir": output_dir,
            "--train-dataset": self.train,
            "--val-dataset": self.val,
            "--num-workers": 0,
        }
        return [str(part) for option in options.items() for part in option]


@pytest.fixture(scope="session")
def tiny_case(tmp_path_factory) -> TinyCase:
    folder = tmp_path_factory.mktemp("tiny_case")
    write_nucleus_windows(folder)
    config = folder / "tiny.yaml"
    config.write_text(TINY_CONFIG)
    torch.manual_seed(0)
    model, _ = build_model_from_cfg(resolve_config(str(config), []), only_teacher=True)
    weights = folder / "teacher_checkpoint.pth"
    torch.save(
        {"teacher": {f"backbone.{name}": value for name, value in model.state_dict().items()}}, weights
    )
    return TinyCase(config, weights, f"ImageFolder:root={folder}/train", f"ImageFolder:root={folder}/test")


def write_nucleus_windows(folder: Path) -> None:
    """Write windows round labelled nuclei as ``<split>/<label>/<n>.png``."""
    picture = Image.open(REAL_DATA / "hgsc_nest.jpg")
    written: Counter = Counter()
    with (REAL_DATA / "hgsc_nuclei.csv").open() as file:
        for row in csv.DictReader(file):
            group = (row["split"], row["label"])
            if row["image"] != "hgsc_nest.jpg" or written[group] >= PER_CLASS.get(row["split"], 0):
                continue
            left, top = (int(float(row[axis])) - WINDOW // 2 for axis in "xy")
            path = folder / row["split"] / row["label"] / f"{written[group]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.crop((left, top, left + WINDOW, top + WINDOW)).save(path)
            written[group] += 1


@pytest.fixture(scope="session")
def tiny_backbone(tiny_case) -> torch.nn.Module:
    model, _ = build_model_from_cfg(resolve_config(str(tiny_case.config), []), only_teacher=True)
    state = torch.load(tiny_case.weights, weights_only=True)["teacher"]
    model.load_state_dict({name.removeprefix("backbone."): value for name, value in state.items()})
    return model.eval()


def run_script(name: str, options: list[str], processes: int = 1) -> subprocess.CompletedProcess:
    """Run ``dinov2/eval/<name>.py`` as a user would, under torchrun for more than one process."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_", "RANK"))
    }
    return subprocess.run(
        [*launcher, str(REPO / "dinov2" / "eval" / f"{name}.py"), *options],
        env=environment | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
