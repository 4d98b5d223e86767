"""The training loop: networks become DeepSpeed engines, loss terms are back-propagated one by one, every update is logged.

The only file that imports deepspeed. It knows neither the method nor the backbone. All backward passes of an update run
inside one `coalesce_grad_reduction` block: without it ZeRO-1/2 drop all but the last of several backward passes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from teasr import checkpoint
from teasr.backbones.base import Backbone
from teasr.config import diff
from teasr.data.shards import ShardSet, decode_near, read_shard
from teasr.data.stream import PairStream, batches, check_shards, check_streams
from teasr.distributed import World
from teasr.ema import Ema
from teasr.files import write_atomic
from teasr.images import to_tensor
from teasr.methods.base import Batch, Method, Progress
from teasr.progress import ProgressLine
from teasr.randomness import Draws
from teasr.recipe import Recipe, load
from teasr.settings import TrainConfig
from teasr.tracking import BAD_FILE, Tracker, git_commit

RUN_OWNS = (  # keys that the run config decides; a second value in a ds_configs file is an error
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer",
    "scheduler", "fp16", "bf16", "torch_autocast",
)  # fmt: skip
MAY_CHANGE = ("run_dir", "data.shards", "data.workers", "tracking.", "train.cpu_threads", "train.keep_checkpoints",
              "train.save_every_updates", "train.updates")  # fmt: skip
FIT_PAIRS = 1024  # pictures that a codec is fitted to


class Trainer:
    """One run: everything checked and built in the constructor, trained by `fit`."""

    def __init__(self, recipe: Recipe):
        """Raises ValueError with the cure before anything long when the run cannot work."""
        self.recipe, self.train = recipe, recipe.train
        self.world = World.from_environment()
        self.run_dir = Path(recipe.run_dir)
        self.root = self.run_dir / "checkpoints"
        self.accumulation = self.train.accumulation(self.world.size)
        self.shards = ShardSet.open(recipe.data.shards)
        check_streams(self.shards, recipe.data, self.world.size)
        settings = engine_settings(self.train, self.world.size)
        self.method: Method = recipe.build_method()
        self.method.check(self.accumulation)
        self.networks: dict[str, Backbone] = {name: recipe.build_backbone() for name in self.method.networks}
        if recipe.train.dtype == "bf16" and any(network.own_dtype for network in self.networks.values()):
            raise ValueError(
                f"train.dtype = bf16 is autocast for networks kept in fp32; {recipe.backbone_name} computes in backbone.dtype: "
                "remove train.dtype"
            )
        self.student = self.networks[self.method.networks[0]]
        if self.world.main:
            for problem in check_shards(self.shards, self.student.check_size, recipe.data.max_bad_share):
                self._say(f"warning: {problem}")
            self.run_dir.mkdir(parents=True, exist_ok=True)
        start_ranks(self.train, self.world)
        found = checkpoint.latest(self.root) if self.world.main else None
        self.found: Path | None = self.world.from_main(found)
        self.update = self._check_found() if self.found else 0
        self._fit_fixed_parts()
        self.method.to(self.world.device)
        self.engines = {
            name: start_engine(network, self.train, settings, self.world) for name, network in self.networks.items()
        }
        # beside the optimiser's states, in host memory where they are
        away = "offload_optimizer" in settings["zero_optimization"]
        place = torch.device("cpu") if away else None
        self.ema = Ema(self.student.net.module, self.train.ema, self.world, place) if self.train.ema else None
        if self.found:
            self._load()

    def fit(self) -> None:
        """Train to the last update, saving on the way; says so when there is nothing left to do."""
        updates = self.train.updates
        if self.update >= updates:
            self._say(f"already trained: {self.update}/{updates} updates in {self.run_dir}")
            return
        stream = PairStream(
            self.shards, self.recipe.data, self.recipe.seed, self.world.rank, self.world.size,
            self.update * self.train.batch // self.world.size,
        )  # fmt: skip
        data = batches(stream, self.train.micro_batch, self.world.device)
        line = ProgressLine("train", updates, "updates", self.update, enabled=self.world.main)
        tracker = self._start_tracker()
        status, named = "KILLED", set()
        try:
            while self.update < updates:
                started = time.perf_counter()
                micro = [next(data) for _ in range(self.accumulation)]
                waited = time.perf_counter() - started
                bad = [name for _, names in micro for name in names]
                self._name(sorted(set(bad) - named))
                named |= set(bad)
                logs = self._one_update([batch for batch, _ in micro], len(bad))
                self.update += 1
                if tracker:
                    seconds = time.perf_counter() - started
                    timing = {"update_s": seconds, "data_wait_s": waited, "images_per_s": self.train.batch / seconds}
                    tracker.log(self.update, logs, timing)
                line.show(self.update, loss=logs["loss"])
                if self.update % self.train.save_every_updates == 0 or self.update == updates:
                    self.save()
            status = "FINISHED"
        except Exception:
            status = "FAILED"
            raise
        finally:
            line.close()
            if tracker:
                tracker.close(status)

    def _name(self, bad: list[str]) -> None:
        """Print what had to be passed over in the data, and keep it in bad_samples.txt, which goes to MLflow at the end."""
        if bad:
            lines = [f"update {self.update + 1}, rank {self.world.rank}: skipped {name}" for name in bad]
            print(*lines, sep="\n", flush=True)
            with open(self.run_dir / BAD_FILE, "a") as file:
                file.write("\n".join(lines) + "\n")

    def _one_update(self, micro: list[Batch], bad: int) -> dict[str, float]:
        """All terms of all micro-batches, then one optimiser step of every network; returns what to log."""
        rate = self.train.rate(self.update)
        sums: dict[str, list[torch.Tensor]] = {}
        with ExitStack() as stack:
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
        logs = self.world.mean(means | {"bad_samples": torch.tensor(bad)})
        logs["bad_samples"] *= self.world.size
        self._refuse_nan(logs, micro)
        for engine in self.engines.values():
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            engine.step()
        if self.ema:
            self.ema.update(self.update)
        weights = self.method.weights(Progress(self.update, self.train.updates))
        loss = sum(weight * logs.get(name, 0.0) for name, weight in weights.items())
        norm = math.hypot(*(float(engine.get_global_grad_norm()) for engine in self.engines.values()))
        return {"loss": loss} | logs | {"grad_norm": norm, "learning_rate": rate}

    def _refuse_nan(self, logs: dict[str, float], micro: list[Batch]) -> None:
        wrong = [name for name, value in logs.items() if not math.isfinite(value)]
        if wrong:
            raise FloatingPointError(
                f"update {self.update + 1}: {', '.join(wrong)} is not finite (samples {', '.join(micro[0].keys[:8])}); the "
                f"last good state is in {self.root}; lower train.learning_rate or raise the ramps of method.ramps"
            )

    def _fit_fixed_parts(self) -> None:
        """What is fitted and not trained (a codec): from the checkpoint, else from the data, equal on all ranks."""
        if self.found:
            state = load_file(self.found / "fixed.safetensors")
        elif self.student.needs_fit:
            self.student.fit(first_pairs(self.shards, FIT_PAIRS))
            state = self.world.from_main(self.student.fixed_state())
        else:
            return
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

    def save(self) -> None:
        """Write checkpoints/step-XXXXXXXX: engine state for resuming, plain safetensors for everything else."""
        with checkpoint.writing(self.root, self.update, self.world, self.train.keep_checkpoints) as folder:
            for name, engine in self.engines.items():
                engine.save_checkpoint(
                    str(folder),
                    tag=f"engine-{name}",
                    client_state={},
                    save_latest=False,
                    exclude_frozen_parameters=True,
                )
            student = self.student
            weights = gather(student)
            averaged = {}
            if self.ema:
                with self.ema.swapped():
                    averaged = gather(student)
            if self.world.main:
                save_file(weights, folder / "weights.safetensors")
                if averaged:
                    save_file(averaged, folder / "ema.safetensors")
                save_file(
                    {k: v.contiguous().cpu() for k, v in student.fixed_state().items()}, folder / "fixed.safetensors"
                )
                state = {"update": self.update, "world_size": self.world.size, "commit": git_commit()}
                write_atomic(folder / "state.json", json.dumps(state, indent=1).encode())
                write_atomic(folder / "config.yaml", self.recipe.to_yaml().encode())

    def _check_found(self) -> int:
        """The update that the found checkpoint goes on from. ValueError when it is of another run or world."""
        state = json.loads((self.found / "state.json").read_text())
        old = load(self.found / "config.yaml").to_dict()
        changes = diff(old, self.recipe.to_dict())
        fatal = [line for line in changes if not line.startswith(MAY_CHANGE)]
        if fatal:
            raise ValueError(
                f"{self.run_dir} holds a run of another config ({'; '.join(fatal)}): take these back, or choose another run_dir"
            )
        if state["world_size"] != self.world.size:
            raise ValueError(
                f"{self.found} was written by {state['world_size']} rank(s), this start has {self.world.size}: start with as many"
            )
        for line in [f"resuming from {self.found} at update {state['update']}", *(f"  changed: {c}" for c in changes)]:
            self._say(line)
        return state["update"]

    def _load(self) -> None:
        """Weights, optimiser and average of the found checkpoint; positions and noise follow from the update."""
        for name, engine in self.engines.items():
            path, _ = engine.load_checkpoint(str(self.found), tag=f"engine-{name}", load_module_strict=False)
            assert path is not None, f"DeepSpeed found no engine-{name} in {self.found}"
        if self.ema:
            self.ema.load(load_file(self.found / "ema.safetensors"))

    def _say(self, text: str) -> None:
        if self.world.main:
            print(text, flush=True)


def start_ranks(train: TrainConfig, world: World) -> None:
    """Bring up torch.distributed the way DeepSpeed wants it, quietly, and set the threads of a CPU rank."""
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if torch.cuda.is_available():
        torch.cuda.set_device(world.device)
    else:
        torch.set_num_threads(train.cpu_threads or max(1, (os.cpu_count() or 1) // world.size))
        # Its shared-memory all-reduce is compiled at start, which needs a compiler and a minute; gloo serves as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(verbose=False)
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"the ranks cannot meet at {address} ({' '.join(str(error).split())[:120]}): another run may hold the port, "
            "choose one with `deepspeed --master_port 29501 launch/train.py ..`"
        ) from None


def start_engine(backbone: Backbone, train: TrainConfig, settings: dict, world: World):
    """A DeepSpeed engine around the network, on the rank's device; it takes the place of `backbone.net`."""
    import deepspeed

    backbone.to(world.device, each=_cutter(settings))
    parameters = [p for p in backbone.net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay,
        fused=torch.cuda.is_available() and "offload_optimizer" not in settings["zero_optimization"],
    )  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=backbone.net, model_parameters=parameters, optimizer=optimizer, config=settings, dist_init_required=False
    )
    backbone.net = engine
    return engine


