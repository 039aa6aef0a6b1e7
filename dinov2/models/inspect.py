"""Says what a weight file is: ``python -m dinov2.models.inspect FILE``.

Format, network, architecture, position grid, registers, heads and prototypes, number formats, normalisation,
checksum, and the config lines that start a run from it. Nothing in the file is executed.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dinov2 import cli
from dinov2.errors import WeightsError, some_of
from dinov2.models.checkpoint_names import EXPORT_FOLDER, HEAD_KEYS, NETWORKS, checkpoint_name
from dinov2.models.entries import leaves
from dinov2.models.head_weights import find_head, head_sizes
from dinov2.models.integrity import sha256_of
from dinov2.models.pretrained import BackboneWeights, check_loadable, open_weights
from dinov2.models.sources import locate
from dinov2.models.stored import StoredTensor
from dinov2.models.weight_files import OpenedFile, open_file

HEAD_OPTIONS = ("head_n_prototypes", "head_hidden_dim", "head_bottleneck_dim", "head_nlayers")
BARE_HEAD = "a bare head"  # whose, the file does not tell
CROP_KEYS = ("mean", "std")


@dataclass(frozen=True)
class Findings:
    """What was found out about a weight file.

    Attributes:
        facts: What to show -> value, in the order of showing.
        config: Lines of YAML that start a run from the file.
        refusal: Why the backbone cannot be loaded here; empty if it can.
    """

    facts: dict[str, str]
    config: list[str] = field(default_factory=list)
    refusal: str = ""


def inspect_weights(source: str, entry: str | None = None) -> Findings:
    """Find out what a weight file is.

    Args:
        source: See :func:`dinov2.models.sources.locate`.
        entry: ``teacher`` or ``student`` of a checkpoint; by default the teacher.

    Raises:
        WeightsError: The file is missing, damaged or unsafe, or holds neither a backbone nor a head.
    """
    path = locate(source, entry=entry)
    opened = open_file(path)
    heads = _heads(opened.content)
    names = [name for name, _ in leaves(opened.content)]
    if names and all(name.endswith(".center") for name in names):
        centers = {"holds": f"running centres of a run's losses ({', '.join(names)})"}
        return Findings({**_file_facts(path, opened), **centers})
    try:
        weights = open_weights(str(path), entry)
        if not weights.architecture.depth:
            raise WeightsError(
                f'"{path}" holds neither a backbone nor a projection head: its first tensors are '
                f"{some_of(weights.plain, 3) or 'none'}."
            )
    except WeightsError:
        if not heads:
            raise
        return Findings({**_file_facts(path, opened), **_head_facts(heads)}, _head_config(heads, source))
    facts = {**_file_facts(path, opened), **_backbone_facts(weights), **_head_facts(heads)}
    try:
        check_loadable(weights)
    except WeightsError as error:
        return Findings(facts, refusal=str(error))
    config = [*_backbone_config(weights, source), *_head_config(heads, source), *_continuing(path, source)]
    return Findings(facts, config)


def _continuing(path: Path, source: str) -> list[str]:
    """Return how to go on with the run that exported the folder ``source``, if one did."""
    networks = [path.with_name(checkpoint_name(network)) for network in NETWORKS]
    exported = EXPORT_FOLDER.fullmatch(path.parent.name)
    if not (Path(source).is_dir() and exported and all(file.is_file() for file in networks)):
        return []
    return [
        "# or, to continue the run that wrote this folder, instead of pretrained_weights:",
        f"#   head.head_path={source} optim.start_iter={int(exported[1]) + 1}",
    ]


def _heads(content: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return the sizes of every head by its entry, or those of a head that is the whole file."""
    named = {key: head_sizes(find_head(content, key, bare=False)) for key in HEAD_KEYS}
    found = {key: sizes for key, sizes in named.items() if sizes}
    bare = head_sizes(find_head(content, HEAD_KEYS[0]))
    return found or ({BARE_HEAD: bare} if bare else {})


def _file_facts(path: Path, opened: OpenedFile) -> dict[str, str]:
    tensors = [stored for _, stored in leaves(opened.content)]
    numbers: Counter[str] = Counter()
    for stored in tensors:
        numbers[str(stored.dtype).removeprefix("torch.")] += stored.numel
    plain = {key: value for key, value in opened.content.items() if isinstance(value, (int, float, str))}
    facts = {
        "file": str(path),
        "format": f"{opened.kind}, {sum(stored.nbytes for stored in tensors) / 2**20:,.1f} MiB of tensors",
        "sha256": sha256_of(path),
        "entries": _entries(opened.content),
        "numbers": ", ".join(f"{count:,} {name}" for name, count in numbers.most_common()),
    }
    if plain:
        facts["also holds"] = ", ".join(f"{key}={value}" for key, value in list(plain.items())[:5])
    return facts


