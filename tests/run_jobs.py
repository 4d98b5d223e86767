"""Run training jobs one after another in this process or on these ranks: `run_jobs.py jobs.json`.

A job is {"name", "recipe"}; what the Trainer raises is written to <run_dir>/error.txt instead of ending the others.
Started plainly for one rank, through the deepspeed launcher for several, so that many cases share one start.
"""

import argparse
import json
import traceback
from pathlib import Path

from teasr.recipe import parse
from teasr.training import Trainer

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--local_rank", type=int, default=0)
    for job in json.loads(parser.parse_args().jobs.read_text()):
        try:
            Trainer(parse(job)).fit()
        except ValueError:
            Path(job["run_dir"]).mkdir(parents=True, exist_ok=True)
            (Path(job["run_dir"]) / "error.txt").write_text(traceback.format_exc())
