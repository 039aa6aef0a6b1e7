"""Features of a dataset on disk: written once by several processes, mapped into memory by the evaluations.

A store is a folder of ``.npy`` files with one row per sample, in the order of the dataset, and of
``store.json``, which says what they are of and whether they are complete. While it is being written, finished
chunks of rows lie in ``chunks``; a run that is stopped and started again goes on with the missing ones.

Letters: n samples, D width.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinov2 import distributed
from dinov2.data.datasets.arrays import atomic_file, writing
from dinov2.errors import DatasetError, UserError, some_of

logger = logging.getLogger("dinov2")

T = TypeVar("T")

FORMAT_VERSION = 1
DESCRIPTION = "store.json"
CHUNKS = "chunks"
CLS, PATCH_MEAN, LABELS = "cls", "patch_mean", "labels"
DTYPES = ("float32", "float16")

# What has to be the same for features to be the same, and how a sentence calls it.
DECISIVE = {
    "model": "another model",
    "dataset": "another dataset",
    "transform": "another transform of the images",
    "autocast": "another number format of the model",
}
SHOWN_CHARACTERS = 120
CHECKSUM_DIGITS = 12


def block_name(block: int) -> str:
    """Return the name of the array of the cls tokens of a block, counted from 0."""
    return f"cls_block_{block}"


@dataclass(frozen=True)
class FeatureSource:
    """What features are made of; features of the same source are the same.

    Args:
        model: :func:`~dinov2.eval.identity.identity_of` the model.
        dataset: The dataset string.
        transform: The transform of the images, in one line.
        autocast: The number format that the model computes in.
    """

    model: Mapping[str, Any]
    dataset: str
    transform: str
    autocast: str

    @property
    def digest(self) -> str:
        """What names a folder for these features among those of other sources."""
        text = json.dumps([getattr(self, name) for name in DECISIVE], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:CHECKSUM_DIGITS]

    def agreement(self, description: Mapping[str, Any]) -> int:
        """Return how many of the decisive entries a store's description shares."""
        return sum(getattr(self, name) == description.get(name) for name in DECISIVE)

    def difference(self, description: Mapping[str, Any]) -> str:
        """Return how a store's description differs, in words; empty if it does not."""
        for name, words in DECISIVE.items():
            own, other = getattr(self, name), description.get(name)
            if name == "model":
                keys = [key for key in own if own[key] != (other or {}).get(key)]
                own, other = ({key: part.get(key) for key in keys} for part in (own, other or {}))
            if own != other:
                return f"{words} ({_shortened(other)}, not {_shortened(own)})"
        return ""


