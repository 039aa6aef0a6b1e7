"""Runs over lists of slides with real processes: shared, killed, resumed, broken."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data import index, make_dataset
from dinov2.data.datasets.path_map import PathMap
from dinov2.data.locks import LockFile
from dinov2.data.slides import tile
from dinov2.data.slides.output_folder import OutputFolder
from dinov2.data.slides.recipe import TilingRecipe
from dinov2.data.slides.slide_list import SlideEntry, list_slides
from dinov2.data.slides.tile_many import TilingRun, run_all
from dinov2.errors import ConfigError
from tests.conftest import REAL_DATA, REPO
from tests.data.slides.drawn_slide import real_slide_picture, write_pyramid

RECIPE = TilingRecipe(min_tissue=0.5, max_tiles=12)
# So many tiles that there is time to kill whoever makes them.
SLOW = TilingRecipe(overlap=184)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three good slides with different suffixes."""
    folder = tmp_path_factory.mktemp("slides")
    shutil.copy(REAL_DATA / "cmu_small_region.svs", folder / "first.svs")
    picture = real_slide_picture()
    write_pyramid(folder / "second.tiff", picture[:1500], mpp=0.499)
    write_pyramid(folder / "third.tif", picture[1400:], mpp=0.499)
    return folder


def run(output, entries, recipe=RECIPE, **options):
    lines = []
    records = run_all(TilingRun(list(entries), recipe, OutputFolder(str(output)), **options), lines.append)
    return {record["slide"]: record for record in records}, lines


