"""Build the recorded training cases: the model with its stored weights, and the stored batches."""

from functools import partial

import numpy as np
import torch
from omegaconf import OmegaConf

from dinov2 import models
from dinov2.layers import MemEffAttention, NestedTensorBlock
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.ssl_meta_arch import SSLMetaArch
from tests.conftest import GOLDEN, load_golden_json, load_golden_tensors

INDEX = load_golden_json("meta_cases.json")
TOLERANCES = INDEX["tolerances"]


def register_tiny_arch(monkeypatch):
    arch = INDEX["tiny_arch"]
    sizes = {key: arch[key] for key in ("embed_dim", "depth", "num_heads", "mlp_ratio")}

    def factory(patch_size=16, num_register_tokens=0, **kwargs):
        return DinoVisionTransformer(
            patch_size=patch_size,
            num_register_tokens=num_register_tokens,
            block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention),
            **{**sizes, **kwargs},
        )

    monkeypatch.setitem(models.ARCHITECTURES, arch["name"], factory)


def recipe_state_dict(state, seed):
    """The stock case's weights, which are too large to store (see the README of the recorded data)."""
    filled = {}
    for number, name in enumerate(sorted(state)):
        shape = tuple(state[name].shape)
        x = np.random.RandomState((seed * 1000003 + number) % (2**32 - 1)).standard_normal(shape)
        if name.endswith("gamma"):
            x = 0.5 + 0.3 * x
        elif name.endswith("weight_g"):
            x = 1 + 0.2 * x
        elif name.endswith("bias"):
            x = 0.1 * x
        elif len(shape) == 1:
            x = 1 + 0.2 * x
        elif "pos_embed" in name:
            x = 0.3 * x
        elif "token" in name:
            x = 0.5 * x
        else:
            x = x / np.sqrt(np.prod(shape[1:]))
        filled[name] = torch.from_numpy(x.astype(np.float32))
    return filled


def with_prefix(tensors, prefix):
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


class GoldenRun:
    """One recorded case.

    Attributes:
        cfg: its config.
        model: networks holding the recorded starting weights, prepared for training.
        batches: collated batches.
        expected: the recorded numbers; ``tensors``: the recorded tensors.
    """

    def __init__(self, name, monkeypatch):
        case = INDEX["cases"][name]
        register_tiny_arch(monkeypatch)
        self.cfg = OmegaConf.load(GOLDEN / case["config"])
        self.expected = load_golden_json(case["expected"])
        self.tensors = load_golden_tensors(case["tensors"])
        self.num_steps = case.get("n_steps", INDEX["n_steps"])
        self.model = SSLMetaArch(self.cfg)
        self.model.prepare_for_distributed_training()
        self.model.train()
        for network in ("student", "teacher"):
            module = getattr(self.model, network)
            if case["weights"] == "file":
                state = with_prefix(self.tensors, f"{network}.")
            else:
                state = recipe_state_dict(module.state_dict(), case[f"recipe_seed_{network}"])
            module.load_state_dict(state, strict=True)
        source = self.tensors if "batches" in case else load_golden_tensors(INDEX["batches_file"])
        bounds = case.get("batches", INDEX["batches"])
        self.batches = [
            {**with_prefix(source, f"batch{index}."), "upperbound": bound["upperbound"]}
            for index, bound in enumerate(bounds)
        ]
