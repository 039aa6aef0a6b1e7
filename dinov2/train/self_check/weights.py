"""Are the weights the run starts from really in the networks, in the student, the teacher and the heads?"""

from collections.abc import Iterator

import torch
from torch import nn

from dinov2.errors import some_of
from dinov2.fsdp.sharding import whole_tensor
from dinov2.models.report import LoadReport
from dinov2.train.initial_weights import fingerprint
from dinov2.train.self_check.probe import Start
from dinov2.train.self_check.record import Line

NOT_IN_EVERY_FILE = "mask_token"  # only masked images use it, so releases in other layouts leave it out


def check_weights(start: Start) -> Iterator[Line]:
    """Compare every loaded part with its file's share, and with itself right after loading."""
    if not start.is_fresh:
        source = "a checkpoint of this run" if start.continues else start.cfg.MODEL.WEIGHTS
        yield Line("weights", "ok", f"those of {source}, at iteration {start.start_iteration}")
        return
    yield _student_source(start)
    for name, part in start.initial.parts.items():
        yield _share(name, part.report)


def _student_source(start: Start) -> Line:
    cfg, name = start.cfg, "weights: source"
    source = cfg.student.pretrained_weights or cfg.train.init_weights_from_chkpt
    part = start.initial.parts.get("student.backbone")
    if part is not None:
        stated = f", {part.report.layout}" if part.report.layout else ""
        return Line(name, "ok", f"the backbone was read from {part.report.source}{stated}")
    if source:
        return Line(name, "wrong", f"the config names {source}, but nothing was loaded into the student")
    return Line(name, "note", "the backbone starts with random weights: no source is named")


def _share(name: str, report: LoadReport) -> Line:
    label, missing, share = f"weights: {name}", list(report.missing), report.share
    values = {"share": share, "missing": missing, "source": report.source}
    absent = [key for key in missing if not key.endswith(NOT_IN_EVERY_FILE)]
    if absent or (share < 1 and not missing):
        shown = f" (without {some_of(absent, 3)})" if absent else ""
        return Line(label, "wrong", f"only {share:.2%} came from {report.source}{shown}", values)
    text = f"{share:.2%} loaded" + (f"; {', '.join(missing)} not in the file" if missing else "")
    return Line(label, "ok", text, values)


def check_kept(start: Start) -> Iterator[Line]:
    """Look whether anything has changed the loaded parts of the student since."""
    if not start.is_fresh:
        return
    for name, part in start.initial.parts.items():
        network, module_name = name.split(".", 1)
        if network != "student":
            continue
        module = start.model.student[module_name]
        label = f"unchanged: {name}"
        if module_name == "backbone" and start.cfg.student.lora_rank:
            yield Line(label, "note", "not compared: low-rank updates were added to the backbone")
        elif fingerprint(module) == part.fingerprint:
            yield Line(label, "ok", "as it was loaded")
        else:
            yield Line(label, "wrong", f"changed since it was loaded from {part.report.source}")


def check_teacher(start: Start) -> Iterator[Line]:
    """Is the teacher what was loaded for it, or else the student's copy, and does it stand still?"""
    teacher = start.model.teacher
    trains = [name for name, parameter in teacher.named_parameters() if parameter.requires_grad]
    active = [name for name, module in teacher.named_modules() if module.training]
    if trains:
        yield Line(
            "teacher: gradients", "wrong", f"{len(trains)} parameters require a gradient ({trains[0]})"
        )
    if active:
        yield Line("teacher: mode", "wrong", f"{len(active)} of its modules are in training mode")
    if not trains and not active:
        yield Line("teacher: mode", "ok", "evaluation mode, no gradients")
    if start.is_fresh:
        for name, module in teacher.items():
            yield _teacher_part(start, name, module)


def _teacher_part(start: Start, name: str, module: nn.Module) -> Line:
    label, part = f"teacher: {name}", start.initial.parts.get(f"teacher.{name}")
    student = start.model.student[name]
    copied = _equal(student, module)
    if part is None:
        if copied:
            return Line(label, "ok", "a copy of the student's")
        return Line(label, "wrong", "nothing was loaded for it, yet it differs from the student's")
    if fingerprint(module) == part.fingerprint:
        return Line(label, "ok", f"as it was loaded from {part.report.source}")
    how = "the student's copy has overwritten it" if copied else "it has changed since"
    return Line(label, "wrong", f"not what was loaded from {part.report.source}: {how}")


def _equal(student: nn.Module, teacher: nn.Module) -> bool:
    """Compare by name; what only the student has, low-rank updates, is without effect at first."""
    ours, theirs = student.state_dict(), teacher.state_dict()
    if not theirs.keys() <= ours.keys():
        ours = {name.replace(".base_layer.", "."): tensor for name, tensor in ours.items()}
    # A list, as every process must gather all of what is sharded.
    pairs = [(whole_tensor(ours[name]), whole_tensor(theirs[name])) for name in theirs if name in ours]
    return theirs.keys() <= ours.keys() and all(torch.equal(*pair) for pair in pairs)


def check_heads(start: Start) -> Iterator[Line]:
    """Say for each head whether it starts fresh, and whether that is what was asked for."""
    path, on_missing = start.cfg.head.head_path, start.cfg.head.on_missing
    for name in start.model.student:
        if name == "backbone":
            continue
        label = f"head: {name}"
        if not start.is_fresh:
            yield Line(label, "ok", "goes on from a checkpoint")
        elif not is_fresh_head(start, name):
            yield Line(label, "ok", f"loaded from {start.initial.parts[f'student.{name}'].report.source}")
        elif not path:
            yield Line(label, "note", "starts with random weights: head.head_path is empty")
        else:
            status = "note" if on_missing == "reinit" else "wrong"
            yield Line(label, status, f"starts with random weights although head.head_path is {path}")


def is_fresh_head(start: Start, name: str) -> bool:
    """Whether a head of the student has random weights."""
    return start.is_fresh and f"student.{name}" not in start.initial.parts