def _entries(content: Mapping[str, Any]) -> str:
    """Return the top-level entries with their numbers of tensors; bare weights have none."""
    if any(isinstance(value, StoredTensor) for value in content.values()):
        return f"bare weights, {len(content)} tensors"
    counts = {key: len(list(leaves(value))) for key, value in content.items()}
    return ", ".join(f"{key} ({count} tensors)" for key, count in counts.items() if count)


def _backbone_facts(weights: BackboneWeights) -> dict[str, str]:
    patches, patch_size = weights.patches or 0, weights.architecture.patch_size or 0
    grid = f"{patches} patches, no square"
    if weights.grid:
        grid = f"{weights.grid} x {weights.grid} patches, for images of {weights.grid * patch_size} px"
    heads = weights.companion.num_heads
    facts = {
        "layout": weights.layout,
        "architecture": weights.architecture.with_heads(heads or weights.usual_heads).describe(),
        "heads": f"{heads} ({weights.companion.origin[0]})" if heads else _heads_by_width(weights),
        "positions": grid,
        "same sizes as": weights.looks_like or "no published model known here",
        "mask token": "in the file" if "mask_token" in weights.state else "not in the file, starts as zeros",
    }
    if weights.normalisation:
        mean, std = weights.normalisation
        facts["normalisation"] = f"mean {list(mean)}, std {list(std)} ({_origin(weights)})"
    else:
        facts["normalisation"] = "not known: look it up in the model's card, and set crops.mean and crops.std"
    if weights.unused:
        kinds = Counter(weights.unused.values())
        facts["beside it"] = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return facts


def _heads_by_width(weights: BackboneWeights) -> str:
    usual = weights.usual_heads
    return f"{usual} (usual for this width; the weights do not tell)" if usual else "not known, set num_heads"


def _origin(weights: BackboneWeights) -> str:
    if weights.companion.normalisation:
        return ", ".join(Path(origin).name for origin in weights.companion.origin)
    return f"as {weights.looks_like} has them"


def _head_facts(heads: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    return {
        key.replace("_", " "): ", ".join(f"{name} {size}" for name, size in sizes.items())
        for key, sizes in heads.items()
    }


def _backbone_config(weights: BackboneWeights, source: str) -> list[str]:
    try:
        options = weights.architecture.student_options(weights.source)
    except WeightsError as error:
        return [f"# {error}"]
    lines = ["student:", f"  pretrained_weights: {json.dumps(source)}"]
    lines += [f"  {key}: {_yaml(value)}" for key, value in options.items() if value is not None]
    if not weights.architecture.layer_scale:
        lines.append("  layerscale: null")
    lines += ["# or, instead of all but the first: arch: auto"]
    if weights.normalisation:
        lines += ["crops:"]
        lines += [
            f"  {key}: {list(constants)}"
            for key, constants in zip(CROP_KEYS, weights.normalisation, strict=True)
        ]
    return lines


def _head_config(heads: Mapping[str, Mapping[str, int]], source: str) -> list[str]:
    if BARE_HEAD in heads:
        sizes = heads[BARE_HEAD]
        lines = [f"  {name}: {sizes[name]}" for name in HEAD_OPTIONS if name in sizes]
        return [
            "# as <network>_dino_head_checkpoint.pth in a folder named by head.head_path, <network> being",
            "# student or teacher and the other one beside it:",
            *("dino:", *lines),
        ]
    lines = ["head:", f"  head_path: {json.dumps(source)}"] if heads else []
    for section in ("dino", "ibot"):
        sizes = next((sizes for key, sizes in heads.items() if section in key), None)
        if sizes:
            lines += [f"{section}:"] + (["  separate_head: true"] if section == "ibot" else [])
            lines += [f"  {name}: {sizes[name]}" for name in HEAD_OPTIONS if name in sizes]
    return lines


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _text(findings: Findings) -> Iterator[str]:
    width = max(map(len, findings.facts)) + 2
    for name, value in findings.facts.items():
        yield f"{name + ':':<{width}}{value}"
    if findings.config:
        yield "\nconfig lines that fit:\n" + "\n".join(f"  {line}" for line in findings.config)


def main(arguments: list[str] | None = None) -> None:
    """Print what a weight file is."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov2.models.inspect", description=__doc__.partition("\n\n")[2]
    )
    parser.add_argument("source", metavar="FILE", help="file, folder, address or name, as for training")
    parser.add_argument("--entry", choices=("teacher", "student"), help="network of a checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args(arguments)
    findings = inspect_weights(args.source, args.entry)
    if args.json:
        cli.say(json.dumps(asdict(findings), indent=1))
    else:
        cli.say("\n".join(_text(findings)))
    if findings.refusal:
        raise WeightsError(findings.refusal)


if __name__ == "__main__":
    cli.run(main)
