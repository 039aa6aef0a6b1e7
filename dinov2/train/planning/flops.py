"""Arithmetic of a training step, floating-point operations (a multiply-add is two).

For one sequence of n tokens, width d, feed-forward width h:

- linear layers of a block: ``2 n (4 d^2 + 2 d h)``, with SwiGLU ``2 n (4 d^2 + 3 d h)``;
- attention proper, ``q k^T`` and the product with the values: ``4 n^2 d``;
- patch embedding: ``2 N 3 p^2 d`` for N patches of p pixels;
- one row of a head: two times the number of its weights.

A backward pass costs a forward pass for the gradients of the inputs and one for those of the weights. So a
trained layer counts three times; a frozen one through which gradients pass counts twice, its attention, which
has no weights, three times; a frozen one below everything that is trained counts once. The patch embedding is
counted three times when trained, though nobody needs the gradient of the pixels: a thousandth of the whole.
Stochastic depth computes a branch for its share of the sequences only, see :mod:`dinov2.layers.block`.

What is counted so is DINOv2's arithmetic, which utilisation (MFU) refers to. Less is computed: of the last
block's output a step needs the cls tokens and the masked patches alone, and the projection after attention
and the feed-forward of the other tokens are left out.

Not counted: norms, activations, softmax, Sinkhorn-Knopp, losses, optimizer and averaging. They are limited by
memory bandwidth and belong to what keeps utilisation below 1.
"""

from dataclasses import dataclass

from dinov2.train.planning.workload import NUM_GLOBAL_CROPS, HeadSizes, VitSizes, Workload


@dataclass(frozen=True)
class Flops:
    """FLOPs per image by part."""

    teacher: float
    student_global: float
    student_local: float
    teacher_heads: float
    student_heads: float
    recomputation: float  # of what is computed twice to save memory
    skipped: float  # of the last block, for tokens that nobody looks at

    @property
    def model(self) -> float:
        """DINOv2's arithmetic: all parts, each once."""
        return sum(vars(self).values()) - self.recomputation - self.skipped

    @property
    def executed(self) -> float:
        """What is really computed."""
        return self.model + self.recomputation - self.skipped


def linear_flops(vit: VitSizes, tokens: int) -> float:
    """FLOPs of the linear layers of one block for one sequence, forward."""
    matrices = 3 if vit.gated else 2
    return 2.0 * tokens * (4 * vit.width**2 + matrices * vit.width * vit.hidden)


def attention_flops(vit: VitSizes, tokens: int) -> float:
    """FLOPs of attention proper of one block for one sequence, forward."""
    return 4.0 * tokens**2 * vit.width


def patch_flops(vit: VitSizes, pixels: int) -> float:
    """FLOPs of the patch embedding of one crop, forward."""
    return 2.0 * vit.patches(pixels) * 3 * vit.patch**2 * vit.width


def forward_flops(vit: VitSizes, pixels: int) -> float:
    """FLOPs of a whole backbone for one crop, forward and without stochastic depth."""
    n = vit.tokens(pixels)
    return vit.depth * (linear_flops(vit, n) + attention_flops(vit, n)) + patch_flops(vit, pixels)


def head_flops(head: HeadSizes) -> float:
    """FLOPs of one row of a head, forward."""
    widths = head.widths
    products = sum(a * b for a, b in zip(widths, widths[1:], strict=False))
    return 2.0 * products + _prototype_row(head)


def _prototype_row(head: HeadSizes) -> float:
    return 2.0 * head.bottleneck * head.prototypes


def prototype_flops(work: Workload) -> float:
    """FLOPs per image of the products of the student's features with the prototypes, forward."""

    total = 0.0
    if work.dino:
        total += (NUM_GLOBAL_CROPS + work.local_crops) * _prototype_row(work.dino_head)
    if work.ibot:
        total += work.masked_mean * _prototype_row(work.ibot_head or work.dino_head)
    return total


def step_flops(work: Workload) -> Flops:
    """Return the FLOPs per image of a step, with the expected number of masked patches."""
    vit, masked = work.vit, work.masked_mean
    patch_head = work.ibot_head or work.dino_head
    cls_row = head_flops(work.dino_head) if work.dino else 0.0
    patch_row = masked * head_flops(patch_head) if work.ibot else 0.0
    student_local = _student(work, work.local_pixels, work.local_crops) if work.local_crops else 0.0
    return Flops(
        teacher=NUM_GLOBAL_CROPS * forward_flops(vit, work.global_pixels),
        student_global=_student(work, work.global_pixels, NUM_GLOBAL_CROPS),
        student_local=student_local,
        teacher_heads=NUM_GLOBAL_CROPS * cls_row + patch_row,
        student_heads=3 * ((NUM_GLOBAL_CROPS + work.local_crops) * cls_row + patch_row),
        recomputation=_recomputed(work) if work.checkpointing == "full" else 0.0,
        skipped=_skipped(work),
    )


