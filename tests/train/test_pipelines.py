"""Training on each pipeline: the trainer's own batches, losses and self-check."""

import json

import pytest
import torch

from dinov2.train import SSLMetaArch
from dinov2.train.input import build_data_loader, build_dataset
from dinov2.utils.seeding import seed_everything


def first_losses(cfg):
    seed_everything(0)
    model = SSLMetaArch(cfg)
    model.prepare_for_distributed_training()
    model.train()
    loader = build_data_loader(cfg, build_dataset(cfg), 0, model.precision.input_dtype)
    images = next(iter(loader))
    seed_everything(1)
    with torch.no_grad():
        losses = model.compute_losses(images, 0.05)
    return torch.stack([losses.total, *losses.logged.values()])


@pytest.mark.parametrize("workers", [0, 2])
def test_losses_of_the_three_pipelines(tiny, workers):
    reference, fast, device = (
        first_losses(tiny.resolve(f"crops.pipeline={name}", f"train.num_workers={workers}"))
        for name in ("reference", "fast", "device")
    )
    torch.testing.assert_close(device, fast, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fast, reference, rtol=0.01, atol=0.01)
    assert not torch.equal(fast, reference)  # the options do reach the crops


@pytest.mark.parametrize("pipeline", ["fast", "device"])
def test_a_run_and_its_self_check(tiny, tmp_path, pipeline):
    options = ["crops.scale_reference=crop", "crops.hed_jitter=0.05", "crops.hed_jitter_prob=0.5"]
    scales = ["crops.global_crops_scale=[0.3,1.0]", "crops.local_crops_scale=[0.3,1.5]"]
    output = tmp_path / "run"
    tiny.start(output, f"crops.pipeline={pipeline}", *options, *scales, "optim.epochs=1")
    assert len((output / "training_metrics.json").read_text().splitlines()) == 3
    found = json.loads((output / "self_check.json").read_text())["lines"]
    lines = {line["name"]: line for line in found}
    assert lines["normalisation: crops"]["status"] == "ok"
    assert lines["global crops"]["status"] == "ok"
