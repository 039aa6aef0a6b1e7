"""Logistic regression on cls features, with the strength of its penalty chosen on data held out.

Run as ``python dinov2/eval/log_regression.py`` or under torchrun, where the processes share out the values
of C. The fit itself is in :mod:`dinov2.eval.logistic`.
"""

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dinov2 import cli, distributed
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.cli import (
    add_metric_option,
    add_result_options,
    check_draws,
    check_loading,
    make_parser,
    options_for,
)
from dinov2.eval.data import make_labelled_datasets
from dinov2.eval.extract import cls_extraction
from dinov2.eval.feature_store import transform_text
from dinov2.eval.identity import identity_of
from dinov2.eval.logistic import LogisticRegression, fit_logistic_regression
from dinov2.eval.metrics import MetricType, build_metric
from dinov2.eval.neighbors import count_classes
from dinov2.eval.results import ResultTable, percent
from dinov2.eval.scores import DRAWS, Predictions
from dinov2.eval.setup import setup_and_build_model
from dinov2.eval.utils import device_of, extract_features
from dinov2.utils.device import resolve_device
from dinov2.utils.dtype import as_torch_dtype

logger = logging.getLogger("dinov2")

__all__ = [
    "C_POWER_RANGE",
    "eval_log_regression",
    "eval_log_regression_with_model",
    "fit_logistic_regression",
    "get_args_parser",
    "main",
]

C_POWER_RANGE = torch.linspace(-6, 5, 45)
HELD_OUT_SHARE = 10  # one tenth
IMAGE_SIZE = 224
CPU = torch.device("cpu")
UNI = "uni"


