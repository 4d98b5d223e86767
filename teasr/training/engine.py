"""DeepSpeed engines: one engine per base and one parameter group per role, and a portable optimiser state.

This is the only file that imports deepspeed. State is saved and loaded as full tensors by parameter name, so a
checkpoint works with any ZeRO stage, offload and number of ranks, and nothing is ever unpickled.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teasr.backbones.base import Backbone
from teasr.backbones.roles import Role, places
from teasr.config import presets
from teasr.config.reading import read_json
from teasr.config.settings import TrainConfig
from teasr.util.distributed import World
from teasr.util.optional import needed_for

RUN_OWNS = (  # keys set from the run config; setting them in a ds_configs file is an error
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16", "torch_autocast",
)  # fmt: skip
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
LOG_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}  # values of TEASR_DEEPSPEED_LOG; default: error


def _is_shown(record: logging.LogRecord) -> bool:
    return record.levelno >= LOG_LEVELS.get(os.environ.get("TEASR_DEEPSPEED_LOG", "error"), 0)


logging.getLogger("DeepSpeed").addFilter(_is_shown)  # here, since DeepSpeed logs while it is imported


def start_ranks(train: TrainConfig, world: World) -> None:
    """Initialise torch.distributed through DeepSpeed, and set its log level and the thread count of a CPU rank.

    Raises ValueError when this rank has no GPU, when the ranks cannot connect to each other, or for a wrong log level.
    """
    level = os.environ.get("TEASR_DEEPSPEED_LOG", "error")
    if level not in LOG_LEVELS:
        raise ValueError(f"TEASR_DEEPSPEED_LOG = {level}: must be one of {', '.join(LOG_LEVELS)}, or unset")
    with needed_for("training"):
        import deepspeed
        import deepspeed.ops

    deepspeed.utils.set_log_level_from_string(level)
    if torch.cuda.is_available():
        if world.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {world.rank} has no GPU: only {torch.cuda.device_count()} visible on {socket.gethostname()}; "
                "start one rank per visible GPU"
            )
        torch.cuda.set_device(world.device)
    else:
        torch.set_num_threads(train.cpu_threads or max(1, (os.cpu_count() or 1) // world.size))
        # DeepSpeed's shared-memory all-reduce is compiled at start, which needs a compiler and a minute: use gloo.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(verbose=False)
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"the ranks cannot connect to {address} ({' '.join(str(error).split())[:120]}): another run may be using "
            "the port; choose another port with `deepspeed --master_port 29501 launch/train.py ..`"
        ) from None


def engine_settings(train: TrainConfig, world_size: int) -> dict:
    """Build DeepSpeed's config: sharding from the file `train.deepspeed`, everything else from the run config.

    The files of ds_configs come with teasr, so that their names work in any folder.

    Raises ValueError when the file cannot be read, has no valid ZeRO stage, or sets a key that the run config sets.
    """
    path = Path(train.deepspeed)
    try:
        path = presets.find(path, presets.ZERO)
        settings = read_json(path)
    except ValueError as error:
        raise ValueError(
            f"train.deepspeed = {path} cannot be read ({error}): set it to a file such as ds_configs/zero3.json"
        ) from None
    duplicates = [key for key in RUN_OWNS if key in settings]
    if duplicates:
        raise ValueError(f"{path} sets {duplicates[0]}, which is set by the run config: remove it from this file")
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if isinstance(stage, bool) or stage not in (1, 2, 3):
        raise ValueError(
            f"{path} has zero_optimization.stage = {stage}: it must be 1, 2 or 3 (1 has no overhead on one GPU)"
        )
    return settings | {
        "train_batch_size": train.batch // train.accumulation(world_size),
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": 1,  # the trainer accumulates gradients itself, loss by loss
        "gradient_clipping": train.clip_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}} if train.dtype == "bf16" else {}),
    }


def check_zero(settings: dict, path: str) -> None:
    """Raise ValueError when DeepSpeed does not know a key of `zero_optimization` in the file `path`, or its value."""
    with needed_for("training"):
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from pydantic import ValidationError

    zero = settings["zero_optimization"]
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{path}: zero_optimization.{key} = {first['input']!r} is not accepted by DeepSpeed ({first['msg']})"
        ) from None


def check_nvme(settings: dict, world: World, roles: Sequence[Role]) -> None:
    """Raise ValueError when `settings` offload to NVMe and this machine, or a method with these roles, cannot."""
    zero = settings["zero_optimization"]
    nvme_parts = [
        zero[part] for part in ("offload_param", "offload_optimizer") if zero.get(part, {}).get("device") == "nvme"
    ]
    if not nvme_parts:
        return
    trained = [role for role in roles if role.is_trained]
    if any(len(on_engine) > 1 for on_engine in places(trained).values()):
        raise ValueError(
            f"the roles {', '.join(role.name for role in trained)} share an engine, which is untested with "
            "weights or optimiser states on NVMe: use ds_configs/zero3_offload.json, or give each role its own copy "
            "of the base"
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder

    for part in nvme_parts:
        if not Path(part.get("nvme_path", "")).is_dir():
            raise ValueError(
                f"nvme_path = {part.get('nvme_path')} is not a folder: copy the file of train.deepspeed and set "
                "nvme_path in the copy to a folder on an NVMe disk of this node"
            )
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ValueError("offload to NVMe needs libaio and its headers: install them with `apt install libaio-dev`")
    if world.size == 1 and world.device.type == "cpu":  # measured: gradient norm 9 % too small; two ranks are correct
        raise ValueError(
            "on a single CPU rank, DeepSpeed's NVMe buffers share memory with the weights, which makes the gradients "
            "wrong: use a GPU, two ranks, or ds_configs/zero3_offload.json"
        )


def check_swap(settings: dict, backbone: Backbone, by_block: bool = False) -> None:
    """Raise ValueError when `settings` partition weights (ZeRO-3) and the backbone swaps blocks, or runs `by_block`."""
    if settings["zero_optimization"]["stage"] < 3:
        return
    if by_block:
        raise ValueError(
            "method.order = blocks does not work with ZeRO-3, which follows the order of whole network calls: set "
            "train.deepspeed=ds_configs/zero1.json or ds_configs/zero2_offload.json, or method.order=losses"
        )
    if backbone.swapped_blocks:
        raise ValueError(
            f"backbone.swap_blocks = {backbone.swapped_blocks} keeps frozen weights in host memory, and so does ZeRO-3 "
            "in its own way: set train.deepspeed=ds_configs/zero1.json or ds_configs/zero2_offload.json, or "
            "backbone.swap_blocks=0"
        )


def start_engine(backbone: Backbone, train: TrainConfig, settings: dict, world: World):
    """Wrap a base in a DeepSpeed engine on the rank's device, replacing `backbone.net`.

    Each trained role is one parameter group. If an engine has several roles, their gradients are clipped separately
    before the step (`update.py`), because DeepSpeed only clips their joint norm.
    """
    import deepspeed

    check_swap(settings, backbone)
    backbone.to(world.device, each=_cutter(settings))
    roles = [role for role in backbone.roles if role.is_trained]
    groups = [
        {"params": list(backbone.trained(role.name).values()), "lr": train.learning_rate * role.rate, "rate": role.rate}
        for role in roles
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay,
        fused=torch.cuda.is_available() and "offload_optimizer" not in settings["zero_optimization"],
    )  # fmt: skip
    clip = (roles[0].clip_norm or train.clip_norm) if len(roles) == 1 else 0.0
    engine, *_ = deepspeed.initialize(
        model=backbone.net, model_parameters=[p for group in groups for p in group["params"]], optimizer=optimizer,
        config=settings | {"gradient_clipping": clip}, dist_init_required=False,
    )  # fmt: skip
    engine.takes_gradients = gradients_leave(settings)
    backbone.net = engine
    return engine


def gradients_leave(settings: dict) -> bool:
    """Whether an engine with these settings can take final gradients early: ZeRO-2 with its optimiser in the host."""
    zero = settings["zero_optimization"]
    offload = zero.get("offload_optimizer", {}).get("device", "none")
    return zero["stage"] == 2 and offload == "cpu" and not zero.get("overlap_comm")


class Departure:
    """Takes final gradients from the GPU to the optimiser in host memory while the backward pass is still running.

    The reduction is DeepSpeed's own, which `coalesce_grad_reduction` would begin after the last backward pass only, so
    that all gradients of an update were on the GPU at once. Here it begins when a block is finished.
    """

    def __init__(self, engine):
        self.zero = engine.optimizer
        self.groups = {p: i for i, group in enumerate(self.zero.bit16_groups) for p in group}
        self.gone: set[torch.nn.Parameter] = set()
        self.norms: list[Tensor] = []  # of each gradient on this rank

    def take(self, block: torch.nn.Module) -> None:
        """Take the gradients of a block."""
        found = [p for p in block.parameters() if p in self.groups and p.grad is not None]
        self.norms += torch._foreach_norm([p.grad for p in found])
        self.gone.update(found)
        self.zero.set_gradient_accumulation_boundary(True)
        self.zero.setup_buckets()
        for p in found:
            self.zero.reduce_ready_partitions_and_remove_grads(p, self.groups[p])

    def finish(self) -> None:
        """Reduce what is left in the bucket, before `coalesce_grad_reduction` looks for gradients that are left."""
        if self.gone:
            self.zero.reduce_ipg_grads()


def forget_update(engine) -> None:
    """Prepare an engine for the next update after one without a step.

    Otherwise, ZeRO-1 and 2 with offload would count it as a micro-batch of the next one, and add gradients of an
    earlier update to that.
    """
    zero = engine.optimizer
    if getattr(zero, "cpu_offload", False):
        zero.micro_step_id = -1
        zero.reset_cpu_buffers()


def set_rate(engine, rate: float) -> None:
    """Set the learning rate of the next step; each role multiplies it by its own factor."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["rate"]


