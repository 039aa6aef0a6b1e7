"""Compiled blocks and losses: the same numbers as without, in one piece, and only where a run wants it."""

import logging
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.compile_worker.subproc_pool import SubprocException
from torch._inductor.exc import CppCompileError, InductorError

from dinov2 import compiled as compiled_module
from dinov2.errors import ConfigError
from dinov2.layers.block import Block
from dinov2.train import compilation
from dinov2.train.compilation import CompilationError, WatchedCompiler, compile_blocks, wants_compiling
from dinov2.train.diagnosis import diagnose
from tests.train.planning.steps import SMALL, build, random_batch, resolve

SEPARATE_HEAD = ("ibot.separate_head=true", "ibot.head_n_prototypes=700")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, suppress_errors=False):
        yield
    torch._dynamo.reset()


def gradients(cfg, batch, device):
    torch.manual_seed(0)
    model = build(cfg, device)
    torch.manual_seed(1)  # of stochastic depth
    losses = model.compute_losses(batch, 0.07)
    losses.total.backward()
    return losses, {name: p.grad for name, p in model.student.named_parameters() if p.grad is not None}


def assert_equal_gradients(*overrides, device="cpu", number_format="fp32", rel=1e-4):
    settings = (
        *SMALL,
        "dino.koleo_loss_weight=0",
        *overrides,
    )  # KoLeo of nearly equal tokens is all rounding
    plain = resolve(*settings, "train.compile=false", number_format=number_format)
    batch = random_batch(plain, torch.float32)
    expected, wanted = gradients(plain, batch, device)
    cfg = resolve(*settings, "train.compile=true", number_format=number_format)
    losses, found = gradients(cfg, batch, device)
    torch.testing.assert_close(losses.total, expected.total, rtol=rel, atol=0.0)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= rel * wanted[name].norm() + 1e-9, name


