"""Pictures: the numbers behind them, and the files of the command line."""

import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.errors import ConfigError, DatasetError, OutputError
from dinov2.eval.pictures import __main__ as command
from dinov2.eval.pictures.attention_maps import attention_sheet, cls_attention
from dinov2.eval.pictures.files import PictureFolder
from dinov2.eval.pictures.neighbour_sheet import hardest_errors, neighbour_sheet, neighbours
from dinov2.eval.pictures.pca_maps import colours, fit_basis, pca_sheet, standardised, token_maps
from dinov2.eval.pictures.scatter import apart, plane
from dinov2.layers import MemEffAttention, NestedTensorBlock
from dinov2.models.vision_transformer import DinoVisionTransformer


def small_vit(registers: int, chunks: int = 0) -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = DinoVisionTransformer(
        img_size=28,
        patch_size=14,
        embed_dim=24,
        depth=2,
        num_heads=3,
        init_values=1.0,
        num_register_tokens=registers,
        block_chunks=chunks,
        interpolate_offset=0.0,
        block_fn=partial(NestedTensorBlock, attn_class=MemEffAttention),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(("registers", "chunks"), [(0, 0), (4, 0), (4, 2)])
def test_attention_equals_that_of_transformers(registers, chunks, tmp_path):
    transformers = pytest.importorskip("transformers")
    from dinov2.hub import export

    model = small_vit(registers, chunks)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    arguments = ["--checkpoint", str(tmp_path / "weights.pth"), "--to", "transformers", "--num-heads", "3"]
    export.main([*arguments, "--output", str(tmp_path / "out")])
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        expected = theirs(images, output_attentions=True).attentions[-1][:, :, 0]
    found = cls_attention(model, images)
    assert found.shape == (2, 3, 1 + registers + 4)
    assert (found - expected).abs().max() < 1e-5
    assert torch.allclose(found.sum(dim=-1), torch.ones(2, 3))


def test_attention_shares_count_cls_registers_and_patches():
    weights = torch.tensor([[[0.1, 0.05, 0.05, 0.2, 0.2, 0.2, 0.2]]])
    _, (mean, head) = attention_sheet([Image.new("RGB", (28, 28))], weights, (2, 2), ["x"])
    assert mean["head"] == "mean of heads" and head["head"] == "head 1"
    assert (head["share_cls"], head["share_registers"]) == pytest.approx((0.1, 0.1))
    assert head["share_patches"] == pytest.approx(0.8) and head["effective_patches"] == pytest.approx(4)


def test_a_model_without_attention_is_refused():
    with pytest.raises(ConfigError, match="no attention layers"):
        cls_attention(torch.nn.Linear(2, 2), torch.randn(1, 3, 4, 4))


def test_tokens_are_those_of_the_model_without_registers():
    model, images = small_vit(4), torch.randn(2, 3, 28, 42)
    expected = model.forward_features(images)["x_norm_patchtokens"].unflatten(1, (2, 3))
    assert np.allclose(token_maps(model, images), expected.detach(), atol=1e-5)


def test_the_basis_is_that_of_scikit_learn_with_fixed_signs():
    decomposition = pytest.importorskip("sklearn.decomposition")
    tokens = np.random.default_rng(0).normal(size=(200, 7)) * np.arange(1, 8)
    theirs = decomposition.PCA(3).fit(tokens)
    basis = fit_basis([standardised(tokens)])
    assert np.allclose(np.abs((basis.directions.T * theirs.components_).sum(axis=1)), 1)
    assert np.allclose(basis.shares, theirs.explained_variance_ratio_)
    assert (basis.directions[np.abs(basis.directions).argmax(axis=0), range(3)] > 0).all()
    mapped = colours(standardised(tokens), basis)
    assert mapped.min() == 0 and mapped.max() == 255


def test_colours_do_not_flip_between_checkpoints():
    tokens = np.random.default_rng(0).normal(size=(1, 6, 6, 5)) * np.array([5, 4, 3, 1, 1])
    nearly = tokens + 1e-6 * np.random.default_rng(1).normal(size=tokens.shape)
    first, second = (colours(t, fit_basis([t])) for t in map(standardised, (tokens, nearly)))
    assert np.abs(first.astype(int) - second).max() <= 1
    # The scale of a checkpoint does not show, either; and in a common basis equal tokens have one colour.
    assert np.array_equal(first, colours(standardised(tokens * 9), fit_basis([standardised(tokens * 9)])))


def test_a_baseline_of_another_width_is_refused():
    pictures = [Image.new("RGB", (28, 28))]
    with pytest.raises(ConfigError, match="of width 5, the model 2 x 2 of width 4"):
        pca_sheet(pictures, np.ones((1, 2, 2, 4)), np.ones((1, 2, 2, 5)))
    page, numbers = pca_sheet(pictures, np.ones((1, 2, 2, 4)), np.ones((1, 2, 2, 4)))
    assert len(numbers) == 3 and page.height > 3 * 224


def test_the_plane_keeps_its_signs_and_thumbnails_their_distance():
    features = np.random.default_rng(0).normal(size=(50, 6))
    spots, shares = plane(features)
    assert np.allclose(plane(features * 4)[0], spots) and shares[0] >= shares[1]
    chosen = apart(spots * 100, 10, 20)
    gaps = np.abs(spots[chosen][:, None] - spots[chosen]).max(axis=-1) * 100
    assert chosen[0] == 0 and (gaps[~np.eye(len(chosen), dtype=bool)] >= 10).all()


def test_hardest_errors_come_with_the_most_confident_first():
    stored, labels = torch.eye(2).repeat(5, 1), torch.arange(2).repeat(5)
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.4], [0.0, 1.0]])
    found = neighbours(stored, labels, queries, torch.tensor([1, 1, 1]))
    assert found.predicted.tolist() == [0, 0, 1]
    assert hardest_errors(found) == [0, 1] and hardest_errors(found, 1) == [0]


