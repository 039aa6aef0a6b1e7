"""One training step and a short run against numbers recorded from DINOv2."""

import pytest
import torch

from dinov2.train.optimizer import build_optimizer
from dinov2.train.schedules import build_schedulers
from dinov2.train.train import train_step
from tests.train.golden_runs import INDEX, TOLERANCES, GoldenRun, with_prefix

LOSS = {"rel": TOLERANCES["loss_rtol"], "abs": TOLERANCES["loss_atol"]}
GRAD = {"rel": TOLERANCES["grad_rtol"], "abs": TOLERANCES["grad_atol"]}
RUN = {"rel": TOLERANCES["trajectory_rtol"], "abs": TOLERANCES["trajectory_atol"]}
CASES = list(INDEX["cases"])


def as_numbers(losses):
    return {name: float(value) for name, value in losses.items()}


@pytest.fixture(params=CASES)
def run(request, monkeypatch):
    return GoldenRun(request.param, monkeypatch)


def test_one_step_has_the_recorded_losses_and_gradients(run):
    expected = run.expected["forward_backward"]
    losses = run.model.compute_losses(run.batches[0], expected["teacher_temp"])
    run.model.backprop_loss(losses.total)

    assert as_numbers(losses.logged) == pytest.approx(expected["loss_dict"], **LOSS)
    assert losses.total.item() == pytest.approx(expected["total_loss"], **LOSS)
    norms = {
        name: float(parameter.grad.norm())
        for name, parameter in run.model.student.named_parameters()
        if parameter.grad is not None
    }
    assert norms == pytest.approx(expected["grad_norms"], **GRAD)
    gradients = dict(run.model.student.named_parameters())
    for name, reference in with_prefix(run.tensors, "ref.grad.").items():
        tolerance = {"rtol": 1e-4, "atol": 1e-4 * float(reference.abs().max())}
        torch.testing.assert_close(gradients[name].grad, reference, **tolerance)


def test_forward_backward_returns_dinov2s_entries_and_leaves_gradients(run):
    expected = run.expected["forward_backward"]
    logged = run.model.forward_backward(run.batches[0], teacher_temp=expected["teacher_temp"])
    assert as_numbers(logged) == pytest.approx(expected["loss_dict"], **LOSS)
    assert all(parameter.grad is None for parameter in run.model.teacher.parameters())


def test_parameter_groups_and_schedules_are_the_recorded_ones(run):
    groups = run.model.get_params_groups()
    described = [
        {
            "lr_multiplier": group["lr_multiplier"],
            "wd_multiplier": group["wd_multiplier"],
            "is_last_layer": group["is_last_layer"],
            "n_params": len(group["params"]),
            "n_elements": sum(parameter.numel() for parameter in group["params"]),
        }
        for group in groups
    ]
    assert len(described) == len(run.expected["param_groups"])
    for got, expected in zip(described, run.expected["param_groups"], strict=True):
        assert got == pytest.approx(expected)
    schedules = dict(
        zip(("lr", "wd", "momentum", "teacher_temp", "last_layer_lr"), build_schedulers(run.cfg), strict=True)
    )
    for name, values in run.expected["schedules"].items():
        got = [schedules[name][iteration] for iteration in range(len(values))]
        assert got == pytest.approx(values, rel=1e-9), name


def test_a_short_run_follows_the_recorded_one(run):
    optimizer = build_optimizer(run.cfg, run.model.get_params_groups())
    schedules = build_schedulers(run.cfg)
    for step in run.expected["trajectory"]:
        values = schedules.at(step["iteration"])
        result = train_step(run.model, optimizer, run.batches[step["batch"]], values, run.cfg.optim.clip_grad)
        shown = {name: value for name, value in result.losses.items() if name != "total_loss"}
        assert shown == pytest.approx(step["loss_dict"], **RUN), step["iteration"]
        assert result.losses["total_loss"] == pytest.approx(step["total_loss"], **RUN)
        assert result.grad_norms == pytest.approx(step["module_grad_norms_before_clip"], **RUN)
    run.model.finish_center_updates()

    for network in ("student", "teacher"):
        parameters = dict(getattr(run.model, network).named_parameters())
        norms = {name: parameter.norm().item() for name, parameter in parameters.items()}
        assert norms == pytest.approx(run.expected[f"final_{network}_norms"], **RUN)
        for name, reference in with_prefix(run.tensors, f"ref.final_{network}.").items():
            distance = (parameters[name] - reference).norm() / reference.norm()
            assert distance < 1e-3, name
    for name, reference in with_prefix(run.tensors, "ref.final_center.").items():
        center = getattr(run.model, name).center
        torch.testing.assert_close(center, reference, rtol=1e-3, atol=1e-4)
