"""Recorded blocks compute what blocks do; without a GPU, with a recorder that runs functions again."""

import pytest
import torch
from omegaconf import OmegaConf

from dinov2.compiled import uncompiled
from dinov2.errors import ConfigError
from dinov2.train import cuda_graphs
from dinov2.train.cuda_graphs import RecordedBlocks, records
from dinov2.train.optimizer import build_optimizer
from dinov2.train.step import train_step
from dinov2.utils.seeding import seed_everything
from tests.train.planning.steps import SMALL, VALUES, build, random_batch, resolve

STEPS = 6


class RunsAgain:
    """As a recording does, computes into the memory of the first results, and reads that of the inputs."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def record(self, function):
        with_grad = torch.is_grad_enabled()
        results = function()
        self.recorded += 1
        tensors = results if isinstance(results, tuple) else (results,)

        def replay():
            self.replayed += 1
            with torch.set_grad_enabled(with_grad):
                again = function()
            for mine, new in zip(tensors, again if isinstance(again, tuple) else (again,), strict=True):
                if mine is not None:
                    with torch.no_grad():
                        mine.copy_(new)

        return results, replay


def train(cfg, device="cpu", make=None, steps=STEPS):
    """Take steps on different batches; return losses, the model, and what records the student."""
    model = build(cfg, device)
    recorded = []
    if make is not None:
        recorded = [make(), make()]
        for network, runner in zip((model.student, model.teacher), recorded, strict=True):
            network["backbone"].run_blocks = runner
    optimizer = build_optimizer(cfg, model.get_params_groups())
    losses = []
    for step in range(steps):
        seed_everything(step)
        batches = [random_batch(cfg, model.precision.input_dtype) for _ in range(cfg.optim.accumulate_steps)]
        losses.append(train_step(model, optimizer, batches, VALUES, 3.0).losses)
    return losses, model, recorded


def assert_equal(one, other, **tolerance):
    for a, b in zip(one[0], other[0], strict=True):
        assert a == pytest.approx(b, **tolerance)
    for (name, a), b in zip(one[1].state_dict().items(), other[1].state_dict().values(), strict=True):
        torch.testing.assert_close(
            a, b, rtol=tolerance.get("rel", 0.0), atol=tolerance.get("rel", 0.0), msg=name
        )


@pytest.mark.parametrize(
    "overrides",
    [
        ("student.drop_path_rate=0.4", "student.drop_path_uniform=false", "student.depth=4"),
        ("student.block_chunks=2", "student.depth=4"),
        ("student.block_chunks=0", "train.freeze_blocks=1", "student.depth=3"),
        ("optim.accumulate_steps=3", "student.depth=3"),
        ("student.lora_rank=2", "student.lora_alpha=4"),
        ("crops.local_crops_number=0", "student.drop_path_rate=0"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_training_is_the_same(overrides):
    cfg = resolve(*SMALL, *overrides)
    recorder = RunsAgain()
    recorded = train(cfg, make=lambda: RecordedBlocks(recorder))
    assert_equal(recorded, train(cfg))
    passes = STEPS * cfg.optim.accumulate_steps
    assert recorder.recorded == 3  # the student forwards and backwards, the teacher
    assert recorder.replayed == 3 * (passes - cuda_graphs.WARM_UP_CALLS)


def test_what_is_looked_into_is_not_replayed():
    recorder, seen = RunsAgain(), []
    _, model, _ = train(resolve(*SMALL), make=lambda: RecordedBlocks(recorder), steps=3)
    model.student["backbone"].blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    batch = random_batch(model.cfg)
    model.compute_losses(batch, 0.07)
    before = recorder.replayed
    with uncompiled():
        model.compute_losses(batch, 0.07)
    assert recorder.replayed == before
    assert len(seen) == 2  # the first time by the recorder, which runs functions again


def test_gradients_of_an_earlier_run_are_refused():
    recorder = RunsAgain()
    _, model, _ = train(resolve(*SMALL), make=lambda: RecordedBlocks(recorder), steps=3)
    first, second = (model.compute_losses(random_batch(model.cfg), 0.07) for _ in range(2))
    with pytest.raises(RuntimeError, match="ran again before the backward pass of an earlier run"):
        first.total.backward()
    second.total.backward()


def test_weights_that_move_elsewhere_are_recorded_anew():
    recorder = RunsAgain()
    _, model, (student, teacher) = train(resolve(*SMALL), make=lambda: RecordedBlocks(recorder), steps=3)
    weight = model.student["backbone"].blocks[0].mlp.fc1.weight
    weight.data = weight.data.clone()
    for _ in range(cuda_graphs.WARM_UP_CALLS + 1):
        model.forward_backward(random_batch(model.cfg), 0.07)
    assert (student.recordings, teacher.recordings) == (2, 1)


class Fails:
    def record(self, function):
        raise RuntimeError("CUDA error: operation not permitted")


def test_a_run_goes_on_where_recording_fails(caplog):
    cfg = resolve(*SMALL)
    with caplog.at_level("WARNING", logger="dinov2"):
        assert_equal(train(cfg, make=lambda: RecordedBlocks(Fails())), train(cfg))
    assert caplog.text.count("could not be recorded as CUDA graphs, so the run goes on without: CUDA") == 2
    with pytest.raises(RuntimeError, match="not permitted"):
        train(cfg, make=lambda: RecordedBlocks(Fails(), required=True))


def test_nothing_is_recorded_without_room():
    recorder = RunsAgain()
    train(resolve(*SMALL), make=lambda: RecordedBlocks(recorder, lambda: False))
    assert not recorder.recorded


def settings(**values):
    return OmegaConf.create({"cuda_graphs": None, "activation_checkpointing": "none", **values})


def test_which_runs_record():
    gpu = torch.device("cuda")
    assert records(settings(), gpu, compiled=True)
    assert records(settings(cuda_graphs=True), gpu, compiled=True)
    assert not records(settings(cuda_graphs=False), gpu, compiled=True)
    assert not records(settings(), gpu, compiled=False)
    assert not records(settings(), torch.device("cpu"), compiled=True)
    assert not records(settings(activation_checkpointing="full"), gpu, compiled=True)


@pytest.mark.parametrize(
    "values, device, compiled, obstacle",
    [
        ({}, "cpu", True, "there is no CUDA device"),
        ({}, "cuda", False, r"nothing is compiled \(train.compile\)"),
        ({"activation_checkpointing": "selective"}, "cuda", True, "train.activation_checkpointing computes"),
    ],
)
def test_what_can_not_be_recorded_is_refused(values, device, compiled, obstacle):
    with pytest.raises(ConfigError, match=f"train.cuda_graphs is true, but {obstacle}"):
        records(settings(cuda_graphs=True, **values), torch.device(device), compiled=compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("number_format, rel", [("fp32", 1e-4), ("bf16", 1e-2)])
@pytest.mark.parametrize(
    "overrides", [("student.drop_path_rate=0.3", "student.block_chunks=2"), ("optim.accumulate_steps=3",)]
)
def test_training_on_a_gpu_is_the_same(overrides, number_format, rel):
    settings = (*SMALL, "student.depth=4", "train.compile=true", *overrides)
    plain = train(resolve(*settings, "train.cuda_graphs=false", number_format=number_format), "cuda")
    recorded = train(resolve(*settings, "train.cuda_graphs=true", number_format=number_format), "cuda")
    for network in (recorded[1].student, recorded[1].teacher):
        assert network["backbone"].run_blocks.recordings == 1
    assert not hasattr(plain[1].student["backbone"].run_blocks, "recordings")
    differences = [
        abs(a["total_loss"] - b["total_loss"]) / b["total_loss"]
        for a, b in zip(recorded[0], plain[0], strict=True)
    ]
    assert max(differences) < rel, differences
    print(overrides, number_format, differences)


class Interrupted(cuda_graphs.CudaRecorder):
    """Lets a GPU's recording fail in its midst."""

    def record(self, function):
        def interrupted():
            result = function()
            torch.cuda.synchronize()  # not allowed while recording
            return result

        return super().record(interrupted)


@pytest.mark.gpu
def test_a_run_goes_on_where_a_gpu_records_nothing(caplog):
    cfg = resolve(*SMALL, "train.compile=true", "train.cuda_graphs=false", number_format="bf16")
    with caplog.at_level("WARNING", logger="dinov2"):
        failing = train(cfg, "cuda", make=lambda: RecordedBlocks(Interrupted()))
    assert "could not be recorded as CUDA graphs" in caplog.text
    assert_equal(failing, train(cfg, "cuda"), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("factor, room", [(0.0, True), (1e9, False)])
def test_room_on_a_gpu(factor, room, monkeypatch, caplog):
    monkeypatch.setattr(cuda_graphs, "MEMORY_FACTOR", factor)
    torch.ones(2**20, device="cuda")
    with caplog.at_level("INFO", logger="dinov2"):
        assert cuda_graphs.gpu_has_room() is room
    assert ("not recorded as CUDA graphs, which may need" in caplog.text) is not room
