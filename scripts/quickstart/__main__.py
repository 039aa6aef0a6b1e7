"""Finetune a pretrained DINOv2 ViT-S/14 on real histology and show what became of it.

    ./scripts/quickstart.sh             # installs what is missing, then runs this
    python -m scripts.quickstart --help

Cuts a real slide into tiles, finds pretrained weights, trains under torchrun, scores the backbone before and
after beside two baselines, and writes ``report.html``.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from dinov2 import cli
from dinov2.errors import ConfigError
from dinov2.train.show_crops import draw_sheet
from dinov2.utils.device import resolve_device
from scripts.quickstart import evaluate, features, pca, sentences
from scripts.quickstart.curves import loss_panels, read_metrics
from scripts.quickstart.report import Report, write_report
from scripts.quickstart.tiles import make_tiles, read_slide
from scripts.quickstart.training import Training, config_overrides, default_processes, train
from scripts.quickstart.weights import WeightsSource, find_vits14
from scripts.quickstart.windows import Task, nucleus_task, tissue_task

NUM_RANDOM_NETWORKS = 3
NUM_STEPS = 5


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser("quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few iterations, to see that everything works")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train N times, seeds 0 to N-1")
    parser.add_argument(
        "--output-dir", type=Path, help="default: results/quickstart, or results/quickstart-short"
    )
    parser.add_argument("--weights", metavar="PATH", help="pretrained ViT-S/14 (default: looked for)")
    parser.add_argument("--processes", type=int, help="default: one per GPU, or 2 on a machine without a GPU")
    parser.add_argument("--fresh", action="store_true", help="train again even if this run is finished")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="passed on to the trainer")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run the steps one after the other; each says what it does."""
    begin = time.perf_counter()
    processes = args.processes if args.processes is not None else default_processes()
    for name, value in (("--seeds", args.seeds), ("--processes", processes)):
        if value < 1:
            raise ConfigError(f"{name} {value} is not a positive number; give 1 or more")
    output_dir = args.output_dir or Path("results") / ("quickstart-short" if args.short else "quickstart")
    output_dir = output_dir.resolve()

    say(1, "cutting the slide into tiles (seconds)")
    tiles = make_tiles(output_dir / "tiles")
    listed = ", ".join(f"{count} of {name}" for name, count in tiles.counts.items())
    print(f"  {'found' if tiles.reused else 'wrote'} {listed} in {tiles.root}")

    say(2, "looking for pretrained ViT-S/14 weights")
    source = find_vits14(args.weights)
    print(f"  weights: {source.origin}")

    say(3, f"training with {processes} processes, {args.seeds} seed(s) (minutes each on a CPU)")
    overrides = config_overrides(tiles, source.path, short=args.short, extra=args.overrides)
    trainings = {}
    for seed in range(args.seeds):
        done = train(output_dir, overrides, seed=seed, processes=processes, fresh=args.fresh)
        how = "finished earlier and taken as it is (--fresh trains again)" if done.reused else "finished"
        print(f"  seed {seed}: {how}, {done.seconds:.0f} s, {done.folder}")
        trainings[seed] = done

    say(4, "scoring the backbone before and after (a minute on a CPU)")
    device = resolve_device("auto")
    before, after = load_backbones(source, trainings)
    num_random = 1 if args.short else NUM_RANDOM_NETWORKS
    baselines = [features.random_model(trainings[0].cfg, seed) for seed in range(num_random)]
    tasks = [tissue_task(), nucleus_task()]
    scores = {task.name: score_task(task, baselines, before, after, device) for task in tasks}
    changes = {task.name: compare_task(task, scores[task.name]) for task in tasks}

    say(5, "drawing the report (a minute on a CPU)")
    report = make_report(trainings, source, processes, device, scores, changes, [before, after[0]])
    write_report(report, output_dir / "report.html")
    write_scores(report, output_dir / "scores.json")

    print(f"\n{evaluate.format_table(scores, changes)}\n")
    print("\n".join([*report.summary, sentences.NOISE]))
    print(f"\nreport: {output_dir / 'report.html'}\nscores: {output_dir / 'scores.json'}")
    print(f"all steps: {time.perf_counter() - begin:.0f} s")


