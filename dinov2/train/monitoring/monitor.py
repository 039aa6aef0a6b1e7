"""Evaluation in the loop: when it is due, what it computes, and the files it leaves."""

import contextlib
import hashlib
import io
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from dinov2 import distributed
from dinov2.errors import OutputError
from dinov2.eval import health
from dinov2.eval.neighbors import knn_predict, usable_ks
from dinov2.eval.results import SEED
from dinov2.eval.scores import DRAWS, Predictions, bootstrap, interval, score
from dinov2.fsdp.files import UNREADABLE, write_atomically
from dinov2.train.monitoring.images import Images, Sources, monitor_period, require_room
from dinov2.train.monitoring.judge import Decision, Judge
from dinov2.train.monitoring.probe import cls_features, prototype_signals, untouched
from dinov2.train.monitoring.records import RECORDS_FILE, START_FILE, Record, append_record, read_records
from dinov2.train.monitoring.slides import SLIDE_AUROC, mark_of, slide_scores
from dinov2.train.run_length import total_iterations
from dinov2.train.run_state import drop_rows_from
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2")

NETWORKS = ("teacher", "student")
KNN_SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")


class Monitor:
    """Evaluates the networks of a run on fixed images and keeps the records.

    All processes make one, with the same arguments, and call its methods together. It reads the images first.

    Args:
        cfg: Resolved config.
        model: Networks of the run.
        sources: Opened datasets.
        judge: Draws conclusions; the base class draws none.
        announce: Is told what this process is doing.
        publish: Gets the signals of each record as ``eval/<name>``, with the zero-based iteration before it.

    Attributes:
        records: Of the run so far, in their order, the same in all processes.

    Raises:
        DatasetError: The images cannot be read, or do not fit into memory.
    """

    def __init__(
        self,
        cfg: DictConfig,
        model: SSLMetaArch,
        sources: Sources,
        judge: Judge | None = None,
        *,
        announce: Callable[[str], None] = lambda phase: None,
        publish: Callable[[int, dict[str, float]], None] = lambda iteration, scalars: None,
    ) -> None:
        self.publish = publish
        self.cfg, self.model, self.judge, self.announce = cfg, model, judge or Judge(), announce
        self.period = monitor_period(cfg)
        self.path = Path(cfg.train.output_dir, RECORDS_FILE)
        self.records: list[Record] = []
        self.start_features: Tensor | None = None
        announce("reading the images of evaluations in the loop")
        began = time.monotonic()
        self.labelled = sources.labelled
        datasets = {"monitored": sources.monitored} | (self.labelled.datasets if self.labelled else {})
        tiles = [sources.slides.tiles] if sources.slides is not None else []
        require_room(cfg, [*datasets.values(), *tiles])
        self.images = {role: Images(cfg, data) for role, data in datasets.items()}
        self.k = cfg.evaluation.nb_knn
        if self.labelled is not None:
            (self.k,) = usable_ks([self.k], self.images["train"].count)
        self.slides, self.tiles = sources.slides, None
        if self.slides is not None:
            self.tiles = Images(cfg, self.slides.tiles)
            self.slides.tiles.close()
        self.mark = self._mark()
        counts = ", ".join(f"{images.count} {role}" for role, images in self.images.items())
        counts += "" if self.tiles is None else f", {self.tiles.count} tiles of slides"
        logger.info("images of evaluations in the loop: %s, read in %.1f s", counts, time.monotonic() - began)

    def begin(self, done: int, *, continues: bool, teacher_temp: float) -> Decision:
        """Take up the records of the run and make up for an evaluation that is missing.

        Args:
            done: Iterations done.
            continues: Whether the run is resumed; else what stands in the files is of no run.
            teacher_temp: The teacher's temperature of the latest step, or of the first one.
        """
        self.rewind(done if continues else -1)
        if not continues:
            return self.evaluate(0, teacher_temp)
        self.start_features = self._read_start()
        missing = all(record.iteration != done for record in self.records)
        if done and self.due(done) and missing:
            return self.evaluate(done, teacher_temp)
        return self.judge.on_record(self.records, new=False, at=done) if self.records else Decision()

    def go_back(self, done: int) -> None:
        """Forget records of iterations that are done again, and what was concluded from them."""
        self.rewind(done)
        if self.records:
            self.judge.on_record(self.records, new=False, at=done)

    def conclude(self) -> None:
        """End the run."""
        self.judge.conclude(self.records)

    def rewind(self, done: int) -> None:
        """Forget records of iterations that are done again: all beyond ``done``."""
        if distributed.is_main_process():
            drop_rows_from(self.path, done + 1)
        known = read_records(self.path) if distributed.is_main_process() else []
        # One that could not be dropped stays in the file, and out of what is decided by.
        known = [record for record in known if record.iteration <= done]
        alike = [record for record in known if record.images == self.mark]
        if len(alike) < len(known):
            logger.warning(
                "%d of %d evaluations of this run were of other images, labels, slides or evaluation.nb_knn: "
                "later ones are not compared with them",
                *(len(known) - len(alike), len(known)),
            )
        self.records = distributed.broadcast_object(alike)

    def _mark(self) -> str:
        """Return a checksum of what decides the signals beside the networks."""
        mark = hashlib.sha256(str(self.k).encode())
        for role, images in sorted(self.images.items()):
            mark.update(f"{role} {images.digest}".encode())
        if self.labelled is not None:
            for role, labels in sorted(self.labelled.labels.items()):
                mark.update(role.encode() + labels.numpy().tobytes())
        if self.slides is not None:
            mark.update(f"slides {self.tiles.digest} {mark_of(self.cfg, self.slides)}".encode())
        return mark.hexdigest()

    def due(self, done: int, *, is_last: bool = False) -> bool:
        """Tell whether to evaluate after so many iterations."""
        return is_last or done % self.period == 0

    def _slides_due(self, done: int) -> bool:
        """Tell whether slides are scored in an evaluation after so many iterations: at both ends, too."""
        if self.slides is None:
            return False
        return done % (self.cfg.evaluation.slides.period or 1) == 0 or done >= total_iterations(self.cfg)

    def evaluate(self, done: int, teacher_temp: float) -> Decision:
        """Evaluate both networks, write a record and return how to go on; training goes on as without.

        Args:
            done: Iterations done; 0 is the starting backbone, with which later ones are compared.
            teacher_temp: The teacher's temperature where the run stands.
        """
        began = time.monotonic()
        record = self._compute(done, teacher_temp)
        start = next((r for r in self.records if r.iteration == 0), None) if done else record
        record = replace(record, collapse=tuple(self.judge.collapse(record, start)))
        self.records.append(record)
        if distributed.is_main_process():
            _loudly(partial(append_record, self.path, record))
        # Under the iteration that was done last: a resumed run writes those from the next one on again.
        self.publish(max(done - 1, 0), {f"eval/{name}": value for name, value in record.signals.items()})
        logger.info("%s", _in_words(record, self.model.embed_dim, time.monotonic() - began))
        return self.judge.on_record(self.records, at=done)

    def _compute(self, done: int, teacher_temp: float) -> Record:
        features: dict[str, dict[str, Tensor]] = {network: {} for network in NETWORKS}
        with untouched(self.model):
            for network in NETWORKS:
                for role, images in self.images.items():
                    self.announce(f"evaluating after {done} iterations: {network}, {role} images")
                    features[network][role] = cls_features(self.model, network, images)
            if self._slides_due(done):
                self.announce(f"evaluating after {done} iterations: teacher, tiles of slides")
                features["teacher"]["slides"] = cls_features(self.model, "teacher", self.tiles)
            monitored = {network: features[network]["monitored"] for network in NETWORKS}
            prototypes = prototype_signals(
                self.model, monitored, teacher_temp, self.cfg.evaluation.batch_size
            )
        if not done:
            self.start_features = monitored["teacher"]
            if distributed.is_main_process():
                _loudly(self._write_start)
        self.announce(f"evaluating after {done} iterations: signals")
        # One process computes, so that all decide by the same numbers.
        record = self._record(done, features, prototypes) if distributed.is_main_process() else None
        return distributed.broadcast_object(record)

    def _record(
        self, done: int, features: dict[str, dict[str, Tensor]], prototypes: dict[str, float]
    ) -> Record:
        signals: dict[str, float] = {}
        intervals: dict[str, tuple[float, float]] = {}
        for network, prefix in (("teacher", ""), ("student", "student_")):
            own = features[network]
            broken = sum(int((~rows.isfinite().all(dim=1)).sum()) for rows in own.values())
            if broken:
                logger.warning(
                    "after %d iterations the %s's features of %d images are not finite: what is computed "
                    "from them is no number",
                    *(done, network, broken),
                )
            if self.labelled is not None:
                scores, ends = self._knn(own)
                signals |= {f"{prefix}knn_{name}": value for name, value in scores.items()}
                intervals |= {f"{prefix}knn_{name}": value for name, value in ends.items()}
            if "slides" in own:
                scores, ends = slide_scores(self.cfg, self.slides, own["slides"])
                signals |= scores
                intervals |= ends
            found = health.feature_signals(own["monitored"])
            signals |= {f"{prefix}{name}": value for name, value in found.items()}
        signals |= prototypes
        teacher = features["teacher"]["monitored"]
        signals["agreement"] = health.matched_cosine(teacher, features["student"]["monitored"])
        start = self.start_features
        signals["drift_cosine"] = math.nan if start is None else health.matched_cosine(teacher, start)
        signals["drift_cka"] = math.nan if start is None else health.linear_cka(teacher, start)
        return Record(done, signals, intervals, images=self.mark)

    def _knn(self, features: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        """Return the scores of the vote of the nearest labelled images, and their bootstrap intervals."""
        if not all(features[role].isfinite().all() for role in ("train", "val")):
            return dict.fromkeys(KNN_SCORES, math.nan), {}
        device = self.model.device
        votes = knn_predict(
            features["train"].to(device),
            self.labelled.labels["train"].to(device),
            features["val"].to(device),
            self.k,
            num_classes=self.labelled.num_classes,
        )
        predictions = Predictions(self.labelled.labels["val"], votes.cpu())
        scores, draws = score(predictions), bootstrap(predictions, DRAWS, SEED)
        return (
            {name: scores[name] for name in KNN_SCORES},
            {name: tuple(interval(draws[name])) for name in KNN_SCORES},
        )

    def _write_start(self) -> None:
        content = io.BytesIO()
        np.savez(
            content, features=self.start_features.numpy(), images=np.array(self.images["monitored"].digest)
        )
        path = self.path.with_name(START_FILE)
        with contextlib.suppress(OSError):  # another run's would be taken for this one's later
            path.unlink(missing_ok=True)
        write_atomically(path, lambda file: file.write(content.getvalue()))

    def _read_start(self) -> Tensor | None:
        """Return the features that the run began with, on the main process; None where they are of no use."""
        if not distributed.is_main_process():
            return None
        path = self.path.with_name(START_FILE)
        try:
            with np.load(path, allow_pickle=False) as content:
                features, images = torch.from_numpy(content["features"]), str(content["images"])
        except UNREADABLE as error:
            reason = f"{path} cannot be read ({error})"
        else:
            if images == self.images["monitored"].digest and features.shape[1] == self.model.embed_dim:
                return features
            reason = f"{path} is of other images or of another width"
        logger.warning("drift from the starting backbone is not told: %s", reason)
        return None


def _loudly(write: Callable[[], None]) -> None:
    """Write, and go on with an error in the log if that fails: the run matters more than the file."""
    try:
        write()
    except OutputError as error:
        logger.error("an evaluation in the loop is not written down, the run goes on: %s", error)


def _in_words(record: Record, width: int, seconds: float) -> str:
    signals = record.signals
    words = []
    if "knn_balanced_accuracy" in signals:
        low, high = record.intervals.get("knn_balanced_accuracy", (math.nan, math.nan))
        words.append(f"k-NN balanced accuracy {signals['knn_balanced_accuracy']:.4f} ({low:.4f}..{high:.4f})")
    if SLIDE_AUROC in signals:
        low, high = record.intervals.get(SLIDE_AUROC, (math.nan, math.nan))
        words.append(f"slide AUROC {signals[SLIDE_AUROC]:.4f} ({low:.4f}..{high:.4f})")
    share = signals["feature_std"] * math.sqrt(width)
    words += [
        f"RankMe {signals['rankme']:.1f}",
        f"alpha-ReQ {signals['alpha_req']:.2f}",
        f"feature std {signals['feature_std']:.4f} ({share:.2f} of an even spread's)",
    ]
    if "teacher_prototype_perplexity" in signals:
        words.append(
            f"prototypes in use {signals['teacher_prototype_perplexity']:.1f} (teacher), "
            f"{signals['student_prototype_perplexity']:.1f} (student)"
        )
    words += [
        f"agreement {signals['agreement']:.3f}",
        f"kept of the start: cosine {signals['drift_cosine']:.3f}, CKA {signals['drift_cka']:.3f}",
    ]
    place = f"{record.iteration} iterations" if record.iteration else "0 iterations, the starting backbone"
    collapse = f"; COLLAPSED: {'; '.join(record.collapse)}" if record.collapse else ""
    return f"evaluation after {place}: {', '.join(words)}{collapse} ({seconds:.1f} s)"
