"""Whole builds over real trees with real processes: odd entries, damage, kills, full disks."""

import csv
import json
import os
import resource
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dinov2.data.datasets.tile_index import IndexFiles
from dinov2.data.indexing import build as build_module
from dinov2.data.indexing import progress as progress_module
from dinov2.data.indexing.build import build_index
from dinov2.data.indexing.journal import HEADER, Journal
from dinov2.data.indexing.progress import BuildProgress
from dinov2.data.locks import LockFile
from dinov2.errors import ConfigError, DatasetError, OutputError


def add_slide(folder, slide, numbers, data=b"x", suffix=".jpeg", settled=True):
    (folder / slide).mkdir(parents=True)
    for number in numbers:
        (folder / slide / f"{slide}_patch_{number}{suffix}").write_bytes(data)
    if settled:
        settle(folder / slide)


def settle(folder):
    """As if the folder had last changed an hour ago, so that a later build may trust what it listed."""
    os.utime(folder, (time.time() - 3600, time.time() - 3600))


@pytest.fixture
def tree(tmp_path):
    for number in range(12):
        add_slide(tmp_path / "patches", f"slide_number_{number:02d}", range(0, 40 * number, 2))
    return tmp_path / "patches"


def build(tree, extra, **options):
    return build_index([str(tree)], IndexFiles(str(extra), "TRAIN"), **options)


def content(extra):
    return {name: (extra / name).read_bytes() for name in ("entries-TRAIN.npy", "slides-TRAIN.json")}


def reasons(extra):
    with (extra / "skipped-TRAIN.csv").open(newline="", errors="surrogateescape") as file:
        return {row["path"].partition("/patches/")[2]: row["reason"] for row in csv.DictReader(file)}


class Child:
    """A process of its own that calls a function; what it returns or raises comes back as text.

    A fork, as a new interpreter would spend its time with imports.
    """

    def __init__(self, function):
        self._outcome, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                text = str(function())
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
            os.write(write, text.encode())
            os._exit(0)
        os.close(write)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.outcome()

    def outcome(self):
        with os.fdopen(self._outcome) as pipe:
            text = pipe.read()
        os.waitpid(self.pid, 0)
        return text


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("verify", ["none", "header"])
def test_any_number_of_workers_builds_the_same(tree, tmp_path, encoded, workers, verify):
    for tile in tree.rglob("*_patch_0.jpeg"):
        tile.write_bytes(encoded[0])
    one = build(tree, tmp_path / "one", workers=0, verify=verify)
    other = build(tree, tmp_path / "other", workers=workers, verify=verify)
    assert content(tmp_path / "one") == content(tmp_path / "other")
    assert reasons(tmp_path / "one") == reasons(tmp_path / "other")
    assert (one.tiles, one.skipped) == (other.tiles, other.skipped)
    assert one.tiles == (sum(20 * number for number in range(12)) if verify == "none" else 11)


@pytest.mark.parametrize("verify", ["none", "decode"])
def test_work_is_shared_once_it_takes_long(tree, tmp_path, encoded, monkeypatch, verify):
    """Without a beginning alone, everything but the first slide goes through the others."""
    monkeypatch.setattr("dinov2.data.indexing.workers.ALONE_SECONDS", 0.0)
    for tile in tree.rglob("*.jpeg"):
        tile.write_bytes(encoded[0] if tile.stem.endswith("0") else encoded[0][:300])
    # However little the work waits, threads take part.
    monkeypatch.setattr("dinov2.data.indexing.workers.WAITING_SHARE", -1e9)
    build(tree, tmp_path / "one", workers=0, verify=verify)
    for workers in (2, 3):
        build(tree, tmp_path / "many", workers=workers, verify=verify, fresh=True)
        assert content(tmp_path / "one") == content(tmp_path / "many")
        assert reasons(tmp_path / "one") == reasons(tmp_path / "many")
    build(tree, tmp_path / "threads", workers=3)
    assert len(np.load(tmp_path / "threads" / "entries-TRAIN.npy")) == 1320


