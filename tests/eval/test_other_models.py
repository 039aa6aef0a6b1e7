"""Models of timm and transformers, from folders on disk, in the evaluations."""

import json
import sys

import pytest
import torch

from dinov2.errors import ConfigError, WeightsError
from dinov2.eval import extract, knn, linear, log_regression
from dinov2.eval.other_models import open_other_model
from dinov2.eval.pictures import __main__ as pictures
from dinov2.hub import export
from tests.eval.test_setup import SHORT

CONSTANTS = {"mean": [0.7, 0.6, 0.5], "std": [0.2, 0.3, 0.4]}


def write_timm(folder, arch="vit_tiny_patch16_224", **options):
    """Write a model of timm with random weights; return how to name it."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=0, **options).eval()
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    stated = {"architecture": arch, "num_classes": 0, "model_args": options, "pretrained_cfg": CONSTANTS}
    (folder / "config.json").write_text(json.dumps(stated))
    return f"timm:local-dir:{folder}", model


def write_transformers(tiny_case, folder):
    """Write the tiny backbone as transformers reads it; return how to name it."""
    pytest.importorskip("transformers")
    options = ["--checkpoint", str(tiny_case.weights), "--to", "transformers", "--output", str(folder)]
    constants = ["--mean", *map(str, CONSTANTS["mean"]), "--std", *map(str, CONSTANTS["std"])]
    export.main([*options, "--num-heads", "3", *constants])
    return f"transformers:{folder}"


def images(seed=0):
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(seed))


def test_a_vit_of_timm_gives_its_own_features(tmp_path):
    name, model = write_timm(tmp_path / "vit", depth=3, embed_dim=48, num_heads=3)
    backbone = open_other_model(name).eval()
    assert backbone.normalisation == CONSTANTS and backbone.n_blocks == 3
    with torch.inference_mode():
        assert torch.equal(backbone(images()), model(images()))
        blocks = backbone.get_intermediate_layers(images(), 2, return_class_token=True)
        assert [tuple(part.shape) for part in blocks[0]] == [(2, 196, 48), (2, 48)]
        torch.testing.assert_close(blocks[-1][1], model(images()))
        assert not torch.equal(blocks[0][1], blocks[1][1])
        assert backbone(images()[..., :112, :112]).shape == (2, 48)  # not the size of its own images


def test_transformers_gives_the_features_of_the_weights_it_was_made_from(tiny_case, tiny_backbone, tmp_path):
    backbone = open_other_model(write_transformers(tiny_case, tmp_path / "model")).eval()
    assert backbone.normalisation == CONSTANTS
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images()), tiny_backbone(images()), rtol=1e-4, atol=1e-4)
        blocks = backbone.get_intermediate_layers(images(), 4, return_class_token=True)
        expected = tiny_backbone.get_intermediate_layers(images(), 4, return_class_token=True)
    for ours, theirs in zip(blocks, expected, strict=True):
        for part, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(part, wanted, rtol=1e-4, atol=1e-4)


def options_of(tiny_case, output_dir, name):
    """The options of an evaluation, with another model for the project's own and without a config of it."""
    return [*tiny_case.options(output_dir), "--pretrained-weights", name]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_evaluations_score_it_on_the_same_split(tiny_case, tmp_path, monkeypatch, library):
    monkeypatch.setattr(log_regression, "C_POWER_RANGE", torch.tensor([0.0]))
    if library == "timm":
        name, _ = write_timm(tmp_path / "model", depth=4, embed_dim=48, num_heads=3, patch_size=32)
    else:
        name = write_transformers(tiny_case, tmp_path / "model")
    for module, more in ((knn, ["--nb_knn", "3"]), (log_regression, []), (linear, SHORT)):
        folder = tmp_path / module.__name__
        module.main(module.get_args_parser().parse_args([*options_of(tiny_case, folder, name), *more]))
        (file,) = folder.glob("results_eval_*_summary.json")
        summary = json.loads(file.read_text())
        assert summary["pretrained_weights"] == name
        assert summary["val_dataset"] == tiny_case.val
        assert str(CONSTANTS["mean"][0]) in summary["protocol"]["transform"]
        assert 0 <= summary["results"][0]["scores"]["balanced_accuracy"] <= 1


@pytest.mark.slow
def test_transformers_scores_equal_those_of_the_weights_it_was_made_from(tiny_case, tmp_path):
    name = write_transformers(tiny_case, tmp_path / "model")
    own = [f"crops.{key}={values}" for key, values in CONSTANTS.items()]
    scores = []
    for folder, options in (("own", ["--opts", *own]), ("theirs", ["--pretrained-weights", name])):
        arguments = [*tiny_case.options(tmp_path / folder), "--nb_knn", "3", *options]
        knn.main(knn.get_args_parser().parse_args(arguments))
        summary = json.loads((tmp_path / folder / "results_eval_knn_summary.json").read_text())
        scores.append(summary["results"][0]["confusion_matrix"])
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_a_network_without_tokens_is_scored_where_tokens_are_not_needed(tiny_case, tmp_path):
    name, model = write_timm(tmp_path / "resnet", "resnet18")
    with torch.inference_mode():
        assert torch.equal(open_other_model(name).eval()(images()), model(images()))
    options = [*options_of(tiny_case, tmp_path / "knn", name), "--nb_knn", "3"]
    knn.main(knn.get_args_parser().parse_args(options))
    with pytest.raises(ConfigError, match="resnet.*no blocks with a cls token.*--protocol eva"):
        options = [*options_of(tiny_case, tmp_path / "linear", name), *SHORT]
        linear.main(linear.get_args_parser().parse_args(options))
    store = ["--dataset", tiny_case.val, "--output-dir", str(tmp_path / "store"), "--num-workers", "0"]
    common = ["--config-file", str(tiny_case.config), "--pretrained-weights", name, "--last-blocks", "0"]
    extract.main(extract.get_args_parser().parse_args([*common, *store]))
    assert json.loads((tmp_path / "store" / "store.json").read_text())["features"] == ["cls"]


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_what_cannot_be_opened_is_told(library, tmp_path, monkeypatch):
    pytest.importorskip(library)
    folder = tmp_path / "nothing"
    folder.mkdir()
    name = f"timm:local-dir:{folder}" if library == "timm" else f"transformers:{folder}"
    with pytest.raises(WeightsError, match=f"{library} cannot open .*nothing.*: .*a folder on disk"):
        open_other_model(name)
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not there
    with pytest.raises(ConfigError, match=f"which is not installed: pip install {library}"):
        open_other_model(name)


def test_weights_that_do_not_fill_the_model_are_refused(tiny_case, tmp_path):
    from safetensors.torch import load_file, save_file

    name = write_transformers(tiny_case, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["layernorm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        WeightsError, match='no weights for 1 tensors of its model, such as "layernorm.weight"'
    ):
        open_other_model(name)


def test_pictures_need_a_backbone_of_the_project(tiny_case, tmp_path):
    options = ["--pretrained-weights", "timm:resnet18", "--dataset", tiny_case.val]
    with pytest.raises(ConfigError, match="looks inside the backbone, and timm:resnet18"):
        pictures.draw_all(
            pictures.get_args_parser().parse_args([*options, "--output-dir", str(tmp_path / "pictures")])
        )
