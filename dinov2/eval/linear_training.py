"""Training the linear classifiers on a frozen backbone, and finding the best of them."""

import logging
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from dinov2.eval.linear_checkpoint import RUNNING_NAME, LinearCheckpointer
from dinov2.eval.linear_classifiers import LinearPostprocessor, unwrapped
from dinov2.eval.metrics import MetricCollection, MetricType, build_metric
from dinov2.eval.predictions import PredictionCollector
from dinov2.eval.results import append_lines
from dinov2.eval.scores import Predictions
from dinov2.eval.utils import device_of, evaluate
from dinov2.logging import MetricLogger
from dinov2.utils.strict_json import to_json

logger = logging.getLogger("dinov2")

LOG_PERIOD = 10


def evaluate_linear_classifiers(
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    data_loader: DataLoader,
    metric_type: MetricType,
    metrics_file_path: str,
    training_num_classes: int,
    iteration: int,
    prefixstring: str = "",
    class_mapping: Tensor | None = None,
    best_classifier_on_val: str | None = None,
) -> dict[str, dict]:
    """Score the classifiers, append the best to ``metrics_file_path`` and return it.

    Args:
        training_num_classes: Classes the classifiers were trained for.
        prefixstring: Written before the iteration.
        class_mapping: See :class:`~dinov2.eval.linear_classifiers.LinearPostprocessor`.
        best_classifier_on_val: Score only this one, chosen before on other data.

    Returns:
        ``{"best_classifier": {"name": .., "accuracy": 0..1}}``; among equals the first of the grid.
    """
    classifiers = unwrapped(linear_classifiers).classifiers_dict
    names = list(classifiers) if best_classifier_on_val is None else [best_classifier_on_val]
    num_classes = training_num_classes if class_mapping is None else len(class_mapping)
    _, results = evaluate(
        feature_model,
        data_loader,
        {name: LinearPostprocessor(classifiers[name], class_mapping) for name in names},
        {name: build_metric(metric_type, num_classes=num_classes) for name in names},
        device_of(classifiers),
    )
    # A per-class accuracy is a vector; classes without samples do not count.
    accuracies = {name: result["top-1"].nanmean().item() for name, result in results.items()}
    for name, accuracy in accuracies.items():
        logger.debug("%s accuracy: %.4f", name, accuracy)
    best = max(names, key=accuracies.__getitem__)
    results_dict = {"best_classifier": {"name": best, "accuracy": accuracies[best]}}
    logger.info("best classifier: %s", results_dict["best_classifier"])
    lines = [to_json({key: value}) for key, value in results_dict.items()]
    append_lines(metrics_file_path, [f"{prefixstring}iter: {iteration}", *lines, ""])
    return results_dict


def predict(
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    name: str,
    data_loader: DataLoader,
    class_mapping: Tensor | None = None,
) -> Predictions:
    """Return what one classifier predicts of a dataset whose samples have one label each.

    Args:
        name: Of the classifier.
        class_mapping: See :class:`~dinov2.eval.linear_classifiers.LinearPostprocessor`.
    """
    classifier = unwrapped(linear_classifiers).classifiers_dict[name]
    collector = PredictionCollector(logits=True)
    evaluate(
        feature_model,
        data_loader,
        {name: LinearPostprocessor(classifier, class_mapping)},
        {name: MetricCollection({})},
        device_of(classifier),
        collectors={name: collector},
    )
    return collector.gather()


def eval_linear(
    *,
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    train_data_loader: Iterable,
    val_data_loader: DataLoader,
    metrics_file_path: str,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    output_dir: str,
    max_iter: int,
    checkpoint_period: int,
    running_checkpoint_period: int,
    eval_period: int,
    metric_type: MetricType,
    training_num_classes: int,
    start_iter: int = 0,
    val_class_mapping: Tensor | None = None,
) -> tuple[dict[str, dict], nn.Module, nn.Module, int]:
    """Train the classifiers to iteration ``max_iter`` and score them on the validation set.

    Args:
        feature_model: Maps images to the tokens of blocks; frozen.
        train_data_loader: Gives ``(images, labels)`` without end.
        checkpoint_period: Iterations between files ``model_<iteration>.pth``; a final one is written always.
        running_checkpoint_period: Iterations between overwritings of the running checkpoint.
        eval_period: Iterations between scores on the way.
        start_iter: Iterations done already.

    Returns:
        The scores (see :func:`evaluate_linear_classifiers`), the two models and the number of iterations.
    """
    checkpointer = LinearCheckpointer(linear_classifiers, optimizer, scheduler, output_dir)
    score = partial(
        evaluate_linear_classifiers,
        feature_model,
        linear_classifiers,
        val_data_loader,
        metric_type,
        metrics_file_path,
        training_num_classes,
        class_mapping=val_class_mapping,
    )
    device = device_of(linear_classifiers)
    meters = MetricLogger(delimiter="  ")
    batches = meters.log_every(train_data_loader, LOG_PERIOD, "Training", max_iter, start_iter)
    for done, (images, labels) in enumerate(batches, start=start_iter + 1):
        loss = _step(feature_model, linear_classifiers, optimizer, images.to(device), labels.to(device))
        scheduler.step()
        meters.update(loss=loss, lr=optimizer.param_groups[0]["lr"])
        if done == max_iter:
            checkpointer.save("model_final", done - 1)
        elif done % checkpoint_period == 0:
            checkpointer.save(f"model_{done - 1:07d}", done - 1)
        elif done % running_checkpoint_period == 0:
            checkpointer.save(RUNNING_NAME, done - 1)
        if done % eval_period == 0 and done < max_iter:
            score(iteration=done)
    return score(iteration=max_iter), feature_model, linear_classifiers, max_iter


def _step(
    feature_model: nn.Module,
    linear_classifiers: nn.Module,
    optimizer: Optimizer,
    images: Tensor,
    labels: Tensor,
) -> Tensor:
    # Classifiers share no parameter, so the sum trains each of them as if it were alone.
    outputs = linear_classifiers(feature_model(images))
    loss = torch.stack([functional.cross_entropy(logits, labels) for logits in outputs.values()]).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
