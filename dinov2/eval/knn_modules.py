"""Modules of the k-NN evaluation: classifiers that processes share, and the choice of few-shot samples.

Letters: B images per process, D width, C classes, W processes, S training samples.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dinov2 import distributed
from dinov2.eval.knn_protocols import KnnProtocol
from dinov2.eval.neighbor_search import find_neighbors, merge_neighbors
from dinov2.eval.neighbors import usable_ks, vote
from dinov2.eval.utils import all_gather_and_flatten

logger = logging.getLogger("dinov2")

PLAIN = KnnProtocol()
CLASS_MEANS = "class means"
BLOCK = 65_536  # rows whose float64 copy is held at a time


class KnnModule(nn.Module):
    """Scores features by their nearest training features, each process searching its share of them.

    Args:
        train_features: All training features, the same on every process; of unit length where the protocol
            compares by the cosine without centring.
        train_labels: Their class indices.
        nb_knn: The numbers of neighbours to score with; beyond the training set all of it votes.
        T: Temperature of the softmax over similarities.
        device: Where to search.
        num_classes: C.
        protocol: How to compare and vote; its ``nb_knn`` and ``resize_size`` are of no concern here.
    """

    def __init__(
        self,
        train_features: Tensor,
        train_labels: Tensor,
        nb_knn: Sequence[int],
        T: float,
        device: torch.device | str,
        num_classes: int = 1000,
        *,
        protocol: KnnProtocol = PLAIN,
    ) -> None:
        super().__init__()
        self.nb_knn = usable_ks(nb_knn, len(train_features))
        self.max_k = self.nb_knn[-1]
        self.T = T
        self.num_classes = num_classes
        self.protocol = protocol
        self.train_labels = train_labels.to(device)
        # The Euclidean distance does not change when all is shifted, and is more exact near the origin.
        centers = protocol.center or protocol.metric == "euclidean"
        self.mean = train_features.float().mean(dim=0).to(device) if centers else None
        size, rank = distributed.get_global_size(), distributed.get_global_rank()
        shares = train_features.tensor_split(size)
        self.first_row = sum(len(share) for share in shares[:rank])
        self.train_features = self._as_stored(self._prepare(shares[rank].to(device)))
        self.class_means = None
        if protocol.class_means:
            self.class_means = self._class_means(train_features.to(device))

    @property
    def keys(self) -> list[int | str]:
        """What :meth:`forward` returns scores by."""
        return [*self.nb_knn, *([CLASS_MEANS] if self.protocol.class_means else [])]

    def forward(self, features_rank: Tensor) -> dict[int | str, Tensor]:
        """Return the class scores (B, C) of features (B, D) for every number of neighbours.

        With class means, those are scored under :data:`CLASS_MEANS`. All processes must call this together,
        with equally many features.
        """
        size, rank = distributed.get_global_size(), distributed.get_global_rank()
        queries = self._prepare(features_rank)
        similarities, rows = self._search_share(all_gather_and_flatten(queries))  # (W*B, max_k)
        # Per process that searched, its neighbours of all queries; from each only those of this process's.
        found = zip(
            all_gather_and_flatten(similarities).view(size, size, -1, self.max_k)[:, rank],
            all_gather_and_flatten(rows).view(size, size, -1, self.max_k)[:, rank],
            strict=True,
        )
        similarities, rows = merge_neighbors(list(found), self.max_k)
        if self.protocol.vote == "uniform":
            similarities = torch.zeros_like(similarities)
        scores = vote(similarities, self.train_labels[rows], self.nb_knn, self.T, self.num_classes)
        if self.class_means is not None:
            scores |= {CLASS_MEANS: self._score_class_means(queries)}
        return scores

    def _prepare(self, features: Tensor) -> Tensor:
        if self.mean is None:
            return features
        features = features.float() - self.mean
        return features if self.protocol.metric == "euclidean" else functional.normalize(features, dim=1)

    def _as_stored(self, features: Tensor) -> Tensor:
        """Return features whose dot product with a query, which gets a 1 appended, orders as the metric."""
        if self.protocol.metric == "cosine":
            return features
        return torch.cat([features, -features.square().sum(dim=1, keepdim=True) / 2], dim=1)

    def _search_share(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Find neighbours in this process's rows; a share of fewer than ``max_k`` is filled up with -inf."""
        if self.protocol.metric == "euclidean":
            queries = torch.cat([queries, torch.ones_like(queries[:, :1])], dim=1)
        similarities = torch.full((len(queries), self.max_k), -torch.inf, device=queries.device)
        rows = torch.zeros_like(similarities, dtype=torch.int64)
        k = min(self.max_k, len(self.train_features))
        if k:
            similarities[:, :k], rows[:, :k] = find_neighbors(self.train_features, queries, k)
        return similarities, rows + self.first_row

    def _class_means(self, train_features: Tensor) -> Tensor:
        """Return the mean of every class (C, D), NaN for a class without samples."""
        sums = torch.zeros(
            self.num_classes, train_features.shape[1], dtype=torch.float64, device=train_features.device
        )
        for features, labels in zip(train_features.split(BLOCK), self.train_labels.split(BLOCK), strict=True):
            sums.index_add_(0, labels, self._prepare(features).double())
        return (sums / self.train_labels.bincount(minlength=self.num_classes)[:, None]).float()

    def _score_class_means(self, queries: Tensor) -> Tensor:
        """Return the softmax of minus half the squared distances to the class means (B, C)."""
        means = self.class_means.double()
        # Without the query's own square, which the softmax takes out.
        similarities = queries.double() @ means.T - means.square().sum(dim=1) / 2
        return similarities.nan_to_num(nan=-torch.inf).softmax(dim=1)


