"""The figures and tables of the report: each takes the runs and returns HTML text, empty for nothing."""

import base64
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dinov2.errors import DatasetError
from dinov2.eval.paired import compare_files
from dinov2.eval.report.collect import Picture, Result, Run, finite
from dinov2.eval.report.svg import Mark, Series, bar_chart, line_chart, number_text
from dinov2.eval.scores import DRAWS, SCORES

SCORE_NAMES = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "weighted_f1": "weighted F1",
    "auroc": "AUROC",
    "quadratic_kappa": "quadratic kappa",
    "macro_jaccard": "macro Jaccard",
    "auprc": "AUPRC",
}
PAIRED_SEED = 0
NORMAL_95 = 1.959964  # the 97.5 % point of the normal distribution
MOST_CLASSES = 40  # of a confusion matrix and of bars that can still be read
MOST_ROC_CURVES = 12
DEEP_SHARE = 0.63  # from here on, text on the colour is legible the other way round, in both schemes

# Group -> pattern of the fields of a training row; the first that fits counts.
TRAINING_GROUPS = {
    "Losses": r".*loss",
    "Schedules": r"lr|last_layer_lr|wd|mom|teacher_temp",
    "Gradients and skipped steps": r"grad_norm_.*|skipped_steps",
    "Speed and memory": r"iter_time|data_time|images_per_second|max_mem.*|current_batch_size",
    "Other": r".*",
}
TRAINING_NAMES = {
    "lr": "learning rate",
    "last_layer_lr": "learning rate of the last layer",
    "wd": "weight decay",
    "mom": "teacher momentum",
    "teacher_temp": "teacher temperature",
    "iter_time": "seconds per iteration",
    "data_time": "seconds of waiting for data",
    "max_mem_mib": "peak GPU memory (MiB)",
    "current_batch_size": "images per process and step",
}
HEALTH_GROUPS = {
    "k-NN on the labelled set": r"knn_.*",
    "Patients by their slides": r"slide_.*",
    "Spread of the features": r"rankme|alpha_req|feature_std|mean_cosine|feature_norm",
    "Prototypes": r"(teacher_|student_)?prototype.*",
    "Drift from the starting backbone": r"drift_.*",
    "Teacher and student": r"agreement|teacher_student_kl",
    "Other": r".*",
}
HEALTH_NAMES = {
    "slide_auroc": "AUROC of patients, out of fold",
    "rankme": "RankMe",
    "alpha_req": "alpha-ReQ",
    "feature_std": "feature standard deviation",
    "drift_cka": "drift: CKA with the start",
    "drift_cosine": "drift: cosine with the start",
    "agreement": "agreement of teacher and student (cosine)",
    "teacher_student_kl": "divergence of teacher and student (KL)",
}


def figure(drawing: str, caption: str) -> str:
    """Return a drawing with a caption below its title."""
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, note: str = "") -> str:
    """Return a table whose first column names the rows, in a region that scrolls by keyboard.

    Args:
        caption: As text.
        head: Names of the columns, as text.
        rows: Cells, as HTML.
        note: Below the caption, as text.
    """
    below = f'<span class="note">{escape(note)}</span>' if note else ""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption, quote=True)}">'
        f'<table><caption><span class="fixed">{escape(caption)}{below}</span></caption>'
        f"<thead><tr>{names}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def number(value: float | None, digits: int = 4) -> str:
    """Return a score with its exact value behind the rounded one; a dash where it is not defined."""
    if value is None:
        return '<span class="none">not defined</span>'
    return f'<data value="{value!r}">{value:.{digits}f}</data>'


def with_interval(value: float | None, ends: Sequence[Any] | None, digits: int = 4) -> str:
    """Return a value and its interval."""
    text = number(value, digits)
    low, high = (finite(end) for end in ends) if ends and len(ends) == 2 else (None, None)
    if value is None or low is None or high is None:
        return text
    return f'{text} <span class="interval">{low:.{digits}f} to {high:.{digits}f}</span>'


# Scores


def headline(runs: Sequence[Run]) -> str:
    """Return the scores of the result of each run that is shown in detail."""
    shown = [(run, result) for run in runs for result in run.shown()]
    return _score_table(
        "Scores with 95 % intervals",
        shown,
        note="Of several settings, the one with 20 neighbours, else the first; of folds, the ensemble or all "
        "of them pooled. All are listed further below.",
    )


