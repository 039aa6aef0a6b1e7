"""The k-NN evaluation of one checkout, timed when it is told to; started by ``bench_eval.py --against``."""

import time
from typing import Any

import numpy as np
import torch

NUM_CLASSES = 9
BATCH = 256  # queries at a time, as the evaluation's loader hands them over


class Voter:
    """DINOv2's public ``KnnModule`` over given features, on the CPU.

    Args:
        settings: ``tree`` (folder of the checkout), ``stored`` and ``queries`` (``.npy`` files), ``k``,
            ``threads``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        from serving import check_origin

        from dinov2.eval.knn import KnnModule

        check_origin(settings)
        # DINOv2's own module exchanges queries between processes, be there one.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        stored, queries = (torch.from_numpy(np.load(settings[name])) for name in ("stored", "queries"))
        labels = torch.arange(len(stored)) % NUM_CLASSES
        self.queries, self.k = queries, settings["k"]
        self.module = KnnModule(stored, labels, [self.k], 0.07, "cpu", num_classes=NUM_CLASSES)

    def describe(self) -> dict[str, Any]:
        """Return what the numbers depend on."""
        return {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def run(self) -> dict[str, Any]:
        """Let all neighbours vote; return the seconds that it took and the predictions."""
        cpu, wall = time.process_time(), time.perf_counter()
        with torch.inference_mode():
            scores = torch.cat([self.module(batch)[self.k] for batch in self.queries.split(BATCH)])
        seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        return {**seconds, "predictions": scores.argmax(dim=1).tolist()}


if __name__ == "__main__":
    from serving import serve

    serve(Voter)
