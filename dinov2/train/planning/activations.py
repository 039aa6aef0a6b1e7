"""What autograd keeps of a student's forward pass until its backward pass, in bytes.

Each formula follows the code that it describes, operation by operation; a test compares them with the tensors
that autograd really saves. Letters: d width, h feed-forward width, H heads, c bytes of the number format of
the matrix products (2 under autocast, else 4). The residual stream, norms and losses are float32.

One residual branch keeps, per token it computes:

- its input, for the norm: ``4 d``, with the norm's mean and deviation, ``8``; compiled in 16 bits for a GPU,
  the norm's output before gains, rounded, ``c d``, with the deviation, ``4``;
- the norm's output, rounded for the matrix product: ``c d``;
- attention: queries, keys, values ``3 c d``, result ``c d``, the log of the softmax's sums ``4 H``, and the
  result once more, packed for the projection: ``c d``;
- feed-forward: MLP ``2 c h`` (before and after the GELU); SwiGLU ``4 c h`` (two halves, the gate's SiLU, the
  product), compiled ``3 c h``, as the SiLU is computed again;
- LayerScale: nothing, as its gains are multiplied into the weights of the layer before it. These are a copy,
  ``c (d d + d h)`` a block, where the product needs none in any case. In float16 what it multiplies, ``c d``;
- stochastic depth: the positions of the tokens, ``8``; and for every token, computed or not, its place,
  its weight and whether it is kept, ``13``.

In the last block projection, feed-forward and what follows are computed for the chosen tokens alone, those
that heads and losses look at.

A frozen layer keeps nothing for the gradients of its weights. Low-rank updates need the inputs of the
matrices that they update, and keep their own narrow results, ``c`` times the rank for each of four matrices.
``train.activation_checkpointing`` keeps less: ``full`` the input of a block, ``4 d``; ``selective`` that and
the results of matrix products and attention; the rest of a block is computed again, one block at a time.
"""

from dataclasses import dataclass

from dinov2.layers.layer_norm import DEVICES
from dinov2.loss.prototypes import BLOCK_BYTES
from dinov2.train.planning.workload import HeadSizes, Workload

FLOAT32 = 4
INDEX = 8


@dataclass(frozen=True)
class BackboneActivations:
    """Bytes kept of a micro-batch's pass through the student's backbone."""

    blocks: int
    recomputed: int  # of the one block that checkpointing computes again, on top
    outputs: int  # of the final norm, and what it keeps
    crops: int  # number format of the matrix products; the input of the patch embedding

    @property
    def total(self) -> int:
        return self.blocks + self.recomputed + self.outputs


@dataclass(frozen=True)
class Kept:
    """What a run's blocks keep of some of their numbers, in bytes."""

    scaled: int  # of a number that LayerScale multiplies
    weight: int  # of a weight that its gains are in
    norm: int  # of a token that a norm takes
    silu: int  # of a number that comes out of SwiGLU's SiLU


def backbone_activations(
    work: Workload,
    c: int,
    *,
    sharded: bool = False,
    float16: bool = False,
    compiled: bool = False,
    device: str = "cuda",
) -> BackboneActivations:
    """Return what the student's backbone keeps.

    Args:
        work: a micro-batch.
        c: bytes of the number format of matrix products.
        sharded: whether several processes divide it; then its weights have that format already.
        float16: whether that format is float16.
        compiled: whether a run compiles; blocks that keep a selection of their insides stay as they are.
        device: ``cuda`` or ``cpu``.
    """
    compiles = compiled and work.checkpointing != "selective"
    rounded = compiles and c < FLOAT32 and device in DEVICES
    kept = Kept(
        scaled=c * float16,
        weight=c * (not float16 and (sharded or c == FLOAT32)),
        norm=c * work.vit.width + FLOAT32 if rounded else FLOAT32 * (work.vit.width + 2),
        silu=0 if compiles else c,
    )
    full = [_block(work, block, c, kept) for block in range(work.vit.depth)]
    blocks, recomputed = sum(full), 0
    if work.checkpointing != "none":
        fewer = [_checkpointed(work, block, c) if full[block] else 0 for block in range(work.vit.depth)]
        blocks, recomputed = sum(fewer), max(full)
    d = work.vit.width
    gradient_passes = work.tokens_chosen * (2 * FLOAT32 * d + 2 * FLOAT32)  # the final norm
    return BackboneActivations(blocks, recomputed, gradient_passes, work.pixels * c)


