"""Does the objective start where its heads must start, and with targets that teach something?"""

import math
from collections.abc import Iterator

from omegaconf import DictConfig
from torch import Tensor

from dinov2.train.input import own_streams
from dinov2.train.schedules import build_schedulers
from dinov2.train.self_check.probe import Start
from dinov2.train.self_check.record import Line
from dinov2.train.self_check.weights import is_fresh_head
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS
from dinov2.utils.seeding import seed_everything

# How far beyond the estimate of `fresh_range` the first loss of a fresh head is accepted. 60 seeds each of
# tiny networks (K 32 to 4096, bottleneck 16 to 256, 1 to 4 images) went up to 0.47 beyond it, ViT-S/14 with
# pretrained and with random weights (K to 65,536, bottleneck 16 to 384) up to 0.05.
SPREAD, SLACK = 1.25, 0.5


def check_terms(start: Start) -> Iterator[Line]:
    """Name the terms of the objective that are off."""
    model = start.model
    terms = {
        "DINO (dino.loss_weight)": model.do_dino,
        "iBOT (ibot.loss_weight)": model.do_ibot,
        "KoLeo (dino.koleo_loss_weight)": model.do_koleo,
    }
    off = [name for name, on in terms.items() if not on]
    text = f"off: {', '.join(off)}" if off else "DINO, iBOT and KoLeo"
    yield Line("loss terms", "note" if off else "ok", text)


def check_temperatures(start: Start) -> Iterator[Line]:
    """Is the teacher sharper than the student, so that there is something to learn from it?"""
    teacher = start.cfg.teacher
    student_temp, name = _student_temp(start), "temperatures"
    warms_up = teacher.warmup_teacher_temp_epochs > 0
    first = teacher.warmup_teacher_temp if warms_up else teacher.teacher_temp
    highest = max(teacher.teacher_temp, first)
    values = {"student": student_temp, "teacher_at_start": first, "teacher": teacher.teacher_temp}
    text = f"teacher {first:g} to {teacher.teacher_temp:g}, student {student_temp:g}"
    if math.isclose(highest, student_temp):
        text += ": the teacher becomes no sharper than the student; DINOv2's teacher.teacher_temp is 0.07"
        yield Line(name, "note", text, values)
    elif highest > student_temp:
        yield Line(name, "wrong", f"{text}: the teacher is flatter than the student", values)
    else:
        yield Line(name, "ok", text, values)


def _student_temp(start: Start) -> float:
    model = start.model
    return (model.dino_loss if model.do_dino else model.ibot_patch_loss).student_temp


def check_first_loss(start: Start) -> Iterator[Line]:
    """Compare the loss of the first images with that of heads that know nothing: ln of the prototypes."""
    model = start.model.train()
    temperature = float(build_schedulers(start.cfg).teacher_temp[start.start_iteration])
    seed_everything(start.cfg.train.seed, own_streams(start.cfg)[0], start.start_iteration)  # as the step
    losses = model.compute_losses(start.images, temperature)
    logged = {name: value.item() for name, value in losses.logged.items()}
    values = {**logged, "total_loss": losses.total.item(), "teacher_temp": temperature}
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        yield Line("first loss", "wrong", f"not finite: {', '.join(broken)}", values)
        return
    yield Line("first loss", "ok", f"finite: total {values['total_loss']:.4g}", values)
    if model.do_dino:
        entropy = dino_cross_entropy(logged, model.num_local_crops)
        yield _compare(start, "dino_head", "first DINO loss", entropy, start.cfg.dino, temperature)
    masks = start.images["collated_masks"]
    if model.do_ibot and masks.any():
        head = "ibot_head" if model.ibot_separate_head else "dino_head"
        entropy = ibot_cross_entropy(logged, masks)
        section = start.cfg.ibot if model.ibot_separate_head else start.cfg.dino
        yield _compare(start, head, "first iBOT loss", entropy, section, temperature)


def dino_cross_entropy(logged: dict[str, float], num_local_crops: int) -> float:
    """Undo the scaling of the logged DINO losses: the mean cross-entropy of a pair of views."""
    num_local_pairs = NUM_GLOBAL_CROPS * num_local_crops
    num_terms = max(num_local_pairs, 1) + NUM_GLOBAL_CROPS
    total = num_terms * (logged["dino_global_crops_loss"] + logged.get("dino_local_crops_loss", 0.0))
    return total / (num_local_pairs + NUM_GLOBAL_CROPS)


def ibot_cross_entropy(logged: dict[str, float], masks: Tensor) -> float:
    """Undo the scaling of the logged iBOT loss: the mean cross-entropy of a masked patch ([2B, N] masks)."""
    return NUM_GLOBAL_CROPS * logged["ibot_loss"] * len(masks) / int(masks.any(dim=1).sum())


def fresh_range(
    prototypes: int, bottleneck: int, student_temp: float, teacher_temp: float
) -> tuple[float, float]:
    """Return the cross-entropies that a fresh head can start with, about the logarithm of the prototypes.

    A fresh last layer gives cosines of a unit vector with random directions of the bottleneck: about normal,
    of variance 1 / bottleneck. Divided by the student's temperature, that is s^2, and the log-partition is
    ln K + s^2 / 2. Targets that know nothing of the student's logits add nothing. Sharp ones, at t^2 from the
    teacher's temperature, take s * t away where both networks see the same, and add as much where they see
    the opposite, as tokens of hidden and of visible patches may.
    """
    s = 1.0 / (student_temp * math.sqrt(bottleneck))
    t = 1.0 / (teacher_temp * math.sqrt(bottleneck))
    middle = math.log(prototypes) + s * s / 2
    spread = SPREAD * s * t + SLACK
    return middle - spread, middle + spread


def _compare(
    start: Start, head: str, name: str, entropy: float, section: DictConfig, teacher_temp: float
) -> Line:
    log_k = math.log(section.head_n_prototypes)
    low, high = fresh_range(
        section.head_n_prototypes, section.head_bottleneck_dim, _student_temp(start), teacher_temp
    )
    values = {"cross_entropy": entropy, "ln_prototypes": log_k, "fresh_low": low, "fresh_high": high}
    text = f"{entropy:.3f} per pair, ln {section.head_n_prototypes} = {log_k:.3f}"
    if is_fresh_head(start, head):
        if low <= entropy <= high:
            return Line(name, "ok", f"{text}: that of a fresh head", values)
        return Line(name, "wrong", f"{text}: a fresh head starts within {low:.3f} to {high:.3f}", values)
    if entropy < log_k:
        return Line(name, "ok", f"{text}: the loaded head knows something", values)
    return Line(name, "note", f"{text}: the loaded head does no better than a fresh one on this data", values)
