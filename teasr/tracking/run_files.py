"""Names of the files that training writes to the run folder, apart from the checkpoints."""

from __future__ import annotations

from pathlib import Path

METRICS, TIMING = "metrics.csv", "timing.csv"  # reproducible values; values that differ between identical runs
RUN_FILE = "mlflow_run.json"  # {tracking URI: run id in that store}
PARAMS_FILE = "parameters.json"
DATASETS_FILE = "datasets.json"  # {"datasets": [{name, digest, source, context, profile}, ..]}
STATUS_FILE = "status"  # RUNNING, FINISHED, FAILED or KILLED, as in MLflow
SKIPPED_FILE = "skipped_updates.txt"  # updates with non-finite values, and where these occurred
BAD_FILE = "bad_samples.txt"  # samples that the reader skipped, one per line
FILES = ("config.yaml", "environment.txt", BAD_FILE, SKIPPED_FILE)  # files of the run folder to log as artifacts
PREVIEWS, PREVIEW = "previews", "update-{:08d}.png"


def check_finished(run: Path) -> None:
    """Raise ValueError if the training of a run folder was stopped before its last update (it then exits with 0)."""
    if (status := (run / STATUS_FILE).read_text().strip()) != "FINISHED":
        raise ValueError(f"the training in {run} has stopped early ({status}): run the same command again to resume it")
