"""The grid of linear classifiers: inputs, names, learning rates, training."""

import math

import pytest
import torch
from torch import nn

from dinov2.errors import ConfigError
from dinov2.eval.linear import LEARNING_RATES, get_args_parser
from dinov2.eval.linear_classifiers import (
    AllClassifiers,
    LinearClassifier,
    LinearPostprocessor,
    create_linear_input,
    name_learning_rates,
    scale_lr,
    setup_linear_classifiers,
)
from dinov2.eval.metrics import MetricType


def tokens(batch: int = 3, width: int = 6, blocks: int = 4, seed: int = 0) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, 5, width, generator=generator), torch.randn(batch, width, generator=generator))
        for _ in range(blocks)
    ]


def grid(batch_size: int = 128, num_classes: int = 3, learning_rates=LEARNING_RATES):
    return setup_linear_classifiers(tokens(), (1, 4), learning_rates, batch_size, num_classes)


def test_inputs_are_cls_tokens_and_the_mean_patch_of_the_last_block():
    layers = tokens()
    last = layers[-1]
    assert torch.equal(create_linear_input(layers, 1, False), last[1])
    expected = torch.cat([cls_token for _, cls_token in layers] + [last[0].mean(dim=1)], dim=1)
    assert torch.equal(create_linear_input(layers, 4, True), expected)
    assert create_linear_input([(p.half(), c.half()) for p, c in layers], 4, False).dtype == torch.float32


def test_grid_of_upstream():
    classifiers, groups = grid()
    assert len(classifiers) == len(groups) == 52
    assert "classifier_4_blocks_avgpool_True_lr_0_00500" in classifiers.classifiers_dict  # 1e-2 * 128 / 256
    widths = {c.linear.in_features for c in classifiers.classifiers_dict.values()}
    assert widths == {6, 12, 24, 30}
    expected = [lr * 128 / 256 for lr in LEARNING_RATES]
    assert [group["lr"] for group in groups[:13]] == pytest.approx(expected)
    assert (
        "classifiers_dict.classifier_1_blocks_avgpool_False_lr_0_05000.linear.weight"
        in classifiers.state_dict()
    )


def test_names_stay_unique_and_keep_the_old_form_where_they_can():
    names = name_learning_rates([scale_lr(lr, 128) for lr in LEARNING_RATES])
    assert list(names.values()) == [
        *("0_000005", "0_000010", "0_00003", "0_00005", "0_00010", "0_00025", "0_00050"),
        *("0_00100", "0_00250", "0_00500", "0_01000", "0_02500", "0_05000"),
    ]
    names = name_learning_rates([3.1e-7, 6.2e-7, 0.1])
    assert list(names.values()) == ["0_0000003", "0_0000006", "0_10000"]
    assert list(name_learning_rates([1e-7, 0.5]).values()) == ["0_00000", "0_50000"]


@pytest.mark.parametrize("learning_rates", [[0.1, 0.1], [0.0, 0.1], [-1.0], []])
def test_unusable_learning_rates(learning_rates):
    with pytest.raises(ConfigError, match="learning rates are"):
        grid(learning_rates=learning_rates)


def test_initial_weights():
    torch.manual_seed(0)
    linear = LinearClassifier(500, 1, False, 40).linear
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert torch.equal(linear.bias, torch.zeros(40))


def test_joint_forward_equals_single_ones():
    classifiers, _ = grid()
    layers = tokens(seed=1)
    outputs = classifiers(layers)
    for name, classifier in classifiers.classifiers_dict.items():
        assert torch.equal(outputs[name], classifier(layers))


def test_joint_training_equals_training_alone():
    classifiers, groups = grid(learning_rates=(0.5, 8.0))
    name = "classifier_4_blocks_avgpool_False_lr_4_00000"
    alone = LinearClassifier(24, 4, False, 3)
    alone.load_state_dict(classifiers.classifiers_dict[name].state_dict())
    together = torch.optim.SGD(groups, momentum=0.9)
    single = torch.optim.SGD(alone.parameters(), lr=4.0, momentum=0.9)
    for step in range(4):
        layers, labels = tokens(seed=step), torch.tensor([0, 2, 1])
        for optimizer, outputs in ((together, classifiers(layers).values()), (single, [alone(layers)])):
            optimizer.zero_grad()
            sum(nn.functional.cross_entropy(logits, labels) for logits in outputs).backward()
            optimizer.step()
    torch.testing.assert_close(classifiers.classifiers_dict[name].linear.weight, alone.linear.weight)
    assert not math.isclose(alone.linear.weight.abs().max().item(), 0.03, abs_tol=0.05)  # it did train


def test_class_mapping_picks_the_classes_of_the_dataset():
    classifier = LinearClassifier(6, 1, False, 5)
    layers, targets = tokens(), torch.tensor([0, 1, 1])
    every = LinearPostprocessor(classifier)(layers, targets)
    some = LinearPostprocessor(classifier, torch.tensor([4, 2]))(layers, targets)
    assert torch.equal(some["preds"], every["preds"][:, [4, 2]])
    assert some["target"] is targets
    assert set(LinearPostprocessor(classifier).state_dict()) == {
        "linear_classifier.linear.weight",
        "linear_classifier.linear.bias",
    }


def test_classifiers_take_tokens_made_in_inference_mode():
    with torch.inference_mode():
        layers = [(p * 1.0, c * 1.0) for p, c in tokens()]
    classifiers = AllClassifiers(
        {"a": LinearClassifier(6, 1, False, 3), "b": LinearClassifier(12, 1, True, 3)}
    )
    sum(logits.sum() for logits in classifiers(layers).values()).backward()
    assert all(parameter.grad is not None for parameter in classifiers.parameters())


def test_defaults_of_the_command_line():
    args = get_args_parser().parse_args([])
    assert args.learning_rates == [
        1e-5,
        2e-5,
        5e-5,
        1e-4,
        2e-4,
        5e-4,
        1e-3,
        2e-3,
        5e-3,
        1e-2,
        2e-2,
        5e-2,
        0.1,
    ]
    assert (args.epochs, args.epoch_length, args.batch_size, args.num_workers) == (10, 1250, 128, 8)
    assert (args.save_checkpoint_frequency, args.eval_period_iterations) == (20, 1250)
    assert args.val_metric_type is MetricType.MEAN_ACCURACY
    assert (args.test_dataset_strs, args.test_metric_types, args.no_resume) == (None, None, False)
    assert (args.classifier_fpath, args.val_class_mapping_fpath) == (None, None)
    assert args.test_class_mapping_fpaths == [None]
