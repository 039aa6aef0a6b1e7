"""Where a tiling run keeps its files, and the record of each slide that is written last.

A slide is made in a folder of its own below ``.work`` and moved to its place when it is complete; then its
record is written. Whoever is killed in between leaves nothing that counts as done.
"""

import csv
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from dinov2.data.datasets.arrays import atomic_file
from dinov2.errors import OutputError

DONE = ("done", "empty")
SUMMARY_COLUMNS = ("slide", "status", "n_tiles", "tissue_mm2", "seconds", "error")


class OutputFolder:
    """The folder of a tiling run.

    Args:
        root: made if it is missing.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    @property
    def patches(self) -> Path:
        """Folder of the tiles, one folder per slide; with coordinates only, that of the CLAM files."""
        return self.root / "patches"

    def record_path(self, slide: str) -> Path:
        """File of a slide's record."""
        return self.root / "state" / f"{slide}.json"

    def lock_path(self, slide: str) -> Path:
        """Lock file of a slide."""
        return self.root / "state" / f"{slide}.lock"

    def start(self, *, index: bool) -> None:
        """Make the folders; with ``index``, also the ``entry.csv`` that the ``Pathology`` dataset reads.

        Raises:
            OutputError: the folder can not be written.
        """
        try:
            for folder in (self.patches, self.root / "state", self.root / ".work"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f'can not write to "{self.root}" ({error}): name a folder that can be written'
            ) from error
        if index:
            rows = [["patches_path"], [str(self.patches.resolve())]]
            _write_csv(self.root / "entry.csv", rows)

    def work_folder(self, slide: str) -> Path:
        """Return a fresh folder to make a slide in; what a killed process left of this slide goes away."""
        self.clear_work(slide)
        folder = self.root / ".work" / slide / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder

    def clear_work(self, slide: str) -> None:
        """Remove the folders in which a slide was being made."""
        shutil.rmtree(self.root / ".work" / slide, ignore_errors=True)

    def forget(self, slide: str, outputs: Iterable[str]) -> None:
        """Take a slide out, its record first: without that, what remains counts for nothing."""
        self.record_path(slide).unlink(missing_ok=True)
        for relative in outputs:
            path = self.root / relative
            if path.is_dir():
                # Out of sight at once: readers never meet half a folder.
                aside = self.root / ".work" / slide / uuid.uuid4().hex
                aside.parent.mkdir(parents=True, exist_ok=True)
                path.rename(aside)
                shutil.rmtree(aside)
            else:
                path.unlink(missing_ok=True)

    def publish(self, made: Path, slide: str, outputs: Iterable[str]) -> None:
        """Move the parts of a complete slide from its work folder to their places."""
        for relative in outputs:
            if (made / relative).exists():
                target = self.root / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(made / relative, target)  # noqa: PTH105
        self.clear_work(slide)

    def read_record(self, slide: str) -> dict | None:
        """Return the record of a slide, None if it has none."""
        try:
            return json.loads(self.record_path(slide).read_text("utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise OutputError(
                f'"{self.record_path(slide)}" is no record of a slide ({error}): delete it, and the slide is '
                "made again"
            ) from error

    def write_record(self, record: dict) -> None:
        """Write the record of a slide."""
        with atomic_file(str(self.record_path(record["slide"]))) as file:
            file.write(json.dumps(record, indent=1).encode("ascii"))

    def write_summary(self, others: Iterable[dict] = ()) -> None:
        """Write ``summary.csv`` from all records, and from ``others`` for slides without one."""
        records = {record["slide"]: record for record in others}
        for path in (self.root / "state").glob("*.json"):
            record = self.read_record(path.stem)
            if record is not None:
                records[record["slide"]] = record
        rows = [
            [record.get(column, "") for column in SUMMARY_COLUMNS] for _, record in sorted(records.items())
        ]
        _write_csv(self.root / "summary.csv", [list(SUMMARY_COLUMNS), *rows])


def _write_csv(path: Path, rows: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    with atomic_file(str(path)) as file:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
