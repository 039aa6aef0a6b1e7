"""The loop over training steps: what may interrupt it, and going back once when steps keep failing."""

import logging
import math
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch.utils.data import Dataset

from dinov2 import distributed
from dinov2.configs.scaling import images_per_iteration
from dinov2.data.data_order import DataOrder
from dinov2.data.unreadable import UnreadableImages
from dinov2.errors import CollapsedError, Interrupted, WeightsError
from dinov2.logging import MetricLogger, SmoothedValue
from dinov2.train.bad_steps import BadSteps
from dinov2.train.batches import MicroBatches, StepBatches
from dinov2.train.compilation import WatchedCompiler
from dinov2.train.diagnosis import diagnose
from dinov2.train.freezing import BackboneStart
from dinov2.train.input import build_data_loader, in_steps, own_streams, step_samples, stream_count
from dinov2.train.monitoring.judge import Decision
from dinov2.train.monitoring.monitor import Monitor
from dinov2.train.preemption import StopRequest, signal_name
from dinov2.train.run_state import METRICS_FILE, Restored, drop_rows_from, save_if_due, save_now
from dinov2.train.schedules import ScheduleValues, build_schedulers
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.step import NonFiniteLossError, StepResult, train_step, unreadable_images
from dinov2.train.watchdog import Watchdog
from dinov2.utils.seeding import seed_everything

logger = logging.getLogger("dinov2")

# After going back the fp16 loss scale is that of the checkpoint divided by this, but at least 1.
SCALE_DIVISOR = 2.0**8

SKIPPED = "skipped_steps"  # a meter that holds one number, the count since the start of the run


class Place(NamedTuple):
    """Where a run stands: what comes next."""

    iteration: int
    order: DataOrder


