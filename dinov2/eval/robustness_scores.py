"""How much features say of the tissue and how much of the centre it comes from.

Neighbours of a query are of four types: same label and same centre, SO: same label and other centre, OS:
other label and same centre, other label and other centre. Items of the query's own slide do not count.

The robustness index is that of PathoROB (Koemen et al. 2025, arXiv 2507.17845), CRoMa that of arXiv
2607.25497. Similarity is the cosine. Letters: n samples, D width, k neighbours, m per type.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dinov2.errors import DatasetError
from dinov2.eval.scores import DRAWS, interval

QUERY_BLOCK = 1024
DRAW_BLOCK = 20_000_000  # numbers drawn at a time
WORST_SHARE = 0.1


@dataclass(frozen=True)
class Origins:
    """Where samples come from, as numbers (n,) int64.

    Args:
        labels: What the tissue is.
        centers: Hospital or scanner.
        slides: Slide or patient, whose items are no neighbours of each other; None if it is not known.
    """

    labels: Tensor
    centers: Tensor
    slides: Tensor | None = None

    def check(self) -> None:
        """Stop where nothing can be compared.

        Raises:
            DatasetError: All samples are of one label or of one centre.
        """
        for name, values in (("label", self.labels), ("centre", self.centers)):
            if len(values.unique()) < 2:
                raise DatasetError(
                    f"all {len(values)} samples have one {name}: the robustness index compares labels with "
                    f"centres and needs two {name}s or more"
                )


def robustness(
    features: Tensor, origins: Origins, k: int, m: int = 5, draws: int = DRAWS, seed: int = 0
) -> dict[str, float | list[float] | None]:
    """Return the robustness index and CRoMa of features.

    Args:
        features: (n, D), any scale.
        origins: Of the samples.
        k: Neighbours of the robustness index, all there are if fewer.
        m: Neighbours of each type of CRoMa, all there are if fewer.
        draws: Bootstrap draws over queries; 0 for no intervals.

    Returns:
        ``robustness_index`` 0..1 (above 0.5 the tissue dominates), ``ri_support`` (the share of queries with
        a neighbour that counts), ``croma_median``, ``croma_worst_tenth`` (the mean of the lowest tenth) and
        ``croma_share_not_positive``, ``croma_support``, and ``robustness_index_interval``,
        ``croma_median_interval``. NaN where no query counts.

    Raises:
        DatasetError: See :meth:`Origins.check`.
    """
    origins.check()
    counts, croma = _per_query(functional.normalize(features.float(), dim=1), origins, k, m)
    defined = croma[~np.isnan(croma)]
    found = {
        "robustness_index": _ratio(counts.sum(axis=0)),
        "ri_support": float((counts.sum(axis=1) > 0).mean()),
        "croma_median": float(np.median(defined)) if len(defined) else float("nan"),
        "croma_worst_tenth": _worst(defined),
        "croma_share_not_positive": float((defined <= 0).mean()) if len(defined) else float("nan"),
        "croma_support": len(defined) / len(croma),
    }
    if draws:
        generator = np.random.default_rng(seed)
        indices, medians = [], []
        block = max(1, DRAW_BLOCK // len(counts))
        for start in range(0, draws, block):
            rows = generator.integers(0, len(counts), size=(min(block, draws - start), len(counts)))
            indices += [_ratio(total) for total in counts[rows].sum(axis=1)]
            drawn = croma[rows]
            medians += [np.median(row[~np.isnan(row)]) for row in drawn if not np.isnan(row).all()]
        found["robustness_index_interval"] = interval(torch.tensor(indices, dtype=torch.float64))
        found["croma_median_interval"] = interval(torch.tensor(np.array(medians)))
    return found


def _ratio(counts: np.ndarray) -> float:
    return float(counts[0] / counts.sum()) if counts.sum() else float("nan")


def _worst(values: np.ndarray) -> float:
    if not len(values):
        return float("nan")
    return float(np.sort(values)[: max(1, round(WORST_SHARE * len(values)))].mean())


def _per_query(unit: Tensor, origins: Origins, k: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how many of the k neighbours are SO and OS (n, 2), and CRoMa (n,), NaN where it is undefined."""
    counts, croma = [], []
    labels, centers = origins.labels.to(unit.device), origins.centers.to(unit.device)
    # Without slides every sample is its own.
    slides = torch.arange(len(unit)) if origins.slides is None else origins.slides
    slides = slides.to(unit.device)
    for rows in torch.arange(len(unit), device=unit.device).split(QUERY_BLOCK):
        same_label = labels[rows, None] == labels
        same_center = centers[rows, None] == centers
        usable = (slides[rows, None] != slides) & (rows[:, None] != torch.arange(len(unit)).to(rows))
        similarity = (unit[rows] @ unit.T).masked_fill(~usable, -torch.inf)
        types = [same_label & ~same_center & usable, ~same_label & same_center & usable]  # SO, OS
        values, nearest = similarity.sort(dim=1, descending=True, stable=True)
        nearest, values = nearest[:, :k], values[:, :k]
        near = [kind.gather(1, nearest) & values.isfinite() for kind in types]
        counts.append(torch.stack([kind.sum(dim=1) for kind in near], dim=1))
        d_so, d_os = (_mean_distance(similarity, kind, m) for kind in types)
        croma.append((d_os - d_so) / (d_os + d_so).clamp(min=1e-12))
    return torch.cat(counts).cpu().numpy(), torch.cat(croma).cpu().numpy()


def _mean_distance(similarity: Tensor, kind: Tensor, m: int) -> Tensor:
    """Return the mean cosine distance to the m nearest samples of a type (b,), NaN where there is none."""
    values = similarity.masked_fill(~kind, -torch.inf).topk(min(m, similarity.shape[1]), dim=1).values
    present = values.isfinite()
    distance = torch.where(present, (1 - values).clamp(min=0), 0.0).double().sum(dim=1)
    return distance / torch.where(present.any(dim=1), present.sum(dim=1), torch.nan)
