"""Extract the features of a dataset into a store that the evaluations read: see docs/evaluation.md.

Run as ``python -m dinov2.eval.extract`` or under torchrun, where the processes share out the samples. The
format is in :mod:`dinov2.eval.feature_store`.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov2 import cli
from dinov2.data import DatasetWithEnumeratedTargets, make_dataset
from dinov2.data.loader_errors import WatchedLoader
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.data.workers import seed_worker, worker_generator
from dinov2.errors import ConfigError, DatasetError, WeightsError
from dinov2.eval.cli import make_model_parser
from dinov2.eval.data import collate_padded
from dinov2.eval.feature_store import (
    CLS,
    DTYPES,
    LABELS,
    PATCH_MEAN,
    FeatureSource,
    FeatureStore,
    StoredDataset,
    StoredFeatures,
    StoreWriter,
    block_name,
    stored_dataset,
    transform_text,
)
from dinov2.eval.identity import identity_of
from dinov2.eval.setup import setup_and_build_model
from dinov2.eval.utils import ModelWithAutocast, ModelWithIntermediateLayers, autocast_context, device_of
from dinov2.logging import MetricLogger

logger = logging.getLogger("dinov2")

CHUNK_SIZE = 512
LOG_PERIOD = 10


class NamedFeatures(nn.Module):
    """The features of a backbone by name, float32.

    Args:
        model: A backbone; with ``get_intermediate_layers`` if blocks are wanted.
        n_last_blocks: How many blocks give their cls token, the last one always; 0 leaves out the mean patch
            token, too, and takes any model of images.
        autocast_dtype: Number format of the backbone.
    """

    def __init__(self, model: nn.Module, n_last_blocks: int, autocast_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.autocast = partial(autocast_context, device_of(model), autocast_dtype)
        self.layers = None
        if n_last_blocks:
            self.layers = ModelWithIntermediateLayers(model, n_last_blocks, self.autocast)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return arrays (B, D) by name."""
        if self.layers is None:
            with self.autocast():
                return {CLS: self.model(images).float()}
        tokens = self.layers(images)
        names = stored_blocks(self.model, len(tokens))
        features = {name: cls_token.float() for name, (_, cls_token) in zip(names, tokens, strict=True)}
        return features | {PATCH_MEAN: tokens[-1][0].mean(dim=1).float()}


def stored_blocks(model: nn.Module, n_last_blocks: int) -> list[str]:
    """Return the names of the cls tokens of a backbone's last blocks, the last one last.

    Raises:
        ConfigError: It has fewer blocks.
    """
    if n_last_blocks > model.n_blocks:
        raise ConfigError(
            f"features of the last {n_last_blocks} blocks are wanted, but the model has {model.n_blocks}: "
            "ask for fewer with --last-blocks"
        )
    return [
        *(block_name(number) for number in range(model.n_blocks - n_last_blocks, model.n_blocks - 1)),
        CLS,
    ]


