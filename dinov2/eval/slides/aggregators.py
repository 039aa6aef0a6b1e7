"""Aggregators: from the features of the tiles of a slide to one prediction, and how much each tile counts.

Every aggregator takes one bag at a time, features (N, D) in any order, and returns logits and attention; bags
differ too much in size for padding to pay. Letters: N tiles, D width of the features, O outputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.errors import ConfigError, nearest

# The transformer of HistoBistro (Wagner et al., Cancer Cell 2023), as the numbers of the paper were made.
WIDTH = 512
HEADS = 8
HEAD_WIDTH = 64
BLOCKS = 2

# Gated attention in the sizes of CLAM (Lu et al., Nature Biomedical Engineering 2021).
HIDDEN = 512
ATTENTION_HIDDEN = 256
DROPOUT = 0.25


class Aggregated(NamedTuple):
    """What an aggregator says of one bag.

    Attributes:
        logits: (O,); one output is the logit of class 1.
        attention: (N,), not negative, sums to one; None where tiles have no weights of their own.
    """

    logits: Tensor
    attention: Tensor | None


class _Pooling(nn.Module):
    """A linear classifier on pooled features.

    Args:
        width: D.
        outputs: O.
    """

    def __init__(self, width: int, outputs: int = 1) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, outputs)

    def pool(self, features: Tensor) -> Tensor:
        """Return (D,) of a bag (N, D)."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Aggregated:
        """Return the logits of a bag (N, D); tiles have no weights of their own."""
        return Aggregated(self.classifier(self.pool(features)), None)


class MeanPooling(_Pooling):
    """A linear classifier on the mean of the features: all tiles count alike."""

    def pool(self, features: Tensor) -> Tensor:
        """See the base class."""
        return features.mean(dim=0)


class MaxPooling(_Pooling):
    """A linear classifier on the largest value of each feature, which comes from a tile of its own."""

    def pool(self, features: Tensor) -> Tensor:
        """See the base class."""
        return features.amax(dim=0)


class GatedAttention(nn.Module):
    """Attention-based multiple instance learning with a gate (Ilse et al., ICML 2018, equation 9).

    h = ReLU(linear(x)); a = softmax over the tiles of w(tanh(V h) * sigmoid(U h)); logits = linear(sum a h).

    Args:
        width: D.
        outputs: O.
        hidden: width of h.
        attention_hidden: outputs of V and U.
        dropout: share of h and of the gated values that is dropped at training.
    """

    def __init__(
        self,
        width: int,
        outputs: int = 1,
        *,
        hidden: int = HIDDEN,
        attention_hidden: int = ATTENTION_HIDDEN,
        dropout: float = DROPOUT,
    ) -> None:
        super().__init__()
        self.projection = nn.Linear(width, hidden)
        self.attention_v = nn.Linear(hidden, attention_hidden)
        self.attention_u = nn.Linear(hidden, attention_hidden)
        self.attention_w = nn.Linear(attention_hidden, 1)
        self.classifier = nn.Linear(hidden, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Aggregated:
        """Return the logits of a bag (N, D) and the attention."""
        hidden = self.dropout(self.projection(features).relu())
        gated = self.attention_v(hidden).tanh() * self.attention_u(hidden).sigmoid()
        attention = self.attention_w(self.dropout(gated))[:, 0].softmax(dim=0)
        return Aggregated(self.classifier(attention @ hidden), attention)


class Transformer(nn.Module):
    """The transformer of HistoBistro: two blocks on projected tiles and a class token, no positions.

    The attention is that of the class token on the tiles in the last block, the mean over heads, scaled to
    sum to one. Time grows with the square of N, memory with N.

    Args:
        width: D.
        outputs: O.

    Note:
        The last block computes the class token alone, as no other output of it is used; the logits are those
        of the whole block.
    """

    def __init__(self, width: int, outputs: int = 1) -> None:
        super().__init__()
        self.projection = nn.Linear(width, WIDTH)
        self.cls_token = nn.Parameter(torch.randn(1, WIDTH))
        self.blocks = nn.ModuleList(TransformerBlock() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head_norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, outputs)

    def forward(self, features: Tensor) -> Aggregated:
        """Return the logits of a bag (N, D) and the attention."""
        tokens = torch.cat([self.cls_token, self.projection(features).relu()])
        for block in self.blocks[:-1]:
            tokens = block(tokens, tokens)
        last = self.blocks[-1]
        attention = last.attention_of(tokens[:1], tokens).mean(dim=0)[0, 1:]
        cls_token = last(tokens[:1], tokens)[0]
        # A class token that looks at itself alone leaves nothing to scale.
        attention = attention / attention.sum().clamp(min=torch.finfo(attention.dtype).tiny)
        return Aggregated(self.classifier(self.head_norm(self.norm(cls_token))), attention)


class TransformerBlock(nn.Module):
    """Self-attention and MLP, each on normalised tokens and added to them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * HEAD_WIDTH, bias=False)
        self.attention_out = nn.Linear(HEADS * HEAD_WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Return the new values (Q, 512) of the tokens ``queries`` that look at all ``tokens`` (T, 512)."""
        q, k, v = self._heads(queries, tokens)
        # A batch of one, which the kernels that never hold T x T numbers ask for.
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        values = queries + self.attention_out(attended.transpose(0, 1).flatten(1))
        return values + self.mlp(self.mlp_norm(values))

    def attention_of(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Return how much each query looks at each token, (heads, Q, T)."""
        q, k, _ = self._heads(queries, tokens)
        return (q @ k.transpose(1, 2) * HEAD_WIDTH**-0.5).softmax(dim=2)

    def _heads(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (heads, Q, 64), keys and values (heads, T, 64)."""
        weight_q, weight_kv = self.qkv.weight.split([HEADS * HEAD_WIDTH, 2 * HEADS * HEAD_WIDTH])
        q = F.linear(self.attention_norm(queries), weight_q)
        k, v = F.linear(self.attention_norm(tokens), weight_kv).chunk(2, dim=1)
        return tuple(part.unflatten(1, (HEADS, HEAD_WIDTH)).transpose(0, 1) for part in (q, k, v))


class Recipe(NamedTuple):
    """How an aggregator is trained where the command line does not say.

    Attributes:
        build: makes it from D and O.
        learning_rate, weight_decay: of AdamW.
        epochs: the most.
        patience: epochs without a better validation value after which training ends.
    """

    build: Callable[[int, int], nn.Module]
    learning_rate: float
    weight_decay: float
    epochs: int
    patience: int


# Of the transformer: the published MSI config of HistoBistro, 8 epochs at one rate.
RECIPES = {
    "abmil": Recipe(GatedAttention, 1e-4, 1e-5, 40, 10),
    "transformer": Recipe(Transformer, 2e-5, 2e-5, 8, 8),
    "mean": Recipe(MeanPooling, 1e-3, 1e-5, 40, 10),
    "max": Recipe(MaxPooling, 1e-3, 1e-5, 40, 10),
}


def recipe_of(name: str) -> Recipe:
    """Return the recipe of an aggregator.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in RECIPES:
        raise ConfigError(
            f'the aggregator "{name}" is not known{nearest(name, RECIPES)}: use one of {", ".join(RECIPES)}'
        )
    return RECIPES[name]
