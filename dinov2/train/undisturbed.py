"""Look at the networks of a run without leaving a trace."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dinov2.fsdp import reshard_fsdp_model
from dinov2.train.ssl_meta_arch import SSLMetaArch


@contextmanager
def undisturbed(model: SSLMetaArch) -> Iterator[None]:
    """Leave modes and random generators as they are found; no gradients within.

    Networks are sharded again afterwards, as a step leaves them.
    """
    modes = [(module, module.training) for module in model.modules()]
    generators = random.getstate(), np.random.get_state()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        reshard_fsdp_model(model)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        for module, training in modes:
            module.training = training
