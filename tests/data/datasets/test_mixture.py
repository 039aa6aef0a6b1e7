"""Mixtures: shares, passes, labels, and real datasets behind one string."""

import logging
import os
import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

from dinov2 import distributed
from dinov2.data import SamplerType, make_data_loader, make_dataset
from dinov2.data.datasets.mixture import LONGEST_PASS, MixtureDataset
from dinov2.data.loaders import DATASETS
from dinov2.errors import DatasetError
from dinov2.eval.data import make_labelled_dataset, training_labels
from tests.data.datasets.test_webdataset import write_shards


class Numbers(Dataset):
    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        assert 0 <= index < self.size
        return self.name, index


def mixture(sizes, weights=None):
    datasets = [Numbers(number, size) for number, size in enumerate(sizes)]
    weights = None if weights is None else [Fraction(weight) for weight in weights]
    return MixtureDataset(datasets, [f"N{number}" for number in range(len(sizes))], weights)


SIZES_AND_WEIGHTS = st.lists(
    st.tuples(st.integers(1, 40), st.fractions(Fraction(1, 6), 6, max_denominator=6)), min_size=1, max_size=5
)


@settings(max_examples=100, deadline=None)
@given(SIZES_AND_WEIGHTS)
def test_a_weighted_pass_keeps_its_promises(sizes_and_weights):
    sizes, weights = zip(*sizes_and_weights, strict=True)
    mixed = mixture(sizes, weights)
    draws = Counter(mixed[index] for index in range(len(mixed)))
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        times = [draws[number, inner] for inner in range(size)]
        assert min(times) >= 1, "every image comes in every pass"
        assert max(times) - min(times) <= 1
        share = Fraction(weight) / sum(weights)
        assert abs(sum(times) - share * len(mixed)) <= 1 + len(sizes) / 2, "one draw, and what rounding adds"
    shortest = max(Fraction(size) * sum(weights) / weight for size, weight in sizes_and_weights)
    assert abs(len(mixed) - shortest) <= len(sizes), "no shorter pass could have every image"


@settings(max_examples=100, deadline=None)
@given(SIZES_AND_WEIGHTS)
def test_images_that_come_once_more_are_spread_evenly(sizes_and_weights):
    """Any stretch of a dataset is drawn as often as its length asks for, within two draws."""
    sizes, weights = zip(*sizes_and_weights, strict=True)
    mixed = mixture(sizes, weights)
    draws = Counter(mixed[index] for index in range(len(mixed)))
    for number, size in enumerate(sizes):
        times = np.array([draws[number, inner] for inner in range(size)])
        expected = times.mean() * np.arange(1, size + 1)
        assert np.abs(times.cumsum() - expected).max() < 1 + 1e-9


