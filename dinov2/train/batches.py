"""The batches of one step after the other; on a GPU the next are made ready while it computes."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from dinov2.data.device_crops import NORMALISATION, finish_batch

# Entries of a collated batch that the device works on.
ON_DEVICE = (
    "collated_global_crops",
    "collated_local_crops",
    "collated_masks",
    "mask_indices_list",
    "masks_weight",
    NORMALISATION,
)

MicroBatches = list[dict[str, Any]]


class StepBatches(Iterator[MicroBatches]):
    """Iterates over the micro-batches of each step.

    :meth:`prepare_next`, called when a step has been handed to a GPU and before the host waits for its
    results, draws those of the next, copies them on a stream of its own and starts what the ``device``
    pipeline leaves to the device. Elsewhere it does nothing, and batches come as the loader makes them.

    Args:
        steps: collated micro-batches of every step.
        count: how many steps will be asked for; nothing is drawn beyond them.
        device: of the networks.
        dtype: number format of the crops.
    """

    def __init__(
        self, steps: Iterable[MicroBatches], count: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._steps = iter(steps)
        self._left = count
        self._device, self._dtype = device, dtype
        self._ready: MicroBatches | None = None
        self._failure: Exception | None = None
        self._gap: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __next__(self) -> MicroBatches:
        """Return the micro-batches of the next step.

        Raises:
            StopIteration: all have been returned.
            Exception: whatever the loader raised, in the step that needs what it could not make.
        """
        if self._failure is not None:
            raise self._failure
        if self._ready is None:
            if not self._left:
                raise StopIteration
            return self._draw()
        ready, self._ready = self._ready, None
        return ready

    def prepare_next(self) -> None:
        """Make the next step's micro-batches ready, see the class; raises nothing."""
        if self._copies is None or not self._left or self._failure is not None:
            return
        computed, arrived = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        computed.record()
        try:
            drawn = self._draw()
            arrived.record()
            self._gap = computed, arrived
            self._ready = [self._on_device(images) for images in drawn]
        except Exception as error:
            self._failure = error

    def waited(self) -> float:
        """Return for how many seconds the device had nothing to do but to wait for data, since last asked.

        Call it once the results of the step are there. Without a GPU the host waits, in ``next``.
        """
        gap, self._gap = self._gap, None
        return gap[0].elapsed_time(gap[1]) / 1e3 if gap is not None else 0.0

    def _draw(self) -> MicroBatches:
        self._left -= 1
        return next(self._steps)

    def _on_device(self, images: dict[str, Any]) -> dict[str, Any]:
        computing = torch.cuda.current_stream(self._device)
        moved = {name: images[name] for name in ON_DEVICE if name in images}
        with torch.cuda.stream(self._copies):
            moved = {name: value.to(self._device, non_blocking=True) for name, value in moved.items()}
        computing.wait_stream(self._copies)
        for value in moved.values():
            value.record_stream(computing)  # its memory is that of the other stream
        return finish_batch({**images, **moved}, self._device, self._dtype)