def _cutter(settings: dict) -> Callable[[torch.nn.Module], Any]:
    """Return a function that, under ZeRO-3, partitions each part of a network across ranks (or into host memory).

    Parts are partitioned as they are loaded, so that no rank ever holds the whole network.
    """
    if settings["zero_optimization"]["stage"] < 3:
        return lambda part: None
    import deepspeed

    return lambda part: deepspeed.zero.Init(part, config_dict_or_path=settings, mem_efficient_linear=False)


def gather(backbone: Backbone, role: str) -> dict[str, torch.Tensor]:
    """Gather the exported weights of a role as full CPU tensors.

    Every rank must call it; only rank 0 gets the tensors.
    """
    import deepspeed

    state, main = {}, World.from_environment().main
    for name, parameter in backbone.exported(role).items():
        with deepspeed.zero.GatheredParameters([parameter]):
            if main:
                state[name] = parameter.detach().cpu().clone()
    return state


def optimiser_state(backbone: Backbone, role: str, world: World) -> dict[str, Tensor]:
    """Gather AdamW's moments of a role's trained parameters as full CPU tensors with keys "name|moment".

    Every rank must call it; only rank 0 gets the tensors.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    _link_moments(backbone.net.optimizer)
    state = {}
    for name, parameter in backbone.trained(role).items():
        for moment in MOMENTS:
            whole = safe_get_full_optimizer_state(parameter, moment)
            if world.main:
                state[f"{name}|{moment}"] = whole.detach().cpu().view(_shape(parameter)).clone()
    return state


def _link_moments(zero) -> None:
    """Link each parameter to its slice of the flat moment tensors (ZeRO-1 and 2).

    DeepSpeed does this only once, after the step of the first parameter group, when later groups have no moments yet.
    """
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def load_optimiser_state(engine, state: dict[str, Tensor], steps: int, world: World) -> None:
    """Load the result of `optimiser_state` for all roles of an engine.

    `steps`: optimiser steps done when it was saved. The ZeRO stage and the number of ranks may differ from then.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    zero = engine.optimizer
    sharded = engine.zero_optimization_stage() == 3
    for flat in zero.fp32_partitioned_groups_flat if sharded else zero.single_partition_of_fp32_groups:
        fused = zero.optimizer.param_groups[0]["fused"]
        step = torch.tensor(float(steps), device=flat.device if fused else "cpu")
        zero.optimizer.state[flat] = {"step": step} | {moment: torch.zeros_like(flat) for moment in MOMENTS}
    _link_moments(zero)
    for name, parameter in ((n, p) for n, p in engine.module.named_parameters() if p.requires_grad):
        for moment in MOMENTS:
            whole = state[f"{name}|{moment}"].to(world.device)
            if sharded:
                n = parameter.ds_tensor.numel()
                part = torch.zeros(n, device=world.device)
                mine = whole.flatten()[world.rank * n : (world.rank + 1) * n]
                part[: mine.numel()] = mine
                safe_set_local_optimizer_state(parameter, part, moment)
            else:
                safe_set_full_optimizer_state(parameter, whole, moment)


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
