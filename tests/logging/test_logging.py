"""Where log lines go: console, one file per process, and a fresh start for every run."""

import logging
import re
import warnings

import pytest

from dinov2.errors import OutputError
from dinov2.logging import setup_logging

logger = logging.getLogger("dinov2")


@pytest.fixture(autouse=True)
def restore_logging():
    root = logging.getLogger()
    before = list(root.handlers), root.level
    yield
    setup_logging(capture_warnings=False)  # closes the files of the test
    root.handlers[:], level = before
    root.setLevel(level)


def test_file_lines_carry_level_date_process_logger_and_place(tmp_path):
    setup_logging(str(tmp_path), level=logging.INFO)
    logger.info("hello %d", 7)
    logger.debug("not recorded")
    text = (tmp_path / "logs" / "log.txt").read_text()
    assert re.fullmatch(r"I\d{8} \d\d:\d\d:\d\d \d+ dinov2 test_logging\.py:\d+\] hello 7\n", text), text


def test_console_lines_are_short_and_name_only_alarming_levels(capsys):
    setup_logging(level=logging.INFO)
    logger.info("all is well")
    logger.warning("look here")
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d all is well", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d warning: look here", second)
    assert captured.err == ""


def test_the_console_prefix_does_not_leak_into_the_file(tmp_path, capsys):
    setup_logging(str(tmp_path))
    logger.warning("once")
    text = (tmp_path / "logs" / "log.txt").read_text()
    assert text.startswith("W")
    assert text.endswith("] once\n")


def test_a_second_run_in_one_process_logs_to_its_own_folder_and_closes_the_first(tmp_path, capsys):
    root = setup_logging(str(tmp_path / "first"))
    (first,) = [handler for handler in root.handlers if type(handler) is logging.FileHandler]
    logger.info("of the first run")
    setup_logging(str(tmp_path / "second"))
    logger.info("of the second run")
    texts = {name: (tmp_path / name / "logs" / "log.txt").read_text() for name in ("first", "second")}
    assert ("of the first run" in texts["first"], "of the second run" in texts["first"]) == (True, False)
    assert ("of the first run" in texts["second"], "of the second run" in texts["second"]) == (False, True)
    assert first.stream is None or first.stream.closed
    assert capsys.readouterr().out.count("of the second run") == 1


def test_handlers_of_others_stay(tmp_path):
    root, foreign = logging.getLogger(), logging.NullHandler()
    root.addHandler(foreign)
    setup_logging(str(tmp_path))
    setup_logging()
    assert foreign in root.handlers


def test_a_named_logger_is_kept_apart_from_the_root(tmp_path):
    name = "dinov2.test_named"
    setup_logging(str(tmp_path / "own.log"), name=name)
    logging.getLogger(name).info("mine")
    logging.getLogger("other").warning("not mine")
    assert (tmp_path / "own.log").read_text().count("\n") == 1
    setup_logging(name=name)


def test_files_are_appended_to(tmp_path):
    for _ in range(2):
        setup_logging(str(tmp_path))
        logger.info("again")
    assert (tmp_path / "logs" / "log.txt").read_text().count("again") == 2


def test_python_warnings_are_recorded(tmp_path):
    setup_logging(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)  # catch_warnings has replaced the hook
        logging.captureWarnings(True)
        warnings.warn("careful", stacklevel=1)
    assert "careful" in (tmp_path / "logs" / "log.txt").read_text()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file/run/logs/log.txt cannot be written"):
        setup_logging(str(tmp_path / "file" / "run"))


def test_file_names_that_are_no_text_can_be_logged(tmp_path, capfd):
    logger = setup_logging(str(tmp_path), name="dinov2.odd_names", level=logging.INFO)
    logger.info("lost %s", "/data/\udcff.jpeg")
    printed = capfd.readouterr()
    assert "/data/\\udcff.jpeg" in printed.out and not printed.err
    assert "/data/\\udcff.jpeg" in (tmp_path / "logs" / "log.txt").read_text("utf-8")
