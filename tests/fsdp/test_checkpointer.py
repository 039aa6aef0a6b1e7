"""The run state in one process: names, pruning, fallback, refusal."""

import json
import logging
import shutil

import pytest
import torch
from torch import nn

from dinov2.errors import OutputError, WeightsError
from dinov2.fsdp import FSDPCheckpointer, ShardedGradScaler
from dinov2.logging import MetricLogger
from tests.checkpoints import damage, read_state


def build(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def checkpointer(folder, seed=0, **options):
    model, optimizer = build(seed)
    return FSDPCheckpointer(model, str(folder), optimizer=optimizer, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save(saver, iteration):
    saver.save(f"model_{iteration:07d}", iteration=iteration)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, whole_optimizer = build()
    train(whole, whole_optimizer, 6)

    model, optimizer = build()
    train(model, optimizer, 3)
    metrics, scaler = MetricLogger(), ShardedGradScaler("cpu", init_scale=4.0)
    metrics.update(loss=2.5)
    FSDPCheckpointer(model, str(tmp_path), optimizer=optimizer, metrics=metrics, fp16_scaler=scaler).save(
        "model_0000002", iteration=2, rng=torch.get_rng_state(), note=None
    )

    model, optimizer = build(seed=1)
    metrics, scaler = MetricLogger(), ShardedGradScaler("cpu")
    extra = FSDPCheckpointer(
        model, str(tmp_path), optimizer=optimizer, metrics=metrics, fp16_scaler=scaler
    ).resume_or_load()
    train(model, optimizer, 3, first=extra["iteration"] + 1)
    assert set(extra) == {"iteration", "rng", "note"}
    assert metrics.loss.value == 2.5
    assert scaler.get_scale() == 4.0
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_layout_of_folder(tmp_path):
    saver = checkpointer(tmp_path)
    saver.save("model_0000009", iteration=9)
    saver.save("model_final", iteration=10)
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000009", "model_final"]
    assert (tmp_path / "last_checkpoint.rank_0").read_text() == "model_final"
    assert names(tmp_path / "model_final") == [".metadata", "__0_0.distcp", "manifest.json", "state.json"]
    manifest = json.loads((tmp_path / "model_final" / "manifest.json").read_text())
    assert (manifest["iteration"], manifest["world_size"], manifest["sequence"]) == (10, 1, 2)
    assert set(manifest["files"]) == {".metadata", "__0_0.distcp", "state.json"}
    assert str(tmp_path) not in (tmp_path / "model_final" / ".metadata").read_bytes().decode("latin1")
    state = read_state(tmp_path / "model_final")
    assert set(state) == {"model", "optimizer", "iteration"}
    assert set(state["model"]) == set(saver.model.state_dict())
    assert saver.get_checkpoint_file() == str(tmp_path / "model_final")


def test_a_view_does_not_drag_its_storage_into_the_file(tmp_path):
    big = torch.zeros(1_000_000)
    checkpointer(tmp_path).save("model_final", part=big[:10])
    assert (tmp_path / "model_final" / "__0_0.distcp").stat().st_size < 100_000


def test_only_the_newest_periodic_checkpoints_stay_even_across_restarts(tmp_path):
    for run in range(2):
        saver = checkpointer(tmp_path, max_to_keep=3)
        for iteration in range(10 * run, 10 * run + 4):
            save(saver, iteration)
    (tmp_path / ".model_0000001.tmp").mkdir()
    (tmp_path / "model_0000001.rank_1.pth").write_bytes(b"of an older program")
    saver.save("model_final", iteration=14)
    kept = [f"model_{iteration:07d}" for iteration in (11, 12, 13)]
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000001.rank_1.pth", *kept, "model_final"]


def test_multiples_of_keep_every_stay_for_ever(tmp_path):
    saver = checkpointer(tmp_path, max_to_keep=1, keep_every=4)
    for iteration in range(10):
        save(saver, iteration)
    kept = [f"model_{iteration:07d}" for iteration in (3, 7, 9)]
    assert names(tmp_path) == ["last_checkpoint.rank_0", *kept]


def test_after_a_roll_back_the_checkpoint_just_saved_stays(tmp_path):
    saver = checkpointer(tmp_path, max_to_keep=2)
    for iteration in (5, 6):
        save(saver, iteration)
    saver.tag_last_checkpoint("model_0000005")
    assert saver.resume_or_load()["iteration"] == 5
    saver.save("model_0000001", iteration=1)
    assert saver.resume_or_load()["iteration"] == 1


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, caplog, name):
    saver = checkpointer(tmp_path)
    for iteration in (1, 2, 3):
        save(saver, iteration)
    damage(tmp_path / "model_0000003", name)
    assert saver.resume_or_load()["iteration"] == 2
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "model_0000003 is damaged: " in message and name in message
    assert "resuming from the older model_0000002" in message


def test_an_unsafe_newest_checkpoint_falls_back_too(tmp_path, caplog):
    saver = checkpointer(tmp_path)
    save(saver, 1)
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "model_0000002.rank_0.pth")
    saver.tag_last_checkpoint("model_0000002.rank_0.pth")
    assert saver.resume_or_load()["iteration"] == 1
    assert "could run code" in caplog.text


