"""Exact neighbours against scikit-learn, the tie rule, and the votes recorded from DINOv2."""

import logging

import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional

from dinov2.errors import DatasetError
from dinov2.eval import neighbor_search
from dinov2.eval.neighbor_search import find_neighbors, merge_neighbors
from dinov2.eval.neighbors import knn_predict, vote
from tests.conftest import load_golden_json, load_golden_tensors


@pytest.fixture(scope="module")
def golden():
    return load_golden_tensors("knn.safetensors")


def _clusters(rows: int, seed: int, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(6, width, generator=torch.Generator().manual_seed(99))
    rows = centers[torch.arange(rows) % 6] + 0.5 * torch.randn(rows, width, generator=generator)
    return functional.normalize(rows, dim=1)


@pytest.mark.parametrize("run", load_golden_json("knn.json")["runs"], ids=lambda run: run["name"])
def test_votes_and_predictions_equal_the_recorded_ones(golden, run):
    ks = run["nb_knn"]
    similarities, rows = find_neighbors(golden["train_features"], golden["test_features"], max(ks))
    votes = vote(similarities, golden["train_labels"][rows], ks, run["T"], num_classes=7)
    for k in ks:
        name = f"{run['name']}.k{k}"
        torch.testing.assert_close(votes[k], golden[f"{name}.probs"], rtol=1e-4, atol=1e-6)
        assert torch.equal(votes[k].argmax(dim=1), golden[f"{name}.pred"])


def test_knn_predict_normalises_raw_features(golden):
    scores = knn_predict(
        golden["train_features_raw"],
        golden["train_labels"],
        golden["test_features_raw"],
        k=20,
        temperature=0.07,
    )
    assert scores.shape == (105, 7)
    torch.testing.assert_close(scores, golden["run0.k20.probs"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(105))


@pytest.mark.parametrize("k", [1, 7, 150])
def test_neighbors_equal_scikit_learn_across_blocks(monkeypatch, k):
    monkeypatch.setattr(neighbor_search, "QUERY_BLOCK", 16)
    monkeypatch.setattr(neighbor_search, "STORED_BLOCK", 70)
    stored, queries = _clusters(403, seed=0), _clusters(53, seed=1)
    similarities, rows = find_neighbors(stored, queries, k)
    oracle = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(stored.double().numpy())
    distances, indices = oracle.kneighbors(queries.double().numpy())
    assert (rows.numpy() == indices).mean() > 0.999  # float64 orders the closest pairs differently
    torch.testing.assert_close(similarities.double(), 1 - torch.from_numpy(distances), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 10, 37, 60])
def test_equal_similarities_are_ordered_by_row(monkeypatch, k):
    monkeypatch.setattr(neighbor_search, "STORED_BLOCK", 13)
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(-1, 2, (60, 3), generator=generator).float()  # small integers: exact, many ties
    queries = torch.randint(-1, 2, (20, 3), generator=generator).float()
    similarities, rows = find_neighbors(stored, queries, k)
    for query, found in zip(queries, rows, strict=True):
        exact = sorted(range(60), key=lambda row: (-float(stored[row] @ query), row))[:k]
        assert found.tolist() == exact
    torch.testing.assert_close(similarities, (queries @ stored.T).gather(1, rows), rtol=0, atol=0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_leaving_out_groups_of_columns_changes_nothing(monkeypatch, k, ties):
    monkeypatch.setattr(neighbor_search, "STORED_BLOCK", 256)
    stored, queries = _clusters(1100, seed=0), _clusters(23, seed=1)
    if ties:
        stored, queries = (part.mul(2).round() for part in (stored, queries))
    monkeypatch.setattr(neighbor_search, "GROUP", 1000)  # wider than a block: never left out
    whole = find_neighbors(stored, queries, k)
    monkeypatch.setattr(neighbor_search, "GROUP", 4)
    looked_at, top = [], neighbor_search._top
    monkeypatch.setattr(
        neighbor_search,
        "_top",
        lambda similarities, k: looked_at.append(similarities.shape[1]) or top(similarities, k),
    )
    found = find_neighbors(stored, queries, k)
    assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])
    assert ties or min(looked_at) < 100


