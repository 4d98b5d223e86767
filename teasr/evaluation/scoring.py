"""Score a model or existing predictions on a set of held-out pairs, write the results and log them to MLflow."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from teasr import assets
from teasr.config import strict_yaml
from teasr.config.settings import TrackingConfig
from teasr.data import pairs as pairs_of
from teasr.data.layout import DEFAULT_SCALE
from teasr.data.pairs import Pairs
from teasr.data.shards import Sample, ShardSet
from teasr.evaluation.benchmark import Evaluation, table
from teasr.evaluation.metrics import Scorer
from teasr.evaluation.names import SHOWN, dial_name, step_name, steps_of
from teasr.tracking.environment import command_line_of_process, git_commit
from teasr.tracking.mlflow_open import Place
from teasr.tracking.mlflow_results import log_results
from teasr.util import checkpoint_folder
from teasr.util.files import read_json, write_atomic
from teasr.util.seed import seed_of


def evaluate(options: argparse.Namespace, datasets: Path) -> None:
    """Restore the missing images, score them, write the results and log them.

    options: those of `teasr benchmark`; datasets: file of the test sets that --data knows by name.
    """
    if (options.model is None) == (options.predictions is None):
        raise ValueError("give either a model with --data, or --predictions with --hq and --out")
    if options.model is not None and options.data is not None:
        options.model = checkpoint_folder.resolve(
            assets.find(options.model) or options.model
        )  # resolved once, because it hashes every file
        shipped = options.model.resolve().parent == assets.HERE
        options.home = Path("runs") / options.model.name if shipped else checkpoint_folder.run_folder(options.model)
    scorer = Scorer(options.metrics, options.protocol, options.metric_weights, options.require, _device())
    evaluation = _of_predictions(options, scorer) if options.model is None else _of_model(options, scorer, datasets)
    record = evaluation.out / "evaluation.json"
    if evaluation.rank == 0 and _done(evaluation, record):
        print(f"already evaluated: {options.model or options.predictions} on {evaluation.pairs.name}")
        show(json.loads((evaluation.out / "scores.json").read_text()), evaluation.out)
        return
    evaluation.run()
    if evaluation.rank != 0:
        return
    show(evaluation.scores, evaluation.out)
    logged, place = _log(options, evaluation)
    if logged:
        done = {"settings": evaluation.settings, "commit": git_commit()}
        done |= {"mlflow": {"link": place.link, "command": place.command}} if place else {}
        write_atomic(record, json.dumps(done, indent=1).encode())


def _done(evaluation: Evaluation, record: Path) -> bool:
    settings = json.loads(json.dumps(evaluation.settings))
    return read_json(record).get("settings") == settings and (evaluation.out / "scores.json").is_file()


def _of_model(options: argparse.Namespace, scorer: Scorer, datasets: Path) -> Evaluation:
    from teasr.restore.upscaler import Upscaler

    if options.data is None:
        raise ValueError(
            "--data is missing: give a shard set, two folders as LQ:HQ, or a name of `teasr presets show datasets`"
        )
    folder = options.model
    scale = strict_yaml.read_yaml(folder / "config.yaml").get("scale", DEFAULT_SCALE)
    pairs = find_pairs(options.data, options.data_root, scale, datasets)
    if pairs.scale != scale:
        raise ValueError(
            f"{pairs.name} has pairs of scale {pairs.scale}, but {folder} restores at scale {scale}: evaluate it on "
            f"pairs of scale {scale}"
        )
    manifest = json.loads((folder / checkpoint_folder.MANIFEST).read_text())
    made_by = {"checkpoint": folder.name, "manifest": manifest, "weights": options.weights, "seed": options.seed}
    made_by |= {"fidelity": options.fidelity, "color": options.color}
    load = functools.cache(lambda: Upscaler.from_pretrained(folder, options.weights, _device()))  # loaded on first use

    def method(steps: int, dials: Mapping[str, float]):
        def restore(sample: Sample):
            if sample.scale != scale:
                raise ValueError(f"{sample.key} is a pair of scale {sample.scale}, but the model restores at {scale}")
            blend = {"fidelity": options.fidelity} if options.fidelity and steps > 1 else {}
            settings = {"dials": blend | dials, "color_fix": options.color}
            return load()(sample.lq, steps, seed_of(options.seed, sample.key), **settings)

        return restore

    out = options.out or options.home / "eval" / pairs.name
    methods = {step_name(n): method(n, {}) for n in options.steps}
    if wrong := [s for s in options.strengths if not 0 <= s <= 1]:
        raise ValueError(f"--strengths {wrong[0]:g}: must be between 0 and 1")
    methods |= {dial_name(1, s): method(1, {"strength": s}) for s in options.strengths}
    return Evaluation(pairs, scorer, out, methods, made_by, **_here())


def _of_predictions(options: argparse.Namespace, scorer: Scorer) -> Evaluation:
    if options.hq is None or options.out is None:
        raise ValueError("--predictions needs --hq (folder of the originals) and --out (output folder)")
    theirs = pairs_of.from_folders(options.hq, options.predictions, scale=1, name=options.hq.name)
    methods = {options.name: lambda sample: sample.lq}
    made_by, flags = {"name": options.name}, {"keep_images": False, "beside_baseline": False}
    return Evaluation(theirs, scorer, options.out, methods, made_by, **flags, **_here())


def find_pairs(data: str, root: Path, scale: int, datasets: Path) -> Pairs:
    """Return the pairs of a name in the file `datasets`, of LQ:HQ folders or of a shard set.

    `scale`: that of LQ:HQ folders, and of sets whose LQ is made from HQ. Raises ValueError when `data` is none of
    these or the set is incomplete.
    """
    known = pairs_of.read_datasets(datasets)
    if data in known:
        entry = known[data]
        hq = root / entry.hq
        lq = None if entry.lq == "bicubic" else root / entry.lq
        if not hq.is_dir():
            raise ValueError(
                f"dataset {data}: folder {hq} does not exist. Get it from {entry.get}; "
                f"set --data-root to the folder that contains {entry.hq}"
            )
        if lq is not None:
            return pairs_of.from_folders(hq, lq, entry.scale, data, entry.count)
        if scale == 1:
            raise ValueError(
                f"dataset {data} has no degraded images for a model of scale 1: give a shard set, or LQ:HQ"
            )
        name = data if scale == entry.scale else f"{data}-x{scale}"
        return pairs_of.from_folders(hq, None, scale, name, entry.count)
    lq, colon, hq = data.partition(":")
    if colon and Path(lq).is_dir():
        return pairs_of.from_folders(Path(hq), Path(lq), scale)
    return pairs_of.from_shards(data)


def show(scores: dict, out: Path) -> None:
    """Print the score table and the paths of the results."""
    print(f"\n{scores['dataset']}, {scores['pictures']} images, protocol {scores['protocol']}\n{table(scores)}")
    print(f"\nscores {out / 'scores.json'}\nimages {out / 'comparison.png'}, {out / 'extremes.png'}")


def _log(options: argparse.Namespace, evaluation: Evaluation) -> tuple[bool, Place | None]:
    """Log to the MLflow run of the training, or to a separate run for predictions.

    Returns whether there is nothing left to log, and the run, if there is one.
    """
    scores, name = evaluation.scores, evaluation.pairs.name
    if options.model is not None:
        from teasr.run_config import load

        run_config = load(options.model / "config.yaml")
        tracking, place, params = run_config.tracking, options.home, run_config.to_dict()
    else:
        tracking, place = TrackingConfig(run_name=options.name), evaluation.out
        params = {"predictions": str(options.predictions), "hq": str(options.hq)}
    if not tracking.mlflow:
        return True, None
    metrics: dict[str, dict[int, float]] = {}
    for method, row in scores["methods"].items():
        for metric, value in row.items():
            steps = steps_of(method)
            if steps is not None:
                metrics.setdefault(f"{name}/{metric}", {})[steps] = value["mean"]
            metrics[f"{name}/{metric}_{method.replace(' ', '_')}"] = {0: value["mean"]}
    files = [
        evaluation.out / f
        for f in ("scores.json", "scores_by_picture.csv", "speed.json", "comparison.png", "extremes.png", SHOWN)
    ]
    try:
        run = log_results(place, tracking, params, metrics, files, f"eval/{name}", _dataset(options, evaluation.pairs))
    except ValueError as error:
        print(
            f"warning: {error}; the result files are complete; to log them, run the same command again when MLflow is "
            "available",
            flush=True,
        )
        return False, None
    print("logged to", run)
    return True, run


def _dataset(options: argparse.Namespace, pairs: Pairs) -> dict:
    """Describe the pairs for MLflow, a shard set as its training does."""
    if options.data and "shards" in pairs.identity:
        return ShardSet.open(options.data).datasets()[0] | {"context": "evaluation"}
    digest = hashlib.sha256(json.dumps(pairs.identity, sort_keys=True).encode()).hexdigest()[:12]
    profile = {"pictures": len(pairs), "scale": pairs.scale}
    source = str(options.data or options.hq)
    return {"name": pairs.name, "digest": digest, "source": source, "context": "evaluation", "profile": profile}


def _here() -> dict:
    ranks = {"rank": int(os.environ.get("RANK", 0)), "world": int(os.environ.get("WORLD_SIZE", 1))}
    return ranks | {"commit": git_commit(), "command": command_line_of_process()}


def _device() -> str:
    """Return this rank's GPU, or the CPU if there is none."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
