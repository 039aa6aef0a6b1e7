"""The page itself: its sections in order, its style, and the files of numbers beside it."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dinov2.errors import OutputError, printable
from dinov2.eval.report import charts
from dinov2.eval.report.collect import Run, finite
from dinov2.eval.report.svg import MOST_POINTS

# Nothing may be loaded from elsewhere, whatever a name in a file tries.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# The class c0 of a series makes --c, which lines and bars take their colour from, that of --c0.
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1a1d21;--soft:#5b626b;--line:#d5d9de;--raised:#f4f6f8;
--link:#00558c;--heat:#002d4f;--over:#000;--deep:#fff;
--c0:#0067a5;--c1:#c04a00;--c2:#00785a;--c3:#a8467f;--c4:#806600;--c5:#5a5ad6;--c6:#5c5c5c;--c7:#7a2ea0}
@media (prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e8eaed;--soft:#a6adb6;--line:#3a4048;
--raised:#1f2329;--link:#7cc0f5;--heat:#73b2e4;--over:#fff;--deep:#000;
--c0:#5ab4f0;--c1:#ff9a4d;--c2:#3fcf9f;--c3:#f08cc4;--c4:#e3c34a;--c5:#a9b0ff;--c6:#c4c4c4;--c7:#c99bf0}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
header,main,footer{max-width:1500px;margin:0 auto;padding:0 16px}
h1{font-size:1.6rem;margin:1.2rem 0 .2rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p,li{max-width:75ch;overflow-wrap:anywhere}
a{color:var(--link)}
a:focus-visible,.scroll:focus-visible{outline:3px solid var(--link);outline-offset:2px}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;padding:0;margin:.6rem 0}
.note,.none,.interval{color:var(--soft);font-size:.85rem;font-weight:400}
.interval{white-space:nowrap;display:block}
caption .note{display:block}
.fixed{display:block;position:sticky;left:0;max-width:min(75ch,calc(100vw - 32px))}
.why{display:block;min-width:14rem}
.scroll{overflow-x:auto;margin:.6rem 0 1.4rem;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;font-weight:600;padding-bottom:.35rem}
th,td{padding:.35rem .5rem;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
thead th{background:var(--raised);font-weight:600}
tbody th{font-weight:600}
code{font:.85em ui-monospace,monospace;overflow-wrap:anywhere}
.confusion td{text-align:right}
.heat{color:var(--over);background:color-mix(in srgb,var(--heat) var(--share),var(--paper))}
.heat.deep{color:var(--deep)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));gap:16px}
.gallery.pictures{grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr))}
figure{margin:0;padding:10px;background:var(--raised);border-radius:6px;min-width:0}
figcaption{font-size:.9rem;font-weight:600;overflow-wrap:anywhere;margin-bottom:4px}
.pictures figcaption{font-weight:400;margin:6px 0 0}
img{max-width:100%;height:auto;display:block;background:#fff}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}
svg .note{fill:var(--soft);font-size:11px}
.grid{stroke:var(--line)}.axis{stroke:var(--soft);fill:none}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.band{fill:var(--c);opacity:.18}.dot,.bar{fill:var(--c)}
.mark{stroke:var(--c);stroke-dasharray:2 3;stroke-width:1.5}
.chance{stroke:var(--soft);stroke-dasharray:4 4;fill:none}.whisker{stroke:var(--ink);fill:none}
.d1{stroke-dasharray:7 4}.d2{stroke-dasharray:2 3}
@media print{:root{--paper:#fff;--ink:#000;--soft:#444;--line:#bbb;--raised:#fff}nav{display:none}
body{font-size:11px}.scroll{overflow:visible}figure,tr{break-inside:avoid}h2,h3{break-after:avoid}
.heat,.bar,.band,.line,.dot{print-color-adjust:exact}}
""" + "".join(f".c{n}{{--c:var(--c{n})}}" for n in range(8))


def build(runs: Sequence[Run]) -> str:
    """Return the page as HTML."""
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"Comparison of {len(runs)} runs"
    sections = [(key, heading, content) for key, heading, content in _sections(runs) if content]
    links = "".join(f'<li><a href="#{key}">{escape(heading)}</a></li>' for key, heading, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-heading"><h2 id="{key}-heading">{escape(heading)}</h2>'
        f"{content}</section>"
        for key, heading, content in sections
    )
    notes = "".join(f"<li>{escape(f'{run.name}: {note}')}</li>" for run in runs for note in run.notes)
    return printable(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY, quote=True)}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="note">{escape(", ".join(run.name for run in runs))}</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>'
        f"{f'<ul>{notes}</ul>' if notes else ''}{body}</main>"
        f'<footer><p class="note">Curves of more than {MOST_POINTS} points are drawn with the first, the '
        "last, and the lowest and the highest of every stretch; the files have them all."
        "</p></footer></body></html>\n"
    )


