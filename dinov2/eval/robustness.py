"""Robustness of a backbone to stain and scanner, and to the centre that tiles come from.

Run as ``python -m dinov2.eval.robustness`` or under torchrun. The changes are in
:mod:`dinov2.eval.perturbations`, the index in :mod:`dinov2.eval.robustness_scores`; docs/evaluation.md says
what the numbers mean.
"""

import argparse
import csv
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from dinov2 import cli
from dinov2.data import make_dataset
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.errors import ConfigError, DatasetError, some_of
from dinov2.eval.cli import check_draws, make_model_parser, options_for
from dinov2.eval.data import label_of, sample_names
from dinov2.eval.feature_store import transform_text
from dinov2.eval.identity import identity_of
from dinov2.eval.neighbor_search import find_neighbors
from dinov2.eval.neighbors import vote
from dinov2.eval.perturbations import PERTURBATIONS, PerturbedDataset
from dinov2.eval.results import SCHEMA_VERSION, SEED, write_summary
from dinov2.eval.robustness_scores import Origins, robustness
from dinov2.eval.scores import DRAWS, LEVEL
from dinov2.eval.setup import setup_and_build_model
from dinov2.eval.utils import ModelWithAutocast, extract_features

logger = logging.getLogger("dinov2")

SAMPLES = 1000
TEMPERATURE = 0.07
VOTERS = 20
TCGA_BARCODE = re.compile(r"TCGA-([A-Z0-9]{2})-[A-Z0-9]{4}(-\d{2}[A-Z]-\d{2}-[A-Z]{2}[A-Z0-9]+)?")


