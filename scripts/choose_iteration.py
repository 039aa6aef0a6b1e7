"""Does a run notice that it has collapsed, and choose a good iteration? Tried on scikit-learn's real digits.

By the ordinary trainer with evaluation in the loop, of the kinds

    healthy         the recipe of docs/learning.md
    overtrained     a learning rate that is too high and hardly falls: the network learns, then decays
    lr_x1000        1,000 times the learning rate, one seed
    no_centering    without centring of the teacher, one seed

Labels of 300 training pictures and of 250 others serve the k-NN in the loop; the last 250 take no part in any
choice and judge the chosen networks at the end.

    python -m scripts.choose_iteration --output-dir results/choice --kinds overtrained --seeds 0 1 2

Prints the signals and the verdict of every evaluation and the choice of every run; writes ``choice.json``.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from PIL import Image

from dinov2 import cli
from dinov2.configs import resolve_config
from dinov2.errors import OutputError
from dinov2.models.pretrained import load_backbone
from dinov2.train import SSLMetaArch
from dinov2.train.monitoring.collapse import find_collapse, worse_than_start
from dinov2.train.monitoring.records import RECORDS_FILE, Record, read_records
from dinov2.train.monitoring.selection import Selection, describe
from scripts.digits import NUM_TRAIN, REPO, DigitJudge, load_digit_images, train, write_training_part
from scripts.learn_digits import CENTERINGS, NUM_NEIGHBOURS, PIXELS, RECIPE

BANK, VALIDATION = 300, 250
# Two blocks and small batches: a third of the time of the recipe. The learning rate is 0.003 from the end of
# the warm-up on, five times the recipe's peak at that batch size.
OVERTRAINED = (
    "student.depth=2",
    "train.batch_size_per_gpu=24",
    "optim.base_lr=0.02",
    "optim.min_lr=0.003",
)
KINDS = ("healthy", "overtrained", "lr_x1000", "no_centering")
UNCENTERED = REPO / "scripts" / "train_uncentered.py"
SIGNALS = (
    "knn_balanced_accuracy",
    "rankme",
    "feature_std",
    "mean_cosine",
    "teacher_prototype_entropy",
    "teacher_prototype_usage_entropy",
)


@dataclass(frozen=True)
class Run:
    """One run of the experiment: its kind, its seed and what differs from the recipe."""

    kind: str
    seed: int
    overrides: tuple[str, ...] = ()
    uncentered: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.seed}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Outcome:
    """What a run has recorded and chosen.

    Attributes:
        collapsed: iterations whose features are called collapsed.
        worse: iterations that are called worse than the start.
        chosen, hindsight: the iteration that the rule chose, and the one of the highest score.
        within: whether the chosen one's score lies in the interval of the highest.
        test_accuracy: percent, of the chosen networks on pictures that took no part; None without ``best``.
        text: the paragraph at the end of the run.
    """

    name: str
    collapsed: list[int]
    worse: list[int]
    chosen: int
    hindsight: int
    within: bool
    test_accuracy: float | None
    text: str


def planned_runs(kinds: Sequence[str], seeds: Sequence[int], iterations: int) -> list[Run]:
    """Return the runs of some of :data:`KINDS`, those that are to learn with every seed."""
    length = (f"optim.max_iterations={iterations}",)
    too_fast = f"optim.base_lr={1000 * resolve_config(str(RECIPE), []).optim.base_lr}"
    runs = {
        "healthy": [Run("healthy", seed, length) for seed in seeds],
        "overtrained": [Run("overtrained", seed, (*length, *OVERTRAINED)) for seed in seeds],
        "lr_x1000": [Run("lr_x1000", seeds[0], (*length, too_fast))],
        "no_centering": [
            Run("no_centering", seeds[0], (*length, *CENTERINGS["centering"]), uncentered=True),
        ],
    }
    return [run for kind in kinds for run in runs[kind]]


def write_labelled_parts(folder: Path) -> dict[str, str]:
    """Write the pictures that k-NN in the loop learns from and is judged by; return their dataset strings."""
    pictures, labels = load_digit_images(PIXELS)
    parts = {"bank": range(BANK), "validation": range(NUM_TRAIN, NUM_TRAIN + VALIDATION)}
    for part, rows in parts.items():
        for row in rows:
            path = folder / part / str(labels[row]) / f"{row:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures[row]).save(path)
    return {part: f"ImageFolder:root={folder / part}" for part in parts}


def run_once(folder: Path, run: Run, period: int, extra: Sequence[str] = ()) -> tuple[list[Record], Outcome]:
    """Train, and judge the run's own records."""
    parts = write_labelled_parts(folder)
    overrides = [
        *run.overrides,
        f"train.seed={run.seed}",
        f"evaluation.eval_period_iterations={period}",
        f"evaluation.train_dataset_path={parts['bank']}",
        f"evaluation.val_dataset_path={parts['validation']}",
        *extra,
    ]
    output_dir = folder / run.name
    entry = {"entry": UNCENTERED} if run.uncentered else {}
    train(RECIPE, write_training_part(folder, PIXELS), output_dir, overrides, **entry)
    records = read_records(output_dir / RECORDS_FILE)
    if not records:
        raise OutputError(f"{output_dir / RECORDS_FILE} has no records: the run has evaluated nothing.")
    return records, judge(output_dir, run, records, overrides)


