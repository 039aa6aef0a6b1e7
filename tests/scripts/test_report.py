"""The page: well-formed, self-contained, and showing what it was given."""

import base64
import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from scripts.quickstart.evaluate import Change, Score
from scripts.quickstart.report import Report, write_report


@pytest.fixture
def page(tmp_path):
    score = Score(0.751, 0.062, [0.751], 0.01, np.ones(3))
    report = Report(
        summary=["Loss & <scores>."],
        facts={"weights": "a file"},
        curves={"total_loss": "<svg xmlns='http://www.w3.org/2000/svg'><text>t</text></svg>"},
        maps={
            name: Image.new("RGBA", (8, 6), colour) for name, colour in (("slide", "red"), ("after", "blue"))
        },
        sheet=Image.new("RGB", (20, 10), "yellow"),
        scores={"nuclei": {"before": {"k-NN": score}, "after": {"k-NN": score}}},
        changes={"nuclei": {"k-NN": Change(-0.02, 0.05)}},
        notes=["One note."],
    )
    write_report(report, tmp_path / "report.html")
    return tmp_path / "report.html"


def test_well_formed(page):
    root = ET.fromstring(page.read_text("utf-8"))
    assert root.tag == "html"
    assert "Loss & <scores>." in "".join(root.itertext())
    cells = [cell.text for cell in root.iter("td")]
    assert cells[:3] == ["0.75 \u00b1 0.06", "0.75 \u00b1 0.06", "-0.02 \u00b1 0.05"]


def test_self_contained(page):
    text = page.read_text("utf-8")
    sources = re.findall(r"(?:src|href)='([^']*)'", text)
    assert len(sources) == 3
    for source in sources:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", source).groups()
        assert Image.open(io.BytesIO(base64.b64decode(data))).format.lower() == kind
    assert "@import" not in text and "url(" not in text


def test_light_and_dark(page):
    assert "prefers-color-scheme: dark" in page.read_text("utf-8")


def test_pictures_lie_beside_the_page(page):
    assert {path.name for path in page.parent.glob("*.png")} == {
        "crops.png",
        "map_slide.png",
        "map_after.png",
    }
