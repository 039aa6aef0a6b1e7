"""What all three evaluations say to datasets, weights and features that cannot give a sound number."""

import csv
import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from dinov2.errors import DatasetError, WeightsError
from dinov2.eval import extract, knn, linear, log_regression
from dinov2.eval.eva_probe import EvaProtocol, run_eval_eva
from dinov2.eval.knn import eval_knn_with_model
from dinov2.eval.linear import run_eval_linear
from dinov2.eval.log_regression import eval_log_regression_with_model
from dinov2.models.vision_transformer import vit_tiny

NAMES = ("knn", "linear", "eva", "log_regression")
# Whole evaluations take their time: by default those of one.
WHOLE = ("knn", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:]))
CLASSES = ("connective", "inflammatory", "neoplastic")

LINEAR = {
    "epochs": 1,
    "epoch_length": 2,
    "batch_size": 8,
    "learning_rates": [0.1],
    "save_checkpoint_frequency": 1,
    "eval_period_iterations": 2,
}


def evaluate(name: str, model, folder, train: str, val: str, **options) -> dict | None:
    """Run an evaluation in its shortest form and return its summary."""
    common = {"num_workers": 0, "bootstrap_draws": 0, "autocast_dtype": torch.float32, **options}
    run = {
        "knn": partial(eval_knn_with_model, nb_knn=[1, 3]),
        "linear": partial(run_eval_linear, **LINEAR),
        "eva": partial(run_eval_eva, protocol=EvaProtocol(max_steps=10, runs=1)),
        "log_regression": partial(eval_log_regression_with_model, single_C=1.0),
    }[name]
    run = partial(run, model=model, output_dir=str(folder), train_dataset_str=train, val_dataset_str=val)
    run(**common)
    path = Path(folder) / f"results_eval_{'linear' if name == 'eva' else name}_summary.json"
    return json.loads(path.read_text())


class Unused(torch.nn.Module):
    """A model that must not be asked: mistakes have to be found before."""

    def forward(self, images):
        raise AssertionError("the model was run")

    get_intermediate_layers = forward


def table(folder: Path, name: str, rows) -> str:
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return f"CustomImageDataset:extra={path}"


def images_of(case, split: str) -> list[tuple[str, int]]:
    root = Path((case.train if split == "train" else case.val).removeprefix("ImageFolder:root="))
    return [(path, CLASSES.index(path.parent.name)) for path in sorted(root.rglob("*.png"))]


@pytest.mark.parametrize("name", WHOLE)
def test_an_empty_class_is_named_and_has_no_recall(name, tiny_case, tiny_backbone, tmp_path, caplog):
    strings = []
    for split, dataset_str in (("train", tiny_case.train), ("val", tiny_case.val)):
        shutil.copytree(dataset_str.removeprefix("ImageFolder:root="), tmp_path / split)
        (tmp_path / split / "epithelial").mkdir()  # between the other classes
        strings.append(f"ImageFolder:root={tmp_path / split}")
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        found = evaluate(name, tiny_backbone, tmp_path, *strings)
    assert f'no images of epithelial in "{tmp_path / "train"}"' in caplog.text
    row = found["results"][0]
    recalls = row["per_class"]["recall"]
    assert row["per_class"]["support"] == [5, 0, 5, 5]
    assert recalls[1] is None and row["per_class"]["auroc"][1] is None
    assert row["scores"]["balanced_accuracy"] == pytest.approx(sum(r for r in recalls if r is not None) / 3)
    assert [sum(counts) for counts in zip(*row["confusion_matrix"], strict=True)][1] == 0  # never predicted


@pytest.mark.parametrize("name", NAMES)
def test_a_single_class_is_told(name, tiny_case, tiny_backbone, tmp_path, caplog):
    train, val = (
        table(tmp_path, split, [(path, 0) for path, label in images_of(tiny_case, split) if not label])
        for split in ("train", "val")
    )
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        if name == "log_regression":
            with pytest.raises(
                DatasetError, match="all 11 training samples have the label 0: .* two classes"
            ):
                evaluate(name, tiny_backbone, tmp_path, train, val)
            return
        found = evaluate(name, tiny_backbone, tmp_path, train, val)
    assert caplog.text.count("all 11 training samples have the label 0: with a single class") == 1
    scores = found["results"][0]["scores"]
    assert scores["accuracy"] == 1 and scores["auroc"] is None


@pytest.mark.parametrize("label", [3, -1])
@pytest.mark.parametrize("name", NAMES)
def test_labels_outside_the_training_classes_stop_before_any_image(name, label, tiny_case, tmp_path):
    (path, _), *others = images_of(tiny_case, "val")
    val = table(tmp_path, "val", [*others, (path, label)])
    with pytest.raises(
        DatasetError,
        match=rf"label {label} is not among the classes 0\.\.2 .* 1 of 15 samples .* sample 14 first:",
    ):
        evaluate(name, Unused(), tmp_path, tiny_case.train, val)


