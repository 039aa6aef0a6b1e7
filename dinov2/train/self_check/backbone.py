"""Does the student's backbone do in a forward pass what the config and the objective count on?"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.configs.schema import ARCHITECTURE_SIZES
from dinov2.train.self_check.probe import Start, blocks_of
from dinov2.train.self_check.record import Line
from dinov2.utils.seeding import seed_everything

DROP_PATH_SEEDS = 6  # of a small rate, one draw may happen to equal another
DROP_PATH_CROPS = 4
SAME = 0.02  # relative difference that rounding, also of TF32, stays below


def check_architecture(start: Start) -> Iterator[Line]:
    """Compare sizes and biases of the modules with the keys that seem to decide them."""
    student, asked = start.student, start.cfg.student
    parameters = dict(student.named_parameters())
    found: dict[str, object] = {"depth": len(blocks_of(student))}
    biased = [name for name in parameters if "attn.qkv" in name and name.endswith("bias")]
    if any("attn.qkv" in name for name in parameters):
        found["qkv_bias"] = bool(biased)
    arch = asked.arch.removesuffix("_memeff")
    wanted = {"qkv_bias": asked.qkv_bias, "depth": asked.depth}
    if arch in ARCHITECTURE_SIZES:
        wanted["depth"] = asked.depth or ARCHITECTURE_SIZES[arch][1]
    differing = [
        f"student.{key} is {str(wanted[key]).lower()} and the model has {str(value).lower()}"
        for key, value in found.items()
        if wanted[key] is not None and wanted[key] != value
    ]
    if differing:
        yield Line("architecture", "wrong", "; ".join(differing), {"found": found, "config": wanted})
    else:
        yield Line(
            "architecture",
            "ok",
            ", ".join(f"{key} {str(value).lower()}" for key, value in found.items()),
            found,
        )


def check_drop_path(start: Start) -> Iterator[Line]:
    """Compare the blocks' rates with the config, and see whether two training passes differ."""
    asked = start.cfg.student
    rates = [_drop_rate(block) for block in blocks_of(start.student).values()]
    first = asked.drop_path_rate if asked.drop_path_uniform else 0.0
    expected = np.linspace(first, asked.drop_path_rate, len(rates) or 2).tolist()
    rate = max(expected)
    # At rate 0 passes are not expected to differ, and two show whether they do.
    random = _is_random(start, DROP_PATH_SEEDS if rate > 0 else 2)
    values = {"student.drop_path_rate": asked.drop_path_rate, "by_block": rates, "passes_differ": random}
    if rate > 0 and not random:
        text = f"{DROP_PATH_SEEDS} training passes are identical although student.drop_path_rate is {rate:g}"
        yield Line("drop path", "wrong", text, values)
    elif rate > 0 and not any(rates):
        text = f"training passes differ, but no block states its rate: {rate:g} is asked for"
        yield Line("drop path", "note", text, values)
    elif not np.allclose(rates, expected[: len(rates)], atol=1e-6):
        text = f"the blocks' rates are {_span(rates)} instead of {_span(expected)}"
        yield Line("drop path", "wrong", text, values)
    elif rate == 0 and random:
        yield Line("drop path", "note", "0, yet training passes differ: the backbone holds dropout", values)
    else:
        yield Line("drop path", "ok", f"{_span(rates)} over {len(rates)} blocks", values)


def _drop_rate(block: nn.Module) -> float:
    rate = getattr(block, "sample_drop_ratio", None)
    if rate is None:
        drops = [getattr(block, name, None) for name in ("drop_path", "drop_path1")]
        rate = next((drop.drop_prob for drop in drops if hasattr(drop, "drop_prob")), 0.0)
    return float(rate or 0.0)


def _span(rates: list[float]) -> str:
    return f"{rates[0]:.3g} to {rates[-1]:.3g}" if rates else "none"


def _is_random(start: Start, num_seeds: int) -> bool:
    """Whether training passes over the same crops differ from seed to seed."""
    crops = start.images["collated_global_crops"][:DROP_PATH_CROPS].to(start.model.device).float()
    start.student.train()
    first = None
    for seed in range(num_seeds):
        seed_everything(seed)
        (output,) = start.student([crops], masks=[None], is_training=True)
        tokens = output["x_norm_clstoken"]
        if first is not None and not torch.equal(first, tokens):
            return True
        first = tokens
    return False


