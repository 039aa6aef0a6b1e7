"""What every evaluation starts from: an architecture read off the weights, and their normalisation."""

import json
import logging

import pytest
import torch

from dinov2.configs import resolve_config
from dinov2.errors import ConfigError
from dinov2.eval import data, knn, linear, log_regression
from dinov2.eval.setup import build_model_for_eval
from tests.eval.conftest import TinyCase

CONSTANTS = {"mean": [0.7, 0.6, 0.7], "std": [0.2, 0.25, 0.18]}
OVERRIDES = [f"crops.{name}={values}" for name, values in CONSTANTS.items()]
SHORT = ["--epochs", "1", "--epoch-length", "1", "--batch-size", "4", "--learning-rates", "0.1"]


@pytest.mark.parametrize(("module", "more"), [(knn, []), (log_regression, []), (linear, SHORT)])
def test_images_are_normalised_as_the_config_says(tiny_case, tmp_path, monkeypatch, module, more):
    seen, real = [], data.make_labelled_dataset

    def recording(dataset_str, transform, path_map):
        seen.append(transform(torch.zeros(3, 300, 300)).amax(dim=(1, 2)))
        return real(dataset_str, transform, path_map)

    for caller in (data, linear):  # the others open all their datasets by way of the first
        monkeypatch.setattr(caller, "make_labelled_dataset", recording)
    monkeypatch.setattr(log_regression, "C_POWER_RANGE", torch.tensor([0.0]))
    options = [*tiny_case.options(tmp_path), *more, "--opts", *OVERRIDES]
    module.main(module.get_args_parser().parse_args(options))
    black = -torch.tensor(CONSTANTS["mean"]) / torch.tensor(CONSTANTS["std"])
    assert len(seen) >= 2
    for pixel in seen:
        torch.testing.assert_close(pixel, black)


def test_other_constants_than_the_sources_are_warned_of(tiny_case: TinyCase, tmp_path, caplog):
    weights = tmp_path / "weights.pth"
    weights.symlink_to(tiny_case.weights)
    stated = {"pretrained_cfg": CONSTANTS, "model_args": {"num_heads": 3}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        build_model_for_eval(resolve_config(str(tiny_case.config), OVERRIDES), str(weights))
        assert caplog.records == []
        build_model_for_eval(resolve_config(str(tiny_case.config), []), str(weights))
    assert "mean [0.7, 0.6, 0.7]" in caplog.text and "crops.mean is [0.485, 0.456, 0.406]" in caplog.text


def test_the_architecture_is_read_off_the_weights(tiny_case, tiny_backbone):
    cfg = resolve_config("", ["student.arch=auto", "student.num_heads=3", "train.device=cpu"])
    model = build_model_for_eval(cfg, str(tiny_case.weights))
    assert (cfg.student.arch, cfg.student.embed_dim, cfg.student.patch_size) == ("vit_large", 48, 32)
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(model(x), tiny_backbone(x))
    with pytest.raises(ConfigError, match="no weights to read the architecture from"):
        build_model_for_eval(resolve_config("", ["student.arch=auto"]), None)


@pytest.mark.parametrize("crops", [448, 96])
def test_positions_stay_as_they_are_stored(tiny_case, tiny_backbone, crops):
    """The config of a released model knows nothing of the crops that its weights were trained on since."""
    cfg = resolve_config(str(tiny_case.config), [f"crops.global_crops_size={crops}"])
    model = build_model_for_eval(cfg, str(tiny_case.weights))
    x = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(model(x), tiny_backbone(x))
    cfg.student.pos_embed_resampling = "center_crop"
    if crops == 96:  # cut from the middle, they are others
        assert build_model_for_eval(cfg, str(tiny_case.weights)).pos_embed.shape[1] == 1 + 3 * 3
