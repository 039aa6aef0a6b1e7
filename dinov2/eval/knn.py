"""k-NN evaluation: the labels of the nearest training images vote on every validation image.

Run as ``python dinov2/eval/knn.py`` or under torchrun. The search and the vote are in
:mod:`dinov2.eval.neighbors`, the modules that processes share in :mod:`dinov2.eval.knn_modules`.
"""

import argparse
import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinov2 import cli
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.errors import ConfigError
from dinov2.eval.cli import add_metric_option, make_parser, options_for
from dinov2.eval.data import check_same_classes, make_evaluation_loader, make_labelled_dataset
from dinov2.eval.knn_modules import (
    DictKeysModule,
    KnnModule,
    ModuleDictWithForward,
    create_class_indices_mapping,
    create_module_dict,
    filter_train,
)
from dinov2.eval.metrics import AccuracyAveraging, MetricType, build_topk_accuracy_metric
from dinov2.eval.neighbors import count_classes, knn_predict
from dinov2.eval.results import append_lines, percent, to_json, write_summary
from dinov2.eval.setup import setup_and_build_model
from dinov2.eval.utils import (
    ModelWithAutocast,
    ModelWithNormalize,
    device_of,
    evaluate,
    extract_features,
)

__all__ = [
    "DictKeysModule",
    "KnnModule",
    "ModuleDictWithForward",
    "create_class_indices_mapping",
    "create_module_dict",
    "eval_knn",
    "eval_knn_with_model",
    "filter_train",
    "get_args_parser",
    "knn_predict",
    "main",
]

logger = logging.getLogger("dinov2")

FULL_DATA = -1


def eval_knn(
    model: nn.Module,
    train_dataset: Dataset,
    val_dataset: Dataset,
    accuracy_averaging: AccuracyAveraging,
    nb_knn: Sequence[int],
    temperature: float,
    batch_size: int,
    num_workers: int,
    gather_on_cpu: bool,
    n_per_class_list: Sequence[int] = (FULL_DATA,),
    n_tries: int = 1,
) -> dict[tuple[str, int], dict[str, Tensor]]:
    """Return the accuracies (``0..1``) by name of the training samples and number of neighbours.

    See :func:`eval_knn_with_model` for the arguments.
    """
    model = ModelWithNormalize(model)
    train_features, train_labels = extract_features(
        model, train_dataset, batch_size, num_workers, gather_on_cpu
    )
    num_classes = count_classes(train_labels)
    device = device_of(model)
    modules = create_module_dict(
        module=partial(KnnModule, T=temperature, device=device, num_classes=num_classes),
        train_features=train_features,
        train_labels=train_labels,
        nb_knn=nb_knn,
        n_per_class_list=n_per_class_list,
        n_tries=n_tries,
    )
    keys = [
        (name, attempt, k)
        for name, tries in modules.items()
        for attempt, module in tries.items()
        for k in module.nb_knn
    ]
    _, scores = evaluate(
        nn.Sequential(model, modules),
        make_evaluation_loader(val_dataset, batch_size, num_workers),
        {key: DictKeysModule(key) for key in keys},
        {key: build_topk_accuracy_metric(accuracy_averaging, num_classes) for key in keys},
        device,
    )
    return _average_tries(scores)


def _average_tries(
    scores: dict[tuple[str, str, int], dict[str, Tensor]],
) -> dict[tuple[str, int], dict[str, Tensor]]:
    grouped = defaultdict(list)
    for (name, _, k), accuracies in scores.items():
        grouped[name, k].append(accuracies)
    return {
        key: {top: torch.stack([accuracies[top] for accuracies in tries]).mean(dim=0) for top in tries[0]}
        for key, tries in grouped.items()
    }