def _cutter(settings: dict) -> Callable[[torch.nn.Module], Any]:
    """Under ZeRO-3: spreads each part of a network over the ranks (or into host memory) as it comes, so that none holds it whole."""
    if settings["zero_optimization"]["stage"] < 3:
        return lambda part: None
    import deepspeed

    return lambda part: deepspeed.zero.Init(part, config_dict_or_path=settings, mem_efficient_linear=False)


def engine_settings(train: TrainConfig, world_size: int) -> dict:
    """DeepSpeed's config: sharding from the file that `train.deepspeed` names, all else from the run. ValueError on both."""
    path = Path(train.deepspeed)
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"train.deepspeed = {path} cannot be read ({error}): name a file such as ds_configs/zero3.json"
        ) from None
    twice = [key for key in RUN_OWNS if key in settings]
    if twice:
        raise ValueError(f"{path} sets {twice[0]}, which the run config decides: remove it there")
    stage = settings.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(
            f"{path} has zero_optimization.stage = {stage}: it must be 1, 2 or 3 (1 costs nothing on one GPU)"
        )
    return settings | {
        "train_batch_size": train.batch // train.accumulation(world_size),
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": 1,  # the trainer accumulates by itself, term by term
        "gradient_clipping": train.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if train.dtype == "bf16" else {}),
    }


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


def gather(backbone: Backbone) -> dict[str, torch.Tensor]:
    """What the backbone wants exported, whole and on the CPU; every rank must call it, rank 0 gets the tensors."""
    import deepspeed

    net, state = backbone.net.module, {}
    main = World.from_environment().main
    for name, parameter in net.named_parameters():
        if backbone.exports(name, parameter):
            with deepspeed.zero.GatheredParameters([parameter]):
                if main:
                    state[name] = parameter.detach().cpu().clone()
    return state