def say(step: int, text: str) -> None:
    """Print the heading of a step."""
    print(f"\n[{step}/{NUM_STEPS}] {text}", flush=True)


def load_backbones(
    source: WeightsSource, trainings: dict[int, Training]
) -> tuple[nn.Module, list[nn.Module]]:
    """Return the backbone before and, per seed, the teacher's after; all are built from the same config."""
    before = features.load_model(trainings[0].cfg, source.path)
    after = [features.load_model(done.cfg, done.teacher, entry="teacher") for done in trainings.values()]
    return before, after


def score_task(
    task: Task, baselines: list[nn.Module], before: nn.Module, after: list[nn.Module], device: torch.device
) -> sentences.Scores:
    """Score histogram, random networks, backbone before and backbones after on one task."""

    def embed(model: nn.Module) -> evaluate.Features:
        return {
            split: features.backbone_features(model, pixels, device=device)
            for split, pixels in task.pixels.items()
        }

    feature_sets = {
        "histogram": [{split: features.histogram_features(pixels) for split, pixels in task.pixels.items()}],
        f"random ViT (mean of {len(baselines)})": [embed(model) for model in baselines],
        "before": [embed(before)],
        "after" if len(after) == 1 else f"after (mean of {len(after)})": [embed(model) for model in after],
    }
    return {
        name: {probe: evaluate.score(sets, task, probe) for probe in evaluate.PROBES}
        for name, sets in feature_sets.items()
    }


def compare_task(task: Task, scores: sentences.Scores) -> dict[str, evaluate.Change]:
    """Compare the last two representations, before and after: probe -> change."""
    *_, before, after = scores.values()
    return {probe: evaluate.compare(before[probe], after[probe], task) for probe in evaluate.PROBES}


def make_report(
    trainings: dict[int, Training],
    source: WeightsSource,
    processes: int,
    device: torch.device,
    scores: dict[str, sentences.Scores],
    changes: dict[str, dict[str, evaluate.Change]],
    compared: list[nn.Module],
) -> Report:
    """Gather what the page shows; ``compared`` are the two backbones whose token maps are drawn."""
    curves = {f"seed {seed}": read_metrics(done.metrics) for seed, done in trainings.items()}
    judged = [sentences.change_sentence(task, change) for task, change in changes.items()]
    spread = [sentences.spread_sentence(task, *list(rows.values())[-2:]) for task, rows in scores.items()]
    return Report(
        summary=[sentences.losses_sentence(curves), *judged],
        facts=sentences.run_facts(trainings, processes, device, source.origin),
        curves=loss_panels(curves),
        maps=token_maps(compared, device),
        sheet=draw_sheet(trainings[0].cfg),
        scores=scores,
        changes=changes,
        notes=[sentences.METHOD, *sentences.LIMITS, *spread],
    )


def token_maps(models: list[nn.Module], device: torch.device) -> dict[str, Image.Image]:
    """Draw the slide and the PCA maps of its tokens before and after: caption -> picture."""
    picture = pca.shrink(read_slide())
    tissue = pca.patch_tissue(picture)
    grids = [pca.token_map(model, picture, device=device) for model in models]
    basis = pca.fit_basis(grids, tissue)
    before, after = (pca.colour_map(grid, tissue, basis) for grid in grids)
    return {
        "slide (H&E of skin)": Image.fromarray(picture).resize(before.size),
        "before finetuning": before,
        "after finetuning": after,
    }


def write_scores(report: Report, path: Path) -> None:
    """Write all numbers as JSON."""
    content = {
        "unit": "balanced accuracy, 0..1",
        "scores": {
            task: {name: {probe: s.to_json() for probe, s in row.items()} for name, row in rows.items()}
            for task, rows in report.scores.items()
        },
        "changes": {
            task: {probe: change.to_json() for probe, change in row.items()}
            for task, row in report.changes.items()
        },
        "summary": report.summary,
        "facts": report.facts,
    }
    path.write_text(json.dumps(content, indent=1), "utf-8")


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args())
