"""The report in a real browser: nothing sticks out, nothing fails to load, both colour schemes are drawn."""

import re
import shutil
import subprocess

import pytest
from PIL import Image

from dinov2.eval.compare import get_args_parser, main
from tests.eval.report_runs import two_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]
# Added to a copy of the page: writes what sticks out into its title.
MEASURE = """<script>addEventListener("load",()=>{const wide=document.documentElement.clientWidth;
const out=[...document.querySelectorAll("header *,main *,footer *")].filter(e=>!e.closest(".scroll>*")&&
e.getBoundingClientRect().right>wide+1);
document.title="MEASURED "+document.documentElement.scrollWidth+" "+wide+" "+out.length})</script></head>"""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered")
    path = folder / "report.html"
    main(get_args_parser().parse_args([*map(str, two_runs(folder)), "--output", str(path)]))
    return path


def browse(tmp_path, page, *options: str) -> subprocess.CompletedProcess:
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path}/profile", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("width", [500, 1400])  # headless windows are no narrower
def test_nothing_sticks_out(tmp_path, page, width):
    copy = tmp_path / "measured.html"
    copy.write_text(POLICY.sub("", page.read_text("utf-8")).replace("</head>", MEASURE), "utf-8")
    done = browse(tmp_path, copy, f"--window-size={width},900", "--dump-dom")
    content, wide, outside = map(int, re.search(r"MEASURED (\d+) (\d+) (\d+)", done.stdout).groups())
    assert wide <= width
    assert content <= wide
    assert outside == 0


def test_nothing_sticks_out_of_a_narrow_frame(tmp_path, page):
    copy = tmp_path / "measured.html"
    copy.write_text(POLICY.sub("", page.read_text("utf-8")).replace("</head>", MEASURE), "utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        '<iframe id="f" width="400" height="900" src="measured.html"></iframe><script>'
        'addEventListener("load",()=>{document.title=document.getElementById("f").contentDocument.title})</script>'
    )
    done = browse(tmp_path, outer, "--allow-file-access-from-files", "--dump-dom")
    content, wide, outside = map(int, re.search(r"MEASURED (\d+) (\d+) (\d+)", done.stdout).groups())
    assert wide <= 400
    assert content <= wide
    assert outside == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_drawn_in_both_colour_schemes(tmp_path, page, scheme):
    picture = tmp_path / f"{scheme}.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    done = browse(tmp_path, page, f"--screenshot={picture}", "--window-size=1400,2400", *dark)
    assert "CONSOLE" not in done.stderr
    with Image.open(picture) as image:
        corner = image.convert("L").getpixel((2, 2))
        colours = image.convert("RGB").getcolors(1 << 24)
    assert corner > 200 if scheme == "light" else corner < 60
    vivid = sum(count for count, (r, g, b) in colours if max(r, g, b) - min(r, g, b) > 100)
    assert vivid > 2000  # curves and bars
