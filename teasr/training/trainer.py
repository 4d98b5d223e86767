"""The training loop: reads batches, runs updates, and makes previews and checkpoints.

The loop is independent of the method and the backbone. Data, noise and schedules are functions of the update. To resume
with bit-identical results, on any number of ranks and under any ZeRO stage, a checkpoint therefore needs only weights,
moments, EMA and the update.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from teasr.config.strict_yaml import to_dict
from teasr.data.shards import ShardSet, decode_near, read_shard
from teasr.data.stream import (
    PairStream,
    batches,
    caption_cache,
    check_scale,
    check_shards,
    check_streams,
    latent_cache,
)
from teasr.imaging.images import to_tensor
from teasr.methods.base import Method
from teasr.run_config import RunConfig
from teasr.training import preflight
from teasr.training.ema import Ema
from teasr.training.engine import check_nvme, check_swap, check_zero, engine_settings, start_engine, start_ranks
from teasr.training.networks import Networks
from teasr.training.preview import Preview
from teasr.training.recording import Recording
from teasr.training.run_state import RunState
from teasr.training.stopping import Stopping
from teasr.training.update import Update
from teasr.util.distributed import World
from teasr.util.lock import FolderLock, locked

FIT_PAIRS = 1024  # number of pairs that a codec is fitted to


class Trainer:
    """One run: the constructor checks and builds everything, `fit` trains."""

    def __init__(self, config: RunConfig, accept_changes: bool = False):
        """Raises ValueError with a suggested fix, before any slow step, when the run cannot work.

        `accept_changes`: resume from a checkpoint of another config, provided that its tensors fit.
        """
        self.config, self.train = config, config.train
        self.world = World.from_environment()
        self.run_dir = Path(config.run_dir)
        self.accumulation = self.train.accumulation(self.world.size)
        self.shards = ShardSet.open(*config.data.locations)
        check_scale(self.shards, config.scale, "data.shards")
        check_streams(self.shards, config.data, self.world.size)
        latents, captions = latent_cache(self.shards, config.data), caption_cache(self.shards, config.data)
        self.settings = engine_settings(self.train, self.world.size)
        check_zero(self.settings, self.train.deepspeed)
        preflight.precision(self.train.dtype, to_dict(config.backbone).get("dtype"))
        self.method: Method = config.build_method()
        self.method.check(self.accumulation)
        check_nvme(self.settings, self.world, self.method.roles())
        if config.preview.every_updates != 0:
            for steps in config.preview.steps:
                self.method.sampler().check(steps)
        self.method.load()
        self.networks = Networks(config, self.method)
        for base in self.networks.trained_bases.values():
            check_swap(self.settings, base, self.method.by_block)
        if latents is not None:
            latents.check_codec(self.networks.student.codec_sha256())
        if captions is not None:
            self.networks.student.check_captions(captions.width, captions.sidecars.location)
        self._set_autocast()
        self.state = RunState(config, self.world, self.networks, self._say)
        self.preview = Preview.of(config.preview, self.train.save_every_updates, self.shards, config.seed)
        with contextlib.ExitStack() as held:
            if self.world.main:
                self._check_files(held)
            self._start(accept_changes)
            self.held = held.pop_all()

    def _check_files(self, held: contextlib.ExitStack) -> None:
        """Check shards and disk, and lock the run folder until `held` is closed.

        Raises ValueError when something prevents the run.
        """

        def check_size(height: int, width: int) -> None:
            self.networks.student.check_size(height, width)
            preflight.batch_fits(self.train.batch // self.world.size, height, width, self.world.device)

        warnings = check_shards(self.shards, check_size, self.config.data.max_bad_share)
        preflight.writable(self.run_dir)
        held.enter_context(locked(FolderLock(self.run_dir, "training"), self._say))
        warnings.append(preflight.room(self.run_dir, self.state.bytes, self.train.keep_checkpoints))
        for problem in filter(None, warnings):
            self._say(f"warning: {problem}")

    def _start(self, accept_changes: bool) -> None:
        """Connect the ranks, load the checkpoint (if any) and build the engines."""
        settings = self.settings
        start_ranks(self.train, self.world)
        self.state.find(accept_changes)
        self.state.load_weights()
        self._fit_codec()
        self.networks.share_codec()
        self.method.to(self.world.device)
        self.networks.place_frozen(self.world.device)
        engines = {
            place: start_engine(base, self.train, settings, self.world)
            for place, base in self.networks.trained_bases.items()
        }
        self.run_update = Update(self.method, self.networks, engines, self.train, self.config.seed, self.world)
        # the EMA is stored with the optimiser states: in host memory if they are offloaded
        away = torch.device("cpu") if "offload_optimizer" in settings["zero_optimization"] else None
        averaged = self.networks.student.trained("student")
        self.ema = Ema(averaged, self.train.ema, self.world, away) if self.train.ema else None
        self.state.load_rest(engines, self.ema)

    @property
    def update(self) -> int:
        """Number of updates done."""
        return self.state.update

    def fit(self) -> None:
        """Train to the last update and save checkpoints; if the run is already finished, report so and return.

        On SIGTERM, SIGINT or when train.max_hours has passed, the current update is finished and saved, and `fit`
        returns. Raises FloatingPointError when too many updates in a row were not finite, and OSError when a checkpoint
        cannot be written; both messages name the last good checkpoint. Unlocks the run folder at the end.
        """
        with self.held:
            self._fit()

    def _fit(self) -> None:
        updates, stop = self.train.updates, False
        if self.update >= updates:
            self._say(f"already trained: {self.update}/{updates} updates in {self.run_dir}")
            return
        self._say(self._headline())
        with Recording(self) as record, Stopping(self.train.max_hours) as stopping:
            data, due = self._batches(), False  # due: a checkpoint, which waits for a finite update
            if self.preview and not self.update:
                record.log({}, {}, self._show(record))
            while self.update < updates and not stop:
                started, cpu = time.perf_counter(), time.process_time()
                micro = [next(data) for _ in range(self.accumulation)]
                waited = time.perf_counter() - started
                bad = record.bad_samples([name for _, names in micro for name in names])
                flags = {"bad_samples": bad, "stop": stopping.reason is not None}
                logs = self.run_update(self.update, [batch for batch, _ in micro], flags, record.skipped_update)
                self._count(stepped=not logs["skipped"])
                stop = logs.pop("stop") > 0
                logs["bad_samples"] *= self.world.size
                due = due or self.update % self.train.save_every_updates == 0 or self.update == updates or stop
                saves = due and not logs["skipped"]
                timing = self._timing(started, waited) | {"cpu_s": time.process_time() - cpu}
                shown = self._show(record) if self.preview and self.preview.due(self.update, saves) else ({}, {})
                record.log(logs, timing, shown)
                record.check_skipped()
                if saves:
                    self.state.save(shown[0].get(self.preview.score) if self.preview else None)
                    due = False
            reason = stopping.reason or "another rank"
            record.finished = not stop or self.update == updates
        if not record.finished:
            skipped = f", which was skipped, so that nothing was saved after update {self.state.saved}" if due else ""
            self._say(f"stopped by {reason} after update {self.update}{skipped}; run the same command to resume")

    def _headline(self) -> str:
        """One line that describes the run."""
        device = self.world.device.type if self.world.device.type == "cpu" else torch.cuda.get_device_name()
        if kept := self.networks.student.locked_bytes:
            device += f", {kept / 2**30:.2f} GiB of host memory locked for frozen weights"
        return (
            f"training {self.config.method_name} on {self.config.backbone_name}: {self.world.size} rank(s), "
            f"{Path(self.train.deepspeed).stem}, {device}, batch {self.train.batch} = "
            f"{self.world.size} (ranks) x {self.train.micro_batch} (micro_batch) x {self.accumulation} (accumulation)"
        )

    def _count(self, stepped: bool) -> None:
        """Count one update. `stepped`: the weights changed, so the optimiser steps and the EMA advance too."""
        if stepped:
            self.state.prove()
            self.state.steps += 1
            if self.ema:
                self.ema.update(self.update)
        self.state.update += 1

    def _batches(self) -> Iterator:
        """Endless micro-batches of this rank from the current update on, each with the names of skipped samples."""
        first = self.update * self.train.batch // self.world.size
        stream = PairStream(self.shards, self.config.data, self.config.seed, self.world.rank, self.world.size, first)
        return batches(stream, self.train.micro_batch, self.world.device)

    def _show(self, record: Recording) -> tuple[dict[str, float], dict[str, float]]:
        """Restore the preview images with the EMA weights; return scores and timing. Every rank must call it."""
        started = time.perf_counter()
        with self.ema.swapped() if self.ema else contextlib.nullcontext():
            student = self.networks.models["student"]
            sampler = self.method.sampler().suited(student)
            sheet, scores = self.preview.make(student, sampler, self.world.device)
        record.preview(sheet)
        return scores, {"preview_s": time.perf_counter() - started}

    def _timing(self, started: float, waited: float) -> dict[str, float]:
        """Non-deterministic metrics: seconds of this update, images per second, and on a GPU the peak memory so far."""
        seconds = time.perf_counter() - started
        timing = {"update_s": seconds, "data_wait_s": waited, "images_per_s": self.train.batch / seconds}
        if self.world.device.type == "cuda":
            timing["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return timing

    def _set_autocast(self) -> None:
        """Enable bf16 autocast for fp32 networks. Raises ValueError for a backbone that computes in its own dtype."""
        if self.train.dtype != "bf16":
            return
        for base in self.networks.bases.values():
            if base.own_dtype:
                raise ValueError(
                    "train.dtype = bf16 enables autocast for networks kept in fp32, but "
                    "this backbone computes in backbone.dtype: remove train.dtype"
                )
            base.autocast = torch.bfloat16

    def _fit_codec(self) -> None:
        """Fit the student's codec if it needs fitting, and send it to all ranks.

        A resumed run has loaded it from its checkpoint, and one that starts from a model from there.
        """
        student = self.networks.student
        if student.needs_fit:
            student.fit(first_pairs(self.shards, FIT_PAIRS))
            student.load_fixed_state(self.world.from_main(student.fixed_state()))

    def _say(self, text: str) -> None:
        if self.world.main:
            print(text, flush=True)


def first_pairs(shards: ShardSet, limit: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the first readable pairs (x_hq, x_lq) of each readable shard, about `limit` in all.

    The result does not depend on the rank or the number of ranks. Raises ValueError when no shard can be read.
    """
    each, found = math.ceil(limit / len(shards.urls)), False
    for url in shards.urls:
        try:
            raw = read_shard(url)
            samples = [decode_near(raw, place, url, shards.decode) for place in range(min(each, len(raw)))]
        except ValueError:
            continue  # the training stream reports it, and stops if too many are broken
        for sample in samples:
            found = True
            yield to_tensor(sample.hq), to_tensor(sample.lq_up)
    if not found:
        raise ValueError(f"no shard of {shards.location} can be read: check them with `teasr verify`")
