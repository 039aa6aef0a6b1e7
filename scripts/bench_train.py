"""How fast a training step is, how much of the device it uses, and how it compares with another checkout.

    python scripts/bench_train.py [--config-file FILE] [--device cpu] [--precision fp32] [--batch 4]
        [--steps 10] [--threads 2] [--ladder 16,32,64] [--against FOLDER] [--output FILE] [key=value ...]

The step is the trainer's own, on random crops of the config's sizes with masks drawn by the real generator:
losses, gradients, clipping, optimizer, the teacher's update, losses read; no data loading. Weights are
random, as speed does not depend on them. Everything that is timed runs in a process of its own, one at a
time. Model FLOPs are counted by ``dinov2.train.planning.flops``; docs/performance.md says what they are and
how the peak of the device is known. ``--against`` times another checkout that has DINOv2's public API, this
project's or DINOv2's own, in turn with this one, and prints the median of the ratios of neighbouring steps.
"""

import argparse
import math
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig, OmegaConf

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from dinov2 import cli  # noqa: E402 - the line above makes the packages known to a script
from dinov2.configs import resolve_config  # noqa: E402
from dinov2.errors import ConfigError  # noqa: E402
from dinov2.models.checkpoint_names import HEADS, NETWORKS  # noqa: E402
from dinov2.train.planning.flops import (  # noqa: E402
    Flops,
    prototype_flops,
    step_flops,
    student_forward_flops,
)
from dinov2.train.planning.hardware import PEAK_TFLOPS, gpu_key  # noqa: E402
from dinov2.train.planning.parameters import build_networks  # noqa: E402
from dinov2.train.planning.workload import NUM_GLOBAL_CROPS, Workload  # noqa: E402
from dinov2.train.precision import DTYPES, effective_dtype  # noqa: E402
from dinov2.utils.device import resolve_device  # noqa: E402
from scripts.speed import parts  # noqa: E402
from scripts.speed.checkouts import check_tree  # noqa: E402
from scripts.speed.report_file import check_report, write_report  # noqa: E402
from scripts.speed.sides import Side  # noqa: E402
from scripts.speed.summary import Growth, Median, Rung  # noqa: E402

PART_STEPS = 3
# Relative, between two checkouts. A row of 65,536 nearly equal targets comes to 1 + 4e-5 where it is made by
# the softmax of PyTorch on a CPU, as another checkout may do.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        "bench_train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="", help="of the training (default: DINOv2's defaults)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", choices=tuple(DTYPES), help="of all networks (default: the config's)")
    parser.add_argument("--batch", type=int, help="images per step (default: the config's)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps (default: 10)")
    parser.add_argument("--threads", type=int, default=0, help="of a CPU (default: PyTorch's choice)")
    parser.add_argument("--peak-tflops", type=float, help="of the device, in place of the known or measured")
    parser.add_argument("--ladder", default="", help="batch sizes whose time and memory to compare: 16,32,64")
    parser.add_argument("--against", type=Path, help="folder of another checkout, in which dinov2 lies")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("overrides", nargs="*", help="key=value settings of the config")
    return parser