@dataclass(frozen=True)
class Samples:
    """Features (S, D) and labels (S, ...) of a dataset."""

    features: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor) -> "Samples":
        return Samples(self.features[rows], self.labels[rows])

    def __add__(self, other: "Samples") -> "Samples":
        return Samples(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


@dataclass(frozen=True)
class Fit:
    """How to fit: everything but C and the samples."""

    num_classes: int
    max_iter: int
    dtype: torch.dtype
    device: torch.device

    def __call__(self, C: float, samples: Samples) -> LogisticRegression:
        return fit_logistic_regression(
            samples.features.to(self.device),
            samples.labels.to(self.device),
            C,
            self.max_iter,
            num_classes=self.num_classes,
            dtype=self.dtype,
        )

    def score(
        self, model: LogisticRegression, samples: Samples, metric_type: MetricType
    ) -> dict[str, Tensor]:
        """Return the accuracies of ``model`` on samples that this process has all of."""
        metric = build_metric(metric_type, num_classes=self.num_classes)
        metric.update(
            model.decision_function(samples.features.to(self.device)), samples.labels.to(self.device)
        )
        return metric.compute(synchronize=False)


def sweep_C_values(fit: Fit, train: Samples, held_out: Samples, metric_type: MetricType) -> float:
    """Return the C with the highest top-1 on ``held_out``, the smallest of equals.

    Process r of W fits the values r, r + W, ...
    """
    values = (10.0**C_POWER_RANGE).tolist()
    scores = torch.zeros(len(values), dtype=torch.float64)
    for index in range(distributed.get_global_rank(), len(values), distributed.get_global_size()):
        model = fit(values[index], train)
        scores[index] = fit.score(model, held_out, metric_type)["top-1"].cpu()
        logger.info(
            "C %.3g: top-1 %.2f %% on held-out samples after %d iterations",
            *(values[index], 100 * scores[index], model.num_iterations),
        )
    scores = distributed.all_reduce_sum_(scores.to(distributed.collective_device())).tolist()
    return values[max(range(len(values)), key=scores.__getitem__)]


def eval_log_regression(
    *,
    model: nn.Module,
    train_dataset: Dataset,
    val_dataset: Dataset,
    finetune_dataset: Dataset | None = None,
    metric_type: MetricType = MetricType.MEAN_ACCURACY,
    batch_size: int = 256,
    num_workers: int = 0,
    finetune_on_val: bool = False,
    train_dtype: torch.dtype = torch.float64,
    train_features_device: torch.device = CPU,
    max_train_iters: int = 1000,
) -> dict[str, float | list[float]]:
    """Return ``top-1`` and ``top-5`` in percent on the validation set, and ``best_C``.

    See :func:`eval_log_regression_with_model` for the arguments.
    """
    return run_log_regression(
        model=model,
        train_dataset=train_dataset,
        val_dataset=val_dataset,
        finetune_dataset=finetune_dataset,
        metric_type=metric_type,
        batch_size=batch_size,
        num_workers=num_workers,
        finetune_on_val=finetune_on_val,
        train_dtype=train_dtype,
        train_features_device=train_features_device,
        max_train_iters=max_train_iters,
    ).results


class Outcome(NamedTuple):
    """What :func:`run_log_regression` finds.

    Args:
        results: Percentages and ``best_C``.
        predictions: On the validation set; None where samples have several labels.
        num_iterations: L-BFGS iterations of the final fit.
    """

    results: dict[str, float | list[float]]
    predictions: Predictions | None
    num_iterations: int


def run_log_regression(
    *,
    model: nn.Module,
    train_dataset: Dataset,
    val_dataset: Dataset,
    finetune_dataset: Dataset | None,
    metric_type: MetricType,
    batch_size: int,
    num_workers: int,
    finetune_on_val: bool,
    train_dtype: torch.dtype,
    train_features_device: torch.device,
    max_train_iters: int,
    single_C: str | float | None = None,
) -> Outcome:
    """Extract the features, choose C, fit and score; all processes call this together.

    See :func:`eval_log_regression_with_model` for the arguments.
    """
    on_cpu = torch.device(train_features_device).type == "cpu"

    def samples_of(dataset: Dataset) -> Samples:
        return Samples(*extract_features(model, dataset, batch_size, num_workers, gather_on_cpu=on_cpu))

    train, val = samples_of(train_dataset), samples_of(val_dataset)
    fit = Fit(count_classes(train.labels), max_train_iters, train_dtype, device_of(model))
    selection_train, held_out, final_train = train, val, train
    if finetune_dataset is not None:
        held_out = samples_of(finetune_dataset)
        final_train = train + held_out
    elif not finetune_on_val and single_C is None:
        selection_train, held_out = _split(train)
    if single_C is None:
        best_C = sweep_C_values(fit, selection_train, held_out, _selection_metric(metric_type, held_out))
    else:
        best_C = _value_of(single_C, train.features.shape[1], fit.num_classes)
    fitted = fit(best_C, final_train)
    accuracies = fit.score(fitted, val, metric_type)
    results = {name: percent(value) for name, value in accuracies.items()} | {"best_C": best_C}
    logger.info("logistic regression: %s", results)
    predictions = None
    if val.labels.ndim == 1:
        probabilities = fitted.predict_proba(val.features.to(fit.device)).double().cpu()
        predictions = Predictions(val.labels.cpu(), probabilities)
    if fitted.num_iterations >= max_train_iters:
        logger.warning(
            "logistic regression with C %.3g stopped after %d iterations, before it converged: give more "
            "with --max-train-iters",
            *(best_C, fitted.num_iterations),
        )
    return Outcome(results, predictions, fitted.num_iterations)


def _value_of(single_C: str | float, width: int, num_classes: int) -> float:
    """Return C; UNI's is the width of the features times the number of classes over 100."""
    if single_C == UNI:
        return width * num_classes / 100
    return float(single_C)


def _split(samples: Samples) -> tuple[Samples, Samples]:
    """Hold out a random tenth: (the rest, the tenth)."""
    count = len(samples.labels)
    held_out = count // HELD_OUT_SHARE
    if held_out == 0:
        raise DatasetError(
            f"the training dataset has {count} samples, too few to hold out a tenth for choosing C: use "
            f"at least {HELD_OUT_SHARE}, give --finetune-dataset-str, or choose on the validation set with "
            "--finetune-on-val"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(samples.labels.device)
    return samples[order[held_out:]], samples[order[:held_out]]


def _selection_metric(metric_type: MetricType, held_out: Samples) -> MetricType:
    """Return the accuracy to choose C by, which has to be one number."""
    if metric_type is MetricType.PER_CLASS_ACCURACY:
        return MetricType.MEAN_PER_CLASS_ACCURACY
    if metric_type is MetricType.IMAGENET_REAL_ACCURACY and held_out.labels.ndim == 1:
        return MetricType.MEAN_ACCURACY
    return metric_type


def eval_log_regression_with_model(
    model: nn.Module,
    train_dataset_str: str = "ImageNet:split=TRAIN",
    val_dataset_str: str = "ImageNet:split=VAL",
    finetune_dataset_str: str | None = None,
    autocast_dtype: torch.dtype = torch.float,
    finetune_on_val: bool = False,
    metric_type: MetricType = MetricType.MEAN_ACCURACY,
    train_dtype: torch.dtype = torch.float64,
    train_features_device: torch.device = CPU,
    max_train_iters: int = 1000,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    output_dir: str | None = None,
    pretrained_weights: str | None = None,
    normalisation: Mapping[str, Sequence[float]] | None = None,
    path_map: Mapping[str, str] | None = None,
    single_C: str | float | None = None,
    resize_size: int | None = None,
    features: str | None = None,
    bootstrap_draws: int = DRAWS,
    save_predictions: bool = False,
) -> dict[str, float | list[float]]:
    """Evaluate a backbone by logistic regression on its features, which are not normalised.

    C is chosen on ``finetune_dataset_str``, else on the validation set if ``finetune_on_val``, else on a
    tenth of the training set. The final fit adds what C was chosen on, unless that is the validation set.

    Args:
        model: Maps images to features (B, D).
        autocast_dtype: Number format of the backbone.
        metric_type: Accuracy to report.
        train_dtype: Number format of the fit.
        train_features_device: Where features wait between fits.
        max_train_iters: L-BFGS iterations at most.
        batch_size: Images per process and step of the feature extraction.
        num_workers: Processes that read images, per process.
        output_dir: Where the summary goes; None writes none.
        pretrained_weights: Noted in the summary.
        normalisation: ``mean`` and ``std`` per channel that the model was trained with; None is ImageNet's.
        path_map: Where recorded folders lie here (``train.path_map``).
        single_C: Fit with this C and choose none; ``"uni"`` is UNI's, the width of the features times the
            number of classes over 100.
        resize_size: Shorter side of the images before the central 224 pixels are taken; None is 224.
        features: Folder of feature stores of the datasets, to be used instead of the images.
        bootstrap_draws: Draws behind the intervals in the summary; 0 leaves them out.
        save_predictions: Write the predictions as a CSV file.

    Returns:
        ``top-1`` and, from five classes on, ``top-5`` in percent, and ``best_C``.

    Raises:
        ConfigError: C is to be chosen on two datasets, or the number format is not usable.
        DatasetError: A dataset string is wrong, or labels are missing or do not belong together.
    """
    if train_dtype not in (torch.float32, torch.float64):
        raise ConfigError(
            f"logistic regression is fitted in float32 or float64, not in {train_dtype}: use one of them"
        )
    if finetune_dataset_str and finetune_on_val:
        raise ConfigError(
            "C can be chosen on one dataset only: give either --finetune-dataset-str or --finetune-on-val"
        )
    _check_single_C(single_C)
    if max_train_iters < 1:
        raise ConfigError(f"--max-train-iters is {max_train_iters}: give a whole number from 1 up")
    check_loading("logistic regression", batch_size, num_workers, resize_size)
    check_draws(bootstrap_draws)
    transform = make_classification_eval_transform(
        resize_size=IMAGE_SIZE if resize_size is None else resize_size,
        crop_size=IMAGE_SIZE,
        **(normalisation or {}),
    )
    strings = {"train": train_dataset_str, "val": val_dataset_str, "finetune": finetune_dataset_str}
    datasets = make_labelled_datasets(strings, transform, path_map)
    extractor, datasets, num_workers = cls_extraction(
        model, datasets, strings, transform, autocast_dtype, features, num_workers
    )
    results, predictions, num_iterations = run_log_regression(
        model=extractor,
        train_dataset=datasets["train"],
        val_dataset=datasets["val"],
        finetune_dataset=datasets.get("finetune"),
        single_C=single_C,
        metric_type=metric_type,
        batch_size=batch_size,
        num_workers=num_workers,
        finetune_on_val=finetune_on_val,
        train_dtype=train_dtype,
        train_features_device=train_features_device,
        max_train_iters=max_train_iters,
    )
    table = ResultTable(
        "log_regression",
        output_dir,
        classes=getattr(datasets["train"], "classes", None),
        draws=bootstrap_draws,
        save_predictions=save_predictions,
    )
    table.add(
        {"C": results["best_C"]},
        {name: value for name, value in results.items() if name.startswith("top-")},
        [] if predictions is None else [predictions],
        dataset_str=val_dataset_str,
        dataset=datasets["val"],
    )
    table.write(
        {
            "pretrained_weights": pretrained_weights,
            "model": identity_of(model),
            "train_dataset": train_dataset_str,
            "val_dataset": val_dataset_str,
            "protocol": {
                "C": "chosen" if single_C is None else single_C,
                "finetune_dataset": finetune_dataset_str,
                "finetune_on_val": finetune_on_val,
                "iterations": num_iterations,
                "max_iterations": max_train_iters,
                "dtype": str(train_dtype).removeprefix("torch."),
                "accuracy": metric_type.value,
                "transform": transform_text(transform),
                "autocast": str(autocast_dtype).removeprefix("torch."),
            },
            "train_samples": len(datasets["train"]),
            "features": features,
        }
    )
    return results


def _check_single_C(single_C: str | float | None) -> None:
    try:
        usable = single_C in (None, UNI) or 0 < float(single_C) < float("inf")
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f'C of the logistic regression is "{single_C}": give a number above 0, or {UNI}')


def get_args_parser(
    description: str | None = None,
    parents: list[argparse.ArgumentParser] | None = None,
    add_help: bool = True,
) -> argparse.ArgumentParser:
    """Return the parser of the logistic regression evaluation."""
    parser = make_parser(description or "DINOv2 logistic regression evaluation", parents, add_help)
    parser.add_argument("--finetune-dataset-str", type=str, help="Dataset to choose C on (default: none)")
    parser.add_argument("--finetune-on-val", action="store_true", help="Choose C on the validation dataset")
    add_metric_option(parser, "--metric-type", MetricType.MEAN_ACCURACY, "Accuracy to report")
    parser.add_argument(
        "--train-features-device",
        type=str,
        default="cpu",
        help="Where to keep features (default: %(default)s)",
    )
    parser.add_argument(
        "--train-dtype", type=str, default="float64", help="Number format of the fit (default: %(default)s)"
    )
    parser.add_argument("--max-train-iters", type=int, default=1000, help="Iterations per fit at most")
    parser.add_argument(
        "--single-C",
        metavar="C",
        help=f"Fit with this C and choose none; {UNI} is the width of the features times the number of "
        "classes over 100 (default: choose among 45 values)",
    )
    add_result_options(parser)
    parser.add_argument("--batch-size", type=int, default=256, help="Images per process and step")
    parser.add_argument("--num-workers", type=int, default=0, help="Processes that read images, per process")
    return parser


def main(args: argparse.Namespace) -> None:
    """Evaluate as the command line says."""
    model, autocast_dtype = setup_and_build_model(args)
    options = options_for(eval_log_regression_with_model, args) | {
        "train_dtype": as_torch_dtype(args.train_dtype),
        "train_features_device": resolve_device(args.train_features_device),
    }
    eval_log_regression_with_model(model, autocast_dtype=autocast_dtype, **options)


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args(sys.argv[1:]))
