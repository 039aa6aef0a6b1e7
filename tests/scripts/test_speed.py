"""What the benchmark of training is made of: counts, parts, statistics, stand-ins, and one short run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import Linear

from dinov2.errors import ConfigError, OutputError
from dinov2.train.optimizer import build_optimizer
from dinov2.train.planning.flops import step_flops
from dinov2.train.planning.hardware import gpu_key
from dinov2.train.step import train_step
from scripts import bench_train
from scripts.speed import parts, stand_ins
from scripts.speed.checkouts import SideError
from scripts.speed.counts import count, used_bytes
from scripts.speed.parts import PartTimer, instrument
from scripts.speed.report_file import write_report
from scripts.speed.side import Workbench
from scripts.speed.summary import Growth, Median, Rung
from tests.conftest import REPO
from tests.train.planning.steps import SMALL, VALUES, build, random_batch, resolve, workload

N = 1000  # elements of 4 bytes


@pytest.mark.parametrize(
    ("function", "moved"),
    [
        (lambda x, i: x + x, 2),
        (lambda x, i: x + 1, 2),
        (lambda x, i: x.add_(1), 2),
        (lambda x, i: x.zero_(), 1),
        (lambda x, i: x.clone().copy_(x), 4),
        (lambda x, i: x.sum(), 1),
        (lambda x, i: x.view(2, -1).t(), 0),
        (lambda x, i: x.view(2, -1).t().contiguous(), 2),
        (lambda x, i: torch.empty_like(x), 0),
        (lambda x, i: torch.zeros_like(x), 1),
        (lambda x, i: x[:1].expand(N) + x, 2),
        (lambda x, i: torch._foreach_add([x, x], 1.0), 3),  # the same list twice is read once
        (lambda x, i: x.index_select(0, i[:10]), 0.04),
        (lambda x, i: x.index_add_(0, i[:10], x[:10].clone()), 0.07),
    ],
)
def test_bytes(function, moved):
    x, index = torch.ones(N), torch.arange(N)
    with count() as counts:
        function(x, index)
    assert counts.bytes == pytest.approx(4 * N * moved, abs=8)


def test_products_are_counted_apart():
    with count() as counts:
        torch.ones(10, 20) @ torch.ones(20, 30)
    assert (counts.flops, counts.operators["mm"]) == (2 * 10 * 20 * 30, 1)
    assert counts.product_bytes == 4 * (10 * 20 + 20 * 30 + 10 * 30)


def test_attention_is_counted_on_a_cpu():
    q = torch.ones(2, 3, 16, 8, requires_grad=True)
    with count() as counts:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    assert counts.flops == (2 + 5) * 2 * (2 * 3 * 16 * 16 * 8)  # the backward pass makes the scores anew
    assert not any("attention" in name for name in counts.bytes_by_operator)


def test_the_backward_pass_is_counted():
    weight = torch.ones(20, 30, requires_grad=True)
    with count() as counts:
        (torch.ones(10, 20) @ weight).sum().backward()
    assert counts.flops == 2 * 2 * 10 * 20 * 30


def test_broadcast_tensors_have_few_bytes():
    assert used_bytes(torch.ones(5, 1).expand(5, 100)) == 20
    assert used_bytes(torch.ones(0, 3)) == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.tensor(1.0, device=x.device),
    ],
)
def test_waits(function):
    with count() as counts:
        function(torch.ones(4))
    (event,) = counts.waits
    assert event.where.startswith("scripts/test_speed.py:")


def test_what_waits_for_nothing():
    x, host = torch.ones(4), torch.ones(3)
    with count([host]) as counts:
        host.sum()
        host[0].item()  # shares the storage of a tensor that lies in the host's memory
        host.to(x.device, non_blocking=True)
        x.to(torch.bfloat16)
        torch.tensor(1.0, device="cpu")
        x[torch.tensor([1, 2])]
    assert counts.waits == []
    assert [event.bytes for event in counts.copies] == [12]
    with count([host]) as counts:
        host.to(x.device)
    assert [event.what for event in counts.waits] == ["to"]


def test_part_timer_counts_each_moment_once():
    now = iter([0.0, 1.0, 3.0, 7.0, 8.0, 20.0])
    timer = PartTimer(clock=lambda: next(now))
    with timer.part("outer"):
        with timer.part("inner"):
            timer.switch("later")
        timer.enter("again")
        timer.leave()
        timer.clock = lambda: 30.0
    assert timer.seconds == {"outer": 1 + 1 + 10, "inner": 2, "later": 4, "again": 12}


@pytest.mark.parametrize("overrides", [(), ("ibot.separate_head=true", "ibot.head_n_prototypes=64")])
def test_parts_of_a_real_step(overrides):
    cfg = resolve(*SMALL, "student.embed_dim=48", "student.num_heads=3", *overrides)
    model = build(cfg)
    optimizer = build_optimizer(cfg, model.get_params_groups())
    batch = random_batch(cfg)
    order: list[str] = []

    class Listing(PartTimer):
        def _credit(self) -> None:
            order.append(self._stack[-1] if self._stack else "")

    with instrument(model, optimizer, timer := Listing()), timer.part(parts.OTHER):
        train_step(model, optimizer, batch, VALUES, 3.0)
    seen = list(dict.fromkeys(part for part in order if part))
    assert sorted(seen) == sorted(parts.PARTS)
    forward_and_back = [part for part in seen if part != parts.OTHER]
    assert forward_and_back.index(parts.BACK_LOSSES) < forward_and_back.index(parts.BACK_HEADS)
    assert forward_and_back.index(parts.BACK_HEADS) < forward_and_back.index(parts.BACK_BACKBONE)
    before = len(order)
    train_step(model, optimizer, batch, VALUES, 3.0)  # everything is as it was
    assert len(order) == before


def test_interval_of_a_median():
    assert Median.of([3.0]) == Median(3.0, 3.0, 3.0, 0.0)
    few = Median.of([3.0, 1.0, 2.0])
    assert (few.value, few.low, few.high, few.level) == (2.0, 1.0, 3.0, 0.75)
    many = Median.of(list(range(1, 21)))  # the textbook's sixth and fifteenth of twenty
    assert (many.low, many.high) == (6, 15) and many.level == pytest.approx(0.9586, abs=1e-4)


def test_growth():
    straight = Growth.of([Rung(b, 0.1, 1000 + 10 * b) for b in (16, 32, 64)])
    assert straight.time_spread == 0 and straight.memory_error == pytest.approx(0, abs=1e-12)
    assert (straight.bytes_per_image, straight.fixed_bytes) == pytest.approx((10, 1000))
    bent = Growth.of([Rung(16, 0.10, 256), Rung(32, 0.11, 1024), Rung(64, 0.10, 4096)])
    assert bent.time_spread == pytest.approx(0.1) and bent.memory_error > 0.1


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA RTX A1000", ""),
        ("cpu", ""),
    ],
)
def test_gpus_by_the_names_of_their_driver(name, key):
    assert gpu_key(name) == key


def test_stand_ins_compute_what_they_stand_for():
    torch.manual_seed(0)
    tokens = [torch.randn(2, 5, 4, 8), torch.randn(3, 2, 4, 8)]
    mask, packed = stand_ins.BlockDiagonalMask.from_tensor_list(tokens)
    assert packed.shape == (1, 16, 4, 8)
    assert all(torch.equal(*pair) for pair in zip(mask.split(packed), tokens, strict=True))
    mixed = mask.split(stand_ins.memory_efficient_attention(packed, packed, packed, attn_bias=mask))
    for before, after in zip(tokens, mixed, strict=True):
        heads = before.transpose(1, 2)
        expected = torch.softmax(heads @ heads.transpose(-1, -2) / 8**0.5, dim=-1) @ heads
        torch.testing.assert_close(after, expected.transpose(1, 2))
    rows, index, scale = torch.randn(3, 2, 4), torch.tensor([2, 0]), torch.randn(4)
    added = stand_ins.scaled_index_add(rows, index, torch.ones(2, 2, 4), scale, alpha=2.0)
    assert torch.equal(added[1], rows[1])
    torch.testing.assert_close(added[[0, 2]], rows[[0, 2]] + 2 * scale)
    chosen = stand_ins.index_select_cat([rows.flatten(1), rows.flatten(1)], [index, index[:1]])
    assert torch.equal(chosen.view(3, 2, 4), torch.cat((rows[[2, 0]], rows[[2]])))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--batch", "0"], "--batch is 0"),
        (["--against", "/nowhere"], "holds no dinov2/train"),
        (["--ladder", "4"], "no list of two or more"),
        (["--ladder", "4,x"], "no list of two or more"),
        (["--ladder", ","], "no list of two or more"),
        (["--peak-tflops", "0"], "--peak-tflops is 0; use a finite number above 0"),
        (["--peak-tflops", "nan"], "--peak-tflops is nan"),
        (["student.arch=auto"], "name the architecture"),
        (["optim.accumulate_steps=2"], "the benchmark takes 1"),
    ],
)
def test_bad_options(words, told, tmp_path):
    args = bench_train.get_args_parser().parse_args(["--device", "cpu", *words])
    with pytest.raises(ConfigError, match=told):
        bench_train.Benchmark(args, tmp_path)


def test_a_report_that_can_not_be_written_is_found_at_once(tmp_path):
    args = bench_train.get_args_parser().parse_args(["--device", "cpu", "--output", str(tmp_path)])
    with pytest.raises(OutputError, match="can not be written .Is a directory.: name a file"):
        bench_train.Benchmark(args, tmp_path)


def test_a_report_is_json_whatever_was_found(tmp_path):
    file = tmp_path / "report.json"
    write_report(file, {"losses": {"own": math.nan}, "pairs": [(1.0, math.inf)], 224: Path("a")})
    strict = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert strict == {"losses": {"own": None}, "pairs": [[1.0, None]], "224": "a"}


@pytest.mark.parametrize(("given", "timed"), [("1e-5", 1.0), ("null", None), ("0", 0.0)])
def test_networks_are_compared_with_gains_that_tell_images_apart(given, timed):
    words = ["--device", "cpu", f"student.layerscale={given}"]
    assert bench_train.configure(bench_train.get_args_parser().parse_args(words)).student.layerscale == timed


def test_losses_that_are_not_finite_do_not_agree():
    one = {"ibot": 1.0, "koleo": 2.0}
    assert bench_train.relative_difference(one, {"ibot": 1.0, "koleo": 2.5}) == pytest.approx(0.2)
    for spoilt in ({"ibot": math.nan, "koleo": 2.0}, {"ibot": 1.0, "koleo": math.nan}):
        assert bench_train.relative_difference(one, spoilt) == math.inf
        assert bench_train.relative_difference(spoilt, spoilt) == math.inf
    with pytest.raises(ConfigError, match="no loss in common .ibot, koleo; dino."):
        bench_train.relative_difference(one, {"dino": 1.0})


@pytest.mark.parametrize(
    "overrides",
    [(), ("ibot.separate_head=true", "ibot.head_n_prototypes=64"), ("dino.loss_weight=0",)],
)
def test_parts_do_the_arithmetic_of_the_model(overrides):
    work = workload(resolve(*SMALL, *overrides))
    by_part = bench_train.part_flops(work)
    assert sum(by_part.values()) == pytest.approx(step_flops(work).model)
    cfg = resolve(*SMALL, *overrides, "dino.head_n_prototypes=1")
    cfg.ibot.head_n_prototypes = 1
    without = bench_train.part_flops(workload(cfg))
    changed = {part for part in by_part if by_part[part] != pytest.approx(without[part], rel=1e-9)}
    assert changed == {parts.TEACHER_HEADS, parts.STUDENT_HEADS}


@pytest.mark.slow
def test_command_line(tmp_path, capsys):
    """This checkout against itself: equal losses to the last bit, and all tables."""
    file = tmp_path / "report.json"
    words = ["--device", "cpu", "--precision", "fp32", "--steps", "2", "--threads", "1", "--ladder", "2,4"]
    words += ["--against", str(REPO), "--output", str(file), *SMALL]
    bench_train.main(bench_train.get_args_parser().parse_args(words))
    printed, report = capsys.readouterr().out, json.loads(file.read_text())
    for expected in ("| images per second |", f"| {parts.BACK_BACKBONE} |", "| whole step | CPU |", "| 4 |"):
        assert expected in printed
    assert report["against"]["largest_difference"] == 0
    assert report["against"]["losses"]["own"].keys() >= {"ibot_loss", "gradient norm of backbone"}
    assert 0 < report["step"]["model_flops_utilisation"] < 1.5
    counted = {key: report["counts"][key] for key in ("flops", "operators", "elementwise_bytes")}
    assert counted == {key: report["against"]["counts"][key] for key in counted}
    assert set(report["parts"]) == set(parts.PARTS)
    assert [rung["batch"] for rung in report["ladder"]["rungs"]] == [2, 4]


@pytest.mark.slow
def test_a_side_that_fails_says_why(tmp_path):
    (tmp_path / "dinov2" / "train").mkdir(parents=True)
    (tmp_path / "dinov2" / "__init__.py").write_text("raise RuntimeError('broken checkout')")
    args = bench_train.get_args_parser().parse_args(["--device", "cpu", "--against", str(tmp_path), *SMALL])
    bench = bench_train.Benchmark(args, tmp_path)
    with pytest.raises(SideError, match="broken checkout"), bench.side(tmp_path, 1):
        pass


def test_sides_with_other_weights_are_told_apart(tmp_path):
    file = str(tmp_path / "state.pth")
    small, large = (SimpleNamespace(student=Linear(2, n), teacher=Linear(2, n)) for n in (3, 4))
    torch.save({name: net.state_dict() for name, net in vars(large).items()} | {"batch": {}}, file)
    bench = SimpleNamespace(model=small, _pinned=lambda batch: batch)
    with pytest.raises(ValueError, match=r"4 of the weights of the student are not .* such as bias \[3\]"):
        Workbench.read(bench, file)
    bench.model = large
    assert Workbench.read(bench, file) == {}


@pytest.mark.parametrize("name", ["bench_train", pytest.param("bench_data", marks=pytest.mark.slow)])
def test_a_benchmark_runs_as_a_script_from_anywhere(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(REPO / f"scripts/{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
