"""Golden losses: the first 20 updates of the tiny preset, on the demo's own shards.

`make golden` rewrites tests/golden_tiny_teasr.json; a commit that changes the file has to explain why in its message.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import warm

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden_tiny_teasr.json"


def losses(folder: Path) -> list[dict[str, float]]:
    """Train 20 updates of the preset in `folder` and return what was logged."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}

    def run(*command: str) -> None:
        done = warm.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    run("data_prep/demo_photos.py", f"{folder}/photos")
    preset = ("--config", "data_prep/presets/demo_train.yaml")
    run(
        "data_prep/make_shards.py",
        *preset,
        f"photos={folder}/photos/train",
        f"out={folder}/shards",
        "crops_per_photo=500",
    )
    preset = ("--config", "launch/presets/tiny_teasr.yaml")
    overrides = (
        f"data.shards={folder}/shards",
        "train.updates=20",
        "train.cpu_threads=1",
        "tracking.mlflow=false",
        "preview.every_updates=0",
    )
    run("launch/train.py", *preset, f"run_dir={folder}/run", *overrides)
    rows = csv.DictReader((folder / "run/metrics.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    found = losses(place)
    rows = ",\n ".join(json.dumps({name: float(f"{value:.6g}") for name, value in row.items()}) for row in found)
    GOLDEN.write_text(f"[\n {rows}\n]\n")
    shutil.rmtree(place)
    print(f"wrote {GOLDEN.relative_to(ROOT)}: loss {found[0]['loss']:.4f} -> {found[-1]['loss']:.4f}")
