"""`teasr train --photos`: from a folder of photographs to a model of your own, in one command.

It does what `teasr prepare`, `teasr train` and `teasr benchmark` do one after the other, into one folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teasr.config import presets, strict_yaml
from teasr.config.reading import read_yaml

if TYPE_CHECKING:
    from teasr.run_config import RunConfig

HELDOUT_SHARE, MOST_HELDOUT = 0.1, 20  # of the photographs
DEGRADATIONS = ("osediff", "light")  # of the training crops; the held-out crops have the first one
CROPS = 4000  # default number of training crops of each degradation
CROP_PX = {"tiny": 64, "unet": 128}  # by backbone; 512 for large ones
RATE = 0.3  # learning rate, as a share of that with which the model was trained


def train(photos: Path, out: Path, model: str, name: str | None, crops: int, overrides: list[str]) -> int:
    """Make shards of the photographs, train `model` further on them, score it before and after; returns the exit code.

    out: the run folder. model: a trained model (a folder, or the name of a shipped one), or a preset, which starts from
    its own initial weights. name: of the run in MLflow (default: that of `out`). crops: number of training crops of
    each degradation. overrides: changes of the run's config. Running it again continues. Raises ValueError when there
    are fewer than two photographs or the model cannot be trained further.
    """
    from teasr import run_config
    from teasr.commands import sync_mlflow
    from teasr.tracking.mlflow_store import tracking_uri
    from teasr.training.trainer import Trainer
    from teasr.util.output import lenient_output

    data, start = _config_of(model)
    split = _split(photos, out)
    shards = _make_sets(out, split, crops, CROP_PX.get(data["backbone"]["name"], 512), data.get("scale", 4))
    if crop_px := data["data"].get("crop_px"):
        shards["crop_px"] = crop_px
    data |= {"run_dir": str(out), "data": shards, "preview": {"shards": str(out / "shards/heldout")}}
    data["tracking"] = data.get("tracking", {}) | {"experiment": "teasr", "run_name": name or out.name}
    if start:
        rate = RATE * data["train"]["learning_rate"]
        data["train"] |= {"start_from": start, "updates": 1000, "save_every_updates": 100, "learning_rate": rate}
        data["method"] |= {"ramps": {}} if "ramps" in data["method"] else {}  # the model has passed them
    config = run_config.parse(strict_yaml.override(data, overrides))
    _fetch_weights(config)
    with lenient_output():
        trainer = Trainer(config)
        began = trainer.update
        trainer.fit()
        if trainer.update < config.train.updates:
            return 0
        if began < trainer.update:
            sync_mlflow.after_training(out, config.tracking)
        os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri(out, config.tracking))  # of both evaluations
        _score(out, start)
        print(f"\nyour model: {out}\n  teasr upscale photo.jpg -o photo_x4.png --model {out}", flush=True)
    return 0


def _fetch_weights(config: RunConfig) -> None:
    """Fetch the weights of LPIPS if the training needs them. Raises ValueError if that is impossible."""
    from teasr.evaluation import weights

    needs = getattr(config.method, "lambda_lpips", 0) and config.method.lpips_weights == "pretrained"
    if not needs or weights.has_lpips(config.method.lpips_net):
        return
    print("LPIPS, a part of the loss, needs weights that are not here yet: fetching them (65 MB)", flush=True)
    problems = weights.provide(None, packages_only=True)
    if not weights.has_lpips(config.method.lpips_net):
        raise ValueError(
            f"the weights of LPIPS could not be fetched ({'; '.join(map(str, problems))[:300]}): run `teasr weights` "
            "where there is a network connection, or train without them: add method.lambda_lpips=0"
        )


def _config_of(model: str) -> tuple[dict[str, Any], str | None]:
    """Return the config to train with, and the model to start from (None for a preset)."""
    from teasr import assets
    from teasr.util import checkpoint_folder

    known = presets.names(presets.RUNS)
    if model in known and assets.find(model) is None:
        return read_yaml(known[model]), None
    try:
        folder = checkpoint_folder.resolve(assets.find(model) or Path(model).expanduser())
    except ValueError as error:
        raise ValueError(
            f"--from {model}: {error}; the models shipped with teasr are {', '.join(assets.names())}, and "
            "`teasr presets` lists the presets"
        ) from None
    return read_yaml(folder / "config.yaml"), model


def _split(photos: Path, out: Path) -> dict[str, Path]:
    """Link the photographs into a folder for training and one for held-out crops; returns these folders.

    Which ones are held out depends on their names alone, so that new photographs do not exchange the others.
    """
    from teasr.imaging.finding import walk_pictures

    if not photos.is_dir():
        raise ValueError(f"--photos {photos} is not a folder: give a folder of photographs")
    inside = os.path.realpath(out) + os.sep
    found = [n for n in walk_pictures(photos)[0] if not os.path.realpath(photos / n).startswith(inside)]
    if len(found) < 2:
        raise ValueError(
            f"--photos {photos} holds {len(found)} photograph(s): at least 2 are needed, one of them to judge the "
            "model by; 20 or more are better"
        )
    ranked = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    held = set(ranked[: max(1, min(MOST_HELDOUT, round(HELDOUT_SHARE * len(found))))])
    folders = {part: out / "photos" / part for part in ("train", "heldout")}
    shutil.rmtree(out / "photos", ignore_errors=True)  # links only
    for name in found:
        link = folders["heldout" if name in held else "train"] / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.realpath(photos / name))
    print(f"{len(found)} photographs in {photos}; {len(held)} of them are only used to judge the model", flush=True)
    return folders


def _make_sets(out: Path, photos: dict[str, Path], crops: int, crop_px: int, scale: int) -> dict[str, Any]:
    """Make the shard sets, or keep those that are there; returns the section `data` of the config."""
    from teasr.data.prep import engines
    from teasr.data.prep.job import make_set
    from teasr.data.prep.plan import PrepConfig
    from teasr.data.shards import ShardSet

    count = sum(1 for path in photos["train"].rglob("*") if path.is_symlink())
    sets = {}
    for seed, name in enumerate((*DEGRADATIONS, "heldout")):
        common = {"out": str(out / "shards" / name), "scale": scale, "shard_samples": 256, "seed": seed}
        if name == "heldout":
            how = {"photos": str(photos[name]), "degradation": DEGRADATIONS[0], "crop_px": max(128, crop_px)}
            how |= {"crops_per_photo": 4}
        else:
            how = {"photos": str(photos["train"]), "degradation": name, "crop_px": crop_px}
            how |= {"crops_per_photo": max(1, crops // count), "candidates": 4, "scales": (1.0, 0.7, 0.5, 0.35)}
        make_set(PrepConfig(**common, **how), "local", engines.cores(), 0, 1, overwrite=True)
        sets[name] = common["out"]
    shards = [sets[name] for name in DEGRADATIONS]
    streams = min(4, len(ShardSet.open(*shards).urls))
    return {"shards": shards, "streams": streams, "augment": "dihedral"}


def _score(out: Path, start: str | None) -> None:
    """Score the model, and the one it started from, on the held-out crops."""
    from teasr.commands import benchmark

    steps = ["--data", str(out / "shards/heldout"), "--steps", "1", "4", "--metrics", "psnr", "ssim", "lpips", "dists"]
    if start:
        print(f"\nbefore, {start}:", flush=True)
        benchmark.main([start, *steps, "--out", str(out / "eval/before")])
    print(f"\nafter, {out}:", flush=True)
    benchmark.main([str(out), *steps])