def extract_to_store(
    folder: str | Path,
    model: nn.Module,
    dataset: Dataset,
    source: FeatureSource,
    *,
    n_last_blocks: int = 4,
    autocast_dtype: torch.dtype = torch.float32,
    dtype: str = "float32",
    batch_size: int = 256,
    num_workers: int = 5,
    chunk_size: int = CHUNK_SIZE,
    notes: dict[str, Any] | None = None,
) -> FeatureStore:
    """Write the features of a dataset, or what is missing of them; all processes call this together.

    Args:
        folder: Of the store.
        model, n_last_blocks, autocast_dtype: See :class:`NamedFeatures`.
        dataset: Images with integer labels or None.
        source: What the features are of, for those who read them.
        dtype: Number format on disk, ``float32`` or ``float16``.
        batch_size: Images per process and step. Batches do not go beyond a chunk, so that features do not
            depend on the number of processes or on where a run was stopped.
        chunk_size: Samples that a stopped run may have to extract again, per process.
        notes: More entries of ``store.json``.

    Raises:
        ConfigError: A number or ``dtype`` cannot be used.
        DatasetError: The folder holds other features, or samples have several labels.
        OutputError: The folder cannot be written.
        WeightsError: Features are not finite.
    """
    _check_options(n_last_blocks, dtype, batch_size, chunk_size)
    blocks = stored_blocks(model, n_last_blocks) if n_last_blocks else [CLS]
    writer = StoreWriter(
        folder,
        source,
        len(dataset),
        chunk_size,
        details={"dtype": dtype, "features": [*blocks, *([PATCH_MEAN] if n_last_blocks else [])]},
        notes={"classes": getattr(dataset, "classes", None), **(notes or {})},
    )
    if writer.complete:
        logger.info('the feature store "%s" is complete', folder)
        return FeatureStore(folder)
    features = NamedFeatures(model.eval(), n_last_blocks, autocast_dtype)
    own = writer.own_chunks()
    batches = iter(_make_loader(dataset, [writer.chunks[number] for number in own], batch_size, num_workers))
    labelled = _is_labelled(dataset)
    meters = MetricLogger(delimiter="  ")
    for number in meters.log_every(own, LOG_PERIOD, "Chunks of features:"):
        parts = []
        while sum(len(part[LABELS]) for part in parts) < len(writer.chunks[number]):
            parts.append(_features_of(features, *next(batches), device_of(model), dtype))
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if not labelled:
            del arrays[LABELS]
        writer.write(number, arrays)
    store = writer.finish()
    logger.info('features %s of %d samples are in "%s"', ", ".join(store.names), len(store), folder)
    return store


def _features_of(
    features: NamedFeatures, images: Tensor, numbered: Sequence[Tensor], device: torch.device, dtype: str
) -> dict[str, np.ndarray]:
    """Return the arrays of one batch."""
    indices, labels = numbered
    if labels.ndim > 1:
        raise DatasetError(
            "samples of the dataset have several labels, a feature store keeps one each: use another dataset"
        )
    named = features(images.to(device, non_blocking=True))
    arrays = {name: values.cpu().numpy().astype(dtype) for name, values in named.items()}
    for name, array in arrays.items():
        broken = ~np.isfinite(array).all(axis=1)
        if broken.any():
            raise WeightsError(
                f"the features {name} of {int(broken.sum())} of {len(array)} images are not finite in "
                f"{dtype}, the first is sample {int(indices[int(broken.argmax())])}: check the weights, "
                "extract with --dtype float32, or compute in float32 with "
                "--opts compute_precision.teacher.backbone.mixed_precision.param_dtype=fp32"
            )
    return arrays | {LABELS: labels.numpy()}


def _is_labelled(dataset: Dataset) -> bool:
    target = dataset.get_target(0) if hasattr(dataset, "get_target") else dataset[0][1]
    return target is not None


def _make_loader(dataset: Dataset, chunks: Sequence[range], batch_size: int, num_workers: int) -> DataLoader:
    """Return the loader of ``(images, (indices, labels))`` of the chunks, in batches that end with them."""
    batches = [
        chunk[start : start + batch_size] for chunk in chunks for start in range(0, len(chunk), batch_size)
    ]
    return WatchedLoader(
        DatasetWithEnumeratedTargets(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=collate_padded,
        worker_init_fn=seed_worker,
        # Its own, so that what is drawn afterwards does not depend on whether features had to be extracted.
        generator=worker_generator(0),
    )


def _check_options(n_last_blocks: int, dtype: str, batch_size: int, chunk_size: int) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f'the number format of stored features is "{dtype}": give {" or ".join(DTYPES)}')
    for name, value, least in (
        ("last blocks", n_last_blocks, 0),
        ("batch size", batch_size, 1),
        ("chunk size", chunk_size, 1),
    ):
        if value < least:
            raise ConfigError(f"the {name} of the extraction is {value}: give a whole number from {least} up")


def source_of(
    model: nn.Module, dataset_str: str, transform: Callable, autocast_dtype: torch.dtype
) -> FeatureSource:
    """Return what the features of a dataset are made of; all processes call this together."""
    return FeatureSource(
        identity_of(model), dataset_str, transform_text(transform), str(autocast_dtype).removeprefix("torch.")
    )