@pytest.fixture
def grouped(monkeypatch):
    """Form groups of few rows already; return what is formed."""
    for name, value in (("MANY_ROWS", 100), ("MANY_QUERIES", 20), ("NUM_GROUPS", 16), ("QUERY_BLOCK", 8)):
        monkeypatch.setattr(neighbor_search, name, value)
    formed, groups = [], neighbor_search._Groups
    monkeypatch.setattr(
        neighbor_search, "_Groups", lambda stored: formed.append(groups(stored)) or formed[-1]
    )
    return formed


def found_plainly(stored, queries, k):
    blocks = [find_neighbors(stored, batch, k) for batch in queries.split(19)]  # too few for groups
    return tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 4, 20, 150])
def test_leaving_out_groups_of_rows_changes_nothing(grouped, k, metric):
    stored, queries = _clusters(1100, seed=0), _clusters(130, seed=1)
    if metric == "euclidean":
        stored = torch.cat([stored, -stored.square().sum(dim=1, keepdim=True) / 2], dim=1)
        queries = torch.cat([queries, torch.ones(len(queries), 1)], dim=1)
    whole = found_plainly(stored, queries, k)
    assert not grouped
    found = find_neighbors(stored, queries, k)
    assert (found[1] == whole[1]).float().mean() > 0.999  # products of other shapes round differently
    torch.testing.assert_close(found[0], whole[0])
    (groups,) = grouped
    if metric == "cosine" and k < 150:  # else bounds are too wide, or groups too small
        assert groups.asked == 130 and 0 < groups.looked_at < 0.4 * 130 * len(stored)


@pytest.mark.parametrize("k", [1, 3, 10, 60])
def test_equal_similarities_are_ordered_by_row_in_groups_of_rows_too(grouped, k):
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(-1, 2, (300, 3), generator=generator).float()  # small integers: exact, many ties
    queries = torch.randint(-1, 2, (40, 3), generator=generator).float()
    whole = found_plainly(stored, queries, k)
    found = find_neighbors(stored, queries, k)
    assert len(grouped) == 1
    assert torch.equal(found[0], whole[0]) and torch.equal(found[1], whole[1])


def test_groups_are_given_up_where_nothing_can_be_left_out(grouped):
    generator = torch.Generator().manual_seed(0)
    stored, queries = (functional.normalize(torch.randn(n, 64, generator=generator)) for n in (400, 90))
    whole = found_plainly(stored, queries, 5)
    found = find_neighbors(stored, queries, 5)
    assert grouped[0].asked < 30
    torch.testing.assert_close(found[0], whole[0])


def test_shards_merge_to_the_whole():
    stored, queries = _clusters(41, seed=2), _clusters(9, seed=3)
    whole = find_neighbors(stored, queries, 12)
    parts = []
    for start, stop in ((0, 30), (30, 41)):  # the second part has fewer rows than neighbours are asked for
        similarities, rows = find_neighbors(stored[start:stop], queries, 12)
        parts.append((similarities, rows + start))
    merged = merge_neighbors(parts, 12)
    assert torch.equal(merged[1], whole[1])
    torch.testing.assert_close(merged[0], whole[0])


def test_k_above_the_training_set_is_clamped_with_a_warning(golden, caplog):
    train, labels = golden["train_features"][:9], golden["train_labels"][:9]
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        clamped = knn_predict(train, labels, golden["test_features"], k=20)
    assert "k = 20 uses all 9 training samples" in caplog.text
    assert torch.equal(clamped, knn_predict(train, labels, golden["test_features"], k=9))


def test_unusable_labels_are_named():
    features = torch.eye(3)
    with pytest.raises(DatasetError, match="contain -1"):
        knn_predict(features, torch.tensor([0, -1, 1]), features, k=1)
    with pytest.raises(DatasetError, match="no samples"):
        knn_predict(features[:0], torch.zeros(0, dtype=torch.long), features, k=1)


def test_search_ignores_autocast_and_restores_the_matmul_precision():
    stored, queries = _clusters(50, seed=4), _clusters(5, seed=5)
    exact = find_neighbors(stored, queries, 5)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = find_neighbors(stored, queries, 5)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found[0], exact[0])