def configure(args: argparse.Namespace) -> DictConfig:
    """Resolve the config of the benchmark.

    Raises:
        ConfigError: an option or a setting is out of range.
        OutputError: the report can not be written.
    """
    for name, least in (("steps", 1), ("threads", 0), ("batch", 1)):
        given = getattr(args, name)
        if given is not None and given < least:
            raise ConfigError(f"--{name} is {given}; use {least} or more")
    peak = args.peak_tflops
    if peak is not None and not 0 < peak < math.inf:
        raise ConfigError(f"--peak-tflops is {peak:g}; use a finite number above 0")
    check_report(args.output)
    if args.against is not None:
        check_tree(args.against, "dinov2/train")
    overrides = list(args.overrides)
    if args.precision:
        overrides += [
            f"compute_precision.{network}.{part}.mixed_precision.param_dtype={args.precision}"
            for network in NETWORKS
            for part in ("backbone", *HEADS)
        ]
    if args.batch:
        overrides += [f"train.batch_size_per_gpu={args.batch}"]
    cfg = resolve_config(args.config_file, overrides)
    if cfg.student.arch == "auto":
        raise ConfigError(
            "student.arch is auto, which needs the weights to start from: name the architecture"
        )
    if cfg.optim.accumulate_steps > 1:
        raise ConfigError(f"optim.accumulate_steps is {cfg.optim.accumulate_steps}; the benchmark takes 1")
    # Values of weights do not matter here, and a machine to be timed need not have them.
    cfg.student.pretrained_weights = cfg.train.init_weights_from_chkpt = ""
    cfg.head.head_path = None
    if cfg.student.layerscale:
        # Young gains leave all images the same features, of which KoLeo and its gradients are rounding alone:
        # two sides would seem to disagree.
        cfg.student.layerscale = 1.0
    return cfg


