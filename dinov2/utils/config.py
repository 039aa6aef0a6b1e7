"""Setting up a run: config, output folder, process group, logs, seeds, learning rate, in this order.

An entry-tier module at upstream's path: entry points call :func:`setup`, nothing below them does. Heavy
imports stay inside functions, so that a wrong config stops the process before torch is loaded.
"""

import argparse
import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dinov2.configs import resolve
from dinov2.configs.merging import Resolution
from dinov2.configs.scaling import SCALING_RULE, images_per_iteration, scaled_lr
from dinov2.errors import ConfigError, OutputError

logger = logging.getLogger("dinov2")

# A collective waits this multiple of train.process_timeout, and so many seconds more.
COLLECTIVE_SHARE, COLLECTIVE_MARGIN = 1.25, 30.0


def setup(
    args: argparse.Namespace,
    *,
    keep_existing_config: bool = False,
    write: bool = True,
    claim: Callable[[str], None] | None = None,
) -> DictConfig:
    """Make everything ready for a run and return its config, with ``optim.lr`` derived.

    Args:
        args: ``config_file``, ``opts`` (overrides), ``output_dir`` and, optionally, ``lenient_config``.
            ``output_dir`` becomes an absolute path; nothing else is changed.
        keep_existing_config: Leave a differing ``config.yaml`` of an earlier run in its place and write
            beside it. For evaluations, which may write into the folder of a training run.
        write: False leaves writing ``config.yaml`` to the caller, who still changes the config.
        claim: called in all processes with the output folder, once they have joined and before anything is
            written there; may raise.

    Raises:
        ConfigError: The configuration or the launcher's environment is wrong.
        OutputError: The output folder cannot be written.
    """
    resolution = _resolve(args)
    cfg = resolution.cfg
    make_output_dir(args.output_dir)
    default_setup(
        args,
        seed=cfg.train.seed,
        device=cfg.train.device,
        process_timeout=cfg.train.process_timeout,
        claim=claim,
    )
    resolution.log()
    apply_scaling_rules_to_cfg(cfg)
    if write:
        write_config(cfg, args.output_dir, keep_existing=keep_existing_config)
    return cfg


def collective_timeout(process_timeout: float) -> timedelta:
    """Return how long a collective waits with a ``train.process_timeout`` of so many seconds."""
    return timedelta(seconds=COLLECTIVE_SHARE * process_timeout + COLLECTIVE_MARGIN)


def get_cfg_from_args(args: argparse.Namespace) -> DictConfig:
    """Return the checked config of command-line arguments; see :func:`setup` for ``args`` and errors."""
    resolution = _resolve(args)
    resolution.log()
    return resolution.cfg


