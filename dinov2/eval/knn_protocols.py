"""The k-NN protocols that published numbers follow, as sets of options."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dinov2.errors import ConfigError, nearest

VOTES = ("softmax", "uniform")
METRICS = ("cosine", "euclidean")


@dataclass(frozen=True)
class KnnProtocol:
    """How features are compared and how neighbours vote.

    Args:
        vote: ``softmax`` weighs neighbours by the softmax of their similarities, ``uniform`` counts them.
        metric: ``cosine`` compares unit vectors by their dot product, ``euclidean`` features as they are by
            minus half their squared distance, which for unit vectors orders and weighs alike.
        center: Subtract the mean of the training features first.
        class_means: Score by the nearest class mean, too: minus half the squared distance to it.
        resize_size: Shorter side of the images before the central 224 pixels are taken.
        nb_knn: Numbers of neighbours.

    Raises:
        ConfigError: A vote or a metric is not known.
    """

    vote: str = "softmax"
    metric: str = "cosine"
    center: bool = False
    class_means: bool = False
    resize_size: int = 256
    nb_knn: Sequence[int] = (10, 20, 100, 200)

    def __post_init__(self) -> None:
        for name, accepted in (("vote", VOTES), ("metric", METRICS)):
            value = getattr(self, name)
            if value not in accepted:
                raise ConfigError(
                    f'the {name} of k-NN is "{value}"{nearest(value, accepted)}: give {" or ".join(accepted)}'
                )


PROTOCOLS = {
    "dinov2": KnnProtocol(),
    # On centred unit vectors the Euclidean distance of UNI's evaluation orders as the cosine does.
    "uni": KnnProtocol("uniform", center=True, class_means=True, resize_size=224, nb_knn=(20,)),
    "thunder": KnnProtocol("uniform", resize_size=224, nb_knn=(1, 3, 5, 10, 20, 30, 40, 50)),
}


def knn_protocol(name: str, **changes: Any) -> KnnProtocol:
    """Return a protocol with some of its options changed; None leaves one as it is.

    Raises:
        ConfigError: The name or an option is not known.
    """
    if name not in PROTOCOLS:
        raise ConfigError(
            f'the k-NN protocol "{name}" is not known{nearest(name, PROTOCOLS)}: give {", ".join(PROTOCOLS)}'
        )
    return replace(
        PROTOCOLS[name], **{option: value for option, value in changes.items() if value is not None}
    )
