"""A user's mistake on the command line: one sentence, exit status 1, and no torch before it."""

import json
import os
import signal
import subprocess
import sys

import pytest

from dinov2 import cli
from dinov2.errors import ConfigError, Interrupted
from tests.conftest import REPO

TRAIN = str(REPO / "dinov2" / "train" / "train.py")


def fail():
    raise ConfigError("optim.lr is 'fast', a number is wanted.")


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_every_process_says_why_it_stops_the_first_one_at_once(monkeypatch, capsys, local_rank):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit) as stopped:
        cli.run(fail)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: optim.lr is 'fast', a number is wanted.\n"
    assert waited == ([] if local_rank == "0" else [cli.OTHER_RANKS_DELAY_SECONDS])


def test_torchruns_report_gets_the_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        cli.run(fail)
    report = json.loads((tmp_path / "error.json").read_text())["message"]
    assert report["message"] == "error: optim.lr is 'fast', a number is wanted."


def test_a_run_that_was_asked_to_stop_leaves_with_the_status_that_means_start_again(capsys):
    def stop():
        raise Interrupted("SIGTERM came, 12 iterations are saved.", signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        cli.run(stop)
    assert stopped.value.code == cli.EXIT_START_AGAIN == 75
    assert capsys.readouterr().err == "stopped: SIGTERM came, 12 iterations are saved.\n"


@pytest.mark.parametrize(("count", "most", "status"), [("0", "2", 0), ("2", "2", 75), ("0", "0", 75)])
def test_torchrun_is_not_made_to_start_a_run_again_that_was_asked_to_stop(
    monkeypatch, capsys, count, most, status
):
    def stop():
        raise Interrupted("SIGTERM came, 12 iterations are saved.", signal.SIGTERM)

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", most)
    with pytest.raises(SystemExit) as stopped:
        cli.run(stop)
    assert stopped.value.code == status
    assert capsys.readouterr().err == "stopped: SIGTERM came, 12 iterations are saved.\n"


def test_our_own_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config-file", "no-such-file.yaml"], "no-such-file.yaml"),
        (["optim.warmup_pochs=3"], "optim.warmup_epochs"),
        (["student.num_register_tokens=0y"], "'0y'"),
        (["student.patch_size=14"], "98"),
    ],
)
def test_the_trainer_refuses_before_it_loads_torch(arguments, sentence, tmp_path):
    shim = (
        "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    shim += "finally: print('torch loaded:', 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", shim, TRAIN, "--output-dir", str(tmp_path / "out"), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and sentence in done.stderr
    assert "Traceback" not in done.stderr
    assert "torch loaded: False" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_reader_that_has_seen_enough_is_no_error():
    program = "from dinov2 import cli; cli.run(lambda: [cli.say('line') for _ in range(100_000)])"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
    process.stderr.close()


def test_a_path_with_bytes_that_are_no_text_is_said_with_them_escaped():
    done = subprocess.run(
        [sys.executable, "-c", "from dinov2 import cli; cli.say('done: /data/\\udcff.svs')"],
        cwd=REPO,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert (done.stdout, done.stderr) == ("done: /data/\\udcff.svs\n", "")
