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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinov2 import cli
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.errors import ConfigError
from dinov2.eval.cli import (
    NotedAction,
    add_metric_option,
    add_result_options,
    check_draws,
    check_loading,
    make_parser,
    options_for,
)
from dinov2.eval.data import make_evaluation_loader, make_labelled_datasets
from dinov2.eval.extract import cls_extraction
from dinov2.eval.feature_store import transform_text
from dinov2.eval.identity import identity_of
from dinov2.eval.knn_modules import (
    DictKeysModule,
    KnnModule,
    ModuleDictWithForward,
    create_class_indices_mapping,
    create_module_dict,
    filter_train,
)
from dinov2.eval.knn_protocols import METRICS, PROTOCOLS, VOTES, KnnProtocol, knn_protocol
from dinov2.eval.metrics import AccuracyAveraging, MetricType, build_topk_accuracy_metric
from dinov2.eval.neighbors import count_classes, knn_predict
from dinov2.eval.predictions import PredictionCollector
from dinov2.eval.results import ResultTable, append_lines, percent
from dinov2.eval.robustness import eval_robustness_with_model
from dinov2.eval.scores import DRAWS, Predictions, score
from dinov2.eval.setup import setup_and_build_model
from dinov2.eval.utils import (
    ModelWithNormalize,
    device_of,
    evaluate,
    extract_features,
)
from dinov2.utils.strict_json import to_json

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


# Name of the training samples ("full" or "<n> per class") and number of neighbours, or "class means".
Setting = tuple[str, "int | str"]


class KnnScorer(NamedTuple):
    """A model with the training samples of a k-NN evaluation, ready to score datasets.

    Args:
        model: Maps images to features (B, D).
        modules: The k-NN modules, by name of the training samples and try.
        num_classes: C.
        averaging: Of the accuracies.
        batch_size, num_workers: Of the loaders.
    """

    model: nn.Module
    modules: ModuleDictWithForward
    num_classes: int
    averaging: AccuracyAveraging
    batch_size: int
    num_workers: int

    @property
    def settings(self) -> list[Setting]:
        """What one dataset is scored with, each over one or more tries."""
        first_tries = {name: next(iter(tries.values())) for name, tries in self.modules.items()}
        return [(name, key) for name, module in first_tries.items() for key in module.keys]

    def __call__(self, dataset: Dataset, settings: Sequence[Setting] | None = None) -> "KnnOutcome":
        """Score a dataset; all processes call this together.

        Args:
            settings: Those of interest; None is all.
        """
        settings = self.settings if settings is None else list(settings)
        keys = [(name, attempt, key) for name, key in settings for attempt in self.modules[name]]
        collectors = {key: PredictionCollector(logits=False) for key in keys}
        _, accuracies = evaluate(
            nn.Sequential(self.model, self.modules),
            make_evaluation_loader(dataset, self.batch_size, self.num_workers),
            {key: DictKeysModule(key) for key in keys},
            {key: build_topk_accuracy_metric(self.averaging, self.num_classes) for key in keys},
            device_of(self.model),
            collectors=collectors,
        )
        predictions = defaultdict(list)
        for (name, _, key), collector in collectors.items():
            predictions[name, key].append(collector.gather())
        return KnnOutcome(_average_tries(accuracies), dict(predictions))


class KnnOutcome(NamedTuple):
    """Accuracies (``0..1``) and the predictions of every try, by setting."""

    accuracies: dict[Setting, dict[str, Tensor]]
    predictions: dict[Setting, list[Predictions]]


def make_knn_scorer(
    model: nn.Module,
    train_dataset: Dataset,
    accuracy_averaging: AccuracyAveraging,
    nb_knn: Sequence[int],
    temperature: float,
    batch_size: int,
    num_workers: int,
    gather_on_cpu: bool,
    n_per_class_list: Sequence[int] = (FULL_DATA,),
    n_tries: int = 1,
    *,
    protocol: KnnProtocol = PROTOCOLS["dinov2"],
) -> KnnScorer:
    """Extract the training features and return what scores datasets by them.

    See :func:`eval_knn_with_model` for the arguments.
    """
    if protocol.metric == "cosine" and not protocol.center:
        model = ModelWithNormalize(model)
    train_features, train_labels = extract_features(
        model, train_dataset, batch_size, num_workers, gather_on_cpu
    )
    num_classes = count_classes(train_labels)
    module = partial(
        KnnModule, T=temperature, device=device_of(model), num_classes=num_classes, protocol=protocol
    )
    modules = create_module_dict(
        module=module,
        train_features=train_features,
        train_labels=train_labels,
        nb_knn=nb_knn,
        n_per_class_list=n_per_class_list,
        n_tries=n_tries,
    )
    return KnnScorer(model, modules, num_classes, accuracy_averaging, batch_size, num_workers)


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
) -> dict[Setting, dict[str, Tensor]]:
    """Return the accuracies (``0..1``) by name of the training samples and number of neighbours.

    See :func:`eval_knn_with_model` for the arguments.
    """
    scorer = make_knn_scorer(
        model,
        train_dataset,
        accuracy_averaging,
        nb_knn,
        temperature,
        batch_size,
        num_workers,
        gather_on_cpu,
        n_per_class_list,
        n_tries,
    )
    return scorer(val_dataset).accuracies


