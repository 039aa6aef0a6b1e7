"""Seeding, the code's version, batch norms, and the historic way to load a backbone."""

import random
import re
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

from dinov2.errors import WeightsError
from dinov2.utils import utils


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_one_seed_fixes_all_three_generators():
    utils.fix_random_seeds(5)
    first = draw()
    utils.fix_random_seeds(5)
    assert draw() == first
    utils.fix_random_seeds(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_the_default_seed_is_31():
    utils.fix_random_seeds()
    first = draw()
    utils.fix_random_seeds(31)
    assert draw() == first


def test_sha_names_this_repository():
    text = utils.get_sha()
    assert re.fullmatch(
        r"sha: (\w+), status: (clean|has uncommitted changes), branch: .+|sha: N/A, status: N/A, branch: N/A",
        text,
    ), text
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert head.stdout.strip() in text


def test_sha_without_git_is_not_available(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert utils.get_sha() == "sha: N/A, status: N/A, branch: N/A"


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.BatchNorm1d(2), True),
        (nn.SyncBatchNorm(2), True),
        (nn.LayerNorm(2), False),
        (nn.GroupNorm(1, 2), False),
    ],
)
def test_batch_norms_are_found_at_any_depth(layer, expected):
    assert utils.has_batchnorms(nn.Sequential(nn.Linear(2, 2), nn.Sequential(layer))) is expected


def test_a_wrapped_teacher_is_loaded_and_a_file_of_another_model_refused(tmp_path):
    from dinov2.models.vision_transformer import vit_small

    def build():
        return vit_small(patch_size=14, img_size=28, block_chunks=0, init_values=1.0)

    source, target = build(), build()
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": {f"backbone.{name}": value for name, value in source.state_dict().items()}}, path)
    utils.load_pretrained_weights(target, str(path), "teacher")
    assert all(torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items())

    torch.save({"teacher": {"backbone.blocks.0.something": torch.zeros(1)}}, path)
    with pytest.raises(WeightsError):
        utils.load_pretrained_weights(build(), str(path), "teacher")
