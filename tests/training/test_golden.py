"""The first 20 updates of the tiny preset have not changed; `make golden` regenerates them after an intended change."""

import json

import pytest
from golden import GOLDEN, losses


def test_golden_losses(tmp_path):
    want, have = json.loads(GOLDEN.read_text()), losses(tmp_path)
    assert len(want) == len(have) == 20
    for w, h in zip(want, have, strict=True):
        assert w.keys() == h.keys()
        for name, value in w.items():
            assert h[name] == pytest.approx(value, rel=5e-3, abs=1e-4), (w["update"], name)