def all_results(runs: Sequence[Run]) -> str:
    """Return the scores of every row of every summary, where there are more than the headline shows."""
    if sum(len(run.results) for run in runs) == sum(len(run.shown()) for run in runs):
        return ""
    return _score_table("All results", [(run, result) for run in runs for result in run.results])


def _score_table(caption: str, results: Sequence[tuple[Run, Result]], *, note: str = "") -> str:
    """Return a row per result, a column per score that any of them has; nothing without results."""
    if not results:
        return ""
    names = [name for name in SCORE_NAMES if any(name in result.row["scores"] for _, result in results)]
    return table(
        caption,
        ["run", "evaluation", "setting", _counted([result for _, result in results])]
        + [SCORE_NAMES[name] for name in names],
        [_score_row(run, result, names) for run, result in results],
        note=note,
    )


def _counted(results: Sequence[Result]) -> str:
    """What the numbers of samples count, as the head of a column."""
    return " or ".join(dict.fromkeys(result.samples_are for result in results))


def _score_row(run: Run, result: Result, names: Sequence[str]) -> list[str]:
    scores, intervals = result.row["scores"], result.row.get("intervals", {})
    where = _place_note(run, result.path)
    role = "" if result.role == "val" else f", {result.role}"
    spread = result.row.get("standard_deviations", {})
    cells = []
    for name in names:
        cell = with_interval(finite(scores.get(name)), intervals.get(name))
        if finite(spread.get(name)) is not None:
            cell += f' <span class="interval">standard deviation {spread[name]:.4f}</span>'
        cells.append(cell)
    return [
        escape(run.name),
        escape(f"{result.evaluation}{role}") + where,
        escape(result.setting),
        f"{result.row['samples']:,}",
        *cells,
    ]


def _place_note(run: Run, path: Path) -> str:
    """Say in which folder of a run a file lies, if not in the run's own."""
    place = path.parent.relative_to(run.folder)
    return f' <span class="note">{escape(str(place))}</span>' if place.parts else ""


def differences(runs: Sequence[Run]) -> str:
    """Return what each run gains over the first, from draws of images that both share."""
    if len(runs) < 2:
        return ""
    names = [name for name in SCORE_NAMES if name in SCORES]
    first = {(result.evaluation, result.role): result for result in runs[0].shown()}
    rows, compared = [], []
    for run in runs[1:]:
        for result in run.shown():
            base = first.get((result.evaluation, result.role))
            if base is None:
                continue
            gains = _gains(base, result)
            cells = (
                [f'<span class="none">{escape(gains)}</span>', *[""] * (len(SCORES) - 1)]
                if isinstance(gains, str)
                else [_gain(gains[name]) for name in names]
            )
            compared.append(result)
            rows.append([escape(run.name), escape(f"{result.evaluation}, {result.setting}"), *cells])
    if not rows:
        return ""
    return table(
        f"Paired difference to {runs[0].name}",
        ["run", "evaluation", *(SCORE_NAMES[name] for name in names)],
        rows,
        note=f"With its 95 % interval, from {DRAWS} draws of {_counted(compared)} that both runs share.",
    )


def _gains(base: Result, result: Result) -> dict[str, dict[str, Any]] | str:
    """Compare two results, or say why they cannot be."""
    if base.predictions_path is None or result.predictions_path is None:
        return "no file of predictions: evaluate with --predictions"
    try:
        return compare_files(base.predictions_path, result.predictions_path, DRAWS, PAIRED_SEED)
    except DatasetError as error:
        if "same images" not in str(error) and "same samples" not in str(error):
            raise
        return f"not judged on the same {result.samples_are}"


def _gain(found: dict[str, Any]) -> str:
    value = finite(found["difference"])
    if value is None:
        return number(None)
    low, high = (finite(end) for end in found["interval"])
    text = f'<data value="{value!r}">{value:+.4f}</data>'
    if low is None or high is None:
        return text
    sure = '<span class="interval">excludes 0</span>' if low > 0 or high < 0 else ""
    return f'{text} <span class="interval">{low:+.4f} to {high:+.4f}</span>{sure}'


# Training