def eval_knn_with_model(
    model: nn.Module,
    output_dir: str,
    train_dataset_str: str,
    val_dataset_str: str,
    nb_knn: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    autocast_dtype: torch.dtype = torch.float,
    accuracy_averaging: AccuracyAveraging = AccuracyAveraging.MEAN_ACCURACY,
    transform: Callable | None = None,
    gather_on_cpu: bool = False,
    batch_size: int = 256,
    num_workers: int = 5,
    n_per_class_list: Sequence[int] = (FULL_DATA,),
    n_tries: int = 1,
    *,
    pretrained_weights: str | None = None,
    normalisation: Mapping[str, Sequence[float]] | None = None,
    path_map: Mapping[str, str] | None = None,
) -> dict[str, float | list[float]]:
    """Evaluate a backbone by k-NN and write ``results_eval_knn.json`` and its summary.

    Args:
        model: Maps images to features (B, D).
        output_dir: Where the result files go.
        nb_knn: Numbers of neighbours.
        temperature: Of the softmax that weighs the neighbours.
        autocast_dtype: Number format of the backbone; the search is done in float32.
        accuracy_averaging: Over samples, over classes, or none.
        transform: Of the images; None resizes the shorter side to 256 and crops the central 224 pixels.
        gather_on_cpu: Keep the training features in main memory while they are extracted.
        n_per_class_list: Training samples per class to try; -1 means all.
        n_tries: Random choices of the training samples to average over.
        pretrained_weights: Noted in the summary.
        normalisation: ``mean`` and ``std`` per channel that the model was trained with, for the default
            transform; None is ImageNet's.
        path_map: Where recorded folders lie here (``train.path_map``).

    Returns:
        Percentages by names such as ``('full', 10) Top 1``.

    Raises:
        ConfigError: A number is out of range.
        DatasetError: A dataset string is wrong, or labels are missing or do not belong together.
    """
    _check_options(nb_knn, temperature, n_per_class_list, n_tries)
    transform = transform or make_classification_eval_transform(**(normalisation or {}))
    train_dataset = make_labelled_dataset(train_dataset_str, transform, path_map)
    val_dataset = make_labelled_dataset(val_dataset_str, transform, path_map)
    check_same_classes(train_dataset, val_dataset)
    scores = eval_knn(
        model=ModelWithAutocast(model, autocast_dtype),
        train_dataset=train_dataset,
        val_dataset=val_dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        gather_on_cpu=gather_on_cpu,
        nb_knn=nb_knn,
        n_per_class_list=n_per_class_list,
        n_tries=n_tries,
        temperature=temperature,
        accuracy_averaging=accuracy_averaging,
    )
    rows = [
        {"train_samples": name, "k": k} | {top: percent(value) for top, value in accuracies.items()}
        for (name, k), accuracies in scores.items()
    ]
    results = _legacy_results(rows)
    append_lines(Path(output_dir) / "results_eval_knn.json", [to_json({k: v}) for k, v in results.items()])
    summary = {
        "pretrained_weights": pretrained_weights,
        "train_dataset": train_dataset_str,
        "val_dataset": val_dataset_str,
        "metric": accuracy_averaging.name.lower(),
        "temperature": temperature,
        "n_tries": n_tries,
        "results": rows,
    }
    write_summary(output_dir, "knn", summary)
    return results


def _legacy_results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return upstream's names of the results, such as ``('full', 10) Top 1``, with their percentages."""
    results = {}
    for row in rows:
        for top in (name for name in row if name.startswith("top-")):
            name = f"{(row['train_samples'], row['k'])} {top.replace('top-', 'Top ')}"
            results[name] = row[top]
            logger.info("%s: %s", name, row[top])
    return results


def _check_options(
    nb_knn: Sequence[int], temperature: float, n_per_class_list: Sequence[int], n_tries: int
) -> None:
    if not nb_knn or min(nb_knn) < 1:
        raise ConfigError(f"the numbers of neighbours are {list(nb_knn)}: give whole numbers from 1 up")
    if temperature <= 0:
        raise ConfigError(f"the temperature of k-NN is {temperature}: give a number above 0")
    if 0 in n_per_class_list or n_tries < 1:
        raise ConfigError(
            f"k-NN is to use {list(n_per_class_list)} training samples per class in {n_tries} tries: give "
            "whole numbers from 1 up, or -1 samples for all"
        )


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return the parser of the k-NN evaluation."""
    parser = make_parser(description or "DINOv2 k-NN evaluation", parents, add_help)
    parser.add_argument(
        "--nb_knn", nargs="+", type=int, default=[10, 20, 100, 200], help="Numbers of neighbours"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.07, help="Temperature of the neighbours' weights"
    )
    parser.add_argument(
        "--gather-on-cpu", action="store_true", help="Collect the training features in main memory"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="Images per process and step")
    parser.add_argument("--num-workers", type=int, default=5, help="Processes that read images, per process")
    parser.add_argument(
        "--n-per-class-list",
        nargs="+",
        type=int,
        default=[FULL_DATA],
        help="Training samples per class, -1 for all",
    )
    parser.add_argument(
        "--n-tries", type=int, default=1, help="Random choices of training samples to average"
    )
    add_metric_option(parser, "--metric-type", MetricType.MEAN_ACCURACY, "Accuracy to report")
    return parser


def main(args: argparse.Namespace) -> None:
    """Evaluate as the command line says."""
    averaging = args.metric_type.accuracy_averaging
    if averaging is None:
        raise ConfigError(
            f"k-NN knows one label per image, not {args.metric_type.value}: use another --metric-type"
        )
    model, autocast_dtype = setup_and_build_model(args)
    eval_knn_with_model(
        model,
        autocast_dtype=autocast_dtype,
        accuracy_averaging=averaging,
        **options_for(eval_knn_with_model, args),
    )


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args(sys.argv[1:]))
