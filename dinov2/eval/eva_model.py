"""A checkpoint as kaiko's eva takes models: a function that eva's configs name; see docs/evaluation.md."""

from torch import nn

from dinov2.configs import resolve_config
from dinov2.eval.setup import build_model_for_eval


def backbone(weights: str, config_file: str = "", overrides: list[str] | None = None) -> nn.Module:
    """Return a frozen backbone on the CPU; it maps images (B, 3, H, W) to cls tokens (B, D).

    The signature has plain types only, by which eva reads the arguments from its config.

    Args:
        weights: Path or URL of any checkpoint that the project reads.
        config_file: Config of the model; empty takes the architecture from the weights.
        overrides: More of the config, as ``key=value``.

    Raises:
        WeightsError: The weights cannot be read or do not fit.
    """
    auto = [] if config_file else ["student.arch=auto"]
    config = resolve_config(config_file, ["train.device=cpu", *auto, *(overrides or [])])
    return build_model_for_eval(config, weights)
