"""``student.arch: auto``: the architecture is read off the weights."""

import logging
from collections.abc import Mapping
from typing import Any

from dinov2.models.pretrained import BackboneWeights

logger = logging.getLogger("dinov2")

AUTO = "auto"


def settle_architecture(student: Any, weights: BackboneWeights) -> None:
    """Replace ``arch: auto`` and everything that the weights decide in a ``student`` config section.

    Args:
        student: The section, changed in place. With another ``arch`` it stays as it is.
        weights: What is going to be loaded.

    Raises:
        WeightsError: the weights do not tell their architecture.
    """
    if student.arch != AUTO:
        return
    architecture = weights.architecture
    if architecture.num_heads is None and student.num_heads is not None:
        architecture = architecture.with_heads(student.num_heads)
    options = architecture.student_options(weights.source)
    if options["layerscale"] and student.layerscale:
        options["layerscale"] = student.layerscale  # its size does not matter, its presence does
    changes = _changes(student, options)
    for key, value in options.items():
        setattr(student, key, value)
    known = f" (the sizes of {weights.looks_like})" if weights.looks_like else ""
    logger.info("student.arch auto: %s%s has %s", weights.source, known, architecture.describe())
    if changes:
        logger.info("student.arch auto sets %s", ", ".join(changes))


def _changes(student: Any, options: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={value} (was {getattr(student, key)})"
        for key, value in options.items()
        if getattr(student, key) != value
    ]