def test_odd_entries(tmp_path):
    tree = tmp_path / "patches"
    add_slide(tree, "good", [3, 1])
    (tree / "empty").mkdir()
    (tree / "loop").symlink_to("loop")
    (tree / "up").symlink_to(tree)
    (tree / "gone").symlink_to(tmp_path / "none")
    (tree / "same").symlink_to("good")
    slide = tree / "good"
    (slide / "good_patch_5.jpeg").symlink_to(tmp_path / "none")
    (slide / "good_patch_6.jpeg").symlink_to("good_patch_6.jpeg")
    (slide / "good_patch_7.jpeg").mkdir()
    os.mkfifo(slide / "good_patch_8.jpeg")
    (slide / "good_patch_9.jpeg").symlink_to(slide / "good_patch_3.jpeg")
    report = build(tree, tmp_path)
    entries = np.load(tmp_path / "entries-TRAIN.npy")
    assert entries["actual_index"].tolist() == [1, 3, 9]
    assert json.loads((tmp_path / "slides-TRAIN.json").read_text())["slides"] == [
        sorted(path.name for path in tree.iterdir())
    ]
    found = reasons(tmp_path)
    assert found["good/good_patch_5.jpeg"] == "it is a link to nothing"
    assert (
        found["good/good_patch_6.jpeg"]
        == "it is a link that can not be followed (Too many levels of symbolic links)"
    )
    assert found["good/good_patch_7.jpeg"] == "it is a folder"
    assert found["good/good_patch_8.jpeg"] == "it is neither file nor folder"
    assert found["loop"] == "it can not be listed (Too many levels of symbolic links)"
    assert found["gone"] == "it can not be listed (No such file or directory)"
    assert report.tiles == 3
    assert report.slides == 1


