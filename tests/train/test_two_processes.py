"""Two processes over gloo train exactly what one process trains on the same global batch."""

import pytest
import torch
from omegaconf import OmegaConf

from dinov2.configs import dinov2_default_config
from tests.conftest import GOLDEN
from tests.distributed.launch import run_script
from tests.train import parallel_worker


def train(config_file, output, processes):
    if processes == 1:
        parallel_worker.main(str(config_file), str(output))
    else:
        run_script("tests/train/parallel_worker.py", str(config_file), str(output), world_size=processes)
    return torch.load(output, weights_only=True)


def five_steps():
    """A config of five steps whose result does not depend on how a batch is split."""
    cfg = OmegaConf.load(GOLDEN / "meta_centering_separate.yaml")
    cfg.student.arch = "vit_tiny"
    cfg.student.embed_dim, cfg.student.depth, cfg.student.num_heads = 48, 2, 3
    # With LayerScale near 0 all cls tokens of a fresh network coincide, and KoLeo amplifies rounding.
    cfg.student.layerscale = 1.0
    # DINOv2's KoLeo looks for neighbours within a rank; among all ranks it does not depend on the split.
    cfg.dino.koleo_scope = "global"
    cfg.optim.epochs = 5
    cfg.optim.warmup_epochs = 0
    cfg.optim.freeze_last_layer_epochs = 0
    return cfg


def compare(cfg, tmp_path):
    """Train with one process and with two, and return the first's result if both agree."""
    config_file = tmp_path / "config.yaml"
    OmegaConf.save(cfg, config_file)

    one = train(config_file, tmp_path / "one.pt", processes=1)
    two = train(config_file, tmp_path / "two.pt", processes=2)

    for step, (expected, got) in enumerate(zip(one["losses"], two["losses"], strict=True)):
        assert got == pytest.approx(expected, rel=1e-5), step
    for expected, got in zip(one["grad_norms"], two["grad_norms"], strict=True):
        assert got == pytest.approx(expected, rel=1e-4)
    assert one["state"].keys() == two["state"].keys()
    for name, expected in one["state"].items():
        got = two["state"][name]
        if name.endswith(("attn.qkv.bias", "attn.qkv.base_layer.bias")):
            # Softmax ignores the key bias: its gradient is rounding noise, which Adam scales up.
            (query, _, value), (query_got, _, value_got) = expected.chunk(3), got.chunk(3)
            expected, got = torch.cat((query, value)), torch.cat((query_got, value_got))
        # Adam makes much of small gradients: 3e-5 was seen with PyTorch 2.10, for the bias of a norm.
        assert (got - expected).norm() <= 5e-5 * expected.norm() + 1e-7, name
    return one


@pytest.mark.parametrize(
    ("separate_head", "centering"),
    [
        pytest.param(False, "sinkhorn_knopp", id="shared-sinkhorn_knopp"),
        pytest.param(True, "centering", id="separate-centering", marks=pytest.mark.slow),
        pytest.param(False, "centering", id="shared-centering", marks=pytest.mark.slow),
        pytest.param(True, "sinkhorn_knopp", id="separate-sinkhorn_knopp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(separate_head, centering, tmp_path):
    cfg = five_steps()
    cfg.train.centering = centering
    cfg.ibot.separate_head = separate_head
    one = compare(cfg, tmp_path)
    moved = [one["losses"][0]["total_loss"], one["losses"][-1]["total_loss"]]
    assert abs(moved[0] - moved[1]) > 1e-2, "nothing was learned, so nothing was compared"


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4], ids=["whole", "lora"])
def test_two_processes_equal_one_when_the_backbone_joins_later(lora_rank, tmp_path):
    cfg = OmegaConf.merge(dinov2_default_config, five_steps())
    cfg.train.freeze_backbone_iterations = 2
    cfg.student.lora_rank = lora_rank
    one = compare(cfg, tmp_path)
    still = [norms["backbone"] == 0 for norms in one["grad_norms"]]
    assert still == [True, True, False, False, False]
