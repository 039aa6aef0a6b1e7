"""Where config values come from: YAML files and ``key=value`` overrides, read into flat settings.

A setting remembers its origin (file and line, or the command line), so that a complaint can point at it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2.configs.schema import KEYS
from dinov2.errors import ConfigError, nearest


@dataclass(frozen=True)
class Setting:
    """One value somebody stated: a dotted path, which need not be a key, and where it was stated."""

    path: str
    value: Any
    origin: str


def read_file(path: Path) -> DictConfig:
    """Read a YAML file that holds a mapping; an empty file is an empty mapping.

    Raises:
        ConfigError: There is no such file, it cannot be read, is no YAML or holds something else.
    """
    _compose(path)
    try:
        return OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f'the config file "{path}" is not valid YAML: {_reason(error)}') from error


def file_settings(path: Path) -> list[Setting]:
    """Return what a YAML file states, each value with its line.

    Raises:
        ConfigError: See :func:`read_file`.
    """
    tree = OmegaConf.to_container(read_file(path), resolve=False)
    lines = dict(_key_lines(_compose(path)))
    return [
        Setting(key, value, f"{path.name} line {lines[key]}" if key in lines else path.name)
        for key, value in flatten(tree)
    ]


def override_settings(overrides: list[str]) -> tuple[list[Setting], list[str]]:
    """Return what ``key=value`` arguments state, and a sentence on each argument that is none.

    Arguments after the first override never reach the option parser, so options turn up here.
    """
    settings: list[Setting] = []
    problems: list[str] = []
    after_option = False  # the argument before this one was an option, and this one may be its value
    for override in overrides:
        name, equals, value = override.partition("=")
        if override.startswith("-"):
            if override != "--":
                problems.append(_misplaced_option(name, value))
        elif not equals and after_option:
            pass  # the option itself is reported
        elif not equals or not name.strip():
            problems.append(
                f'the override "{override}" is not of the form key=value, such as optim.base_lr=2e-4'
            )
        elif ":" in name:
            problems.append(
                f'the override "{override}" looks like a piece of a dataset string, which the shell divides '
                "at spaces: put the whole override in quotes, 'train.dataset_path=...'"
            )
        elif KEYS.get(name) is not None and KEYS[name].takes_text:
            settings.append(Setting(name, _text(value, KEYS[name].kinds), "command line"))
        else:
            try:
                tree = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
                settings += [Setting(path, leaf, "command line") for path, leaf in flatten(tree)]
            except (yaml.YAMLError, OmegaConfBaseException) as error:
                problems.append(f'the override "{override}" cannot be read: {_reason(error)}')
        after_option = override.startswith("-") and not equals
    return settings, problems


def flatten(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted path, value)`` of a nested mapping; a known key keeps its value whole."""
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value and path not in KEYS:
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def _compose(path: Path) -> yaml.Node | None:
    """Return the syntax tree of a YAML file, None for an empty one."""
    if path.is_dir():
        raise ConfigError(f'the config file "{path}" is a folder: name a YAML file')
    try:
        root = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError as error:
        siblings = [str(sibling) for sibling in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(str(path), siblings)
        raise ConfigError(f'the config file "{path}" does not exist{hint}: check --config-file') from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'the config file "{path}" cannot be read: {_reason(error)}') from error
    except yaml.YAMLError as error:
        raise ConfigError(f'the config file "{path}" is not valid YAML: {_reason(error)}') from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        found = "a list" if isinstance(root, yaml.SequenceNode) else f'the text "{root.value[:40]}"'
        raise ConfigError(
            f'the config file "{path}" holds {found}: a mapping of sections such as "train:" is wanted'
        )
    return root


def _key_lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield ``(dotted path, line number)`` of every key below a YAML mapping."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            yield path, key.start_mark.line + 1
            yield from _key_lines(value, f"{path}.")


def _text(value: str, kinds: tuple[type, ...]) -> str | list | None:
    """Return the value of an override for a string key: YAML for null, quotes and lists, else literally.

    Paths and dataset strings may look like something else to YAML, such as ``2024`` or ``A:root=/x: y``.
    """
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    return parsed if parsed is None or isinstance(parsed, (str, *kinds)) else value


def _misplaced_option(name: str, value: str) -> str:
    key = name.lstrip("-")
    if key in KEYS:
        return f'the override "{name}" is written without dashes: {key}={value or "<value>"}'
    return f'the option "{name}" stands among the overrides: put options before the first key=value'


def _reason(error: Exception) -> str:
    """The cause of a read error on one line, with the place YAML names."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
