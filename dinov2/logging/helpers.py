"""Meters: smoothed values, the progress line and the JSON lines of a run."""

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dinov2 import distributed
from dinov2.errors import counted
from dinov2.logging.sinks import Sinks

logger = logging.getLogger("dinov2")

DEFAULT_FORMAT = "{median:.4f} ({global_avg:.4f})"
MEBIBYTE = 1024.0 * 1024.0


class SmoothedValue:
    """A number that changes over time: the latest values in a window, and the average over all of them.

    Args:
        window_size: How many of the latest values ``median``, ``avg`` and ``max`` look at.
        fmt: Format of ``str()``, with the names of the properties; median and global average by default.
    """

    def __init__(self, window_size: int = 20, fmt: str | None = None) -> None:
        self.window: deque[float] = deque(maxlen=window_size)
        self.total = 0.0
        self.count = 0
        self.fmt = fmt or DEFAULT_FORMAT

    def update(self, value: float, num: int = 1) -> None:
        """Add ``value``, which stands for ``num`` equal ones in the global average."""
        self.window.append(value)
        self.count += num
        self.total += value * num

    @property
    def median(self) -> float:
        """The lower median of the window: with an even number of values, the smaller of the middle two."""
        return sorted(self.window)[(len(self.window) - 1) // 2] if self.window else math.nan

    @property
    def avg(self) -> float:
        """The mean of the window."""
        return sum(self.window) / len(self.window) if self.window else math.nan

    @property
    def global_avg(self) -> float:
        """The mean of everything ever added."""
        return self.total / self.count if self.count else math.nan

    @property
    def max(self) -> float:
        """The largest value of the window."""
        return max(self.window, default=math.nan)

    @property
    def value(self) -> float:
        """The latest value."""
        return self.window[-1] if self.window else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Return the window and the totals as plain numbers."""
        return {"window": list(self.window), "total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.window.clear()
        self.window.extend(state["window"])
        self.total, self.count = state["total"], state["count"]

    def __str__(self) -> str:
        names = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in names})


class MetricLogger:
    """Named meters, the loop that times them, and the file they are written to.

    Args:
        delimiter: Put between the parts of a printed line.
        output_file: JSON lines file to append to; only the main process writes it.
    """

    def __init__(self, delimiter: str = "\t", output_file: str | None = None) -> None:
        self.meters: defaultdict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter = delimiter
        self.output_file = output_file
        self.sinks = Sinks()  # get the rows of the file, too
        self._rows_lost = 0  # since the file could last be written

    def update(self, **scalars: float | torch.Tensor) -> None:
        """Add one value to each named meter; 0-d tensors are read off their device."""
        for name, value in scalars.items():
            self.meters[name].update(value.item() if isinstance(value, torch.Tensor) else value)

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Use ``meter`` under ``name``, for a format or window of its own."""
        self.meters[name] = meter

    def __getattr__(self, name: str) -> SmoothedValue:
        # Only reached when no real attribute has this name; `meters` is absent while unpickling.
        meters = self.__dict__.get("meters", {})
        if name in meters:
            return meters[name]
        raise AttributeError(f"{type(self).__name__} has no attribute or meter {name!r}")

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return all meters as plain numbers, for the run state."""
        return {name: meter.state_dict() for name, meter in self.meters.items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Continue from :meth:`state_dict`."""
        for name, meter_state in state.items():
            self.meters[name].load_state_dict(meter_state)

    def synchronize_between_processes(self) -> None:
        """Make the global averages those over all processes, in one collective.

        Every process must have the same meters. Windows stay local.
        """
        if not distributed.is_enabled() or not self.meters:
            return
        names = sorted(self.meters)
        totals = torch.tensor(
            [[self.meters[name].count, self.meters[name].total] for name in names],
            dtype=torch.float64,
            device=distributed.collective_device(),
        )  # [meters, 2]
        for name, (count, total) in zip(names, distributed.all_reduce_sum_(totals).tolist(), strict=True):
            self.meters[name].count, self.meters[name].total = int(count), total

    def dump_in_output_file(self, iteration: int, iter_time: float, data_time: float, **extra: float) -> None:
        """Append one JSON line: iteration, seconds per iteration and of waiting for data, window medians.

        Upstream's fields come first and in its order; ``extra`` follows. Values that are not finite, which
        JSON cannot express, are written as null. A row that cannot be written is lost, with a warning for the
        first of several.
        """
        if self.output_file is None or not distributed.is_main_process():
            return
        medians = {name: meter.median for name, meter in self.meters.items()}
        row = {"iteration": iteration, "iter_time": iter_time, "data_time": data_time} | medians | extra
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        line = json.dumps(finite, allow_nan=False) + "\n"
        scalars = {f"train/{name}": value for name, value in row.items() if name != "iteration"}
        self.sinks.write(iteration, scalars)
        try:
            append_line(Path(self.output_file), line.encode())
        except OSError as error:
            if not self._rows_lost:
                logger.warning("rows are missing in %s from now on: %s", self.output_file, error)
            self._rows_lost += 1
            return
        if self._rows_lost:
            logger.warning(
                "%s can be written again; %s missing", self.output_file, counted(self._rows_lost, "row")
            )
            self._rows_lost = 0

    def log_every(
        self,
        iterable: Iterable[Any],
        print_freq: int,
        header: str | None = None,
        n_iterations: int | None = None,
        start_iteration: int = 0,
        *,
        images_per_iteration: int | None = None,
        shown: Collection[str] | None = None,
        ends: Callable[[], bool] = lambda: False,
        waited: Callable[[], float] = lambda: 0.0,
    ) -> Iterator[Any]:
        """Yield ``n_iterations - start_iteration`` items and log at regular ones and at the last.

        Nothing is drawn from ``iterable`` beyond the last item, so a run that is already complete takes no
        step. A line stands for the iteration whose work has just been done.

        Args:
            iterable: Batches; may be endless.
            print_freq: Log at iterations that are multiples of this.
            header: First word of every line.
            n_iterations: Index after the last iteration; None means as many as ``iterable`` has.
            start_iteration: Index of the first iteration.
            images_per_iteration: Images of all processes together. When given, the line is the short one:
                time left, images per second, share of time spent waiting for data, and losses.
            shown: Meters on the short line, None for those that end in ``loss``.
            ends: Tells after an item that ``iterable`` ends with it, before ``n_iterations``.
            waited: Seconds that were lost for an item while the one before was worked on; they count as
                waiting for data.
        """
        n_iterations = len(iterable) if n_iterations is None else n_iterations
        line = _ProgressLine(self, header or "", n_iterations, images_per_iteration, shown)
        iter_time, data_time = SmoothedValue(fmt="{avg:.6f}"), SmoothedValue(fmt="{avg:.6f}")
        done, start = 0, time.perf_counter()
        last = start
        iterator = iter(iterable)
        for iteration in range(start_iteration, n_iterations):
            try:
                item = next(iterator)
            except StopIteration:
                break
            data_time.update(time.perf_counter() - last + waited())
            yield item
            now = time.perf_counter()
            iter_time.update(now - last)
            done += 1
            if iteration % print_freq == 0 or iteration == n_iterations - 1 or ends():
                rates = line.rates(iter_time)
                self.dump_in_output_file(iteration, iter_time.avg, data_time.avg, **rates)
                logger.info("%s", line.text(iteration, iter_time, data_time, rates))
            last = now
        elapsed = time.perf_counter() - start
        logger.info(
            "%s Total time: %s (%.6f s / it)",
            header or "",
            _clock(elapsed),
            elapsed / max(done, 1),
        )


def append_line(path: Path, line: bytes) -> None:
    """Append a whole line or nothing; a full disk may take a part of it."""
    with path.open("ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


class _ProgressLine:
    """The text of a progress line, in upstream's long form or in the short one."""

    def __init__(
        self,
        metrics: MetricLogger,
        header: str,
        n_iterations: int,
        images_per_iteration: int | None,
        shown: Collection[str] | None,
    ) -> None:
        self.metrics = metrics
        self.header = header
        self.n_iterations = n_iterations
        self.images_per_iteration = images_per_iteration
        self.shown = shown

    def rates(self, iter_time: SmoothedValue) -> dict[str, float]:
        """What the short form measures beyond the meters; nothing in the long form, as upstream."""
        if self.images_per_iteration is None:
            return {}
        rates = {"images_per_second": self.images_per_iteration / max(iter_time.avg, 1e-9)}
        if torch.cuda.is_available():
            rates["max_mem_mib"] = torch.cuda.max_memory_allocated() / MEBIBYTE
        return rates

    def text(
        self, iteration: int, iter_time: SmoothedValue, data_time: SmoothedValue, rates: dict[str, float]
    ) -> str:
        width = len(str(self.n_iterations))
        remaining = iter_time.avg * (self.n_iterations - 1 - iteration)
        parts = [
            self.header,
            f"[{iteration:{width}d}/{self.n_iterations}]",
            f"eta: {_clock(remaining)}",
        ]
        if rates:
            parts += self._short(iter_time, data_time, rates)
        else:
            parts += [str(self.metrics), f"time: {iter_time}", f"data: {data_time}"]
            if torch.cuda.is_available():
                parts.append(f"max mem: {torch.cuda.max_memory_allocated() / MEBIBYTE:.0f}")
        return self.metrics.delimiter.join(part for part in parts if part)

    def _short(
        self, iter_time: SmoothedValue, data_time: SmoothedValue, rates: dict[str, float]
    ) -> Iterator[str]:
        yield f"images/s: {rates['images_per_second']:.1f}"
        yield f"data wait: {100 * data_time.avg / max(iter_time.avg, 1e-9):.0f} %"
        for name, meter in self.metrics.meters.items():
            if name.endswith("loss") if self.shown is None else name in self.shown:
                yield f"{name}: {meter.median:.4f}"
        if "max_mem_mib" in rates:
            yield f"max mem: {rates['max_mem_mib']:.0f} MiB"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))
