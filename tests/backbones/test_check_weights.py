"""bench/check_weights.py on a trained prior, on the same with a mistake, and on random weights of Stable Diffusion."""

import sys

import pytest
from conftest import ROOT
from test_sd_unet import save_model, settings

from teasr.backbones.tiny import Tiny


@pytest.fixture
def check(monkeypatch, photos, capsys):
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import check_weights
    finally:
        sys.path.remove(str(ROOT / "bench"))

    def run(preset, *changes):
        arguments = [ROOT / f"launch/presets/{preset}.yaml", photos, "--size", "256", "--count", "2", *changes]
        monkeypatch.setattr(sys, "argv", ["check_weights.py", *map(str, arguments)])
        return check_weights.main(), capsys.readouterr().out

    return run


def test_a_trained_prior_is_right_and_a_wrong_sign_is_found(check, monkeypatch):
    code, out = check("small_osediff")
    assert code == 0 and out.count(": right") == 1 and out.count("  right") == 5 and "all right" in out
    velocity = Tiny.call
    monkeypatch.setattr(Tiny, "call", lambda self, *inputs: -velocity(self, *inputs))
    code, out = check("small_osediff")
    assert code == 1 and out.count("  WRONG") == 5


def test_random_weights_are_not_right(check, tmp_path):
    model = save_model(tmp_path)
    code, out = check("sd21_osediff", *(f"backbone.{key}={value}" for key, value in settings(model).items()))
    assert code == 1 and "WRONG" in out