def student_forward_flops(work: Workload) -> float:
    """Return the FLOPs per image of the student's backbone going forward to all tokens."""
    vit, total = work.vit, 0.0
    crops = [(NUM_GLOBAL_CROPS, work.global_pixels)]
    crops += [(work.local_crops, work.local_pixels)] if work.local_crops else []
    for count, pixels in crops:
        n = vit.tokens(pixels)
        cost = linear_flops(vit, n) + attention_flops(vit, n)
        cost += _adapter_flops(work, n) if work.lora_rank else 0.0
        total += count * (sum(_kept_shares(work, count)) * cost + patch_flops(vit, pixels))
    return total


def _kept_shares(work: Workload, crops: int) -> list[float]:
    """Return, per block, the share of the sequences of a micro-batch that its branches compute."""
    shares = []
    for rate in work.vit.drop_rates:
        kept = max(int(crops * work.batch * (1 - rate)), 1) if rate > 0 else crops * work.batch
        shares.append(kept / (crops * work.batch))
    return shares


def _student(work: Workload, pixels: int, crops: int) -> float:
    vit, n = work.vit, work.vit.tokens(pixels)
    total = (1 if work.frozen_blocks or work.lora_rank else 3) * patch_flops(vit, pixels)
    for block, share in enumerate(_kept_shares(work, crops)):
        linear_times, attention_times = block_passes(work, block)
        cost = linear_times * linear_flops(vit, n) + attention_times * attention_flops(vit, n)
        if work.lora_rank:
            cost += 3 * _adapter_flops(work, n)
        total += share * cost
    return crops * total


def block_passes(work: Workload, block: int) -> tuple[int, int]:
    """Return how many forward passes' worth a block's linear layers and its attention cost the student."""
    if work.lora_rank:
        return 2, 3
    if block >= work.frozen_blocks:
        return 3, 3
    return (2, 3) if work.mask_token_learns else (1, 1)


def _adapter_flops(work: Workload, tokens: float) -> float:
    """FLOPs of the low-rank updates of one block: for each linear layer rank * (inputs + outputs)."""
    d, h = work.vit.width, work.vit.hidden
    hidden_outputs = 2 * h if work.vit.gated else h
    ends = (d + 3 * d) + (d + d) + (d + hidden_outputs) + (h + d)
    return 2.0 * tokens * work.lora_rank * ends


def _recomputed(work: Workload) -> float:
    """FLOPs of running the blocks forward once more, where a backward pass goes through them."""
    total = 0.0
    crops = [(NUM_GLOBAL_CROPS, work.global_pixels)]
    crops += [(work.local_crops, work.local_pixels)] if work.local_crops else []
    for count, pixels in crops:
        n = work.vit.tokens(pixels)
        cost = linear_flops(work.vit, n) + attention_flops(work.vit, n)
        for block, share in enumerate(_kept_shares(work, count)):
            total += count * share * cost * (block_passes(work, block)[0] > 1)
    return total


def _skipped(work: Workload) -> float:
    """FLOPs of the last block's projection and feed-forward for the tokens that no head or loss looks at.

    Stochastic depth leaves out whole sequences; the chosen tokens are few and are computed in all of them.
    """
    vit, last = work.vit, work.vit.depth - 1
    masked = work.masked_mean if work.ibot else 0.0
    crops = [(NUM_GLOBAL_CROPS, work.global_pixels, NUM_GLOBAL_CROPS + masked)]
    teacher = _after_attention(vit, NUM_GLOBAL_CROPS * vit.tokens(work.global_pixels) - crops[0][2])
    crops += [(work.local_crops, work.local_pixels, work.local_crops)] if work.local_crops else []
    passes = block_passes(work, last)[0]
    again = int(work.checkpointing == "full" and passes > 1)
    student = 0.0
    for count, pixels, chosen in crops:
        tokens = _kept_shares(work, count)[last] * count * vit.tokens(pixels) - chosen
        student += (passes + again) * _after_attention(vit, tokens)
        student += 3 * _adapters_after_attention(work, tokens) if work.lora_rank else 0.0
    return teacher + student


def _after_attention(vit: VitSizes, tokens: float) -> float:
    matrices = 3 if vit.gated else 2
    return 2.0 * tokens * (vit.width**2 + matrices * vit.width * vit.hidden)


def _adapters_after_attention(work: Workload, tokens: float) -> float:
    return _adapter_flops(work, tokens) - 2.0 * tokens * work.lora_rank * 4 * work.vit.width