def test_a_tag_for_a_deleted_file_falls_back_to_the_newest(tmp_path, caplog):
    saver = checkpointer(tmp_path)
    for iteration in (1, 2, 3):
        save(saver, iteration)
    shutil.rmtree(tmp_path / "model_0000003")
    assert saver.resume_or_load()["iteration"] == 2
    assert "model_0000003, which does not exist" in caplog.text


def test_without_a_tag_a_complete_file_is_found(tmp_path):
    saver = checkpointer(tmp_path)
    save(saver, 1)
    (tmp_path / "last_checkpoint.rank_0").unlink()
    assert saver.has_checkpoint()
    assert saver.resume_or_load()["iteration"] == 1


def test_when_nothing_can_be_read_the_run_stops(tmp_path):
    saver = checkpointer(tmp_path)
    save(saver, 1)
    damage(tmp_path / "model_0000001")
    with pytest.raises(
        WeightsError, match="none of the 1 checkpoints .* can be read: start over with --no-resume"
    ):
        saver.resume_or_load()


def test_without_resume_only_the_model_is_loaded(tmp_path):
    source = checkpointer(tmp_path / "source")
    train(source.model, source.checkpointables["optimizer"], 2)
    source.save("model_final", iteration=1)
    target = checkpointer(tmp_path / "target", seed=1)
    extra = target.resume_or_load(str(tmp_path / "source" / "model_final"), resume=False)
    assert extra == {"iteration": 1}
    assert torch.equal(target.model[0].weight, source.model[0].weight)
    assert not target.checkpointables["optimizer"].state


def test_nothing_to_load_leaves_everything_alone(tmp_path):
    saver = checkpointer(tmp_path)
    before = saver.model[0].weight.clone()
    assert not saver.has_checkpoint()
    assert saver.resume_or_load("") == {}
    assert torch.equal(saver.model[0].weight, before)
    assert FSDPCheckpointer(saver.model).get_checkpoint_file() == ""


def test_a_state_without_the_optimizer_warns(tmp_path, caplog):
    model, _ = build()
    FSDPCheckpointer(model, str(tmp_path)).save("model_final", iteration=3)
    assert checkpointer(tmp_path).resume_or_load() == {"iteration": 3}
    assert "has no entry optimizer" in caplog.text


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"teacher": {}}, 'has no entry "model" \\(it has teacher\\)'),
        ({"model": {"0.weight": torch.zeros(1)}}, "does not fit this run"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, state, expected):
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=expected):
        checkpointer(tmp_path).load(str(tmp_path / "other.pth"))


