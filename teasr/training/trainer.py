"""The training loop: networks become DeepSpeed engines, loss terms are back-propagated one by one, every update is logged.

It knows neither the method nor the backbone. All backward passes of an update run inside one `coalesce_grad_reduction` block: without it
ZeRO-1/2 drop all but the last of several backward passes. Data, noise and schedules are functions of the update, so that a checkpoint needs no more
than weights, moments, average and the update to go on to the same bits, on any number of ranks and under any ZeRO stage.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from teasr.backbones.base import Backbone
from teasr.config.strict_yaml import to_dict
from teasr.data.batch import Batch
from teasr.data.shards import ShardSet, decode_near, read_shard
from teasr.data.stream import PairStream, batches, check_shards, check_streams
from teasr.imaging.images import to_tensor
from teasr.methods.base import Method, Progress
from teasr.run_config import Recipe
from teasr.tracking.environment import git_commit
from teasr.tracking.run_files import BAD_FILE, SKIPPED_FILE
from teasr.tracking.system_metrics import Machine
from teasr.tracking.tracker import Tracker
from teasr.training import preflight as checks
from teasr.training.ema import Ema
from teasr.training.engine import check_nvme, engine_settings, start_engine, start_ranks
from teasr.training.preview import Preview
from teasr.training.run_state import RunState
from teasr.training.stopping import Stopping
from teasr.util.distributed import World
from teasr.util.files import write_atomic
from teasr.util.progress import ProgressLine
from teasr.util.randomness import Draws

LOST = ("gloo", "NCCL", "Connection reset by peer", "Connection closed by peer")  # said by torch when a rank has died
FIT_PAIRS = 1024  # pictures that a codec is fitted to


class Trainer:
    """One run: everything checked and built in the constructor, trained by `fit`."""

    def __init__(self, recipe: Recipe, accept_changes: bool = False):
        """Raises ValueError with the cure before anything long when the run cannot work.

        accept_changes: go on from a checkpoint of another config wherever its tensors fit.
        """
        self.recipe, self.train = recipe, recipe.train
        self.world = World.from_environment()
        self.run_dir = Path(recipe.run_dir)
        self.accumulation = self.train.accumulation(self.world.size)
        self.shards = ShardSet.open(*recipe.data.locations)
        check_streams(self.shards, recipe.data, self.world.size)
        settings = engine_settings(self.train, self.world.size)
        check_nvme(settings, self.world)
        checks.precision(self.train.dtype, to_dict(recipe.backbone).get("dtype"))
        self.method: Method = recipe.build_method()
        self.method.check(self.accumulation)
        self.networks: dict[str, Backbone] = {name: recipe.build_backbone() for name in self.method.networks}
        if recipe.train.dtype == "bf16" and any(network.own_dtype for network in self.networks.values()):
            raise ValueError(
                f"train.dtype = bf16 is autocast for networks kept in fp32; {recipe.backbone_name} computes in backbone.dtype: "
                "remove train.dtype"
            )
        self.student = self.networks[self.method.networks[0]]
        self.state = RunState(recipe, self.world, self.networks, self._say)
        self.preview = Preview.of(recipe.preview, self.train.save_every_updates, self.shards, recipe.seed)
        if self.world.main:
            warnings = check_shards(self.shards, self.student.check_size, recipe.data.max_bad_share)
            checks.writable(self.run_dir)
            warnings.append(checks.room(self.run_dir, self.state.bytes, self.train.keep_checkpoints))
            for problem in filter(None, warnings):
                self._say(f"warning: {problem}")
        start_ranks(self.train, self.world)
        self.state.find(accept_changes)
        self._fit_fixed_parts()
        self.state.load_weights()
        self.method.to(self.world.device)
        self.engines = {
            name: start_engine(network, self.train, settings, self.world) for name, network in self.networks.items()
        }
        # beside the optimiser's states, in host memory where they are
        away = "offload_optimizer" in settings["zero_optimization"]
        place = torch.device("cpu") if away else None
        self.ema = Ema(self.student.net.module, self.train.ema, self.world, place) if self.train.ema else None
        self.state.load_rest(self.engines, self.ema)

    @property
    def update(self) -> int:
        """Updates done."""
        return self.state.update

    def fit(self) -> None:
        """Train to the last update, saving on the way; says so when there is nothing left to do.

        Told to stop (SIGTERM, SIGINT, train.max_hours), it finishes the update, saves and returns. FloatingPointError after too many
        updates in a row that were not finite, OSError when a checkpoint cannot be written; both name the last good one.
        """
        updates = self.train.updates
        if self.update >= updates:
            self._say(f"already trained: {self.update}/{updates} updates in {self.run_dir}")
            return
        sharding = Path(self.train.deepspeed).stem
        self._say(
            f"training {self.recipe.method_name} on {self.recipe.backbone_name}: {self.world.size} rank(s), {sharding}, "
            f"{self.world.device.type if self.world.device.type == 'cpu' else torch.cuda.get_device_name()}, a batch of "
            f"{self.train.batch} = {self.world.size} x {self.train.micro_batch} x {self.accumulation}"
        )
        stream = PairStream(
            self.shards, self.recipe.data, self.recipe.seed, self.world.rank, self.world.size,
            self.update * self.train.batch // self.world.size,
        )  # fmt: skip
        data = batches(stream, self.train.micro_batch, self.world.device)
        line = ProgressLine("train", updates, "updates", self.update, enabled=self.world.main)
        tracker = self._start_tracker()
        machine = Machine(self.run_dir, self.world.device)
        status, named, stop, skipped = "KILLED", set(), False, 0
        try:
            with Stopping(self.train.max_hours) as stopping:
                if self.preview and not self.update:
                    self._log(tracker, *self._show(tracker))
                while self.update < updates and not stop:
                    started = time.perf_counter()
                    micro = [next(data) for _ in range(self.accumulation)]
                    waited = time.perf_counter() - started
                    bad = [name for _, names in micro for name in names]
                    self._name(sorted(set(bad) - named))
                    named |= set(bad)
                    logs = self._one_update([batch for batch, _ in micro], len(bad), stopping.reason is not None)
                    self.state.update += 1
                    stop = logs.pop("stop") > 0
                    skipped = skipped + 1 if logs["skipped"] else 0
                    saves = self.update % self.train.save_every_updates == 0 or self.update == updates or stop
                    timing = self._timing(started, waited) | machine.sample()
                    shown, shown_s = (
                        self._show(tracker) if self.preview and self.preview.due(self.update, saves) else ({}, {})
                    )
                    self._log(tracker, logs | shown, timing | shown_s)
                    line.show(self.update, loss=logs.get("loss", math.nan))
                    if skipped > self.train.max_skipped:
                        raise FloatingPointError(
                            f"{skipped} updates in a row were not finite (skipped_updates.txt names them); the last good state is "
                            f"{self.state.newest}; lower train.learning_rate or raise the ramps of "
                            "method.ramps"
                        )
                    if saves:
                        self.state.save(shown.get(self.preview.score) if self.preview else None)
                reason = stopping.reason or "another rank"
            if stop and self.update < updates:
                line.close()
                self._say(f"stopped by {reason} after update {self.update}: the same command goes on from there")
            else:
                status = "FINISHED"
        except Exception as error:
            status = "FAILED"
            if self.world.size > 1 and any(name in str(error) for name in LOST):
                raise ConnectionError(
                    f"another rank is gone ({' '.join(str(error).split())[:150]}): its own message is in its log; the same "
                    f"command goes on from update {self.state.saved}"
                ) from error
            raise
        finally:
            line.close()
            if tracker:
                tracker.close(status)

    def _show(self, tracker: Tracker | None) -> tuple[dict[str, float], dict[str, float]]:
        """Restore the preview's pictures with the averaged weights; returns scores and timing. Every rank must call it."""
        started = time.perf_counter()
        with self.ema.swapped() if self.ema else contextlib.nullcontext():
            sheet, scores = self.preview.make(self.student, self.world.device)
        if tracker:
            tracker.preview(self.update, sheet)
        return scores, {"preview_s": time.perf_counter() - started}

    def _log(self, tracker: Tracker | None, logs: dict[str, float], timing: dict[str, float]) -> None:
        if tracker:
            tracker.log(self.update, logs, timing)

    def _timing(self, started: float, waited: float) -> dict[str, float]:
        """What differs between equal runs: seconds of this update, pictures a second, and on a GPU the most memory so far."""
        seconds = time.perf_counter() - started
        timing = {"update_s": seconds, "data_wait_s": waited, "images_per_s": self.train.batch / seconds}
        if self.world.device.type == "cuda":
            timing["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return timing

    def _name(self, bad: list[str]) -> None:
        """Print what had to be passed over in the data, and keep it in bad_samples.txt, which goes to MLflow at the end."""
        if bad:
            self._note(BAD_FILE, [f"skipped {name}" for name in bad])

    def _note(self, file: str, lines: list[str]) -> None:
        """Print what went wrong in the update at hand on this rank, and keep it in a file of the run folder."""
        lines = [f"update {self.update + 1}, rank {self.world.rank}: {line}" for line in lines]
        print(*lines, sep="\n", flush=True)
        with (
            contextlib.suppress(OSError),
            open(self.run_dir / file, "a") as out,
        ):  # a full disk is the checkpoints' affair
            out.write("\n".join(lines) + "\n")

    def _one_update(self, micro: list[Batch], bad: int, stop: bool) -> dict[str, float]:
        """All terms of all micro-batches, then one optimiser step of every network; returns what to log.

        Where a loss or a gradient of any rank is not finite, all ranks leave the weights as they are.
        """
        rate = self.train.rate(self.update)
        sums: dict[str, list[torch.Tensor]] = {}
        with contextlib.ExitStack() as stack:
            for engine in self.engines.values():
                stack.enter_context(engine.coalesce_grad_reduction())
            for i, batch in enumerate(micro):
                b, w = self.train.micro_batch, self.world
                samples = tuple((i * b + j) * w.size + w.rank for j in range(b))
                draws = Draws(self.recipe.seed, self.update, samples, w.device)
                progress = Progress(self.update, self.train.updates, i, len(micro))
                for term in self.method.terms(self.networks, batch, draws, progress):
                    self.engines[term.network].backward(term.loss / len(micro))
                    for name, value in term.logs.items():
                        sums.setdefault(name, []).append(value.detach())
                    del term
            means = {name: torch.stack(values).mean() for name, values in sums.items()}
            wrong = self._not_finite(means)
            told = {"bad_samples": bad, "stop": stop, "skipped": bool(wrong)}
            logs = self.world.mean(means | {name: torch.tensor(float(value)) for name, value in told.items()})
            if logs["skipped"]:
                self._clear_gradients()
        flags = {"bad_samples": logs["bad_samples"] * self.world.size, "skipped": float(logs["skipped"] > 0)}
        if flags["skipped"]:
            if wrong:
                keys = ", ".join(key for batch in micro for key in batch.keys[:4])
                self._note(SKIPPED_FILE, [f"{', '.join(wrong)} not finite, update skipped (samples {keys})"])
            return flags | {"stop": logs["stop"]}
        for engine in self.engines.values():
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            engine.step()
        self.state.steps += 1
        if self.ema:
            self.ema.update(self.update)
        weights = self.method.weights(Progress(self.update, self.train.updates))
        loss = sum(weight * logs.get(name, 0.0) for name, weight in weights.items())
        norm = math.hypot(*(float(engine.get_global_grad_norm()) for engine in self.engines.values()))
        return {"loss": loss} | logs | flags | {"grad_norm": norm, "learning_rate": rate}

    def _gradients(self) -> list[torch.Tensor]:
        """What the backward passes of this update have left on this rank so far."""
        return [p.grad for engine in self.engines.values() for p in engine.module.parameters() if p.grad is not None]

    def _not_finite(self, means: dict[str, torch.Tensor]) -> list[str]:
        """Names of what is not finite on this rank."""
        wrong = [name for name, value in means.items() if not bool(torch.isfinite(value))]
        norms = torch._foreach_norm(self._gradients())
        return wrong if not norms or bool(torch.isfinite(torch.stack(norms)).all()) else [*wrong, "gradient"]

    def _clear_gradients(self) -> None:
        """To zero, and not away: ZeRO-3 would take those of an earlier update in their place."""
        for gradient in self._gradients():
            gradient.zero_()

    def _fit_fixed_parts(self) -> None:
        """What is fitted and not trained (a codec), equal on all ranks; a resumed run has it in its checkpoint."""
        if self.state.found is None and self.student.needs_fit:
            self.student.fit(first_pairs(self.shards, FIT_PAIRS))
            state = self.world.from_main(self.student.fixed_state())
            for network in self.networks.values():
                network.load_fixed_state(state)

    def _start_tracker(self) -> Tracker | None:
        if not self.world.main:
            return None
        write_atomic(self.run_dir / "config.yaml", self.recipe.to_yaml().encode())
        write_atomic(self.run_dir / "commit", (git_commit() + "\n").encode())
        params = self.recipe.to_dict() | {
            "world_size": self.world.size, "commit": git_commit(), "torch": torch.__version__, "device": str(self.world.device),
            "samples": len(self.shards), "trainable_parameters": sum(
                getattr(p, "ds_numel", p.numel()) for p in self.student.net.parameters() if p.requires_grad
            ),
        }  # fmt: skip
        return Tracker(self.run_dir, self.recipe.tracking, params, resume_from=self.update)

    def _say(self, text: str) -> None:
        if self.world.main:
            print(text, flush=True)


def first_pairs(shards: ShardSet, limit: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The first usable (x_hq, x_lq) of every usable shard in turn, up to about `limit`: the same on every rank and world."""
    each, found = math.ceil(limit / len(shards.urls)), False
    for url in shards.urls:
        try:
            raw = read_shard(url)
            samples = [decode_near(raw, place, url) for place in range(min(each, len(raw)))]
        except ValueError:
            continue  # the training stream names it, and stops where too many are broken
        for sample in samples:
            found = True
            yield to_tensor(sample.hq), to_tensor(sample.lq_up)
    if not found:
        raise ValueError(f"no shard of {shards.location} can be used: look at it with data_prep/verify_shards.py")
