"""Loss curves as inline SVG: one small panel per loss, drawn from ``training_metrics.json``."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 340, 210
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 30, 40

TITLES = {
    "total_loss": "total loss (what is minimised)",
    "dino_local_crops_loss": "DINO, local crops",
    "dino_global_crops_loss": "DINO, global crops",
    "ibot_loss": "iBOT, masked patches (half)",
    "koleo_loss": "KoLeo, spread of cls tokens (half)",
}


def read_metrics(path: Path) -> dict[str, list[float]]:
    """Read the JSON lines of a run into one list per entry; of repeated iterations the last row counts.

    Entries that are missing or null in some row are left out.
    """
    rows = {}
    for line in path.read_text("utf-8").splitlines():
        row = json.loads(line)
        rows[row["iteration"]] = row
    ordered = [rows[iteration] for iteration in sorted(rows)]
    names = [name for name in ordered[0] if all(row.get(name) is not None for row in ordered)]
    return {name: [row[name] for row in ordered] for name in names}


def loss_panels(runs: dict[str, dict[str, list[float]]]) -> dict[str, str]:
    """Draw one panel per loss that every run recorded.

    Args:
        runs: Metrics of :func:`read_metrics` by label, for example ``seed 0``.

    Returns:
        Name of the loss -> ``<svg>`` element, total loss first.
    """
    shared = set.intersection(*({name for name in run if name.endswith("loss")} for run in runs.values()))
    names = sorted(shared, key=lambda name: (list(TITLES).index(name) if name in TITLES else 99, name))
    return {
        name: line_chart(
            TITLES.get(name, name),
            {label: (run["iteration"], run[name]) for label, run in runs.items()},
            x_label="iteration",
            y_label="loss",
        )
        for name in names
    }


def line_chart(
    title: str,
    lines: dict[str, tuple[list, list]],
    *,
    x_label: str,
    y_label: str,
    y_shown: Sequence[float] = (),
) -> str:
    """Draw labelled lines on common axes as one ``<svg>`` element; colours come from the page's style.

    Args:
        title: Stands above the chart.
        lines: Label -> (x values, y values).
        x_label: Stands below the horizontal axis.
        y_label: Stands beside the vertical axis.
        y_shown: Values that the vertical axis reaches in any case, so that charts can be compared.
    """
    xs = np.concatenate([np.asarray(x, float) for x, _ in lines.values()])
    ys = np.concatenate([np.asarray(y, float) for y in (y_shown, *(y for _, y in lines.values()))])
    x_ticks, y_ticks = ticks(xs.min(), xs.max(), whole=True), ticks(ys.min(), ys.max())
    x_range = (min(xs.min(), x_ticks[0]), max(xs.max(), x_ticks[-1]))
    y_range = (y_ticks[0], y_ticks[-1])

    def place_x(value: float) -> float:
        return LEFT + (value - x_range[0]) / max(x_range[1] - x_range[0], 1e-12) * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>']
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 4:.1f}">{tick:g}</text>')
    for tick in x_ticks:
        x = place_x(tick)
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{tick:g}</text>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="axis middle" x="{middle_x}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    parts.append(
        f'<text class="axis middle" transform="translate(12 {middle_y}) rotate(-90)">{escape(y_label)}</text>'
    )
    for number, (label, (x, y)) in enumerate(lines.items()):
        points = " ".join(f"{place_x(a):.1f},{place_y(b):.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline class="line series-{number % 3}" points="{points}"/>')
        if len(lines) > 1:
            parts.append(
                f'<text class="tick end legend series-{number % 3}" x="{WIDTH - RIGHT}" '
                f'y="{TOP + 14 * (number + 1)}">{escape(label)}</text>'
            )
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg>'
    )


def ticks(low: float, high: float, *, whole: bool = False, target: int = 4) -> list[float]:
    """Return round axis values that enclose ``low`` to ``high`` (``whole``: integers that lie within it)."""
    span = max(high - low, 1e-6 * max(abs(high), 1.0))
    rough = span / target
    magnitude = 10.0 ** np.floor(np.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough - 1e-12)
    if whole:
        step = max(1.0, round(step))
        first, last = np.ceil(low / step), np.floor(high / step)
    else:
        first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
        last = max(last, first + 1)
    return [round(float(number * step), 10) for number in np.arange(first, last + 1)]