def test_verification(tmp_path, encoded, tiles):
    tree = tmp_path / "patches"
    add_slide(tree, "s", range(2), encoded[0])
    damage = {10: b"", 11: b"hello, no image", 12: encoded[1][: len(encoded[1]) // 2], 13: encoded[1][:200]}
    for number, data in damage.items():
        (tree / "s" / f"s_patch_{number}.jpeg").write_bytes(data)
    tiles[0].convert("CMYK").save(tree / "s" / "s_patch_20.jpeg")
    settle(tree / "s")
    kept = {}
    for level in ("none", "header", "decode"):
        report = build(tree, tmp_path, verify=level)
        kept[level] = np.load(tmp_path / "entries-TRAIN.npy")["actual_index"].tolist()
        assert report.listed == 1, "a closer look than the last one is a new look"
    assert kept == {"none": [0, 1, 10, 11, 12, 13, 20], "header": [0, 1, 12, 20], "decode": [0, 1, 20]}
    found = reasons(tmp_path)
    assert found["s/s_patch_10.jpeg"] == "the file is empty"
    assert found["s/s_patch_11.jpeg"] == "the file is no image that Pillow knows"
    assert found["s/s_patch_12.jpeg"].startswith("the image is damaged (cut off: ")
    assert build(tree, tmp_path, verify="header").reused == 1, "it was looked at more closely before"


def test_only_what_has_changed_is_listed_again(tree, tmp_path):
    first = build(tree, tmp_path)
    assert (first.listed, first.reused) == (12, 0)
    assert (build(tree, tmp_path).reused, build(tree, tmp_path, fresh=True).reused) == (12, 0)
    add_slide(tree, "a_new_one", [5])
    (tree / "slide_number_03" / "slide_number_03_patch_9999.jpeg").write_bytes(b"x")
    settle(tree / "slide_number_03")
    (tree / "slide_number_05" / "slide_number_05_patch_0.jpeg").unlink()
    again = build(tree, tmp_path)
    assert (again.listed, again.reused) == (3, 10)
    build(tree, tmp_path / "other")
    assert content(tmp_path) == content(tmp_path / "other")


def test_a_folder_that_changed_a_moment_ago_is_not_trusted(tmp_path):
    add_slide(tmp_path / "patches", "s", [1], settled=False)
    assert build(tmp_path / "patches", tmp_path).reused == 0
    assert build(tmp_path / "patches", tmp_path).reused == 0


@pytest.mark.parametrize("damage", ["cut", "middle", "header"])
def test_a_damaged_journal_costs_only_time(tree, tmp_path, damage):
    build(tree, tmp_path)
    before = content(tmp_path)
    journal = tmp_path / "journal-TRAIN.txt"
    data = journal.read_bytes()
    lines = data.splitlines(keepends=True)
    assert lines[1].count(b"slide_number") == 1  # the first is listed by itself, to see how long it takes
    if damage == "cut":
        journal.write_bytes(b"".join([*lines[:2], lines[2][:-10]]))
    elif damage == "middle":
        journal.write_bytes(b"".join([lines[0], lines[1].replace(b"slide", b"slime"), *lines[2:]]))
    else:
        journal.write_bytes(b"other" + data)
    report = build(tree, tmp_path)
    assert report.reused == {"cut": 1, "middle": 11, "header": 0}[damage]
    assert content(tmp_path) == before
    assert journal.read_bytes().count(b"slide_number") == len(Journal(str(journal)).read()) == 12
    assert journal.read_bytes().startswith(HEADER)


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_and_resume(tmp_path, encoded, workers, monkeypatch):
    """Kill -9 in the middle, twice; the end equals a build that was never interrupted."""
    monkeypatch.setattr("dinov2.data.indexing.workers.CHUNK_SECONDS", 0.001)
    tree, extra = tmp_path / "patches", tmp_path / "extra"
    for number in range(90):
        add_slide(tree, f"slide_{number:03d}", range(20), encoded[number % 12])
    journal = extra / "journal-TRAIN.txt"
    done = 0
    for _ in range(2):
        child = Child(lambda: build_and_halt(tree, extra, 15, verify="decode", workers=workers))
        while slides_of(journal) < done + 15:
            time.sleep(0.001)
        child.kill()
        done = slides_of(journal)
        assert not (extra / "entries-TRAIN.npy").exists()
    report = build(tree, extra, verify="decode")
    assert report.reused == done
    assert report.reused + report.listed == 90
    build(tree, tmp_path / "whole", verify="decode")
    assert content(extra) == content(tmp_path / "whole")
    assert not [path for path in extra.iterdir() if path.name.endswith((".tmp", ".lock"))]


def build_and_halt(tree, extra, slides, **options):
    """Build, but halt once so many slides are in the journal; the workers go on meanwhile."""
    append, appended = Journal.append, []

    def append_and_halt(journal, records):
        append(journal, records)
        appended.extend(records)
        if len(appended) >= slides:
            signal.pause()

    Journal.append = append_and_halt  # in a process of its own
    build(tree, extra, **options)


def slides_of(journal):
    """Number of slides in the complete lines of a journal."""
    return journal.read_bytes().rpartition(b"\n")[0].count(b'"slide_') if journal.exists() else 0


def test_workers_do_not_outlive_a_killed_builder(tmp_path, encoded):
    tree = tmp_path / "patches"
    for number in range(100):
        add_slide(tree, f"slide_{number:03d}", range(20), encoded[0])
    child = Child(lambda: build(tree, tmp_path / "extra", verify="decode", workers=2))
    while len(workers := children_of(child.pid)) < 2:
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "only a hang takes so long"
        time.sleep(0.05)
    child.outcome()


def children_of(pid):
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []


def test_two_builders_at_once(tmp_path, encoded):
    """Of builders started together one builds and the others say who does, unless it is done before."""
    tree, extra = tmp_path / "patches", tmp_path / "extra"
    for number in range(60):
        add_slide(tree, f"slide_{number:03d}", range(10), encoded[0])
    children = [Child(lambda: build(tree, extra, verify="decode", workers=0).tiles) for _ in range(3)]
    outcomes = sorted(child.outcome() for child in children)
    assert outcomes[0] == "600"
    for outcome in outcomes:
        assert outcome == "600" or "OutputError: another process builds this index (process " in outcome
    build(tree, tmp_path / "whole", verify="decode")
    assert content(extra) == content(tmp_path / "whole")


def test_who_builds_already_is_named_and_keeps_its_lock(tree, tmp_path):
    path = tmp_path / "builder-TRAIN.lock"
    held = LockFile(path)
    assert held.acquire()
    with pytest.raises(OutputError) as caught:
        build(tree, tmp_path)
    assert str(caught.value).startswith(f"another process builds this index (process {os.getpid()} on ")
    assert f'; its lock is "{path}"): wait until it is done, or delete the lock' in str(caught.value)
    assert held.owned()
    assert not (tmp_path / "entries-TRAIN.npy").exists()


def test_a_builder_that_has_lost_its_lock_stops(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("dinov2.data.locks.RENEW_SECONDS", 0.0)
    path = tmp_path / "builder-TRAIN.lock"
    real = build_module.list_slide

    def losing(*arguments):
        path.write_text("{}")
        return real(*arguments)

    monkeypatch.setattr(build_module, "list_slide", losing)
    with pytest.raises(OutputError, match=f'the lock "{path}" was deleted or taken by another builder'):
        build(tree, tmp_path, workers=0)
    assert path.read_text() == "{}"
    assert not (tmp_path / "entries-TRAIN.npy").exists()


def test_writers_at_the_same_time(tree, tmp_path):
    """Tiles come and go while the index is built: it is whole, and every row was there at some time."""
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            folder = tree / f"slide_number_{number % 12:02d}"
            path = folder / f"{folder.name}_patch_{10_001 + 2 * number}.jpeg"
            path.write_bytes(b"x")
            if number % 3 == 0:
                path.unlink()
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(5):
            report = build(tree, tmp_path, workers=2)
            entries = np.load(tmp_path / "entries-TRAIN.npy")
            assert len(entries) == report.tiles >= 1320
            steady = entries[entries["actual_index"] % 2 == 0]
            assert len(steady) == 1320
            assert len(np.unique(entries)) == len(entries)
    finally:
        stop.set()
        writer.join()
    for slide in tree.iterdir():
        settle(slide)
    build(tree, tmp_path)
    build(tree, tmp_path / "other")
    assert content(tmp_path) == content(tmp_path / "other")


def test_a_full_disk_ends_in_one_sentence_and_resumes(tree, tmp_path):
    """A limit on the size of files stands in for the end of the disk: the kernel refuses the write alike."""

    extra = tmp_path / "extra"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        return build(tree, extra, workers=0)

    text = Child(limited).outcome()
    assert text.startswith("OutputError: can not write ")
    assert text.endswith("File too large): free some space")
    assert not (extra / "entries-TRAIN.npy").exists()
    assert not list(extra.glob("*.lock"))
    assert build(tree, extra).reused > 0
    build(tree, tmp_path / "whole")
    assert content(extra) == content(tmp_path / "whole")


@pytest.mark.skipif(
    os.getuid() != 0, reason="only root can become another user, and only others lack permission"
)
def test_folders_that_can_not_be_read():
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        tree, extra = Path(place, "patches"), Path(place, "extra")
        add_slide(tree, "open", [1])
        add_slide(tree, "closed", [1])
        (tree / "closed").chmod(0)
        extra.mkdir(mode=0o777)
        extra.chmod(0o777)

        def as_nobody():
            os.setgid(65534)
            os.setuid(65534)
            return build(tree, extra, workers=0).skipped

        assert "it can not be listed (Permission denied)" in Child(as_nobody).outcome()
        assert build(tree, extra).listed == 1, "what could not be listed is tried again, and only that"
        tree.chmod(0)
        assert (
            f'the patches folder "{tree}" can not be listed (Permission denied)' in Child(as_nobody).outcome()
        )


def test_wrong_options(tree, tmp_path):
    with pytest.raises(ConfigError, match='verify is "headers" .did you mean "header"'):
        build(tree, tmp_path, verify="headers")
    with pytest.raises(ConfigError, match="workers is -1"):
        build(tree, tmp_path, workers=-1)
    with pytest.raises(DatasetError, match="can not be listed .No such file"):
        build(tree / "none", tmp_path)


def test_a_worker_that_dies_ends_in_one_sentence(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("dinov2.data.indexing.workers.ALONE_SECONDS", 0.0)
    parent = os.getpid()

    def dying(path, level):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return ""

    monkeypatch.setattr("dinov2.data.indexing.listing.check_file", dying)
    with pytest.raises(OutputError, match="a worker of the index builder ended unexpectedly"):
        build(tree, tmp_path, workers=2, verify="header")
    monkeypatch.undo()
    assert build(tree, tmp_path).tiles == 1320


def test_progress_off_a_terminal_is_a_line_now_and_then(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with caplog.at_level("INFO", logger="dinov2"), BuildProgress(40) as shown:
        for _ in range(30):
            now[0] += 1
            shown.advance(1, 50)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "10 of 40 slides (25%), 500 tiles, 50 tiles/s, 0:30 left",
        "20 of 40 slides (50%), 1,000 tiles, 50 tiles/s, 0:20 left",
        "30 of 40 slides (75%), 1,500 tiles, 50 tiles/s, 0:10 left",
    ]