def _block(work: Workload, block: int, c: int, kept: Kept) -> int:
    vit, d = work.vit, work.vit.width
    frozen = block < work.frozen_blocks
    if frozen and not work.mask_token_learns:
        return 0
    learns = 0 if frozen or work.lora_rank else 1
    inputs = 1 if work.lora_rank else learns
    dropping = vit.drop_rates[block] > 0
    scattered = INDEX if dropping else 0
    drawn = 2 * work.tokens * (INDEX + FLOAT32 + 1) if dropping else 0
    scaled = kept.scaled * d * learns * vit.layer_scale
    weights = kept.weight * d * (d + vit.hidden) * learns * vit.layer_scale
    mixing = inputs * c * d + 4 * c * d + FLOAT32 * vit.heads
    projection = inputs * c * d + scaled
    feed_forward = kept.norm + inputs * c * d + _hidden(work, c, inputs, kept) + scaled
    if block < vit.depth - 1:
        # Attention's result serves as the projection's input where one size of crops needs no packing.
        mixing -= 0 if work.local_crops else inputs * c * d
        per_token = kept.norm + mixing + projection + feed_forward + 2 * scattered + 4 * c * work.lora_rank
        return weights + drawn + work.tokens_kept(block) * per_token
    # Of the last block only chosen tokens go further than attention.
    attention = kept.norm + mixing + c * work.lora_rank
    chosen = projection + feed_forward + 3 * c * work.lora_rank
    return weights + drawn + work.tokens_kept(block) * attention + work.tokens_chosen * chosen


def _hidden(work: Workload, c: int, inputs: int, kept: Kept) -> int:
    """Bytes between the two matrices of the feed-forward, per token."""
    h = work.vit.hidden
    return h * (c * (2 + inputs) + kept.silu) if work.vit.gated else c * h * (1 + inputs)


def _checkpointed(work: Workload, block: int, c: int) -> int:
    """Bytes that stay of a block whose inside is computed again."""
    vit, d = work.vit, work.vit.width
    input_of_block = work.tokens * FLOAT32 * d
    if work.checkpointing == "full":
        return input_of_block
    products = c * (3 * d + d + d + d + vit.hidden * (2 if vit.gated else 1)) + FLOAT32 * vit.heads
    return input_of_block + work.tokens_kept(block) * products


@dataclass(frozen=True)
class HeadMemory:
    """Bytes of one head of the student in a micro-batch, and of the losses on its scores."""

    activations: int  # kept by the head for its backward pass, gradients of the losses among them
    scoring: int  # while the losses are computed: the prototypes' float32 matrix, scores of a block of rows


def head_memory(work: Workload, name: str, c: int) -> HeadMemory:
    """Return what a student's head and the losses on its scores take.

    Rows of tokens are joined in float32 and rounded (``4 d + c d``); every hidden layer keeps its result
    before and after the GELU, the bottleneck its result before normalisation and after it in float32. The
    losses score a block of rows at a time and keep float32 gradients of the bottleneck and of the prototypes'
    matrix, see :mod:`dinov2.loss.prototypes`.

    Args:
        work: a micro-batch.
        name: ``dino_head`` or ``ibot_head``.
        c: bytes of the number format of the head's matrix products.
    """
    head = work.heads[name]
    rows = sum(work.rows(name, student=True))
    matrix = head.prototypes * head.bottleneck
    block = min(rows * head.prototypes * c, BLOCK_BYTES)
    return HeadMemory(
        activations=rows * _head_row(head, c) + matrix * FLOAT32 + head.prototypes * FLOAT32,
        scoring=matrix * FLOAT32 + block,
    )


def _head_row(head: HeadSizes, c: int) -> int:
    rounded_inputs = head.width * (FLOAT32 if c == FLOAT32 else c)
    hidden = 2 * c * head.hidden * (head.layers - 1)
    bottleneck = head.bottleneck * (c + 2 * FLOAT32) + FLOAT32
    return rounded_inputs + hidden + bottleneck
