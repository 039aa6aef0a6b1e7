"""The files of a picture: PNG, its numbers as CSV, and a sentence in ``captions.json``."""

import csv
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dinov2.errors import OutputError
from dinov2.utils.strict_json import to_json

CAPTIONS = "captions.json"


class PictureFolder:
    """A folder of pictures, made if need be; files of the same names are replaced, those of others stay.

    Args:
        folder: Where to write.
        names: All pictures that the command may write, without suffix.

    Attributes:
        captions: Of the pictures written so far.
    """

    def __init__(self, folder: str | Path, names: Collection[str]) -> None:
        self.folder = Path(folder)
        self.names = names
        self.captions: dict[str, str] = {}

    def clear(self) -> None:
        """Remove the pictures of this command that an earlier run left, with their numbers and captions.

        Raises:
            OutputError: A file cannot be removed.
        """
        others = self._captions_of_others()
        try:
            for name in self.names:
                for suffix in (".png", ".csv"):
                    (self.folder / f"{name}{suffix}").unlink(missing_ok=True)
            if others:
                self._write_captions(others)
            else:
                (self.folder / CAPTIONS).unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def add(
        self, name: str, picture: Image.Image, numbers: Sequence[Mapping[str, Any]], caption: str
    ) -> None:
        """Write ``<name>.png``, ``<name>.csv`` if there are numbers, and the captions so far.

        Args:
            name: One of the names of the folder.
            numbers: Rows with the same columns.
            caption: One sentence.

        Raises:
            OutputError: A file cannot be written.
        """
        others = self._captions_of_others()
        self.captions[f"{name}.png"] = caption
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            picture.save(self.folder / f"{name}.png", "PNG", optimize=True)
            if numbers:
                with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                    table = csv.DictWriter(file, list(numbers[0]))
                    table.writeheader()
                    table.writerows(numbers)
            self._write_captions(others | self.captions)
        except OSError as error:
            raise self._unwritable(error) from error

    def _write_captions(self, captions: Mapping[str, str]) -> None:
        (self.folder / CAPTIONS).write_text(to_json(captions, indent=2) + "\n", encoding="utf-8")

    def _captions_of_others(self) -> dict[str, str]:
        path = self.folder / CAPTIONS
        try:
            found = json.loads(path.read_text("utf-8")) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise OutputError(f'"{path}" cannot be read ({error}): repair or remove it') from error
        if not isinstance(found, dict):
            raise OutputError(f'"{path}" is no mapping of file name to caption: repair or remove it')
        return {name: text for name, text in found.items() if Path(name).stem not in self.names}

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f'the pictures in "{self.folder}" cannot be written ({error.strerror}): choose another '
            "--output-dir"
        )
