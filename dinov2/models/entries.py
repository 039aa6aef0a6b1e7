"""Finding one network among the entries of a checkpoint, and its plain parameter names.

Training frameworks wrap models and files wrap state dicts; here both kinds of wrapping come off.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dinov2.errors import WeightsError

NETWORKS = ("teacher", "student")  # in order of preference
CONTAINERS = ("model", "state_dict")
MAX_DEPTH = 3  # entries within entries
# Names under which a backbone hangs inside a bigger module; taken off the start of a name only, since the
# same words may be legitimate further inside.
LEADING_PREFIXES = ("module.", "backbone.", "model.", "dinov2.", "dinov2_with_registers.")
HEAD_PREFIXES = ("dino_head.", "ibot_head.", "head.", "classifier.")
# Wrappers put these between the parts of a name, anywhere.
WRAPPER_PARTS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}


def choose_network(content: Mapping[str, Any], entry: str | None, source: str) -> dict[str, Any]:
    """Return the state dict of one network.

    Args:
        content: What a weight file holds: a bare state dict, or entries one of which is wanted.
        entry: ``teacher``, ``student`` or the name of another entry; None for the first of teacher, student,
            model and state_dict that is there.
        source: Name of the file for messages.

    Raises:
        WeightsError: The entry does not exist or holds no tensors.
    """
    network = content
    for _ in range(MAX_DEPTH):  # a training checkpoint has {"model": {"teacher.backbone...": tensor}}
        if not any(isinstance(value, Tensor) for value in network.values()):
            network = _enter(network, entry, source)
    network = {str(key): value for key, value in network.items()}
    wanted = [entry] if entry in NETWORKS else list(NETWORKS)
    present = [name for name in NETWORKS if any(key.startswith(f"{name}.") for key in network)]
    if not present:
        return network
    chosen = next((name for name in wanted if name in present), None)
    if chosen is None:
        raise _no_entry(source, entry, present)
    start = f"{chosen}."
    return {key.removeprefix(start): value for key, value in network.items() if key.startswith(start)}


def _enter(content: Mapping[str, Any], entry: str | None, source: str) -> Mapping[str, Any]:
    """Return the entry to look into, one level down."""
    entries = [key for key, value in content.items() if isinstance(value, Mapping)]
    order = CONTAINERS if entry else (*NETWORKS, *CONTAINERS)
    chosen = entry if entry in entries else next((key for key in order if key in entries), None)
    if chosen is None:
        raise _no_entry(source, entry, entries)
    return content[chosen]


def _no_entry(source: str, entry: str | None, entries: list[str]) -> WeightsError:
    if not entries:
        return WeightsError(f"{source} holds no tensors: expected the weights of a backbone.")
    wanted = f'no entry "{entry}"' if entry else "no backbone"
    return WeightsError(
        f"{source} has {wanted}, only {', '.join(map(str, entries[:5]))}: expected bare weights or an entry "
        f"named {', '.join((*NETWORKS, *CONTAINERS))}."
    )


def strip_wrappers(network: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Take wrapper prefixes off parameter names and set aside what is no backbone.

    Returns:
        Backbone weights by plain name, and the names in the file of everything else.

    Raises:
        WeightsError: The file is one process's shard of an FSDP model, or two names become the same.
    """
    state, others = {}, []
    for key, value in network.items():
        if "_flat_param" in key:
            raise WeightsError(
                f"{source} is one process's shard of an FSDP model: use a file of whole tensors, such as "
                "eval/training_*/teacher_checkpoint.pth of that run."
            )
        name = plain_name(key)
        if not isinstance(value, Tensor) or name.startswith(HEAD_PREFIXES):
            others.append(key)
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
    while name.startswith(LEADING_PREFIXES):
        name = name.partition(".")[2]
    return name
