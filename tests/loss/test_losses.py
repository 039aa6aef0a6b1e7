"""The losses against recorded tensors, against hand calculation, and where rows coincide or are absent."""

import math

import pytest
import torch
import torch.nn.functional as F

from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
from dinov2.loss.targets import sinkhorn_knopp
from tests.conftest import load_golden_json, load_golden_tensors

CASES = load_golden_json("losses.json")
CLOSE = {"rtol": CASES["rtol"], "atol": CASES["atol"]}


def cases(kind):
    return [pytest.param(case, id=case["name"]) for case in CASES["cases"] if case["kind"] == kind]


@pytest.fixture(scope="module")
def recorded():
    return load_golden_tensors(CASES["file"])


@pytest.mark.parametrize("case", cases("dino_centering"))
def test_dino_loss_with_centering_reproduces_recorded_steps(case, recorded):
    loss_fn = DINOLoss(case["out_dim"], case["student_temp"], case["center_momentum"])
    for step, temperature in enumerate(case["teacher_temps"]):
        at = f"{case['name']}.{step}."
        teacher = recorded[at + "teacher"]
        probs = loss_fn.softmax_center_teacher(teacher, temperature)
        loss_fn.update_center(teacher)
        torch.testing.assert_close(probs, recorded[at + "probs"], **CLOSE)

        student = recorded[at + "student"].clone().requires_grad_()
        loss = loss_fn(list(student), list(probs.chunk(2)))
        loss.backward()
        torch.testing.assert_close(loss, recorded[at + "loss"], **CLOSE)
        torch.testing.assert_close(student.grad, recorded[at + "grad_student"], **CLOSE)
        loss_global = loss_fn([recorded[at + "student_global"]], [probs])
        torch.testing.assert_close(loss_global, recorded[at + "loss_global"], **CLOSE)
    loss_fn.apply_center_update()
    torch.testing.assert_close(loss_fn.center, recorded[f"{case['name']}.center"], **CLOSE)


@pytest.mark.parametrize("case", cases("dino_sinkhorn"))
def test_dino_sinkhorn_reproduces_recorded_targets(case, recorded):
    probs = DINOLoss(case["out_dim"]).sinkhorn_knopp_teacher(
        recorded[f"{case['name']}.teacher"], case["teacher_temp"], case["n_iterations"]
    )
    torch.testing.assert_close(probs, recorded[f"{case['name']}.probs"], **CLOSE)


@pytest.mark.parametrize("case", cases("ibot_sinkhorn"))
def test_ibot_sinkhorn_reproduces_recorded_targets_and_leaves_the_count_alone(case, recorded):
    count = torch.tensor([case["n_masked"]])
    probs = iBOTPatchLoss(case["out_dim"]).sinkhorn_knopp_teacher(
        recorded[f"{case['name']}.teacher"], case["teacher_temp"], n_masked_patches_tensor=count
    )
    torch.testing.assert_close(probs, recorded[f"{case['name']}.probs"], **CLOSE)
    assert count.tolist() == [case["n_masked"]]


def test_ibot_sinkhorn_reduces_a_copy_of_the_count(monkeypatch):
    monkeypatch.setattr(
        "dinov2.distributed.all_reduce_sum_", lambda tensor: tensor.mul_(2)
    )  # two equal ranks
    for dtype in (torch.int64, torch.float32):
        count = torch.tensor([4], dtype=dtype)
        iBOTPatchLoss(3).sinkhorn_knopp_teacher(torch.eye(4, 3), 0.1, n_masked_patches_tensor=count)
        assert count.tolist() == [4]


