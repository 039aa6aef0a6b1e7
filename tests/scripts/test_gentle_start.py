"""The measurement of gentle starts: settings, judge and picture; a training itself takes minutes."""

import json
import xml.etree.ElementTree as ET

import pytest
from torch import nn

from dinov2.configs import resolve
from scripts.digits import DigitJudge
from scripts.gentle_start import HIGH_LR, LONG, PLAIN, RECIPE, SETTINGS, SMALL_SCALE, draw, run_once


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_a_config_that_differs_from_plain_only_as_it_says(setting):
    plain = resolve(str(RECIPE), [*SMALL_SCALE, *PLAIN])
    changed = resolve(str(RECIPE), [*SMALL_SCALE, *PLAIN, *SETTINGS[setting]])
    assert plain.warnings == changed.warnings == ()
    keys = {override.split("=")[0] for override in SETTINGS[setting]}
    assert keys <= {override.split("=")[0] for override in (*PLAIN, HIGH_LR, *LONG)}
    assert (plain.cfg == changed.cfg) == (not keys)


def test_the_judge_tells_real_digits_apart_by_their_pixels_and_not_without_them():
    judge = DigitJudge(pixels=28, bank_size=300, num_judged=200)
    five, twenty = judge.accuracy(nn.Flatten(), (5, 20))
    assert five > 90 and twenty > 85
    blind = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert max(judge.accuracy(blind, (5, 20))) < 50


def result(setting, seed, end):
    curve = [[0, 70.0, 65.0], [240, end, end]]
    return {"setting": setting, "seed": seed, "student": curve, "teacher": curve}


def test_the_picture_has_a_panel_per_setting():
    svg = draw([result("plain", 0, 50.0), result("plain", 1, 60.0), result("gentle", 0, 80.0)])
    panels = ET.fromstring(svg).findall("{http://www.w3.org/2000/svg}svg")
    assert [panel.attrib["aria-label"] for panel in panels] == ["plain (2 seeds)", "gentle (1 seed)"]


def test_a_finished_run_is_not_repeated(tmp_path):
    setting = next(iter(SETTINGS))
    (tmp_path / f"{setting}_3.json").write_text(json.dumps(result(setting, 3, 50.0)))
    assert run_once(tmp_path, setting, 3, tmp_path / "no-weights") == result(setting, 3, 50.0)