def _shortened(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {str(item)[:CHECKSUM_DIGITS]}" for key, item in value.items())
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def transform_text(transform: Callable) -> str:
    """Return a transform in one line."""
    return " ".join(repr(transform).split())


class FeatureStore:
    """A complete store, opened for reading.

    Args:
        folder: Of the store.

    Raises:
        DatasetError: It is not a store, is not complete, of an unknown version or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.description = read_description(self.folder)
        if not self.description["complete"]:
            raise DatasetError(
                f'the feature store "{folder}" is not complete: run its extract command again, which goes on '
                "where it stopped"
            )
        self._arrays = {name: self._open(name, shape) for name, shape in self.description["arrays"].items()}

    def _open(self, name: str, shape: Sequence[int]) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        try:
            array = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DatasetError(
                f'"{path}" of a feature store cannot be read ({error}): remove the folder and extract again'
            ) from error
        if list(array.shape) != list(shape):
            raise DatasetError(
                f'"{path}" of a feature store has the shape {list(array.shape)}, not {list(shape)}: remove '
                "the folder and extract again"
            )
        return array

    def __len__(self) -> int:
        return self.description["samples"]

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return list(self._arrays)

    def array(self, name: str) -> np.ndarray:
        """Return an array (n, ...), mapped read-only.

        Raises:
            DatasetError: The store has no such array.
        """
        if name not in self._arrays:
            raise DatasetError(
                f'the feature store "{self.folder}" has no array "{name}", only {", ".join(self._arrays)}: '
                "extract again with the blocks that the evaluation needs (--last-blocks)"
            )
        return self._arrays[name]

    def require(self, source: FeatureSource, labels: np.ndarray | None = None) -> None:
        """Stop unless the store holds the features of ``source``.

        Args:
            labels: Those of the dataset as it is now (n,), if known.

        Raises:
            DatasetError: It is of something else, or the dataset has changed since.
        """
        difference = source.difference(self.description)
        if difference:
            raise DatasetError(
                f'the feature store "{self.folder}" is of {difference}: extract the features anew into '
                "another folder, or leave out --features"
            )
        if labels is not None and not np.array_equal(labels, self.array(LABELS)):
            raise DatasetError(
                f'the labels of "{source.dataset}" ({len(labels)}) are not those of the feature store '
                f'"{self.folder}" ({len(self)}), so the dataset has changed since: extract the features anew'
            )


def read_description(folder: Path) -> dict[str, Any]:
    """Return what ``store.json`` says.

    Raises:
        DatasetError: There is none, or it cannot be used.
    """
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        version = description["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f'"{folder}" is not a feature store ({DESCRIPTION} cannot be read): make one with '
            "python -m dinov2.eval.extract"
        ) from error
    if version != FORMAT_VERSION:
        raise DatasetError(
            f'the feature store "{folder}" has the format version {version}, this program reads '
            f"{FORMAT_VERSION}: extract the features anew"
        )
    return description


def find_store(folder: str | Path, source: FeatureSource) -> FeatureStore:
    """Return the store of ``source`` among those in a folder: the folder itself or one right below it.

    Raises:
        DatasetError: There is none of the dataset, or the one there is does not match.
    """
    paths = [
        path.parent
        for path in sorted([*Path(folder).glob(DESCRIPTION), *Path(folder).glob(f"*/{DESCRIPTION}")])
    ]
    described = {path: read_description(path) for path in paths}
    own = [path for path, description in described.items() if description["dataset"] == source.dataset]
    if not own:
        known = (
            some_of(sorted({description["dataset"] for description in described.values()}), 5) or "nothing"
        )
        raise DatasetError(
            f'"{folder}" has no feature store of the dataset "{source.dataset}", it holds {known}: make one '
            "with python -m dinov2.eval.extract, or leave out --features"
        )
    store = FeatureStore(max(own, key=lambda path: source.agreement(described[path])))
    store.require(source)
    return store


def stored_dataset(
    folder: str | Path, source: FeatureSource, names: Sequence[str], images: Dataset
) -> "StoredDataset":
    """Return the stored features of a dataset in place of its images, and say so.

    Args:
        folder: See :func:`find_store`.
        source: What the features have to be of.
        names: The arrays that are needed.
        images: The dataset as it is now, which has to have the labels of the store.

    Raises:
        DatasetError: There are no such features.
    """
    store = find_store(folder, source)
    if hasattr(images, "get_targets"):
        store.require(source, np.asarray(images.get_targets()))
    logger.info('features of "%s" are read from "%s"; no image is', source.dataset, store.folder)
    return StoredDataset(store, names, images)


class StoredDataset(Dataset):
    """The rows of a store as samples: ``(features, label)``, features float32 of the arrays side by side.

    Args:
        store: Where from.
        names: The arrays, (n, D) each.
        images: The dataset of images whose features these are; names classes and files.
    """

    def __init__(self, store: FeatureStore, names: Sequence[str], images: Dataset) -> None:
        self.store = store
        self._arrays = [store.array(name) for name in names]
        self._labels = store.array(LABELS)
        self.classes = getattr(images, "classes", None)
        if hasattr(images, "get_image_path"):
            self.get_image_path = images.get_image_path

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rows = [array[index] for array in self._arrays]
        return torch.from_numpy(np.concatenate(rows).astype(np.float32, copy=False)), int(self._labels[index])

    def get_target(self, index: int) -> int:
        """Return the label of a sample."""
        return int(self._labels[index])

    def get_targets(self) -> np.ndarray:
        """Return the labels of all samples, int64."""
        return self._labels


class StoredFeatures(nn.Module):
    """Stands for the model where samples are its features already.

    Args:
        device: Where to compute with them.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        # Says where the module is, as the parameters of a model do.
        self.place = nn.Parameter(torch.empty(0, device=device), requires_grad=False)

    def forward(self, features: Tensor) -> Tensor:
        """Return the features as they are."""
        return features


class StoredTokens(StoredFeatures):
    """Stands for a backbone with ``get_intermediate_layers`` where samples are its features already.

    A sample is the cls tokens of the last blocks and the mean patch token of the last one, side by side.

    Args:
        device: Where to compute with them.
        n_last_blocks: How many blocks.
    """

    def __init__(self, device: torch.device, n_last_blocks: int) -> None:
        super().__init__(device)
        self.n_last_blocks = n_last_blocks

    def forward(self, features: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return per block the mean patch token (B, 1, D), of the last block, and its cls token (B, D)."""
        *cls_tokens, patch_mean = features.chunk(self.n_last_blocks + 1, dim=1)
        return tuple((patch_mean[:, None], cls_token) for cls_token in cls_tokens)


class StoreWriter:
    """Writes a store chunk by chunk; all processes make one for the same folder together.

    Args:
        folder: Of the store; made if it is not there.
        source: What the features are of.
        samples: n.
        chunk_size: Samples per chunk, for a new store.
        details: More entries of ``store.json``, which have to be the same when a stopped run goes on.
        notes: More entries, which need not.

    Raises:
        DatasetError: The folder holds a store of something else.
        OutputError: It cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        source: FeatureSource,
        samples: int,
        chunk_size: int,
        *,
        details: Mapping[str, Any],
        notes: Mapping[str, Any],
    ) -> None:
        self.folder = Path(folder)
        wanted = {
            "format_version": FORMAT_VERSION,
            "complete": False,
            **{name: getattr(source, name) for name in DECISIVE},
            "samples": samples,
            **details,
        }
        # As JSON has it: lists for tuples.
        wanted = json.loads(json.dumps(wanted))
        self.description = on_main_process(
            lambda: self._begin(source, wanted, {"chunk_size": chunk_size, **notes})
        )
        size = self.description["chunk_size"]
        self.chunks = [range(start, min(start + size, samples)) for start in range(0, samples, size)]

    def _begin(
        self, source: FeatureSource, wanted: Mapping[str, Any], notes: Mapping[str, Any]
    ) -> dict[str, Any]:
        path = self.folder / DESCRIPTION
        if path.exists():
            present = read_description(self.folder)
            difference = source.difference(present)
            for name in wanted:
                if not difference and name != "complete" and present.get(name) != wanted[name]:
                    difference = f"other features ({name} {present.get(name)}, not {wanted[name]})"
            if difference:
                raise DatasetError(
                    f'"{self.folder}" holds a feature store of {difference}: choose another folder, or '
                    "remove that one"
                )
            return present
        description = {**wanted, **notes}
        self._describe(description)
        return description

    def _describe(self, description: Mapping[str, Any]) -> None:
        with atomic_file(str(self.folder / DESCRIPTION)) as file:
            file.write(json.dumps(description, indent=2).encode() + b"\n")

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.description["complete"]

    def own_chunks(self) -> list[int]:
        """Return the numbers of the chunks this process is to write, without those that are there already."""
        missing = on_main_process(
            lambda: [number for number in range(len(self.chunks)) if not self._chunk(number).exists()]
        )
        logger.info("%d of %d chunks of features are left to write", len(missing), len(self.chunks))
        return missing[distributed.get_global_rank() :: distributed.get_global_size()]

    def _chunk(self, number: int) -> Path:
        return self.folder / CHUNKS / f"{number:07d}.npz"

    def write(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the rows of a chunk; it is there completely or not at all."""
        with atomic_file(str(self._chunk(number))) as file:
            np.savez(file, **arrays)

    def finish(self) -> FeatureStore:
        """Put the chunks of all processes together and return the store; all processes call this together."""
        distributed.barrier()
        on_main_process(self._assemble)
        return FeatureStore(self.folder)

    def _assemble(self) -> None:
        with np.load(self._chunk(0)) as first:
            kinds = {name: (first[name].dtype, first[name].shape[1:]) for name in first.files}
        samples = self.description["samples"]
        for name, (dtype, shape) in kinds.items():
            path = self.folder / f"{name}.npy"
            aside = path.with_name(f".{path.name}.part")
            with writing(str(path)):
                array = np.lib.format.open_memmap(aside, "w+", dtype, (samples, *shape))
                for number, rows in enumerate(self.chunks):
                    with np.load(self._chunk(number)) as chunk:
                        array[rows.start : rows.stop] = chunk[name]
                array.flush()
                del array
                aside.replace(path)
        arrays = {name: [samples, *shape] for name, (_, shape) in kinds.items()}
        self._describe(self.description | {"complete": True, "arrays": arrays})
        with suppress(OSError):  # what is left over does no harm
            shutil.rmtree(self.folder / CHUNKS)


def on_main_process(function: Callable[[], T]) -> T:
    """Call ``function`` in the main process; return everywhere what it returned, or raise its error."""
    result: Any = None
    if distributed.is_main_process():
        try:
            result = function()
        except UserError as error:
            result = error
    result = distributed.broadcast_object(result)
    if isinstance(result, UserError):
        raise result
    return result
