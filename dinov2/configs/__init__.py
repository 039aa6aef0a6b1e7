"""Configuration: defaults, YAML recipes and overrides, merged and checked in one place, without torch.

Values are merged default < file < overrides and held against `schema.py`; everything that is wrong is
reported at once. See `docs/configuration.md`.
"""

from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig

from dinov2.configs import sources
from dinov2.configs.merging import Resolution, merge
from dinov2.errors import ConfigError, nearest

__all__ = ["dinov2_default_config", "load_and_merge_config", "load_config", "resolve", "resolve_config"]

CONFIGS_DIR = Path(__file__).parent


def load_config(name: str) -> DictConfig:
    """Return a packaged config as it stands in its file.

    Args:
        name: Path below this folder without extension, e.g. ``eval/vits14_pretrain``.

    Raises:
        ConfigError: There is no such config.
    """
    return sources.read_file(_packaged(name))


def load_and_merge_config(name: str) -> DictConfig:
    """Return a packaged config merged over the defaults; arguments and errors as :func:`load_config`."""
    return resolve_config(str(_packaged(name)), [])


def resolve_config(
    config_file: str, overrides: Iterable[str], *, output_dir: str | None = None, lenient: bool = False
) -> DictConfig:
    """Merge default < file < overrides and check the result; warnings go to the log.

    Args:
        config_file: A YAML file; empty for the defaults alone.
        overrides: ``key=value`` strings, values in YAML. Not changed.
        output_dir: Value of ``train.output_dir``, taken literally; None leaves what was configured.
        lenient: Warn about unknown keys and drop them instead of stopping.

    Returns:
        Every key of the schema, in a mapping that takes no other keys.

    Raises:
        ConfigError: Something is wrong; the text lists all of it.
    """
    resolution = resolve(config_file, overrides, output_dir=output_dir, lenient=lenient)
    resolution.log()
    return resolution.cfg


def resolve(
    config_file: str, overrides: Iterable[str], *, output_dir: str | None = None, lenient: bool = False
) -> Resolution:
    """Do what :func:`resolve_config` does, but hand over its messages, for use before logging is set up."""
    return merge(dinov2_default_config, config_file, overrides, output_dir=output_dir, lenient=lenient)


def _packaged(name: str) -> Path:
    path = CONFIGS_DIR / f"{name}.yaml"
    if not path.is_file():
        names = [str(p.relative_to(CONFIGS_DIR).with_suffix("")) for p in sorted(CONFIGS_DIR.rglob("*.yaml"))]
        raise ConfigError(
            f'there is no packaged config "{name}"{nearest(name, names)}: accepted are {", ".join(names)}'
        )
    return path


dinov2_default_config = load_config("ssl_default_config")
