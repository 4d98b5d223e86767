"""Save and load the state of a run as checkpoints: weights, AdamW's moments, the EMA and fixed tensors (the codec).

A checkpoint that turns out to be damaged, or after which no update was finite, is renamed and kept, and the run goes
back to an older one. Random generator states and data positions are not saved: both are functions of the update. Every
rank must call every method; only rank 0 writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from teasr.backbones.base import find_weights
from teasr.backbones.roles import FIRST
from teasr.config.reading import read_yaml
from teasr.config.strict_yaml import diff
from teasr.run_config import RunConfig, load
from teasr.tracking.environment import git_commit
from teasr.training import checkpoint
from teasr.training.ema import Ema
from teasr.training.engine import gather, load_optimiser_state, optimiser_state
from teasr.training.networks import Networks
from teasr.util import checkpoint_folder
from teasr.util.distributed import World

# Keys that may change on resuming without --accept-changes: the length of the run, and keys that do not affect results.
MAY_CHANGE = (
    "run_dir", "backbone.host_checkpoints", "backbone.swap_blocks", "backbone.swap_ring", "data.latents", "data.shards",
    "data.workers", "preview.", "tracking.", "train.cpu_threads", "train.deepspeed", "train.keep_checkpoints",
    "train.max_hours", "train.max_skipped", "train.micro_batch", "train.on_full_disk", "train.save_every_updates",
    "train.updates",
)  # fmt: skip


class RunState:
    """Progress of a run (`update`, optimiser `steps`) and its checkpoints."""

    def __init__(self, config: RunConfig, world: World, networks: Networks, say: Callable[[str], None]):
        """Must be called before the bases of `networks` are wrapped in engines."""
        self.config, self.world, self.networks, self.say = config, world, networks, say
        self.root = Path(config.run_dir) / "checkpoints"
        self.found: Path | None = None
        self.update = self.steps = 0
        self.saved = self.proven = 0  # updates of the newest checkpoint, and of the newest that is proven to be good
        self.roles = [role.name for role in networks.trained_roles]
        self.bytes = self._bytes()

    def folder(self, update: int) -> Path:
        """The folder of the checkpoint after `update` updates."""
        return self.root / checkpoint_folder.name_of(update)

    def find(self, accept_changes: bool) -> None:
        """Find the newest complete checkpoint and print what was found. Newer ones, which are damaged, are renamed.

        Raises ValueError when all are damaged, or when the newest was written by an older version of teasr, or with
        another config and without `accept_changes`.
        """
        problem, self.found, self.proven = self.world.from_main(self._look() if self.world.main else None)
        if problem:
            raise ValueError(problem)
        if self.found is None:
            return
        try:
            state = json.loads((self.found / "state.json").read_text())
            self.update, self.steps = state["update"], state["steps"]
        except KeyError as error:
            raise ValueError(
                f"{self.found} was written by an older version of teasr ({error} is missing): choose another run_dir"
            ) from None
        changes = diff(load(self.found / "config.yaml").to_dict(), self.config.to_dict())
        fatal = _fatal(changes)
        if fatal and not accept_changes:
            raise ValueError(
                f"{self.root.parent} holds a run of another config ({'; '.join(fatal)}): undo these changes, "
                "choose another run_dir, or resume with them by --accept-changes"
            )
        self.saved = self.update
        self.say(f"resuming from {self.found} at update {self.update}")
        if state["world_size"] != self.world.size:
            self.say(f"  ranks: {state['world_size']} -> {self.world.size}")
        for line in changes:
            self.say(f"  changed: {line}")

    def same_as_last_start(self) -> bool:
        """Whether the run was last started with a config that gives the same results."""
        try:
            last = read_yaml(self.root.parent / "config.yaml")
        except ValueError:
            return False
        return not _fatal(diff(last, self.config.to_dict()))

    def _look(self) -> tuple[str | None, Path | None, int]:
        """Return a problem, the newest intact checkpoint and the update of the proven one."""
        found, damaged = checkpoint_folder.newest_intact(self.root)
        if damaged and found is None:
            reasons = "; ".join(f"{folder.name}: {wrong}" for folder, wrong in damaged.items())
            text = (
                f"every checkpoint in {self.root} is damaged ({reasons}): put back a copy of one, or choose another "
                "run_dir to start from the beginning; nothing was changed here"
            )
            return text, None, 0
        for folder, wrong in damaged.items():
            aside = checkpoint_folder.set_aside(folder, "damaged")
            self.say(
                f"checkpoint {folder} is damaged ({wrong}): it is now named {aside.name}, and an older one is used"
            )
        good = checkpoint.proven(self.root)
        return None, found, checkpoint_folder.update_of(good) if good else 0

    def load_weights(self) -> None:
        """Load weights and fixed tensors: of the checkpoint that was found, or else of `train.start_from`.

        Call it before the engines are built. Raises ValueError when that model does not fit.
        """
        if self.found is None:
            if self.config.train.start_from:
                self._load_start(self.config.train.start_from)
            return
        self.networks.student.load_fixed_state(load_file(self.found / "fixed.safetensors"))
        for role in self.roles:
            self.networks.base(role).load_weights(load_file(self.found / file_of("weights", role)), role)

    def _load_start(self, source: str) -> None:
        student = self.networks.student
        try:
            folder, file = find_weights(source)
            student.load_fixed_state(load_file(folder / "fixed.safetensors"))
            student.load_weights(load_file(file))
        except (ValueError, OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"train.start_from = {source} cannot be used ({reason}): give the folder of a run, a checkpoint or an "
                "export of the same backbone, or the name of a shipped model"
            ) from None
        self.say(f"starting from {source}")

    def load_rest(self, engines: dict, ema: Ema | None) -> None:
        """Load optimiser states and EMA of the checkpoint that was found. `save` can be called only after this."""
        self.ema = ema
        if self.found is None:
            return
        for place, engine in engines.items():
            here = [role for role in self.roles if self.networks.roles[role].place == place]
            moments = {}
            for role in here:
                moments |= load_file(self.found / file_of("optimiser", role))
            load_optimiser_state(engine, moments, self.steps, self.world)
        average = self.found / "ema.safetensors"
        if ema and average.is_file():  # if there is none (train.ema was null), the EMA starts from the current weights
            ema.load(load_file(average))

    def prove(self) -> None:
        """Record that the newest checkpoint is good, since an update after it was finite."""
        if self.proven == self.saved:
            return
        self.proven = self.saved
        if self.world.main:
            checkpoint.prove(self.root, self.saved, self.config.train.keep_checkpoints)

    def after_divergence(self) -> str:
        """Say which checkpoint is good. A newer one, after which no update was finite, is renamed."""
        good, newest = self.folder(self.proven), self.folder(self.saved)
        if not self.saved:
            return "there is no checkpoint yet"
        if not self.proven:
            return f"no finite update followed the only checkpoint, {newest}, so it may be bad"
        if self.proven == self.saved:
            return f"the last good checkpoint is {good}"
        aside = self.world.from_main(checkpoint_folder.set_aside(newest, "diverged") if self.world.main else None)
        return (
            f"the last good checkpoint is {good}, from which the run resumes; no finite update followed {newest.name}, "
            f"which is now named {aside.name}"
        )

    def save(self, score: float | None = None) -> None:
        """Write checkpoints/step-XXXXXXXX; all files are safetensors, JSON or YAML.

        `score`: preview score at this update; the checkpoint with the highest score is kept as well as the newest.
        When it cannot be written, raises OSError, or prints a warning if train.on_full_disk = continue and it is not
        the last one of the run; older checkpoints are kept. Does nothing before the first optimiser step.
        """
        if not self.steps:
            return  # the weights have not changed
        writer = checkpoint.Writer(self.root, self.update, self.bytes) if self.world.main else None
        for name, tensors in self._tensors():
            if writer:
                writer.tensors(name, tensors)
        if writer:
            state = {"update": self.update, "steps": self.steps, "world_size": self.world.size, "commit": git_commit()}
            writer.text("state.json", json.dumps(state | ({} if score is None else {"score": score}), indent=1))
            writer.text("config.yaml", self.config.to_yaml())
            writer.commit(self.config.train.keep_checkpoints)
        problem = self.world.from_main(writer.problem if writer else None)
        if problem is None:
            self.saved = self.update
            return
        message = (
            f"checkpoint {self.folder(self.update)} cannot be written ({problem}); "
            f"{'the newest checkpoint is of update ' + str(self.saved) if self.saved else 'no checkpoint exists yet'}: "
            "free space on that disk, lower train.keep_checkpoints, or choose a run_dir on another disk"
        )
        if self.config.train.on_full_disk == "stop" or self.update >= self.config.train.updates:
            raise OSError(message)
        self.say(f"warning: {message}")

    def _tensors(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Yield the safetensors files of a checkpoint one by one as (name, tensors). Only rank 0 gets the tensors."""
        for role in self.roles:
            base = self.networks.base(role)
            yield file_of("weights", role), gather(base, role)
            yield file_of("optimiser", role), optimiser_state(base, role, self.world)
        if self.ema:
            with self.ema.swapped():
                averaged = gather(self.networks.student, FIRST)
            yield "ema.safetensors", averaged
        yield "fixed.safetensors", self.networks.student.fixed_state()

    def _bytes(self) -> int:
        """Approximate size of a checkpoint in bytes."""
        total = 0
        for role in self.roles:
            copies = 1 + (self.config.train.ema is not None and role == FIRST)
            for p in self.networks.base(role).exported(role).values():
                total += p.numel() * (p.element_size() * copies + 8 * p.requires_grad)
        return total


def _fatal(changes: list[str]) -> list[str]:
    return [line for line in changes if not line.startswith(MAY_CHANGE)]


def file_of(kind: str, role: str) -> str:
    """File name for a role in a checkpoint. The student's files have no suffix, so that the model is easy to find."""
    return f"{kind}.safetensors" if role == FIRST else f"{kind}-{role}.safetensors"
