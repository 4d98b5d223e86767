"""`teasr sync-mlflow`: upload the updates, and the finished model, of a run folder that are missing in MLflow."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from teasr.util import command_line

if TYPE_CHECKING:
    from teasr.config.settings import TrackingConfig

SUMMARY = "upload the updates of a run folder, and its finished model, that are missing in MLflow"
EXAMPLES = """examples:
  {prog} runs/mine                                     to the store that the run's config names
  {prog} runs/mine --uri http://mlflow.example:5000    to another store
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Return the parser of the options; prog: how the program was called."""
    parser = command_line.parser(prog, SUMMARY, EXAMPLES)
    parser.add_argument("run", type=Path, help="run folder (run_dir of the training)")
    parser.add_argument("--uri", help="MLflow tracking URI (default: that of the run's config)")
    return parser


def main(arguments: list[str] | None = None, prog: str = "teasr sync-mlflow") -> int:
    """Upload; returns the exit code: 0 on success, 2 for an error that the message explains."""
    options = parser(prog).parse_args(arguments)
    return command_line.run("uploading to MLflow", lambda: _sync(options), stopped="run the same command to continue")


def _sync(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from teasr.config import strict_yaml
    from teasr.config.settings import TrackingConfig
    from teasr.tracking.mlflow_run import sync
    from teasr.tracking.run_files import METRICS, STATUS_FILE

    if not (options.run / METRICS).is_file():
        raise ValueError(f"{options.run} is not a run folder: it contains no {METRICS}; give the run_dir of a training")
    path = options.run / "config.yaml"
    settings = strict_yaml.read_yaml(path).get("tracking") or {}
    with strict_yaml.named(path):
        tracking = strict_yaml.build(TrackingConfig, settings, "tracking")
    if options.uri:
        tracking = replace(tracking, uri=options.uri)
    place, sent = sync(options.run, tracking)
    print(f"{sent} updates uploaded to {place}" if sent else f"nothing to upload: {place} is up to date")
    status = options.run / STATUS_FILE
    if tracking.model_mb and status.is_file() and status.read_text().strip() == "FINISHED":
        print(log_model(options.run, tracking))
    return 0


def log_model(run: Path, tracking: TrackingConfig) -> str:
    """Log the model of a finished run to its MLflow run, as `teasr export` writes it; returns what to print.

    A model that is larger than tracking.model_mb, or a prior, which cannot restore, is not logged. Raises ValueError
    when MLflow does not accept it, or when the run has no intact checkpoint.
    """
    import json
    import tempfile

    from teasr import run_config
    from teasr.commands import export
    from teasr.tracking.mlflow_model import log_model
    from teasr.util import checkpoint_folder

    folder = checkpoint_folder.resolve(run)
    weights = "ema" if (folder / "ema.safetensors").is_file() else "weights"
    size = (folder / f"{weights}.safetensors").stat().st_size / 1e6
    if size > tracking.model_mb:
        return f"the model has {size:,.0f} MB, more than tracking.model_mb = {tracking.model_mb:g}: MLflow gets no copy"
    settings, state = run_config.load(folder / "config.yaml"), json.loads((folder / "state.json").read_text())
    if not settings.with_random_weights().build_backbone(settings.build_method().roles()[:1]).restores:
        return "an unconditional prior cannot restore: MLflow gets no model"
    tags = {"backbone": settings.backbone_name, "updates": str(state["update"]), "commit": state["commit"]}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / run.resolve().name
        export.export(argparse.Namespace(weights=weights, dtype="fp32", out=out), folder)
        return f"model in MLflow: {log_model(run, tracking, settings.to_dict(), out, tags)}"


def after_training(run: Path, tracking: TrackingConfig) -> None:
    """Log the model of a run that has just ended, and print where it is.

    Whatever goes wrong is a printed warning, since the run is complete without it.
    """
    if not (tracking.mlflow and tracking.model_mb):
        return
    try:
        print(log_model(run, tracking), flush=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        print(
            f"warning: the model was not stored in MLflow ({reason}); the run is complete, and "
            f"`teasr sync-mlflow {run}` stores it later",
            flush=True,
        )
