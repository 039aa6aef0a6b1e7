"""Several line charts as one SVG picture that a README or a page of docs/ can show by itself."""

from collections.abc import Sequence

from scripts.quickstart.curves import HEIGHT, WIDTH

STYLE = """
text { font: 12px sans-serif; fill: #666 } .title { font-weight: bold } .end { text-anchor: end }
.middle { text-anchor: middle } .grid { stroke: #8884; stroke-width: 1 }
.line { fill: none; stroke-width: 1.6 }
.line.series-0 { stroke: #3b76c4 } .line.series-1 { stroke: #d1762b } .line.series-2 { stroke: #3c9a5f }
.legend.series-0 { fill: #3b76c4 } .legend.series-1 { fill: #d1762b } .legend.series-2 { fill: #3c9a5f }
"""


def picture(charts: Sequence[str], columns: int) -> str:
    """Return one ``<svg>`` document of the charts of ``line_chart``, row by row."""
    panels = []
    for number, chart in enumerate(charts):
        x, y = WIDTH * (number % columns), HEIGHT * (number // columns)
        panels.append(chart.replace("<svg ", f'<svg x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    rows = -(-len(charts) // columns)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * WIDTH} {rows * HEIGHT}">'
    return f"{head}<style>{STYLE}</style>{''.join(panels)}</svg>\n"
