"""Merging default < file < overrides into one checked config, with everything that is wrong in one error."""

import difflib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2.configs import checks, sources
from dinov2.configs.keys import WrongValueError, describe
from dinov2.configs.schema import KEYS, SECTIONS
from dinov2.configs.sources import Setting
from dinov2.errors import ConfigError, nearest

logger = logging.getLogger("dinov2")


@dataclass(frozen=True)
class Resolution:
    """A checked config and what there is to say about it once logging works."""

    cfg: DictConfig
    infos: tuple[str, ...]
    warnings: tuple[str, ...]

    def log(self) -> None:
        for info in self.infos:
            logger.info("%s", info)
        for warning in self.warnings:
            logger.warning("%s", warning)


def merge(
    defaults: DictConfig,
    config_file: str,
    overrides: Iterable[str],
    *,
    output_dir: str | None = None,
    lenient: bool = False,
) -> Resolution:
    """Do the work of :func:`dinov2.configs.resolve_config`, which see, without logging anything."""
    tree = OmegaConf.to_container(defaults, resolve=False)
    settings = [Setting(path, value, "ssl_default_config.yaml") for path, value in sources.flatten(tree)]
    settings += sources.file_settings(Path(config_file)) if config_file else []
    from_overrides, malformed = sources.override_settings(list(overrides))
    settings += from_overrides
    if output_dir is not None:
        settings.append(Setting("train.output_dir", output_dir, "--output-dir"))

    known, unknown, misplaced = _sort_out(settings)
    values, wrong = _values(known)
    findings = list(checks.find(values))
    warnings = [finding.text for finding in findings if not finding.fatal]
    problems = malformed + misplaced + wrong + [finding.text for finding in findings if finding.fatal]
    if lenient:
        warnings = [f"{text}; it is ignored" for text in unknown] + warnings
    else:
        problems = unknown + problems
    if problems:
        raise ConfigError(_listed(problems))

    cfg = _nested(values)
    OmegaConf.set_struct(cfg, True)
    infos = () if config_file else ("no config file is given: the packaged default config is used",)
    return Resolution(cfg, infos, tuple(warnings))


def suggest_key(path: str) -> str:
    """Return a hint at the valid key nearest to an unknown one, or an empty string.

    A key of the same section that goes on where the name ends comes first, then one of the same name in
    another section, then a similar name in the same section, then a similar name anywhere.
    """
    section, _, name = path.rpartition(".")
    namesakes = [key for key in KEYS if _leaf(key).lower() == name.lower()]
    siblings = {_leaf(key): key for key in KEYS if key.rpartition(".")[0] == section}
    # compute_precision has the same names six times over; only a whole path tells those apart.
    others = {_leaf(key): key for key in KEYS if not key.startswith("compute_precision.")}
    longer = next((key for leaf, key in siblings.items() if name and leaf.startswith(f"{name}_")), "")
    if longer:
        return f' (did you mean "{longer}"?)'
    if namesakes:
        match = difflib.get_close_matches(path, namesakes, n=1, cutoff=0.0)
        return f' (did you mean "{match[0]}"?)'
    for keys in (siblings, others):
        match = difflib.get_close_matches(name, keys, n=1)
        if match:
            return f' (did you mean "{keys[match[0]]}"?)'
    return nearest(path, KEYS) if section not in SECTIONS else ""


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _sort_out(settings: list[Setting]) -> tuple[list[Setting], list[str], list[str]]:
    """Divide settings into those of known keys, sentences on unknown keys, and sentences on sections."""
    known: list[Setting] = []
    unknown: list[str] = []
    misplaced: list[str] = []
    for item in settings:
        if item.path in KEYS:
            known.append(item)
        elif item.path not in SECTIONS:
            unknown.append(f"{item.path} ({item.origin}) is not a config key{suggest_key(item.path)}")
        elif item.value not in (None, {}):  # a section with nothing in it states nothing
            misplaced.append(
                f"{item.path} ({item.origin}) is {describe(item.value)}, a section of keys is wanted"
            )
    return known, unknown, misplaced


def _values(settings: list[Setting]) -> tuple[dict[str, Any], list[str]]:
    """Return the converted values of the keys that are right, and a sentence on each that is wrong."""
    stated = {item.path: item for item in settings}  # the last one wins
    raw = {path: stated[path].value if path in stated else key.default for path, key in KEYS.items()}
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for path, key in KEYS.items():
        try:
            values[path] = key.convert(_interpolated(raw, path))
        except WrongValueError as error:
            hint = nearest(raw[path], key.rule.choices) if isinstance(raw[path], str) else ""
            wrong.append(f"{path} ({stated[path].origin}) {error}{hint}")
    return values, wrong


def _interpolated(raw: dict[str, Any], path: str) -> Any:
    """Return a raw value with its ``${references}`` to other keys replaced."""
    value = raw[path]
    if value == "???":  # OmegaConf's mark for it
        raise WrongValueError(f"is left open with ???, {KEYS[path].wanted} is wanted")
    if not (isinstance(value, str) and "${" in value):
        return value
    try:
        # Only this value may hold references that do not parse, the complaint has to name the right key.
        others = {key: other for key, other in raw.items() if key == path or _parses(other)}
        value = OmegaConf.select(_nested(others), path)
    except OmegaConfBaseException as error:
        raise WrongValueError(f"refers to something missing: {str(error).splitlines()[0]}") from error
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _parses(value: Any) -> bool:
    try:
        OmegaConf.create([value])
    except OmegaConfBaseException:
        return False
    return True


def _nested(values: dict[str, Any]) -> DictConfig:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, leaf = path.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return OmegaConf.create(tree)


def _listed(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, start=1)]
    return "\n".join([f"the configuration has {len(problems)} problems:", *lines])
