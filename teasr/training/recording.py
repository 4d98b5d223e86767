"""Record a run while it trains: metrics, previews, status, bad samples, skipped updates, and why it ended."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import torch

from teasr.tracking.environment import git_commit
from teasr.tracking.history import keep_history
from teasr.tracking.run_files import BAD_FILE, SKIPPED_FILE
from teasr.tracking.system_metrics import Machine
from teasr.tracking.tracker import Tracker
from teasr.training.endings import explained, ignore_children
from teasr.util.files import write_atomic
from teasr.util.progress import ProgressLine

if TYPE_CHECKING:
    from teasr.training.trainer import Trainer


class Recording:
    """Records a run while it trains: metrics, previews, status, bad samples and skipped updates."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.finished = trainer, False
        self.named: set[str] = set()
        self.skipped = 0  # consecutive skipped updates

    def __enter__(self) -> Recording:
        trainer = self.trainer
        self.tracker = self._start_tracker() if trainer.world.main else None
        self.machine = Machine(trainer.run_dir, trainer.world.device)
        self.line = ProgressLine("train", trainer.train.updates, "updates", trainer.update, enabled=trainer.world.main)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        """Close everything with the final status of the run. Raises OSError that explains a library's exception."""
        if isinstance(error, Exception):
            ignore_children()
        self.line.close()
        if self.tracker:
            failed = isinstance(error, Exception)
            self.tracker.close("FAILED" if failed else "FINISHED" if self.finished else "KILLED")
        if isinstance(error, Exception):
            known = explained(error, self.trainer.world.size, self.trainer.state.saved)
            if known:
                raise known from error

    def _start_tracker(self) -> Tracker:
        config, run_dir, world = self.trainer.config, self.trainer.run_dir, self.trainer.world
        same, save_every = self.trainer.state.same_as_last_start(), config.train.save_every_updates
        if earlier := keep_history(run_dir, self.trainer.update, same, save_every):
            print(f"what an earlier start logged after update {self.trainer.update} is kept in {earlier}", flush=True)
        write_atomic(run_dir / "config.yaml", config.to_yaml().encode())
        write_atomic(run_dir / "commit", (git_commit() + "\n").encode())
        trained = [p for own in self.trainer.run_update.parameters.values() for p in own.values()]
        params = config.to_dict() | {
            "world_size": world.size, "commit": git_commit(), "torch": torch.__version__, "device": str(world.device),
            "samples": len(self.trainer.shards),
            "trainable_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trained),
        }  # fmt: skip
        held_out = self.trainer.preview.datasets if self.trainer.preview else []
        datasets = [found | {"context": "training"} for found in self.trainer.shards.datasets()]
        datasets += [found | {"context": "validation"} for found in held_out]
        return Tracker(run_dir, config.tracking, params, self.trainer.update, datasets)

    def log(self, logs: dict, timing: dict, shown: tuple[dict, dict]) -> None:
        """Log the metrics of the last update. `shown`: scores and timing of its preview."""
        self.skipped = self.skipped + 1 if logs.get("skipped") else 0
        scores, preview_s = shown
        if self.tracker:
            sampled = self.machine.sample() if timing else {}
            self.tracker.log(self.trainer.update, logs | scores, timing | sampled | preview_s)
        if timing:
            self.line.show(self.trainer.update, loss=logs.get("loss", math.nan))

    def preview(self, sheet: bytes) -> None:
        """Store the comparison sheet of a preview."""
        if self.tracker:
            self.tracker.preview(self.trainer.update, sheet)

    def bad_samples(self, bad: list[str]) -> int:
        """Record skipped samples in bad_samples.txt, each once, and return the length of `bad`.

        The file is uploaded to MLflow at the end of the run.
        """
        if new := sorted(set(bad) - self.named):
            self._note(BAD_FILE, [f"skipped {name}" for name in new])
        self.named |= set(bad)
        return len(bad)

    def skipped_update(self, text: str) -> None:
        """Record in skipped_updates.txt why an update was skipped."""
        self._note(SKIPPED_FILE, [text])

    def check_skipped(self) -> None:
        """Raise FloatingPointError when too many updates in a row were not finite, the last of the run included.

        Too many are more than train.max_skipped, and at the end of the run any, since its result is not saved then.
        """
        trainer = self.trainer
        if self.skipped > trainer.train.max_skipped or (self.skipped and trainer.update == trainer.train.updates):
            raise FloatingPointError(
                f"{self.skipped} updates in a row were not finite (listed in skipped_updates.txt), up to update "
                f"{trainer.update}; {trainer.state.after_divergence()}; lower train.learning_rate, or reduce the "
                "weights of the diverging losses at the start of training"
            )

    def _note(self, file: str, lines: list[str]) -> None:
        """Print a problem in the current update on this rank, and append it to a file in the run folder."""
        head = f"update {self.trainer.update + 1}, rank {self.trainer.world.rank}"
        lines = [f"{head}: {line}" for line in lines]
        print(*lines, sep="\n", flush=True)
        # a full disk is handled where checkpoints are written
        with contextlib.suppress(OSError), open(self.trainer.run_dir / file, "a") as out:
            out.write("\n".join(lines) + "\n")
