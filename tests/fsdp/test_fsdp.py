"""Sharding with two real processes: same numbers as one process, and run states of any world size."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.tensor import DTensor

from dinov2 import distributed, fsdp
from dinov2.errors import ConfigError
from dinov2.fsdp import FSDPCheckpointer, get_fsdp_wrapper, sharding
from dinov2.fsdp.sharding import laid_out_like, whole_copy, whole_tensor
from tests.checkpoints import damage
from tests.distributed.launch import run_in_processes


def precision(strategy="FULL_SHARD", dtype="fp32"):
    return OmegaConf.create(
        {
            "sharding_strategy": strategy,
            "mixed_precision": {"param_dtype": dtype, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        }
    )


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x).tanh()


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), Block(6), Block(6), nn.Linear(6, 3))


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def train(model, optimizer, first, last):
    """Steps on a global batch of 8, split over the processes."""
    rank, size = distributed.get_global_rank(), distributed.get_global_size()
    losses = []
    for step in range(first, last):
        batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).chunk(size)[rank]
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(distributed.all_reduce_sum_(loss.detach().clone()).item() / size)
    return losses


def uninterrupted(steps=6):
    model = build()
    return train(model, optimizer_of(model), 0, steps)


def _sharded_run(folder, strategy):
    """Shard, train three steps, save; restore into a fresh sharded model, train on."""
    model = get_fsdp_wrapper(precision(strategy), {Block})(build())
    facts = {
        "units": len(fsdp.get_fsdp_modules(model)),
        "is_fsdp": (fsdp.is_fsdp(model), fsdp.is_fsdp(model[0]), fsdp.is_sharded_fsdp(model[1])),
        "rows": model[1].linear.weight.to_local().shape[0],
        "rank": fsdp.rankstr(),
    }
    optimizer = optimizer_of(model)
    losses = train(model, optimizer, 0, 3)
    with torch.no_grad():
        model(torch.zeros(1, 5))
    fsdp.reshard_fsdp_model(model)
    facts["rows after resharding"] = model[1].linear.weight.to_local().shape[0]
    FSDPCheckpointer(model, folder, optimizer=optimizer).save("model_0000002", iteration=2)
    distributed.barrier()

    model = get_fsdp_wrapper(precision(strategy), {Block})(build(seed=distributed.get_global_rank() + 5))
    optimizer = optimizer_of(model)
    extra = FSDPCheckpointer(model, folder, optimizer=optimizer).resume_or_load()
    return facts, losses + train(model, optimizer, extra["iteration"] + 1, 6)


def _resume_unsharded(folder):
    """Two processes read what one process wrote: no sharding, so every rank must end up with all of it."""
    model = build(seed=distributed.get_global_rank() + 5)
    saver = FSDPCheckpointer(model, folder, optimizer=optimizer_of(model))
    first = saver.resume_or_load()["iteration"]
    damaged = Path(folder, "model_0000004")
    saver.save(damaged.name, iteration=4)
    if distributed.is_main_process():
        damage(damaged, "__1_0.distcp")
    distributed.barrier()
    second = saver.resume_or_load()["iteration"]
    saver.save("model_final", iteration=9)
    return first, second, model[0].weight.sum().item()


def _overflow_on_one_rank(sharded=False):
    """A non-finite gradient on one rank only must make both skip the step."""
    model, scaler = build(), fsdp.ShardedGradScaler("cpu", init_scale=8.0)
    if sharded:  # a block: the rest stays whole, so both kinds meet in one optimizer
        get_fsdp_wrapper(precision())(model[1])
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.05)
    before = [whole_tensor(parameter.detach()).clone() for parameter in model.parameters()]
    loss = model(torch.ones(2, 5)).sum() * (float("inf") if distributed.get_global_rank() == 1 else 1.0)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    after = [whole_tensor(parameter.detach()) for parameter in model.parameters()]
    unchanged = all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    return unchanged, scaler.get_scale()


def _unscaled_gradients():
    """How far gradients, unscaled, of a model with one sharded block are from those of a whole model."""
    model, scaler = build(), fsdp.ShardedGradScaler("cpu", init_scale=8.0)
    get_fsdp_wrapper(precision())(model[1])
    scaler.scale(model(torch.ones(2, 5)).sum()).backward()
    scaler.unscale_(optimizer_of(model))
    plain = build()
    plain(torch.ones(2, 5)).sum().backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return max((whole_tensor(mine.grad) - other.grad).abs().max().item() for mine, other in pairs)


def _copied_whole():
    """The copy of a sharded module on one process alone, and what the module is afterwards."""
    model = get_fsdp_wrapper(precision("SHARD_GRAD_OP"), {Block})(build())
    with torch.no_grad():
        model(torch.ones(1, 5))  # leaves it gathered
    copied = whole_copy(model)
    if distributed.get_global_rank() == 1:  # no other process takes part
        assert torch.equal(copied(torch.ones(2, 5)), build()(torch.ones(2, 5)))
    kinds = {type(module).__name__ for module in copied.modules()}
    return kinds, all(isinstance(parameter, DTensor) for parameter in model.parameters())


def _laid_out_alike():
    """Whole and sharded tensors brought into the layout of the other."""
    whole = torch.arange(10.0).reshape(5, 2)
    sharded = get_fsdp_wrapper(precision())(nn.Linear(2, 5)).weight
    back = whole_tensor(laid_out_like(whole, sharded))
    return torch.equal(back, whole), torch.equal(laid_out_like(laid_out_like(whole, sharded), whole), whole)


def _accumulated_gradients(strategy):
    """Gradients of one batch, and of its two halves one after the other."""
    rank, size = distributed.get_global_rank(), distributed.get_global_size()
    batch = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).chunk(size)[rank]
    model = get_fsdp_wrapper(precision(strategy), {Block})(build())

    def gradients():
        fsdp.reshard_fsdp_model(model)
        return [whole_tensor(parameter.grad).tolist() for parameter in model.parameters()]

    model(batch).square().mean().backward()
    at_once = gradients()
    model.zero_grad()
    first, second = batch.chunk(2)
    fsdp.defer_gradient_reduction(model, True)
    (model(first).square().mean() / 2).backward()
    reduced = any(isinstance(parameter.grad, DTensor) for parameter in model.parameters())
    fsdp.defer_gradient_reduction(model, False)
    (model(second).square().mean() / 2).backward()
    return reduced, gradients(), at_once


def _everything(folder):
    outcome = {strategy: _sharded_run(f"{folder}/{strategy}", strategy) for strategy in STRATEGIES}
    outcome["unsharded"] = _resume_unsharded(f"{folder}/single")
    outcome["scaler"] = _overflow_on_one_rank()
    outcome["scaler, sharded"] = _overflow_on_one_rank(sharded=True)
    outcome["unscaled"] = _unscaled_gradients()
    outcome["copy"] = _copied_whole()
    outcome["layouts"] = _laid_out_alike()
    outcome["accumulated"] = {strategy: _accumulated_gradients(strategy) for strategy in STRATEGIES}
    return outcome


STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """One launch for all questions: starting processes takes longer than asking them."""
    folder = tmp_path_factory.mktemp("two")
    model = build()
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 3)
    FSDPCheckpointer(model, str(folder / "single"), optimizer=optimizer).save("model_0000002", iteration=2)
    return folder, model, run_in_processes(_everything, str(folder))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sharded_training_and_resuming_equal_one_process(two_processes, strategy):
    _, _, outcomes = two_processes
    for rank, outcome in enumerate(outcomes):
        facts, losses = outcome[strategy]
        assert losses == pytest.approx(uninterrupted(), rel=1e-5)
        assert facts == {
            "units": 3,
            "is_fsdp": (True, False, True),
            "rows": 3,
            "rank": f"rank_{rank}",
            "rows after resharding": 3,
        }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_sharded_run_is_continued_by_one_process(two_processes, strategy):
    folder, _, _ = two_processes
    assert sorted(path.name for path in (folder / strategy).iterdir()) == [
        "last_checkpoint.rank_0",
        "model_0000002",
    ]
    model = build(seed=9)
    optimizer = optimizer_of(model)
    saver = FSDPCheckpointer(model, str(folder / strategy), optimizer=optimizer)
    first = saver.resume_or_load()["iteration"] + 1
    assert train(model, optimizer, first, 6) == pytest.approx(uninterrupted()[first:], rel=1e-5)


def test_two_processes_continue_what_one_wrote_and_agree_on_the_file(two_processes):
    folder, model, outcomes = two_processes
    expected = (2, 2, model[0].weight.sum().item())
    assert [outcome["unsharded"] for outcome in outcomes] == [expected, expected]
    assert (folder / "single" / "last_checkpoint.rank_0").read_text() == "model_final"


def test_the_scaler_agrees_over_processes(two_processes):
    _, _, outcomes = two_processes
    for kind in ("scaler", "scaler, sharded"):
        assert [outcome[kind] for outcome in outcomes] == [(True, 4.0), (True, 4.0)]


def test_the_scaler_takes_sharded_and_whole_gradients_at_once(two_processes):
    _, _, outcomes = two_processes
    assert all(outcome["unscaled"] < 1e-6 for outcome in outcomes)


def test_a_whole_copy_runs_alone_and_leaves_the_module_sharded(two_processes):
    _, _, outcomes = two_processes
    expected = {"Sequential", "Linear", "Block"}
    assert [outcome["copy"] for outcome in outcomes] == [(expected, True)] * 2


def test_tensors_change_between_whole_and_sharded(two_processes):
    _, _, outcomes = two_processes
    assert [outcome["layouts"] for outcome in outcomes] == [(True, True)] * 2


@pytest.mark.parametrize(("strategy", "at_once"), [("FULL_SHARD", True), ("SHARD_GRAD_OP", False)])
def test_accumulated_gradients_equal_those_of_the_whole_batch(two_processes, strategy, at_once):
    _, _, outcomes = two_processes
    for outcome in outcomes:
        reduced, accumulated, expected = outcome["accumulated"][strategy]
        assert reduced is at_once
        for got, whole in zip(accumulated, expected, strict=True):
            torch.testing.assert_close(torch.tensor(got), torch.tensor(whole), rtol=1e-5, atol=1e-7)


def test_without_a_group_nothing_is_wrapped():
    model = build()
    assert get_fsdp_wrapper(precision(), {Block})(model) is model
    assert not fsdp.is_fsdp(model)
    assert not fsdp.is_sharded_fsdp(model)
    assert fsdp.get_fsdp_modules(model) == []
    fsdp.free_if_fsdp(model)
    fsdp.reshard_fsdp_model(model)
    assert fsdp.rankstr() == "rank_0"


def test_the_scaler_works_without_a_group():
    model, scaler = build(), fsdp.ShardedGradScaler("cpu", init_scale=8.0)
    optimizer = optimizer_of(model)
    scaler.scale(model(torch.ones(2, 5)).sum()).backward()
    scaler.unscale_(optimizer)
    scaled_back = [parameter.grad.clone() for parameter in model.parameters()]
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    model.load_state_dict(build().state_dict())
    model(torch.ones(2, 5)).sum().backward()
    for got, parameter in zip(scaled_back, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (precision("HYBRID_SHARDS"), "sharding_strategy is .* but must be one of NO_SHARD"),
        (precision(dtype="float16"), 'param_dtype is "float16".*fp16'),
    ],
)
def test_an_unknown_strategy_or_precision_is_refused(config, expected):
    with pytest.raises(ConfigError, match=expected):
        get_fsdp_wrapper(config)


@pytest.fixture
def eight_on_two_machines(monkeypatch):
    monkeypatch.setattr(distributed, "get_global_size", lambda: 8)
    monkeypatch.setattr(distributed, "get_local_size", lambda: 4)


def test_groups_of_a_hybrid_are_those_of_a_machine_unless_stated(eight_on_two_machines):
    assert sharding.hybrid_group_size(None) == 4
    assert sharding.hybrid_group_size(2) == 2
    comes_to = {size: sharding.effective_strategy("HYBRID_SHARD", size) for size in (1, 2, 8)}
    assert comes_to == {1: "NO_SHARD", 2: "HYBRID_SHARD", 8: "FULL_SHARD"}
    assert sharding.effective_strategy("SHARD_GRAD_OP", 3) == "SHARD_GRAD_OP"


@pytest.mark.parametrize("size", [3, 16])
def test_groups_that_do_not_divide_the_processes_are_refused(eight_on_two_machines, size):
    expected = f"hybrid_shard_size is {size}, which does not divide the 8 processes .* one of 1, 2, 4, 8$"
    with pytest.raises(ConfigError, match=expected):
        sharding.effective_strategy("HYBRID_SHARD", size)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((96, 32), None), ((1, 5, 32), 2), ((2, 8), 1), ((1, 5, 7), None), ((1,), None), ((), None)],
)
def test_short_first_axes_are_not_padded(shape, axis):
    found = sharding._divided_axis(torch.Size(shape), 4)
    assert (found and found.dim) == axis
