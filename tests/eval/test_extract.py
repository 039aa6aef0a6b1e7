"""The feature store: its contents, going on after a stop, several processes, evaluations that read it."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.data import make_dataset
from dinov2.data.transforms import make_classification_eval_transform
from dinov2.errors import ConfigError, DatasetError, WeightsError
from dinov2.eval import feature_store
from dinov2.eval.extract import extract_to_store, get_args_parser, main, source_of
from dinov2.eval.feature_store import FeatureStore, StoredTokens, StoreWriter
from dinov2.eval.identity import identity_of, weights_sha256
from dinov2.eval.knn import eval_knn_with_model
from dinov2.eval.log_regression import eval_log_regression_with_model
from dinov2.eval.utils import ModelWithIntermediateLayers, autocast_context
from dinov2.models.vision_transformer import vit_tiny
from tests.conftest import REPO
from tests.distributed.launch import run_in_processes

ARRAYS = ["cls_block_1", "cls_block_2", "cls", "patch_mean", "labels"]
TRANSFORM = make_classification_eval_transform()


def extract(case, backbone, folder, **options):
    """33 samples in chunks of 10: four chunks, the last one not full."""
    dataset = make_dataset(dataset_str=case.train, transform=TRANSFORM)
    source = source_of(backbone, case.train, TRANSFORM, torch.float32)
    options = {"n_last_blocks": 3, "batch_size": 4, "num_workers": 0, "chunk_size": 10} | options
    return extract_to_store(folder, backbone, dataset, source, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


@pytest.fixture(scope="module")
def store(tiny_case, tiny_backbone, tmp_path_factory) -> FeatureStore:
    return extract(tiny_case, tiny_backbone, tmp_path_factory.mktemp("store") / "train")


def test_contents(store, tiny_case, tiny_backbone):
    assert store.names == ARRAYS
    dataset = make_dataset(dataset_str=tiny_case.train, transform=TRANSFORM)
    images = torch.stack([dataset[index][0] for index in (0, 15, 32)])
    layers = ModelWithIntermediateLayers(
        tiny_backbone, 3, lambda: autocast_context(images.device, torch.float32)
    )
    for name, (_, cls_token) in zip(ARRAYS[:3], layers(images), strict=True):
        np.testing.assert_allclose(store.array(name)[[0, 15, 32]], cls_token.numpy(), rtol=1e-5, atol=1e-5)
    mean = layers(images)[-1][0].mean(dim=1).numpy()
    np.testing.assert_allclose(store.array("patch_mean")[[0, 15, 32]], mean, rtol=1e-5, atol=1e-5)
    assert store.array("labels").tolist() == dataset.get_targets().tolist()
    assert store.array("cls").dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        store.array("cls")[0] = 0
    assert {path.name for path in store.folder.iterdir()} == {f"{name}.npy" for name in ARRAYS} | {
        "store.json"
    }
    described = json.loads((store.folder / "store.json").read_text())
    assert (described["complete"], described["samples"]) == (True, 33)
    assert described["classes"] == ["connective", "inflammatory", "neoplastic"]
    assert described["model"] == identity_of(tiny_backbone)
    assert described["arrays"]["cls"] == [33, 48]


def test_a_stopped_run_goes_on_and_ends_in_the_same_bytes(
    store, tiny_case, tiny_backbone, tmp_path, monkeypatch
):
    write, written = StoreWriter.write, []

    def stopping(self, number, arrays):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        write(self, number, arrays)

    monkeypatch.setattr(StoreWriter, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        extract(tiny_case, tiny_backbone, tmp_path)
    with pytest.raises(DatasetError, match="is not complete"):
        FeatureStore(tmp_path)
    monkeypatch.setattr(
        StoreWriter,
        "write",
        lambda self, number, arrays: written.append(number) or write(self, number, arrays),
    )
    extract(tiny_case, tiny_backbone, tmp_path)
    assert written == [0, 1, 2, 3]
    assert contents(tmp_path) == contents(store.folder)
    extract(tiny_case, tiny_backbone, tmp_path)  # nothing is left to do
    assert written == [0, 1, 2, 3]


def test_a_run_stopped_while_putting_chunks_together(store, tiny_case, tiny_backbone, tmp_path, monkeypatch):
    def stopped(self, description):
        if description["complete"]:
            raise KeyboardInterrupt
        describe(self, description)

    describe = StoreWriter._describe
    monkeypatch.setattr(StoreWriter, "_describe", stopped)
    with pytest.raises(KeyboardInterrupt):
        extract(tiny_case, tiny_backbone, tmp_path)
    monkeypatch.undo()
    extract(tiny_case, tiny_backbone, tmp_path)
    assert contents(tmp_path) == contents(store.folder)


def _extract_here(case, folder):
    main(get_args_parser().parse_args(options(case, folder)))


def options(case, folder, *more):
    return [
        *("--config-file", str(case.config), "--pretrained-weights", str(case.weights)),
        *("--dataset", case.train, "--output-dir", str(folder), "--num-workers", "0"),
        *("--batch-size", "4", "--chunk-size", "10", "--last-blocks", "3", *more),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_the_bytes_of_one(store, tiny_case, tmp_path, processes):
    run_in_processes(_extract_here, tiny_case, tmp_path, world_size=processes)
    assert contents(tmp_path) == contents(store.folder)


@pytest.mark.slow
def test_killed_processes_leave_what_is_complete(store, tiny_case, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--no-python",
    ]
    command += [
        sys.executable,
        "-m",
        "dinov2.eval.extract",
        *options(tiny_case, tmp_path, "--chunk-size", "1"),
    ]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    killed = 0
    for _ in range(3):
        before = len(list(tmp_path.glob("chunks/*.npz")))
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None and len(list(tmp_path.glob("chunks/*.npz"))) <= before:
            time.sleep(0.001)
        if process.poll() is not None:  # it was faster
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed += 1
    assert killed
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = FeatureStore(tmp_path)
    for name in ARRAYS:
        np.testing.assert_allclose(found.array(name), store.array(name), rtol=1e-5, atol=1e-5)


def test_half_precision_and_the_output_alone(store, tiny_case, tiny_backbone, tmp_path):
    small = extract(tiny_case, tiny_backbone, tmp_path, n_last_blocks=0, dtype="float16")
    assert small.names == ["cls", "labels"]
    assert small.array("cls").dtype == np.float16
    np.testing.assert_allclose(small.array("cls"), store.array("cls"), atol=2e-3)
    with pytest.raises(DatasetError, match='has no array "patch_mean", only cls, labels'):
        small.array("patch_mean")


def test_images_without_labels_can_be_extracted(tiny_case, tiny_backbone, tmp_path):
    dataset_str = f"{tiny_case.train}:labels=none"
    dataset = make_dataset(dataset_str=dataset_str, transform=TRANSFORM)
    source = source_of(tiny_backbone, dataset_str, TRANSFORM, torch.float32)
    found = extract_to_store(tmp_path, tiny_backbone, dataset, source, n_last_blocks=0, num_workers=0)
    assert found.names == ["cls"]


@pytest.fixture(scope="module")
def folder(tiny_case, tmp_path_factory):
    """Stores of the training and the validation images, for k-NN and linear and for logistic regression."""
    folder = tmp_path_factory.mktemp("features")
    for size in ("256", "224"):
        for name, dataset in (("train", tiny_case.train), ("val", tiny_case.val)):
            main(
                get_args_parser().parse_args(
                    options(tiny_case, folder / f"{name}{size}", "--resize-size", size, "--dataset", dataset)
                )
            )
    return folder


COMPUTED = {
    "autocast_dtype": torch.float32
}  # what a CPU makes of the config's float16, by which stores are known


def test_k_nn_with_stored_features_is_k_nn_with_images(
    folder, tiny_case, tiny_backbone, tmp_path, monkeypatch, caplog
):
    strings = (tiny_case.train, tiny_case.val)
    options = {"nb_knn": [3, 9], "num_workers": 0, "n_per_class_list": [-1, 5], "n_tries": 2, **COMPUTED}
    plain = eval_knn_with_model(tiny_backbone, str(tmp_path), *strings, **options)
    monkeypatch.setattr(tiny_backbone, "forward_features", None)  # nothing may be computed
    with caplog.at_level(logging.INFO, logger="dinov2"):
        stored = eval_knn_with_model(tiny_backbone, str(tmp_path), *strings, **options, features=str(folder))
    assert stored == plain
    assert f'features of "{tiny_case.val}" are read from "{folder}/val256"; no image is' in caplog.text
    summary = json.loads((tmp_path / "results_eval_knn_summary.json").read_text())
    assert summary["features"] == str(folder)
    assert summary["classes"] == ["connective", "inflammatory", "neoplastic"]


def test_logistic_regression_with_stored_features(folder, tiny_case, tiny_backbone, monkeypatch):
    options = {"single_C": 1.0, **COMPUTED}
    plain = eval_log_regression_with_model(tiny_backbone, tiny_case.train, tiny_case.val, **options)
    monkeypatch.setattr(tiny_backbone, "forward_features", None)
    stored = eval_log_regression_with_model(
        tiny_backbone, tiny_case.train, tiny_case.val, **options, features=str(folder)
    )
    assert stored == plain


def test_tokens_are_the_stored_columns():
    rows = torch.arange(24.0).view(2, 12)
    tokens = StoredTokens(torch.device("cpu"), 3)(rows)
    assert [cls_token[0].tolist() for _, cls_token in tokens] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert tokens[-1][0].mean(dim=1)[1].tolist() == [21, 22, 23]


def other_backbone(**changes):
    torch.manual_seed(1)
    options = {
        "patch_size": 32,
        "img_size": 224,
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 3,
        "init_values": 1.0,
    }
    return vit_tiny(**(options | changes)).eval()


@pytest.mark.parametrize("changes", [{}, {"embed_dim": 96}], ids=["other weights", "another width"])
def test_a_store_of_another_model_is_refused(folder, tiny_case, tmp_path, changes):
    with pytest.raises(
        DatasetError, match=r"train256\" is of another model \(weights_sha256 .*leave out --features"
    ):
        eval_knn_with_model(
            other_backbone(**changes),
            str(tmp_path),
            tiny_case.train,
            tiny_case.val,
            [3],
            features=str(folder),
            **COMPUTED,
        )


def test_stores_of_other_things_are_refused(folder, tiny_case, tiny_backbone, tmp_path):
    run = lambda train, **options: eval_knn_with_model(  # noqa: E731
        tiny_backbone,
        str(tmp_path),
        train,
        tiny_case.val,
        [3],
        **({"features": str(folder)} | COMPUTED | options),
    )
    with pytest.raises(DatasetError, match="no feature store of the dataset .*labels=folders"):
        run(f"{tiny_case.train}:labels=folders")
    with pytest.raises(DatasetError, match="another transform of the images .*Resize.size=230"):
        run(tiny_case.train, transform=make_classification_eval_transform(resize_size=230))
    with pytest.raises(DatasetError, match="another number format of the model .float32, not float16"):
        run(tiny_case.train, autocast_dtype=torch.half)
    with pytest.raises(DatasetError, match="no feature store of the dataset .* it holds nothing"):
        run(tiny_case.train, features=str(tmp_path))


def test_a_changed_dataset_and_damaged_stores_are_refused(folder, tiny_case, tiny_backbone, tmp_path):
    images, features = tmp_path / "train", tmp_path / "features"
    shutil.copytree(tiny_case.train.removeprefix("ImageFolder:root="), images)
    shutil.copytree(folder, features)
    described = json.loads((features / "train256" / "store.json").read_text())
    dataset_str = f"ImageFolder:root={images}"
    (features / "train256" / "store.json").write_text(json.dumps(described | {"dataset": dataset_str}))

    def run():
        return eval_knn_with_model(
            tiny_backbone, str(tmp_path), dataset_str, tiny_case.val, [3], features=str(features), **COMPUTED
        )

    run()
    (images / "neoplastic" / "0.png").rename(images / "connective" / "100.png")
    with pytest.raises(DatasetError, match="so the dataset has changed since"):
        run()
    np.save(features / "train256" / "cls.npy", np.zeros((3, 48)))
    with pytest.raises(DatasetError, match=r"shape \[3, 48\], not \[33, 48\]"):
        run()
    (features / "train256" / "cls.npy").write_bytes(b"")
    with pytest.raises(DatasetError, match="cls.npy.* cannot be read"):
        run()
    (features / "train256" / "store.json").write_text(json.dumps(described | {"format_version": 9}))
    with pytest.raises(DatasetError, match="format version 9, this program reads 1"):
        run()
    (features / "train256" / "store.json").write_text("{")
    with pytest.raises(DatasetError, match="is not a feature store"):
        run()


def test_a_folder_with_other_features_is_left_alone(store, tiny_case, tiny_backbone, tmp_path):
    shutil.copytree(store.folder, tmp_path / "copy")
    with pytest.raises(DatasetError, match="holds a feature store of another model"):
        extract(tiny_case, other_backbone(), tmp_path / "copy")
    with pytest.raises(DatasetError, match="of other features .dtype float32, not float16"):
        extract(tiny_case, tiny_backbone, tmp_path / "copy", dtype="float16")
    assert contents(tmp_path / "copy") == contents(store.folder)


def test_unusable_options_and_features(tiny_case, tiny_backbone, tmp_path):
    with pytest.raises(ConfigError, match='number format of stored features is "int8"'):
        extract(tiny_case, tiny_backbone, tmp_path, dtype="int8")
    with pytest.raises(ConfigError, match="chunk size of the extraction is 0"):
        extract(tiny_case, tiny_backbone, tmp_path, chunk_size=0)
    with pytest.raises(ConfigError, match="last 9 blocks are wanted, but the model has 4"):
        extract(tiny_case, tiny_backbone, tmp_path, n_last_blocks=9)
    broken = other_backbone()
    broken.norm.weight.data[0] = torch.nan
    with pytest.raises(
        WeightsError, match="of 4 of 4 images are not finite in float32, the first is sample 0"
    ):
        extract(tiny_case, broken, tmp_path)


def test_the_checksum_knows_weights_not_files():
    whole, chunked = other_backbone(), other_backbone(block_chunks=2)
    assert weights_sha256(whole) == weights_sha256(chunked)
    whole.mask_token.data += 1
    assert weights_sha256(whole) == weights_sha256(chunked)
    whole.norm.bias.data[3] += 1e-6
    assert weights_sha256(whole) != weights_sha256(chunked)


def test_errors_of_the_main_process_reach_all():
    def failing():
        raise DatasetError("no")

    with pytest.raises(DatasetError, match="no"):
        feature_store.on_main_process(failing)
    assert feature_store.on_main_process(lambda: 3) == 3
