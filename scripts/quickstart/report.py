"""Writes ``report.html``: one file with pictures, curves and scores that opens anywhere, offline."""

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from scripts.quickstart.evaluate import Change, Score

STYLE = Path(__file__).with_name("report.css")


@dataclass(frozen=True)
class Report:
    """Everything the page shows.

    Attributes:
        summary: Sentences at the top, the most important first.
        facts: Name -> value, how the run was made.
        curves: ``<svg>`` per loss.
        maps: Caption -> picture of the slide: the stain, then the token maps.
        sheet: The crops the trainer was fed.
        scores: Task -> representation -> probe -> score.
        changes: Task -> probe -> after minus before.
        notes: What the scores can and cannot show.
    """

    summary: list[str]
    facts: dict[str, str]
    curves: dict[str, str]
    maps: dict[str, Image.Image]
    sheet: Image.Image
    scores: dict[str, dict[str, dict[str, Score]]]
    changes: dict[str, dict[str, Change]]
    notes: list[str]


def write_report(report: Report, path: Path) -> None:
    """Write the page to ``path`` and its pictures as PNG files beside it."""
    for caption, picture in report.maps.items():
        picture.save(path.parent / f"map_{'_'.join(caption.split()[:1]).lower()}.png")
    report.sheet.save(path.parent / "crops.png")
    path.write_text(render(report), "utf-8")


def render(report: Report) -> str:
    """Return the page as one self-contained HTML document."""
    maps = "".join(
        f"<figure>{_image(picture, caption)}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, picture in report.maps.items()
    )
    sections = [
        _section("Scores before and after", _score_table(report) + _list(report.notes)),
        _section(
            "What the patch tokens see",
            "<p>Each 14 px patch of the slide, at half its size, is coloured by the first three principal "
            "components of its token: patches of like colour look alike to the model. One basis serves both "
            "maps, so colours can be compared; glass is left grey. Look whether epithelium (purple in the "
            f"stain) and stroma (pink) have colours of their own.</p><div class='maps'>{maps}</div>",
        ),
        _section(
            "Losses",
            "<p>Running medians over 20 iterations, as in <code>training_metrics.json</code>. As in DINOv2, "
            "iBOT and KoLeo are halved there; the total is what is minimised.</p>"
            f"<div class='panels'>{''.join(report.curves.values())}</div>",
        ),
        _section(
            "What the model was fed",
            "<p>One row per tile: the tile, its two global crops, its local crops, out of the training's own "
            "data pipeline. The student does not see the yellow patches and has to predict what the teacher "
            "makes of them.</p>" + _image(report.sheet, "crops with masks", lossy=True),
        ),
        _section("How this run was made", _fact_table(report.facts)),
    ]
    style = STYLE.read_text("utf-8")
    summary = "".join(f"<p>{_text(sentence)}</p>" for sentence in report.summary)
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'/>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'/>"
        f"<title>DINOv2 quickstart</title><style>{style}</style></head><body>"
        f"<h1>DINOv2 on real histology: the quickstart's report</h1>{summary}{''.join(sections)}"
        "</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}"


def _list(items: list[str]) -> str:
    return f"<ul class='soft'>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"


def _text(sentence: str) -> str:
    return escape(sentence).replace("+-", "\u00b1")


def _score_table(report: Report) -> str:
    tasks = list(report.scores)
    probes = [(task, probe) for task in tasks for probe in report.changes[task]]
    head = "".join(f"<th>{escape(task)}<br/>{escape(probe)}</th>" for task, probe in probes)
    rows = []
    for name in report.scores[tasks[0]]:
        chosen = [report.scores[task][name][probe] for task, probe in probes]
        rows.append(_row(name, [f"{s.value:.2f} \u00b1 {s.noise:.2f}" for s in chosen]))
    changed = [report.changes[task][probe] for task, probe in probes]
    rows.append(_row("after \u2212 before", [f"{c.value:+.2f} \u00b1 {c.noise:.2f}" for c in changed]))
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _row(name: str, cells: list[str]) -> str:
    return f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _fact_table(facts: dict[str, str]) -> str:
    rows = "".join(_row(name, [value]) for name, value in facts.items())
    return f"<div class='scroll'><table><tbody>{rows}</tbody></table></div>"


def _image(picture: Image.Image, alt: str, *, lossy: bool = False) -> str:
    stream = io.BytesIO()
    if lossy:
        picture.convert("RGB").save(stream, "JPEG", quality=88)
    else:
        picture.save(stream, "PNG", optimize=True)
    kind = "jpeg" if lossy else "png"
    data = base64.b64encode(stream.getvalue()).decode()
    return f"<img alt='{escape(alt, quote=True)}' src='data:image/{kind};base64,{data}'/>"
