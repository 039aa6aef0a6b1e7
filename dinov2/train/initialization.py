"""Where the first weights come from: a pretrained backbone, pretrained heads, or an earlier run's export."""

import json
import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import nn

from dinov2.configs import dinov2_default_config
from dinov2.configs.checks import crop_sizes
from dinov2.configs.sources import flatten
from dinov2.errors import ConfigError, WeightsError
from dinov2.fsdp.files import write_atomically
from dinov2.models.auto import AUTO, settle_architecture
from dinov2.models.checkpoint_names import CENTERS, HEADS, checkpoint_name
from dinov2.models.entries import leaves
from dinov2.models.head_weights import load_head
from dinov2.models.integrity import sha256_of
from dinov2.models.pretrained import BackboneWeights, LoadReport, load_backbone, open_weights
from dinov2.models.run_folders import advice
from dinov2.models.stored import StoredTensor
from dinov2.models.values import check_values
from dinov2.train.head_files import ContinuedFiles, find_files
from dinov2.train.initial_weights import InitialWeights, Part, fingerprint

logger = logging.getLogger("dinov2")


def pretrained_source(cfg: DictConfig) -> str:
    """Return the backbone source named by either spelling, or an empty string for none."""
    sources = {
        "student.pretrained_weights": cfg.student.pretrained_weights,
        "train.init_weights_from_chkpt": cfg.train.init_weights_from_chkpt,
    }
    named = {key: value for key, value in sources.items() if value}
    if len(set(named.values())) > 1:
        seen = " and ".join(f"{key}={value}" for key, value in named.items())
        raise ConfigError(f"{seen} name different weights to start from; keep one of the two keys.")
    return next(iter(named.values()), "")


def backbone_weights(cfg: DictConfig) -> BackboneWeights | None:
    """Open the weights that the student's backbone starts from; None for random ones.

    They are named by :func:`pretrained_source`, or else are those of the student in ``head.head_path``.
    """
    source = pretrained_source(cfg)
    if source:
        return open_weights(source)
    files = find_files(cfg.head.head_path, wanted=()) if cfg.head.head_path else None
    if files and files.has_both_backbones:
        return open_weights(str(files.backbones["student"]), "student")
    return None


def settle_config(cfg: DictConfig) -> None:
    """Read ``student.arch: auto`` off the weights, in place; nothing happens with another architecture.

    Raises:
        ConfigError: there are no weights to read it from, or the crops do not divide into their patches.
        WeightsError: the weights cannot be read or do not tell their architecture.
    """
    if cfg.student.arch != AUTO:
        return
    weights = backbone_weights(cfg)
    if weights is None:
        raise ConfigError(
            "student.arch is auto, but no weights are named to read the architecture from: set "
            "student.pretrained_weights, or name the architecture."
        )
    settle_architecture(cfg.student, weights, dinov2_default_config.student)
    problems = [finding.text for finding in crop_sizes(dict(flatten(OmegaConf.to_container(cfg))))]
    if problems:
        raise ConfigError("; ".join(problems))


def load_initial_weights(
    student: nn.ModuleDict, teacher: nn.ModuleDict, losses: dict[str, nn.Module], cfg: DictConfig
) -> InitialWeights:
    """Load what the config names into the networks.

    A backbone named by ``student.pretrained_weights`` goes into the student, from which the teacher copies
    it. Without one, a ``head.head_path`` that holds ``student_checkpoint.pth`` and ``teacher_checkpoint.pth``
    is an earlier run to continue: both networks and the losses' centres are restored from it. Heads come in
    pairs from ``head.head_path``.

    Args:
        student: Submodules by name.
        teacher: Submodules by name.
        losses: Loss modules with a ``center`` by the name under which it is exported.
        cfg: Resolved config.

    Returns:
        What was loaded; parts of the teacher that are absent have to copy the student's.

    Raises:
        WeightsError: if a file is missing or does not fit.
    """
    wanted = [head for head in HEADS if head in student]
    files = find_files(cfg.head.head_path, wanted) if cfg.head.head_path else None
    networks = {"student": student, "teacher": teacher}
    reports = _load_backbones(networks, files, cfg)
    centers = None
    if files:
        continues = "teacher.backbone" in reports
        reports |= _load_heads(networks, files, reports, reinit=cfg.head.on_missing == "reinit")
        if continues and cfg.train.centering == "centering":
            separate = "ibot_head" if "ibot_head" in student else "dino_head"
            heads = {"dino_loss.center": "dino_head", "ibot_patch_loss.center": separate}
            kept = {name: loss for name, loss in losses.items() if f"teacher.{heads[name]}" in reports}
            centers = _load_centers(kept, files) if kept else None
    parts = {name: Part(report, fingerprint(_module(networks, name))) for name, report in reports.items()}
    fresh = {f"student.{name}": list(part.state_dict()) for name, part in student.items()}
    return InitialWeights(parts, centers, {name: names for name, names in fresh.items() if name not in parts})