def training_charts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return ``(heading, figures)`` of everything that the training wrote, a chart per field."""
    fields = _fields(row for run in runs for row in run.training)
    fields.pop("iteration", None)

    def chart(name: str) -> str:
        series = []
        for place, run in enumerate(runs):
            rows = [row for row in run.training if name in row]
            if rows:
                xs, ys = [row["iteration"] for row in rows], [finite(row[name]) for row in rows]
                series.append(Series(run.name, xs, ys, colour=place))
        title = TRAINING_NAMES.get(name, name.replace("_", " "))
        return figure(
            line_chart(
                f"training-{_key(name)}", title, series, marks=_chosen_marks(runs), legend=len(runs) > 1
            ),
            title,
        )

    return _grouped(fields, TRAINING_GROUPS, chart)


def health_charts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Return ``(heading, figures)`` of the evaluations in the loop, teacher and student in one chart."""
    names: dict[str, None] = {}
    for run in runs:
        for record in run.records:
            for name in record["signals"]:
                names[_without_network(name)] = None

    def chart(base: str) -> str:
        series = []
        for place, run in enumerate(runs):
            for name, dash in _networks(base):
                rows = [record for record in run.records if name in record["signals"]]
                if rows:
                    series.append(_health_series(run.name, name, rows, place, dash, len(runs) == 1))
        title = _signal_name(base)
        return figure(
            line_chart(
                f"health-{_key(base)}",
                title,
                series,
                x_label="iterations done (0 is the starting backbone)",
                marks=[*_chosen_marks(runs), *_collapse_marks(runs)],
                legend=len(runs) > 1 or len(series) > 1,
            ),
            title,
        )

    return _grouped(names, HEALTH_GROUPS, chart)


def _health_series(
    run_name: str, name: str, rows: Sequence[dict[str, Any]], place: int, dash: int, alone: bool
) -> Series:
    ends = [[finite(end) for end in row.get("intervals", {}).get(name) or (None, None)] for row in rows]
    has_ends = any(low is not None for low, _ in ends)
    network = "student" if dash else "teacher"
    return Series(
        network if alone else f"{run_name}, {network}",
        [row["iteration"] for row in rows],
        [finite(row["signals"][name]) for row in rows],
        low=[low for low, _ in ends] if has_ends else (),
        high=[high for _, high in ends] if has_ends else (),
        colour=place,
        dash=dash,
    )


def _signal_name(signal: str) -> str:
    if signal.startswith("knn_"):
        score = signal.removeprefix("knn_")
        return f"k-NN {SCORE_NAMES.get(score, score)}"
    return HEALTH_NAMES.get(signal, signal.replace("_", " "))


def _without_network(name: str) -> str:
    name = name.removeprefix("student_")
    return name if name.startswith("teacher_student") else name.removeprefix("teacher_")


def _networks(base: str) -> list[tuple[str, int]]:
    """The names under which a signal of teacher and student may stand, and their dashes."""
    return [(base, 0), (f"teacher_{base}", 0), (f"student_{base}", 1)]


def _chosen_marks(runs: Sequence[Run]) -> list[Mark]:
    return [
        Mark(run.best["iteration"], "chosen" if len(runs) == 1 else f"chosen: {run.name}", place)
        for place, run in enumerate(runs)
        if run.best
    ]


def _collapse_marks(runs: Sequence[Run]) -> list[Mark]:
    """The first collapse of each run."""
    marks = []
    for place, run in enumerate(runs):
        collapsed = [record["iteration"] for record in run.records if record.get("collapse")]
        if collapsed:
            text = "collapsed" if len(runs) == 1 else f"collapsed: {run.name}"
            marks.append(Mark(collapsed[0], text, place))
    return marks


def chosen_table(runs: Sequence[Run]) -> str:
    """Return which iteration each run chose, beside the same signal of the start and of the end."""
    rows = []
    for run in runs:
        if not run.best:
            continue
        signal = str(run.best.get("signal", ""))
        values = {record["iteration"]: finite(record["signals"].get(signal)) for record in run.records}
        start, last = values.get(0), values[max(values)] if values else None
        rows.append(
            [
                escape(run.name),
                f"{run.best['iteration']:,}",
                escape(_signal_name(signal)),
                with_interval(finite(run.best.get("value")), run.best.get("interval")),
                number(start),
                number(last),
                f'<span class="why">{escape(str(run.best.get("why", "")))}</span>',
            ]
        )
    if not rows:
        return ""
    head = ["run", "chosen iteration", "signal", "its value", "at the start", "at the end", "why"]
    return table("The iteration to ship", head, rows)


