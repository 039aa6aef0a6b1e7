"""The DINOv2 vision transformer (Dosovitskiy et al. 2021; Oquab et al. 2023; registers: Darcet et al. 2024).

Shapes: B images, C channels, H W pixels, p patch size, N = H/p * W/p patches, D width, R registers,
T tokens of several batches packed into one tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.errors import ConfigError, nearest
from dinov2.layers import MemEffAttention, Mlp, NestedTensorBlock, PatchEmbed, SwiGLUFFNFused
from dinov2.layers.block import get_attn_bias_and_cat, run_blocks
from dinov2.layers.layer_norm import LayerNorm
from dinov2.layers.packing import PackedLayout
from dinov2.layers.pos_embed import resample_positions
from dinov2.layers.stochastic_depth import Subset, draw_subsets

FFN_LAYERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": Mlp,
    "swiglu": SwiGLUFFNFused,
    "swiglufused": SwiGLUFFNFused,
    "identity": nn.Identity,
}


def named_apply(
    fn: Callable[..., Any],
    module: nn.Module,
    name: str = "",
    depth_first: bool = True,
    include_root: bool = False,
) -> nn.Module:
    """Call ``fn(module=..., name=...)`` on every submodule, children before parents if ``depth_first``."""
    if include_root and not depth_first:
        fn(module=module, name=name)
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        named_apply(fn, child, path, depth_first, include_root=True)
    if include_root and depth_first:
        fn(module=module, name=name)
    return module


def init_weights_vit_timm(module: nn.Module, name: str = "") -> None:
    """Initialise a linear layer: weights from a truncated normal of std 0.02, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class BlockChunk(nn.Sequential):
    """Consecutive blocks called as one, the unit that FSDP may wrap.

    Made of a list, like DINOv2's; FSDP of PyTorch before 2.13 does not take subclasses of ``nn.ModuleList``.
    """

    def __init__(self, blocks: Iterable[nn.Module] = ()) -> None:
        super().__init__(*(blocks.values() if isinstance(blocks, Mapping) else blocks))  # of a slice

    def forward(
        self,
        x: Tensor,
        *layout: PackedLayout,
        rows: Sequence[Tensor] | None = None,
        subsets: Sequence[Subset] | None = None,
    ) -> Tensor:
        """Transform tokens; with ``rows`` the last block transforms these alone.

        ``subsets`` are those of all blocks, one after the other.
        """
        blocks = [block for block in self if not isinstance(block, nn.Identity)]  # stand for earlier chunks
        drawn = iter(subsets or ())
        for block in blocks:
            options = {} if rows is None or block is not blocks[-1] else {"rows": rows}
            if subsets is not None:
                options["subsets"] = [next(drawn) for _ in block.drop_rates()]
            x = block(x, *layout, **options)
        return x

    def drop_rates(self) -> list[float]:
        """Return the rates of all blocks, one after the other."""
        return [rate for block in self if not isinstance(block, nn.Identity) for rate in block.drop_rates()]