def test_without_weights_every_image_comes_once_in_order():
    mixed = mixture([3, 1, 2])
    assert [mixed[index] for index in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    assert mixed[-1] == (2, 1)
    for outside in (6, -7):
        with pytest.raises(IndexError):
            mixed[outside]


def test_exact_shares_of_sizes_like_those_of_a_lab(caplog):
    """127.6 million tiles against 100 000: a formula, so nothing is allocated."""
    with caplog.at_level(logging.INFO, logger="dinov2"):
        mixed = mixture([127_600_000, 100_000], [1, 1])
    assert len(mixed) == 2 * 127_600_000
    assert mixed.locate(127_599_999) == (0, 127_599_999)
    assert mixed.locate(127_600_000) == (1, 0)
    assert mixed.locate(len(mixed) - 1) == (1, 99_999)
    assert "N1 100000 images, 50.00% of draws, each 1.28e+03 times a pass" in caplog.text
    assert len(pickle.dumps(mixed)) < 2000


def test_a_weight_far_from_the_sizes():
    with pytest.raises(DatasetError, match=r"N0 \+ N1 .* draws to see every image once"):
        mixture([LONGEST_PASS // 1000, 1], [Fraction(1, 10**6), 1])


@pytest.mark.parametrize(
    "sampler_type", [SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.EPOCH]
)
def test_samplers_draw_whole_passes_over_two_processes(sampler_type, monkeypatch):
    mixed = mixture([8, 5, 3], [1, 2, 1])
    per_process = len(mixed) // 2
    drawn = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_global_size", lambda: 2)
        monkeypatch.setattr(distributed, "get_global_rank", lambda rank=rank: rank)
        loader = make_data_loader(
            dataset=mixed, batch_size=1, num_workers=0, seed=3, sampler_type=sampler_type, collate_fn=tuple
        )
        for _, batch in zip(range(per_process), loader, strict=False):
            drawn += batch
    assert len(mixed) == 32
    assert Counter(name for name, _ in drawn) == {0: 8, 1: 16, 2: 8}
    assert Counter(drawn) == Counter(mixed[index] for index in range(32))


def test_a_resumed_stream_goes_on_where_it_was():
    mixed = mixture([8, 5, 3], [1, 2, 1])

    def draws(advance, count):
        loader = make_data_loader(
            dataset=mixed, batch_size=1, num_workers=0, seed=3, sampler_advance=advance, collate_fn=tuple
        )
        return [batch[0] for _, batch in zip(range(count), loader, strict=False)]

    assert draws(45, 20) == draws(0, 65)[45:]


@pytest.fixture
def sources(tmp_path, tile_tree, class_tree, encoded):
    """Dataset strings of a tree of tiles, shards with labels and class folders."""
    tiles = f"Pathology:split=TRAIN:root={tile_tree}:extra={tile_tree}"
    DATASETS["Pathology"](split="TRAIN", root=str(tile_tree), extra=str(tile_tree)).dump_extra()
    shards = write_shards(tmp_path / "h+e", encoded[:4])
    return {
        "tiles": tiles,
        "shards": f"WebDataset:root={shards}:label=json.tissue",
        "classes": f"ImageFolder:root={class_tree}",
    }


def test_a_string_and_a_list_are_the_same_mixture(sources, caplog):
    caplog.set_level(logging.INFO, logger="dinov2")
    text = f"2*{sources['tiles']} + {sources['shards']}"
    as_list = OmegaConf.create({"path": [f"2*{sources['tiles']}", sources["shards"]]}).path
    mixed = [make_dataset(dataset_str=spelling, transform=np.asarray) for spelling in (text, as_list)]
    assert "mixture of 2 datasets, a pass is 12 draws: Pathology 8 images, 66.67% of draws" in caplog.text
    assert len(mixed[0]) == len(mixed[1]) == 12
    for index in range(12):
        assert mixed[0].get_image_path(index) == mixed[1].get_image_path(index)
        assert np.array_equal(mixed[0][index][0], mixed[1][index][0])
    assert mixed[0].get_image_path(0).endswith("TCGA_patch_x_patch_5.jpeg")
    assert mixed[0].get_image_path(11).endswith("h+e/tiles-001.tar:slide/0003.jpg")
    assert mixed[0].get_image_data(11) == mixed[0].datasets[1].get_image_data(3)
    assert mixed[0].transform is np.asarray


def test_one_part_is_the_dataset_itself(sources):
    for spelling in (sources["shards"], f"3*{sources['shards']}", [sources["shards"]]):
        assert type(make_dataset(dataset_str=spelling)) is DATASETS["WebDataset"]


def test_loader_workers_agree_with_one_process(sources):
    text = f"0.5*{sources['tiles']}+{sources['shards']}+{sources['classes']}"
    mixed = make_dataset(dataset_str=text, transform=np.asarray, target_transform=str)
    alone = [mixed[index] for index in range(len(mixed))]
    loader = DataLoader(mixed, batch_size=None, num_workers=2)
    for (image, target), (expected, label) in zip(loader, alone, strict=True):
        assert np.array_equal(image, expected)
        assert target == label


def test_labels_of_a_plain_mixture(tmp_path, encoded, class_tree):
    other = tmp_path / "other"
    for name in ("stroma", "tumour"):
        (other / name).mkdir(parents=True)
        (other / name / "t.jpg").write_bytes(encoded[7])
    text = f"ImageFolder:root={class_tree}+ImageFolder:root={other}"
    mixed = make_labelled_dataset(text)
    assert training_labels(mixed, text).tolist() == [0, 0, 1, 1, 1, 0, 1]
    assert mixed.get_target(6) == 1
    assert mixed.classes == ["stroma", "tumour"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{classes}+{shards}", ["ImageFolder", "stroma, tumour", "WebDataset", "adipose, stroma, tumour"]),
        ("2*{classes}+{classes}", ["has weights", "leave them out"]),
        ("{classes}+{tiles}", ["Pathology", "no labels"]),
    ],
)
def test_labels_that_do_not_go_together(sources, text, words):
    with pytest.raises(DatasetError) as caught:
        make_labelled_dataset(text.format(**sources))
    assert all(word in str(caught.value) for word in words), caught.value


def test_class_numbers_without_names_must_be_equally_many(tmp_path, encoded):
    few = write_shards(tmp_path / "few", encoded[:2])
    many = write_shards(tmp_path / "many", encoded[:4])
    with pytest.raises(DatasetError, match=r"has 2 classes and WebDataset has 4 classes"):
        make_labelled_dataset(f"WebDataset:root={few}:label=cls+WebDataset:root={many}:label=cls")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Patholgy:root=/x+{shards}", ["part 1 of 2", '"Patholgy" (did you mean "Pathology"?)']),
        ("{shards}+ImageFolder:root=/none", ["part 2 of 2", "root of ImageFolder", "/none"]),
        (
            "{shards}+2*Patholgy:split=TRAIN:root=/x",
            ['"+" before "Patholgy"', 'did you mean "Pathology"'],
        ),
        ("ImageFolder:root=/none+ImageFoldr:root=/x", ['"+" before "ImageFoldr"', '"root" occurs twice']),
        ("{shards}+0*{tiles}", ['the weight "0"', "no positive number"]),
    ],
)
def test_mistakes_name_the_part(sources, text, words):
    with pytest.raises(DatasetError) as caught:
        make_dataset(dataset_str=text.format(**sources))
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_empty_list():
    with pytest.raises(DatasetError, match="list of dataset strings is empty"):
        make_dataset(dataset_str=[])


def test_memory_and_handles_do_not_grow(sources):
    mixed = make_dataset(dataset_str=f"3*{sources['tiles']}+{sources['shards']}", transform=np.asarray)
    generator = torch.Generator().manual_seed(0)
    handles = []
    for _ in range(3):
        for index in torch.randint(len(mixed), (100,), generator=generator).tolist():
            mixed[index]
        handles.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208
    assert handles[0] == handles[2]
