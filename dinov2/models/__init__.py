"""From a config section to a backbone."""

from collections.abc import Callable
from typing import Any

from dinov2.errors import ConfigError, nearest
from dinov2.models.vision_transformer import (
    DinoVisionTransformer,
    vit_base,
    vit_giant2,
    vit_large,
    vit_small,
    vit_tiny,
)

ARCHITECTURES: dict[str, Callable[..., DinoVisionTransformer]] = {
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_large": vit_large,
    "vit_giant2": vit_giant2,
}


def build_model(args: Any, only_teacher: bool = False, img_size: int = 224) -> tuple[Any, ...]:
    """Build the teacher backbone and, unless told otherwise, the student backbone.

    Args:
        args: the ``student`` section of a config; left as it is. ``embed_dim``, ``depth``, ``num_heads``,
            ``mlp_ratio`` and ``norm_eps`` replace those of the architecture where they are present and not
            None.
        only_teacher: leave out the student.
        img_size: pixels of the global crops, for which position embeddings are laid out.

    Returns:
        ``(teacher, embed_dim)`` or ``(student, teacher, embed_dim)``; only the student drops paths.

    Raises:
        ConfigError: ``args.arch`` is unknown or its sizes do not fit together.
    """
    factory = _architecture(args.arch)
    options = {
        "img_size": img_size,
        "patch_size": args.patch_size,
        "init_values": args.layerscale,
        "ffn_layer": args.ffn_layer,
        "block_chunks": args.block_chunks,
        "qkv_bias": args.qkv_bias,
        "proj_bias": args.proj_bias,
        "ffn_bias": args.ffn_bias,
        "num_register_tokens": args.num_register_tokens,
        "interpolate_offset": args.interpolate_offset,
        "interpolate_antialias": args.interpolate_antialias,
    }
    for size in ("embed_dim", "depth", "num_heads", "mlp_ratio", "norm_eps"):
        if getattr(args, size, None) is not None:
            options[size] = getattr(args, size)
    teacher = factory(**options)
    if only_teacher:
        return teacher, teacher.embed_dim
    student = factory(**options, drop_path_rate=args.drop_path_rate, drop_path_uniform=args.drop_path_uniform)
    return student, teacher, student.embed_dim


def build_model_from_cfg(cfg: Any, only_teacher: bool = False) -> tuple[Any, ...]:
    """:func:`build_model` for ``cfg.student`` and the global crop size of ``cfg.crops``."""
    return build_model(cfg.student, only_teacher=only_teacher, img_size=cfg.crops.global_crops_size)


def _architecture(arch: str) -> Callable[..., DinoVisionTransformer]:
    name = arch.removesuffix("_memeff")  # how configs of the first release spell it
    if name not in ARCHITECTURES:
        raise ConfigError(
            f'student.arch "{arch}" is unknown{nearest(name, ARCHITECTURES)}; '
            f"use one of {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]