def collapse_table(runs: Sequence[Run]) -> str:
    """Return every evaluation that called the features collapsed."""
    rows = [
        [escape(run.name), f"{record['iteration']:,}", escape("; ".join(map(str, record["collapse"])))]
        for run in runs
        for record in run.records
        if record.get("collapse")
    ]
    return table("Features called collapsed", ["run", "iterations done", "why"], rows) if rows else ""


# Classes


def confusion_tables(runs: Sequence[Run]) -> str:
    """Return a confusion matrix per shown result."""
    return "".join(_confusion(run, result) for run in runs for result in run.shown())


def _confusion(run: Run, result: Result) -> str:
    classes, matrix = result.classes, result.row["confusion_matrix"]
    title = f"Confusion matrix: {run.name}, {result.evaluation}, {result.setting}"
    if len(classes) > MOST_CLASSES:
        return f'<p class="note">{escape(title)}: {len(classes)} classes are too many to show.</p>'
    rows = []
    for name, counts in zip(classes, matrix, strict=True):
        total = sum(counts)
        shares = [count / total if total else 0.0 for count in counts]
        cells = (
            f'<td class="heat{" deep" if share >= DEEP_SHARE else ""}" style="--share:{100 * share:.1f}%">'
            f"{count:,}</td>"
            for count, share in zip(counts, shares, strict=True)
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}<td>{total:,}</td></tr>')
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in (*classes, "all"))
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(title, quote=True)}">'
        f'<table class="confusion"><caption><span class="fixed">{escape(title)}<span class="note">'
        f"Rows are true classes, columns predicted ones; {result.samples_are} are counted, and the colour is "
        "the share of the row.</span></span></caption>"
        f'<thead><tr><th scope="col">true class</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        "</div>"
    )


def recall_charts(runs: Sequence[Run]) -> str:
    """Return bars of the recall of each class, the runs side by side, per evaluation."""
    figures = []
    for (evaluation, role), shown in _by_evaluation(runs).items():
        classes = shown[0][1].classes
        if len(classes) > MOST_CLASSES:
            continue
        series = []
        for run, result in shown:
            recall = [finite(value) for value in result.row["per_class"]["recall"]]
            ends = [(None, None)] * len(recall)
            if "tries" not in result.row:
                support = result.row["per_class"]["support"]
                ends = [wilson(value, count) for value, count in zip(recall, support, strict=True)]
            series.append(
                Series(
                    run.name,
                    (),
                    recall,
                    low=[low for low, _ in ends],
                    high=[high for _, high in ends],
                    colour=_place(runs, run),
                )
            )
        support = shown[0][1].row["per_class"]["support"]
        groups = [f"{name} ({count:,})" for name, count in zip(classes, support, strict=True)]
        judged = evaluation if role == "val" else f"{evaluation}, {role}"
        title = f"Recall of each class ({shown[0][1].samples_are}): {judged}"
        figures.append(
            figure(bar_chart(f"recall-{_key(evaluation)}-{_key(role)}", title, groups, series), title)
        )
    return _gallery(figures)


def wilson(share: float | None, count: int) -> tuple[float | None, float | None]:
    """Return Wilson's 95 % interval of a share of ``count`` images, nothing without images."""
    if share is None or not count:
        return None, None
    square = NORMAL_95**2 / count
    middle = (share + square / 2) / (1 + square)
    half = NORMAL_95 / (1 + square) * ((share * (1 - share) + square / 4) / count) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def class_tables(runs: Sequence[Run]) -> str:
    """Return the scores of each class."""
    names = ("support", "recall", "precision", "f1", "auroc")
    tables = []
    for run in runs:
        for result in run.shown():
            scores = result.row["per_class"]
            rows = [
                [escape(name), f"{scores['support'][place]:,}"]
                + [number(finite(scores[key][place])) for key in names[1:]]
                for place, name in enumerate(result.classes)
            ]
            caption = f"Classes: {run.name}, {result.evaluation}, {result.setting}"
            tables.append(
                table(caption, ["class", result.samples_are, "recall", "precision", "F1", "AUROC"], rows)
            )
    return "".join(tables)


