"""One checkout of DINOv2 or of this project in a process of its own, doing steps when it is told to.

Started by :class:`scripts.speed.sides.Side`, see ``serving.py``.
"""

import contextlib
import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

LR, WEIGHT_DECAY, MOMENTUM, TEACHER_TEMP, CLIP = 1e-5, 0.04, 0.994, 0.07, 3.0
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}  # large enough for the peak
GEMM_SECONDS = 1.0


class Workbench:
    """A model, its optimizer and a batch of fixed shapes.

    Args:
        settings: ``tree`` (folder of the checkout), ``config`` (YAML file, resolved), ``device``,
            ``threads``, ``autocast`` (a dtype's name, for code that leaves precision to FSDP), ``began``
            (time of the monotonic clock at which the process was started).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.began = settings["began"]
        self.phases: dict[str, float] = {}
        self.device = torch.device(settings["device"])
        if settings["threads"]:
            torch.set_num_threads(settings["threads"])
        torch.backends.cuda.matmul.allow_tf32 = True  # as the trainer does
        self.ours = Path(settings["tree"], "dinov2", "train", "step.py").exists()
        if not self.ours:
            import stand_ins

            stand_ins.before_import(self.device)
        from serving import check_origin

        from dinov2.train.ssl_meta_arch import SSLMetaArch
        from dinov2.train.train import build_optimizer

        check_origin(settings)
        if self.ours:
            from dinov2.utils.device import resolve_device

            resolve_device(self.device.type)  # prepares the process, as in the trainer
        self._note("imports")
        from dinov2.configs import dinov2_default_config

        cfg = OmegaConf.merge(
            OmegaConf.to_container(dinov2_default_config), OmegaConf.load(settings["config"])
        )
        self.cfg = cfg
        torch.manual_seed(0)
        self.resident_before = status("VmRSS")
        self.model = SSLMetaArch(cfg).to(self.device)
        if self.ours:
            self.model.prepare_for_distributed_training()
        else:
            stand_ins.after_import(self.model)
        self.model.train()
        self.optimizer = build_optimizer(cfg, self.model.get_params_groups())
        self.autocast = None if self.ours else getattr(torch, settings["autocast"])
        self._note("networks")
        self.batch: dict[str, Any] = {}
        self.stream_of: dict[str, Any] | None = None
        self.records = self.ours and Path(settings["tree"], "dinov2", "train", "cuda_graphs.py").exists()
        # Earlier checkouts of this project copy a batch when its step begins.
        self.ahead = self.ours and Path(settings["tree"], "dinov2", "train", "batches.py").exists()

    def _note(self, phase: str) -> None:
        self.phases[phase] = time.monotonic() - self.began - sum(self.phases.values())

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # What can be asked for; every answer is JSON.

    def make_batch(self) -> dict[str, Any]:
        """Draw random crops and the project's own masks."""
        from dinov2.train.input import build_collate
        from dinov2.utils.seeding import seed_everything

        seed_everything(0)
        crops, samples = self.cfg.crops, []
        for _ in range(self.cfg.train.batch_size_per_gpu):
            sizes = {
                "global_crops": (2, crops.global_crops_size),
                "local_crops": (crops.local_crops_number, crops.local_crops_size),
            }
            sample = {
                name: list(torch.randn(number, 3, side, side).unbind())
                for name, (number, side) in sizes.items()
            }
            samples.append((sample, ()))
        self.batch = self._pinned(build_collate(self.cfg, self.model.precision.input_dtype)(samples))
        self._note("batch")
        return {"masked_patches": int(self.batch["n_masked_patches"])}

    def write(self, path: str) -> dict[str, Any]:
        """Write the weights of both networks and the batch."""
        state = {"student": self.model.student.state_dict(), "teacher": self.model.teacher.state_dict()}
        torch.save({**state, "batch": self.batch}, path)
        return {}

    def read(self, path: str) -> dict[str, Any]:
        """Take the weights and the batch that another side has written.

        Raises:
            ValueError: its networks have other weights.
        """
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("student", "teacher"):
            network = getattr(self.model, name)
            own, given = (
                {(key, tuple(value.shape)) for key, value in weights.items()}
                for weights in (network.state_dict(), state[name])
            )
            if differing := own ^ given:
                key, shape = min(differing)
                raise ValueError(
                    f"{len(differing)} of the weights of the {name} are not those of the other checkout, "
                    f"such as {key} {list(shape)}: use settings that both understand in the same way"
                )
            network.load_state_dict(state[name])
        self.batch = self._pinned(state["batch"])
        return {}

    def losses(self) -> dict[str, Any]:
        """Return the losses of the batch without stochastic depth, and each network's gradient norm."""
        blocks = [block for block in self.model.student.modules() if hasattr(block, "sample_drop_ratio")]
        rates = [block.sample_drop_ratio for block in blocks]
        for block in blocks:
            block.sample_drop_ratio = 0.0
        values = self._forward_backward()
        for block, rate in zip(blocks, rates, strict=True):
            block.sample_drop_ratio = rate
        norms = {
            f"gradient norm of {name}": float(torch.nn.utils.get_total_norm(gradients))
            for name, network in self.model.student.items()
            if (gradients := [p.grad for p in network.parameters() if p.grad is not None])
        }
        self.optimizer.zero_grad(set_to_none=True)
        return {**{name: value.item() for name, value in values.items()}, **norms}

    def forward_backward(self) -> dict[str, Any]:
        """Time losses and gradients, without an update."""
        return self._timed(self._forward_backward)

    def step(self) -> dict[str, Any]:
        """Time a whole step: losses, gradients, clipping, optimizer, the teacher's update, losses read."""
        answer = self._timed(self._step)
        if "first step" not in self.phases:
            self._note("first step")
        return answer

    def startup(self) -> dict[str, float]:
        """Return the seconds of each phase up to the end of the first step."""
        return self.phases

    def parts(self, steps: int) -> dict[str, Any]:
        """Return the median seconds of each part over instrumented steps."""
        from parts import PARTS, PartTimer, instrument

        runs = []
        for _ in range(steps):
            timer = PartTimer(self.synchronize)
            with instrument(self.model, self.optimizer, timer), timer.part("other"):
                self._step()
            runs.append(timer.seconds)
        middle = {part: sorted(run.get(part, 0.0) for run in runs)[len(runs) // 2] for part in PARTS}
        return {part: seconds for part, seconds in middle.items() if seconds}

    def counts(self) -> dict[str, Any]:
        """Count a whole step."""
        from counts import count, host_tensors

        # What is compiled or recorded can not be seen; and code that meets a counter would never be compiled
        # again.
        as_written = torch.compiler.set_stance("force_eager")
        if self.records:
            from dinov2.compiled import uncompiled

            as_written = uncompiled()
        with as_written, count(host_tensors(self.batch, self.optimizer)) as counted:
            self._step()
        return counted.as_json()

    def forget_peak(self) -> dict[str, Any]:
        """Begin to watch the memory that is used at most."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")
        return {}

    def peak(self) -> dict[str, Any]:
        """Return the bytes in use at most: a GPU's, or the process's above what importing had taken."""
        if self.device.type == "cuda":
            kept = 0
            if self.records:
                from dinov2.train.cuda_graphs import kept_by_recordings

                kept = kept_by_recordings()
            return {"bytes": torch.cuda.max_memory_allocated() + kept}
        return {"bytes": status("VmHWM") - self.resident_before}

    def gemm(self) -> dict[str, Any]:
        """Return the best FLOP/s of a large matrix product in the format of the student's backbone."""
        dtype = self.model.precision.dtypes["student", "backbone"]
        size = GEMM_SIZE[self.device.type]
        one, other = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        best, end = float("inf"), time.perf_counter() + GEMM_SECONDS
        while time.perf_counter() < end:
            self.synchronize()
            begin = time.perf_counter()
            torch.nn.functional.linear(one, other)
            self.synchronize()
            best = min(best, time.perf_counter() - begin)
        return {"flops": 2 * size**3 / best, "dtype": str(dtype).removeprefix("torch."), "size": size}

    def describe(self) -> dict[str, Any]:
        """Return what the numbers depend on."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}

    # Below, what a step is.

    def _pinned(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch as the loader hands it over: for a GPU in memory that it can fetch by itself."""
        if self.device.type != "cuda":
            return batch
        return {
            name: value.pin_memory() if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }

    def _timed(self, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self.synchronize()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        values = function()
        self.synchronize()
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "problem": values.get("problem", "")}

    def _forward_backward(self) -> dict[str, Any]:
        self.optimizer.zero_grad(set_to_none=True)
        with self._precision():
            return self.model.forward_backward(self.batch, teacher_temp=TEACHER_TEMP)

    def _step(self) -> dict[str, Any]:
        if not self.ours:
            return self._published_step()
        from dinov2.train.schedules import ScheduleValues
        from dinov2.train.step import train_step

        values = ScheduleValues(
            lr=LR, weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, teacher_temp=TEACHER_TEMP, last_layer_lr=LR
        )
        if not self.ahead:
            result = train_step(self.model, self.optimizer, self.batch, values, CLIP)
        else:
            batches = self._batches_ahead()
            result = train_step(
                self.model, self.optimizer, next(batches), values, CLIP, meanwhile=batches.prepare_next
            )
        return {**result.losses, "problem": result.problem}

    def _batches_ahead(self) -> Iterator[list[dict[str, Any]]]:
        """Return the batch again and again, on its way to the device as in the trainer's loop."""
        from dinov2.train.batches import StepBatches

        if self.stream_of is not self.batch:
            dtype = self.model.precision.input_dtype
            self.stream = StepBatches(repeat([self.batch]), sys.maxsize, self.device, dtype)
            self.stream_of = self.batch
        return self.stream

    def _published_step(self) -> dict[str, Any]:
        """What DINOv2's loop does between two batches, with clipping for networks that FSDP does not wrap."""
        for group in self.optimizer.param_groups:
            group["lr"] = LR * group["lr_multiplier"]
            group["weight_decay"] = WEIGHT_DECAY * group["wd_multiplier"]
        losses = self._forward_backward()
        for network in self.model.student.values():
            torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        self.optimizer.step()
        self.model.update_teacher(MOMENTUM)
        return {name: value.item() for name, value in losses.items()}

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        dtype = self.autocast
        if dtype in (None, torch.float32):
            yield
            return
        with torch.autocast(self.device.type, dtype=dtype):
            yield


def status(name: str) -> int:
    """Return a size of /proc/self/status in bytes; elsewhere than on Linux, the process's peak."""
    file = Path("/proc/self/status")
    if not file.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(
        int(line.split()[1]) * 1024 for line in file.read_text().splitlines() if line.startswith(name)
    )


if __name__ == "__main__":
    from serving import serve

    serve(Workbench)
