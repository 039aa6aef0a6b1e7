"""``student.arch: auto``: the architecture is read off the weights."""

import logging
from collections.abc import Mapping
from typing import Any

from dinov2.models.pretrained import BackboneWeights

logger = logging.getLogger("dinov2")

AUTO = "auto"


def settle_architecture(student: Any, weights: BackboneWeights, defaults: Mapping[str, Any]) -> None:
    """Replace ``arch: auto`` and everything that the weights decide in a ``student`` config section.

    Values other than the default that the weights contradict are warned of. With ``patch_embed_resampling``
    on, the patch size stays the config's.

    Args:
        student: The section, changed in place. With another ``arch`` it stays as it is.
        weights: What is going to be loaded.
        defaults: The section as it is when nothing is stated.

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
    if student.patch_embed_resampling != "none":
        del options["patch_size"]
    changes = {key: getattr(student, key) for key, value in options.items() if getattr(student, key) != value}
    for key, value in options.items():
        setattr(student, key, value)
    known = f" (the sizes of {weights.looks_like})" if weights.looks_like else ""
    logger.info(
        "student.arch auto: %s%s has %s",
        weights.source,
        known,
        architecture.with_heads(architecture.num_heads or weights.usual_heads).describe(),
    )
    if architecture.num_heads is None:
        logger.info(
            "student.arch auto: %d attention heads are assumed, the usual number for this width, as the "
            "weights do not tell; student.num_heads states another",
            weights.usual_heads,
        )
    for key, before in changes.items():
        if key == "arch" or before == defaults[key]:
            logger.info("student.arch auto sets student.%s to %s", key, getattr(student, key))
        else:
            logger.warning(
                "student.%s %s contradicts the weights, and student.arch auto sets it to %s",
                *(key, before, getattr(student, key)),
            )