def roc_charts(runs: Sequence[Run]) -> str:
    """Return the ROC curves, one class against the rest, of every shown result with predictions."""
    figures = []
    for place, run in enumerate(runs):
        for result in run.shown():
            if result.predictions is None:
                continue
            title = f"ROC: {run.name}, {result.evaluation}, {result.setting}"
            series = roc_series(result)
            figures.append(
                figure(
                    line_chart(
                        f"roc-{place}-{_key(result.evaluation)}-{_key(result.role)}",
                        title,
                        series,
                        x_label="false positive rate",
                        limits=(0.0, 1.0),
                        legend=True,
                        diagonal=True,
                    ),
                    title
                    if len(result.classes) <= MOST_ROC_CURVES
                    else f"{title} (the {MOST_ROC_CURVES} classes of the lowest AUROC)",
                )
            )
    return _gallery(figures)


def roc_series(result: Result, most: int = MOST_ROC_CURVES) -> list[Series]:
    """Return the curves of the classes that have both kinds of images; of class 1 where there are two.

    Of more than ``most`` classes, those of the lowest area.
    """
    predictions, areas = result.predictions, result.row["per_class"]["auroc"]
    numbers = [1] if predictions.num_classes == 2 else range(predictions.num_classes)
    numbers = sorted(
        sorted((n for n in numbers if finite(areas[n]) is not None), key=lambda n: areas[n])[:most]
    )
    series = []
    for place, n in enumerate(numbers):
        false, true = roc_curve(predictions.scores[:, n], predictions.labels == n)
        name = f"{result.classes[n]} {number_text(areas[n], 3)}"
        series.append(Series(name, false, true, colour=place, dash=place // 8 + place % 2))
    return series


def roc_curve(scores: Tensor, positive: Tensor) -> tuple[list[float], list[float]]:
    """Return false and true positive rates of a falling threshold, without points within straight lines.

    Args:
        scores: Of the class (S,).
        positive: Whether the samples belong to it (S,).
    """
    scores, positive = scores.numpy(), positive.numpy()
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(
        np.append(np.diff(scores[order]) != 0, True)
    )  # the last of each run of equal scores
    true = np.append(0, np.cumsum(positive[order])[ends])
    false = np.append(0, np.cumsum(~positive[order])[ends])
    across, up = np.diff(false), np.diff(true)
    turns = across[1:] * up[:-1] != across[:-1] * up[1:]
    kept = np.concatenate([[True], turns, [True]])
    return (false[kept] / false[-1]).tolist(), (true[kept] / true[-1]).tolist()


# Robustness


def robustness_tables(runs: Sequence[Run]) -> str:
    """Return how features bear changes of stain and scanner, and what they say of centres."""
    changes, centers = [], []
    for run in runs:
        for found in run.robustness:
            summary = found.summary
            name = escape(run.name) + _place_note(run, found.path)
            for row in summary["perturbations"]:
                cosines = (row["mean_cosine"], summary["random_pair_cosine"], row["retrieval"])
                change = f"{escape(str(row['perturbation']))} {row['strength']:g}"
                cells = [number(finite(value), 3) for value in (*cosines, row.get("flips"))]
                changes.append([name, change, f"{summary['samples']:,}", *cells])
            if summary["centers"] is not None:
                scores = summary["centers"]
                cells = [
                    with_interval(finite(scores.get(key)), scores.get(f"{key}_interval"), 3)
                    for key in ("robustness_index", "croma_median")
                ]
                centers.append([name, f"{scores['centers']:,}", *cells])
    tables = ""
    if changes:
        tables += table(
            "Features of changed tiles beside those of the tiles themselves",
            ["run", "change", "tiles", "mean cosine", "random-pair cosine", "retrieval", "votes changed"],
            changes,
            note="Retrieval is the share of changed tiles whose nearest original is their own.",
        )
    if centers:
        tables += table(
            "Tissue against centre, with 95 % intervals",
            ["run", "centres", "robustness index", "median CRoMa"],
            centers,
            note="With an index above 0.5, tissue counts for more than the centre.",
        )
    return tables


# Where the numbers come from


def config_differences(runs: Sequence[Run]) -> str:
    """Return the config keys in which the runs differ."""
    with_config = [run for run in runs if run.config]
    if len(with_config) < 2:
        return ""
    keys = sorted({key for run in with_config for key in run.config} - {"train.output_dir"})
    absent = '<span class="none">absent</span>'
    rows = []
    for key in keys:
        values = [run.config.get(key) for run in with_config]
        if len(set(values)) > 1:
            shown = [absent if value is None else f"<code>{escape(value)}</code>" for value in values]
            rows.append([f"<code>{escape(key)}</code>", *shown])
    if not rows:
        return "<p>The runs have the same config, train.output_dir aside.</p>"
    head = ["key", *(run.name for run in with_config)]
    return table("Config keys that differ", head, rows, note="train.output_dir is left out.")


def provenance(runs: Sequence[Run]) -> str:
    """Return a table per run of what its numbers come from."""
    tables = []
    for run in runs:
        rows = [["folder", str(run.folder.resolve())]]
        rows += [
            [key, run.config[key]]
            for key in ("train.dataset_path", "student.arch", "student.pretrained_weights", "train.seed")
            if run.config.get(key) not in (None, "", "null")
        ]
        for result in run.shown():
            name = f"{result.evaluation}, {result.role}"
            rows += [[f"{name}: {key}", value] for key, value in _facts(result)]
        cells = [[escape(key), f"<code>{escape(str(value))}</code>"] for key, value in rows]
        tables.append(table(f"Provenance: {run.name}", ["what", "value"], cells))
    return "".join(tables)


def _facts(result: Result) -> list[tuple[str, Any]]:
    summary = result.summary
    model = summary.get("model") or {}
    if result.evaluation == "slides":  # it starts from features, whose backbone they may not tell
        source = [
            ("encoder", summary.get("encoder") or "not told by the bags"),
            *((key, summary.get(key)) for key in ("aggregator", "target", "patients", "slides")),
        ]
    else:
        source = [("weights", summary.get("pretrained_weights") or "none: a random network")]
    facts = [
        ("file", result.path.name),
        *source,
        *model.items(),
        ("training set", summary.get("train_dataset")),
        ("judged by", result.row.get("dataset")),
        ("setting", result.setting),
        *(summary.get("protocol") or {}).items(),
        *((f"bootstrap {key}", value) for key, value in (summary.get("bootstrap") or {}).items()),
    ]
    return [(key.replace("_", " "), value) for key, value in facts if value is not None]


def pictures(runs: Sequence[Run]) -> str:
    """Return the PNG pictures of the runs, inside the page."""
    figures = []
    for run in runs:
        for picture in run.pictures:
            caption = picture.caption if len(runs) == 1 else f"{run.name}: {picture.caption}"
            figures.append(
                f'<figure><img src="data:image/png;base64,{_base64(picture)}" '
                f'alt="{escape(caption, quote=True)}"><figcaption>{escape(caption)}</figcaption></figure>'
            )
    return f'<div class="gallery pictures">{"".join(figures)}</div>' if figures else ""


def _base64(picture: Picture) -> str:
    try:
        content = picture.path.read_bytes()
    except OSError as error:
        raise DatasetError(f'the picture "{picture.path}" cannot be read ({error.strerror})') from error
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise DatasetError(f'"{picture.path}" is not a PNG picture: replace or remove it')
    return base64.b64encode(content).decode()


def _by_evaluation(runs: Sequence[Run]) -> dict[tuple[str, str], list[tuple[Run, Result]]]:
    groups: dict[tuple[str, str], list[tuple[Run, Result]]] = {}
    for run in runs:
        for result in run.shown():
            groups.setdefault((result.evaluation, result.role), []).append((run, result))
    return groups


def _place(runs: Sequence[Run], run: Run) -> int:
    return next(place for place, other in enumerate(runs) if other is run)


def _fields(rows: Iterable[dict[str, Any]]) -> dict[str, None]:
    """The names of numbers in rows, in the order of their first appearance."""
    return {name: None for row in rows for name, value in row.items() if finite(value) is not None}


def _grouped(
    names: Iterable[str], groups: dict[str, str], chart: Callable[[str], str]
) -> list[tuple[str, str]]:
    members: dict[str, list[str]] = {group: [] for group in groups}
    for name in names:
        members[next(group for group, pattern in groups.items() if re.fullmatch(pattern, name))].append(name)
    return [(group, _gallery([chart(name) for name in found])) for group, found in members.items() if found]


def _gallery(figures: Sequence[str]) -> str:
    return f'<div class="gallery">{"".join(figures)}</div>' if figures else ""


def _key(name: str) -> str:
    """A name as a part of an id; names that differ in other characters alone stay apart."""
    return re.sub(r"[^0-9a-zA-Z_]", lambda match: f"-{ord(match.group()):x}-", name)