def _load_backbones(
    networks: dict[str, nn.ModuleDict], files: ContinuedFiles | None, cfg: DictConfig
) -> dict[str, LoadReport]:
    """Load the student's backbone, or those of both networks of an earlier run."""
    fit = {
        "pos_embed": cfg.student.pos_embed_resampling,
        "patch_embed": cfg.student.patch_embed_resampling,
    }
    source = pretrained_source(cfg)
    if source and files and files.has_both_backbones:
        logger.warning(
            "the backbones%s in %s are not used, as the config names another backbone, %s",
            *(" and centres" if files.centers else "", files.place, source),
        )
    if source:
        return {"student.backbone": load_backbone(networks["student"]["backbone"], source, **fit)}
    reports = {}
    if files and files.has_both_backbones:
        for network, modules in networks.items():
            weights = open_weights(files.open(files.backbones[network]), network)
            reports[f"{network}.backbone"] = load_backbone(modules["backbone"], weights, **fit)
    else:
        logger.info("student backbone: random weights (student.pretrained_weights is empty)")
    return reports


def _module(networks: dict[str, nn.ModuleDict], name: str) -> nn.Module:
    network, _, part = name.partition(".")
    return networks[network][part]


def _load_heads(
    networks: dict[str, nn.ModuleDict],
    files: ContinuedFiles,
    backbones: dict[str, LoadReport],
    *,
    reinit: bool,
) -> dict[str, LoadReport]:
    """Load every head that the config trains, for student and teacher together."""
    reports: dict[str, LoadReport] = {}
    digests = {report.path: report.sha256 for report in backbones.values()}
    for head in (name for name in HEADS if name in networks["student"]):
        keys = {network: f"{network}_{head}" for network in networks}
        missing = [key for key in keys.values() if key not in files.heads]
        if missing and not reinit:
            raise WeightsError(_missing_heads(files, head, missing))
        if missing:
            logger.warning(
                "%s: random weights in student and teacher, as %s has no %s (head.on_missing reinit)%s",
                *(head, files.place, " and ".join(missing)),
                "".join(f"; its {key} is not used" for key in keys.values() if key in files.heads),
            )
            continue
        for network, modules in networks.items():
            opened = files.open(files.heads[keys[network]])
            known = digests.get(str(opened.path), "")
            report = load_head(modules[head], opened, keys[network], sha256=known)
            reports[f"{network}.{head}"], digests[report.path] = report, report.sha256
    unused = sorted(key for key in files.heads if key.partition("_")[2] not in networks["student"])
    if unused:
        logger.warning("%s also holds %s, which this config does not train", files.place, ", ".join(unused))
    return reports


def _missing_heads(files: ContinuedFiles, head: str, missing: list[str]) -> str:
    """Return the sentence for heads that are not there: what is there, and which config would fit it."""
    names = " and ".join(checkpoint_name(key) for key in missing)
    sentence = f"head.head_path {files.place!r} lacks {names}"
    if instead := advice(Path(files.place).expanduser()):
        sentence += f"; that folder {instead}"
    if len(missing) == 1:
        sentence += ", while the other network's is there: student and teacher heads are needed together"
    elif head == "ibot_head" and any("dino_head" in key for key in files.heads):
        sentence += " but has DINO heads: set ibot.separate_head=false, with which iBOT uses them"
    elif head == "dino_head" and any("ibot_head" in key for key in files.heads):
        sentence += " but has iBOT heads: set dino.loss_weight=0, with which no DINO head is needed"
    return f"{sentence}; or set head.on_missing=reinit to start this head with random weights."


def _load_centers(losses: dict[str, nn.Module], files: ContinuedFiles) -> LoadReport | None:
    """Restore the running centres of a continued run, for the losses whose heads were restored."""
    if files.centers is None:
        logger.warning(
            "%s has no %s: the centres of the losses start at 0", files.place, checkpoint_name(CENTERS)
        )
        return None
    opened = files.open(files.centers)
    found: dict[str, StoredTensor] = {}
    for name, loss in losses.items():
        stored = opened.content.get(name)
        if not isinstance(stored, StoredTensor) or stored.shape != tuple(loss.center.shape):
            raise WeightsError(
                f"{files.centers} has no {name} of shape {tuple(loss.center.shape)}: continue with the same "
                "losses and prototypes, or remove the file to start with centres of 0."
            )
        found[name] = stored
    check_values(str(files.centers), found, dict(leaves(opened.content)), opened.metadata)
    for name, loss in losses.items():
        loss.center.copy_(found[name].read())
    logger.info("centres of the losses: restored from %s", files.centers)
    return LoadReport(
        source=str(files.centers),
        path=str(files.centers),
        sha256=sha256_of(files.centers),
        loaded=list(found),
        used={name: [name] for name in found},
        unused={name: "centre of another loss" for name, _ in leaves(opened.content) if name not in found},
    )


def write_reports(initial: InitialWeights, output_dir: Path) -> None:
    """Write ``load_report.json``: what became of every tensor of every file and of the networks."""
    content = {name: report.to_json() for name, report in initial.reports.items()}
    for name, tensors in initial.fresh.items():
        content[name] = {
            "source": "",
            "loaded": [],
            "missing": dict.fromkeys(tensors, "random initial values"),
        }
    text = json.dumps(content, indent=1).encode()
    write_atomically(output_dir / "load_report.json", lambda file: file.write(text))
