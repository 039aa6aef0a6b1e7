"""Values of a sweep: how they are written, named and put into the arguments of each job."""

import json
import re

import pytest

from dinov2.configs import resolve_config
from dinov2.errors import ConfigError, OutputError
from dinov2.run.sweep import Combination, assigned, combinations, record, table
from tests.run.conftest import parse, task_parser


def values(*sweeps):
    return [list(row.values.values()) for row in combinations(sweeps)]


def folders(*sweeps):
    return [row.folder for row in combinations(sweeps)]


def test_a_grid_has_one_job_per_combination():
    assert values("optim.base_lr=1e-4,2e-4", "train.seed=0,1") == [
        ["1e-4", "0"],
        ["1e-4", "1"],
        ["2e-4", "0"],
        ["2e-4", "1"],
    ]
    assert folders("optim.base_lr=1e-4,2e-4", "train.seed=0,1")[1] == "base_lr-1e-4_seed-1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0.05,0.3],[0.1, 0.4]", ["[0.05,0.3]", "[0.1, 0.4]"]),
        ('"A:root=/x,y","B"', ['"A:root=/x,y"', '"B"']),
        ("A:root=/x:split=TRAIN, B:root=/y", ["A:root=/x:split=TRAIN", "B:root=/y"]),
        ("{a: 1, b: 2},null", ["{a: 1, b: 2}", "null"]),
        ("7", ["7"]),
        ("a b,c", ["a b", "c"]),
    ],
)
def test_values_are_yaml(text, expected):
    assert [row[0] for row in values(f"a.b={text}")] == expected


def test_a_list_arrives_in_the_config_as_a_list():
    (row,) = combinations(["crops.local_crops_scale=[0.1,0.2]"])
    args = assigned(parse("optim.epochs=50"), row.values)
    config = resolve_config("", args.opts)
    assert list(config.crops.local_crops_scale) == [0.1, 0.2]
    assert config.optim.epochs == 50


@pytest.mark.parametrize(
    ("sweeps", "expected"),
    [
        (["train.seed"], "not of the form KEY=VALUE,VALUE"),
        (["=1,2"], "not of the form"),
        (["a.b="], "has an empty value"),
        (["a.b=1,,2"], "cannot be read as YAML values"),
        (["a.b=[1,2"], "cannot be read as YAML values"),
        (["a.b=1],[2"], "cannot be read as YAML values"),
        (["a.b=1,2,1"], "has the value 1 twice"),
        (["a.b=1e-4,0.0001"], "has the value 1e-4 twice"),
        (["train.output_dir=a,b"], "every job gets a folder of its own below --output-dir"),
        (["a.b=1", "a.b=2"], "names a.b twice"),
    ],
)
def test_mistakes_are_named(sweeps, expected):
    with pytest.raises(ConfigError, match=expected):
        combinations(sweeps)


def test_folders_have_names_that_need_no_quotes_and_differ():
    names = folders(
        "train.seed=0,1", "student.seed=2", "a.path=/x y/z:1,/x-y/z:1,'/x y/z_1'", "b.c=" + "v" * 300
    )
    assert len(set(names)) == len(names) == 6
    assert all(re.fullmatch(r"[A-Za-z0-9._+-]{1,220}", name) for name in names)
    assert all(
        name.startswith(("train.seed-0_student.seed-2_", "train.seed-1_student.seed-2_")) for name in names
    )
    # A job keeps its folder, and so its checkpoints, when the sweep grows.
    few, more = (folders(f"a.b='x y',x_y{end}") for end in ("", ",z"))
    assert more[:2] == few


def test_options_of_the_program_can_be_swept():
    row = combinations(['weights=a,"b,c"'])[1]
    args = assigned(parse("--weights", "d", "a.b=1"), row.values, [task_parser()])
    assert (args.weights, args.opts) == ("b,c", ["a.b=1"])
    for wrong in ("weights=e", "nodes=3", "wieghts=a", "no-resume=1"):
        (row,) = combinations([wrong])
        with pytest.raises(ConfigError, match=r"^--sweep over an option: .*accepted are config keys"):
            assigned(parse(), row.values, [task_parser()])


def test_the_table_keeps_what_earlier_sweeps_noted(tmp_path):
    old, again, new = (Combination(f"x-{number}", {"a.x": str(number)}) for number in range(3))
    record(tmp_path, [old, again], ["1_0", "1_1"])
    record(tmp_path, [again, new], ["2_0", "2_1"])
    jobs = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert [(row["folder"], row["job"]) for row in jobs] == [("x-0", "1_0"), ("x-1", "2_0"), ("x-2", "2_1")]
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(OutputError, match=r"sweep\.json cannot be read or written"):
        record(tmp_path, [new], ["3"])
    assert table([old]).splitlines() == ["job  folder  values", "0    x-0     a.x=0"]