@pytest.mark.parametrize(
    "overrides",
    [
        ("student.drop_path_rate=0.4", "student.drop_path_uniform=false", "student.depth=3"),
        pytest.param(
            ("student.drop_path_rate=0", "train.centering=centering", *SEPARATE_HEAD), marks=pytest.mark.slow
        ),
        pytest.param(
            ("train.activation_checkpointing=full", "student.block_chunks=2"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("student.ffn_layer=swiglufused", "train.freeze_blocks=1", "student.num_register_tokens=2"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda overrides: overrides[0],
)
def test_graphs_are_whole_and_change_nothing(overrides, monkeypatch):
    """What dynamo and autograd make of the code, run by PyTorch's own operators."""

    whole = partial(compiled_module.compiled, fullgraph=True, backend="aot_eager")
    for user in ("layers.block", "loss.prototypes", "loss.targets"):
        monkeypatch.setattr(f"dinov2.{user}.compiled", whole)
    monkeypatch.setattr(compilation, "_failure", lambda device: "")
    assert_equal_gradients(*overrides)
    assert counters["stats"]["unique_graphs"] >= 4
    assert not counters["graph_break"]


class Spoils(nn.Module):
    def forward(self, x):
        return x * float("nan")


def test_what_is_compiled_can_be_looked_into(tmp_path, monkeypatch):
    """The diagnosis of a step that is not finite names the module inside of a block."""
    monkeypatch.setattr("dinov2.layers.block.compiled", partial(compiled_module.compiled, backend="eager"))
    model = build(resolve(*SMALL, number_format="fp32"))
    compile_blocks(model.student["backbone"], model.teacher["backbone"], required=True)
    batch = random_batch(model.cfg, torch.float32)
    model.compute_losses(batch, 0.07)
    name, block = next((n, m) for n, m in model.student["backbone"].named_modules() if isinstance(m, Block))
    block.mlp.act = Spoils()
    arguments = {"iteration": 3, "images": ["a.png"], "output_dir": tmp_path}
    found = diagnose(model, [batch], 0.07, lambda number: None, **arguments)
    assert f"the output of the module student.backbone.{name}.mlp.act was the first" in found
    assert counters["stats"]["unique_graphs"] > 0  # of the pass before


@pytest.mark.slow
@pytest.mark.parametrize("number_format, rel", [("fp32", 1e-4), ("bf16", 5e-2)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_compiled_code_computes_the_same(rate, number_format, rel, monkeypatch):
    monkeypatch.setattr("dinov2.layers.layer_norm.DEVICES", ("cpu",))  # as on a GPU
    assert_equal_gradients(f"student.drop_path_rate={rate}", number_format=number_format, rel=rel)
    assert counters["stats"]["unique_graphs"] >= 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("number_format, rel", [("fp32", 2e-3), ("bf16", 5e-2)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_compiled_code_of_a_gpu_computes_the_same(rate, number_format, rel):
    assert_equal_gradients(
        f"student.drop_path_rate={rate}",
        "dino.head_n_prototypes=65536",
        device="cuda",
        number_format=number_format,
        rel=rel,
    )
    assert counters["stats"]["unique_graphs"] >= 4


@pytest.fixture
def works(monkeypatch):
    """A GPU with all that its compiler needs."""
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr(compilation, "find_spec", lambda name: name)
    monkeypatch.setattr(compilation, "_failure", lambda device: "")
    return monkeypatch


def test_a_gpu_compiles_unless_told_otherwise(works):
    assert wants_compiling(None, GPU) and torch._dynamo.config.suppress_errors
    assert not wants_compiling(False, GPU)
    assert not wants_compiling(None, CPU)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_who_asks_for_compiling_wants_to_know_of_failures(device, works):
    assert wants_compiling(None, GPU)  # an earlier run of this process
    assert wants_compiling(True, device) and not torch._dynamo.config.suppress_errors


@pytest.mark.parametrize("setting", [None, True])
@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("find_spec", lambda name: None, "Triton is not installed"),
        (
            "shutil",
            SimpleNamespace(which=lambda name: None),
            "there is no C compiler (install gcc, or set CC)",
        ),
        ("_failure", lambda device: "Python.h is missing", "Python.h is missing"),
    ],
)
def test_a_gpu_without_a_working_compiler(setting, name, value, told, works, caplog):
    works.delenv("CC")
    works.setattr(compilation, name, value)
    if setting:
        with pytest.raises(ConfigError, match="train.compile is true, but .* not work: " + re.escape(told)):
            wants_compiling(setting, GPU)
        return
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        assert not wants_compiling(setting, GPU)
    assert f"not compiled, which makes its steps about half as fast on a GPU: {told}" in caplog.text


@pytest.mark.slow
def test_the_compiler_is_tried():
    torch._dynamo.config.suppress_errors = True  # as an environment variable may have it
    for fine in (True, False):
        compilation._failure.cache_clear()
        torch._dynamo.reset()
        broken = {"cpp.cxx": (None, "/nowhere/c++"), "force_disable_caches": True}
        with torch._inductor.config.patch({} if fine else broken):
            assert ("" if fine else "No working C++ compiler") in compilation._failure(CPU)
            assert bool(compilation._failure(CPU)) is not fine
    compilation._failure.cache_clear()


def refuse(module, inputs):
    """Fails as Inductor does, which compiles backwards only when gradients are asked for."""
    raise InductorError(ValueError("no code for this\nat all"), None)


def run_with(backend, monkeypatch):
    """One forward and backward pass of blocks that ``backend`` compiles."""
    monkeypatch.setattr("dinov2.layers.block.compiled", partial(compiled_module.compiled, backend=backend))
    model = build(resolve(*SMALL, number_format="fp32"))
    compile_blocks(model.student["backbone"], model.teacher["backbone"], required=True)
    watch = WatchedCompiler()
    for _ in range(2):
        with watch.watched():
            losses = model.compute_losses(random_batch(model.cfg, torch.float32), 0.07)
            losses.total.backward()
    return losses


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_a_compiler_that_fails_is_one_sentence(stage, monkeypatch):
    only_forward = aot_autograd(fw_compiler=lambda module, inputs: module.forward, bw_compiler=refuse)
    with pytest.raises(CompilationError, match="compiled .no code for this.*train.compile=false") as caught:
        run_with(refuse if stage == "forward" else only_forward, monkeypatch)
    assert "\n" not in str(caught.value)


def test_a_run_that_did_not_ask_goes_on_without_what_fails_and_says_so_once(monkeypatch, caplog):
    with torch._dynamo.config.patch(suppress_errors=True), caplog.at_level("WARNING", logger="dinov2"):
        losses = run_with(refuse, monkeypatch)
    assert torch.isfinite(losses.total)
    said = [text for text in caplog.messages if "the compiler left" in text]
    assert len(said) == 1 and int(said[0].split()[3]) >= 1


def test_what_a_compiler_gives_up_is_counted_once(caplog):
    function = torch.compile(lambda x, n: x + n, backend="eager", dynamic=False)
    watch = WatchedCompiler()
    with torch._dynamo.config.patch(recompile_limit=1), caplog.at_level("WARNING", logger="dinov2"):
        for size in (2, 3, 4):
            with watch.watched():
                function(torch.zeros(size), 1)
    said = [text for text in caplog.messages if "the compiler left 1 functions" in text]
    assert len(said) == 1 and "TORCH_LOGS" in said[0]


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (
            SubprocException("Traceback (most recent call last):\n  File x\nOSError: no ptxas\n"),
            "OSError: no ptxas",
        ),
        (
            CppCompileError(
                ["c++", "-x"], "In file a.c:\na.c:1: fatal error: Python.h: No such file\n 1 | #"
            ),
            "a.c:1: fatal error: Python.h: No such file",
        ),
        (RuntimeError("Compiler: c++-99 is not found.\nInstall one."), "Compiler: c++-99 is not found."),
        (ValueError(), "ValueError"),
    ],
)
def test_the_reason_is_the_line_that_tells(cause, reason):
    assert compilation._reason(InductorError(cause, None)) == reason


def test_other_errors_of_a_step_stay_what_they_are(caplog):
    with pytest.raises(RuntimeError, match="shapes") as caught, WatchedCompiler().watched():
        raise RuntimeError("shapes do not fit")
    assert caught.type is RuntimeError
    with WatchedCompiler().watched():
        pass
    assert not caplog.messages


def test_a_backbone_without_blocks_is_compiled_only_if_nobody_asked():
    compile_blocks(nn.Linear(2, 2), required=False)
    with pytest.raises(ConfigError, match="train.compile is true, but Linear has none"):
        compile_blocks(nn.Linear(2, 2), required=True)


def test_code_is_made_for_many_shapes():
    compiled_module.compiled(lambda x: x)
    assert torch._dynamo.config.recompile_limit >= 64
