"""The projection head against recorded outputs and gradients, and against torch's weight_norm."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov2.layers import DINOHead
from tests.conftest import load_golden_json, load_golden_tensors

RECORD = load_golden_json("dino_head.json")
TENSORS = load_golden_tensors(RECORD["file"])
TOLERANCE = {"rtol": RECORD["rtol"], "atol": RECORD["atol"]}


def _recorded_head(name):
    prefix = f"{name}.state."
    head = DINOHead(**RECORD["cases"][name]["ctor"]).eval()
    head.load_state_dict({key[len(prefix) :]: t for key, t in TENSORS.items() if key.startswith(prefix)})
    return head


@pytest.mark.parametrize("name", RECORD["cases"])
def test_recorded_case(name):
    case, head = RECORD["cases"][name], _recorded_head(name)
    assert {key: list(t.shape) for key, t in head.state_dict().items()} == case["keys"]
    for i in range(case["inputs"]):
        record = {key: TENSORS[f"{name}.{i}.{key}"] for key in ("x", "y", "cotangent", "grad_x")}
        x = record["x"].requires_grad_()
        y = head(x)
        torch.testing.assert_close(y, record["y"], **TOLERANCE)
        weights = dict(head.named_parameters())
        grads = torch.autograd.grad((y * record["cotangent"]).sum(), [x, *weights.values()])
        torch.testing.assert_close(grads[0], record["grad_x"], **TOLERANCE)
        for key, grad in zip(weights, grads[1:], strict=True):
            recorded = TENSORS.get(f"{name}.{i}.grad.{key}")
            if recorded is not None:
                torch.testing.assert_close(grad, recorded, **TOLERANCE)


def test_last_layer_equals_weight_norm():
    torch.manual_seed(0)
    last = DINOHead(12, 30, bottleneck_dim=8).last_layer
    last.weight_g.data.uniform_(0.5, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = nn.utils.weight_norm(nn.Linear(8, 30, bias=False))
    reference.load_state_dict(last.state_dict())  # the same keys
    x, cotangent = torch.randn(5, 8), torch.randn(5, 30)
    torch.testing.assert_close(last(x), reference(x))
    (last(x) * cotangent).sum().backward()
    (reference(x) * cotangent).sum().backward()
    for name in ("weight_g", "weight_v"):
        torch.testing.assert_close(getattr(last, name).grad, getattr(reference, name).grad)


def test_gradient_numerically():
    torch.manual_seed(0)
    head = DINOHead(6, 9, hidden_dim=7, bottleneck_dim=5).double()
    for linear in (head.mlp[0], head.mlp[2], head.mlp[4]):
        nn.init.normal_(linear.weight)
    names, values = zip(*head.named_parameters(), strict=True)

    def call(x, *weights):
        return torch.func.functional_call(head, dict(zip(names, weights, strict=True)), (x,))

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *(v.detach().requires_grad_() for v in values)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_stays_close_and_trains(dtype):
    torch.manual_seed(0)
    head = DINOHead(32, 50, hidden_dim=64, bottleneck_dim=16)
    x = torch.randn(40, 32)
    want = head(x)
    want_grads = torch.autograd.grad(want.square().sum(), head.parameters())
    with torch.autocast("cpu", dtype=dtype):
        got = head(x)
    assert got.dtype == dtype
    assert F.cosine_similarity(got.float(), want, dim=-1).min() > 0.999
    got_grads = torch.autograd.grad(got.float().square().sum(), head.parameters())
    for got_grad, want_grad in zip(got_grads, want_grads, strict=True):
        assert got_grad.dtype == torch.float32
        assert (got_grad - want_grad).norm() <= 0.03 * want_grad.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters(dtype):
    torch.manual_seed(0)
    head = DINOHead(32, 50, hidden_dim=64, bottleneck_dim=16)
    x = torch.randn(4, 32)
    want = head(x)
    got = head.to(dtype)(x.to(dtype))
    assert got.dtype == dtype and got.isfinite().all()
    assert F.cosine_similarity(got.float(), want, dim=-1).min() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zero_features_give_finite_scores(dtype):
    head = DINOHead(8, 10, nlayers=1, bottleneck_dim=4).to(dtype)
    assert not head(torch.zeros(2, 8, dtype=dtype)).any()


def test_initialisation():
    torch.manual_seed(0)
    head = DINOHead(64, 300, hidden_dim=512, bottleneck_dim=128)
    assert torch.equal(head.last_layer.weight_g, torch.ones(300, 1))
    assert head.last_layer.weight_g.requires_grad
    assert head.mlp[2].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not any(head.mlp[i].bias.any() for i in (0, 2, 4))
    assert head.last_layer.weight_v.abs().max() <= 128**-0.5
    assert head.last_layer.weight_v.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.02)


def test_layer_count_is_clamped_and_batchnorm_placed():
    assert isinstance(DINOHead(8, 10, nlayers=0).mlp, nn.Linear)
    kinds = [type(layer) for layer in DINOHead(8, 10, use_bn=True, nlayers=3).mlp]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.GELU]
    assert kinds == [*hidden, *hidden, nn.Linear]


def test_copies_are_independent():
    head = DINOHead(8, 10)
    twin = copy.deepcopy(head)
    twin.last_layer.weight_g.data.mul_(2)
    x = torch.randn(3, 8)
    torch.testing.assert_close(twin(x), 2 * head(x))
