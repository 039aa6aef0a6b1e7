"""Line charts and bar charts as inline SVG text, coloured by the style sheet of the page.

Series are told apart by the classes ``c0`` to ``c7`` and ``d0`` to ``d2``, a colour and a dash each.
Every chart carries a title and a description for readers who do not see it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS, DASHES = 8, 3
WIDTH, PLOT_HEIGHT = 420, 190
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 8, 36
ROW = 17  # height of a line of the legend
CHARACTER = 7.3  # mean width of a character of labels, in a wide font
MOST_NAME = 52  # characters of a name in the legend
MOST_POINTS = 500
DOTS_UP_TO = 30  # a series of no more points shows each

Number = float | None


@dataclass(frozen=True)
class Series:
    """A curve.

    Args:
        name: In the legend.
        x, y: Its points; a ``y`` of None is a gap.
        low, high: The ends of an interval round each point, or nothing.
        colour, dash: Numbers of its colour and its dash.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    colour: int = 0
    dash: int = 0


@dataclass(frozen=True)
class Mark:
    """A vertical line at ``x`` with a word beside it."""

    x: float
    text: str
    colour: int = 0


def thinned(y: Sequence[Number], most: int = MOST_POINTS) -> list[int]:
    """Return which points to draw, at most ``most``: the ends, and of each stretch lowest, highest and a gap.

    A curve of no more points is drawn as it is, so that no peak and no gap is lost either way.
    """
    count = len(y)
    if count <= most:
        return list(range(count))
    stretches = (most - 2) // 3
    kept = {0, count - 1}
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        there = [index for index in stretch if y[index] is not None]
        gaps = [index for index in stretch if y[index] is None]
        if there:
            kept |= {min(there, key=lambda index: y[index]), max(there, key=lambda index: y[index])}
        kept |= set(gaps[:1])
    return sorted(kept)


def number_text(value: float, digits: int = 4) -> str:
    """Return ``value`` with ``digits`` significant digits."""
    return f"{value:.{digits}g}"


def line_chart(
    key: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "iteration",
    marks: Sequence[Mark] = (),
    limits: tuple[float, float] | None = None,
    diagonal: bool = False,
    legend: bool = False,
) -> str:
    """Return a chart of curves.

    Args:
        key: Makes the ids of the page unique.
        title: What is drawn.
        series: The curves.
        x_label: Of the horizontal axis.
        marks: Vertical lines.
        limits: Of both axes; by default those of the points.
        legend: Name the curves above them.
        diagonal: Draw the line of equal coordinates, that of chance in a ROC chart.
    """
    xs = [x for one in series for x in one.x] + [mark.x for mark in marks]
    ys = [y for one in series for y in (*one.y, *one.low, *one.high) if y is not None]
    x_axis = _Axis(*(limits or _range(xs, 0.0)), LEFT, WIDTH - RIGHT)
    names, top = _legend([(one.name, one.colour, one.dash) for one in series] if legend else [])
    y_axis = _Axis(*(limits or _range(ys, 0.05)), top + PLOT_HEIGHT, top)
    parts = [*_frame(x_axis, y_axis, x_label), *names]
    if diagonal:
        parts.append(
            f'<path class="chance" d="M{x_axis.at(0):.1f} {y_axis.at(0):.1f}L{x_axis.at(1):.1f} '
            f'{y_axis.at(1):.1f}"/>'
        )
    for one in series:
        parts += _curve(one, x_axis, y_axis, dots=not diagonal)
    for row, mark in enumerate(marks):
        x = x_axis.at(mark.x)
        right = x < (LEFT + WIDTH) / 2
        parts.append(
            f'<path class="mark c{mark.colour % COLOURS}" d="M{x:.1f} {top}V{top + PLOT_HEIGHT}"/>'
            f'<text class="note" x="{x + (4 if right else -4):.1f}" y="{top + 12 + 14 * (row % 8)}" '
            f'text-anchor="{"start" if right else "end"}">{escape(_short(mark.text))}</text>'
        )
    said = [_described(one) for one in series] + [mark.text for mark in marks]
    return _svg(key, title, "; ".join(said), parts, top + PLOT_HEIGHT + BOTTOM)


def bar_chart(
    key: str,
    title: str,
    groups: Sequence[str],
    series: Sequence[Series],
) -> str:
    """Return horizontal bars from 0 to 1, a group of them per name, with their intervals.

    Args:
        key: Makes the ids of the page unique.
        title: What is drawn.
        groups: Name of each group.
        series: A bar per group each; ``x`` is not used.
    """
    names, top = _legend([(one.name, one.colour, 0) for one in series] if len(series) > 1 else [])
    left = min(max(LEFT, 10 + CHARACTER * max(map(len, map(_short_group, groups)))), WIDTH / 2)
    thick = 14
    step = thick * len(series) + 10
    bottom = top + step * len(groups)
    x_axis = _Axis(0.0, 1.0, left, WIDTH - RIGHT - 34)
    parts = [*names]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = x_axis.at(tick)
        parts.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{tick:g}</text>')
    for group, name in enumerate(groups):
        y = top + group * step + 5
        middle = y + thick * len(series) / 2 + 4
        parts.append(
            f'<text x="{left - 6:.1f}" y="{middle:.1f}" text-anchor="end">{escape(_short_group(name))}</text>'
        )
        for place, one in enumerate(series):
            value = one.y[group]
            if value is None:
                continue
            at = y + place * thick
            parts.append(
                f'<rect class="bar c{one.colour % COLOURS}" x="{left:.1f}" y="{at:.1f}" '
                f'width="{x_axis.at(value) - left:.1f}" height="{thick - 3}"/>'
            )
            end = value
            if one.low and one.low[group] is not None:
                low, high = x_axis.at(one.low[group]), x_axis.at(one.high[group])
                end = max(end, one.high[group])
                parts.append(
                    f'<path class="whisker" d="M{low:.1f} {at + 5.5:.1f}H{high:.1f}'
                    f'M{low:.1f} {at + 2.5:.1f}v6M{high:.1f} {at + 2.5:.1f}v6"/>'
                )
            parts.append(
                f'<text x="{x_axis.at(end) + 5:.1f}" y="{at + 9.5:.1f}">{number_text(value, 3)}</text>'
            )
    said = [
        f"{one.name}: "
        + ", ".join(
            f"{name} {'not defined' if value is None else number_text(value, 3)}"
            for name, value in zip(groups, one.y, strict=True)
        )
        for one in series
    ]
    return _svg(key, title, "; ".join(said), parts, bottom + 24)


