"""Cuts whole-slide images into tiles: ``python scripts/tile_slides.py --slides DIR --output DIR``."""

from dinov2 import cli
from dinov2.data.slides.tile import main

if __name__ == "__main__":
    cli.run(main)