def default_setup(
    args: argparse.Namespace,
    *,
    seed: int = 0,
    device: str = "auto",
    process_timeout: float | None = None,
    claim: Callable[[str], None] | None = None,
) -> None:
    """Join the process group, start the logs in ``args.output_dir`` and seed the random generators.

    Args:
        args: ``output_dir`` and whatever else shall be logged.
        seed: Seed of the run; each process adds its rank.
        device: ``auto``, ``cpu`` or ``cuda``.
        process_timeout: Seconds that a process may keep the others waiting; None is PyTorch's default.
            Collectives wait somewhat longer: the trainer's watchdog, which can name the process, comes first.
        claim: see :func:`setup`.
    """
    from dinov2 import distributed
    from dinov2.logging import setup_logging
    from dinov2.utils.device import resolve_device
    from dinov2.utils.utils import fix_random_seeds, get_sha

    resolve_device(device)  # stops here if CUDA was asked for and there is none
    patience = collective_timeout(process_timeout) if process_timeout else None
    distributed.enable(overwrite=True, device=None if device == "auto" else device, timeout=patience)
    if claim is not None:
        claim(args.output_dir)
    setup_logging(output=args.output_dir, level=logging.INFO)
    rank = distributed.get_global_rank()
    fix_random_seeds(seed + rank)
    logger.info("code: %s", get_sha())
    logger.info("options: %s", ", ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
    logger.info("process %d of %d, seed %d", rank, distributed.get_global_size(), seed + rank)


def apply_scaling_rules_to_cfg(cfg: DictConfig) -> DictConfig:
    """Derive ``optim.lr`` from ``optim.base_lr`` and the total batch, in place, and return ``cfg``.

    Raises:
        ConfigError: ``optim.scaling_rule`` is not known.
    """
    rule = cfg.optim.scaling_rule
    if SCALING_RULE.fullmatch(rule) is None:
        raise ConfigError(
            f'optim.scaling_rule is "{rule}": "sqrt_wrt_<images>", "linear_wrt_<images>" or "none" is wanted'
        )
    if rule == "none":
        logger.info("optim.lr %g is used as it is (optim.scaling_rule none)", cfg.optim.lr)
        return cfg
    from dinov2 import distributed

    total_batch = images_per_iteration(cfg, distributed.get_global_size())
    cfg.optim.lr = scaled_lr(cfg.optim.base_lr, rule, total_batch)
    logger.info(
        "optim.lr %g follows from optim.base_lr %g by %s for %d images per iteration",
        *(cfg.optim.lr, cfg.optim.base_lr, rule, total_batch),
    )
    return cfg


def make_output_dir(output_dir: str) -> None:
    """Create a folder and make sure that files can be created in it.

    Raises:
        OutputError: They cannot.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise OutputError(
            f'the output directory "{output_dir}" cannot be written ({error.strerror}): '
            "name another with --output-dir"
        ) from error


def write_config(
    cfg: DictConfig,
    output_dir: str,
    name: str = "config.yaml",
    *,
    keep_existing: bool = False,
) -> str:
    """Write the config, from the main process only, and return the path of the file.

    A differing file of that name never gets lost: it is copied to the first free ``config.<n>.yaml``
    before it is replaced or, with ``keep_existing``, stays and the new config goes to that name instead.

    Args:
        cfg: The resolved config.
        output_dir: An existing folder.
        name: Name of the file in it.
        keep_existing: See above.

    Raises:
        OutputError: The folder cannot be written.
    """
    from dinov2 import distributed

    path = Path(output_dir) / name
    if not distributed.is_main_process():
        return str(path)
    text = OmegaConf.to_yaml(cfg)
    try:
        if path.exists():
            path = _make_room(path, text, keep_existing)
        _write_atomically(path, text)
    except OSError as error:
        raise OutputError(f'the config "{path}" cannot be written: {error.strerror}') from error
    logger.info("config written to %s", path)
    return str(path)


def _resolve(args: argparse.Namespace) -> Resolution:
    """Resolve the config; ``--output-dir`` decides about ``train.output_dir``, then an override.

    As upstream, the value in the config file does not count: it is where an earlier run wrote to.
    """
    overrides = list(args.opts or [])
    lenient = getattr(args, "lenient_config", False)
    resolution = resolve(args.config_file or "", overrides, lenient=lenient)
    configured = resolution.cfg.train.output_dir
    overridden = any(override.startswith("train.output_dir=") for override in overrides)
    chosen = args.output_dir or (configured if overridden else ".")
    args.output_dir = resolution.cfg.train.output_dir = str(Path(chosen).absolute())
    if configured in (".", chosen, args.output_dir):
        return resolution
    note = (
        f'train.output_dir "{configured}" is not used: --output-dir decides, results go to {args.output_dir}'
    )
    return dataclasses.replace(resolution, warnings=(*resolution.warnings, note))


def _make_room(path: Path, text: str, keep_existing: bool) -> Path:
    """Return where ``text`` may be written, with the present content of ``path`` safe."""
    present = path.read_text("utf-8")
    if present == text:
        return path
    other = _numbered(path, text if keep_existing else present)
    if keep_existing:
        logger.info("%s belongs to another run and stays as it is", path)
        return other
    shutil.copy2(path, other)
    logger.warning("%s differed from this run's config and was kept as %s", path, other.name)
    return path


def _numbered(path: Path, text: str) -> Path:
    """Return the first ``<stem>.<n><suffix>`` that is free or holds ``text`` already."""
    number = 1
    while True:
        candidate = path.with_name(f"{path.stem}.{number}{path.suffix}")
        if not candidate.exists() or candidate.read_text("utf-8") == text:
            return candidate
        number += 1


def _write_atomically(path: Path, text: str) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, "utf-8")
    aside.replace(path)
