"""What the networks of a run say of fixed images, without leaving a trace in them.

Shapes: n images, b images of a batch, D width, K prototypes. Every process runs equally many forward passes,
as sharded networks need.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torchvision.transforms.functional import normalize

from dinov2.eval import health
from dinov2.eval.utils import all_gather_and_flatten
from dinov2.train.monitoring.images import Images
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.undisturbed import undisturbed

HEAD = "dino_head"


@contextmanager
def untouched(model: SSLMetaArch) -> Iterator[None]:
    """Evaluate the networks within: afterwards modes and random generators are as they were.

    Networks are sharded again, as a step leaves them. A pending update of a running centre is finished, as a
    checkpoint does; nothing is added to one.
    """
    model.finish_center_updates()
    with undisturbed(model):
        model.eval()
        yield


def cls_features(model: SSLMetaArch, network: str, images: Images) -> Tensor:
    """Return the cls tokens (n, D) of a network's backbone, float32 on the CPU, on every process.

    Call within :func:`untouched`. They are bit-identical for any number of processes where the networks are.

    Args:
        network: ``teacher`` or ``student``, in the number format that it trains in.
    """
    backbone, size = getattr(model, network)["backbone"], images.batch_size
    steps = []
    for number in range(images.steps):
        batch = normalized(model, images.step(number))
        with model.precision.autocast(network, "backbone"):
            tokens = backbone(batch).float()  # [b, D]
        # The last batch is smaller; all processes send rows of one length.
        padded = tokens.new_zeros(size, tokens.shape[1])
        padded[: len(tokens)] = tokens
        steps.append(all_gather_and_flatten(padded).cpu())  # [processes * size, D], batches in their order
    return torch.cat(steps)[: images.count]


def normalized(model: SSLMetaArch, batch: Tensor) -> Tensor:
    """Return bytes [b, 3, S, S] as the networks see crops in training."""
    scaled = batch.to(model.device, non_blocking=True).float().div(255)
    return normalize(scaled, list(model.cfg.crops.mean), list(model.cfg.crops.std)).to(
        model.precision.input_dtype
    )


def prototype_signals(
    model: SSLMetaArch, features: dict[str, Tensor], teacher_temp: float, batch_size: int
) -> dict[str, float]:
    """Return how teacher and student assign images to the prototypes of the DINO head, and how they differ.

    Call within :func:`untouched`, on every process, with the same features: each runs the heads over all of
    them. The teacher's assignment is ``softmax((logits - centre) / temperature)`` with the running centre of
    the run, and without it where the run balances by Sinkhorn-Knopp: that would give all prototypes equal
    shares of the images at hand, whatever the network does. The student's is the softmax at its temperature.

    Args:
        features: Cls tokens (n, D) of ``teacher`` and ``student``.
        teacher_temp: The teacher's temperature where the run stands.
        batch_size: Images of a pass through a head.

    Returns:
        Signals of :func:`dinov2.eval.health.prototype_signals` with the prefixes ``teacher_`` and
        ``student_``, and ``teacher_student_kl``: the mean divergence of the student's assignment from the
        teacher's. Empty without the DINO term.
    """
    if not model.do_dino:
        return {}
    divergences: list[Tensor] = []

    def assignments(network: str) -> Iterator[Tensor]:
        for start in range(0, len(features[network]), batch_size):
            rows = slice(start, start + batch_size)
            own = _assignment(model, network, features[network][rows], teacher_temp)
            if network == "teacher":
                student = _assignment(model, "student", features["student"][rows], teacher_temp)
                divergences.append(health.kl_divergence(own, student).cpu())
            yield own

    signals = {
        f"{network}_{name}": value
        for network in ("teacher", "student")
        for name, value in health.prototype_signals(assignments(network)).items()
    }
    return signals | {"teacher_student_kl": torch.cat(divergences).mean().item()}


def _assignment(model: SSLMetaArch, network: str, tokens: Tensor, teacher_temp: float) -> Tensor:
    """Return the probabilities [b, K] of the prototypes, float64."""
    with model.precision.autocast(network, HEAD):
        logits = getattr(model, network)[HEAD](tokens.to(model.device)).double()
    if network == "student":
        return torch.softmax(logits / model.dino_loss.student_temp, dim=-1)
    if model.cfg.train.centering == "centering":
        logits = logits - model.dino_loss.center.double()
    return torch.softmax(logits / teacher_temp, dim=-1)
