"""Recorded blocks compute what blocks do; without a GPU, with a recorder that runs functions again."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from dinov2.compiled import uncompiled
from dinov2.errors import ConfigError
from dinov2.train import cuda_graphs
from dinov2.train import train as training
from dinov2.train.cuda_graphs import COMPARISONS, RecordedBlocks, RecordingError, record_blocks, records
from dinov2.train.optimizer import build_optimizer
from dinov2.train.step import train_step
from dinov2.utils.seeding import seed_everything
from tests.train.planning.steps import SMALL, VALUES, build, random_batch, resolve

STEPS, WARM_UP = 6, 2


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
            # As a GPU does it: autograd does not learn of it.
            for mine, new in zip(tensors, again, strict=True):
                if mine is not None:
                    mine.data.copy_(new)
            for later in (tensor for result in self.results[number + 1 :] for tensor in result):
                later.data.fill_(float("nan"))

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


def record(model, make_recorder, has_room=None):
    for name in ("student", "teacher"):
        runner = RecordedBlocks(name, WARM_UP, make_recorder, has_room)
        getattr(model, name)["backbone"].run_blocks = runner


def train(cfg, device="cpu", make_recorder=None, has_room=None, steps=STEPS):
    """Take steps on different batches; return losses and the model."""
    model = build(cfg, device)
    if make_recorder is not None:
        record(model, make_recorder, has_room)
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
    replays = STEPS * cfg.optim.accumulate_steps - WARM_UP + COMPARISONS
    # The teacher, which is first, has no gradients.
    assert shelf.counts() == [(1, replays + 1), (2, 2 * replays + 1)]


@pytest.mark.parametrize("has_room", [None, lambda: True])
def test_a_step_that_is_not_finite_says_nothing_about_a_recording(has_room, caplog):
    cfg = resolve(*SMALL)
    model = build(cfg)
    record(model, Shelf(), has_room)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    recorded = []
    for step in range(WARM_UP + 2):
        batch = random_batch(cfg, torch.float32)
        if step == WARM_UP:
            batch["collated_global_crops"][0] = float("nan")
        problem = train_step(model, optimizer, [batch], VALUES, 3.0).problem
        assert bool(problem) is (step == WARM_UP)
        recorded.append(
            [getattr(model, n)["backbone"].run_blocks.is_recorded for n in ("student", "teacher")]
        )
    assert recorded[WARM_UP] == [False, False] and recorded[-1] == [True, True]
    assert "compute something else" not in caplog.text


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
    refused = pytest.raises(RuntimeError, match="these blocks ran again, or backwards, since")
    with refused:
        first.total.backward()
    second.total.backward()
    tokens = model.student_tokens(model._prepare(random_batch(model.cfg))).global_cls.sum()
    tokens.backward(retain_graph=True)
    with refused:
        tokens.backward()


def test_gradients_of_a_last_block_alone_are_refused_after_another_run():
    """They do not pass the recorded blocks; what the last block keeps of their result was overwritten."""
    _, model = train(resolve(*SMALL, "student.drop_path_rate=0"), make_recorder=Shelf(), steps=3)
    weight = model.student["backbone"].blocks[-1].norm1.weight
    first, second = (model.compute_losses(random_batch(model.cfg), 0.07) for _ in range(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first.total, weight)
    assert torch.autograd.grad(second.total, weight)[0].any()


def test_what_a_last_block_learns_from_is_not_overwritten():
    """Nobody asks recorded blocks for gradients where only the last one learns."""
    cfg = resolve(*SMALL)
    model, shelf = build(cfg), Shelf()
    model.student["backbone"].requires_grad_(False)
    model.student["backbone"].blocks[-1].requires_grad_(True)
    batches = [random_batch(cfg) for _ in range(2)]

    def gradient_of_the_first():
        torch.manual_seed(0)
        first = model.compute_losses(batches[0], 0.07)
        model.compute_losses(batches[1], 0.07)
        return torch.autograd.grad(first.total, model.student["backbone"].blocks[-1].mlp.fc1.weight)[0]

    expected = gradient_of_the_first()
    model.student["backbone"].run_blocks = RecordedBlocks("student", 0, shelf)
    assert torch.equal(gradient_of_the_first(), expected)
    assert shelf.counts() == [(1, COMPARISONS + 1 + 2)]


def test_only_what_repeats_is_recorded():
    model, shelf = small_run()
    weight = model.student["backbone"].blocks[0].mlp.fc1.weight
    batch = random_batch(model.cfg)
    of_student = model.student["backbone"].run_blocks

    def run(times):
        recorded = []
        for _ in range(times):
            model.forward_backward(batch, 0.07)
            recorded.append(of_student.is_recorded)
        return recorded

    weight.data = weight.data.clone()  # lies elsewhere
    assert run(3) == [False, False, True]
    weight.requires_grad_(False)
    assert run(4) == [False, False, True, True]
    model.teacher_logits(model._prepare(batch))  # of another network
    weight.requires_grad_(True)
    assert run(1) == [False]
    weight.requires_grad_(False)
    assert run(3) == [False, False, True]
    assert [functions for functions, _ in shelf.counts()] == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(assign):
    model, _ = small_run()
    batch, other = random_batch(model.cfg), build(model.cfg)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    state = deepcopy(other.state_dict())
    model.load_state_dict(state, assign=assign)
    for copy in (other, model):
        torch.manual_seed(0)
        copy.student.zero_grad(set_to_none=True)
        copy.forward_backward(batch, 0.07)
    assert model.student["backbone"].run_blocks.is_recorded is not assign
    for found, expected in zip(model.student.parameters(), other.student.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.grad, expected.grad)


def test_inference_mode_has_recordings_of_its_own():
    model, shelf = small_run()
    batch = model._prepare(random_batch(model.cfg))
    of_teacher = model.teacher["backbone"].run_blocks
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            for _ in range(WARM_UP + 1):
                model.teacher_logits(batch)
        assert of_teacher.is_recorded
    assert [functions for functions, _ in shelf.counts()] == [1, 2, 1, 1]


def test_a_frozen_backbone_is_released():
    cfg = resolve(*SMALL)
    model, shelf = build(cfg), Shelf()
    record(model, shelf)
    parameters = list(model.student["backbone"].parameters())
    for frozen in [True] * 4 + [False] * 4:
        for parameter in parameters:
            parameter.requires_grad_(not frozen)
        model.forward_backward(random_batch(cfg), 0.07)
    # The teacher, the student without gradients, and with them.
    assert [functions for functions, _ in shelf.counts()] == [1, 1, 2]


def test_copies_start_anew():
    model, _ = small_run()
    backbone = model.student["backbone"]
    copy = deepcopy(backbone)
    assert backbone.run_blocks.is_recorded and not copy.run_blocks.is_recorded
    assert not pickle.loads(pickle.dumps(RecordedBlocks("student"))).is_recorded


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
        told = f"the {name} is not recorded as CUDA graphs: the memory did not suffice"
        assert caplog.text.count(told) == 1
    with pytest.raises(torch.OutOfMemoryError):
        train(cfg, make_recorder=lambda: Fails(NO_MEMORY))


def test_other_trouble_is_told_with_the_way_out():
    reason = "CUDA error: operation not permitted when stream is capturing"
    error = RuntimeError(f"{reason}\nCUDA kernel errors ...")
    told = f"the teacher could not be recorded as CUDA graphs ({reason}): use train.cuda_graphs=false"
    with pytest.raises(RecordingError) as caught:
        train(resolve(*SMALL), make_recorder=lambda: Fails(error), has_room=lambda: True)
    assert str(caught.value) == told


def test_trouble_without_words_is_told_by_its_kind():
    with pytest.raises(RecordingError, match=r"could not be recorded as CUDA graphs .RuntimeError.: use"):
        train(resolve(*SMALL), make_recorder=lambda: Fails(RuntimeError()), has_room=lambda: True)


class Errs(RunsAgain):
    """Replays one of the recorded functions wrongly from some time on."""

    def __init__(self, function, right):
        super().__init__()
        self.function, self.right = function, right

    def record(self, function):
        number = len(self.results)
        result, replay = super().record(function)
        if number != self.function:
            return result, replay
        count = iter(range(100))

        def replay_wrongly():
            replay()
            if next(count) >= self.right:
                self.results[number][-1].data.mul_(1.1)

        return result, replay_wrongly


@pytest.mark.parametrize("function", [0, 1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("right", [0, 1], ids="right {} times".format)
def test_a_recording_that_computes_something_else_is_not_used(function, right, caplog):
    cfg = resolve(*SMALL)
    told = "compute something else than its blocks (relative error 0.1)"
    with caplog.at_level("WARNING", logger="dinov2"):
        without = train(cfg, make_recorder=lambda: Errs(function, right), has_room=lambda: True)
    assert_equal(without, train(cfg))
    assert f"the student is not recorded as CUDA graphs: replays {told}" in caplog.text
    assert ("the teacher is not recorded" in caplog.text) == (function == 0)  # it has no gradients
    with pytest.raises(RecordingError) as caught:
        train(cfg, make_recorder=lambda: Errs(function, right))
    assert told in str(caught.value) and "use train.cuda_graphs=false" in str(caught.value)


def test_gradients_that_the_next_replay_spoils_are_noticed(monkeypatch):
    """As they would be added up over micro-batches."""

    def without_copies(recording, gradient):
        recording._gradient.copy_(gradient)
        recording._replay_back()
        recording.replays += 1
        return list(recording._gradients)

    monkeypatch.setattr(cuda_graphs._Recording, "backward", without_copies)
    with pytest.raises(RecordingError, match="of the student compute something else"):
        train(resolve(*SMALL), make_recorder=Shelf())


def test_nothing_is_recorded_without_room():
    shelf = Shelf()
    train(resolve(*SMALL), make_recorder=shelf, has_room=lambda: False)
    assert not shelf.counts()


def config(*overrides):
    return resolve(*SMALL, *overrides)


def test_which_runs_record(monkeypatch):
    gpu = torch.device("cuda")
    assert records(config(), gpu, compiled=True)
    assert not records(config("train.cuda_graphs=false"), gpu, compiled=True)
    assert not records(config(), gpu, compiled=False)
    assert not records(config(), torch.device("cpu"), compiled=True)
    assert not records(config("train.activation_checkpointing=full"), gpu, compiled=True)
    for untried in ("optim.accumulate_steps=2", "student.lora_rank=2"):
        assert not records(config(untried), gpu, compiled=True)
        assert records(config(untried, "train.cuda_graphs=true"), gpu, compiled=True)
    monkeypatch.setattr(cuda_graphs.distributed, "get_global_size", lambda: 2)
    assert not records(config(), gpu, compiled=True)
    with pytest.raises(ConfigError, match="is true, but the blocks are divided over several processes"):
        records(config("train.cuda_graphs=true"), gpu, compiled=True)


@pytest.mark.parametrize(
    "override, device, compiled, obstacle",
    [
        ("train.seed=0", "cpu", True, "there is no CUDA device"),
        ("train.seed=0", "cuda", False, r"nothing is compiled \(train.compile\)"),
        (
            "train.activation_checkpointing=selective",
            "cuda",
            True,
            "train.activation_checkpointing computes them again",
        ),
    ],
)
def test_what_can_not_be_recorded_is_refused(override, device, compiled, obstacle):
    cfg = config("train.cuda_graphs=true", override)
    with pytest.raises(ConfigError, match=f"train.cuda_graphs is true, but {obstacle}: leave it out"):
        records(cfg, torch.device(device), compiled=compiled)


def test_a_run_that_can_not_record_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SSLMetaArch", None)
    words = ["--output-dir", str(tmp_path), *SMALL, "train.dataset_path=ImageFolder:root=/nowhere"]
    args = training.get_args_parser().parse_args([*words, "train.cuda_graphs=true", "train.device=cpu"])
    with pytest.raises(ConfigError, match="train.cuda_graphs is true, but there is no CUDA device"):
        training.main(args)


def test_a_backbone_without_blocks_is_refused_only_if_asked_for():
    record_blocks({"student": nn.Linear(2, 2)}, calls_per_step=1, required=False)
    with pytest.raises(ConfigError, match="train.cuda_graphs is true, but Linear has none"):
        record_blocks({"student": nn.Linear(2, 2)}, calls_per_step=1, required=True)


@pytest.mark.gpu
@pytest.mark.parametrize("number_format, rel", [("fp32", 1e-5), ("bf16", 1e-3)])
@pytest.mark.parametrize(
    "overrides",
    [
        ("student.drop_path_rate=0.3", "student.block_chunks=2"),
        ("optim.accumulate_steps=3",),
        ("student.lora_rank=2",),
        ("train.freeze_blocks=2",),
    ],
    ids=lambda overrides: overrides[0],
)
def test_training_on_a_gpu_is_the_same(overrides, number_format, rel):
    settings = (*SMALL, "student.depth=4", "train.compile=true", *overrides)
    plain, recorded = (
        train(resolve(*settings, f"train.cuda_graphs={on}", number_format=number_format), "cuda", steps=9)
        for on in ("false", "true")
    )
    for network in (recorded[1].student, recorded[1].teacher):
        assert network["backbone"].run_blocks.is_recorded
    assert not hasattr(plain[1].student["backbone"].run_blocks, "is_recorded")
    assert_equal(recorded, plain, rel=rel)


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