def _sections(runs: Sequence[Run]) -> Iterator[tuple[str, str, str]]:
    scores = charts.headline(runs) + charts.differences(runs)
    yield "scores", "Scores", scores
    yield "chosen", "Chosen iteration", charts.chosen_table(runs) + charts.collapse_table(runs)
    health = _under_headings(charts.health_charts(runs))
    yield (
        "health",
        "Health of the features",
        health and f'<p class="note">Bands are 95 % intervals; the student is dashed.</p>{health}',
    )
    training = _under_headings(charts.training_charts(runs))
    yield (
        "training",
        "Training",
        training
        and '<p class="note">Each point is the median of the last 20 iterations up to it, as the training '
        f"writes them.</p>{training}",
    )
    yield "confusion", "Confusion", charts.confusion_tables(runs)
    roc = charts.roc_charts(runs)
    yield (
        "roc",
        "ROC curves",
        roc
        and f'<p class="note">One class against the rest; the number is the area under the curve.</p>{roc}',
    )
    recall = charts.recall_charts(runs)
    yield (
        "classes",
        "Classes",
        recall
        and f'<p class="note">Whiskers are Wilson\'s 95 % intervals.</p>{recall}{charts.class_tables(runs)}',
    )
    yield "robustness", "Robustness", charts.robustness_tables(runs)
    yield "pictures", "Pictures", charts.pictures(runs)
    yield "config", "Config", charts.config_differences(runs)
    yield "results", "All results", charts.all_results(runs)
    yield "provenance", "Provenance", charts.provenance(runs)


def _under_headings(parts: Sequence[tuple[str, str]]) -> str:
    return "".join(f"<h3>{escape(heading)}</h3>{content}" for heading, content in parts)


def write(path: Path, text: str) -> None:
    """Write the page; an earlier one is replaced.

    Raises:
        OutputError: It cannot be written.
    """
    aside = path.with_name(f".{path.name}.part")
    try:
        aside.write_text(text, "utf-8")
        aside.replace(path)
    except OSError as error:
        raise OutputError(
            f'the report "{path}" cannot be written ({error.strerror}): choose another --output'
        ) from error


def write_data(folder: Path, runs: Sequence[Run]) -> list[str]:
    """Write the numbers behind the charts as CSV files, all points of them, and return their names.

    Raises:
        OutputError: They cannot be written.
    """
    files = {
        "training.csv": (("run", "iteration", "field", "value"), _training_rows(runs)),
        "health.csv": (("run", "iteration", "signal", "value", "low", "high"), _health_rows(runs)),
        "scores.csv": (
            ("run", "folder", "evaluation", "setting", "role", "score", "value", "low", "high"),
            _score_rows(runs),
        ),
        "classes.csv": (("run", "evaluation", "role", "class", "score", "value"), _class_rows(runs)),
        "confusion.csv": (
            ("run", "evaluation", "role", "true", "predicted", "images"),
            _confusion_rows(runs),
        ),
        "roc.csv": (
            ("run", "evaluation", "role", "class", "false_positive", "true_positive"),
            _roc_rows(runs),
        ),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (head, rows) in files.items():
            with (folder / name).open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(head)
                writer.writerows(rows)
    except OSError as error:
        raise OutputError(
            f'the numbers "{folder}" cannot be written ({error.strerror}): choose another --data'
        ) from error
    return list(files)


def _training_rows(runs: Iterable[Run]) -> Iterator[tuple[Any, ...]]:
    for run in runs:
        for row in run.training:
            for name, value in row.items():
                if name != "iteration":
                    yield run.name, row["iteration"], name, finite(value)


def _health_rows(runs: Iterable[Run]) -> Iterator[tuple[Any, ...]]:
    for run in runs:
        for record in run.records:
            for name, value in record["signals"].items():
                ends = record.get("intervals", {}).get(name) or (None, None)
                yield run.name, record["iteration"], name, finite(value), *ends


def _score_rows(runs: Iterable[Run]) -> Iterator[tuple[Any, ...]]:
    for run in runs:
        for result in run.results:
            place = result.path.parent.relative_to(run.folder)
            for name, value in result.row["scores"].items():
                ends = result.row.get("intervals", {}).get(name) or (None, None)
                yield run.name, place, result.evaluation, result.setting, result.role, name, value, *ends


def _class_rows(runs: Iterable[Run]) -> Iterator[tuple[Any, ...]]:
    for run in runs:
        for result in run.shown():
            for score, values in result.row["per_class"].items():
                for name, value in zip(result.classes, values, strict=True):
                    yield run.name, result.evaluation, result.role, name, score, value


def _confusion_rows(runs: Iterable[Run]) -> Iterator[tuple[Any, ...]]:
    for run in runs:
        for result in run.shown():
            for name, counts in zip(result.classes, result.row["confusion_matrix"], strict=True):
                for other, count in zip(result.classes, counts, strict=True):
                    yield run.name, result.evaluation, result.role, name, other, count


def _roc_rows(runs: Iterable[Run]) -> Iterator[tuple[Any, ...]]:
    for run in runs:
        for result in run.shown():
            if result.predictions is None:
                continue
            for series in charts.roc_series(result, most=result.predictions.num_classes):
                for false, true in zip(series.x, series.y, strict=True):
                    yield run.name, result.evaluation, result.role, series.name, false, true