class TrainingLoop:
    """Does the steps of a run whose parts are ready.

    Args:
        cfg: resolved config.
        model: networks, in training mode.
        dataset: training set.
        optimizer: of the student.
        metrics: meters of the run.
        restored: what the run starts from; its checkpointer saves.
        max_iterations: of the whole run.
        stop: signals of this process.
        watch: is told what this process is doing.
        monitor: evaluates the networks in the loop; None for a run without.
    """

    def __init__(
        self,
        cfg: DictConfig,
        model: SSLMetaArch,
        dataset: Dataset,
        optimizer: torch.optim.Optimizer,
        metrics: MetricLogger,
        restored: Restored,
        *,
        max_iterations: int,
        stop: StopRequest,
        watch: Watchdog,
        monitor: Monitor | None = None,
    ) -> None:
        self.cfg, self.model, self.dataset, self.optimizer = cfg, model, dataset, optimizer
        self.monitor, self.continues = monitor, restored.continues
        self.metrics, self.checkpointer = metrics, restored.checkpointer
        self.max_iterations, self.stop, self.watch = max_iterations, stop, watch
        self.images_per_iteration = images_per_iteration(cfg, distributed.get_global_size())
        self.schedules = build_schedulers(cfg)
        self.backbone_start = BackboneStart(cfg, model.student["backbone"])
        self.compiler = WatchedCompiler()
        self.unreadable = UnreadableImages(cfg.train.output_dir, cfg.train.max_bad_fraction)
        earlier = metrics.meters.get(SKIPPED)  # of the run that is continued
        self.bad = BadSteps(cfg.train.max_bad_steps, int(earlier.total) if earlier else 0)
        self.went_back = False
        self.interrupted: Interrupted | None = None
        self.ended = Decision()  # before the last iteration, by what an evaluation has found

    def run(self, place: Place) -> None:
        """Train from ``place`` to the end, or to where an evaluation in the loop ends the run.

        Raises:
            CollapsedError: on every rank, with the files of an end.
            Interrupted: on every rank, after a step and with a checkpoint of it, or before the first step.
            NonFiniteLossError: on every rank, with the diagnosis.
        """
        following: Place | None = place
        if self.monitor is not None:
            latest = place.iteration - 1 if self.continues else place.iteration
            temperature = self.schedules.at(latest).teacher_temp
            self.ended = self.monitor.begin(
                place.iteration, continues=self.continues, teacher_temp=temperature
            )
            if not self.ended.stop:  # that took its time
                self.stop.stop_before_training()
        if self.ended.stop:
            self._end_before_a_step(place)
            following = None
        while following is not None:
            following = self._stretch(following)
        if self.monitor is not None:
            self.monitor.conclude()
        if self.ended.failed:
            self.checkpointer.wait(must_succeed=True)
            raise CollapsedError(
                f"the run has ended early: {self.ended.why}. Ship what best/ holds, if anything, and start "
                "anew with a lower optim.base_lr or other temperatures of the teacher; the same command "
                "again takes no further step"
            )

    def _end_before_a_step(self, place: Place) -> None:
        """End a run that is to stop before it goes on, with the files of an end."""
        if not place.iteration:
            raise WeightsError(f"no step is taken from these weights: {self.ended.why}")
        latest = place.iteration - 1
        logger.warning("no step is taken after iteration %d: %s", latest, self.ended.why)
        newest = distributed.broadcast_object(Path(self.checkpointer.get_checkpoint_file()).name)
        if not newest.startswith("model_final"):
            save_if_due(self.cfg, self.model, self.checkpointer, latest, is_last=True, order=place.order)

    def _stretch(self, place: Place) -> Place | None:
        """Train to the end of the run, or until steps fail; return where to go on."""
        loader = build_data_loader(
            self.cfg, self.dataset, place.iteration, self.model.precision.input_dtype, order=place.order
        )
        steps = StepBatches(
            in_steps(loader, self.cfg.optim.accumulate_steps),
            self.max_iterations - place.iteration,
            self.model.device,
            self.model.precision.input_dtype,
        )
        batches = self.metrics.log_every(
            self._announced(steps, place.iteration),
            self.cfg.train.log_period,
            "Training",
            self.max_iterations,
            place.iteration,
            images_per_iteration=self.images_per_iteration,
            ends=lambda: self.ended.stop,
            waited=steps.waited,
        )
        order = place.order
        for iteration, micro_batches in enumerate(batches, start=place.iteration):
            values = self.backbone_start.enter(iteration, self.schedules.at(iteration))
            with self.compiler.watched():
                result = train_step(
                    self.model,
                    self.optimizer,
                    micro_batches,
                    values,
                    self.cfg.optim.clip_grad,
                    seed=partial(self._seed, iteration),
                    stop_requested=self.stop.requested,
                    meanwhile=partial(self._prepare_next, steps, iteration),
                )
            drawn = order
            order = order.advanced(stream_count(self.cfg), self.cfg.train.batch_size_per_gpu)
            self.bad.update(iteration, result.problem)
            self._record(iteration, micro_batches, values, result)
            if self.bad.too_many or (iteration == self.max_iterations - 1 and self.bad.only_bad):
                found = self._diagnose(iteration, micro_batches, values, drawn)
                return self._go_back(iteration, f"{result.problem}; {found}", order)
            self._evaluate(iteration, values, result)
            self._save(iteration, order, result)
        if self.interrupted is not None:
            raise self.interrupted
        return None

    def _announced(self, steps: StepBatches, start: int) -> Iterator[MicroBatches]:
        """Yield the micro-batches of each step and tell the watchdog what this process is doing."""
        self.watch.phase(f"starting the loader for iteration {start}")
        for iteration in count(start):
            # Only now has the last step's row been written.
            if self.interrupted is not None or self.ended.stop:
                return
            self.watch.phase(f"waiting for the data of iteration {iteration}")
            micro_batches = next(steps)
            self.watch.phase(f"computing iteration {iteration}")
            yield micro_batches

    def _prepare_next(self, steps: StepBatches, iteration: int) -> None:
        """Have the batches of the next step ready before this one's results are."""
        self.watch.phase(f"waiting for the data of iteration {iteration + 1}")
        steps.prepare_next()
        self.watch.phase(f"computing iteration {iteration}")

    def _seed(self, iteration: int, number: int) -> None:
        """Make a step's own randomness, stochastic depth, a function of where the run stands."""
        seed_everything(self.cfg.train.seed, own_streams(self.cfg)[number], iteration)

    def _record(
        self, iteration: int, micro_batches: list[Any], values: ScheduleValues, result: StepResult
    ) -> None:
        """Count what came with the batch and fill the meters."""
        self.unreadable.update(
            iteration,
            unreadable_images(micro_batches),
            samples=self.images_per_iteration,
            total=result.unreadable,
        )
        if iteration % self.cfg.train.log_period == 0 or iteration == self.max_iterations - 1:
            self.unreadable.report()
        losses = {"total_loss": result.losses["total_loss"], **result.losses}
        norms = {f"grad_norm_{name}": norm for name, norm in result.grad_norms.items()}
        # A value that is not finite would stay in a meter's average for ever; the step is counted instead.
        measured = {name: value for name, value in {**losses, **norms}.items() if math.isfinite(value)}
        self.metrics.update(
            lr=values.lr,
            wd=values.weight_decay,
            mom=values.momentum,
            last_layer_lr=values.last_layer_lr,
            current_batch_size=sum(len(images["collated_global_crops"]) / 2 for images in micro_batches),
            teacher_temp=values.teacher_temp,
        )
        count = SmoothedValue(window_size=1)
        count.update(float(self.bad.total))
        self.metrics.add_meter(SKIPPED, count)
        self.metrics.update(**measured)

    def _evaluate(self, iteration: int, values: ScheduleValues, result: StepResult) -> None:
        """Evaluate the networks if it is time; a run that is to stop saves first, and evaluates on return."""
        is_last = iteration == self.max_iterations - 1
        if self.monitor is None or (result.stop_requested and not is_last):
            return
        if self.monitor.due(iteration + 1, is_last=is_last):
            self.ended = self.monitor.evaluate(iteration + 1, values.teacher_temp)
        if self.ended.stop:
            logger.warning("the run ends after iteration %d: %s", iteration, self.ended.why)

    def _save(self, iteration: int, order: DataOrder, result: StepResult) -> None:
        """Save what is due, and note to stop if a rank was asked to."""
        is_last = iteration == self.max_iterations - 1 or self.ended.stop
        self.watch.phase(f"saving after iteration {iteration}")
        saved = save_if_due(
            self.cfg,
            self.model,
            self.checkpointer,
            iteration,
            is_last=is_last,
            order=order,
            healthy=result.stepped,
        )
        if not result.stop_requested or is_last:
            return
        if not saved:
            save_now(self.cfg, self.model, self.checkpointer, iteration, order)
        self.checkpointer.wait(must_succeed=True)
        number = self.stop.agreed_signal()
        self.interrupted = Interrupted(
            f"the signal {signal_name(number)} came; the run is saved after iteration {iteration}, and the "
            "same command goes on from there",
            number,
        )

    def _diagnose(
        self, iteration: int, micro_batches: list[Any], values: ScheduleValues, order: DataOrder
    ) -> str:
        self.watch.phase(f"diagnosing iteration {iteration}")
        return diagnose(
            self.model,
            micro_batches,
            values.teacher_temp,
            partial(self._seed, iteration),
            iteration=iteration,
            images=self._image_names(order),
            output_dir=self.cfg.train.output_dir,
        )

    def _image_names(self, order: DataOrder) -> list[str]:
        """Name the images of this process's step that begins at ``order``."""
        locate = getattr(self.dataset, "get_image_path", lambda index: "")
        indices = step_samples(self.cfg, self.dataset, order)
        return [str(locate(int(index))) or f"sample {index}" for index in indices]

    def _go_back(self, iteration: int, problem: str, order: DataOrder) -> Place:
        """Return to the last checkpoint, once; the data goes on behind the batches that failed."""
        self.checkpointer.wait()
        told = f"iteration {iteration}: the last {self.bad.in_a_row} steps were skipped, because {problem}"
        if self.went_back or not self.checkpointer.has_checkpoint():
            why = (
                "the run has gone back to a checkpoint once already"
                if self.went_back
                else ("there is no checkpoint to go back to")
            )
            raise NonFiniteLossError(
                f"{told}; {why}. No weights were changed by these steps; resume with a lower optim.base_lr, "
                "or with bf16 or fp32 in compute_precision"
            )
        self.watch.phase(f"going back from iteration {iteration}")
        self.checkpointer.require_own_folder()
        self.went_back = True
        self.bad.forgive()
        self.optimizer.zero_grad(set_to_none=True)
        loaded = self.checkpointer.resume_or_load(resume=True)
        back = loaded["iteration"] + 1
        if distributed.is_main_process():
            drop_rows_from(Path(self.cfg.train.output_dir, METRICS_FILE), back)
        self.metrics.sinks.rewind(back)
        if self.monitor is not None:
            self.monitor.go_back(back)
        scale = ""
        scaler = self.model.fp16_scaler
        if scaler is not None:
            lower = max(1.0, scaler.get_scale() / SCALE_DIVISOR)
            scaler.update(lower)
            scale = f", with a loss scale of {lower:g}"
        logger.warning(
            "%s. The run goes back to iteration %d%s, and on with the data behind the failed batches",
            told,
            back,
            scale,
        )
        return Place(back, order)
