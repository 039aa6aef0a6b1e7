"""The table of all config keys in `docs/configuration.md`, made from `schema.py`.

`python -m dinov2.configs.reference docs/configuration.md` renews it; a test fails when that is due.
"""

import sys
from pathlib import Path

import yaml

from dinov2.configs.keys import Key
from dinov2.configs.schema import KEYS

MARKER = "<!-- The tables below are made by python -m dinov2.configs.reference: edit schema.py instead. -->\n"


def tables() -> str:
    """Return one Markdown table per top-level section."""
    lines: list[str] = []
    section = ""
    for path, key in KEYS.items():
        if path.partition(".")[0] != section:
            section = path.partition(".")[0]
            lines += ["", f"### {section}", "", "| key | type | default | unit | accepted | meaning |"]
            lines += ["|---|---|---|---|---|---|"]
        lines.append(_row(key))
    return "\n".join(lines) + "\n"


def renew(path: Path) -> None:
    """Replace everything after the marker line in a document."""
    prose, marker, _ = path.read_text("utf-8").partition(MARKER)
    assert marker, path
    path.write_text(prose + marker + tables(), "utf-8")


def _row(key: Key) -> str:
    default = yaml.safe_dump(key.default, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
    accepted = ", ".join(f"`{choice}`" for choice in key.rule.choices) or key.rule.pattern_words or key.bounds
    cells = (f"`{key.path}`", key.type_name, f"`{default}`", key.rule.unit, accepted, key.rule.meaning)
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    renew(Path(sys.argv[1]))