def test_the_sheet_names_samples_of_the_dataset(monkeypatch):
    found = neighbours(torch.eye(2), torch.arange(2), torch.eye(2), torch.tensor([0, 1]))
    written = []
    monkeypatch.setattr(
        "dinov2.eval.pictures.neighbour_sheet.sheet", lambda rows, side, title, names: written.extend(names)
    )
    picture = Image.new("RGB", (112, 112))
    _, numbers = neighbour_sheet(
        [1], found, ["a", "b"], lambda row: picture, lambda row: picture, "", samples=[40, 70]
    )
    assert written[0].startswith("b: image 70, taken for b")
    assert {row["query"] for row in numbers} == {70}


def test_choice_of_images_takes_classes_in_turn():
    labels = np.array([0] * 8 + [1] * 3 + [2])
    chosen = command.choose(labels, 12, 6, seed=0)
    assert sorted(labels[chosen].tolist()) == [0, 0, 0, 1, 1, 2] and len(set(chosen)) == 6
    assert chosen == command.choose(labels, 12, 6, seed=0) != command.choose(labels, 12, 6, seed=1)


def draw(case, folder, *more):
    options = ["--config-file", case.config, "--pretrained-weights", case.weights, "--output-dir", folder]
    options += ["--dataset", case.val, "--num-workers", 0, "--picture-size", 64, *more]
    command.draw_all(command.get_args_parser().parse_args([str(option) for option in options]))
    return folder / "pictures"


def test_command_line(tiny_case, tmp_path, monkeypatch):
    more = ["--train-dataset", tiny_case.train, "--baseline-weights", tiny_case.weights, "--images", 2]
    more += ["--samples", 8]
    folder = draw(tiny_case, tmp_path, *more)
    captions = json.loads((folder / "captions.json").read_text())
    queries = {int(row["query"]) for row in csv.DictReader((folder / "neighbours.csv").open())}
    assert queries <= set(range(0, 15, 2)) and max(queries) > 7  # every other one of 15 samples, by number
    assert {"pca_maps.png", "attention_maps.png", "scatter.png", "neighbours.png"} <= set(captions)
    for name, caption in captions.items():
        assert Image.open(folder / name).size > (200, 200) and caption.endswith(".")
        assert list(csv.DictReader((folder / name).with_suffix(".csv").open()))
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "old.png").write_bytes(b"of an earlier run")
    monkeypatch.setattr(command, "NAMES", (*command.NAMES, "old"))
    # The baseline is the model itself: before and after are alike.
    page = np.asarray(Image.open(folder / "pca_maps.png"))
    before, after = (page[y : y + 224, 14 : 14 + 224] for y in _tops(3))
    assert np.array_equal(before, after)
    assert first == {path.name: path.read_bytes() for path in draw(tiny_case, tmp_path, *more).iterdir()}


def test_pictures_of_an_earlier_run_go_and_those_of_others_stay(tmp_path):
    def add(folder, name):
        folder.add(name, Image.new("RGB", (2, 2)), [{"a": 1}], f"{name}.")

    add(PictureFolder(tmp_path, ["slide"]), "slide")
    first = PictureFolder(tmp_path, command.NAMES)
    add(first, "neighbours")
    add(first, "scatter")
    again = PictureFolder(tmp_path, command.NAMES)
    again.clear()
    add(again, "scatter")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"captions.json", "scatter.png", "scatter.csv", "slide.png", "slide.csv"}
    captions = {"slide.png": "slide.", "scatter.png": "scatter."}
    assert json.loads((tmp_path / "captions.json").read_text()) == captions
    assert again.captions == {"scatter.png": "scatter."}
    (tmp_path / "captions.json").write_text("[")
    with pytest.raises(OutputError, match="repair or remove it"):
        again.clear()


def _tops(rows):
    from dinov2.eval.pictures.canvas import GAP, LINE, MARGIN

    step = 224 + GAP + LINE + GAP
    return [MARGIN + LINE + GAP + row * step + LINE + GAP for row in range(1, rows)]


def test_mistakes_are_one_sentence(tiny_case, tmp_path):
    with pytest.raises(DatasetError, match="40 images are to be drawn, but .* has 15: give --images 15"):
        draw(tiny_case, tmp_path, "--images", 40)
    with pytest.raises(ConfigError, match="65 pixels do not divide into the model's patches of 32"):
        draw(tiny_case, tmp_path, "--picture-size", 65)
    single = tmp_path / "single" / "only"
    single.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(single / "a.png")
    text = f"ImageFolder:root={single.parent}"
    with pytest.raises(DatasetError, match="have one class"):
        draw(tiny_case, tmp_path, "--dataset", text, "--train-dataset", text)
    (tmp_path / "list.csv").write_text(f"path\n{single / 'a.png'}\n")
    flat = f"CustomImageDataset:root={single}:extra={tmp_path / 'list.csv'}"
    with pytest.raises(DatasetError, match="has no labels"):
        draw(tiny_case, tmp_path, "--dataset", flat, "--train-dataset", tiny_case.train)
