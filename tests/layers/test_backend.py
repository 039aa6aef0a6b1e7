"""The kernels agree with each other, honour dropout and causality, and are chosen per call."""

import os
import subprocess
import sys

import pytest
import torch

import dinov2.layers.backend as backend_module
from dinov2.errors import ConfigError
from dinov2.layers.backend import attend


def _qkv(device="cpu", dtype=torch.float32, tokens=17):
    generator = torch.Generator().manual_seed(0)
    strided = torch.randn(3, 2, tokens, 4, 16, generator=generator).to(device, dtype)
    return [t.transpose(1, 2).detach().requires_grad_() for t in strided]  # [B, H, N, E], not contiguous


def _output_and_gradients(backend, is_causal, **where):
    q, k, v = _qkv(**where)
    out = attend(q, k, v, is_causal=is_causal, backend=backend)
    return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_fused_equals_explicit_softmax(backend, is_causal):
    wants = _output_and_gradients("math", is_causal)
    for got, want in zip(_output_and_gradients(backend, is_causal), wants, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_explicit_softmax_by_hand():
    q = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    k = torch.tensor([[[[1.0, 1.0], [0.0, 1.0]]]])
    v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    first = torch.softmax(torch.tensor([1.0, 0.0]) / 2**0.5, dim=0)
    want = torch.stack([first, torch.tensor([0.5, 0.5])])[None, None]
    torch.testing.assert_close(attend(q, k, v, backend="math"), want)
    torch.testing.assert_close(attend(q, k, v, backend="math", is_causal=True)[0, 0, 0], v[0, 0, 0])


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_dropout_is_honoured_and_keeps_the_mean(backend):
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 64, 8)
    v = torch.ones(1, 1, 64, 8)
    draws = torch.stack([attend(q, k, v, dropout_p=0.5, backend=backend) for _ in range(50)])
    # One output is a mean of 64 values that are 0 or 2: standard deviation 1/8.
    assert draws[..., 0].std() == pytest.approx(0.125, rel=0.1)
    assert draws.mean() == pytest.approx(1.0, abs=0.02)


def test_unknown_backend_names_the_nearest():
    with pytest.raises(ConfigError, match='did you mean "xformers"'):
        attend(*_qkv(), backend="xformer")


@pytest.mark.parametrize(
    ("available", "enabled", "reason"),
    [(False, True, "is not installed"), (False, False, "XFORMERS_DISABLED"), (True, True, "are on cpu")],
)
def test_xformers_that_cannot_serve_is_refused(monkeypatch, available, enabled, reason):
    monkeypatch.setattr(backend_module, "XFORMERS_AVAILABLE", available)
    monkeypatch.setattr(backend_module, "XFORMERS_ENABLED", enabled)
    with pytest.raises(ConfigError, match=reason):
        attend(*_qkv(), backend="xformers")


def test_installed_xformers_is_left_alone_by_cpu_tensors(monkeypatch):
    monkeypatch.setattr(backend_module, "XFORMERS_AVAILABLE", True)
    monkeypatch.setattr(backend_module, "XFORMERS_ENABLED", True)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)  # importing it would fail
    torch.testing.assert_close(attend(*_qkv()), attend(*_qkv(), backend="math"), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_xformers_equals_sdpa(dtype, is_causal):
    pytest.importorskip("xformers")
    where = {"device": "cuda", "dtype": dtype}
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    wants = _output_and_gradients("sdpa", is_causal, **where)
    for got, want in zip(_output_and_gradients("xformers", is_causal, **where), wants, strict=True):
        torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize("disabled", [False, True])
def test_import_is_quiet_and_leaves_xformers_alone(disabled):
    code = (
        "import sys, importlib.util\n"
        "from dinov2.layers import attention, block, swiglu_ffn\n"
        "assert 'xformers' not in sys.modules\n"
        "found = importlib.util.find_spec('xformers') is not None\n"
        "for module in (attention, block, swiglu_ffn):\n"
        f"    assert module.XFORMERS_ENABLED is {not disabled}\n"
        f"    assert module.XFORMERS_AVAILABLE is (found and {not disabled})\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "XFORMERS_DISABLED"}
    env |= {"XFORMERS_DISABLED": "1"} if disabled else {}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
