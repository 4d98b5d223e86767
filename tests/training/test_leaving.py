"""Gradients that leave for an optimiser in host memory block by block, while the backward pass is still running."""

import json
import subprocess

import pytest
import run_leaving
from conftest import ROOT
from test_training import launcher_of

from teasr.run_config import parse
from teasr.training.engine import engine_settings
from teasr.training.footprint import count


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_bit_changes_and_few_gradients_are_there_at_once(tmp_path, ranks):
    """After skipped updates the bits are the same too; DeepSpeed alone would add an older gradient to the next one."""
    launcher, env = launcher_of(ranks)
    command = [*launcher, str(ROOT / "tests/run_leaving.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {x["case"]: x for x in (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))}
    for poisoned in ("", " poisoned"):
        for item in ("weights", "logs"):
            assert found[f"leaving{poisoned}"][item] == found[f"kept{poisoned}"][item]
    assert found["sd3 leaving"]["weights"] == found["sd3 kept"]["weights"]
    assert found["leaving poisoned"]["weights"] == found["zero2 poisoned"]["weights"]
    assert [skipped for skipped, *_ in found["leaving poisoned"]["logs"]] == [0, 1, 0, 1, 0]
    assert found["leaving"]["alive"] < 0.4 * found["kept"]["alive"]
    config = parse(run_leaving.settings(tmp_path, "leaving", ranks))
    counted = count(config, engine_settings(config.train, ranks), 32, ranks).gpu
    most = counted["gradients of trained weights"] + counted["reduction bucket"]
    assert 0.8 * most < found["leaving"]["alive"] <= most
