"""Finding one network among the entries of a checkpoint, and its plain parameter names.

Training frameworks wrap models and files wrap state dicts; here both kinds of wrapping come off.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dinov2.errors import WeightsError, some_of
from dinov2.models.checkpoint_names import NETWORKS
from dinov2.models.stored import StoredTensor

CONTAINERS = ("model", "state_dict")
MAX_DEPTH = 3  # entries within entries
# Names under which a backbone hangs inside a bigger module; taken off the start of a name only, since the
# same words may be legitimate further inside.
LEADING_PREFIXES = ("module.", "backbone.", "model.", "dinov2.", "dinov2_with_registers.", "vit.")
# What hangs beside a backbone, by the start of its name.
BESIDE_BACKBONES = {
    "dino_head.": "projection head",
    "ibot_head.": "projection head",
    "head.": "head",
    "classifier.": "classifier",
    "pooler.": "pooler",
}
NOT_A_TENSOR = "entry that is no tensor"
OTHER_ENTRY = "tensor of another entry"
# Wrappers put these between the parts of a name, anywhere.
WRAPPER_PARTS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class Network:
    """One network of a checkpoint.

    Attributes:
        state: Backbone weights by plain name, without wrapper prefixes.
        unused: Every other entry of the file -> what it is.
    """

    state: dict[str, StoredTensor]
    unused: dict[str, str]


def choose_network(content: Mapping[str, Any], entry: str | None, source: str) -> Network:
    """Return one network of a checkpoint.

    Args:
        content: What a weight file holds: a bare state dict, or entries one of which is wanted.
        entry: ``teacher``, ``student`` or the name of another entry; None for the first of teacher, student,
            model and state_dict that is there.
        source: Name of the file for messages.

    Raises:
        WeightsError: The entry does not exist or holds no tensors, the file is one process's shard of an
            FSDP model, or two names become the same.
    """
    if entry not in (None, *NETWORKS, *content):
        raise WeightsError(f'There is no entry "{entry}" in {source}: use {" or ".join(NETWORKS)}.')
    network: Mapping[str, Any] = content
    for _ in range(MAX_DEPTH):  # a training checkpoint has {"model": {"teacher.backbone...": tensor}}
        if _is_wrapped(network, entry):
            network = _enter(network, entry, source)
    chosen = _part(network, entry, source)
    state, unused = strip_wrappers(chosen, source)
    taken = {id(value) for value in chosen.values()}
    others = {path: OTHER_ENTRY for path, leaf in leaves(content) if id(leaf) not in taken}
    return Network(state, unused | others)


def _is_wrapped(content: Mapping[str, Any], entry: str | None) -> bool:
    """Whether the weights lie one level down, perhaps beside single tensors such as a step."""
    names = (entry, *NETWORKS, *CONTAINERS)
    tensors = any(isinstance(value, StoredTensor) for value in content.values())
    return not tensors or any(isinstance(content.get(name), Mapping) for name in names if name)


def _enter(content: Mapping[str, Any], entry: str | None, source: str) -> Mapping[str, Any]:
    """Return the entry to look into, one level down."""
    entries = [key for key, value in content.items() if isinstance(value, Mapping)]
    order = CONTAINERS if entry else (*NETWORKS, *CONTAINERS)
    chosen = entry if entry in entries else next((key for key in order if key in entries), None)
    if chosen is None:
        raise _no_entry(source, entry, entries)
    return content[chosen]


def _part(network: Mapping[str, Any], entry: str | None, source: str) -> dict[str, Any]:
    """Return the teacher or student of a state dict that holds both under prefixes, else all of it."""
    wanted = [entry] if entry in NETWORKS else list(NETWORKS)
    present = [name for name in NETWORKS if any(str(key).startswith(f"{name}.") for key in network)]
    if not present:
        return {str(key): value for key, value in network.items()}
    chosen = next((name for name in wanted if name in present), None)
    if chosen is None:
        raise _no_entry(source, entry, present)
    start = f"{chosen}."
    return {str(key): value for key, value in network.items() if str(key).startswith(start)}


def _no_entry(source: str, entry: str | None, entries: list[str]) -> WeightsError:
    if not entries:
        return WeightsError(f"{source} holds no tensors: expected the weights of a backbone.")
    wanted = f'no entry "{entry}"' if entry else "no backbone"
    return WeightsError(
        f"{source} has {wanted}, only {some_of(entries, 5)}: expected bare weights or an entry "
        f"named {', '.join((*NETWORKS, *CONTAINERS))}."
    )


def leaves(content: Any) -> Iterator[tuple[str, StoredTensor]]:
    """Yield every tensor of nested entries with its name, such as ``teacher.backbone.cls_token``."""
    if isinstance(content, StoredTensor):
        yield content.names[0], content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from leaves(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from leaves(value)


def strip_wrappers(network: Mapping[str, Any], source: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Take wrapper prefixes off parameter names and set aside what is no backbone.

    Returns:
        Backbone weights by plain name, and the names in the file of everything else with what it is.

    Raises:
        WeightsError: see :func:`choose_network`.
    """
    state: dict[str, StoredTensor] = {}
    others: dict[str, str] = {}
    for key, value in network.items():
        if "_flat_param" in key:
            raise WeightsError(
                f"{source} is one process's shard of an FSDP model: use a file of whole tensors, such as "
                "eval/training_*/teacher_checkpoint.pth of that run."
            )
        name = plain_name(key)
        beside = next((kind for start, kind in BESIDE_BACKBONES.items() if name.startswith(start)), None)
        if not isinstance(value, StoredTensor):
            others[key] = NOT_A_TENSOR
        elif beside:
            others[value.names[0]] = beside
        elif name in state:
            raise WeightsError(
                f'{source} holds "{name}" twice, under different prefixes: keep one of the two.'
            )
        else:
            state[name] = value
    return state, others


def plain_name(key: str) -> str:
    """Return a parameter name without wrapper parts and without leading module names."""
    name = ".".join(part for part in key.split(".") if part not in WRAPPER_PARTS)
    while name.startswith((*LEADING_PREFIXES, "teacher.", "student.")):
        name = name.partition(".")[2]
    return name
