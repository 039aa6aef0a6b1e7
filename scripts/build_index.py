"""Builds the index of a tile tree, as ``python -m dinov2.data.index`` does; see docs/data_index.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2 import cli  # noqa: E402 - the lines above make the package known where it is not installed
from dinov2.data.index import main  # noqa: E402

if __name__ == "__main__":
    cli.run(main)
