"""What one process does in a step, in numbers: sizes of the networks, crops, tokens and rows of the heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dinov2.layers import SwiGLUFFN

NUM_GLOBAL_CROPS = 2


@dataclass(frozen=True)
class VitSizes:
    """A vision transformer, as far as it decides about memory and arithmetic."""

    width: int
    heads: int
    hidden: int  # of the feed-forward; 0 for none
    gated: bool  # SwiGLU rather than an MLP
    patch: int  # pixels
    registers: int
    layer_scale: bool
    drop_rates: tuple[float, ...]  # stochastic depth of every block

    @classmethod
    def of(cls, backbone: nn.Module) -> "VitSizes":
        """Read the sizes off a :class:`dinov2.models.vision_transformer.DinoVisionTransformer`."""
        blocks = [block for block in backbone.modules() if hasattr(block, "sample_drop_ratio")]
        feed_forward = blocks[0].mlp
        last = getattr(feed_forward, "w3", None) or getattr(feed_forward, "fc2", None)
        return cls(
            width=backbone.embed_dim,
            heads=backbone.num_heads,
            hidden=last.in_features if last is not None else 0,
            gated=isinstance(feed_forward, SwiGLUFFN),
            patch=backbone.patch_size,
            registers=backbone.num_register_tokens,
            layer_scale=not isinstance(blocks[0].ls1, nn.Identity),
            drop_rates=tuple(block.sample_drop_ratio for block in blocks),
        )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.drop_rates)

    def patches(self, pixels: int) -> int:
        """Return the patches of a square crop."""
        return (pixels // self.patch) ** 2

    def tokens(self, pixels: int) -> int:
        """Return the tokens of a square crop: cls, registers and patches."""
        return 1 + self.registers + self.patches(pixels)


@dataclass(frozen=True)
class HeadSizes:
    """A projection head."""

    width: int  # of the tokens it takes
    hidden: int
    bottleneck: int
    layers: int  # linear layers before the prototypes
    prototypes: int

    @property
    def widths(self) -> list[int]:
        """Widths of the MLP, from the tokens to the bottleneck."""
        return [self.width] + [self.hidden] * (self.layers - 1) + [self.bottleneck]


@dataclass(frozen=True)
class Workload:
    """One micro-batch of one process, and how many of them make a step."""

    batch: int  # images
    accumulate_steps: int
    vit: VitSizes
    global_pixels: int
    local_pixels: int
    local_crops: int
    dino_head: HeadSizes | None  # None where neither loss uses it
    ibot_head: HeadSizes | None  # None where iBOT is off or shares the DINO head
    dino: bool
    ibot: bool
    koleo: bool
    sinkhorn: bool
    masked_share: float  # expected share of the patches of the global crops
    masked_most: int  # masked patches of a micro-batch, at most
    checkpointing: str  # train.activation_checkpointing
    compile: bool | None  # train.compile
    frozen_blocks: int
    lora_rank: int
    mask_token_learns: bool

    @classmethod
    def of(cls, cfg: Any, backbone: nn.Module, *, batch: int, mask_token_learns: bool) -> "Workload":
        """Take everything from a resolved config and the student's backbone.

        Args:
            cfg: resolved config, ``student.arch`` settled.
            backbone: the student's, on any device.
            batch: images of a micro-batch, in place of ``train.batch_size_per_gpu``.
            mask_token_learns: with frozen blocks, whether the mask token is trained through them.
        """
        vit = VitSizes.of(backbone)
        dino, ibot = cfg.dino.loss_weight > 0, cfg.ibot.loss_weight > 0
        separate = bool(cfg.ibot.separate_head)
        patches = vit.patches(cfg.crops.global_crops_size)
        low, high = cfg.ibot.mask_ratio_min_max
        probability = cfg.ibot.mask_sample_probability
        return cls(
            batch=batch,
            accumulate_steps=cfg.optim.accumulate_steps,
            vit=vit,
            global_pixels=cfg.crops.global_crops_size,
            local_pixels=cfg.crops.local_crops_size,
            local_crops=cfg.crops.local_crops_number,
            dino_head=_head(cfg.dino, vit.width) if dino or (ibot and not separate) else None,
            ibot_head=_head(cfg.ibot, vit.width) if ibot and separate else None,
            dino=dino,
            ibot=ibot,
            koleo=cfg.dino.koleo_loss_weight > 0,
            sinkhorn=cfg.train.centering == "sinkhorn_knopp",
            masked_share=probability * (low + high) / 2,
            masked_most=most_masked(NUM_GLOBAL_CROPS * batch, patches, probability, low, high),
            checkpointing=cfg.train.activation_checkpointing,
            compile=cfg.train.compile,
            frozen_blocks=cfg.train.freeze_blocks,
            lora_rank=cfg.student.lora_rank,
            mask_token_learns=mask_token_learns,
        )

    @property
    def crops(self) -> list[tuple[int, int]]:
        """(crops, tokens of one) of a micro-batch: the global ones, then the local ones if there are any."""
        groups = [(NUM_GLOBAL_CROPS * self.batch, self.vit.tokens(self.global_pixels))]
        if self.local_crops:
            groups.append((self.local_crops * self.batch, self.vit.tokens(self.local_pixels)))
        return groups

    @property
    def pixels(self) -> int:
        """Pixel values of the crops of a micro-batch, three channels."""
        areas = NUM_GLOBAL_CROPS * self.global_pixels**2 + self.local_crops * self.local_pixels**2
        return 3 * self.batch * areas

    @property
    def masked_mean(self) -> float:
        """Expected masked patches per image."""
        return NUM_GLOBAL_CROPS * self.masked_share * self.vit.patches(self.global_pixels)

    @property
    def heads(self) -> dict[str, HeadSizes]:
        """The heads that exist, by their names in the networks."""
        heads = {"dino_head": self.dino_head, "ibot_head": self.ibot_head}
        return {name: head for name, head in heads.items() if head is not None}

    def tokens_kept(self, block: int) -> int:
        """Return the tokens of a micro-batch that stochastic depth lets into each branch of a block."""
        return sum(kept_sequences(count, self.vit.drop_rates[block]) * n for count, n in self.crops)

    @property
    def tokens(self) -> int:
        """Tokens of all crops of a micro-batch."""
        return sum(count * n for count, n in self.crops)

    @property
    def tokens_chosen(self) -> int:
        """Tokens of a micro-batch that heads and losses look at: cls tokens and masked patches."""
        return sum(count for count, _ in self.crops) + (self.masked_most if self.ibot else 0)

    def rows(self, head: str, *, student: bool) -> tuple[int, int]:
        """Return (cls rows, masked patch rows) that a head sees of a micro-batch."""
        crops = NUM_GLOBAL_CROPS + (self.local_crops if student else 0)
        cls_rows = crops * self.batch if self.dino and head == "dino_head" else 0
        takes_patches = self.ibot and head == ("ibot_head" if self.ibot_head else "dino_head")
        return cls_rows, self.masked_most if takes_patches else 0


def kept_sequences(count: int, drop_rate: float) -> int:
    """Return how many of ``count`` sequences a branch with that stochastic depth computes."""
    return max(int(count * (1 - drop_rate)), 1) if drop_rate > 0 else count


def most_masked(crops: int, patches: int, probability: float, low: float, high: float) -> int:
    """Return the upper bound of the masked patches of a batch, as ``collate_data_and_cast`` bounds them.

    The masked crops share the range of ratios: each draws from its own of as many equal intervals, so the sum
    hardly varies between batches, and the upper ends of the intervals bound it.
    """
    masked = int(crops * probability) or int(probability > 0)
    edges: Sequence[float] = [low + (high - low) * (i + 1) / masked for i in range(masked)]
    return sum(int(patches * edge) for edge in edges)


def _head(section: Any, width: int) -> HeadSizes:
    return HeadSizes(
        width=width,
        hidden=section.head_hidden_dim,
        bottleneck=section.head_bottleneck_dim,
        layers=max(section.head_nlayers, 1),
        prototypes=section.head_n_prototypes,
    )
