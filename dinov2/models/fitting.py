"""Stored positions and patch embeddings, fitted to a model of another grid or patch size."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

from dinov2.errors import WeightsError, nearest
from dinov2.layers.patch_embed import resample_patch_embedding
from dinov2.layers.pos_embed import crop_positions, resample_positions
from dinov2.models.conversion import State, is_square
from dinov2.models.stored import derived


def fit_patch_embedding(state: State, own: Mapping[str, Tensor]) -> dict[str, str]:
    """Resample the patch embedding in ``state`` if the model's patches have another size."""
    name = "patch_embed.proj.weight"
    stored, wanted = state.get(name), tuple(own[name].shape)
    if stored is None or stored.shape[:2] != wanted[:2] or stored.shape == wanted:
        return {}
    how = f"{stored.shape[-2]}x{stored.shape[-1]} -> {wanted[-2]}x{wanted[-1]} px by the pseudo-inverse"
    state[name] = derived([stored], wanted, lambda weight: resample_patch_embedding(weight, wanted[-2:]), how)
    return {name: how}


POSITION_METHODS = ("interpolate", "center_crop")
PATCH_METHODS = ("none", "pseudo_inverse")


def check_methods(pos_embed: str, patch_embed: str) -> None:
    """Raise :class:`WeightsError` unless both words name a way of fitting."""
    for name, word, accepted in (
        ("pos_embed", pos_embed, POSITION_METHODS),
        ("patch_embed", patch_embed, PATCH_METHODS),
    ):
        if word not in accepted:
            raise WeightsError(
                f'{name}="{word}" is unknown{nearest(word, accepted)}: use {" or ".join(accepted)}.'
            )


def fit_positions(source: str, state: State, model: nn.Module, method: str) -> dict[str, str]:
    """Fit the position embeddings in ``state`` to the model's grid if they are laid out for another one."""
    positions, wanted = state.get("pos_embed"), tuple(model.pos_embed.shape)
    if positions is None or positions.shape == wanted:
        return {}
    grid = model.patch_embed.patches_resolution
    rows, columns = grid
    if positions.ndim != 3 or not is_square(positions.shape[1] - 1):
        raise WeightsError(
            f"pos_embed in {source} has shape {positions.shape}, which is not a square grid of "
            f"patches and a cls position: it cannot be resampled to the model's {rows}x{columns} grid."
        )
    side = math.isqrt(positions.shape[1] - 1)
    how = f"{side}x{side} -> {rows}x{columns}, "
    if method == "center_crop":
        if max(grid) > side:
            raise WeightsError(
                f"pos_embed in {source} is laid out for {side}x{side} patches, of which no "
                f"{rows}x{columns} can be cut: set student.pos_embed_resampling=interpolate, or use smaller "
                "global crops."
            )
        how += "the middle cut out"
        state["pos_embed"] = derived([positions], wanted, lambda stored: crop_positions(stored, grid), how)
        return {"pos_embed": how}
    offset, antialias = model.interpolate_offset, model.interpolate_antialias
    sampling = f"scale factor with offset {offset:g}" if offset else "exact size"
    how += f"bicubic by {sampling}, {'with' if antialias else 'no'} antialias"

    def resample(stored: Tensor) -> Tensor:
        resampled = resample_positions(stored, grid, offset=offset, antialias=antialias)
        return resampled.to(stored.dtype)

    state["pos_embed"] = derived([positions], wanted, resample, how)
    return {"pos_embed": how}
