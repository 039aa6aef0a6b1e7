"""The k-NN evaluation: recorded votes and samples, several processes, result files, bad input."""

import json
import logging
from functools import partial

import pytest
import torch

from dinov2.errors import ConfigError, DatasetError
from dinov2.eval.knn import (
    KnnModule,
    create_class_indices_mapping,
    create_module_dict,
    eval_knn_with_model,
    filter_train,
    get_args_parser,
    main,
)
from dinov2.eval.knn_protocols import KnnProtocol
from dinov2.eval.metrics import AccuracyAveraging
from dinov2.eval.perturbations import PERTURBATIONS
from dinov2.eval.report.collect import collect
from tests.conftest import load_golden_json, load_golden_tensors

RUNS = load_golden_json("knn.json")["runs"]


@pytest.fixture(scope="module")
def golden():
    return load_golden_tensors("knn.safetensors")


def make_module(golden, nb_knn, temperature):
    return KnnModule(
        golden["train_features"], golden["train_labels"], nb_knn, temperature, device="cpu", num_classes=7
    )


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run["name"])
def test_module_gives_the_recorded_votes(golden, run):
    votes = make_module(golden, run["nb_knn"], run["T"])(golden["test_features"])
    assert list(votes) == run["nb_knn"]
    for k, scores in votes.items():
        torch.testing.assert_close(scores, golden[f"{run['name']}.k{k}.probs"], rtol=1e-4, atol=1e-6)


def test_few_shot_samples_are_the_recorded_ones(golden):
    mapping = create_class_indices_mapping(golden["train_labels"])
    assert list(mapping) == list(range(7))
    for case in load_golden_json("knn.json")["few_shot"]:
        assert torch.equal(filter_train(mapping, case["n_per_class"], case["seed"]), golden[case["key"]])


def test_few_shot_modules(golden):
    modules = create_module_dict(
        module=partial(KnnModule, T=0.07, device="cpu", num_classes=7),
        n_per_class_list=(-1, 5, 10),
        n_tries=2,
        nb_knn=(1, 5, 8, 20),
        train_features=golden["train_features"],
        train_labels=golden["train_labels"],
    )
    assert list(modules) == ["full", "5 per class", "10 per class"]
    assert [list(tries) for tries in modules.values()] == [["1"], ["0", "1"], ["0", "1"]]
    assert modules["full"]["1"].nb_knn == [1, 5, 8, 20]
    assert modules["5 per class"]["0"].nb_knn == [1, 5]
    assert modules["10 per class"]["1"].nb_knn == [1, 5, 8, 10]
    assert torch.equal(
        modules["10 per class"]["1"].train_features, golden["train_features"][golden["few_10_1.indices"]]
    )
    outputs = modules(golden["test_features"][:3])
    assert outputs["5 per class"]["0"][5].shape == (3, 7)


def test_result_files_and_names(tiny_case, tiny_backbone, tmp_path):
    results = eval_knn_with_model(
        tiny_backbone,
        str(tmp_path),
        tiny_case.train,
        tiny_case.val,
        nb_knn=(1, 5),  # a tuple, with few-shot samples
        num_workers=0,
        n_per_class_list=[-1, 4],
        n_tries=2,
        pretrained_weights="tiny.pth",
    )
    names = ["('full', 1) Top 1", "('full', 5) Top 1", "('4 per class', 1) Top 1", "('4 per class', 4) Top 1"]
    assert list(results) == names  # three classes: no top-5
    assert all(0 <= value <= 100 for value in results.values())
    lines = (tmp_path / "results_eval_knn.json").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{name: results[name]} for name in names]
    summary = json.loads((tmp_path / "results_eval_knn_summary.json").read_text())
    assert (summary["evaluation"], summary["pretrained_weights"]) == ("knn", "tiny.pth")
    row = summary["results"][3]
    assert row["setting"] == {"train_samples": "4 per class", "k": 4}
    assert row["accuracies_percent"] == {"top-1": results[names[3]]}


def test_per_class_recalls_average_to_the_balanced_accuracy(tiny_case, tiny_backbone, tmp_path):
    evaluate = partial(
        eval_knn_with_model, tiny_backbone, str(tmp_path), tiny_case.train, tiny_case.val, [3], num_workers=0
    )
    recalls = evaluate(accuracy_averaging=AccuracyAveraging.PER_CLASS_ACCURACY)["('full', 3) Top 1"]
    mean = evaluate(accuracy_averaging=AccuracyAveraging.MEAN_PER_CLASS_ACCURACY)["('full', 3) Top 1"]
    assert len(recalls) == 3
    assert sum(recalls) / 3 == pytest.approx(mean)


