"""Keep what an earlier start of a run logged, when the next start will overwrite it with something else."""

from __future__ import annotations

import os
import shutil
from itertools import count
from pathlib import Path

from teasr.tracking.csv_log import last_update
from teasr.tracking.run_files import DATASETS_FILE, FILES, METRICS, PARAMS_FILE, PREVIEWS, RUN_FILE, STATUS_FILE, TIMING

KEPT = (
    *FILES,
    "commit",
    DATASETS_FILE,
    PARAMS_FILE,
    STATUS_FILE,
    RUN_FILE,
    PREVIEWS,
    TIMING,
    METRICS,
)  # metrics.csv comes last


def keep_history(run_dir: Path, resumed_from: int, same_config: bool, save_every: int) -> Path | None:
    """Keep the log of updates after `resumed_from` in a folder `earlier-1` (or -2, ..) of the run folder.

    That folder, which is returned, is a run folder without checkpoints; the run continues in a new MLflow run if its
    config has changed. Does nothing and returns None if there are no such updates, or if the same numbers will be
    logged again before the next checkpoint. Raises ValueError when metrics.csv is damaged.
    """
    last = last_update(run_dir / METRICS)
    if last <= resumed_from or (same_config and last <= resumed_from + save_every):
        return None
    folder = next(path for n in count(1) if not (path := run_dir / f"earlier-{n}").exists())
    folder.mkdir()
    for path in (run_dir / name for name in KEPT if (run_dir / name).exists()):
        _copy(path, folder / path.name) if resumed_from else os.replace(path, folder / path.name)
    if not same_config:
        (run_dir / RUN_FILE).unlink(missing_ok=True)
    return folder


def _copy(path: Path, target: Path) -> None:
    shutil.copytree(path, target) if path.is_dir() else shutil.copy2(path, target)
