"""The command: its numbers hang together, and mistakes end in one sentence."""

import json
from dataclasses import replace

import pytest

from dinov2.errors import ConfigError
from dinov2.train.arguments import get_plan_parser
from dinov2.train.plan import all_scaling_tables, main, plan_of
from dinov2.train.planning.communication import Sizes, step_traffic
from dinov2.train.planning.hardware import FABRICS
from dinov2.train.planning.memory import GIB
from dinov2.train.planning.report import as_text, largest_that
from tests.conftest import REPO
from tests.train.planning.steps import SMALL, resolve, workload


def plan(*options: str, overrides: tuple[str, ...] = ()):
    args = get_plan_parser().parse_args([*options, *SMALL, *overrides])
    return plan_of(args, resolve(*SMALL, *overrides))


def test_the_command_prints_one_plan_as_text_and_as_json(capsys):
    options = ["--gpus", "4", "--tiles", "1000", "--total-batch", "64"]
    main(get_plan_parser().parse_args([*options, *SMALL]))
    text = capsys.readouterr().out
    main(get_plan_parser().parse_args([*options, "--json", *SMALL]))
    numbers = json.loads(capsys.readouterr().out)
    assert f"the largest that does is {numbers['largest_batch_size_per_gpu']}" in text
    assert numbers["images"] == 125_000 * 16 and f"{125_000 * 16:,} images" in text
    assert numbers["for_total_batch"] == {"batch_size_per_gpu": 16, "accumulate_steps": 1}
    moments = numbers["memory"]["moments"]
    assert numbers["memory"]["allocated"] == max(sum(parts.values()) for parts in moments.values())


def test_the_largest_batch_is_the_last_that_fits():
    calculated = plan("--gpu-mem", "3")
    largest = calculated.largest_batch
    assert largest > 4
    for batch, fits in ((largest, True), (largest + 1, False)):
        other = plan("--gpu-mem", "3", overrides=(f"train.batch_size_per_gpu={batch}",))
        assert (other.memory.total <= 3 * GIB) is fits is other.fits


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (1, 1), (2, 2), (7, 7), (64, 64), (1000, 1000)])
def test_the_search(limit, found):
    assert largest_that(lambda batch: batch <= limit) == found


def test_a_total_batch_is_reached_by_accumulating():
    calculated = plan("--gpu-mem", "3", "--gpus", "2", "--total-batch", "2048")
    batch, steps = calculated.wanted
    assert batch * steps * 2 == 2048 and steps > 1 and batch <= calculated.largest_batch


def test_it_says_so_when_nothing_fits():
    text = as_text(plan("--gpu-mem", "0.5"))
    assert "not even one image fits 0.5 GiB: set train.activation_checkpointing=full" in text


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--gpus", "0"), "--gpus is 0; use at least 1"),
        (("--gpus", "12"), "--gpus 12 is no multiple of --gpus-per-node 8"),
        (("--gpu", "h10"), '--gpu "h10" is not known'),
        (("--gpu-mem", "-1"), "--gpu-mem is -1"),
        (("--mfu", "40"), "--mfu is 40; use a share"),
        (("--gpus", "4", "--total-batch", "6"), "--total-batch 6 does not divide among --gpus 4"),
        (("--gpu-mem", "0.5", "--total-batch", "8"), "--total-batch 8 does not fit"),
    ],
)
def test_mistakes(options, sentence):
    with pytest.raises(ConfigError) as caught:
        plan(*options)
    assert sentence in str(caught.value)


def test_sharding_divides_the_state_and_recomputation_the_activations():
    strategy = tuple(
        f"compute_precision.{network}.{part}.sharding_strategy=FULL_SHARD"
        for network in ("student", "teacher")
        for part in ("backbone", "dino_head", "ibot_head")
    )
    one, four = plan(overrides=strategy), plan("--gpus", "4", overrides=strategy)
    for name in ("student weights", "teacher weights", "optimizer moments"):
        assert four.memory.parts[name] == pytest.approx(one.memory.parts[name] / 4, abs=8)
    full = plan(overrides=("train.activation_checkpointing=full",))
    assert full.memory.moments["losses"]["activations"] < one.memory.moments["losses"]["activations"] / 3


def test_each_machine_holds_its_share_of_a_checkpoint():
    one = plan("--gpus", "4", "--gpus-per-node", "4")
    two = plan("--gpus", "8", "--gpus-per-node", "4")
    assert one.host_bytes - two.host_bytes == one.storage.checkpoint / 2


def test_bytes_sent_under_every_strategy():
    """100 parameters in each network, 2 bytes gathered and 4 reduced, over 2 machines of 2."""
    sizes = Sizes(student=100, trainable=100, teacher=100, units=1, gathered=2, reduced=4)
    work = replace(workload(resolve(*SMALL)), sinkhorn=False)

    def sent(strategy):
        traffic = step_traffic(strategy, sizes, FABRICS["eight-cards"], processes=4, per_machine=2, work=work)
        return traffic.inside, traffic.outside

    assert sent("NO_SHARD") == (2 * 0.75 * 400, 2 * 0.75 * 400)
    assert sent("SHARD_GRAD_OP") == (0.75 * 800, 0.75 * 800)
    assert sent("FULL_SHARD") == (0.75 * 1000, 0.75 * 1000)
    assert sent("HYBRID_SHARD") == (0.5 * 1000, 2 * 0.5 * 400)


def test_the_document_has_the_table_of_the_code():
    text = (REPO / "docs" / "scaling.md").read_text("utf-8")
    assert "\n".join(all_scaling_tables("h100", 0.4)) in text