def content(output):
    """Everything a run has made: path -> bytes, without times."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(Path(output).rglob("*"))
        if path.is_file() and path.parent.name != "state" and path.name not in ("summary.csv", "entry.csv")
    }


def summary(output):
    with (Path(output) / "summary.csv").open() as file:
        return {row["slide"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    return output, *run(output, list_slides(str(folder)), workers=2)


def test_a_list_of_slides(finished):
    output, records, lines = finished
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(
        ("first", "second", "third"), "done"
    )
    assert all(len(list((output / "patches" / name).iterdir())) == 12 for name in records)
    assert summary(output)["second"]["n_tiles"] == "12"
    assert sorted(lines)[0].startswith("[1/3] ") and "12 tiles" in lines[0]
    assert not list((output / "state").glob("*.lock"))


def test_a_rerun_does_nothing(folder, finished):
    output, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.jpeg")}
    _, lines = run(output, list_slides(str(folder)))
    assert lines == ["3 of 3 slides done or left out already"]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.jpeg")} == before


def test_another_recipe_is_an_error_or_redone(folder, finished, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(finished[0], output)
    other = TilingRecipe(min_tissue=0.6, max_tiles=5)
    entries = list_slides(str(folder))
    message = r"first \(max_tiles 12 -> 5, min_tissue 0.5 -> 0.6\).*--redo"
    with pytest.raises(ConfigError, match=message):
        run(output, entries, other)
    records, _ = run(output, entries[:1], other, redo=True)
    assert records["first"]["n_tiles"] == len(list((output / "patches" / "first").iterdir())) == 5
    assert len(list((output / "patches" / "second").iterdir())) == 12


def test_a_slide_that_changed_is_noticed(folder, finished, tmp_path):
    changed = tmp_path / "first.tif"
    write_pyramid(changed, np.full((600, 600, 3), 240, np.uint8))
    with pytest.raises(ConfigError, match=r"first \(slide bytes \d+ -> \d+, slide modified \S+ -> \S+\)"):
        run(finished[0], [SlideEntry("first", str(changed))])


@pytest.fixture
def masked(folder, tmp_path):
    """A small slide with a mask, tiled, and how to look at it again under a path map."""
    tmp_path = tmp_path / "data"
    tmp_path.mkdir()
    write_pyramid(tmp_path / "slide.tif", real_slide_picture()[1000:1500, :600], mpp=0.499)
    Image.fromarray(np.full((50, 60), 255, np.uint8)).save(tmp_path / "mask.png")
    table = tmp_path / "slides.csv"
    table.write_text("path,mask\n/old/slide.tif,/old/mask.png\n")

    def again(mapped=tmp_path, **options):
        entries = list_slides(str(table), path_map=PathMap.parse(f"/old={mapped}"))
        return run(tmp_path / "out", entries, **options)[1]

    assert " tiles, " in again()[0]
    return tmp_path, again


DONE_ALREADY = ["1 of 1 slide done or left out already"]


@pytest.mark.parametrize(("file", "name"), [("slide.tif", "modified"), ("mask.png", "mask_modified")])
def test_a_replaced_file_of_equal_size_is_noticed(masked, file, name):
    data, again = masked
    assert again() == DONE_ALREADY
    os.utime(data / file, (0, 1_000_000_000))
    with pytest.raises(ConfigError, match=rf"slide \(slide {name} 20\S+ -> 2001-09-09T01:46:40\+00:00\)"):
        again()
    assert "slide: " in again(redo=True)[0]
    assert again() == DONE_ALREADY


def test_machines_with_other_path_maps_agree(masked, tmp_path):
    data, again = masked
    (tmp_path / "mounted").symlink_to(data)
    assert again(tmp_path / "mounted") == DONE_ALREADY
    (data / "mask.png").unlink()  # what was done stays done
    assert again() == DONE_ALREADY


def test_older_records_stay_valid(masked):
    data, again = masked
    path = data / "out" / "state" / "slide.json"
    record = json.loads(path.read_text())
    source = {"bytes": record["source"]["bytes"], "mpp": None, "mask": str(data / "mask.png")}
    path.write_text(json.dumps({**record, "source": source}))
    assert again() == DONE_ALREADY


def test_broken_slides_among_good_ones(folder, tmp_path):
    good = list_slides(str(folder))
    (tmp_path / "text.svs").write_text("no slide")
    (tmp_path / "nothing.svs").touch()
    cut = (folder / "third.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(cut[: len(cut) // 2])
    entries = [
        SlideEntry("a_text", str(tmp_path / "text.svs")),
        good[0],
        SlideEntry("cut", str(tmp_path / "cut.tif")),
        SlideEntry("nothing", str(tmp_path / "nothing.svs")),
        SlideEntry("gone", str(tmp_path / "gone.svs")),
        SlideEntry("left_out", str(tmp_path / "gone.svs"), process=False),
        good[1],
    ]
    output = tmp_path / "out"
    records, lines = run(output, entries)
    status = {name: record["status"] for name, record in records.items()}
    assert status == {
        "a_text": "failed",
        "first": "done",
        "cut": "failed",
        "gone": "failed",
        "nothing": "failed",
        "left_out": "skipped",
        "second": "done",
    }
    assert 'nothing.svs" is empty: copy it again, or take it off the list' in records["nothing"]["error"]
    for name in ("a_text", "cut"):
        assert records[name]["error"].endswith("copy it again, or take it off the list")
        assert "damaged" in records[name]["error"] and "Error" not in records[name]["error"]
    assert "gone.svs" in records["gone"]["error"] and "is missing" in records["gone"]["error"]
    assert sorted(path.name for path in (output / "patches").iterdir()) == ["first", "second"]
    assert list((output / ".work").iterdir()) == []
    assert {name: row["status"] for name, row in summary(output).items()} == status
    assert any("a_text: failed, " in line for line in lines)
    # Mended, the failed slide is made by the next run; the others stay.
    shutil.copy(folder / "third.tif", tmp_path / "cut.tif")
    records, _ = run(output, entries)
    assert records["cut"]["status"] == "done"
    assert records["a_text"]["status"] == "failed"


def wait_for(condition, process=None, seconds=120):
    """Wait until something is so, as long as the process lives that is to bring it about."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"it ended with status {process.poll()}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_nobody_waits_for_a_process_that_has_ended():
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    with process, pytest.raises(AssertionError, match="ended with status 7"):
        wait_for(lambda: False, process)


def tiles_in_work(output, slide):
    return list((Path(output) / ".work" / slide).glob(f"*/patches/{slide}/*.jpeg"))


def holder(output, slide):
    return json.loads((Path(output) / "state" / f"{slide}.lock").read_text())["pid"]


def _kill_the_worker(output, slide):
    wait_for(lambda: tiles_in_work(output, slide))
    os.kill(holder(output, slide), signal.SIGKILL)


def test_a_slide_that_takes_its_process_down_is_recorded(folder, tmp_path):
    entries = list_slides(str(folder))[:2]
    killer = get_context("fork").Process(target=_kill_the_worker, args=(tmp_path, "first"))
    killer.start()
    records, _ = run(tmp_path, entries, SLOW)
    killer.join()
    assert killer.exitcode == 0
    assert records["first"]["status"] == "failed"
    assert "killed by signal 9" in records["first"]["error"]
    assert records["second"]["status"] == "done"
    assert not (tmp_path / "patches" / "first").exists()
    assert not (tmp_path / ".work" / "first").exists()
    records, _ = run(tmp_path, entries, SLOW)
    assert records["first"]["status"] == "done"


