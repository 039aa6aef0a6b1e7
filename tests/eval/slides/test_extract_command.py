"""The extraction as a user starts it: options, exit status, several processes, killed at any time."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
import torch

from dinov2.data.slides.recipe import TilingRecipe
from dinov2.errors import ConfigError
from dinov2.eval.slides import extract
from dinov2.eval.slides.bags import find_bags, read_bag
from dinov2.eval.slides.extraction import extract_all
from tests.conftest import REPO
from tests.eval.slides.conftest import SVS, features_by_hand
from tests.eval.slides.test_extraction import content, windows_of

RECIPE = TilingRecipe(overlap=112, max_tiles=40)
AS_RECIPE = ["--overlap", "112", "--max-tiles", "40"]


@pytest.fixture
def command(tiny_case, slides, tmp_path):
    """Makes the arguments of the command."""

    def make(output=tmp_path / "bags", **given):
        options = {
            "config-file": tiny_case.config,
            "pretrained-weights": tiny_case.weights,
            "slides": slides,
            "output-dir": output,
            "workers": 0,
            **given,
        }
        return [part for key, value in options.items() for part in (f"--{key}", str(value))]

    return make


def run(arguments):
    extract.main(extract.get_args_parser().parse_args(arguments))


def test_the_command_writes_bags_lists_and_a_last_line(command, slides, tmp_path, capsys):
    (tmp_path / "list.csv").write_text(
        f"path,process\n{slides}/top.tiff,1\n{slides}/middle.tif,0\n{slides}/missing.svs,1\n"
    )
    with pytest.raises(SystemExit, match="1"):
        run(command(slides=tmp_path / "list.csv"))
    assert set(find_bags(tmp_path / "bags")) == {"top"}
    recipe = json.loads(read_bag(tmp_path / "bags/h5_files/top.h5").attributes["recipe"])
    assert (
        recipe["encoder"]["precision"] == "float32"
    )  # the config says fp16, which a CPU does not compute in
    with (tmp_path / "bags/skipped.csv").open() as file:
        skipped = {row["slide"]: (row["status"], row["reason"]) for row in csv.DictReader(file)}
    assert skipped["middle"] == ("skipped", "process is 0")
    assert skipped["missing"][0] == "failed" and 'missing.svs" is missing' in skipped["missing"][1]
    with (tmp_path / "bags/summary.csv").open() as file:
        assert {row["slide"]: row["status"] for row in csv.DictReader(file)} == {
            "top": "done",
            "middle": "skipped",
            "missing": "failed",
        }
    assert "slides: 1 done, 1 failed, 1 skipped" in capsys.readouterr().out
    run([*command(slides=tmp_path / "list.csv"), "--skip-errors"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tile": 250}, "patches of 32 px, which 250 px do not divide into: give --resize 224"),
        ({"batch-size": 0}, "batch size of the extraction is 0"),
        ({"workers": -1}, "number of workers of the extraction is -1"),
        ({"backend": "bioformats"}, 'backend is "bioformats"'),
        ({"min-tissue": 2}, "tissue"),
    ],
)
def test_options_that_can_not_be_used_are_refused_before_any_slide_is_opened(command, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        run(command(**options))


def test_h5py_is_only_needed_for_its_own_format(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match="h5py.*--format pt"):
        run(command())


def test_a_run_that_is_killed_at_random_and_started_again_gives_the_same_files(extraction, tmp_path):
    expected = extraction(recipe=RECIPE, output=tmp_path / "whole", format_name="both")
    begin = time.monotonic()
    extract_all(expected)
    seconds = time.monotonic() - begin
    again = extraction(recipe=RECIPE, output=tmp_path / "killed", format_name="both")
    draw = random.Random(0)
    for share in (0.25, 0.6):
        process = get_context("fork").Process(target=extract_all, args=(again,))
        process.start()
        process.join(seconds * (share + draw.uniform(-0.1, 0.1)))
        process.kill()
        process.join()
    extract_all(again)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def launched(arguments, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, "-m", "dinov2.eval.slides.extract", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPO,
        start_new_session=True,
    )


def finished(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_two_processes_share_out_the_slides(command, extraction, tmp_path):
    extract_all(extraction(output=tmp_path / "alone"))
    output = finished(launched(command(tmp_path / "shared", workers=1), processes=2))
    alone, shared = (find_bags(tmp_path / name) for name in ("alone", "shared"))
    assert list(alone) == list(shared) == ["middle", "real", "top"]
    for name in alone:
        one, other = read_bag(alone[name]), read_bag(shared[name])
        assert torch.equal(one.features, other.features) and torch.equal(one.coords, other.coords)
    logs = "".join(path.read_text() for path in (tmp_path / "shared/logs").iterdir())
    assert [logs.count(f"] {name}: ") for name in alone] == [1, 1, 1]
    assert output.count("slides: 3 done") == 1


@pytest.mark.slow
def test_killed_twenty_times_with_all_its_processes_it_gives_the_same_files(command, extraction, tmp_path):
    whole = extraction(recipe=RECIPE, output=tmp_path / "whole", format_name="both")
    extract_all(whole)
    arguments = [*command(tmp_path / "killed", workers=2, format="both"), *AS_RECIPE]
    draw = random.Random(0)
    for kill in range(20):
        process = launched(arguments)
        log = tmp_path / "killed/logs/log.txt"
        size = log.stat().st_size if log.exists() else 0
        while process.poll() is None and not (log.exists() and log.stat().st_size > size):
            time.sleep(0.05)  # until it has begun
        time.sleep(draw.uniform(0, 6))
        os.kill(process.pid, signal.SIGKILL) if kill % 2 else os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if kill % 5 == 4:  # else the later kills would meet a run with nothing left to do
            name = sorted(path.stem for path in (tmp_path / "killed/state").glob("*.json"))
            if name:
                (tmp_path / f"killed/state/{name[0]}.json").unlink()
    finished(launched(arguments))
    made = {name: bytes for name, bytes in content(tmp_path / "killed").items() if name != "config.yaml"}
    assert made == content(tmp_path / "whole")
    assert not list((tmp_path / "killed/.work").iterdir())


@pytest.mark.slow
def test_the_real_vit_gives_the_features_of_windows_cut_by_hand(real_vits14, pixels, tmp_path):
    from dinov2.configs import resolve_config
    from dinov2.eval.setup import build_model_for_eval

    config = REPO / "dinov2/configs/eval/vits14_pretrain.yaml"
    arguments = f"--config-file {config} --checkpoint {real_vits14} --slides {SVS} --workers 2"
    number_format = "compute_precision.teacher.backbone.mixed_precision.param_dtype=fp32"
    finished(launched([*arguments.split(), "--output-dir", str(tmp_path), "--opts", number_format]))
    bag = read_bag(tmp_path / "h5_files/cmu_small_region.h5")
    assert bag.features.shape == (len(bag), 384) and len(bag) > 40
    model = build_model_for_eval(resolve_config(str(config), ["train.device=cpu"]), str(real_vits14))
    expected = features_by_hand(model, windows_of(pixels, bag.coords.numpy()[:8], 224))
    assert (bag.features[:8] - expected).abs().max() < 1e-5 * expected.abs().max()
