"""The benchmark of shards reads the same tiles from every layout."""

import numpy as np

from dinov2.data import make_dataset
from scripts.bench_shards import ORDERS, drop_from_page_cache, main, measure, prepare


def test_every_layout_holds_the_same_tiles(tmp_path):
    strings = prepare(tmp_path, 5)
    datasets = [make_dataset(dataset_str=text) for text in strings.values()]
    for index in range(5):
        assert len({dataset.get_image_data(index) for dataset in datasets}) == 1
    assert np.asarray(datasets[0][4][0]).shape == (224, 224, 3)
    drop_from_page_cache(tmp_path)
    rates = measure(strings, rounds=2, draws=3, cold=True)
    assert set(rates) == {(name, order, d) for name in strings for order in ORDERS for d in (False, True)}
    assert all(len(values) == 2 and min(values) > 0 for values in rates.values())


def test_the_command(tmp_path, capsys):
    main(["--output", str(tmp_path), "--images", "4", "--draws", "4", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7
    assert lines[1].startswith("loose files") and lines[1].count("(1.00x)") == 4
