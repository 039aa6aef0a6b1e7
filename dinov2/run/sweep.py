"""Sweeps, one job per combination of values: ``--sweep optim.base_lr=1e-4,2e-4 --sweep train.seed=0,1``.

Values are YAML: ``crops.local_crops_scale=[0.05,0.3],[0.1,0.4]`` has two, each a list. A key without a dot is
an option of the program, such as ``pretrained-weights``.
"""

import argparse
import copy
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dinov2.errors import ConfigError, OutputError

OUTPUT_KEYS = ("train.output_dir", "output-dir", "output_dir")
FILE_NAME = "sweep.json"
# File systems take names of 255 bytes; a value keeps its end, which tells paths apart.
VALUE_LENGTH = 60
NAME_LENGTH = 200


@dataclass(frozen=True)
class Combination:
    """One job of a sweep.

    Attributes:
        folder: Name of its folder, made of its values: ``base_lr-1e-4_seed-0``.
        values: Key -> value as it was written on the command line.
    """

    folder: str
    values: dict[str, str]


class _OptionParser(argparse.ArgumentParser):
    """Raises what argparse would print before it leaves."""

    def error(self, message: str) -> None:
        raise ConfigError(
            f"--sweep over an option: {message}; accepted are config keys and options of the job"
        )


def combinations(sweeps: Sequence[str]) -> list[Combination]:
    """Return the grid over ``KEY=VALUE,VALUE...`` texts; the last key varies fastest.

    Raises:
        ConfigError: A text is not of that form, a key comes twice or a value comes twice.
    """
    grid: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, equals, text = sweep.partition("=")
        key = key.strip().removeprefix("--")
        if not equals or not key:
            raise ConfigError(
                f'--sweep "{sweep}" is not of the form KEY=VALUE,VALUE, such as optim.base_lr=1e-4,2e-4'
            )
        if key in grid:
            raise ConfigError(f"--sweep names {key} twice: give all its values at once, separated by commas")
        if key in OUTPUT_KEYS:
            raise ConfigError(
                f"--sweep {key}: every job gets a folder of its own below --output-dir; leave it out"
            )
        grid[key] = _split(key, text)
    rows = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    names = _folder_names(rows)
    return [Combination(name, row) for name, row in zip(names, rows, strict=True)]


def assigned(
    args: argparse.Namespace, values: dict[str, str], parents: Sequence[argparse.ArgumentParser] = ()
) -> argparse.Namespace:
    """Return a copy of ``args`` with the values of one combination.

    Args:
        args: With ``opts``, the overrides of the config.
        values: Key -> value; a key with a dot is one of the config.
        parents: Parsers of the job's own options, which the other keys name.

    Raises:
        ConfigError: An option does not exist, takes no value or not this one.
    """
    args = copy.deepcopy(args)
    options = [(key, text) for key, text in values.items() if "." not in key]
    overrides = [f"{key}={text}" for key, text in values.items() if "." in key]
    opts = [*(args.opts or []), *overrides]
    if options:
        parser = _OptionParser(parents=list(parents), add_help=False, allow_abbrev=False)
        args = parser.parse_args([f"--{key}={_unquoted(text)}" for key, text in options], namespace=args)
    args.opts = opts  # a parser that takes them as its last words has emptied the list
    return args


def table(rows: Sequence[Combination]) -> str:
    """Return the combinations as a table: number in the array, folder, values."""
    cells = [("job", "folder", "values")]
    cells += [
        (str(number), row.folder, " ".join(f"{key}={text}" for key, text in row.values.items()))
        for number, row in enumerate(rows)
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def record(folder: Path, rows: Sequence[Combination], job_ids: Sequence[str]) -> None:
    """Note in ``sweep.json`` which job has which values; rows of earlier sweeps in other folders stay.

    Raises:
        OutputError: The file cannot be written.
    """
    path = folder / FILE_NAME
    new = [
        {"folder": row.folder, "values": row.values, "job": job}
        for row, job in zip(rows, job_ids, strict=True)
    ]
    mine = {row.folder for row in rows}
    try:
        old = json.loads(path.read_text("utf-8"))["jobs"] if path.exists() else []
        text = json.dumps({"jobs": [row for row in old if row["folder"] not in mine] + new}, indent=2)
        aside = path.with_name(f".{path.name}.part")
        aside.write_text(text + "\n", "utf-8")
        aside.replace(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"the table of the sweep {path} cannot be read or written ({error}): move it away"
        ) from error


def _split(key: str, text: str) -> list[str]:
    """Split a YAML list without its brackets into the texts of its items."""
    flow = f"[{text}]"
    try:
        root = yaml.compose(flow, Loader=yaml.SafeLoader)
        closed = root is not None and root.end_mark.index == len(flow)
    except yaml.YAMLError:
        closed = False
    if not closed:
        raise ConfigError(
            f'--sweep {key}: "{text}" cannot be read as YAML values separated by commas: put a list in [], a '
            "text with commas in quotes"
        )
    values = [flow[node.start_mark.index : node.end_mark.index].strip() for node in root.value]
    if not values or "" in values:
        raise ConfigError(f'--sweep {key}="{text}" has an empty value: write KEY=VALUE,VALUE')
    read = [repr(_read(value)) for value in values]
    for value, meaning in zip(values, read, strict=True):
        if read.count(meaning) > 1:
            raise ConfigError(f"--sweep {key} has the value {value} twice: name each value once")
    return values


def _read(text: str) -> object:
    """Return what a config makes of a text: YAML, in which 1e-4 is a number."""
    try:
        return float(text)
    except ValueError:
        return yaml.safe_load(text)


def _unquoted(text: str) -> str:
    value = yaml.safe_load(text)
    return value if isinstance(value, str) else text


def _folder_names(rows: list[dict[str, str]]) -> list[str]:
    keys = list(rows[0])
    leaves = [key.rpartition(".")[2] for key in keys]
    short = {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}
    names = [
        "_".join(f"{short[key]}-{_safe(text)[-VALUE_LENGTH:]}" for key, text in row.items())[:NAME_LENGTH]
        for row in rows
    ]
    # Names cut to the same get a mark of their values, which stays the same in a larger sweep.
    return [
        name if names.count(name) == 1 else f"{name}_{hashlib.sha256(repr(row).encode()).hexdigest()[:8]}"
        for name, row in zip(names, rows, strict=True)
    ]


def _safe(text: str) -> str:
    """What every shell, dataset string and override takes without quotes."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_.") or "empty"