def ladder_sizes(text: str) -> list[int]:
    """Return the batch sizes of ``--ladder``.

    Raises:
        ConfigError: they are not two or more different positive numbers.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    sizes = sorted({int(word) for word in words if word.isdecimal()} - {0})
    if text and (len(sizes) != len(words) or len(sizes) < 2):
        raise ConfigError(f'--ladder "{text}" is no list of two or more batch sizes such as 16,32,64')
    return sizes


class Benchmark:
    """Runs what the command line asks for and gathers the report.

    Args:
        args: parsed command line.
        folder: for files between processes.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.cfg = configure(args)
        self.ladder = ladder_sizes(args.ladder)
        self.device = resolve_device(args.device)
        self.dtype = effective_dtype(
            self.cfg.compute_precision.student.backbone.mixed_precision.param_dtype, self.device
        )
        self.backbone = build_networks(self.cfg).backbone

    def side(self, tree: Path, batch: int) -> Side:
        """Return the process of a checkout."""
        config = self.folder / f"config_{batch}.yaml"
        cfg = OmegaConf.merge(
            self.cfg, {"train": {"batch_size_per_gpu": batch, "output_dir": str(self.folder)}}
        )
        OmegaConf.save(cfg, config)
        autocast = str(self.dtype).removeprefix("torch.")
        return Side(tree, config, self.device.type, self.args.threads, autocast)

    def run(self) -> dict[str, Any]:
        """Time this checkout, alone and against the other, and its ladder."""
        batch = self.cfg.train.batch_size_per_gpu
        with self.side(REPO, batch) as own:
            masked = own.ask("make_batch")["masked_patches"]
            report = {"setting": {**own.description, **self.setting(), "masked_patches": masked}}
            work = self.workload(batch, masked)
            flops = step_flops(work)
            report["model_flops_per_image"] = {**asdict(flops), "total": flops.model}
            report["step"] = self.measure(own, batch, flops)
            report["startup_seconds"] = own.ask("startup")
            report["parts"] = self.parts(own, work, report["step"]["peak_flops"]["flops"])
            report["counts"] = own.ask("counts")
            if self.args.against is not None:
                with self.side(self.args.against, batch) as other:
                    report["against"] = self.compare(own, other)
        if self.ladder:
            report["ladder"] = self.climb()
        return report

    def setting(self) -> dict[str, Any]:
        """Return what was timed."""
        cfg = self.cfg
        return {
            "config_file": self.args.config_file,
            "overrides": self.args.overrides,
            "arch": f"{cfg.student.arch}/{cfg.student.patch_size}",
            "crops": f"2 x {cfg.crops.global_crops_size} + {cfg.crops.local_crops_number} x "
            f"{cfg.crops.local_crops_size}",
            "prototypes": cfg.dino.head_n_prototypes,
            "centering": cfg.train.centering,
            "drop_path": cfg.student.drop_path_rate,
            "batch": cfg.train.batch_size_per_gpu,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def workload(self, batch: int, masked: int) -> Workload:
        """Return the workload of a batch with so many masked patches."""
        work = Workload.of(self.cfg, self.backbone, batch=batch, mask_token_learns=True)
        patches = NUM_GLOBAL_CROPS * batch * work.vit.patches(work.global_pixels)
        return replace(work, masked_share=masked / patches)

    def measure(self, side: Side, batch: int, flops: Flops) -> dict[str, Any]:
        """Time whole steps of one process."""
        side.warm_up()
        side.ask("forget_peak")
        seconds = [self.timed(side, "step")["seconds"] for _ in range(self.args.steps)]
        middle, used = Median.of(seconds), side.ask("peak")["bytes"]
        peak = self.peak_flops(side)
        return {
            "seconds": asdict(middle),
            "least_seconds": min(seconds),
            "images_per_second": batch / middle.value,
            "peak_bytes": used,
            "peak_flops": peak,
            "model_flops_utilisation": flops.model * batch / middle.value / peak["flops"],
        }

    def timed(self, side: Side, what: str) -> dict[str, Any]:
        """Do a ``step`` or a ``forward_backward`` that is timed.

        Raises:
            ConfigError: the step was skipped, so its time says nothing.
        """
        answer = side.ask(what)
        if answer["problem"]:
            raise ConfigError(f"a timed step was skipped ({answer['problem']}): use bf16 or fp32")
        return answer

    def peak_flops(self, side: Side) -> dict[str, Any]:
        """Return the device's peak in the format of the student's backbone, and where it is from."""
        if self.args.peak_tflops is not None:
            return {"flops": self.args.peak_tflops * 1e12, "source": "--peak-tflops"}
        key = gpu_key(side.description["device"])
        if key:
            peak = PEAK_TFLOPS[key][0 if self.dtype.itemsize < 4 else 1]
            return {"flops": peak * 1e12, "source": f"data sheet of {key}"}
        gemm = side.ask("gemm")
        return {"flops": gemm["flops"], "source": f"product of {gemm['size']}^2 matrices in {gemm['dtype']}"}

    def parts(self, side: Side, work: Workload, peak: float) -> dict[str, dict[str, float | None]]:
        """Return seconds, share of the step, and utilisation of each part."""
        seconds, spent_on = side.ask("parts", steps=PART_STEPS), part_flops(work)
        total = sum(seconds.values())
        return {
            part: {
                "seconds": spent,
                "share": spent / total,
                "flops": spent_on.get(part, 0.0) * work.batch,
                "utilisation": spent_on[part] * work.batch / spent / peak if part in spent_on else None,
            }
            for part, spent in seconds.items()
        }

    def compare(self, own: Side, other: Side) -> dict[str, Any]:
        """Time two checkouts in turn, on equal weights and an equal batch.

        Ratios are the other's time over this one's, each formed of two steps that follow each other.
        """
        state = str(self.folder / "state.pth")
        own.ask("write", path=state)
        other.ask("read", path=state)
        losses = {"own": own.ask("losses"), "other": other.ask("losses")}
        other.warm_up()
        sides = {"own": own, "other": other}
        for side in sides.values():
            side.ask("forget_peak")
        report: dict[str, Any] = {"tree": str(other.tree), "losses": losses}
        report["largest_difference"] = relative_difference(losses["own"], losses["other"])
        report["not_compared"] = sorted(losses["own"].keys() ^ losses["other"].keys())
        for what in ("forward_backward", "step"):
            pairs = []
            for number in range(self.args.steps):
                turn = (own, other) if number % 2 == 0 else (other, own)
                answers = {side: self.timed(side, what) for side in turn}
                pairs.append((answers[own], answers[other]))
            report[what] = {
                clock: {
                    "own": median(one[clock] for one, _ in pairs),
                    "other": median(two[clock] for _, two in pairs),
                    "ratio": asdict(Median.of([two[clock] / one[clock] for one, two in pairs])),
                }
                for clock in ("seconds", "cpu_seconds")
            }
        report["peak_bytes"] = {name: side.ask("peak")["bytes"] for name, side in sides.items()}
        report["counts"] = other.ask("counts")
        return report

    def climb(self) -> dict[str, Any]:
        """Time each batch size of the ladder in a process of its own."""
        rungs = []
        for batch in self.ladder:
            with self.side(REPO, batch) as side:
                masked = side.ask("make_batch")["masked_patches"]
                step = self.measure(side, batch, step_flops(self.workload(batch, masked)))
                rungs.append(Rung(batch, step["seconds"]["value"] / batch, step["peak_bytes"]))
        return {"rungs": [asdict(rung) for rung in rungs], "growth": asdict(Growth.of(rungs))}


def part_flops(work: Workload) -> dict[str, float]:
    """Return the FLOPs per image of each part that computes products; together they are the model's."""
    flops, forward, prototypes = step_flops(work), student_forward_flops(work), prototype_flops(work)
    rest_of_heads = flops.student_heads / 3 - prototypes
    return {
        parts.TEACHER_BACKBONE: flops.teacher,
        parts.TEACHER_HEADS: flops.teacher_heads,
        parts.STUDENT_BACKBONE: forward,
        parts.STUDENT_HEADS: rest_of_heads + 3 * prototypes,  # their gradients are made at once
        parts.BACK_HEADS: 2 * rest_of_heads,
        parts.BACK_BACKBONE: flops.student_global + flops.student_local - forward,
    }


def relative_difference(own: dict[str, float], other: dict[str, float]) -> float:
    """Return the largest relative difference between entries that both have; inf if one is not finite.

    Raises:
        ConfigError: there are none.
    """
    common = own.keys() & other.keys()
    if not common:
        raise ConfigError(
            f"the two checkouts have no loss in common ({', '.join(own)}; {', '.join(other)}): "
            "there is nothing to compare"
        )
    if not all(math.isfinite(side[name]) for side in (own, other) for name in common):
        return math.inf
    return max(abs(own[name] - other[name]) / max(abs(other[name]), 1e-12) for name in common)


def as_text(report: dict[str, Any]) -> str:
    """Return the tables of a report, in Markdown."""
    setting, step = report["setting"], report["step"]
    lines = [
        f"{setting['arch']}, {setting['crops']} px, {setting['prototypes']} prototypes, "
        f"{setting['centering']}, drop path {setting['drop_path']:g}, {setting['dtype']}, "
        f"batch {setting['batch']} ({setting['masked_patches']} masked patches)",
        f"{setting['device']}, {setting['threads']} threads, torch {setting['torch']}",
        "",
        "| quantity | value |",
        "|---|---|",
        *[f"| {name} | {value} |" for name, value in step_rows(report)],
        "",
        *part_table(report["parts"]),
    ]
    if "against" in report:
        lines += ["", *against_lines(report)]
    if "ladder" in report:
        lines += ["", *ladder_table(report["ladder"])]
    peak = step["peak_flops"]
    lines += ["", f"Peak: {peak['flops'] / 1e12:.3g} TFLOP/s, {peak['source']}."]
    return "\n".join(lines)


def step_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the first table."""
    step, counts, startup = report["step"], report["counts"], report["startup_seconds"]
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in startup.items())
    return [
        ("seconds per step, median", str(Median(**step["seconds"]))),
        ("steps per second", f"{1 / step['seconds']['value']:.4g}"),
        ("images per second", f"{step['images_per_second']:.4g}"),
        ("model GFLOP per image", f"{report['model_flops_per_image']['total'] / 1e9:.4g}"),
        ("model-FLOP utilisation", f"{step['model_flops_utilisation']:.1%}"),
        ("peak memory", f"{step['peak_bytes'] / 2**20:.0f} MiB"),
        ("start to the end of the first step", f"{sum(startup.values()):.1f} s ({phases})"),
        *count_rows(counts),
    ]


def count_rows(counts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of what was counted in a step."""
    return [
        ("operators per step", str(counts["operators"])),
        ("GFLOP per step, counted", f"{counts['flops'] / 1e9:.4g}"),
        ("GB read and written beside products", f"{counts['elementwise_bytes'] / 1e9:.3g}"),
        ("waits of the host per step", str(len(counts["waits"]))),
        ("copies to the device per step", f"{counts['copies_to_device']} ({counts['copied_bytes']} bytes)"),
    ]


def part_table(table: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the breakdown."""
    lines = ["| part | ms | share | GFLOP | utilisation |", "|---|---|---|---|---|"]
    for name in (part for part in parts.PARTS if part in table):
        row = table[name]
        used = "" if row["utilisation"] is None else f"{row['utilisation']:.0%}"
        work = f"{row['flops'] / 1e9:.1f}" if row["flops"] else ""
        lines.append(f"| {name} | {1e3 * row['seconds']:.1f} | {row['share']:.1%} | {work} | {used} |")
    return lines


def against_lines(report: dict[str, Any]) -> list[str]:
    """Return the comparison with the other checkout."""
    found = report["against"]
    tolerance = LOSS_TOLERANCE[report["setting"]["dtype"]]
    verdict = "within" if found["largest_difference"] <= tolerance else "NOT within"
    lines = [
        f"Against {found['tree']}; where a ratio is above 1 this checkout is faster. On equal weights and",
        f"an equal batch losses and gradient norms differ by {found['largest_difference']:.1e} of their",
        f"values at most, {verdict} the {tolerance:g} expected in this format.",
        *([f"Only one side has {', '.join(found['not_compared'])}."] if found["not_compared"] else []),
        "",
        "| what | clock | here, s | there, s | there / here, median of pairs |",
        "|---|---|---|---|---|",
    ]
    for what, name in (("forward_backward", "losses and gradients"), ("step", "whole step")):
        for clock, label in (("seconds", "wall"), ("cpu_seconds", "CPU")):
            row = found[what][clock]
            ratio = Median(**row["ratio"])
            lines.append(f"| {name} | {label} | {row['own']:.3f} | {row['other']:.3f} | {ratio} |")
    lines += ["", "| counted in a step | here | there |", "|---|---|---|"]
    for (name, here), (_, there) in zip(
        count_rows(report["counts"]), count_rows(found["counts"]), strict=True
    ):
        lines.append(f"| {name} | {here} | {there} |")
    here, there = (used / 2**20 for used in found["peak_bytes"].values())
    return [*lines, f"| peak memory, MiB | {here:.0f} | {there:.0f} |"]


def ladder_table(ladder: dict[str, Any]) -> list[str]:
    """Return the time and memory of each batch size."""
    growth = ladder["growth"]
    lines = ["| batch | ms per image | peak, MiB |", "|---|---|---|"]
    for rung in ladder["rungs"]:
        milliseconds, mebibytes = 1e3 * rung["seconds_per_image"], rung["peak_bytes"] / 2**20
        lines.append(f"| {rung['batch']} | {milliseconds:.2f} | {mebibytes:.0f} |")
    return [
        *lines,
        "",
        f"Time per image varies by {growth['time_spread']:.1%}. Memory is "
        f"{growth['fixed_bytes'] / 2**20:.0f} MiB and {growth['bytes_per_image'] / 2**20:.1f} MiB per image, "
        f"to within {growth['memory_error']:.1%}.",
    ]


def main(args: argparse.Namespace) -> None:
    """Run the benchmark, print its tables and write its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Benchmark(args, Path(folder)).run()
    cli.say(as_text(report))
    write_report(args.output, report)


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args())