def check_masks(start: Start) -> Iterator[Line]:
    """Are patches masked, and does the student see that?"""
    masked = int(start.images["n_masked_patches"])
    values = {"masked": masked, "crops": len(start.images["collated_masks"])}
    if not start.model.do_ibot:
        yield Line("masks", "note", "not looked at: iBOT is off (ibot.loss_weight 0)", values)
        return
    if masked == 0:
        text = (
            "no patch of the probe batch is masked, so iBOT has nothing to learn: see "
            "ibot.mask_ratio_min_max and ibot.mask_sample_probability"
        )
        yield Line("masks", "wrong", text, values)
        return
    plain, hidden = (p["x_norm_patchtokens"] for p in (start.passes.plain, start.passes.masked))
    if torch.equal(plain, hidden):
        text = "the student ignores the masks (the same tokens with and without), so iBOT is trivial"
        yield Line("masks", "wrong", text, values)
        return
    masks = start.passes.masks
    if hidden.shape[1] != masks.shape[1]:
        text = f"not comparable: {hidden.shape[1]} patch tokens, {masks.shape[1]} places in a mask"
        yield Line("masks", "wrong", text, values)
        return
    seen = int((plain == hidden).all(dim=-1)[masks].sum())
    if seen:
        text = f"{seen} of {int(masks.sum())} masked patches leave the student's tokens as they are"
        yield Line("masks", "wrong", text, values)
    else:
        text = f"{masked} patches masked in {values['crops']} global crops; they change the student's tokens"
        yield Line("masks", "ok", text, values)


def check_tokens(start: Start) -> Iterator[Line]:
    """Are patches, registers and tokens before the norm what their names say?"""
    features = start.passes.masked
    grid = start.cfg.crops.global_crops_size // start.cfg.student.patch_size
    got, wanted = features["x_norm_patchtokens"].shape[1], grid * grid
    values = {"got": got, "grid": [grid, grid]}
    if got == wanted:
        yield Line("tokens: patches", "ok", f"{got} of a grid of {grid} x {grid}", values)
    else:
        text = f"{got} patch tokens instead of {wanted}"
        extra = ": registers or other prefix tokens are counted as patches" if got > wanted else ""
        yield Line("tokens: patches", "wrong", text + extra, values)
    registers, asked = features["x_norm_regtokens"].shape[1], start.cfg.student.num_register_tokens
    status = "ok" if registers == asked else "wrong"
    text = f"{registers}" + ("" if registers == asked else f", but student.num_register_tokens is {asked}")
    yield Line("tokens: registers", status, text, {"got": registers, "config": asked})
    yield _prenorm(start, features)


def _prenorm(start: Start, features: dict) -> Line:
    name = "tokens: before the norm"
    before = features.get("x_prenorm")
    if before is None:
        return Line(name, "note", "the backbone returns no x_prenorm")
    parts = (
        features["x_norm_clstoken"][:, None],
        features["x_norm_regtokens"],
        features["x_norm_patchtokens"],
    )
    after = torch.cat(parts, dim=1)
    if before.shape == after.shape and torch.equal(before, after):
        return Line(name, "wrong", "x_prenorm holds the normalised tokens")
    norm = getattr(start.student, "norm", None)
    if isinstance(norm, nn.Module) and (
        before.shape != after.shape or _difference(norm(before), after) > SAME
    ):
        return Line(name, "wrong", "the norm of x_prenorm does not give the normalised tokens")
    return Line(name, "ok", "x_prenorm differs from the normalised tokens")


def check_crop_sizes_together(start: Start) -> Iterator[Line]:
    """Do crops of several sizes in one call give what calls of their own give?"""
    passes, name = start.passes, "crops in one call"
    if passes.local is None:
        return
    pairs = ((passes.masked, passes.masked_alone), (passes.local, passes.local_alone))
    worst = max(
        _difference(together[key], alone[key])
        for together, alone in pairs
        for key in ("x_norm_clstoken", "x_norm_patchtokens")
    )
    values = {"relative_difference": worst, "passes_through_a_block": passes.block_runs}
    if not worst < SAME:
        yield Line(name, "wrong", f"they differ from calls of their own by {worst:.2g} (relative)", values)
    elif passes.block_runs > 1:
        text = f"each size runs by itself ({passes.block_runs} passes through a block): right, but slower"
        yield Line(name, "note", text, values)
    else:
        yield Line(name, "ok", f"the same as apart (relative difference {worst:.1g})", values)


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((one - other).norm() / other.norm().clamp_min(1e-12))
