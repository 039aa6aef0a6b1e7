"""What the optimizer would really do to each parameter of the student: learning rate and weight decay.

Read from the optimizer's own groups, which are matched with the student's parameters by identity.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from dinov2 import distributed
from dinov2.configs.scaling import SCALING_RULE, images_per_iteration, scaled_lr
from dinov2.errors import some_of
from dinov2.train.optimizer import apply_optim_scheduler
from dinov2.train.schedules import build_schedulers
from dinov2.train.self_check.probe import Start, block_of, blocks_of
from dinov2.train.self_check.record import Line

_TOKENS = re.compile(r"pos_embed|patch_embed|(?:mask|cls|reg|register)_tokens?|embeddings\.")
_RELATIVE = 1e-6


@dataclass(frozen=True)
class Rate:
    """What one parameter of the student gets when the learning rate is at its peak."""

    name: str
    part: str  # backbone or a head
    place: str  # row of the table, e.g. "block 3"
    trains: bool  # requires a gradient
    lr: float | None  # None outside of the optimizer
    weight_decay: float | None
    expected_lr: float


def peak_rates(start: Start) -> list[Rate]:
    """Set the schedules' peak on the optimizer and read back what every parameter would get."""
    schedules = build_schedulers(start.cfg)
    peak = float(max(schedules.lr.schedule))
    last_layer_peak = float(max(schedules.last_layer_lr.schedule))
    decay = float(schedules.weight_decay[start.start_iteration])
    apply_optim_scheduler(start.optimizer, peak, decay, last_layer_peak)
    groups = {id(p): group for group in start.optimizer.param_groups for p in group["params"]}
    rates = []
    for part, module in start.model.student.items():
        depth = len(blocks_of(module)) if part == "backbone" else 0
        for name, parameter in module.named_parameters():
            group = groups.get(id(parameter))
            base = last_layer_peak if "last_layer" in name else peak
            rates.append(
                Rate(
                    name=f"{part}.{name}",
                    part=part,
                    place=_place(part, name),
                    trains=parameter.requires_grad,
                    lr=group["lr"] if group else None,
                    weight_decay=group["weight_decay"] if group else None,
                    expected_lr=base * _multiplier(start, part, name, depth),
                )
            )
    return rates


def _place(part: str, name: str) -> str:
    if part != "backbone":
        return f"{part} last layer" if "last_layer" in name else part
    block = block_of(name)
    if block is not None:
        return f"block {block}"
    if "patch_embed" in name:
        return "patch embedding"
    return "tokens" if _TOKENS.search(name) else "after the blocks"


def _multiplier(start: Start, part: str, name: str, depth: int) -> float:
    """The factor the config asks for: blocks count from 1, tokens are layer 0, the rest is the last layer."""
    optim = start.cfg.optim
    if part != "backbone":
        return 1.0
    block = block_of(name)
    layer = depth + 1 if block is None else block + 1
    if block is None and _TOKENS.search(name):
        layer = 0
    multiplier = optim.backbone_lr_mult * optim.layerwise_decay ** (depth + 1 - layer)
    return multiplier * (optim.patch_embed_lr_mult if "patch_embed" in name else 1.0)


def check_learning(start: Start) -> Iterator[Line]:
    """Check who learns, how fast at the peak, and how that falls from block to block."""
    rates = peak_rates(start)
    yield _membership(rates)
    yield _frozen(start, rates)
    yield _peak(start, rates)
    yield _decay_by_block(start, rates)
    yield _weight_decay(start, rates)


def _membership(rates: list[Rate]) -> Line:
    lost = [rate.name for rate in rates if rate.trains and rate.lr is None]
    values = {"parameters": len(rates), "missing": lost}
    if lost:
        text = f"{len(lost)} parameters require a gradient but are not in the optimizer ({some_of(lost, 3)})"
        return Line("optimizer: parameters", "wrong", text, values)
    count = sum(rate.trains for rate in rates)
    return Line("optimizer: parameters", "ok", f"all {count} trainable tensors are in it", values)


def _frozen(start: Start, rates: list[Rate]) -> Line:
    name = "optimizer: frozen"
    frozen = [rate for rate in rates if not rate.trains]
    unasked = [rate.name for rate in frozen if not _may_be_frozen(start, rate)]
    still_moving = [rate.name for rate in rates if rate.trains and rate.lr and _must_be_frozen(start, rate)]
    values = {"frozen": [rate.name for rate in frozen]}
    if unasked:
        text = f"{len(unasked)} parameters of the student do not train though no key says so"
        return Line(name, "wrong", f"{text} ({some_of(unasked, 3)})", values)
    if still_moving:
        text = (
            f"train.freeze_blocks is {start.cfg.train.freeze_blocks}, but {len(still_moving)} of those train"
        )
        return Line(name, "wrong", f"{text} ({some_of(still_moving, 3)})", values)
    if frozen:
        text = f"{len(frozen)} of {len(rates)} tensors stay as they are, as the config says"
        return Line(name, "note", text, values)
    return Line(name, "ok", "nothing is frozen", values)


def _may_be_frozen(start: Start, rate: Rate) -> bool:
    for_all = start.cfg.student.lora_rank > 0 or start.cfg.train.freeze_backbone_iterations > 0
    is_mask_token = rate.place == "tokens" and start.cfg.train.freeze_blocks > 0
    return rate.part == "backbone" and (for_all or is_mask_token or _must_be_frozen(start, rate))