def eval_robustness_with_model(
    model: nn.Module,
    output_dir: str,
    dataset_str: str,
    *,
    centers: str | None = None,
    samples: int = SAMPLES,
    k: int = 11,
    autocast_dtype: torch.dtype = torch.float,
    resize_size: int = 256,
    batch_size: int = 256,
    num_workers: int = 5,
    seed: int = SEED,
    bootstrap_draws: int = DRAWS,
    pretrained_weights: str | None = None,
    normalisation: Mapping[str, Sequence[float]] | None = None,
    path_map: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Measure robustness and write ``results_eval_robustness_summary.json``; all processes call this.

    Args:
        model: Maps images to features (B, D).
        output_dir: Where the summary goes.
        dataset_str: Tiles, best with labels.
        centers: CSV file of the centres, see :func:`read_origins`; None reads TCGA barcodes in file names,
            and leaves the robustness index out where there are none.
        samples: How many tiles, evenly spread over the dataset.
        k: Neighbours of the robustness index.
        resize_size: Shorter side of the images before the central 224 pixels are taken.
        seed: Of the stain changes and the bootstrap.
        bootstrap_draws: Draws behind the intervals of the robustness index; 0 for none.

    Returns:
        The summary.

    Raises:
        ConfigError: A number is out of range.
        DatasetError: There are too few tiles, or the centres cannot be used.
    """
    _check_options(samples, k, batch_size)
    check_draws(bootstrap_draws)
    transform = make_classification_eval_transform(resize_size=resize_size, **(normalisation or {}))
    images = make_dataset(dataset_str=dataset_str, path_map=path_map)
    if len(images) < 2:
        raise DatasetError(
            f'the dataset "{dataset_str}" has {len(images)} images: robustness compares pairs, give 2 or more'
        )
    chosen = np.linspace(0, len(images) - 1, min(samples, len(images))).round().astype(np.int64)
    labelled = label_of(images, 0) is not None
    # Before any image is read: what the index needs.
    origins = _origins(images, chosen, centers) if labelled else None
    if centers and not labelled:
        raise DatasetError(
            f'the dataset "{dataset_str}" has no labels, with which the robustness index compares centres: '
            "use a dataset with classes, or leave out --centers"
        )

    extractor = ModelWithAutocast(model, autocast_dtype)

    def features_of(perturbation: Callable | None) -> Tensor:
        data = PerturbedDataset(images, chosen, perturbation, transform, seed)
        return functional.normalize(extract_features(extractor, data, batch_size, num_workers)[0], dim=1)

    original = features_of(None)
    labels = (
        torch.tensor([label_of(images, int(i)) for i in chosen]).to(original.device) if labelled else None
    )
    unchanged = Unchanged.of(original, labels)
    rows = []
    for perturbation in PERTURBATIONS:
        row = {"perturbation": perturbation.kind, "strength": perturbation.strength}
        row |= compare(unchanged, features_of(perturbation))
        rows.append(row)
        logger.info("%s", _row_in_words(row, unchanged.random_cosine))
    summary = {
        "schema_version": SCHEMA_VERSION,
        "pretrained_weights": pretrained_weights,
        "model": identity_of(model),
        "dataset": dataset_str,
        "samples": len(chosen),
        "protocol": {
            "transform": transform_text(transform),
            "autocast": str(autocast_dtype).removeprefix("torch."),
            "seed": seed,
            "voters": min(VOTERS, len(chosen) - 1) if labelled else None,
            "k": k,
        },
        "bootstrap": {"draws": bootstrap_draws, "level": LEVEL, "seed": seed},
        "random_pair_cosine": unchanged.random_cosine,
        "perturbations": rows,
        "centers": None,
    }
    if origins is not None:
        found = robustness(original, origins, k, draws=bootstrap_draws, seed=seed)
        summary["centers"] = {"centers": len(origins.centers.unique()), **found}
        logger.info(
            "robustness index %.3f at k = %d (above 0.5 tissue dominates), support %.2f; CRoMa median %.3f",
            *(found["robustness_index"], k, found["ri_support"], found["croma_median"]),
        )
    write_summary(output_dir, "robustness", summary)
    return summary


def mean_random_cosine(unit: Tensor) -> float:
    """Return the mean cosine of all pairs of different rows of unit vectors (n, D)."""
    total, count = unit.double().sum(dim=0), len(unit)
    return float(((total @ total) - count) / (count * (count - 1)))


@dataclass(frozen=True)
class Unchanged:
    """Tiles as they are, and what every comparison with changed ones needs of them.

    Attributes:
        features: Unit vectors (n, D).
        labels: (n,), or None.
        random_cosine: Mean cosine of different tiles.
        votes: Class of each tile by the vote of the others (n,); None without labels.
    """

    features: Tensor
    labels: Tensor | None
    random_cosine: float
    votes: Tensor | None

    @classmethod
    def of(cls, features: Tensor, labels: Tensor | None = None) -> "Unchanged":
        """Return the tiles with these features and labels."""
        votes = None if labels is None else vote_of_others(features, features, labels)
        return cls(features, labels, mean_random_cosine(features), votes)


def compare(unchanged: Unchanged, changed: Tensor) -> dict[str, float | None]:
    """Compare the features of tiles with those of the same tiles changed.

    Args:
        unchanged: The tiles.
        changed: Unit vectors (n, D), row by row of the same tile.

    Returns:
        ``mean_cosine`` and ``lowest_tenth_cosine`` of the pairs; ``retrieval`` (the share of changed tiles
        whose nearest original is their own); ``above_random``, 1 for unchanged features and 0 where a pair
        is as alike as two random tiles; and with labels the ``accuracy`` of changed tiles by the vote of the
        other originals, that of the originals ``accuracy_unchanged`` and the share of changed votes
        ``flips``. None without labels.
    """
    original, labels, random_cosine = unchanged.features, unchanged.labels, unchanged.random_cosine
    cosine = (original * changed).sum(dim=1).double()
    nearest = find_neighbors(original, changed, 1)[1][:, 0]
    own = torch.arange(len(original), device=nearest.device)
    row = {
        "mean_cosine": cosine.mean().item(),
        "lowest_tenth_cosine": torch.quantile(cosine, 0.1).item(),
        "above_random": (cosine.mean().item() - random_cosine) / max(1 - random_cosine, 1e-12),
        "retrieval": (nearest == own).double().mean().item(),
        "accuracy": None,
        "accuracy_unchanged": None,
        "flips": None,
    }
    if labels is not None:
        after = vote_of_others(original, changed, labels)
        row["accuracy_unchanged"] = (unchanged.votes == labels).double().mean().item()
        row["accuracy"] = (after == labels).double().mean().item()
        row["flips"] = (unchanged.votes != after).double().mean().item()
    return row


def vote_of_others(stored: Tensor, queries: Tensor, labels: Tensor) -> Tensor:
    """Return the class (n,) that the nearest stored tiles vote for, each query's own tile left out.

    Args:
        stored, queries: Unit vectors (n, D), row by row of the same tile.
        labels: (n,).
    """
    voters = min(VOTERS, len(stored) - 1)
    similarities, rows = find_neighbors(stored, queries, voters + 1)
    own = rows == torch.arange(len(rows), device=rows.device)[:, None]
    # One column too many: the own tile, or the last one where the own tile is not among them.
    own[:, -1] |= ~own.any(dim=1)
    similarities, rows = (values[~own].view(len(values), voters) for values in (similarities, rows))
    classes = int(labels.max()) + 1
    return vote(similarities, labels[rows], [voters], TEMPERATURE, classes)[voters].argmax(dim=1)


def read_origins(
    path: str | Path, names: Sequence[str], positions: Sequence[int]
) -> tuple[list, list | None]:
    """Read centres, and slides if there are any, of samples from a CSV file.

    Args:
        path: With the columns ``sample`` (the path of the image, its end, or the sample's number) and
            ``center``, and perhaps ``slide``.
        names: Paths of the samples, or their numbers as texts.
        positions: Numbers of the samples.

    Raises:
        DatasetError: The file cannot be read, lacks a column or a sample, or says two things of one sample
            or one thing of two.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f'the centres "{path}" cannot be read ({error}): give a CSV file') from error
    columns = list(rows[0]) if rows else []
    if not {"sample", "center"} <= set(columns):
        raise DatasetError(
            f'the centres "{path}" have {f"the columns {some_of(columns, 10)}" if columns else "no rows"}: '
            'give a CSV file with the columns "sample" and "center"'
        )
    known: dict[str, dict] = {}
    for row in rows:
        earlier = known.setdefault(row["sample"], row)
        if _origin(earlier) != _origin(row):
            raise DatasetError(
                f'the centres "{path}" name the sample "{row["sample"]}" twice, with {_origin(earlier)} and '
                f"with {_origin(row)}: keep one row"
            )
    found = [_row_of(known, name, position) for name, position in zip(names, positions, strict=True)]
    missing = [name for name, row in zip(names, found, strict=True) if row is None]
    if missing:
        raise DatasetError(
            f'the centres "{path}" lack {len(missing)} of {len(names)} samples, such as {missing[0]}: add '
            "them, by the path of the image or the number of the sample in the dataset"
        )
    served: dict[str, str] = {}
    for name, row in zip(names, found, strict=True):
        other = served.setdefault(row["sample"], name)
        if other != name:
            raise DatasetError(
                f'the row "{row["sample"]}" of the centres "{path}" fits two samples, {other} and {name}: '
                "give more of their paths"
            )
    slides = [row["slide"] for row in found] if "slide" in columns else None
    return [row["center"] for row in found], slides


def _origin(row: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {row[key]}" for key in ("center", "slide") if key in row)


def _row_of(known: Mapping[str, dict], name: str, position: int) -> dict | None:
    parts = Path(name).parts
    ends = [name, str(position), *("/".join(parts[start:]) for start in range(len(parts)))]
    return next((known[end] for end in ends if end in known), None)


def _origins(images: Dataset, chosen: np.ndarray, centers: str | None) -> Origins | None:
    every = sample_names(images)
    names = [every[index] for index in chosen]
    if centers is not None:
        found, slides = read_origins(centers, names, chosen.tolist())
    else:
        barcodes = [TCGA_BARCODE.search(name) for name in names]
        if not all(barcodes):
            logger.info("no --centers, and file names are not all TCGA barcodes: no robustness index")
            return None
        found, slides = [code[1] for code in barcodes], [code[0] for code in barcodes]
    labels = torch.tensor([label_of(images, int(index)) for index in chosen])
    origins = Origins(labels, _numbered(found), None if slides is None else _numbered(slides))
    origins.check()
    return origins


def _numbered(values: Sequence[str]) -> Tensor:
    return torch.from_numpy(np.unique(np.array(values), return_inverse=True)[1].reshape(-1))


def _row_in_words(row: Mapping[str, Any], random_cosine: float) -> str:
    text = (
        f"{row['perturbation']:<10} {row['strength']:>6g}: cosine {row['mean_cosine']:.3f} "
        f"(random pairs {random_cosine:.3f}), partner found {row['retrieval']:.3f}"
    )
    if row["flips"] is None:
        return text
    return f"{text}, votes changed {row['flips']:.3f}, accuracy {row['accuracy']:.3f}"


def _check_options(samples: int, k: int, batch_size: int) -> None:
    for name, value, least in (("samples", samples, 2), ("k", k, 1), ("batch size", batch_size, 1)):
        if value < least:
            raise ConfigError(f"the {name} of the robustness is {value}: give a whole number from {least} up")


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return the parser of the robustness evaluation."""
    parser = make_model_parser(description or "Robustness to stain, scanner and centre", parents, add_help)
    parser.add_argument("--dataset", dest="dataset_str", required=True, help="Tiles, best with labels")
    parser.add_argument(
        "--centers",
        metavar="CSV",
        help="Columns sample (path or number), center, perhaps slide (default: TCGA barcodes in the paths)",
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="Tiles to use (default: %(default)s)")
    parser.add_argument(
        "--k", type=int, default=11, help="Neighbours of the robustness index (default: %(default)s)"
    )
    parser.add_argument("--resize-size", type=int, default=256, help="Shorter side before the central 224")
    parser.add_argument("--batch-size", type=int, default=256, help="Images per process and step")
    parser.add_argument("--num-workers", type=int, default=5, help="Processes that read images, per process")
    parser.add_argument("--seed", type=int, default=SEED, help="Of what is drawn (default: %(default)s)")
    parser.add_argument(
        "--bootstrap-draws", type=int, default=DRAWS, help="Draws behind the intervals, 0 for none"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure as the command line says."""
    _check_options(args.samples, args.k, args.batch_size)
    model, autocast_dtype = setup_and_build_model(args)
    options = options_for(eval_robustness_with_model, args)
    eval_robustness_with_model(model, autocast_dtype=autocast_dtype, **options)


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args(sys.argv[1:]))
