import json
import math
from pathlib import Path

import pytest

from dinov2.utils.strict_json import to_json


def test_numbers_that_are_not_finite_are_null_at_any_depth():
    text = to_json({"a": [1.0, math.nan], "b": {"c": (math.inf, {14: -math.inf})}})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [1.0, None],
        "b": {"c": [None, {"14": None}]},
    }


def test_they_may_be_written_as_something_else():
    assert to_json([math.nan, -math.inf, 2.0], not_finite=str) == '["nan", "-inf", 2.0]'


def test_keys():
    assert to_json({None: 1, True: 2, 14: 3, 0.5: 4, ("a", 1): 5}) == (
        '{"null": 1, "true": 2, "14": 3, "0.5": 4, "(\'a\', 1)": 5}'
    )


def test_objects_that_json_lacks():
    assert to_json([Path("a")], default=lambda _: math.nan) == "[null]"
    assert to_json({"path": Path("a/b")}, default=str) == '{"path": "a/b"}'
    with pytest.raises(TypeError, match="not JSON serializable"):
        to_json({"path": Path("a/b")})
