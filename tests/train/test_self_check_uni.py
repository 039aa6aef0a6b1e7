"""A run as the fork made it: a timm ViT such as UNI in an adapter. Each of its silent faults is named."""

import math

import pytest
import torch
from torch import nn

from dinov2.models.report import LoadReport
from dinov2.train import SSLMetaArch
from dinov2.train.initial_weights import InitialWeights, Part, fingerprint
from dinov2.train.input import build_dataset
from dinov2.train.optimizer import build_optimizer
from dinov2.train.self_check import run_self_check
from dinov2.utils.seeding import seed_everything

WIDTH, DEPTH, HEADS, PATCH = 48, 3, 3, 16
TILES = 64  # pixels of a global crop

# The fork's values for UNI, at a reduced size.
FORK = [
    *(f"student.embed_dim={WIDTH}", f"student.depth={DEPTH}", f"student.num_heads={HEADS}"),
    *(f"student.patch_size={PATCH}", "student.layerscale=1e-5", "student.qkv_bias=false"),
    *("student.drop_path_rate=0.3", "student.drop_path_uniform=false", "optim.layerwise_decay=0.9"),
    *("ibot.separate_head=true", "train.centering=sinkhorn_knopp", "teacher.teacher_temp=0.1"),
    *("ibot.head_n_prototypes=32", "ibot.head_hidden_dim=32", "ibot.head_bottleneck_dim=16"),
    *("optim.base_lr=3e-4", "optim.scaling_rule=sqrt_wrt_1024", "crops.vertical_flip_prob=0.5"),
    *(f"crops.global_crops_size={TILES}", "crops.local_crops_size=32"),
]


class Adapter(nn.Module):
    """A timm model behind DINOv2's interface, with the shortcuts of the fork's adapter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.embed_dim = model.num_features

    def forward(self, x, masks=None, is_training=False):
        if isinstance(x, list):
            return [self(crops, is_training=is_training) for crops in x]
        tokens = self.model.forward_features(x)
        if not is_training:
            return tokens[:, 0]
        return {
            "x_norm_clstoken": tokens[:, 0],
            "x_norm_regtokens": tokens[:, 1:1],
            "x_norm_patchtokens": tokens[:, 1:],
            "x_prenorm": tokens,
            "masks": masks,
        }


def uni(registers: int) -> nn.Module:
    """UNI's options at a reduced size; with registers as timm's ``reg4`` models have them."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=TILES,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        init_values=1e-5,
        num_classes=0,
        dynamic_img_size=True,
        reg_tokens=registers,
    )


def shake(module: nn.Module, seed: int) -> None:
    """Stand for training: heads of a student and a teacher that have moved apart."""
    seed_everything(seed)
    for parameter in module.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))


@pytest.fixture(params=[0, 4], ids=["uni", "registers"])
def checked(request, tiny, tmp_path):
    """(name -> line of the self-check, number of registers) of the fork's run."""
    pytest.importorskip("timm")
    cfg = tiny.resolve(*FORK)
    cfg.train.output_dir = str(tmp_path / "run")
    cfg.head.head_path = "eval/training_4049"
    cfg.train.init_weights_from_chkpt = "hf-hub:MahmoodLab/uni"
    cfg.optim.lr = cfg.optim.base_lr * math.sqrt(cfg.train.batch_size_per_gpu / 768)

    built = tiny.resolve(*FORK)
    seed_everything(0)
    model = SSLMetaArch(built)
    pretrained = uni(request.param)
    parts = {}
    for network in (model.student, model.teacher):
        network["backbone"] = Adapter(uni(request.param))
        network["backbone"].model.load_state_dict(pretrained.state_dict())
    model.teacher["backbone"].requires_grad_(False)
    source = cfg.train.init_weights_from_chkpt
    parts["student.backbone"] = Part(LoadReport(source, []), fingerprint(model.student["backbone"]))
    for seed, network in enumerate(("student", "teacher")):
        head = getattr(model, network)["dino_head"]
        shake(head, seed)
        path = f"{cfg.head.head_path}/{network}_dino_head_checkpoint.pth"
        parts[f"{network}.dino_head"] = Part(LoadReport(path, []), fingerprint(head))
    # The fork's preparation: every part of the teacher becomes the student's copy, loaded or not.
    for name, module in model.student.items():
        model.teacher[name].load_state_dict(module.state_dict())
    model.train()

    optimizer = build_optimizer(cfg, model.get_params_groups())
    initial = InitialWeights(parts)
    check = run_self_check(cfg, model, optimizer, build_dataset(cfg), initial=initial, start_iteration=0)
    return {line.name: line for line in check.lines}, request.param


def test_every_silent_fault_of_the_forks_run_is_named(checked):
    lines, registers = checked
    wrong = {name: line.text for name, line in lines.items() if line.status == "wrong"}
    note = {name: line.text for name, line in lines.items() if line.status == "note"}

    # (a) masks have no effect
    assert "ignores the masks" in wrong["masks"]
    # (b) no stochastic depth
    assert "identical although student.drop_path_rate is 0.3" in wrong["drop path"]
    # (c) registers in front of the patches pass for patches
    grid = (TILES // PATCH) ** 2
    if registers:
        assert f"{grid + registers} patch tokens instead of {grid}" in wrong["tokens: patches"]
    else:
        assert lines["tokens: patches"].status == "ok"
    # (d) normalised tokens under the name x_prenorm
    assert "normalised tokens" in wrong["tokens: before the norm"]
    # (e) every block learns at the full rate
    assert "layerwise_decay 0.9 is lost" in wrong["learning rate by block"]
    table = lines["learning rate by block"].values["table"]
    assert table["block 0"]["lr"] == table[f"block {DEPTH - 1}"]["lr"] == table["dino_head"]["lr"]
    # (f) one pass for every crop size
    assert "each size runs by itself (2 passes" in note["crops in one call"]
    # (g) the config says no bias, UNI has them
    assert wrong["architecture"] == "student.qkv_bias is false and the model has true"
    # (h) the teacher's loaded head is lost
    assert "the student's copy has overwritten it" in wrong["teacher: dino_head"]
    # (i) a teacher as flat as the student
    assert "no sharper than the student" in note["temperatures"]
    # (j) the iBOT head starts anew beside a loaded DINO head
    assert "random weights although head.head_path" in wrong["head: ibot_head"]
    assert lines["head: dino_head"].status == "ok"
    # (k) 768 under the name of 1024
    assert "it is that of sqrt_wrt_768" in wrong["learning rate"]

    expected = {
        *("masks", "drop path", "tokens: before the norm", "learning rate by block", "architecture"),
        *("teacher: dino_head", "head: ibot_head", "learning rate"),
    }
    assert wrong.keys() == expected | ({"tokens: patches"} if registers else set())


def test_the_parameters_of_the_adapter_are_all_in_the_optimizer(checked):
    lines, _ = checked
    assert lines["optimizer: parameters"].status == "ok"
    assert lines["weights: source"].text == "the backbone was read from hf-hub:MahmoodLab/uni"
    assert lines["architecture"].values["found"] == {"depth": DEPTH, "qkv_bias": True}
