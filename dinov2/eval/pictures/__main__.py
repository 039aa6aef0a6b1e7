"""Draw pictures of a backbone's features into ``OUT/pictures``; see :mod:`dinov2.eval.pictures`.

Under torchrun the processes share out the features; the main process draws.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from dinov2 import cli, distributed
from dinov2.data import make_dataset
from dinov2.data.transforms import MaybeToTensor, make_classification_eval_transform, make_normalize_transform
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.cli import make_model_parser
from dinov2.eval.data import check_same_classes, label_of, make_labelled_dataset, sample_names
from dinov2.eval.other_models import refuse_other_models
from dinov2.eval.pictures.attention_maps import attention_sheet, cls_attention
from dinov2.eval.pictures.files import PictureFolder
from dinov2.eval.pictures.neighbour_sheet import (
    hardest_errors,
    hit_rate,
    neighbour_sheet,
    neighbours,
    one_per_class,
)
from dinov2.eval.pictures.pca_maps import pca_sheet, token_maps
from dinov2.eval.pictures.scatter import plane, scatter
from dinov2.eval.setup import build_model_for_eval, setup_and_build_model
from dinov2.eval.utils import ModelWithAutocast, extract_features

logger = logging.getLogger("dinov2")

NAMES = ("pca_maps", "attention_maps", "scatter", "neighbours", "hardest_errors")
IMAGES, SAMPLES, PICTURE_SIZE, THUMBNAIL = 6, 2000, 448, 112


@dataclass(frozen=True)
class Shown:
    """A dataset, to be looked at.

    Args:
        text: Its dataset string.
        images: Its samples with images of PIL, as they are.
        labels: (n,) int64, or None without labels.
        names: Of the classes.
    """

    text: str
    images: Dataset
    labels: np.ndarray | None
    names: list[str]

    def square(self, index: int, side: int) -> Image.Image:
        """Return the centre of an image, its shorter side brought to ``side`` pixels."""
        size = Compose([Resize(side, InterpolationMode.BICUBIC), CenterCrop(side)])
        return size(self.images[index][0])


def shown_dataset(text: str, path_map: dict | None, *, needs_labels: bool = False) -> Shown:
    """Open a dataset.

    Raises:
        DatasetError: It cannot be read, is empty, or lacks labels that are needed.
    """
    make = make_labelled_dataset if needs_labels else make_dataset
    images = make(dataset_str=text, path_map=path_map)
    if not len(images):
        raise DatasetError(f'the dataset "{text}" has no images: there is nothing to draw')
    if label_of(images, 0) is None:
        return Shown(text, images, None, [])
    labels = np.array([label_of(images, index) for index in range(len(images))], dtype=np.int64)
    names = getattr(images, "classes", None) or range(labels.max() + 1)
    return Shown(text, images, labels, [str(name) for name in names])


def choose(labels: np.ndarray | None, total: int, count: int, seed: int) -> list[int]:
    """Choose images: with labels as many of each class as possible, without labels any.

    Args:
        labels: (total,) or None.
        seed: Of the draw.

    Returns:
        ``count`` different indices.
    """
    order = np.random.default_rng(seed).permutation(total)
    if labels is None:
        return order[:count].tolist()
    seen: dict[int, int] = {}
    ranks = []
    for index in order:
        ranks.append(seen.get(labels[index], 0))
        seen[labels[index]] = ranks[-1] + 1
    # The first of every class, by class, then the second of every class, and so on.
    return order[np.lexsort((labels[order], ranks))][:count].tolist()


def draw_all(args: argparse.Namespace) -> None:
    """Draw as the command line says; all processes call this together.

    Raises:
        ConfigError: A size does not fit the model.
        DatasetError: A dataset lacks what a picture needs.
    """
    for name in ("images", "samples", "picture_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is {value}: give a whole number from 1 up")
    refuse_other_models([args.pretrained_weights, args.baseline_weights], "A picture")
    model, autocast_dtype = setup_and_build_model(args)
    _check_size(args.picture_size, model)
    shown = shown_dataset(args.dataset_str, args.path_map)
    train = _train_set(args, shown)
    total = len(shown.images)
    count = min(IMAGES, total) if args.images is None else args.images
    if count > total:
        raise DatasetError(
            f'{count} images are to be drawn, but the dataset "{shown.text}" has {total}: give --images '
            f"{total} or fewer"
        )
    baseline = build_model_for_eval(args.config, args.baseline_weights) if args.baseline_weights else None
    folder = PictureFolder(Path(args.output_dir) / "pictures", NAMES)
    if distributed.is_main_process():
        folder.clear()
        _draw_images(args, folder, shown, count, model, baseline, autocast_dtype)
    transform = make_classification_eval_transform(resize_size=args.resize_size, **args.normalisation)

    def features_of(text: str, indices: Sequence[int]) -> Tensor:
        images = Subset(make_dataset(dataset_str=text, transform=transform, path_map=args.path_map), indices)
        extractor = ModelWithAutocast(model, autocast_dtype)
        return extract_features(extractor, images, args.batch_size, args.num_workers)[0].cpu()

    chosen = np.linspace(0, total - 1, min(total, args.samples)).round().astype(int).tolist()
    features = features_of(shown.text, chosen)
    stored = None if train is None else features_of(train.text, range(len(train.images)))
    if not distributed.is_main_process():
        return
    _draw_scatter(args, folder, shown, chosen, features)
    if train is not None:
        _draw_neighbours(args, folder, shown, chosen, features, train, stored)
    logger.info("%d pictures are in %s", len(folder.captions), folder.folder)


def _check_size(size: int, model: nn.Module) -> None:
    patch = getattr(model, "patch_size", None)
    if patch is None:
        raise ConfigError(
            f"{type(model).__name__} has no patches: pictures need a vision transformer of this project"
        )
    if size % patch:
        raise ConfigError(
            f"pictures of {size} pixels do not divide into the model's patches of {patch}: give a multiple "
            f"with --picture-size, such as {max(1, round(size / patch)) * patch}"
        )


def _train_set(args: argparse.Namespace, shown: Shown) -> Shown | None:
    if not args.train_dataset_str:
        logger.info("no --train-dataset: the sheet of nearest neighbours is left out")
        return None
    if shown.labels is None:
        raise DatasetError(
            f'the dataset "{shown.text}" has no labels, with which the sheet of neighbours compares: use a '
            "dataset with classes, or leave out --train-dataset"
        )
    train = shown_dataset(args.train_dataset_str, args.path_map, needs_labels=True)
    check_same_classes(train.images, shown.images)
    for part in (train, shown):
        if len(np.unique(part.labels)) < 2:
            raise DatasetError(
                f'all {len(part.labels)} images of "{part.text}" have one class: the sheet of neighbours '
                "shows what classes are confused, give a dataset of two or more or leave out --train-dataset"
            )
    return train


def _draw_images(
    args: argparse.Namespace,
    folder: PictureFolder,
    shown: Shown,
    count: int,
    model: nn.Module,
    baseline: nn.Module | None,
    autocast_dtype: torch.dtype,
) -> None:
    """Draw what shows single images: colour maps and attention."""
    chosen = choose(shown.labels, len(shown.images), count, args.seed)
    pictures = [shown.square(index, args.picture_size) for index in chosen]
    to_input = Compose([MaybeToTensor(), make_normalize_transform(**args.normalisation)])
    inputs = torch.stack([to_input(picture) for picture in pictures])
    maps = token_maps(model, inputs, autocast_dtype)
    before = None if baseline is None else token_maps(baseline, inputs, autocast_dtype)
    grid = maps.shape[1:3]
    picture, numbers = pca_sheet(pictures, maps, before)
    share = sum(row["variance_share"] for row in numbers)
    compared = "" if baseline is None else f", before ({args.baseline_weights}) and after"
    folder.add(
        "pca_maps",
        picture,
        numbers,
        f"The first three principal components of the patch tokens of {count} images ({args.picture_size} "
        f"pixels, {grid[0]} x {grid[1]} patches) as red, green and blue{compared}, in one basis that holds "
        f"{share:.0%} of the variance.",
    )
    every = sample_names(shown.images)
    names = [_name(shown, index, every[index]) for index in chosen]
    weights = cls_attention(model, inputs, autocast_dtype)
    picture, numbers = attention_sheet(pictures, weights, grid, names)
    share = np.mean([row["share_patches"] for row in numbers if row["head"] == "mean of heads"])
    folder.add(
        "attention_maps",
        picture,
        numbers,
        f"Where the cls token of the last block looks in {count} images, as the mean of {weights.shape[1]} "
        f"heads and per head, each map scaled to its own brightest patches; {share:.0%} of the attention "
        "falls on patches.",
    )


def _name(shown: Shown, index: int, path: str) -> str:
    label = "" if shown.labels is None else f"{shown.names[shown.labels[index]]}: "
    return f"{label}{Path(path).name}"


def _draw_scatter(
    args: argparse.Namespace, folder: PictureFolder, shown: Shown, chosen: Sequence[int], features: Tensor
) -> None:
    coordinates, shares = plane(features.numpy())
    labels = None if shown.labels is None else shown.labels[chosen]
    picture = scatter(coordinates, shares, labels, shown.names, _square_of(shown, chosen), args.seed)
    numbers = [
        {
            "sample": index,
            "class": "" if labels is None else shown.names[labels[row]],
            "component_1": coordinates[row, 0],
            "component_2": coordinates[row, 1],
        }
        for row, index in enumerate(chosen)
    ]
    folder.add(
        "scatter",
        picture,
        numbers,
        f"The cls features of {len(chosen)} images in the plane of their first two principal components, "
        f"which holds {shares.sum():.0%} of the variance"
        + (", coloured by class." if labels is not None else "; the images have no labels."),
    )


def _draw_neighbours(
    args: argparse.Namespace,
    folder: PictureFolder,
    shown: Shown,
    chosen: Sequence[int],
    features: Tensor,
    train: Shown,
    stored: Tensor,
) -> None:
    labels = torch.from_numpy(shown.labels[chosen])
    found = neighbours(stored, torch.from_numpy(train.labels), features, labels)
    query, other = _square_of(shown, chosen), _square_of(train, range(len(train.images)))
    names = train.names if len(train.names) >= len(shown.names) else shown.names
    picture, numbers = neighbour_sheet(
        one_per_class(found.labels, args.seed),
        found,
        names,
        query,
        other,
        "Nearest training images: green for the class of the query, red for another",
        chosen,
    )
    folder.add(
        "neighbours",
        picture,
        numbers,
        f"One image per class and the training images most like it by cosine; the nearest has the right "
        f"class for {hit_rate(found):.0%} of all {len(chosen)} images.",
    )
    errors = hardest_errors(found)
    if not errors:
        logger.info("no image is taken for another class: there is no sheet of the hardest errors")
        return
    picture, numbers = neighbour_sheet(
        errors, found, names, query, other, "Taken for another class with most of the votes", chosen
    )
    wrong = int((found.predicted != found.labels).sum())
    folder.add(
        "hardest_errors",
        picture,
        numbers,
        f"The {len(errors)} most confident of {wrong} errors among {len(chosen)} images, each with the "
        "training images that mislead it.",
    )


def _square_of(shown: Shown, chosen: Sequence[int]) -> Callable[[int], Image.Image]:
    return lambda row: shown.square(chosen[row], THUMBNAIL)


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return the parser of the pictures."""
    parser = make_model_parser(
        description or "Draw pictures of a backbone's features into --output-dir/pictures", parents, add_help
    )
    parser.add_argument(
        "--dataset", dest="dataset_str", required=True, help="Images, such as ImageFolder:root=FOLDER"
    )
    parser.add_argument(
        "--train-dataset",
        dest="train_dataset_str",
        help="Labelled images to look for neighbours in (default: no sheet of neighbours)",
    )
    parser.add_argument(
        "--baseline-weights", help="Path or URL of weights to show the colour maps of beside the others"
    )
    parser.add_argument(
        "--images", type=int, help=f"Images in colour and attention maps (default: {IMAGES}, or all)"
    )
    parser.add_argument(
        "--picture-size",
        type=int,
        default=PICTURE_SIZE,
        help="Side in pixels at which these are seen, a multiple of the patch size (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=SAMPLES,
        help="Most images in the scatter and as queries, evenly spread (default: %(default)s)",
    )
    parser.add_argument("--resize-size", type=int, default=256, help="Shorter side before the central 224")
    parser.add_argument("--batch-size", type=int, default=256, help="Images per process and step")
    parser.add_argument("--num-workers", type=int, default=5, help="Processes that read images, per process")
    parser.add_argument("--seed", type=int, default=0, help="Of the choice of images (default: %(default)s)")
    return parser


if __name__ == "__main__":
    cli.run(draw_all, get_args_parser().parse_args(sys.argv[1:]))