@pytest.mark.parametrize("case", cases("ibot_centering"))
def test_ibot_loss_with_centering_reproduces_recorded_steps(case, recorded):
    loss_fn = iBOTPatchLoss(case["out_dim"], case["student_temp"], case["center_momentum"])
    for step, temperature in enumerate(case["teacher_temps"]):
        at = f"{case['name']}.{step}."
        got = {name[len(at) :]: tensor for name, tensor in recorded.items() if name.startswith(at)}
        probs = loss_fn.softmax_center_teacher(got["teacher"], temperature)
        loss_fn.update_center(got["teacher"])
        torch.testing.assert_close(probs, got["probs"], **CLOSE)

        num_masked = got["masks_weight"].shape[0]
        student = got["student"][:num_masked].clone().requires_grad_()
        weighted = loss_fn.forward_masked(student, probs[0], got["mask"], masks_weight=got["masks_weight"])
        weighted.backward()
        torch.testing.assert_close(weighted, got["loss_weighted"], **CLOSE)
        torch.testing.assert_close(student.grad, got["grad_student"], **CLOSE)
        default = loss_fn.forward_masked(student, probs[0], got["mask"])
        torch.testing.assert_close(default, got["loss_default_weight"], **CLOSE)
        padded = loss_fn.forward_masked(
            got["student"],
            got["teacher_padded"],
            got["mask"],
            n_masked_patches=num_masked,
            masks_weight=got["weight_custom"],
        )
        torch.testing.assert_close(padded, got["loss_custom_padded"], **CLOSE)
        if "loss_dense" in got:
            dense = loss_fn(got["dense_student"], got["dense_teacher"], got["mask"])
            torch.testing.assert_close(dense, got["loss_dense"], **CLOSE)
    loss_fn.apply_center_update()
    torch.testing.assert_close(loss_fn.center, recorded[f"{case['name']}.center"], **CLOSE)


@pytest.mark.parametrize("case", cases("koleo"))
def test_koleo_reproduces_recorded_loss_and_gradient(case, recorded):
    x = recorded[f"{case['name']}.x"].clone().requires_grad_()
    loss = KoLeoLoss()(x)
    loss.backward()
    torch.testing.assert_close(loss, recorded[f"{case['name']}.loss"], **CLOSE)
    torch.testing.assert_close(x.grad, recorded[f"{case['name']}.grad"], **CLOSE)


def plain_sinkhorn(logits, temperature, n_iterations=3):
    """The definition, in float64: alternate unit prototype sums and unit sample sums."""
    q = torch.exp(logits.double() / temperature).T
    num_prototypes, num_samples = q.shape
    for _ in range(n_iterations):
        q = q / q.sum(dim=1, keepdim=True) / num_prototypes
        q = q / q.sum(dim=0, keepdim=True) / num_samples
    return (q * num_samples).T


def test_sinkhorn_equals_its_definition_in_float64():
    logits = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
    got = sinkhorn_knopp(logits, 0.05)
    torch.testing.assert_close(got.double(), plain_sinkhorn(logits, 0.05), rtol=1e-4, atol=1e-7)


def test_sinkhorn_on_two_samples_by_hand():
    # Two samples, two prototypes, exp ratios 4:1 and 2:1. One round: divide by prototype sums (6, 2),
    # so rows are (4/6, 1/2) and (2/6, 1/2); then by row sums 7/6 and 5/6.
    logits = torch.log(torch.tensor([[4.0, 1.0], [2.0, 1.0]]))
    got = sinkhorn_knopp(logits, 1.0, n_iterations=1)
    torch.testing.assert_close(got, torch.tensor([[4 / 7, 3 / 7], [2 / 5, 3 / 5]]))


@pytest.mark.parametrize("offset", [0.0, 3.55, 100.0, 1e4])
def test_sinkhorn_survives_large_logits(offset):
    logits = torch.randn(16, 32, generator=torch.Generator().manual_seed(1)) * 3 + offset
    logits[3] -= 50.0  # far below the others: a global maximum alone would make this row vanish
    probs = sinkhorn_knopp(logits, 0.04)
    assert torch.isfinite(probs).all()
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(16))