def _average_tries(
    scores: dict[tuple[str, str, int], dict[str, Tensor]],
) -> dict[Setting, dict[str, Tensor]]:
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
    protocol: KnnProtocol = PROTOCOLS["dinov2"],
    test_dataset_str: str | None = None,
    features: str | None = None,
    bootstrap_draws: int = DRAWS,
    save_predictions: bool = False,
) -> dict[str, float | list[float]]:
    """Evaluate a backbone by k-NN and write ``results_eval_knn.json`` and its summary.

    Args:
        model: Maps images to features (B, D).
        output_dir: Where the result files go.
        nb_knn: Numbers of neighbours.
        temperature: Of the softmax that weighs the neighbours.
        autocast_dtype: Number format of the backbone; the search is done in float32.
        accuracy_averaging: Over samples, over classes, or none.
        transform: Of the images; None resizes the shorter side as the protocol says and crops the central
            224 pixels.
        gather_on_cpu: Keep the training features in main memory while they are extracted.
        n_per_class_list: Training samples per class to try; -1 means all.
        n_tries: Random choices of the training samples to average over.
        pretrained_weights: Noted in the summary.
        normalisation: ``mean`` and ``std`` per channel that the model was trained with, for the default
            transform; None is ImageNet's.
        path_map: Where recorded folders lie here (``train.path_map``).
        protocol: How features are compared and how neighbours vote; its ``nb_knn`` is not used here.
        test_dataset_str: Scored once, with the setting of the highest macro F1 on the validation set, for
            each choice of training samples.
        features: Folder of feature stores of the datasets, to be used instead of the images.
        bootstrap_draws: Draws behind the intervals in the summary; 0 leaves them out.
        save_predictions: Write the predictions of every row of the summary as a CSV file.

    Returns:
        Percentages by names such as ``('full', 10) Top 1``.

    Raises:
        ConfigError: A number is out of range.
        DatasetError: A dataset string is wrong, or labels are missing or do not belong together.
    """
    _check_options(nb_knn, temperature, n_per_class_list, n_tries)
    check_loading("k-NN", batch_size, num_workers, protocol.resize_size)
    check_draws(bootstrap_draws)
    transform = transform or make_classification_eval_transform(
        resize_size=protocol.resize_size, **(normalisation or {})
    )
    strings = {"train": train_dataset_str, "val": val_dataset_str, "test": test_dataset_str}
    datasets = make_labelled_datasets(strings, transform, path_map)
    extractor, datasets, num_workers = cls_extraction(
        model, datasets, strings, transform, autocast_dtype, features, num_workers
    )
    scorer = make_knn_scorer(
        model=extractor,
        train_dataset=datasets["train"],
        batch_size=batch_size,
        num_workers=num_workers,
        gather_on_cpu=gather_on_cpu,
        nb_knn=nb_knn,
        n_per_class_list=n_per_class_list,
        n_tries=n_tries,
        temperature=temperature,
        accuracy_averaging=accuracy_averaging,
        protocol=protocol,
    )
    table = ResultTable(
        "knn",
        output_dir,
        classes=getattr(datasets["train"], "classes", None),
        draws=bootstrap_draws,
        save_predictions=save_predictions,
    )
    outcomes = {"val": scorer(datasets["val"])}
    if "test" in datasets:
        outcomes["test"] = scorer(datasets["test"], _best_settings(outcomes["val"]))
    results: dict[str, Any] = {}
    for role, outcome in outcomes.items():
        rows = {
            setting: {top: percent(value) for top, value in accuracies.items()}
            for setting, accuracies in outcome.accuracies.items()
        }
        for (name, k), row in rows.items():
            table.add(
                {"train_samples": name, "k": k},
                row,
                outcome.predictions[name, k],
                role=role,
                dataset_str=strings[role],
                dataset=datasets[role],
            )
        results |= _legacy_results(rows, "" if role == "val" else f"{role} ")
    append_lines(Path(output_dir) / "results_eval_knn.json", [to_json({k: v}) for k, v in results.items()])
    table.write(
        {
            "pretrained_weights": pretrained_weights,
            "model": identity_of(model),
            "train_dataset": train_dataset_str,
            "val_dataset": val_dataset_str,
            "protocol": {
                "vote": protocol.vote,
                "metric": protocol.metric,
                "center": protocol.center,
                "temperature": temperature if protocol.vote == "softmax" else None,
                "n_tries": n_tries,
                "accuracy": accuracy_averaging.name.lower(),
                "transform": transform_text(transform),
                "autocast": str(autocast_dtype).removeprefix("torch."),
            },
            "train_samples": len(datasets["train"]),
            "features": features,
        }
    )
    return results