def test_the_optimizers_state_is_found_by_name_and_its_options_are_those_of_now(tmp_path, caplog):
    saver = checkpointer(tmp_path)
    train(saver.model, saver.checkpointables["optimizer"], 2)
    saver.save("model_final")
    model, _ = build(seed=1)
    # Grouped otherwise, in another order, with other options; the batch norm is no longer trained.
    groups = [
        {"params": list(model[2].parameters()), "betas": (0.5, 0.9), "lr_multiplier": 0.1},
        {"params": list(model[0].parameters()), "is_backbone": True},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.25)
    FSDPCheckpointer(model, str(tmp_path), optimizer=optimizer).resume_or_load()
    assert "not trained now is left out: 1.bias, 1.weight" in caplog.text
    first, second = optimizer.param_groups
    assert (first["betas"], first["lr_multiplier"], first["lr"]) == ((0.5, 0.9), 0.1, 0.25)
    assert second["is_backbone"] is True and second["betas"] == (0.9, 0.999)
    stored = {name: saver.checkpointables["optimizer"].state[p] for name, p in saver.model.named_parameters()}
    own = dict(model.named_parameters())
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        assert torch.equal(optimizer.state[own[name]]["exp_avg_sq"], stored[name]["exp_avg_sq"])
    assert len(optimizer.state) == 4


def test_parameters_that_are_trained_only_now_are_named(tmp_path, caplog):
    model, _ = build()
    FSDPCheckpointer(model, str(tmp_path), optimizer=torch.optim.AdamW(model[0].parameters())).save(
        "model_final"
    )
    checkpointer(tmp_path).resume_or_load()
    assert "start without an optimizer's state: 1.bias, 1.weight, 2.bias and 1 more" in caplog.text


def test_options_in_a_file_of_one_piece_give_way_too(tmp_path):
    saver = checkpointer(tmp_path)
    train(saver.model, saver.checkpointables["optimizer"], 1)
    state = {name: value.state_dict() for name, value in saver.checkpointables.items()}
    torch.save({"model": saver.model.state_dict(), **state}, tmp_path / "model_final.rank_0.pth")
    newer = checkpointer(tmp_path)
    optimizer = newer.checkpointables["optimizer"]
    optimizer.param_groups[0] |= {"betas": (0.5, 0.9), "lr": 0.25}
    newer.resume_or_load()
    (group,) = optimizer.param_groups
    assert (group["betas"], group["lr"]) == ((0.5, 0.9), 0.25)
    assert len(optimizer.state) == 6


def test_an_optimizer_in_a_file_of_one_piece_that_has_other_groups_is_refused(tmp_path):
    saver = checkpointer(tmp_path)
    state = torch.optim.AdamW(saver.model[0].parameters()).state_dict()
    content = {"model": saver.model.state_dict(), "optimizer": state}
    torch.save(content, tmp_path / "model_final.rank_0.pth")
    with pytest.raises(WeightsError, match="does not fit this run"):
        checkpointer(tmp_path).resume_or_load()


def test_what_a_safe_load_would_refuse_is_not_saved(tmp_path):
    np = pytest.importorskip("numpy")
    with pytest.raises(AssertionError, match=r"rng\[1\]\.state is a float64"):
        checkpointer(tmp_path).save("model_final", rng=[1, {"state": np.float64(1)}])
    assert names(tmp_path) == []


def test_a_rehearsal_leaves_nothing_and_finds_a_folder_that_cannot_be_written(tmp_path):
    checkpointer(tmp_path / "good").rehearse(iteration=0)
    assert names(tmp_path / "good") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        checkpointer(tmp_path / "file" / "run").rehearse(iteration=0)


def test_a_rehearsal_finds_a_full_disk(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 10, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="has only 0 MiB left"):
        checkpointer(tmp_path).rehearse(big=torch.zeros(10**6))


def test_a_rehearsal_counts_the_moments_of_parameters_that_have_had_no_step(tmp_path):
    model, optimizer = build()
    sizes = [parameter.nbytes for parameter in model.parameters()]
    saver = FSDPCheckpointer(model, str(tmp_path), optimizer=optimizer)
    assert saver._moments_to_come() == 2 * sum(sizes)
    model[0].requires_grad_(False)
    train(model, optimizer, 1)
    assert saver._moments_to_come() == 2 * sum(sizes[:2])


def test_saving_can_be_turned_off(tmp_path):
    saver = checkpointer(tmp_path / "off", save_to_disk=False)
    saver.save("model_final", iteration=1)
    saver.rehearse()
    assert not (tmp_path / "off").exists()
