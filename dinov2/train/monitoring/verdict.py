"""The judge of a training run: collapse, the iteration to ship, an early end."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from dinov2.errors import counted
from dinov2.fsdp import saved_iterations
from dinov2.train.monitoring.best import update_best
from dinov2.train.monitoring.collapse import find_collapse, find_dead_assignments, worse_than_start
from dinov2.train.monitoring.judge import Decision, Judge
from dinov2.train.monitoring.records import Record
from dinov2.train.monitoring.selection import Choice, Selection, describe, name_of
from dinov2.train.monitoring.slides import SLIDE_AUROC
from dinov2.train.run_state import export_to
from dinov2.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger("dinov2")

NO_CHOICE = "none"  # of evaluation.best_checkpoint


class RunJudge(Judge):
    """Judges a run as the ``evaluation`` section of its config asks for, and keeps ``best/``.

    All processes make one and call its methods together.

    Args:
        cfg: Resolved config.
        model: Networks of the run; what is exported is what they are at the call.
    """

    def __init__(self, cfg: DictConfig, model: SSLMetaArch) -> None:
        self.cfg, self.model = cfg, model
        self.folder = Path(cfg.train.output_dir)
        wanted = cfg.evaluation.best_checkpoint
        self.selection = None if wanted == NO_CHOICE else Selection(wanted, cfg.evaluation.patience)

    def collapse(self, record: Record, start: Record | None) -> tuple[str, ...]:
        """See :func:`dinov2.train.monitoring.collapse.find_collapse`."""
        return find_collapse(
            record, start, prototypes=self.model.dino_out_dim, embed_dim=self.model.embed_dim
        )

    def on_record(self, records: Sequence[Record], *, at: int, new: bool = True) -> Decision:
        """Warn of features that collapsed or became worse, bring ``best/`` up to date, decide on the end."""
        newest, start = records[-1], records[0] if not records[0].iteration else None
        done = newest.iteration
        if new and newest.collapse:
            logger.error(
                "the features have COLLAPSED after %d iterations: %s. Lower optim.base_lr, or look at the "
                "centring and the temperatures of the teacher",
                *(done, "; ".join(newest.collapse)),
            )
        dead = find_dead_assignments(newest, start, prototypes=self.model.dino_out_dim)
        if new and dead and not newest.collapse:
            logger.warning(
                "after %d iterations the DINO head does not tell images apart any more, and its term teaches "
                "nothing; by the labelled images the features are better than at the start: %s",
                *(done, dead),
            )
        worse = worse_than_start(newest, start) or worse_than_start(newest, start, SLIDE_AUROC)
        if new and worse:
            logger.warning("after %d iterations the features are WORSE than at the start: %s", done, worse)
        choice = self._choose(records, at)
        if newest.collapse and self.cfg.evaluation.on_collapse == "stop":
            why = "the features have collapsed, and evaluation.on_collapse is stop"
            return Decision(True, why, failed=True)
        if choice is not None and choice.stop and self.cfg.evaluation.early_stop:
            tries = counted(choice.without_gain, "evaluation")
            return Decision(
                True,
                f"{tries} brought nothing better than {name_of(choice.best)} (evaluation.early_stop, "
                f"evaluation.patience {self.cfg.evaluation.patience})",
            )
        return Decision()

    def conclude(self, records: Sequence[Record]) -> None:
        """Say at the end of a run which iteration to ship, and why."""
        if self.selection is not None and records:
            logger.info("%s", describe(self.selection.judge(records), records))

    def _choose(self, records: Sequence[Record], at: int) -> Choice | None:
        if self.selection is None:
            return None
        choice = self.selection.judge(records)
        update_best(
            self.folder,
            choice,
            at,
            self._export,
            needed=self._chosen_at_checkpoints(records),
        )
        return choice

    def _chosen_at_checkpoints(self, records: Sequence[Record]) -> list[Record]:
        """Return the choices of a run that is killed now and goes on from a checkpoint.

        The one that is being written may not be complete yet, and the newest may turn out to be damaged, so
        those since the last but one count.
        """
        saved = saved_iterations(self.folder)[:2]
        if not saved:
            return []
        first = saved[-1] + 1
        prefixes = [
            records[: number + 1] for number, record in enumerate(records) if record.iteration >= first
        ]
        earlier = [record for record in records if record.iteration < first]
        return [self.selection.judge(prefix).best for prefix in [earlier, *prefixes] if prefix]

    @property
    def _export(self) -> Callable[[Path], None]:
        return partial(export_to, self.cfg, self.model)
