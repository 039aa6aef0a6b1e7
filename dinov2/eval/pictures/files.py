"""The files of a picture: PNG, its numbers as CSV, and a sentence in ``captions.json``."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dinov2.errors import OutputError
from dinov2.eval.results import to_json

CAPTIONS = "captions.json"


class PictureFolder:
    """A folder of pictures, made if need be; files of the same names are replaced.

    Args:
        folder: Where to write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.captions: dict[str, str] = {}

    def add(
        self, name: str, picture: Image.Image, numbers: Sequence[Mapping[str, Any]], caption: str
    ) -> None:
        """Write ``<name>.png``, ``<name>.csv`` and the captions so far.

        Args:
            numbers: Rows with the same columns.
            caption: One sentence.

        Raises:
            OutputError: A file cannot be written.
        """
        self.captions[f"{name}.png"] = caption
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            picture.save(self.folder / f"{name}.png", "PNG", optimize=True)
            with (self.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                table = csv.DictWriter(file, list(numbers[0]))
                table.writeheader()
                table.writerows(numbers)
            (self.folder / CAPTIONS).write_text(to_json(self.captions, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f'the pictures in "{self.folder}" cannot be written ({error.strerror}): choose another '
                "--output-dir"
            ) from error
