"""Recorded blocks compute what blocks do; without a GPU, with a recorder that runs functions again."""

import pytest
import torch
from omegaconf import OmegaConf

from dinov2.compiled import uncompiled
from dinov2.errors import ConfigError
from dinov2.train import cuda_graphs
from dinov2.train.cuda_graphs import RecordedBlocks, RecordingError, records
from dinov2.train.optimizer import build_optimizer
from dinov2.train.step import train_step
from dinov2.utils.seeding import seed_everything
from tests.train.planning.steps import SMALL, VALUES, build, random_batch, resolve

STEPS = 6


class RunsAgain:
    """Computes into the memory of the first results, and spoils what was recorded later, as a GPU may."""

    def __init__(self):
        self.results = []
        self.replayed = 0

    def record(self, function):
        with_grad = torch.is_grad_enabled()
        result = function()
        tensors = result if isinstance(result, tuple) else (result,)
        number = len(self.results)
        self.results.append([tensor for tensor in tensors if tensor is not None])

        def replay():
            self.replayed += 1
            with torch.set_grad_enabled(with_grad):
                again = function()
            again = again if isinstance(again, tuple) else (again,)
            with torch.no_grad():
                for mine, new in zip(tensors, again, strict=True):
                    if mine is not None:
                        mine.copy_(new)
                for later in (tensor for result in self.results[number + 1 :] for tensor in result):
                    later.fill_(float("nan"))

        return result, replay


class Shelf:
    """Hands out recorders and keeps them."""

    def __init__(self):
        self.recorders = []

    def __call__(self):
        self.recorders.append(RunsAgain())
        return self.recorders[-1]

    def counts(self):
        """(functions recorded, replays) of each recorder"""
        return [(len(recorder.results), recorder.replayed) for recorder in self.recorders]


def train(cfg, device="cpu", make_recorder=None, has_room=None, steps=STEPS):
    """Take steps on different batches; return losses and the model."""
    model = build(cfg, device)
    if make_recorder is not None:
        for name in ("student", "teacher"):
            getattr(model, name)["backbone"].run_blocks = RecordedBlocks(name, make_recorder, has_room)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    losses = []
    for step in range(steps):
        seed_everything(step)
        batches = [random_batch(cfg, model.precision.input_dtype) for _ in range(cfg.optim.accumulate_steps)]
        losses.append(train_step(model, optimizer, batches, VALUES, 3.0).losses)
    return losses, model


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
    cfg, shelf = resolve(*SMALL, *overrides), Shelf()
    assert_equal(train(cfg, make_recorder=shelf), train(cfg))
    replays = STEPS * cfg.optim.accumulate_steps - cuda_graphs.WARM_UP_CALLS
    assert shelf.counts() == [(1, replays), (2, 2 * replays)]  # the teacher, which is first, has no gradients


def small_run():
    shelf = Shelf()
    _, model = train(resolve(*SMALL), make_recorder=shelf, steps=3)
    return model, shelf


def test_what_is_looked_into_is_not_replayed():
    (model, shelf), seen = small_run(), []
    model.student["backbone"].blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    batch = random_batch(model.cfg)
    model.compute_losses(batch, 0.07)
    before = shelf.counts()
    with uncompiled():
        model.compute_losses(batch, 0.07)
    assert shelf.counts() == before
    assert len(seen) == 2  # the first time by the recorder, which runs functions again


def test_gradients_of_an_earlier_run_are_refused():
    model, _ = small_run()
    first, second = (model.compute_losses(random_batch(model.cfg), 0.07) for _ in range(2))
    with pytest.raises(RuntimeError, match="ran again before the backward pass of an earlier run"):
        first.total.backward()
    second.total.backward()


def test_weights_that_move_elsewhere_are_recorded_anew():
    model, shelf = small_run()
    weight = model.student["backbone"].blocks[0].mlp.fc1.weight
    weight.data = weight.data.clone()
    for _ in range(cuda_graphs.WARM_UP_CALLS + 1):
        model.forward_backward(random_batch(model.cfg), 0.07)
    assert [functions for functions, _ in shelf.counts()] == [1, 2, 2]


class Fails:
    """Has no memory, or another trouble."""

    def __init__(self, error):
        self.error = error

    def record(self, function):
        function()
        raise self.error


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_a_run_goes_on_without_memory_for_recordings(caplog):
    cfg = resolve(*SMALL)
    with caplog.at_level("WARNING", logger="dinov2"):
        without = train(cfg, make_recorder=lambda: Fails(NO_MEMORY), has_room=lambda: True)
    assert_equal(without, train(cfg))
    for name in ("student", "teacher"):
        assert (
            caplog.text.count(f"the {name} is not recorded as CUDA graphs: the memory did not suffice") == 1
        )
    with pytest.raises(torch.OutOfMemoryError):
        train(cfg, make_recorder=lambda: Fails(NO_MEMORY))


def test_other_trouble_is_told_with_the_way_out():
    error = RuntimeError(
        "CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors ..."
    )
    told = (
        "the teacher could not be recorded as CUDA graphs (CUDA error: operation not permitted when stream "
    )
    told += "is capturing): use train.cuda_graphs=false"
    with pytest.raises(RecordingError) as caught:
        train(resolve(*SMALL), make_recorder=lambda: Fails(error), has_room=lambda: True)
    assert str(caught.value) == told


def test_nothing_is_recorded_without_room():
    shelf = Shelf()
    train(resolve(*SMALL), make_recorder=shelf, has_room=lambda: False)
    assert not shelf.counts()


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


class TooLarge(cuda_graphs.CudaRecorder):
    """Lets a GPU's memory end in the midst of a recording."""

    def record(self, function):
        def too_large():
            function()
            raise NO_MEMORY

        return super().record(too_large)


@pytest.mark.gpu
def test_a_run_goes_on_without_memory_on_a_gpu(caplog):
    cfg = resolve(*SMALL, "train.compile=true", "train.cuda_graphs=false", number_format="bf16")
    with caplog.at_level("WARNING", logger="dinov2"):
        without = train(cfg, "cuda", make_recorder=TooLarge, has_room=lambda: True)
    assert "not recorded as CUDA graphs: the memory did not suffice" in caplog.text
    assert_equal(without, train(cfg, "cuda"), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("factor, room", [(0.0, True), (1e9, False)])
def test_room_on_a_gpu(factor, room, monkeypatch, caplog):
    monkeypatch.setattr(cuda_graphs, "MEMORY_FACTOR", factor)
    torch.ones(2**20, device="cuda")
    with caplog.at_level("INFO", logger="dinov2"):
        assert cuda_graphs.gpu_has_room() is room
    assert ("not recorded as CUDA graphs, which may need" in caplog.text) is not room