class DictKeysModule(nn.Module):
    """Postprocessor that follows ``keys`` down nested outputs."""

    def __init__(self, keys: Sequence[Any]) -> None:
        super().__init__()
        self.keys = tuple(keys)

    def forward(self, features_dict: Any, targets: Tensor) -> dict[str, Tensor]:
        """Return the scores found and the targets, as metrics take them."""
        for key in self.keys:
            features_dict = features_dict[key]
        return {"preds": features_dict, "target": targets}


class ModuleDictWithForward(nn.ModuleDict):
    """Modules by name that are all given the same input."""

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the modules' outputs by name."""
        return {name: module(*args, **kwargs) for name, module in self.items()}


def create_class_indices_mapping(labels: Tensor) -> dict[int, Tensor]:
    """Return the positions of every class in ``labels``, by ascending class."""
    return {int(label): (labels == label).nonzero().squeeze(1) for label in labels.unique()}


def filter_train(mapping: dict[int, Tensor], n_per_class: int, seed: int) -> Tensor:
    """Return the positions of up to ``n_per_class`` random samples of every class, class by class."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for indices in mapping.values():
        order = torch.randperm(len(indices), generator=generator)[:n_per_class]
        chosen.append(indices[order.to(indices.device)])
    return torch.cat(chosen)


def create_module_dict(
    *,
    module: Callable[..., KnnModule],
    n_per_class_list: Sequence[int],
    n_tries: int,
    nb_knn: Sequence[int],
    train_features: Tensor,
    train_labels: Tensor,
) -> ModuleDictWithForward:
    """Return the k-NN modules by name (``full`` or ``<n> per class``), then by try.

    Args:
        module: Makes a module from ``train_features``, ``train_labels`` and ``nb_knn``.
        n_per_class_list: Training samples per class; -1 means all, and one try.
        n_tries: Random choices of the samples, drawn with the seeds 0, 1, ...
    """
    mapping = create_class_indices_mapping(train_labels)
    modules: dict[str, ModuleDictWithForward] = {}
    for n_per_class in n_per_class_list:
        if n_per_class < 0:
            full = module(train_features=train_features, train_labels=train_labels, nb_knn=nb_knn)
            modules["full"] = ModuleDictWithForward({"1": full})
            continue
        few = {label: len(rows) for label, rows in mapping.items() if len(rows) < n_per_class}
        if few:
            label, count = next(iter(few.items()))
            logger.warning(
                '"%d per class" takes all samples of %d of %d classes, which have fewer: class %s has %d',
                *(n_per_class, len(few), len(mapping), label, count),
            )
        tries = {}
        for seed in range(n_tries):
            rows = filter_train(mapping, n_per_class, seed)
            tries[str(seed)] = module(
                train_features=train_features[rows],
                train_labels=train_labels[rows],
                nb_knn=sorted({k for k in nb_knn if k <= n_per_class} | {n_per_class}),
            )
        modules[f"{n_per_class} per class"] = ModuleDictWithForward(tries)
    return ModuleDictWithForward(modules)
