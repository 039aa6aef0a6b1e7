"""The bytes that autograd keeps in a real forward pass, compared with the formula."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from dinov2.layers import backend, layer_norm
from dinov2.train.planning.activations import backbone_activations, head_memory
from dinov2.train.planning.parameters import build_networks
from dinov2.train.planning.workload import Workload
from tests.train.planning.steps import SMALL, build, random_batch, resolve

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


def kept_bytes(model, images) -> int:
    """Bytes of all memory that the graph of the losses holds on to, beside parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage  # kept, so that no address is given out twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.compute_losses(images, 0.07)
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("number_format", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("student.drop_path_rate=0", "student.num_register_tokens=4"),
        ("student.drop_path_uniform=false", "crops.local_crops_number=0"),
        ("student.ffn_layer=swiglufused", "student.layerscale=null"),
        ("ibot.separate_head=true", "ibot.head_n_prototypes=1024"),
        ("train.freeze_blocks=1",),
        pytest.param(("student.lora_rank=8",), marks=needs_peft),
    ],
    ids=lambda overrides: overrides[0] if overrides else "plain",
)
def test_what_autograd_keeps(overrides, number_format, monkeypatch):
    check_what_is_kept(overrides, number_format, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("number_format", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("student.drop_path_rate=0",),
        ("student.drop_path_rate=0.2", "student.ffn_layer=swiglufused", "student.layerscale=null"),
        ("train.freeze_blocks=1",),
    ],
    ids=lambda overrides: overrides[0] if overrides else "plain",
)
def test_what_compiled_code_keeps(overrides, number_format, monkeypatch):
    monkeypatch.setattr(layer_norm, "DEVICES", ("cpu",))  # as on a GPU
    torch._dynamo.reset()
    check_what_is_kept((*overrides, "train.compile=true"), number_format, monkeypatch)


def check_what_is_kept(overrides, number_format, monkeypatch):
    monkeypatch.setattr(backend, "pays", lambda *_: False)  # the kernel that a GPU has, too, keeps its result
    cfg = resolve(*SMALL, *overrides, number_format=number_format)
    model = build(cfg)
    if number_format == "fp16":  # for which other formats stand in on a CPU
        model.precision.dtypes = dict.fromkeys(model.precision.dtypes, torch.float16)
    images = random_batch(cfg, model.precision.input_dtype)
    networks = build_networks(cfg)
    work = Workload.of(cfg, networks.backbone, batch=4, mask_token_learns=True)
    work = replace(work, masked_most=int(images["n_masked_patches"]))
    size = 4 if number_format == "fp32" else 2
    float16, compiled = number_format == "fp16", bool(cfg.train.compile)
    backbone = backbone_activations(work, size, float16=float16, compiled=compiled)
    expected = backbone.total + (0 if work.frozen_blocks or work.lora_rank else backbone.crops)
    for name in work.heads:
        expected += head_memory(work, name, size).activations
    if size == 2:
        expected += sum(2 * part.cast for part in networks.parts)
        # The prototypes' matrix is rounded for the scores, and not kept.
        expected -= sum(2 * head.prototypes * head.bottleneck for head in work.heads.values())
        # Images need no gradient, so the matrix that they are multiplied by is cast, but not kept.
        expected -= 2 * model.student["backbone"].patch_embed.proj.weight.numel()
    assert expected == pytest.approx(kept_bytes(model, images), rel=0.01)
