"""Linear evaluation: upstream's grid of linear classifiers, trained jointly on a frozen backbone.

Run as ``python dinov2/eval/linear.py`` or under torchrun. The classifiers are in
:mod:`dinov2.eval.linear_classifiers`, their training in :mod:`dinov2.eval.linear_training`.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov2 import cli, distributed
from dinov2.data import SamplerType, make_data_loader
from dinov2.data.transforms import make_classification_eval_transform, make_classification_train_transform
from dinov2.errors import ConfigError
from dinov2.eval.cli import (
    add_metric_option,
    add_result_options,
    check_draws,
    check_loading,
    make_parser,
    options_for,
)
from dinov2.eval.data import (
    check_known_labels,
    check_same_classes,
    make_evaluation_loader,
    make_labelled_dataset,
    training_labels,
    warn_of_shared_images,
    warn_of_single_class,
)
from dinov2.eval.eva_probe import EvaProtocol, run_eval_eva
from dinov2.eval.extract import StoredFeaturesOf
from dinov2.eval.feature_store import StoredTokens, transform_text
from dinov2.eval.identity import identity_of
from dinov2.eval.linear_checkpoint import LinearCheckpointer
from dinov2.eval.linear_classifiers import (
    AllClassifiers,
    LinearClassifier,
    LinearPostprocessor,
    create_linear_input,
    scale_lr,
    setup_linear_classifiers,
)
from dinov2.eval.linear_training import eval_linear, evaluate_linear_classifiers, predict
from dinov2.eval.metrics import MetricType
from dinov2.eval.neighbors import count_classes
from dinov2.eval.results import ResultTable
from dinov2.eval.scores import DRAWS
from dinov2.eval.setup import setup_and_build_model
from dinov2.eval.utils import ModelWithIntermediateLayers, autocast_context, device_of

__all__ = [
    "AllClassifiers",
    "LinearClassifier",
    "LinearPostprocessor",
    "create_linear_input",
    "eval_linear",
    "evaluate_linear_classifiers",
    "get_args_parser",
    "main",
    "make_eval_data_loader",
    "run_eval_linear",
    "scale_lr",
    "setup_linear_classifiers",
    "test_on_datasets",
]

logger = logging.getLogger("dinov2")

T = TypeVar("T")

N_LAST_BLOCKS = (1, 4)
RESIZE_SIZE = 256
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)


def make_eval_data_loader(
    test_dataset_str: str,
    batch_size: int,
    num_workers: int,
    metric_type: MetricType,
    *,
    train_dataset: Dataset | None = None,
    normalisation: Mapping[str, Sequence[float]] | None = None,
    path_map: Mapping[str, str] | None = None,
    resize_size: int | None = None,
    stored: StoredFeaturesOf | None = None,
) -> DataLoader:
    """Return the loader of a validation or test set; lists of labels are padded with -1 for any metric.

    Args:
        resize_size: Shorter side of the images before the central 224 pixels are taken; None is 256.
        stored: Puts features in the place of images.

    Raises:
        DatasetError: There are no labels, or they are not among the classes of ``train_dataset``.
    """
    transform = _eval_transform(normalisation, resize_size)
    dataset = make_labelled_dataset(test_dataset_str, transform, path_map)
    if train_dataset is not None:
        check_same_classes(train_dataset, dataset)
        check_known_labels(train_dataset, dataset)
        warn_of_shared_images(train_dataset, dataset, "validation or test")
    if stored is not None:
        dataset, num_workers = stored(test_dataset_str, dataset), 0
    return make_evaluation_loader(dataset, batch_size, num_workers)


def _eval_transform(
    normalisation: Mapping[str, Sequence[float]] | None, resize_size: int | None
) -> Callable[[Any], Tensor]:
    return make_classification_eval_transform(
        resize_size=RESIZE_SIZE if resize_size is None else resize_size, **(normalisation or {})
    )


def test_on_datasets(
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    test_dataset_strs: Sequence[str],
    batch_size: int,
    num_workers: int,
    test_metric_types: Sequence[MetricType],
    metrics_file_path: str,
    training_num_classes: int,
    iteration: int,
    best_classifier_on_val: str,
    prefixstring: str = "",
    test_class_mappings: Sequence[Tensor | None] = (None,),
    *,
    train_dataset: Dataset | None = None,
    normalisation: Mapping[str, Sequence[float]] | None = None,
    path_map: Mapping[str, str] | None = None,
    resize_size: int | None = None,
    stored: StoredFeaturesOf | None = None,
    table: ResultTable | None = None,
) -> dict[str, float]:
    """Return ``<dataset>_accuracy`` in percent of the classifier chosen on the validation set.

    Args:
        table: Takes a row per dataset.
    """
    results = {}
    for number, (dataset_str, metric_type, class_mapping) in enumerate(
        zip(test_dataset_strs, test_metric_types, test_class_mappings, strict=True), 1
    ):
        logger.info("testing on %s", dataset_str)
        like = train_dataset if class_mapping is None else None
        loader = make_eval_data_loader(
            dataset_str,
            batch_size,
            num_workers,
            metric_type,
            train_dataset=like,
            normalisation=normalisation,
            path_map=path_map,
            resize_size=resize_size,
            stored=stored,
        )
        scores = evaluate_linear_classifiers(
            feature_model,
            linear_classifiers,
            loader,
            metric_type,
            metrics_file_path,
            training_num_classes,
            iteration,
            prefixstring=prefixstring,
            class_mapping=class_mapping,
            best_classifier_on_val=best_classifier_on_val,
        )
        accuracy = 100.0 * scores["best_classifier"]["accuracy"]
        results[f"{dataset_str}_accuracy"] = accuracy
        if table is not None:
            _add_row(
                table,
                (feature_model, linear_classifiers, best_classifier_on_val, loader, class_mapping),
                metric_type,
                accuracy,
                role="test" if number == 1 else f"test_{number}",
                dataset_str=dataset_str,
            )
    return results


def _add_row(
    table: ResultTable,
    predicted_by: tuple[nn.Module, nn.Module, str, DataLoader, Tensor | None],
    metric_type: MetricType,
    accuracy: float,
    *,
    role: str,
    dataset_str: str,
) -> None:
    """Add the row of one dataset to a table.

    Args:
        predicted_by: The arguments of :func:`~dinov2.eval.linear_training.predict`.
        metric_type: Of ``accuracy``, in percent.
    """
    _, _, name, loader, class_mapping = predicted_by
    dataset = loader.dataset.unnumbered
    tries = [] if metric_type is MetricType.IMAGENET_REAL_ACCURACY else [predict(*predicted_by)]
    table.add(
        {"classifier": name},
        {"top-1": accuracy},
        tries,
        role=role,
        dataset_str=dataset_str,
        dataset=dataset,
        class_names=None if class_mapping is None else getattr(dataset, "classes", None),
    )


test_on_datasets.__test__ = False  # a public name of upstream's; not a test


def run_eval_linear(
    model: nn.Module,
    output_dir: str,
    train_dataset_str: str,
    val_dataset_str: str,
    batch_size: int,
    epochs: int,
    epoch_length: int,
    num_workers: int,
    save_checkpoint_frequency: int,
    eval_period_iterations: int,
    learning_rates: Sequence[float],
    autocast_dtype: torch.dtype,
    test_dataset_strs: Sequence[str] | None = None,
    resume: bool = True,
    classifier_fpath: str | None = None,
    val_class_mapping_fpath: str | None = None,
    test_class_mapping_fpaths: Sequence[str | None] = (None,),
    val_metric_type: MetricType = MetricType.MEAN_ACCURACY,
    test_metric_types: Sequence[MetricType] | None = None,
    *,
    pretrained_weights: str | None = None,
    normalisation: Mapping[str, Sequence[float]] | None = None,
    path_map: Mapping[str, str] | None = None,
    augment: bool = False,
    resize_size: int | None = None,
    features: str | None = None,
    bootstrap_draws: int = DRAWS,
    save_predictions: bool = False,
) -> dict[str, str | float]:
    """Train the grid, choose on the validation set, report, and write ``results_eval_linear.json``.

    Args:
        model: A backbone with ``get_intermediate_layers``.
        batch_size: Images per process.
        epochs: Length of the run, in epochs of ``epoch_length`` iterations.
        save_checkpoint_frequency: Epochs between checkpoints that are kept.
        eval_period_iterations: Iterations between scores on the validation set.
        learning_rates: For 256 images per iteration.
        test_dataset_strs: More datasets to report on; None is the validation set alone.
        resume: Continue from the newest checkpoint in ``output_dir``.
        classifier_fpath: Checkpoint to start from when there is none to resume.
        val_class_mapping_fpath: ``.npy`` of the classifier's index of each of the dataset's classes.
        pretrained_weights: Noted in the summary.
        normalisation: ``mean`` and ``std`` per channel that the model was trained with; None is ImageNet's.
        path_map: Where recorded folders lie here (``train.path_map``).
        augment: Crop and flip training images at random and compute their features at every step, as
            upstream; otherwise features are computed once, of images transformed as for evaluation, and kept
            in a feature store in ``output_dir``.
        resize_size: Shorter side of the images before the central 224 pixels are taken; None is 256.
        features: Folder of feature stores of the datasets, to be used instead of the images.
        bootstrap_draws: Draws behind the intervals in the summary; 0 leaves them out.
        save_predictions: Write the predictions of the best classifier as CSV files.

    Returns:
        ``best_classifier`` (its name) and ``<dataset>_accuracy`` in percent per dataset.

    Raises:
        ConfigError: Numbers are out of range, or the lists for the test sets differ in length.
        DatasetError: A dataset string is wrong, or labels are missing or do not belong together.
        WeightsError: A checkpoint does not fit.
    """
    _check_lengths(
        batch_size=batch_size,
        epochs=epochs,
        epoch_length=epoch_length,
        save_checkpoint_frequency=save_checkpoint_frequency,
        eval_period_iterations=eval_period_iterations,
    )
    check_loading("the linear evaluation", batch_size, num_workers, resize_size)
    check_draws(bootstrap_draws)
    if augment and features is not None:
        raise ConfigError(
            "stored features are those of images as they are: leave out either --augment or --features"
        )
    test_dataset_strs = list(test_dataset_strs or [])
    test_class_mappings = _for_each(
        test_dataset_strs, [_read_class_mapping(path) for path in test_class_mapping_fpaths], "class mappings"
    )
    test_metric_types = _for_each(test_dataset_strs, test_metric_types or [val_metric_type], "metric types")
    val_class_mapping = _read_class_mapping(val_class_mapping_fpath)
    eval_transform = _eval_transform(normalisation, resize_size)
    train_transform = make_classification_train_transform(**(normalisation or {}))
    train_dataset = make_labelled_dataset(
        train_dataset_str, train_transform if augment else eval_transform, path_map
    )
    warn_of_single_class(train_dataset)
    stored = None
    if not augment:
        stored = StoredFeaturesOf(
            model, eval_transform, autocast_dtype, features, output_dir, batch_size, num_workers
        )
    num_classes = count_classes(training_labels(train_dataset, train_dataset_str))
    val_data_loader = make_eval_data_loader(
        val_dataset_str,
        batch_size,
        num_workers,
        val_metric_type,
        train_dataset=train_dataset if val_class_mapping is None else None,
        normalisation=normalisation,
        path_map=path_map,
        resize_size=resize_size,
        stored=stored,
    )
    feature_model: nn.Module
    if stored is None:
        feature_model = ModelWithIntermediateLayers(
            model, max(N_LAST_BLOCKS), partial(autocast_context, device_of(model), autocast_dtype)
        )
    else:
        feature_model = StoredTokens(device_of(model), max(N_LAST_BLOCKS))
        train_dataset, num_workers = stored(train_dataset_str, train_dataset), 0
    max_iter = epochs * epoch_length
    trained = _set_up(
        feature_model, train_dataset, learning_rates, batch_size, num_classes, max_iter, output_dir
    )
    start_iter = trained.restore(classifier_fpath, resume)
    metrics_file_path = str(Path(output_dir) / "results_eval_linear.json")
    val_results, *_ = eval_linear(
        feature_model=feature_model,
        linear_classifiers=trained.linear_classifiers,
        train_data_loader=_make_train_loader(train_dataset, batch_size, num_workers, start_iter),
        val_data_loader=val_data_loader,
        metrics_file_path=metrics_file_path,
        optimizer=trained.optimizer,
        scheduler=trained.scheduler,
        output_dir=output_dir,
        max_iter=max_iter,
        checkpoint_period=save_checkpoint_frequency * epoch_length,
        running_checkpoint_period=epoch_length,
        eval_period=eval_period_iterations,
        metric_type=val_metric_type,
        training_num_classes=num_classes,
        start_iter=start_iter,
        val_class_mapping=val_class_mapping,
    )
    best = val_results["best_classifier"]
    table = ResultTable(
        "linear",
        output_dir,
        classes=getattr(train_dataset, "classes", None),
        draws=bootstrap_draws,
        save_predictions=save_predictions,
    )
    _add_row(
        table,
        (feature_model, trained.linear_classifiers, best["name"], val_data_loader, val_class_mapping),
        val_metric_type,
        100.0 * best["accuracy"],
        role="val",
        dataset_str=val_dataset_str,
    )
    accuracies = {f"{val_dataset_str}_accuracy": 100.0 * best["accuracy"]} | test_on_datasets(
        feature_model,
        trained.linear_classifiers,
        test_dataset_strs=test_dataset_strs,
        test_metric_types=test_metric_types,
        test_class_mappings=test_class_mappings,
        best_classifier_on_val=best["name"],
        iteration=max_iter,
        training_num_classes=num_classes,
        train_dataset=train_dataset,
        normalisation=normalisation,
        path_map=path_map,
        resize_size=resize_size,
        stored=stored,
        table=table,
        batch_size=batch_size,
        num_workers=num_workers,
        metrics_file_path=metrics_file_path,
    )
    table.write(
        {
            "pretrained_weights": pretrained_weights,
            "model": identity_of(model),
            "train_dataset": train_dataset_str,
            "val_dataset": val_dataset_str,
            "protocol": {
                "name": "dinov2",
                "iterations": max_iter,
                "batch_size": batch_size * distributed.get_global_size(),
                "learning_rates": list(learning_rates),
                "augment": augment,
                "accuracy": val_metric_type.value,
                "transform": transform_text(eval_transform),
                "autocast": str(autocast_dtype).removeprefix("torch."),
            },
            "train_samples": len(train_dataset),
            "features": features,
            "best_classifier": best["name"],
        }
    )
    return {"best_classifier": best["name"]} | accuracies


def _set_up(
    feature_model: nn.Module,
    train_dataset: Dataset,
    learning_rates: Sequence[float],
    batch_size: int,
    num_classes: int,
    max_iter: int,
    output_dir: str,
) -> LinearCheckpointer:
    """Return the classifiers, their optimizer and its schedule, ready to be restored and saved."""
    image, _ = train_dataset[0]
    classifiers, param_groups = setup_linear_classifiers(
        feature_model(image[None].to(device_of(feature_model))),
        N_LAST_BLOCKS,
        learning_rates,
        batch_size,
        num_classes,
    )
    optimizer = torch.optim.SGD(param_groups, momentum=0.9, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_iter, eta_min=0.0)
    return LinearCheckpointer(classifiers, optimizer, scheduler, output_dir)


def _check_lengths(**lengths: int) -> None:
    for name, value in lengths.items():
        if value < 1:
            raise ConfigError(f"{name} of the linear evaluation is {value}: give a whole number from 1 up")


def _for_each(dataset_strs: Sequence[str], values: Sequence[T], what: str) -> list[T]:
    """Return one of ``values`` per dataset; a single one serves all."""
    values = list(values)
    if len(values) == 1:
        return values * len(dataset_strs)
    if len(values) != len(dataset_strs):
        raise ConfigError(
            f"there are {len(dataset_strs)} test datasets but {len(values)} {what}: give one "
            "for each, or one for all"
        )
    return values


def _read_class_mapping(path: str | None) -> Tensor | None:
    if path is None or path == "None":
        return None
    try:
        return torch.from_numpy(np.load(path).astype(np.int64))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'the class mapping "{path}" cannot be read: give a .npy file of class indices, or None'
        ) from error


def _make_train_loader(dataset: Dataset, batch_size: int, num_workers: int, start_iter: int) -> DataLoader:
    return make_data_loader(
        dataset=dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        shuffle=True,
        seed=0,
        sampler_type=SamplerType.SHARDED_INFINITE,
        sampler_advance=start_iter * batch_size,
        drop_last=True,
        persistent_workers=True,
    )


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return the parser of the linear evaluation."""
    parser = make_parser(description or "DINOv2 linear evaluation", parents, add_help)
    parser.add_argument(
        "--test-datasets",
        dest="test_dataset_strs",
        nargs="+",
        help="More datasets to report on (default: none)",
    )
    for flag, default, meaning in (
        ("--epochs", 10, "Epochs of --epoch-length iterations"),
        ("--batch-size", 128, "Images per process and iteration"),
        ("--num-workers", 8, "Processes that read images, per process"),
        ("--epoch-length", 1250, "Iterations per epoch"),
        ("--save-checkpoint-frequency", 20, "Epochs between checkpoints that are kept"),
        ("--eval-period-iterations", 1250, "Iterations between scores on the validation set"),
    ):
        parser.add_argument(flag, type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=list(LEARNING_RATES),
        help="Learning rates of the grid, for 256 images per iteration",
    )
    parser.add_argument("--no-resume", action="store_true", help="Ignore checkpoints in the output folder")
    add_metric_option(parser, "--val-metric-type", MetricType.MEAN_ACCURACY, "Accuracy on the validation set")
    add_metric_option(
        parser,
        "--test-metric-types",
        None,
        "Accuracies on the test datasets, one for each or for all",
        nargs="+",
    )
    parser.add_argument(
        "--augment",
        action="store_true",
        help="Crop and flip training images at random and compute their features at every step, as upstream "
        "(default: compute features once)",
    )
    parser.add_argument(
        "--protocol",
        choices=("dinov2", "eva"),
        default="dinov2",
        help="dinov2 trains the grid; eva trains one classifier at a time on the cls token with early "
        "stopping, and takes none of the options of the grid (default: %(default)s)",
    )
    add_result_options(parser)
    parser.add_argument("--classifier-fpath", type=str, help="Checkpoint of classifiers to start from")
    parser.add_argument(
        "--val-class-mapping-fpath",
        type=str,
        help=".npy file: the classifier's index of each validation class",
    )
    parser.add_argument(
        "--test-class-mapping-fpaths",
        nargs="+",
        type=str,
        default=[None],
        help="The same for the test datasets, None where there is none",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Evaluate as the command line says."""
    model, autocast_dtype = setup_and_build_model(args)
    if args.protocol == "eva":
        options = options_for(run_eval_eva, args) | {"protocol": EvaProtocol()}
        run_eval_eva(model, autocast_dtype=autocast_dtype, **options)
        return
    options = options_for(run_eval_linear, args)
    run_eval_linear(model, autocast_dtype=autocast_dtype, resume=not args.no_resume, **options)


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args(sys.argv[1:]))