def command(*arguments):
    return [sys.executable, str(REPO / "scripts" / "tile_slides.py"), *map(str, arguments)]


def test_a_killed_run_leaves_no_half_slide_and_is_resumed(folder, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    arguments = ("--slides", folder / "first.svs", "--output", tmp_path, "--overlap", 184)
    with subprocess.Popen(command(*arguments), env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: len(tiles_in_work(tmp_path, "first")) > 5, process)
            worker = holder(tmp_path, "first")
        finally:
            process.kill()
    wait_for(lambda: not Path(f"/proc/{worker}").exists())  # the worker ends by itself
    assert not (tmp_path / "patches" / "first").exists()
    assert not (tmp_path / "state" / "first.json").exists()
    records, _ = run(tmp_path, list_slides(str(folder / "first.svs")), SLOW)
    assert records["first"]["status"] == "done"
    assert len(list((tmp_path / "patches" / "first").iterdir())) == records["first"]["n_tiles"] > 800
    assert list((tmp_path / ".work").iterdir()) == []


def test_a_slide_moved_but_not_recorded_is_made_again(folder, finished, tmp_path):
    """What a kill between the last two steps leaves."""
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / "state" / "second.json").unlink()
    (tmp_path / "out" / "patches" / "second" / "second_patch_9999.jpeg").touch()
    run(tmp_path / "out", list_slides(str(folder)))
    assert content(tmp_path / "out") == content(finished[0])


def test_a_slide_that_fails_leaves_no_tiles_of_before(finished, tmp_path):
    """Moved but not recorded, and then the file is damaged."""
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / "state" / "second.json").unlink()
    (tmp_path / "second.svs").write_text("no slide")
    records, _ = run(tmp_path / "out", [SlideEntry("second", str(tmp_path / "second.svs"))])
    assert records["second"]["status"] == "failed"
    assert [path.stem for path in sorted((tmp_path / "out" / "patches").iterdir())] == ["first", "third"]
    assert not list((tmp_path / "out").glob("*/second.[jpc]*g"))


def test_two_runs_share_a_list(folder, finished, tmp_path):
    with ThreadPoolExecutor(2) as pool:  # the slides are made in processes, all of them at once
        runs = [pool.submit(run, tmp_path, list_slides(str(folder)), workers=3) for _ in range(2)]
        results = [future.result()[0] for future in runs]
    status = [{name: record["status"] for name, record in records.items()} for records in results]
    assert all(set(names.values()) <= {"done", "skipped"} for names in status)
    assert all("done" in (status[0][name], status[1][name]) for name in ("first", "second", "third"))
    assert content(tmp_path) == content(finished[0])
    assert {row["status"] for row in summary(tmp_path).values()} == {"done"}


def test_a_slide_in_work_elsewhere_is_left_alone(folder, tmp_path):
    lock = LockFile(OutputFolder(str(tmp_path)).lock_path("first"))
    assert lock.acquire()
    records, _ = run(tmp_path, list_slides(str(folder))[:2])
    assert records["first"] == {
        "slide": "first",
        "status": "skipped",
        "error": "another process works on it",
    }
    assert records["second"]["status"] == "done"
    assert lock.owned()


def test_the_command(folder, tmp_path, capsys):
    (tmp_path / "text.svs").write_text("no slide")
    table = tmp_path / "slides.csv"
    table.write_text("path,slide,process,label\n/recorded/second.tiff,good,1,a\ntext.svs,bad,1,\n")
    arguments = ["--slides", str(table), "--output", str(tmp_path / "out"), "--max-tiles", "3"]
    arguments += ["--path-map", f"/recorded={folder}"]
    with pytest.raises(SystemExit) as ended:
        tile.main([*arguments, "--dry-run"])
    assert ended.value.code == 1
    shown = capsys.readouterr().out
    assert "bad: failed, " in shown
    assert "good: 2220 x 1500 px of 0.499 um" in shown and "3 tiles from level 0" in shown
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as ended:
        tile.main(arguments)
    assert ended.value.code == 1
    assert "3 tiles; slides: 1 done, 1 failed" in capsys.readouterr().out
    tile.main([*arguments, "--skip-errors"])
    with pytest.raises(ConfigError, match="--workers is 0"):
        tile.main([*arguments, "--workers", "0"])