@pytest.mark.parametrize("name", NAMES)
def test_a_class_without_training_images_is_named(name, tiny_case, tmp_path):
    shutil.copytree(tiny_case.train.removeprefix("ImageFolder:root="), tmp_path / "train")
    for path in (tmp_path / "train" / "neoplastic").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match=r"label 2 \(neoplastic\) is not among the classes 0\.\.1"):
        evaluate(name, Unused(), tmp_path, f"ImageFolder:root={tmp_path / 'train'}", tiny_case.val)


@pytest.mark.parametrize("name", WHOLE)
def test_two_classes_have_no_top_5(name, tiny_case, tiny_backbone, tmp_path):
    train, val = (
        table(tmp_path, split, [row for row in images_of(tiny_case, split) if row[1] < 2])
        for split in ("train", "val")
    )
    row = evaluate(name, tiny_backbone, tmp_path, train, val)["results"][0]
    assert set(row["accuracies_percent"]) == {"balanced accuracy" if name == "eva" else "top-1"}
    assert row["scores"]["auroc"] == pytest.approx(row["per_class"]["auroc"][1])


class NotFinite(torch.nn.Module):
    """The tiny backbone with NaN in the features of all or of single images."""

    def __init__(self, backbone, broken):
        super().__init__()
        self.backbone, self.broken, self.seen = backbone, broken, 0
        self.n_blocks = backbone.n_blocks

    def _spoilt(self, features):
        rows = torch.arange(self.seen, self.seen + len(features))
        return torch.where(self.broken(rows)[:, None], torch.nan, features)

    def forward(self, images):
        features = self._spoilt(self.backbone(images))
        self.seen += len(features)
        return features

    def get_intermediate_layers(self, images, *args, **options):
        tokens = self.backbone.get_intermediate_layers(images, *args, **options)
        return tuple((patches, self._spoilt(cls_token)) for patches, cls_token in tokens)


@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_not_finite_are_refused(name, tiny_case, tiny_backbone, tmp_path):
    with pytest.raises(WeightsError, match="features .* are not finite"):
        evaluate(
            name, NotFinite(tiny_backbone, lambda rows: rows >= 0), tmp_path, tiny_case.train, tiny_case.val
        )


@pytest.mark.parametrize("name", ["knn", "eva", "log_regression"])
def test_one_validation_image_without_finite_features_is_refused(name, tiny_case, tiny_backbone, tmp_path):
    with pytest.raises((DatasetError, WeightsError), match="of 1 of 15 (samples|images) are not finite"):
        evaluate(
            name, NotFinite(tiny_backbone, lambda rows: rows == 40), tmp_path, tiny_case.train, tiny_case.val
        )


@pytest.fixture(scope="module")
def wide_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("wide") / "wide.pth"
    model = vit_tiny(patch_size=32, img_size=224, embed_dim=96, depth=4, num_heads=3, init_values=1.0)
    torch.save({"teacher": {f"backbone.{name}": value for name, value in model.state_dict().items()}}, path)
    return path


@pytest.mark.parametrize("module", [knn, linear, log_regression, extract], ids=lambda module: module.__name__)
def test_a_checkpoint_of_another_width(module, tiny_case, wide_weights, tmp_path):
    options = tiny_case.options(tmp_path)
    options[options.index("--pretrained-weights") + 1] = str(wide_weights)
    if module is extract:
        place = options.index("--train-dataset")
        options[place : place + 4] = ["--dataset", tiny_case.train]
    with pytest.raises(
        WeightsError, match="width is 96 in the weights and 48 in the model .*student.arch=auto"
    ):
        module.main(module.get_args_parser().parse_args(options))


@pytest.mark.parametrize("name", WHOLE)
def test_judging_by_the_training_images_is_warned_of(name, tiny_case, tiny_backbone, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        evaluate(name, tiny_backbone, tmp_path, tiny_case.train, tiny_case.train)
    assert caplog.text.count("LEAK: all of the 33 validation") == 1


@pytest.fixture(scope="module")
def stores(tiny_case, tiny_backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    for size in (224, 256):
        for name, dataset_str in (("train", tiny_case.train), ("val", tiny_case.val)):
            transform = extract.make_classification_eval_transform(resize_size=size)
            source = extract.source_of(tiny_backbone, dataset_str, transform, torch.float32)
            dataset = extract.make_dataset(dataset_str=dataset_str, transform=transform)
            extract.extract_to_store(folder / f"{name}{size}", tiny_backbone, dataset, source, num_workers=0)
    return folder


@pytest.mark.parametrize("name", WHOLE)
def test_features_of_another_model_are_refused(name, stores, tiny_case, tiny_backbone, tmp_path):
    evaluate(name, tiny_backbone, tmp_path, tiny_case.train, tiny_case.val, features=str(stores))
    torch.manual_seed(1)
    other = vit_tiny(patch_size=32, img_size=224, embed_dim=48, depth=4, num_heads=3, init_values=1.0).eval()
    with pytest.raises(DatasetError, match="is of another model .weights_sha256"):
        evaluate(name, other, tmp_path, tiny_case.train, tiny_case.val, features=str(stores))