class DinoVisionTransformer(nn.Module):
    """Vision transformer with register tokens, masked patches and batches of several image sizes.

    Args:
        img_size: pixels (one side, or a pair) that the stored position embeddings are laid out for.
        patch_size: pixels of a patch side p.
        in_chans: image channels C.
        embed_dim: token width D.
        depth: number of blocks.
        num_heads: attention heads, a divisor of ``embed_dim``.
        mlp_ratio: hidden width of the feed-forward as a multiple of ``embed_dim``.
        qkv_bias, ffn_bias, proj_bias: biases of the blocks' linear layers.
        drop_path_rate: stochastic depth rate of the last block, 0..1.
        drop_path_uniform: use that rate in every block instead of growing linearly from 0.
        init_values: initial LayerScale gain; None or 0 for no LayerScale.
        embed_layer, act_layer, block_fn: what the model is made of.
        ffn_layer: ``mlp``, ``swiglu`` or ``swiglufused`` (the same), or ``identity``.
        block_chunks: number of :class:`BlockChunk` the blocks are grouped into, 0 for none. It shows in the
            names of the parameters.
        num_register_tokens: registers R.
        interpolate_antialias: antialias resized position embeddings.
        interpolate_offset: how position embeddings meet other image sizes: 0 for the exact size, as models
            with registers were trained; 0.1 for the historic scale factor, as those without were.
        norm_eps: what the LayerNorms add to the variance.

    Raises:
        ConfigError: ``depth`` is not a multiple of ``block_chunks`` or D not one of ``num_heads``.
        NotImplementedError: unknown ``ffn_layer``.
    """

    # What runs all blocks but the last for chosen tokens; a model may be given another, which gets single
    # blocks in place of chunks.
    run_blocks = staticmethod(run_blocks)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        embed_layer: Callable[..., nn.Module] = PatchEmbed,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        block_fn: Callable[..., nn.Module] = NestedTensorBlock,
        ffn_layer: str = "mlp",
        block_chunks: int = 1,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        *,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if ffn_layer not in FFN_LAYERS:
            raise NotImplementedError(
                f'ffn_layer "{ffn_layer}" does not exist{nearest(ffn_layer, FFN_LAYERS)}; '
                f"use one of {', '.join(FFN_LAYERS)}"
            )
        norm_layer = partial(LayerNorm, eps=norm_eps)
        self.num_features = self.embed_dim = embed_dim
        self.num_tokens = 1
        self.n_blocks = depth
        self.num_heads = num_heads

        self.patch_size = patch_size
        self.patch_embed = embed_layer(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim
        )
        self.cls_token = _token_parameter(1, embed_dim)
        self.pos_embed = _token_parameter(self.num_tokens + self.patch_embed.num_patches, embed_dim)
        self.interpolate_offset = interpolate_offset
        self.interpolate_antialias = interpolate_antialias
        self.num_register_tokens = num_register_tokens
        self.register_tokens = (
            _token_parameter(num_register_tokens, embed_dim) if num_register_tokens else None
        )

        rates = np.linspace(drop_path_rate if drop_path_uniform else 0.0, drop_path_rate, depth).tolist()
        biases = {"qkv_bias": qkv_bias, "proj_bias": proj_bias, "ffn_bias": ffn_bias}
        parts = {"act_layer": act_layer, "norm_layer": norm_layer, "ffn_layer": FFN_LAYERS[ffn_layer]}
        sizes = {"dim": embed_dim, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        blocks = [
            block_fn(drop_path=rate, init_values=init_values, **sizes, **biases, **parts) for rate in rates
        ]
        self.chunked_blocks = block_chunks > 0
        self.blocks = nn.ModuleList(_chunked(blocks, block_chunks) if self.chunked_blocks else blocks)
        self.norm = norm_layer(embed_dim)
        self.head = nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.init_weights()

    def init_weights(self) -> None:
        """Draw initial weights; patch embedding, norms and LayerScale keep those of their own modules."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        named_apply(init_weights_vit_timm, self)

    def interpolate_pos_encoding(self, x: Tensor, w: int, h: int) -> Tensor:
        """Return position embeddings for the grid of an image.

        Args:
            x: cls and patch tokens ``[B, 1 + N, D]``; only shape and dtype matter.
            w: the image's first axis in pixels, that is its height (the names are historic).
            h: its second axis, the width.

        Returns:
            ``[1, 1 + N, D]``.

        Raises:
            ConfigError: see :func:`dinov2.layers.pos_embed.resample_positions`.
        """
        if x.shape[1] == self.pos_embed.shape[1] and w == h:
            return self.pos_embed
        positions = resample_positions(
            self.pos_embed,
            (w // self.patch_size, h // self.patch_size),
            offset=self.interpolate_offset,
            antialias=self.interpolate_antialias,
        )
        return positions.to(x.dtype)

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Embed images and add cls token, positions and registers.

        Args:
            x: images ``[B, C, H, W]``.
            masks: boolean ``[B, N]``; patches at True are replaced by the mask token.

        Returns:
            ``[B, 1 + R + N, D]`` ordered cls, registers, patches.

        Raises:
            ConfigError: the image does not divide into patches.
            TypeError: masks are not boolean.
        """
        height, width = x.shape[-2:]
        x = self.patch_embed(x)  # [B, N, D]
        if masks is not None:
            if masks.dtype != torch.bool:
                raise TypeError(f"masks must be boolean, not {masks.dtype}; pass masks.bool()")
            x = torch.where(masks.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self.interpolate_pos_encoding(x, height, width)
        if self.register_tokens is None:
            return x
        registers = self.register_tokens.expand(x.shape[0], -1, -1)
        return torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)

    def forward_features(
        self, x: Tensor | list[Tensor], masks: Tensor | list[Tensor | None] | None = None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Compute all output tokens.

        Args:
            x: images ``[B, C, H, W]``; a list goes to :meth:`forward_features_list`.
            masks: boolean ``[B, N]``, True at patches to hide; a list if ``x`` is one.

        Returns:
            A dict of ``x_norm_clstoken [B, D]``, ``x_norm_regtokens [B, R, D]``, ``x_norm_patchtokens
            [B, N, D]``, ``x_prenorm [B, 1 + R + N, D]`` (before the final norm) and ``masks`` as given.
        """
        if isinstance(x, list):
            return self.forward_features_list(x, masks)
        x = self.prepare_tokens_with_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        return self._outputs(self.norm(x), x, masks)

    def forward_features_list(
        self, x_list: list[Tensor], masks_list: list[Tensor | None] | None
    ) -> list[dict[str, Any]]:
        """Compute all output tokens of batches that may differ in size, sharing every per-token layer.

        Args:
            x_list: images ``[B, C, H, W]`` per batch.
            masks_list: masks or None per batch; None for no masks at all.

        Returns:
            One dict per batch, see :meth:`forward_features`; the same numbers as one call per batch.
        """
        masks_list = masks_list if masks_list is not None else [None] * len(x_list)
        layout, x = self._packed_tokens(x_list, masks_list)
        x = run_blocks(self._with_subsets(layout), x, layout)
        batches = zip(layout.split(self.norm(x)), layout.split(x), masks_list, strict=True)
        return [self._outputs(*batch) for batch in batches]

    def forward_tokens(
        self, x_list: list[Tensor], masks_list: list[Tensor | None], tokens: Sequence[Tensor]
    ) -> list[Tensor]:
        """Compute the output of chosen tokens, as :meth:`forward_features_list` does that of all.

        What the last block and the final norm would compute for the others alone is left out: with the tokens
        that a training step needs, most of the last block.

        Args:
            x_list: images ``[B, C, H, W]`` per batch.
            masks_list: masks or None per batch.
            tokens: per batch, positions ``[k]`` in its flattened output ``[B * (1 + R + N)]``.

        Returns:
            Normalised tokens ``[k, D]`` per batch.
        """
        layout, x = self._packed_tokens(x_list, masks_list)
        *earlier, (last, subsets_of_last) = self._with_subsets(layout)
        x = self.run_blocks(earlier, x, layout)
        x = last(x, layout, rows=tokens, subsets=subsets_of_last)
        return list(self.norm(x)[0].split([len(positions) for positions in tokens]))

    def _packed_tokens(
        self, x_list: list[Tensor], masks_list: list[Tensor | None]
    ) -> tuple[PackedLayout, Tensor]:
        tokens = [self.prepare_tokens_with_masks(x, m) for x, m in zip(x_list, masks_list, strict=True)]
        return get_attn_bias_and_cat(tokens)  # [1, T, D]

    def _with_subsets(self, layout: PackedLayout) -> list[tuple[nn.Module, list[Subset]]]:
        """Pair every block, or chunk of blocks, with the sequences that go through each of its branches."""
        blocks = list(self.blocks if self.run_blocks is run_blocks else self._blocks_in_order())
        rates = [block.drop_rates() for block in blocks]
        drawn = iter(draw_subsets(layout, sum(rates, []), self.pos_embed.device))
        pairs = zip(blocks, rates, strict=True)
        return [(block, [next(drawn) for _ in of_block]) for block, of_block in pairs]

    def _outputs(self, x_norm: Tensor, x_prenorm: Tensor, masks: Tensor | None) -> dict[str, Any]:
        first_patch = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": x_norm[:, 0],
            "x_norm_regtokens": x_norm[:, 1:first_patch],
            "x_norm_patchtokens": x_norm[:, first_patch:],
            "x_prenorm": x_prenorm,
            "masks": masks,
        }

    def _blocks_in_order(self) -> Iterator[nn.Module]:
        for block in self.blocks:
            if isinstance(block, BlockChunk):
                yield from (inner for inner in block if not isinstance(inner, nn.Identity))
            else:
                yield block

    def _get_intermediate_layers(self, x: Tensor, n: int | Sequence[int]) -> list[Tensor]:
        wanted = range(self.n_blocks - n, self.n_blocks) if isinstance(n, int) else n
        x = self.prepare_tokens_with_masks(x)
        outputs = []
        for index, block in enumerate(self._blocks_in_order()):
            x = block(x)
            if index in wanted:
                outputs.append(x)
        assert len(outputs) == len(wanted), (
            f"only {len(outputs)} of {len(wanted)} blocks exist: {list(wanted)}"
        )
        return outputs

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Return the patch tokens after chosen blocks, without cls token and registers.

        Args:
            x: images ``[B, C, H, W]``.
            n: that many last blocks, or the indices of blocks; results come in the order of the blocks.
            reshape: return maps ``[B, D, H/p, W/p]`` rather than sequences ``[B, N, D]``.
            return_class_token: return pairs of patch tokens and cls token ``[B, D]``.
            norm: apply the final norm to each.

        Raises:
            AssertionError: a block asked for does not exist.
        """
        outputs = self._get_intermediate_layers(x, n)
        if norm:
            outputs = [self.norm(out) for out in outputs]
        patches = [out[:, 1 + self.num_register_tokens :] for out in outputs]
        if reshape:
            grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
            patches = [tokens.transpose(1, 2).unflatten(2, grid).contiguous() for tokens in patches]
        if return_class_token:
            return tuple(zip(patches, (out[:, 0] for out in outputs), strict=True))
        return tuple(patches)

    def forward(
        self, *args: Any, is_training: bool = False, tokens: Sequence[Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Return the cls token ``[B, D]``, or in training what :meth:`forward_features` returns.

        With ``tokens`` it is what :meth:`forward_tokens` returns.
        """
        if tokens is not None:
            return self.forward_tokens(*args, tokens=tokens, **kwargs)
        outputs = self.forward_features(*args, **kwargs)
        if is_training:
            return outputs
        if isinstance(outputs, list):
            return [self.head(out["x_norm_clstoken"]) for out in outputs]
        return self.head(outputs["x_norm_clstoken"])


def _token_parameter(count: int, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1, count, dim))


def _chunked(blocks: list[nn.Module], count: int) -> list[BlockChunk]:
    """Group blocks so that each keeps its global index inside its chunk; the slots before it are empty."""
    if len(blocks) % count:
        raise ConfigError(
            f"block_chunks {count} does not divide the depth of {len(blocks)} blocks; "
            "use a divisor of the depth, or 0 for no chunks"
        )
    size = len(blocks) // count
    starts = range(0, len(blocks), size)
    return [BlockChunk([nn.Identity()] * start + blocks[start : start + size]) for start in starts]


# Width, blocks and attention heads of the named architectures.
SIZES: dict[str, tuple[int, int, int]] = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant2": (1536, 40, 24),
}


def _named(name: str, /, **options: Any) -> DinoVisionTransformer:
    width, blocks, heads = SIZES[name]
    defaults = {
        "embed_dim": width,
        "depth": blocks,
        "num_heads": heads,
        "mlp_ratio": 4,
        "block_fn": partial(NestedTensorBlock, attn_class=MemEffAttention),
    }
    return DinoVisionTransformer(**{**defaults, **options})


def vit_tiny(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """Width 192, 12 blocks, 3 heads; ``kwargs`` go to the constructor. Not among the released models."""
    return _named("vit_tiny", patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)


def vit_small(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """Width 384, 12 blocks, 6 heads; ``kwargs`` go to the constructor."""
    return _named("vit_small", patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)


def vit_base(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """Width 768, 12 blocks, 12 heads; ``kwargs`` go to the constructor."""
    return _named("vit_base", patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)


def vit_large(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """Width 1024, 24 blocks, 16 heads; ``kwargs`` go to the constructor."""
    return _named("vit_large", patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)


def vit_giant2(patch_size: int = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """Width 1536, 40 blocks, 24 heads; ``kwargs`` go to the constructor. Released with SwiGLU."""
    return _named("vit_giant2", patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)
