"""From dataset strings to batches, and every way of getting them wrong."""

import inspect
import itertools
import logging
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from dinov2 import distributed
from dinov2.data import DataAugmentationDINO, DatasetWithEnumeratedTargets, pass_orders
from dinov2.data.collate import collate_data_and_cast
from dinov2.data.loaders import DATASETS, SamplerType, make_data_loader, make_dataset
from dinov2.data.masking import MaskingGenerator
from dinov2.data.samplers import EpochSampler
from dinov2.errors import ConfigError, DatasetError
from tests.conftest import REPO


class Numbers(torch.utils.data.Dataset):
    """Its items tell their index and what the three generators give."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        import random

        return index, torch.rand(1).item(), random.random(), np.random.rand()


def no_target(_):
    return ()


def first_batches(loader, count=3):
    return list(itertools.islice(loader, count))


def numbers_loader(**options):
    return make_data_loader(**{"dataset": Numbers(), "batch_size": 4, "num_workers": 0, "seed": 3} | options)


def test_sampler_types_keep_their_numbers():
    assert {member.name: member.value for member in SamplerType} == {
        "DISTRIBUTED": 0,
        "EPOCH": 1,
        "INFINITE": 2,
        "SHARDED_INFINITE": 3,
        "SHARDED_INFINITE_NEW": 4,
    }
    assert pickle.loads(pickle.dumps(SamplerType.EPOCH)) is SamplerType.EPOCH


@pytest.mark.parametrize("sampler_type", [*SamplerType, None])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sampler_type_reaches_every_sample(sampler_type, shuffle):
    loader = numbers_loader(sampler_type=sampler_type, shuffle=shuffle)
    indices = torch.cat([batch[0] for batch in first_batches(loader, 6)])
    assert sorted(indices.tolist()) == list(range(24))


def test_finite_loaders_end_and_infinite_ones_do_not():
    assert len(first_batches(numbers_loader(sampler_type=SamplerType.EPOCH, sampler_size=10), 50)) == 2
    loader = numbers_loader(sampler_type=SamplerType.EPOCH, sampler_size=10, drop_last=False)
    assert len(first_batches(loader, 50)) == 3
    assert len(first_batches(numbers_loader(), 50)) == 50


@pytest.mark.parametrize("sampler_type", [SamplerType.INFINITE, SamplerType.SHARDED_INFINITE])
def test_sampler_advance_counts_what_this_process_has_drawn(sampler_type, monkeypatch):
    monkeypatch.setattr(distributed, "get_global_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_global_rank", lambda: 1)

    def indices(advance, count):
        loader = numbers_loader(sampler_type=sampler_type, sampler_advance=advance)
        return torch.cat([batch[0] for batch in first_batches(loader, count)]).tolist()

    assert indices(5 * 4, 5) == indices(0, 10)[20:]


def test_seed_has_a_meaning_for_the_epoch_sampler():
    orders = [
        torch.cat([batch[0] for batch in numbers_loader(sampler_type=SamplerType.EPOCH, seed=seed)]).tolist()
        for seed in (1, 2)
    ]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"sampler_size": 5}, "sampler_size is 5, but only the sampler type EPOCH"),
        ({"sampler_advance": 5, "sampler_type": SamplerType.EPOCH}, "sampler_advance is 5, but only endless"),
        ({"reshuffle_globally": True}, "sharded sampler types only"),
    ],
)
def test_options_that_do_not_go_together(options, word):
    with pytest.raises(ConfigError, match=word):
        numbers_loader(**options)


def test_workers_and_ranks_never_draw_the_same(monkeypatch):
    """Two ranks with two workers each: 4 streams of 3 generators, all different; a repetition equal."""

    def draws(rank, **options):
        monkeypatch.setattr(distributed, "get_global_rank", lambda: rank)
        loader = numbers_loader(num_workers=2, sampler_type=SamplerType.EPOCH, **options)
        return torch.cat([torch.stack(batch[1:]) for batch in loader], dim=1)

    ranks = [draws(0), draws(1)]
    for generator_draws in torch.cat(ranks, dim=1):
        assert len(set(generator_draws.tolist())) == len(generator_draws)
    assert torch.equal(draws(0), ranks[0])
    assert not torch.equal(draws(0, worker_seed=4), ranks[0])


def test_each_pass_over_a_loader_draws_anew():
    loader = numbers_loader(num_workers=1, sampler_type=SamplerType.EPOCH)
    first, second = ([batch[1] for batch in loader] for _ in range(2))
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_training_batches_from_two_workers(tile_tree):
    dataset = make_dataset(
        dataset_str=dump(tile_tree),
        transform=DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 3, 56, 28),
        target_transform=no_target,
    )
    loader = training_loader(dataset)
    for batch in first_batches(loader):
        assert batch["collated_global_crops"].shape == (8, 3, 56, 56)
        assert batch["collated_global_crops"].dtype == torch.bfloat16
        assert batch["collated_local_crops"].shape == (12, 3, 28, 28)
        assert batch["collated_masks"].any(dim=1).sum() == 4
        assert batch["collated_global_crops"].float().std() > 0.1
    assert pickle.dumps((dataset, loader.collate_fn, loader.worker_init_fn))


@pytest.mark.slow
def test_training_batches_from_a_spawned_worker(tile_tree):
    dataset = make_dataset(
        dataset_str=dump(tile_tree),
        transform=DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 3, 56, 28),
        target_transform=no_target,
    )
    loader = training_loader(dataset, num_workers=1, multiprocessing_context="spawn", timeout=300)
    assert first_batches(loader, 1)[0]["collated_local_crops"].shape == (12, 3, 28, 28)


def dump(tile_tree):
    text = f"Pathology:split=TRAIN:root={tile_tree}:extra={tile_tree}:sshid=13"
    DATASETS["Pathology"](split="TRAIN", root=str(tile_tree), extra=str(tile_tree), sshid="13").dump_extra()
    return text


def training_loader(dataset, num_workers=2, **options):
    collate = partial(
        collate_data_and_cast,
        mask_ratio_tuple=(0.1, 0.5),
        mask_probability=0.5,
        n_tokens=16,
        mask_generator=MaskingGenerator(input_size=(4, 4), max_num_patches=8.0),
        dtype=torch.bfloat16,
    )
    return make_data_loader(
        dataset=dataset,
        batch_size=4,
        num_workers=num_workers,
        shuffle=True,
        seed=0,
        sampler_type=SamplerType.SHARDED_INFINITE,
        sampler_advance=0,
        drop_last=True,
        collate_fn=collate,
        **options,
    )


def test_an_unreadable_tile_stops_the_loader_and_is_named(tile_tree):
    text = dump(tile_tree)
    tile = tile_tree / "patches" / "slide_a" / "slide_a_patch_99.jpeg"
    tile.write_bytes(tile.read_bytes()[:200])
    loader = numbers_loader(
        dataset=make_dataset(dataset_str=text), batch_size=1, sampler_type=None, collate_fn=no_target
    )
    with pytest.raises(RuntimeError, match=f"can not read image for sample 3 .*{tile.name}"):
        first_batches(loader, 9)


def test_make_dataset_logs_its_size_and_keeps_the_transforms(tile_tree, caplog):
    with caplog.at_level(logging.INFO, logger="dinov2"):
        dataset = make_dataset(dataset_str=dump(tile_tree), transform=np.asarray, target_transform=no_target)
    assert "8 samples" in caplog.text
    assert dataset.transform is np.asarray
    assert dataset[0][0].shape == (96, 96, 3)
    assert dataset[0][1] == ()


def test_enumerated_targets(class_tree):
    dataset = make_dataset(dataset_str=f"ImageFolder:root={class_tree}")
    numbered = DatasetWithEnumeratedTargets(dataset)
    assert len(numbered) == 5
    assert [numbered.get_target(i) for i in range(5)] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1)]
    assert numbered[3][1] == (3, 1)
    assert numbered.get_image_data(3) == dataset.get_image_data(3)


def test_enumerated_targets_of_unlabelled_samples(tile_tree):
    numbered = DatasetWithEnumeratedTargets(make_dataset(dataset_str=dump(tile_tree)))
    assert numbered[5][1] == numbered.get_target(5) == (5, 5)


def sentence(dataset_str):
    """The one sentence that a wrong dataset string ends in."""
    with pytest.raises(DatasetError) as caught:
        make_dataset(dataset_str=dataset_str)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


def test_unknown_dataset():
    assert sentence("Patholgy:root=/x") == (
        f'Unsupported dataset "Patholgy" (did you mean "Pathology"?); accepted are {", ".join(DATASETS)}'
    )


@pytest.mark.parametrize(
    ("dataset_str", "words"),
    [
        ("ImageNet:split=TRAIN", ["ImageNet needs root, extra", "ImageNet:split=...:root=...:extra=..."]),
        ("ImageNet22k:split=TRAIN:root=/x:extra=/y", ['"split"', "root, extra, mmap_cache_size"]),
        ("Pathology:split=TRAIN:rot=/x", ['"rot" (did you mean "root"?)', "sshid"]),
        ("ImageFolder:root=/x:transform=y", ['does not know the key "transform"']),
        (
            "ImageNet:split=TRIAN:root=/:extra=/",
            ['no split "TRIAN" (did you mean "TRAIN"?)', "TRAIN, VAL, TEST"],
        ),
        ("ImageNet22k:root=/:extra=/:mmap_cache_size=many", ['"many"', "whole number"]),
        ("CustomImageDataset:extra=/:test_size=half", ['"half"', "a number"]),
    ],
)
def test_wrong_keys_and_values(dataset_str, words):
    text = sentence(dataset_str)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("dataset_str", "words"),
    [
        ("Pathology:split=TRAIN:root={0}/none:extra={0}", ["root of Pathology", "/none"]),
        ("Pathology:split=TRAIN:root={0}:extra={0}", ["entry.csv", "patches_path"]),
        ("ImageNet:split=VAL:root={0}/none:extra={0}", ["root of ImageNet", "/none"]),
        ("ImageNet:split=VAL:root={0}:extra={0}", ["entries-VAL.npy", "dump_extra()"]),
        ("ImageNet22k:root={0}/none:extra={0}", ["root of ImageNet22k", "/none"]),
        ("ImageNet22k:root={0}:extra={0}", ["entries.npy", "dump_extra()"]),
        ("ImageFolder:root={0}/none", ["root of ImageFolder", "/none"]),
        ("ImageFolder:root=", ["root of ImageFolder", '""']),
        ("ImageFolder:root={0}", ["no image", "sub-folder per class"]),
        ("NCTCRC:split=VAL:root={0}", ["CRC-VAL-HE-7K", "missing"]),
        ("CustomImageDataset:split=TRAIN:root={0}:extra={0}/none.csv", ["none.csv", "CSV"]),
        ("CustomImageDataset:split=TRAIN:root={0}:extra={0}/empty.csv", ["empty"]),
        ("CustomImageDataset:split=TRAIN:root={0}:extra={0}/header.csv", ["empty"]),
    ],
)
def test_missing_folders_and_empty_datasets(tmp_path, dataset_str, words):
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("path,label\n")
    text = sentence(dataset_str.format(tmp_path))
    assert all(word in text for word in words), text


def test_more_workers_than_cores_are_no_reason_to_warn(recwarn):
    """As where storage is slow; PyTorch would warn with every loader of an evaluation."""
    loader = numbers_loader(num_workers=1000)
    assert loader.num_workers == 1000
    assert not recwarn.list
    torch.utils.data.DataLoader(Numbers(), num_workers=1000)
    assert "This DataLoader will create" in str(recwarn.pop(UserWarning).message)


@pytest.mark.parametrize("count", [7, 8, 9])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_distributed_order_of_a_large_dataset_is_pytorchs(count, world, monkeypatch):
    """Evaluation goes through a dataset front to back; above the limit without a list of its indices."""
    monkeypatch.setattr(distributed, "get_global_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "get_global_rank", lambda rank=rank: rank)
        orders = {}
        for limit in (100, 0):
            monkeypatch.setattr(pass_orders, "RECORDED_ORDER_LIMIT", limit)
            loader = make_data_loader(
                dataset=range(count), batch_size=2, num_workers=0, shuffle=False, drop_last=False,
                sampler_type=SamplerType.DISTRIBUTED,
            )  # fmt: skip
            orders[limit] = type(loader.sampler), list(loader.sampler), len(loader.sampler)
        assert [orders[limit][0] for limit in (100, 0)] == [DistributedSampler, EpochSampler]
        assert orders[100][1:] == orders[0][1:]


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_is_documented_with_its_keys(name):
    documents = [
        (REPO / "docs" / f"{page}.md").read_text("utf-8")
        for page in ("datasets", "slides", "shards_and_mixtures")
    ]
    keys = set(inspect.signature(DATASETS[name]).parameters) - {"transforms", "transform", "target_transform"}
    undocumented = {key for key in keys if not any(f"`{key}`" in text for text in documents)}
    assert f"`{name}`" in documents[0] and undocumented <= {"mmap_cache_size"}
