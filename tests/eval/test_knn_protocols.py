"""k-NN by other votes and metrics, class means, the protocols by name, and a test set scored once."""

import json
import logging

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from dinov2.errors import ConfigError
from dinov2.eval.knn import eval_knn_with_model, get_args_parser, main
from dinov2.eval.knn_modules import CLASS_MEANS, KnnModule
from dinov2.eval.knn_protocols import PROTOCOLS, KnnProtocol, knn_protocol
from tests.distributed.launch import run_in_processes

CLASSES = 4


def clusters(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features far from the origin, of different lengths, in overlapping clusters."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(CLASSES, 12, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    noise = torch.randn(rows, 12, generator=generator)
    return centers[labels] + noise + 5, labels


TRAIN, QUERIES = clusters(301, 0), clusters(60, 1)


def scores(protocol: KnnProtocol, nb_knn=(1, 7, 20)) -> dict:
    module = KnnModule(*TRAIN, nb_knn, 0.07, "cpu", CLASSES, protocol=protocol)
    return module(QUERIES[0])


def centred() -> tuple[np.ndarray, np.ndarray]:
    moved = [part - TRAIN[0].double().mean(dim=0) for part in (TRAIN[0], QUERIES[0])]
    return tuple(torch.nn.functional.normalize(part, dim=1).numpy() for part in moved)


@pytest.mark.parametrize("k", [1, 7, 20])
def test_uni_is_scikit_learns_vote_on_centred_unit_vectors(k):
    stored, queries = centred()
    oracle = KNeighborsClassifier(k, algorithm="brute").fit(stored, TRAIN[1])
    votes = scores(PROTOCOLS["uni"])[k].numpy()
    np.testing.assert_allclose(
        votes / votes.sum(axis=1, keepdims=True), oracle.predict_proba(queries), atol=1e-6
    )
    assert (votes.argmax(axis=1) == oracle.predict(queries)).all()


def test_class_means_are_scikit_learns_nearest_centroids():
    stored, queries = centred()
    oracle = NearestCentroid().fit(stored, TRAIN[1])
    found = scores(PROTOCOLS["uni"])[CLASS_MEANS]
    assert (found.argmax(dim=1).numpy() == oracle.predict(queries)).all()
    torch.testing.assert_close(found.sum(dim=1), torch.ones(60, dtype=torch.float64))
    absent = KnnModule(*TRAIN, [1], 0.07, "cpu", CLASSES + 1, protocol=PROTOCOLS["uni"])(QUERIES[0])
    torch.testing.assert_close(absent[CLASS_MEANS][:, :CLASSES], found)
    assert (absent[CLASS_MEANS][:, CLASSES] == 0).all()


@pytest.mark.parametrize("k", [1, 7, 20])
def test_euclidean_neighbours_are_scikit_learns(k):
    oracle = KNeighborsClassifier(k, algorithm="brute").fit(TRAIN[0].double().numpy(), TRAIN[1])
    votes = scores(KnnProtocol("uniform", metric="euclidean"))[k]
    assert (votes.argmax(dim=1).numpy() == oracle.predict(QUERIES[0].double().numpy())).all()


def test_on_unit_vectors_both_metrics_weigh_alike():
    stored, queries = (torch.nn.functional.normalize(part, dim=1) for part in (TRAIN[0], QUERIES[0]))
    found = [
        KnnModule(stored, TRAIN[1], [5, 20], 0.07, "cpu", CLASSES, protocol=KnnProtocol(metric=metric))(
            queries
        )
        for metric in ("cosine", "euclidean")
    ]
    for k in (5, 20):
        torch.testing.assert_close(found[0][k], found[1][k], rtol=1e-4, atol=1e-6)


def test_protocols_by_name():
    assert knn_protocol("dinov2") == KnnProtocol()
    assert knn_protocol("uni", vote="softmax", center=False, resize_size=None).resize_size == 224
    for name, changes, message in (
        ("unl", {}, r'protocol "unl" is not known .did you mean "uni"'),
        ("uni", {"vote": "soft"}, 'vote of k-NN is "soft"'),
        ("uni", {"metric": "l2"}, 'metric of k-NN is "l2".*: give cosine or euclidean'),
    ):
        with pytest.raises(ConfigError, match=message):
            knn_protocol(name, **changes)


def _command_line(case, folder, *more):
    main(get_args_parser().parse_args([*case.options(folder), "--bootstrap-draws", "0", *more]))


def summary_of(folder) -> dict:
    return json.loads((folder / "results_eval_knn_summary.json").read_text())


def test_the_command_line_takes_the_numbers_of_a_protocol(tiny_case, tmp_path, caplog):
    _command_line(tiny_case, tmp_path, "--protocol", "uni", "--test-dataset", tiny_case.train)
    found = summary_of(tmp_path)
    rows = [(row["role"], *row["setting"].values()) for row in found["results"]]
    assert rows[:2] == [("val", "full", 20), ("val", "full", "class means")]
    assert len(rows) == 3 and rows[2][0] == "test"
    values = [row["scores"]["macro_f1"] for row in found["results"][:2]]
    assert (
        rows[2][2] == [20, "class means"][values.index(max(values))]
    )  # the better one on the validation set
    assert "Resize(size=224" in found["protocol"]["transform"]
    assert found["protocol"]["temperature"] is None
    _command_line(
        tiny_case, tmp_path, "--protocol", "uni", "--nb_knn", "10", "20", "100", "200", "--no-class-means"
    )
    assert [row["setting"]["k"] for row in summary_of(tmp_path)["results"]] == [10, 20, 33]


def test_training_images_among_those_to_judge_by_are_warned_of(tiny_case, tiny_backbone, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        eval_knn_with_model(tiny_backbone, str(tmp_path), tiny_case.train, tiny_case.val, [1], num_workers=0)
        assert "LEAK" not in caplog.text
        eval_knn_with_model(
            tiny_backbone, str(tmp_path), tiny_case.train, tiny_case.train, [1], num_workers=0
        )
    assert "LEAK: all of the 33 validation images are in the training set, too (such as " in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_changes_nothing(tiny_case, tmp_path, processes):
    more = ("--protocol", "uni", "--n-per-class-list", "-1", "4", "--n-tries", "2")
    _command_line(tiny_case, tmp_path / "one", *more)
    run_in_processes(_command_line, tiny_case, tmp_path / "more", *more, world_size=processes)
    assert summary_of(tmp_path / "more") == summary_of(tmp_path / "one")


def test_many_tries_have_no_intervals(tiny_case, tiny_backbone, tmp_path):
    eval_knn_with_model(
        tiny_backbone,
        str(tmp_path),
        tiny_case.train,
        tiny_case.val,
        [2],
        num_workers=0,
        n_per_class_list=[2],
        n_tries=12,
    )
    (row,) = summary_of(tmp_path)["results"]
    assert row["tries"] == 12 and "intervals" not in row and row["standard_deviations"]["accuracy"] > 0