def judge(output_dir: Path, run: Run, records: list[Record], overrides: Sequence[str]) -> Outcome:
    """Call collapse, choose, and look at the chosen networks with pictures that took no part."""
    cfg = resolve_config(str(RECIPE), overrides)
    sizes = {"prototypes": cfg.dino.head_n_prototypes, "embed_dim": cfg.student.embed_dim}
    start = records[0]
    records = [replace(record, collapse=find_collapse(record, start, **sizes)) for record in records]
    choice = Selection().judge(records)
    scored = [record for record in records if record.signals[choice.signal] == record.signals[choice.signal]]
    highest = max(scored, key=lambda record: record.signals[choice.signal])
    low = highest.intervals[choice.signal][0]
    weights = output_dir / "best" / "teacher_checkpoint.pth"
    accuracy = None
    if weights.is_file():
        backbone = SSLMetaArch(cfg).teacher["backbone"]
        load_backbone(backbone, str(weights), entry="teacher")
        held_out = DigitJudge(PIXELS, bank_size=BANK, first_judged=NUM_TRAIN + VALIDATION, num_judged=250)
        (accuracy,) = held_out.accuracy(backbone, [NUM_NEIGHBOURS])
    return Outcome(
        run.name,
        [record.iteration for record in records if record.collapse],
        [record.iteration for record in records if worse_than_start(record, start)],
        choice.best.iteration,
        highest.iteration,
        choice.best.signals[choice.signal] >= low,
        accuracy,
        describe(choice, records),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=Path("results/choice"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=400, help="length of every run")
    parser.add_argument("--period", type=int, default=25, help="iterations between evaluations")
    parser.add_argument("opts", nargs="*", help="further config overrides, key=value")
    args = parser.parse_args()
    outcomes = []
    for run in planned_runs(args.kinds, args.seeds, args.iterations):
        records, outcome = run_once(args.output_dir, run, args.period, args.opts)
        print(run.name)
        for record in records:
            values = "  ".join(f"{name} {record.signals[name]:.4g}" for name in SIGNALS)
            verdict = "collapsed" if record.iteration in outcome.collapsed else ""
            verdict = verdict or ("worse than the start" if record.iteration in outcome.worse else "")
            print(f"  {record.iteration:6d}  {values}  {verdict}")
        print(f"  {outcome.text}")
        print(
            f"  within the interval of the highest, iteration {outcome.hindsight}: {outcome.within}; "
            f"held-out accuracy of best/: {outcome.test_accuracy}",
            flush=True,
        )
        outcomes.append(asdict(outcome))
    (args.output_dir / "choice.json").write_text(json.dumps(outcomes, indent=1))


if __name__ == "__main__":
    cli.run(main)