def _best_settings(outcome: KnnOutcome) -> list[Setting]:
    """Return, per choice of training samples, the setting of the highest macro F1, the first of equals."""
    values = {
        setting: sum(score(predictions)["macro_f1"] for predictions in tries) / len(tries)
        for setting, tries in outcome.predictions.items()
    }
    best: dict[str, Setting] = {}
    for setting, value in values.items():
        if setting[0] not in best or value > values[best[setting[0]]]:
            best[setting[0]] = setting
    logger.info("highest macro F1 on the validation set: %s", ", ".join(map(str, best.values())))
    return list(best.values())


def _legacy_results(rows: Mapping[Setting, Mapping[str, Any]], prefix: str) -> dict[str, float | list[float]]:
    """Return upstream's names of the results, such as ``('full', 10) Top 1``, with their percentages."""
    results = {}
    for setting, accuracies in rows.items():
        for top, value in accuracies.items():
            name = f"{prefix}{setting} {top.replace('top-', 'Top ')}"
            results[name] = value
            logger.info("%s: %s", name, value)
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
        "--nb_knn",
        nargs="+",
        type=int,
        default=[10, 20, 100, 200],
        action=NotedAction,
        help="Numbers of neighbours (default: the protocol's)",
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
    parser.add_argument(
        "--protocol",
        default="dinov2",
        help=f"Whose numbers to compare with: {', '.join(PROTOCOLS)} (default: %(default)s)",
    )
    parser.add_argument("--vote", choices=VOTES, help="How neighbours vote (default: the protocol's)")
    parser.add_argument("--metric", choices=METRICS, help="What is near (default: the protocol's)")
    parser.add_argument(
        "--center",
        action=argparse.BooleanOptionalAction,
        help="Subtract the mean training feature (default: the protocol's)",
    )
    parser.add_argument(
        "--class-means",
        action=argparse.BooleanOptionalAction,
        help="Score by the nearest class mean, too (default: the protocol's)",
    )
    parser.add_argument(
        "--test-dataset",
        dest="test_dataset_str",
        help="Dataset to score once, with the setting that is best on the validation dataset",
    )
    parser.add_argument(
        "--robustness",
        action="store_true",
        help="Measure robustness to stain and scanner on the validation dataset, too",
    )
    add_result_options(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Evaluate as the command line says."""
    averaging = args.metric_type.accuracy_averaging
    if averaging is None:
        raise ConfigError(
            f"k-NN knows one label per image, not {args.metric_type.value}: use another --metric-type"
        )
    protocol = knn_protocol(
        args.protocol,
        **{name: getattr(args, name) for name in ("vote", "metric", "center", "class_means", "resize_size")},
    )
    model, autocast_dtype = setup_and_build_model(args)
    options = options_for(eval_knn_with_model, args) | {"protocol": protocol}
    if "nb_knn" not in args.given:
        options["nb_knn"] = list(protocol.nb_knn)
    eval_knn_with_model(model, autocast_dtype=autocast_dtype, accuracy_averaging=averaging, **options)
    if args.robustness:
        options = options_for(eval_robustness_with_model, args) | {"resize_size": protocol.resize_size}
        eval_robustness_with_model(
            model, dataset_str=args.val_dataset_str, autocast_dtype=autocast_dtype, **options
        )


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args(sys.argv[1:]))
