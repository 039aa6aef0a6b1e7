"""A tiny run on real tissue: 32 px windows of the carcinoma picture, a two-block ViT."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from dinov2.configs import resolve_config
from dinov2.train import get_args_parser, main
from tests.conftest import REAL_DATA

TINY = """
compute_precision:
  teacher: &fp32
    backbone: {mixed_precision: {param_dtype: fp32}}
    dino_head: {mixed_precision: {param_dtype: fp32}}
    ibot_head: {mixed_precision: {param_dtype: fp32}}
  student: *fp32
student: {arch: vit_tiny, embed_dim: 32, depth: 2, num_heads: 2, patch_size: 8, drop_path_rate: 0.2,
          layerscale: 1.0}
dino: {head_n_prototypes: 32, head_hidden_dim: 32, head_bottleneck_dim: 16}
train: {batch_size_per_gpu: 4, num_workers: 0, OFFICIAL_EPOCH_LENGTH: 3, log_period: 1}
teacher: {warmup_teacher_temp_epochs: 1}
optim: {epochs: 2, warmup_epochs: 1, freeze_last_layer_epochs: 1}
crops: {global_crops_size: 32, local_crops_size: 16, local_crops_number: 2}
evaluation: {eval_period_iterations: 3, monitor_period: 0, monitor_samples: 16}
"""


@pytest.fixture(scope="session")
def tile_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "nest").mkdir()
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as picture:
        for number in range(24):
            left, top = 32 * (number % 6), 700 + 32 * (number // 6)
            picture.crop((left, top, left + 32, top + 32)).save(folder / "nest" / f"{number:02d}.png")
    return folder


class TinyRun:
    """Starts the trainer in this process, as its command line would."""

    def __init__(self, folder: Path, tiles: Path) -> None:
        self.config = folder / "tiny.yaml"
        self.config.write_text(TINY)
        self.dataset = f"ImageFolder:root={tiles}"

    def resolve(self, *overrides: str):
        return resolve_config(str(self.config), [f"train.dataset_path={self.dataset}", *overrides])

    def start(self, output_dir: Path, *overrides: str, options: tuple[str, ...] = ()) -> None:
        words = ["--config-file", str(self.config), "--output-dir", str(output_dir), *options]
        words += [f"train.dataset_path={self.dataset}", *overrides]
        main(get_args_parser().parse_args(words))


@pytest.fixture
def tiny(tmp_path, tile_folder) -> TinyRun:
    return TinyRun(tmp_path, tile_folder)


def written_config(output_dir: Path):
    return OmegaConf.load(output_dir / "config.yaml")
