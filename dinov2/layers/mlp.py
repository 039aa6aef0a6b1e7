"""Feed-forward network of a transformer block."""

from collections.abc import Callable

from torch import Tensor, nn

from dinov2.layers.layer_scale import scaled_linear


class Mlp(nn.Module):
    """Two linear layers with an activation between them; dropout follows the activation and the output.

    Args:
        in_features: token width.
        hidden_features: width between the layers, ``in_features`` if not given.
        out_features: output width, ``in_features`` if not given.
        act_layer: makes the activation.
        drop: dropout probability.
        bias: bias on both layers.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[..., nn.Module] = nn.GELU,
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, scale: nn.Module | None = None) -> Tensor:
        """Transform ``x``; ``scale`` is the LayerScale of the result."""
        hidden = self.drop(self.act(self.fc1(x)))
        return self.drop(scaled_linear(self.fc2, scale, hidden))