class _Axis:
    """Maps the values ``low`` to ``high`` to the places ``start`` to ``end``."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Four to eight round numbers within the axis."""
        span = self.high - self.low
        size = 10.0 ** math.floor(math.log10(span / 4))
        size *= next(factor for factor in (10, 5, 2, 1) if span / (size * factor) >= 4 or factor == 1)
        first = math.ceil(self.low / size - 1e-9)
        return [n * size for n in range(first, math.floor(self.high / size + 1e-9) + 1)]


def _range(values: Iterable[float], margin: float) -> tuple[float, float]:
    """Return the ends of an axis; those of a single value lie round it."""
    values = list(values)
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        spread = abs(low) / 2 or 0.5
        return low - spread, high + spread
    return low - margin * (high - low), high + margin * (high - low)


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str) -> list[str]:
    left, right, bottom = x_axis.start, x_axis.end, y_axis.start
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.at(tick)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.5g}</text>')
    for tick in x_axis.ticks():
        x = x_axis.at(tick)
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v4"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.7g}</text>')
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    parts.append(
        f'<text x="{(left + right) / 2}" y="{bottom + 31}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return parts


def _legend(entries: Sequence[tuple[str, int, int]]) -> tuple[list[str], int]:
    """Return the names above a chart, in as many lines as they need, and where the chart begins."""
    parts, x, row = [], 8.0, 0
    for name, colour, dash in entries:
        width = 32 + CHARACTER * len(_short(name))
        if x > 8 and x + width > WIDTH:
            x, row = 8.0, row + 1
        y = TOP + row * ROW + 9
        parts.append(
            f'<path class="line c{colour % COLOURS} d{dash % DASHES}" d="M{x:.0f} {y - 4}h18"/>'
            f'<text x="{x + 23:.0f}" y="{y}">{escape(_short(name))}</text>'
        )
        x += width + 6
    return parts, TOP + (row + 1) * ROW if entries else TOP


def _curve(series: Series, x_axis: _Axis, y_axis: _Axis, *, dots: bool) -> list[str]:
    kept = thinned(series.y)
    colour = f"c{series.colour % COLOURS}"
    parts = []
    if series.low:
        ends = [i for i in kept if series.low[i] is not None and series.high[i] is not None]
        there = [f"{x_axis.at(series.x[i]):.1f} {y_axis.at(series.high[i]):.1f}" for i in ends]
        back = [f"{x_axis.at(series.x[i]):.1f} {y_axis.at(series.low[i]):.1f}" for i in reversed(ends)]
        if ends:
            parts.append(f'<path class="band {colour}" d="M{"L".join(there + back)}Z"/>')
    path, pen_down, places = "", False, []
    for index in kept:
        value = series.y[index]
        if value is None:
            pen_down = False
            continue
        place = f"{x_axis.at(series.x[index]):.1f} {y_axis.at(value):.1f}"
        path += f"{'L' if pen_down else 'M'}{place}"
        pen_down = True
        places.append(place.split())
    if path:
        parts.append(f'<path class="line {colour} d{series.dash % DASHES}" d="{path}"/>')
    if dots and len(places) <= DOTS_UP_TO:
        parts += [f'<circle class="dot {colour}" cx="{x}" cy="{y}" r="2.4"/>' for x, y in places]
    return parts


def _described(series: Series) -> str:
    """Say in words how a curve runs."""
    points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
    if not points:
        return f"{series.name}: no values"
    (first_x, first), (last_x, last) = points[0], points[-1]
    low_x, low = min(points, key=lambda point: point[1])
    high_x, high = max(points, key=lambda point: point[1])
    return (
        f"{series.name}: {number_text(first)} at {first_x:g}, {number_text(last)} at {last_x:g}, lowest "
        f"{number_text(low)} at {low_x:g}, highest {number_text(high)} at {high_x:g}"
    )


def _short(name: str) -> str:
    return name if len(name) <= MOST_NAME else f"{name[: MOST_NAME - 3]}..."


def _short_group(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:21]}..."


def _svg(key: str, title: str, description: str, parts: Sequence[str], height: float) -> str:
    return (
        f'<svg role="img" aria-labelledby="{key}-title {key}-desc" viewBox="0 0 {WIDTH} {height:.0f}">'
        f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(description)}</desc>'
        f"{''.join(parts)}</svg>"
    )