def test_a_row_far_below_the_others_keeps_its_targets():
    logits = torch.zeros(4096, 8)
    logits[:, :7] = torch.randn(4096, 7, generator=torch.Generator().manual_seed(6)) * 0.1
    logits[:, 7] = -20.0
    logits[5] = -10.0
    logits[5, 7] = -5.0  # alone in wanting the last prototype, and vanishing beside the global maximum
    probs = sinkhorn_knopp(logits, 0.04)
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(4096))
    assert probs[5].argmax() == 7


def test_sinkhorn_of_no_rows_is_empty():
    assert sinkhorn_knopp(torch.empty(0, 5), 0.05).shape == (0, 5)


def test_sinkhorn_computes_half_precision_logits_in_float32():
    logits = torch.randn(8, 16, generator=torch.Generator().manual_seed(2)).half()
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.05), sinkhorn_knopp(logits.float(), 0.05))


def test_ibot_center_ignores_a_step_without_masked_patches():
    loss_fn = iBOTPatchLoss(4)
    loss_fn.update_center(torch.ones(1, 3, 4))
    loss_fn.apply_center_update()
    before = loss_fn.center.clone()
    loss_fn.update_center(torch.empty(1, 0, 4))
    loss_fn.apply_center_update()
    torch.testing.assert_close(loss_fn.center, before)
    assert before.abs().sum() > 0
    empty = loss_fn.forward_masked(torch.empty(0, 4), torch.empty(0, 4), torch.zeros(2, 9, dtype=torch.bool))
    assert empty.item() == 0.0


def test_center_update_takes_effect_at_the_next_targets():
    loss_fn = DINOLoss(3, center_momentum=0.5)
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    loss_fn.update_center(logits)
    assert loss_fn.center.abs().sum() == 0
    probs = loss_fn.softmax_center_teacher(logits, 0.1)
    torch.testing.assert_close(loss_fn.center, logits * 0.5)
    torch.testing.assert_close(probs, torch.softmax(logits * 0.5 / 0.1, dim=-1))


@pytest.mark.parametrize("loss_class", [DINOLoss, iBOTPatchLoss])
def test_center_statistics_of_half_precision_logits_are_float32(loss_class):
    # In float16 the sum of these rows is inf; in bfloat16 it stops growing at 256.
    logits = torch.full((1, 1000, 3), 100.0)
    for dtype in (torch.float16, torch.bfloat16):
        loss_fn = loss_class(3, center_momentum=0.0)
        loss_fn.update_center(logits.to(dtype) if loss_class is iBOTPatchLoss else logits[0].to(dtype))
        assert loss_fn.async_batch_center.dtype == torch.float32
        loss_fn.apply_center_update()
        torch.testing.assert_close(loss_fn.center.flatten(), torch.full((3,), 100.0))


def test_koleo_by_hand_on_two_rows():
    # Two orthogonal unit vectors: each is the other's neighbour at distance sqrt(2).
    loss = KoLeoLoss()(torch.eye(2) * 5.0)
    assert loss.item() == pytest.approx(-math.log(math.sqrt(2)), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_koleo_with_duplicate_rows_is_finite_and_pushes_only_the_others(dtype):
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[1] = x[0]
    x.requires_grad_()
    loss = KoLeoLoss()(x)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()
    assert x.grad[0].abs().max() < 10
    assert x.grad[3].abs().sum() > 0


def test_koleo_of_a_single_row_is_zero_with_a_graph():
    x = torch.randn(1, 8, requires_grad=True)
    loss = KoLeoLoss()(x)
    loss.backward()
    assert loss.item() == 0.0
    assert x.grad.abs().sum() == 0


def test_koleo_ignores_autocast():
    x = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(4)), dim=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = KoLeoLoss()(x)
    torch.testing.assert_close(inside, KoLeoLoss()(x))


def test_unnormalised_logits_of_equal_size_give_the_log_of_the_prototype_count():
    num_prototypes = 64
    flat = torch.zeros(4, num_prototypes)
    targets = torch.softmax(torch.randn(4, num_prototypes, generator=torch.Generator().manual_seed(5)), -1)
    assert DINOLoss(num_prototypes)([flat], [targets]).item() == pytest.approx(math.log(num_prototypes))