def cls_extraction(
    model: nn.Module,
    datasets: Mapping[str, Dataset],
    strings: Mapping[str, str],
    transform: Callable,
    autocast_dtype: torch.dtype,
    features: str | None,
    num_workers: int,
) -> tuple[nn.Module, dict[str, Dataset], int]:
    """Return with which module, from which samples and in how many workers to extract cls tokens.

    Args:
        model: A backbone.
        datasets, strings: The datasets and their strings, by role.
        transform: Of the images.
        autocast_dtype: Number format of the backbone.
        features: Folder of feature stores to read instead of images; None for images.
        num_workers: Of the extraction from images.

    Raises:
        DatasetError: The folder lacks the features of a dataset.
    """
    if features is None:
        return ModelWithAutocast(model, autocast_dtype), dict(datasets), num_workers
    source = source_of(model, "", transform, autocast_dtype)
    stored = {
        role: stored_dataset(features, replace(source, dataset=strings[role]), [CLS], dataset)
        for role, dataset in datasets.items()
    }
    return StoredFeatures(device_of(model)), stored, 0


@dataclass(frozen=True)
class StoredFeaturesOf:
    """Puts the stored features of datasets in the place of their images, for the linear evaluation.

    Args:
        model: A backbone.
        transform: Of the images.
        autocast_dtype: Number format of the backbone.
        features: Folder of feature stores to read; None extracts into ``output_dir``, unless a store of the
            same features is there already.
        output_dir: Of the evaluation.
        batch_size, num_workers: Of the extraction.
        n_last_blocks: How many blocks give their cls token.
    """

    model: nn.Module
    transform: Callable
    autocast_dtype: torch.dtype
    features: str | None
    output_dir: str
    batch_size: int
    num_workers: int
    n_last_blocks: int = 4

    def __call__(self, dataset_str: str, images: Dataset) -> StoredDataset:
        """Return samples of the cls tokens of the blocks and the mean patch token, side by side."""
        source = source_of(self.model, dataset_str, self.transform, self.autocast_dtype)
        names = [*stored_blocks(self.model, self.n_last_blocks), PATCH_MEAN]
        if self.features is not None:
            return stored_dataset(self.features, source, names, images)
        folder = Path(self.output_dir) / "features" / source.digest
        extract_to_store(
            folder,
            self.model,
            images,
            source,
            n_last_blocks=self.n_last_blocks,
            autocast_dtype=self.autocast_dtype,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )
        return stored_dataset(folder, source, names, images)


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return the parser of the extraction."""
    parser = make_model_parser(
        description or "Write the features of a dataset into the folder --output-dir", parents, add_help
    )
    parser.add_argument(
        "--dataset", dest="dataset_str", required=True, help="Dataset, such as ImageFolder:root=FOLDER"
    )
    parser.add_argument(
        "--resize-size",
        type=int,
        default=256,
        help="Shorter side of the images in pixels before the central 224 are taken: 256 for k-NN and "
        "linear, 224 for log_regression and for tiles of that size (default: %(default)s)",
    )
    parser.add_argument(
        "--last-blocks",
        type=int,
        default=4,
        help="Blocks, counted from the last, whose cls token is kept; 0 keeps the model's output alone, "
        "without the mean patch token (default: %(default)s, as linear needs)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="Number format on disk")
    parser.add_argument("--batch-size", type=int, default=256, help="Images per process and step")
    parser.add_argument("--num-workers", type=int, default=5, help="Processes that read images, per process")
    parser.add_argument(
        "--chunk-size",
        type=int,
        default=CHUNK_SIZE,
        help="Samples that a stopped run may have to extract again, per process (default: %(default)s)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Extract as the command line says."""
    _check_options(args.last_blocks, args.dtype, args.batch_size, args.chunk_size)
    model, autocast_dtype = setup_and_build_model(args)
    transform = make_classification_eval_transform(resize_size=args.resize_size, **args.normalisation)
    dataset = make_dataset(dataset_str=args.dataset_str, transform=transform, path_map=args.path_map)
    extract_to_store(
        args.output_dir,
        model,
        dataset,
        source_of(model, args.dataset_str, transform, autocast_dtype),
        n_last_blocks=args.last_blocks,
        autocast_dtype=autocast_dtype,
        dtype=args.dtype,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        chunk_size=args.chunk_size,
        notes={"pretrained_weights": args.pretrained_weights, "config": args.model_config},
    )


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args(sys.argv[1:]))