def _must_be_frozen(start: Start, rate: Rate) -> bool:
    """By train.freeze_blocks; a mask token that no weights brought along may learn all the same."""
    blocks = start.cfg.train.freeze_blocks
    return (
        blocks > 0
        and "mask_token" not in rate.name
        and rate.place in {"tokens", "patch embedding", *(f"block {i}" for i in range(blocks))}
    )


def _peak(start: Start, rates: list[Rate]) -> Line:
    """The largest learning rate of any group, and how the config arrives at it."""
    optim, name = start.cfg.optim, "learning rate"
    actual = max((rate.lr for rate in rates if rate.lr is not None), default=0.0)
    batch = images_per_iteration(start.cfg, distributed.get_global_size())
    values = {
        "peak": actual,
        "optim.lr": optim.lr,
        "optim.base_lr": optim.base_lr,
        "rule": optim.scaling_rule,
        "batch": batch,
    }
    if actual == 0.0:
        return Line(name, "wrong", "zero for every parameter: nothing would be learned", values)
    if optim.scaling_rule == "none":
        return Line(name, "ok", f"peak {actual:.4g}, as optim.lr states it", values)
    ruled = scaled_lr(optim.base_lr, optim.scaling_rule, batch)
    if not math.isclose(optim.lr, ruled, rel_tol=_RELATIVE):
        text = (
            f"optim.lr is {optim.lr:.4g}, but {optim.scaling_rule} makes {ruled:.4g} of optim.base_lr "
            f"{optim.base_lr:g} for {batch} images per iteration{_reference_in_use(start, batch)}"
        )
        return Line(name, "wrong", text, values)
    if optim.min_lr > optim.lr:
        text = f"rises from optim.lr {optim.lr:.4g} to optim.min_lr {optim.min_lr:.4g}, which is larger"
        return Line(name, "note", text, values)
    text = f"peak {actual:.4g}: {optim.scaling_rule} of optim.base_lr {optim.base_lr:g} for {batch} images"
    return Line(name, "ok", text, values)


def _reference_in_use(start: Start, batch: int) -> str:
    """The reference batch at which the rule would give the learning rate in use."""
    optim = start.cfg.optim
    law = SCALING_RULE.fullmatch(optim.scaling_rule)["law"]
    if not optim.lr:
        return ""
    reference = batch * (optim.base_lr / optim.lr) ** (2 if law == "sqrt" else 1)
    return f"; it is that of {law}_wrt_{round(reference)}"


def _decay_by_block(start: Start, rates: list[Rate]) -> Line:
    name, decay = "learning rate by block", start.cfg.optim.layerwise_decay
    learning = [rate for rate in rates if rate.lr is not None]
    values = {"table": _table(learning), "optim.layerwise_decay": decay}
    in_blocks = [rate for rate in learning if rate.place.startswith("block ")]
    off = [rate for rate in learning if not math.isclose(rate.lr, rate.expected_lr, rel_tol=_RELATIVE)]
    if off:
        shown = sorted({rate.place: rate for rate in off}.values(), key=lambda rate: rate.expected_lr)
        pairs = [f"{rate.place} {rate.lr:.4g} instead of {rate.expected_lr:.4g}" for rate in _ends(shown)]
        lost = decay < 1 and len({rate.lr for rate in in_blocks}) == 1
        what = f"optim.layerwise_decay {decay:g} is lost" if lost else "not as the config asks"
        return Line(name, "wrong", f"{what}: {', '.join(pairs)}", values)
    if not in_blocks and not blocks_of(start.student):
        status = "wrong" if decay < 1 else "note"
        return Line(name, status, f"no blocks found to apply layerwise_decay {decay:g} to", values)
    if not in_blocks:
        return Line(name, "note", "no block is trained", values)
    ends = _ends(in_blocks)
    text = f"{', '.join(f'{rate.place} {rate.lr:.3g}' for rate in ends)} (layerwise_decay {decay:g})"
    return Line(name, "ok", text, values)


def _weight_decay(start: Start, rates: list[Rate]) -> Line:
    learning = [rate for rate in rates if rate.weight_decay is not None]
    decayed = [rate for rate in learning if rate.weight_decay]
    asked = start.cfg.optim.weight_decay
    values = {
        "optim.weight_decay": asked,
        "decayed": len(decayed),
        "not_decayed": len(learning) - len(decayed),
    }
    largest = max((rate.weight_decay for rate in decayed), default=0.0)
    text = f"{largest:.3g} at the start on {len(decayed)} of {len(learning)} tensors"
    status = "wrong" if asked > 0 and learning and not decayed else "ok"
    return Line("weight decay", status, text, values)


def _table(rates: list[Rate]) -> dict[str, dict[str, list[float]]]:
    """Place -> the different learning rates and weight decays of its parameters."""
    table: dict[str, dict[str, set[float]]] = {}
    for rate in rates:
        row = table.setdefault(rate.place, {"lr": set(), "weight_decay": set()})
        row["lr"].add(rate.lr)
        row["weight_decay"].add(rate.weight_decay)
    return {place: {key: sorted(found) for key, found in row.items()} for place, row in table.items()}


def _ends(rates: list[Rate]) -> list[Rate]:
    return [rates[0], rates[-1]] if len({rate.place for rate in rates}) > 1 else rates[:1]