def test_too_many_neighbours_are_clamped(tiny_case, tiny_backbone, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        results = eval_knn_with_model(
            tiny_backbone, str(tmp_path), tiny_case.train, tiny_case.val, [5, 100, 200], num_workers=0
        )
    assert list(results) == ["('full', 5) Top 1", "('full', 33) Top 1"]
    assert "k = 100, 200 uses all 33 training samples" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nb_knn": [0, 3]}, r"neighbours are \[0, 3\]"),
        ({"nb_knn": []}, r"neighbours are \[\]"),
        ({"temperature": 0.0}, "temperature of k-NN is 0.0"),
        ({"n_per_class_list": [0]}, r"use \[0\] training samples per class"),
        ({"batch_size": 0}, "--batch-size of k-NN is 0: give a whole number from 1 up"),
        ({"num_workers": -1}, "--num-workers of k-NN is -1: give a whole number from 0 up"),
        ({"protocol": KnnProtocol(resize_size=0)}, "--resize-size of k-NN is 0"),
    ],
)
def test_numbers_out_of_range(tiny_case, tiny_backbone, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        eval_knn_with_model(tiny_backbone, str(tmp_path), tiny_case.train, tiny_case.val, **options)


def test_images_without_labels_are_refused(tiny_case, tiny_backbone, tmp_path):
    folder = tiny_case.val.removeprefix("ImageFolder:root=")
    csv = tmp_path / "images.csv"
    csv.write_text(f"path\n{folder}/neoplastic/0.png\n")
    unlabelled = f"CustomImageDataset:split=TRAIN:root=/:extra={csv}"
    with pytest.raises(DatasetError, match="has no labels"):
        eval_knn_with_model(tiny_backbone, str(tmp_path), tiny_case.train, unlabelled, num_workers=0)


def test_classes_that_do_not_correspond_are_refused(tiny_case, tiny_backbone, tmp_path):
    folder = tmp_path / "two" / "neoplastic"
    folder.mkdir(parents=True)
    picture = f"{tiny_case.val.removeprefix('ImageFolder:root=')}/neoplastic/0.png"
    (folder / "0.png").symlink_to(picture)
    with pytest.raises(DatasetError, match="classes of the datasets differ"):
        eval_knn_with_model(
            tiny_backbone, str(tmp_path), tiny_case.train, f"ImageFolder:root={folder.parent}", num_workers=0
        )


def test_defaults_of_the_command_line():
    args = get_args_parser().parse_args([])
    assert args.nb_knn == [10, 20, 100, 200]
    assert (args.temperature, args.batch_size, args.n_per_class_list, args.n_tries) == (0.07, 256, [-1], 1)
    assert (args.train_dataset_str, args.val_dataset_str) == ("ImageNet:split=TRAIN", "ImageNet:split=VAL")
    assert (args.gather_on_cpu, args.output_dir, args.opts) == (False, "", [])
    args = get_args_parser().parse_args(["--opts", "student.patch_size=14", "--nb_knn", "5", "7"])
    assert (args.opts, args.nb_knn) == (["student.patch_size=14"], [5, 7])


def test_robustness_of_the_validation_dataset_beside_the_results(tiny_case, tmp_path, monkeypatch):
    monkeypatch.setattr("dinov2.eval.robustness.PERTURBATIONS", PERTURBATIONS[1:2])  # for time
    options = ["--config-file", tiny_case.config, "--pretrained-weights", tiny_case.weights]
    options += ["--train-dataset", tiny_case.train, "--val-dataset", tiny_case.val, "--output-dir", tmp_path]
    options += ["--num-workers", 0, "--bootstrap-draws", 10, "--robustness"]
    main(get_args_parser().parse_args([str(option) for option in options]))
    found = json.loads((tmp_path / "results_eval_robustness_summary.json").read_text())
    assert found["dataset"] == tiny_case.val and found["samples"] == 15
    assert found["pretrained_weights"] == str(tiny_case.weights)
    assert [row["perturbation"] for row in found["perturbations"]] == ["stain"]
    assert {result.evaluation for result in collect(tmp_path, "run").shown()} == {"knn"}


def labels_file(path, tiny_case, labels):
    folder = tiny_case.val.removeprefix("ImageFolder:root=")
    rows = [f"{folder}/neoplastic/{number}.png,{label}" for number, label in enumerate(labels)]
    path.write_text("path,label\n" + "\n".join(rows) + "\n")
    return f"CustomImageDataset:split=TRAIN:root=/:extra={path}"


def test_numbers_here_and_names_there_are_refused(tiny_case, tiny_backbone, tmp_path, caplog):
    numbers = labels_file(tmp_path / "numbers.csv", tiny_case, [0, 1, 2])
    names = labels_file(tmp_path / "names.csv", tiny_case, ["a", "b", "nan"])
    for train, val in ((numbers, names), (names, numbers)):
        with pytest.raises(
            DatasetError, match="names, .*, and those of the .* are numbers: which number stands"
        ):
            eval_knn_with_model(tiny_backbone, str(tmp_path), train, val, nb_knn=[1], num_workers=0)
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        eval_knn_with_model(tiny_backbone, str(tmp_path), tiny_case.train, numbers, nb_knn=[1], num_workers=0)
    assert "names are taken to be numbered from 0 in the order of the alphabet" in caplog.text


def test_too_few_images_of_a_class_are_told(tiny_case, tiny_backbone, tmp_path, caplog):
    options = {"nb_knn": [1], "n_per_class_list": [1000], "num_workers": 0}
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        eval_knn_with_model(tiny_backbone, str(tmp_path), tiny_case.train, tiny_case.val, **options)
    assert '"1000 per class" takes all samples of' in caplog.text
