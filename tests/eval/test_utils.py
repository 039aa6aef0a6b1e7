"""Feature extraction and the evaluation loop, alone and in several processes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from dinov2.data import DatasetWithEnumeratedTargets
from dinov2.errors import DatasetError, WeightsError
from dinov2.eval.data import collate_padded, make_evaluation_loader
from dinov2.eval.metrics import MetricType, build_metric
from dinov2.eval.utils import (
    ModelWithAutocast,
    ModelWithIntermediateLayers,
    ModelWithNormalize,
    autocast_context,
    evaluate,
    extract_features,
)


class Numbers(Dataset):
    """Sample i is a vector of four numbers; its label is ``labels[i]``."""

    def __init__(self, labels: list, poison: int | None = None) -> None:
        generator = torch.Generator().manual_seed(5)
        self.vectors = torch.randn(len(labels), 4, generator=generator)
        if poison is not None:
            self.vectors[poison] = torch.nan
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, object]:
        return self.vectors[index], self.labels[index]


class Scores(nn.Module):
    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"preds": outputs, "target": targets}


def sample_labels(count: int) -> list[int]:
    return torch.randint(0, 4, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def evaluate_and_extract(count: int) -> tuple[float, float, np.ndarray, list[int]]:
    """Return mean loss, accuracy, features and labels of ``count`` samples."""
    dataset = Numbers(sample_labels(count))
    metrics = {"all": build_metric(MetricType.MEAN_ACCURACY, num_classes=4)}
    loader = make_evaluation_loader(dataset, batch_size=3, num_workers=0)
    stats, scores = evaluate(
        nn.Identity(), loader, {"all": Scores()}, metrics, torch.device("cpu"), nn.CrossEntropyLoss()
    )
    features, labels = extract_features(nn.Identity(), dataset, batch_size=2, num_workers=0)
    return stats["loss"], scores["all"]["top-1"].item(), features.numpy(), labels.tolist()


def test_one_process_without_a_group():
    loss, accuracy, features, labels = evaluate_and_extract(7)
    dataset = Numbers(sample_labels(7))
    targets = torch.tensor(dataset.labels)
    batches = zip(dataset.vectors.split(3), targets.split(3), strict=True)
    assert loss == pytest.approx(np.mean([nn.functional.cross_entropy(x, y).item() for x, y in batches]))
    assert accuracy == pytest.approx((dataset.vectors.argmax(dim=1) == targets).double().mean().item())
    assert np.array_equal(features, dataset.vectors.numpy())
    assert labels == dataset.labels


def test_plain_targets_are_all_counted():
    loader = torch.utils.data.DataLoader(Numbers(sample_labels(9)), batch_size=4)
    metrics = {"all": build_metric(MetricType.MEAN_ACCURACY, num_classes=4)}
    evaluate(nn.Identity(), loader, {"all": Scores()}, metrics, torch.device("cpu"))
    assert metrics["all"]["top-1"].counts[1].sum() == 9


def test_lists_of_labels_are_padded():
    samples = [DatasetWithEnumeratedTargets(Numbers([[1, 2, 3], [0], [2, 1]]))[i] for i in range(3)]
    images, (indices, targets) = collate_padded(samples)
    assert images.shape == (3, 4)
    assert indices.tolist() == [0, 1, 2]
    assert targets.tolist() == [[1, 2, 3], [0, -1, -1], [2, 1, -1]]


def test_missing_labels_and_broken_features_are_counted():
    with pytest.raises(DatasetError, match="2 of 5 samples have no label.*the first is sample 1"):
        extract_features(nn.Identity(), Numbers([0, -1, 2, -1, 1]), 2, 0)
    with pytest.raises(WeightsError, match="features of 1 of 5 images are not finite"):
        extract_features(nn.Identity(), Numbers([0, 1, 2, 3, 1], poison=2), 2, 0)


def test_normalised_features_have_unit_length():
    features = ModelWithNormalize(nn.Identity())(torch.randn(6, 9))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))


def test_intermediate_layers_come_normed_with_the_last_block_last(tiny_backbone):
    images = torch.randn(2, 3, 64, 64)
    layers = ModelWithIntermediateLayers(
        tiny_backbone, 4, lambda: autocast_context(torch.device("cpu"), torch.float16)
    )(images)
    assert [(patches.shape, cls_token.shape) for patches, cls_token in layers] == [((2, 4, 48), (2, 48))] * 4
    with torch.no_grad():
        output = tiny_backbone(images, is_training=True)
    torch.testing.assert_close(layers[-1][1], output["x_norm_clstoken"], rtol=0, atol=1e-6)
    torch.testing.assert_close(layers[-1][0], output["x_norm_patchtokens"], rtol=0, atol=1e-6)


def test_number_formats_on_a_cpu():
    model = ModelWithAutocast(nn.Linear(64, 64), torch.bfloat16)
    images = torch.randn(3, 64)
    rounded, exact = model(images), model.model(images)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1
    assert torch.equal(ModelWithAutocast(model.model, torch.float16)(images), exact)  # float32 stands in
