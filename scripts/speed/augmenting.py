"""The augmentation of one checkout, timed when it is told to; started by ``bench_data.py --against``.

From the bytes of a JPEG file to all crops. Checkouts of this project decode as their pipeline does, DINOv2's
own as torchvision's loader does.
"""

import io
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image


class Augmenter:
    """DINOv2's public augmentation over given files.

    Args:
        settings: ``tree`` (folder of the checkout), ``files`` (folder of JPEG files), ``scales``,
            ``local_crops``, ``pipeline`` (a name, empty for code that has but one).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)  # as the loader's workers do
        from serving import check_origin

        from dinov2.data import DataAugmentationDINO

        check_origin(settings)
        self.files = [path.read_bytes() for path in sorted(Path(settings["files"]).iterdir())]
        chosen = {"pipeline": settings["pipeline"]} if settings["pipeline"] else {}
        self.augment = DataAugmentationDINO(*settings["scales"], settings["local_crops"], **chosen)

    def describe(self) -> dict[str, Any]:
        """Return what the numbers depend on."""
        return {"torch": torch.__version__, "files": len(self.files)}

    def run(self, number: int) -> dict[str, float]:
        """Make the crops of a file; return the seconds of CPU and of the clock that it took."""
        torch.manual_seed(number)
        data = self.files[number % len(self.files)]
        cpu, wall = time.process_time(), time.perf_counter()
        self.augment(self._decode(data))
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}

    def _decode(self, data: bytes) -> Any:
        if hasattr(self.augment, "image_decoder"):
            return self.augment.image_decoder(data).decode()
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")


if __name__ == "__main__":
    from serving import serve

    serve(Augmenter)
