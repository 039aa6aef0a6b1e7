"""Aggregators against plain formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinov2.errors import ConfigError
from dinov2.eval.slides.aggregators import (
    RECIPES,
    GatedAttention,
    MaxPooling,
    MeanPooling,
    Transformer,
    recipe_of,
)


def features(tiles: int, width: int = 24) -> torch.Tensor:
    return torch.randn(tiles, width, generator=torch.Generator().manual_seed(tiles))


def as_numpy(model) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().astype(np.float64) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("tiles", [1, 2, 301])
def test_gated_attention_is_the_published_formula(tiles, outputs):
    torch.manual_seed(0)
    model = GatedAttention(24, outputs).eval()
    x, w = features(tiles), as_numpy(model)
    h = np.maximum(0, x.numpy() @ w["projection.weight"].T + w["projection.bias"])
    v = np.tanh(h @ w["attention_v.weight"].T + w["attention_v.bias"])
    u = 1 / (1 + np.exp(-(h @ w["attention_u.weight"].T + w["attention_u.bias"])))
    e = np.exp((v * u) @ w["attention_w.weight"][0] + w["attention_w.bias"][0])
    a = e / e.sum()
    z = (a[:, None] * h).sum(axis=0)

    logits, attention = model(x)

    np.testing.assert_allclose(attention.detach().numpy(), a, rtol=1e-4, atol=1e-7)
    expected = w["classifier.weight"] @ z + w["classifier.bias"]
    np.testing.assert_allclose(logits.detach().numpy(), expected, atol=1e-5)


def whole_transformer(model: Transformer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The transformer as usually written: every token through both blocks."""
    x = F.relu(model.projection(x))
    x = torch.cat([model.cls_token, x])
    for block in model.blocks:
        y = F.layer_norm(x, (512,), block.attention_norm.weight, block.attention_norm.bias)
        q, k, v = (y @ part.T for part in block.qkv.weight.chunk(3))
        heads, maps = [], []
        for n in range(8):
            own = slice(64 * n, 64 * n + 64)
            maps.append((q[:, own] @ k[:, own].T / 8).softmax(dim=-1))
            heads.append(maps[-1] @ v[:, own])
        x = x + block.attention_out(torch.cat(heads, dim=1))
        x = x + block.mlp(F.layer_norm(x, (512,), block.mlp_norm.weight, block.mlp_norm.bias))
    attention = torch.stack(maps).mean(dim=0)[0, 1:]
    return model.classifier(model.head_norm(model.norm(x[0]))), attention / attention.sum()


@pytest.mark.parametrize("tiles", [1, 2, 150])
def test_the_transformer_is_that_of_histobistro(tiles):
    torch.manual_seed(0)
    model = Transformer(24).eval()
    logits, attention = model(features(tiles))
    expected, expected_attention = whole_transformer(model, features(tiles))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(attention, expected_attention, atol=1e-6, rtol=1e-4)


def test_gradients_reach_every_weight_of_the_transformer_as_in_the_whole_one():
    torch.manual_seed(0)
    model = Transformer(24)
    gradients = []
    for run in (lambda: model(features(20)).logits, lambda: whole_transformer(model, features(20))[0]):
        model.zero_grad()
        run().sum().backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in gradients[1].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("width", [384, 768, 1536])
def test_the_transformer_has_the_published_number_of_parameters(width):
    norm = 2 * 512
    block = norm + 512 * 3 * 512 + (512 * 512 + 512) + norm + 2 * (512 * 512 + 512)
    expected = (width * 512 + 512) + 512 + 2 * block + 2 * norm + 512 + 1
    assert sum(weight.numel() for weight in Transformer(width).parameters()) == expected


def test_pooling_is_a_linear_classifier_of_the_pooled_features():
    x = features(7)
    for model, pooled in ((MeanPooling(24), x.mean(dim=0)), (MaxPooling(24), x.max(dim=0).values)):
        logits, attention = model(x)
        torch.testing.assert_close(logits, model.classifier.weight @ pooled + model.classifier.bias)
        assert attention is None


@pytest.mark.parametrize("name", RECIPES)
def test_the_order_of_the_tiles_does_not_matter(name):
    torch.manual_seed(0)
    model = recipe_of(name).build(24, 1).eval()
    x, order = features(50), torch.randperm(50, generator=torch.Generator().manual_seed(1))
    first, second = model(x), model(x[order])
    torch.testing.assert_close(first.logits, second.logits, atol=1e-5, rtol=1e-4)
    if first.attention is not None:
        torch.testing.assert_close(first.attention[order], second.attention, atol=1e-6, rtol=1e-4)
        assert first.attention.sum().item() == pytest.approx(1, abs=1e-5)


def test_an_unknown_aggregator_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match='did you mean "abmil"'):
        recipe_of("abmill")
