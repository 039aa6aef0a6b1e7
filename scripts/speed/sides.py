"""Processes that do training steps when asked, one at a time, and the two of them that are compared."""

from pathlib import Path

from dinov2.train import cuda_graphs
from scripts.speed.checkouts import Checkout, SideError

SIDE_FILE = Path(__file__).with_name("side.py")
WARM_UP_STEPS = 20  # at most; fp16 looks for its loss scale in the first ones
MORE_STEPS = {"cpu": 1, "cuda": 1 + cuda_graphs.WARM_UP_STEPS}  # until a GPU has recorded its blocks


class Side(Checkout):
    """A checkout that trains, see ``side.py``.

    Args:
        tree: folder of the checkout, in which ``dinov2`` lies.
        config: YAML file of the resolved config.
        device: ``cpu`` or ``cuda``.
        threads: of the process; 0 for PyTorch's default.
        autocast: name of the dtype for code that leaves precision to FSDP.
    """

    def __init__(
        self, tree: Path, config: Path, device: str, threads: int, autocast: str = "float32"
    ) -> None:
        settings = {"config": str(config), "device": device, "autocast": autocast}
        super().__init__(tree, SIDE_FILE, settings, threads)
        self._more_steps = MORE_STEPS[device]

    def warm_up(self) -> None:
        """Do steps until one moves the weights, and a few more.

        Raises:
            SideError: none does.
        """
        for _ in range(WARM_UP_STEPS):
            problem = self.ask("step")["problem"]
            if not problem:
                for _ in range(self._more_steps):
                    self.ask("step")
                return
        raise SideError(f"{self.tree}: {WARM_UP_STEPS} steps were skipped, the last because {problem}")