def test_the_command_line_has_the_defaults_of_the_recipe():
    args = tile.get_args_parser().parse_args(["--slides", "x", "--output", "y"])
    assert tile.recipe_of(args) == TilingRecipe()


def test_the_command_names_the_next_step_and_an_outdated_index(folder, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--slides", str(folder / "first.svs"), "--output", str(output), "--max-tiles"]
    tile.main([*arguments, "1"])
    shown = capsys.readouterr().out
    assert "[1/1] first: 1 tile, " in shown and "\n1 tile; slides: 1 done; " in shown
    assert f"python -m dinov2.data.index --root {output} --extra {output}\n" in shown
    index.main(["--root", str(output), "--extra", str(output)])
    capsys.readouterr()
    tile.main([*arguments, "1"])  # nothing to do: the index is good
    shown = capsys.readouterr().out
    assert "dinov2.data.index" in shown and "WARNING" not in shown
    tile.main([*arguments, "2", "--redo"])
    shown = capsys.readouterr().out
    assert f"WARNING: {output}/entries-TRAIN.npy was built before" in shown
    index.main(["--root", str(output), "--extra", str(output)])
    capsys.readouterr()
    tile.main([*arguments, "2"])
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize("source", ["folder", "file", "csv"])
def test_the_next_step_of_coordinates_is_a_dataset(source, folder, tmp_path, capsys):
    table = tmp_path / "slides.csv"
    table.write_text(f"path\n{folder}/first.svs\n")
    slides = {"folder": folder, "file": folder / "first.svs", "csv": table}[source]
    output = tmp_path / "a:b"
    tile.main(["--slides", str(slides), "--output", str(output), "--coords-only", "--size", "256"])
    line = capsys.readouterr().out.splitlines()[-1]
    dataset = shlex.split(line.partition("train.dataset_path=")[2])[0]
    found = make_dataset(dataset_str=f"{dataset}:extra={tmp_path}/extra")
    assert found[0][0].size == (256, 256)


def test_a_dry_run_knows_what_is_done(folder, finished, capsys):
    arguments = ["--slides", str(folder), "--output", str(finished[0]), "--dry-run"]
    arguments += ["--min-tissue", "0.5", "--max-tiles"]
    tile.main([*arguments, "12"])
    assert capsys.readouterr().out == "3 of 3 slides done or left out already; to do: 0\n"
    with pytest.raises(ConfigError, match=r"first \(max_tiles 12 -> 1\).*--redo"):
        tile.main([*arguments, "1"])
    tile.main([*arguments, "1", "--redo"])
    assert "first: made again: 2220 x 2967 px" in capsys.readouterr().out


def test_a_tile_larger_than_the_slide(folder, tmp_path, capsys):
    arguments = ["--slides", str(folder / "first.svs"), "--output", str(tmp_path / "out"), "--size", "5000"]
    message = (
        "a tile of 5000 px at 0.5 um is 5000 px of the slide wide, and the scanned area is 2220 x 2967 px"
    )
    tile.main([*arguments, "--dry-run"])
    assert message in capsys.readouterr().out
    tile.main(arguments)
    assert message in capsys.readouterr().out
    assert message in summary(tmp_path / "out")["first"]["error"]


def test_mistakes_on_the_command_line(folder, tmp_path, capsys):
    arguments = ["--slides", str(folder), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match='the slide backend is "bioformats"; accepted are auto, openslide'):
        tile.main([*arguments, "--backend", "bioformats"])
    assert not (tmp_path / "out").exists()
    shown = subprocess.run(
        [sys.executable, "scripts/tile_slides.py", *arguments, "--typo"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 2
    assert shown.stderr.splitlines()[1:] == ["scripts/tile_slides.py: error: unrecognized arguments: --typo"]
    assert tile.get_args_parser().parse_args([*arguments, "--format", "jpg"]).format == "jpeg"


def test_a_damaged_slide_fails_without_a_line_from_the_library(folder, tmp_path):
    for name in ("first.svs", "third.tif"):
        cut = (folder / name).read_bytes()
        (tmp_path / name).write_bytes(cut[: len(cut) // 2])
    arguments = ["scripts/tile_slides.py", "--slides", str(tmp_path), "--output", str(tmp_path / "out")]
    shown = subprocess.run([sys.executable, *arguments], cwd=REPO, capture_output=True, text=True)
    assert shown.returncode == 1 and shown.stderr == ""
    assert "first: failed, " in shown.stdout and "third: failed, " in shown.stdout
