"""Robustness: the index and CRoMa on constructed features, and the changes of stain and scanner."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.errors import DatasetError
from dinov2.eval import robustness as command
from dinov2.eval.perturbations import PERTURBATIONS, PerturbedDataset
from dinov2.eval.robustness import Unchanged, compare, mean_random_cosine, read_origins
from dinov2.eval.robustness_scores import Origins, robustness
from tests.conftest import REAL_DATA
from tests.distributed.launch import run_in_processes


def constructed(by: str):
    """Forty samples of two labels and two centres, near one direction per label or per centre."""
    generator = torch.Generator().manual_seed(0)
    labels, centers = torch.arange(40) % 2, torch.arange(40) // 20
    group = labels if by == "label" else centers
    features = torch.eye(6)[group] + 0.01 * torch.randn(40, 6, generator=generator)
    return features, Origins(labels, centers)


def test_features_of_the_label_alone_and_of_the_centre_alone():
    by_label = robustness(*constructed("label"), k=11, draws=50)
    assert by_label["robustness_index"] == 1 and by_label["robustness_index_interval"] == [1, 1]
    assert by_label["croma_median"] > 0.9 and by_label["croma_share_not_positive"] == 0
    by_center = robustness(*constructed("centre"), k=11, draws=50)
    assert by_center["robustness_index"] == 0 and by_center["ri_support"] == 1
    assert by_center["croma_median"] < -0.9 and by_center["croma_share_not_positive"] == 1


def brute_force(features, labels, centers, slides, k, m):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    counts, croma = np.zeros((len(unit), 2)), []
    for i in range(len(unit)):
        others = [j for j in range(len(unit)) if slides[j] != slides[i]]
        others.sort(key=lambda j: -(unit[i] @ unit[j]))
        so = [j for j in others if labels[j] == labels[i] and centers[j] != centers[i]]
        os = [j for j in others if labels[j] != labels[i] and centers[j] == centers[i]]
        counts[i] = len(set(others[:k]) & set(so)), len(set(others[:k]) & set(os))
        if so and os:
            d_so, d_os = (np.mean([1 - unit[i] @ unit[j] for j in part[:m]]) for part in (so, os))
            croma.append((d_os - d_so) / (d_os + d_so))
    total = counts.sum(axis=0)
    lowest = np.sort(croma)[: max(1, round(len(croma) / 10))].mean()
    support = (counts.sum(axis=1) > 0).mean()
    return total[0] / total.sum(), support, np.median(croma), lowest, len(croma) / len(unit)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_equal_to_brute_force_whatever_the_scale(scale):
    generator = np.random.default_rng(3)
    features = generator.normal(size=(70, 8))
    labels, centers = generator.integers(0, 3, 70), generator.integers(0, 4, 70)
    slides = centers * 100 + generator.integers(0, 3, 70)
    labels[centers == 3] = 0  # no sample of another label here: CRoMa is not defined for them
    origins = Origins(*map(torch.from_numpy, (labels, centers, slides)))
    found = robustness(torch.from_numpy(features * scale), origins, k=7, m=3, draws=0)
    names = ("robustness_index", "ri_support", "croma_median", "croma_worst_tenth", "croma_support")
    expected = brute_force(features, labels, centers, slides, 7, 3)
    assert [found[name] for name in names] == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < 1


def test_the_interval_is_of_the_seed_and_covers_the_index():
    features, origins = constructed("label")
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    first, again = (robustness(features, origins, k=5, draws=200, seed=4) for _ in range(2))
    assert first == again
    low, high = first["robustness_index_interval"]
    assert low < first["robustness_index"] < high


def test_one_centre_is_refused():
    with pytest.raises(DatasetError, match="one centre"):
        robustness(torch.randn(4, 3), Origins(torch.arange(4), torch.zeros(4)), k=2)


def test_comparison_of_pairs_with_other_rules():
    generator = torch.Generator().manual_seed(0)
    original = torch.nn.functional.normalize(torch.randn(30, 8, generator=generator), dim=1)
    same = compare(Unchanged.of(original, torch.arange(30) % 2), original)
    assert same["mean_cosine"] == pytest.approx(1) and same["retrieval"] == 1 and same["flips"] == 0
    assert same["above_random"] == pytest.approx(1)
    assert same["accuracy"] == same["accuracy_unchanged"]
    shifted = compare(Unchanged.of(original), original.roll(1, dims=0))
    assert shifted["retrieval"] == 0 and shifted["accuracy"] is None
    table = (original @ original.T).numpy()
    assert mean_random_cosine(original) == pytest.approx(table[~np.eye(30, dtype=bool)].mean(), abs=1e-6)


def test_votes_leave_out_the_own_tile():
    # Two far pairs of different labels: without its own vote every tile votes wrong.
    unit = torch.tensor([[1.0, 0.0], [0.999, 0.0447], [0.0, 1.0], [0.0447, 0.999]])
    predicted = command.vote_of_others(unit, unit, torch.tensor([0, 1, 0, 1]))
    assert predicted.tolist() == [1, 0, 1, 0]


class Tiles:
    """Real windows, by number."""

    def __init__(self):
        self.picture = Image.open(REAL_DATA / "hgsc_nest.jpg").convert("RGB")

    def __getitem__(self, index):
        return self.picture.crop((64 * index, 0, 64 * index + 64, 64)), None


@pytest.mark.parametrize("perturbation", PERTURBATIONS, ids=lambda p: f"{p.kind} {p.strength}")
def test_changes_depend_on_seed_and_sample_alone(perturbation):
    data = PerturbedDataset(Tiles(), np.array([2, 5]), perturbation, np.asarray)
    first, again = data[1][0], PerturbedDataset(Tiles(), np.array([5]), perturbation, np.asarray)[0][0]
    assert np.array_equal(first, again)
    plain = np.asarray(Tiles()[5][0])
    assert first.shape == plain.shape and first.dtype == np.uint8
    assert not np.array_equal(first, plain)


def test_stronger_changes_move_pixels_more():
    plain = np.asarray(Tiles()[5][0]).astype(float)
    for kind in ("stain", "blur", "jpeg", "resolution"):
        moved = [
            np.abs(np.asarray(p(Tiles()[5][0], 0, 5)) - plain).mean() for p in PERTURBATIONS if p.kind == kind
        ]
        assert moved == sorted(moved), kind


def test_stain_leaves_glass_as_it_is():
    glass = Image.new("RGB", (8, 8), (255, 255, 255))
    assert np.asarray(PERTURBATIONS[2](glass, 0, 0)).min() == 255


def test_centres_by_path_end_and_by_number(tmp_path):
    table = tmp_path / "centers.csv"
    table.write_text("sample,center,slide\na/1.png,x,s1\n1,y,s2\n")
    assert read_origins(table, ["/data/a/1.png", "/data/b/1.tif"], [0, 1]) == (["x", "y"], ["s1", "s2"])
    with pytest.raises(DatasetError, match="lack 1 of 1 samples, such as /data/c.png"):
        read_origins(table, ["/data/c.png"], [7])
    table.write_text("sample,hospital\n1,x\n")
    with pytest.raises(DatasetError, match='columns sample, hospital: give a CSV file with the columns "sa'):
        read_origins(table, ["1"], [1])


def test_centres_that_say_two_things_of_a_sample_or_one_of_two_are_refused(tmp_path):
    table = tmp_path / "centers.csv"
    table.write_text("sample,center\n1.png,x\n2.png,x\n1.png,x\n")
    assert read_origins(table, ["/a/1.png", "/a/2.png"], [0, 1]) == (["x", "x"], None)
    table.write_text("sample,center\n1.png,x\n2.png,x\n1.png,y\n")
    with pytest.raises(DatasetError, match='"1.png" twice, with center x and with center y: keep one'):
        read_origins(table, ["/a/1.png"], [0])
    table.write_text("sample,center\n1.png,x\nb/2.png,y\n")
    with pytest.raises(DatasetError, match='"1.png" .* fits two samples, /a/1.png and /b/1.png: give more'):
        read_origins(table, ["/a/1.png", "/b/1.png"], [0, 1])


def test_tcga_barcodes_name_the_centre():
    found = command.TCGA_BARCODE.search("/x/TCGA-A6-2671-01Z-00-DX1.13db/3_4.png")
    assert found[1] == "A6" and found[0] == "TCGA-A6-2671-01Z-00-DX1"


def measure(case, folder, centers) -> None:
    command.PERTURBATIONS = (PERTURBATIONS[1], PERTURBATIONS[-1])  # for time; in spawned processes, too
    options = ["--config-file", case.config, "--pretrained-weights", case.weights, "--dataset", case.val]
    options += ["--output-dir", folder, "--num-workers", 0, "--k", 3, "--centers", centers, "--samples", 11]
    command.main(command.get_args_parser().parse_args([str(option) for option in options]))


@pytest.mark.slow
def test_command_line_gives_the_same_in_one_and_two_processes(tiny_case, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "PERTURBATIONS", PERTURBATIONS)  # set back at the end
    centers = tmp_path / "centers.csv"
    centers.write_text("sample,center\n" + "".join(f"{n},{'ab'[n % 2]}\n" for n in range(15)))
    measure(tiny_case, tmp_path / "1", centers)
    run_in_processes(measure, tiny_case, tmp_path / "2", centers)
    files = [tmp_path / number / "results_eval_robustness_summary.json" for number in "12"]
    alone, shared = (json.loads(file.read_text()) for file in files)
    assert [row["perturbation"] for row in alone["perturbations"]] == ["stain", "resolution"]
    assert 0 <= alone["centers"]["robustness_index"] <= 1
    for first, second in zip(alone["perturbations"], shared["perturbations"], strict=True):
        assert first == pytest.approx(second, abs=1e-5)
    for name, value in alone["centers"].items():
        assert value == pytest.approx(shared["centers"][name], abs=1e-5), name
