"""config.py and recipe.py: strict reading, overrides, round trip, and messages that name the key and the remedy."""

import pytest
import yaml
from conftest import ROOT, small_recipe

from teasr import run_config as recipe
from teasr.config import strict_yaml as cfg

PRESETS = sorted((ROOT / "launch/presets").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.name)
def test_presets_load_are_short_and_come_back_the_same(path):
    loaded = recipe.load(path)
    assert len(path.read_text().splitlines()) <= 40
    assert recipe.parse(yaml.safe_load(loaded.to_yaml())) == loaded


@pytest.mark.parametrize("path", sorted((ROOT / "data_prep/presets").glob("*.yaml")), ids=lambda p: p.name)
def test_data_presets_load(path):
    from teasr.data.prep.plan import PrepConfig

    cfg.build(PrepConfig, cfg.read_yaml(path))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.lamda_adv=1", "method.lamda_adv does not exist: did you mean lambda_adv"),
        ("train.updates=many", "train.updates = 'many': expected int"),
        ("train.updates=0", "train.updates = 0"),
        ("train.dtype=fp8", "train.dtype = 'fp8': allowed are fp32, bf16"),
        ("method.ramps.rectify.stat=1", "method.ramps.rectify.stat does not exist: did you mean start"),
        ("method.s_range=0.1", "method.s_range = 0.1: expected a list"),
        ("backbone.name=qwem", "backbone.name = 'qwem': allowed are"),
        ("tranin.updates=1", "tranin does not exist: did you mean train"),
        ("data=5", "data must be a section"),
        ("train.ema=true", "train.ema = True: expected float"),
        ("nonsense", "not of the form"),
        ("seed.x=1", "seed is a value"),
    ],
)
def test_mistakes_are_named(override, message, tmp_path):
    data = small_recipe(tmp_path, tmp_path) | {"seed": 0}
    with pytest.raises(ValueError) as error:
        recipe.parse(cfg.override(data, [override]))
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["run_dir", "data", "train.updates", "backbone.name", "data.shards"])
def test_missing_keys_are_named(key, tmp_path):
    data = small_recipe(tmp_path, tmp_path)
    section, _, name = key.partition(".")
    if name:
        del data[section][name]
    else:
        del data[section]
    with pytest.raises(ValueError, match=rf"{key} is missing"):
        recipe.parse(data)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist"):
        recipe.load(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,\n")
    with pytest.raises(ValueError, match=r"broken\.yaml cannot be read"):
        recipe.load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ValueError, match="key: value"):
        recipe.load(tmp_path / "list.yaml")


def test_floats_that_yaml_reads_as_text_and_numbers_in_general(tmp_path):
    data = small_recipe(tmp_path, tmp_path, train__learning_rate="1e-4", method__score_clamp=None)
    loaded = recipe.parse(data)
    assert loaded.train.learning_rate == 1e-4 and loaded.method.score_clamp is None
    assert loaded.method.ramps["rectify"].length == 2.0


def test_override_does_not_touch_its_input_and_diff_names_changes():
    data = {"a": {"b": 1, "c": 2}}
    new = cfg.override(data, ["a.b=3", "a.d=null"])
    assert data == {"a": {"b": 1, "c": 2}} and new == {"a": {"b": 3, "c": 2, "d": None}}
    assert cfg.diff(data, new) == ["a.b: 1 -> 3"]


def test_learning_rate_schedule():
    from teasr.config.settings import TrainConfig

    train = TrainConfig(updates=100, batch=1, micro_batch=1, learning_rate=1.0, warmup_updates=4, schedule="cosine")
    assert train.rate(0) == pytest.approx(0.25, rel=0.01)
    assert train.rate(50) == pytest.approx(0.525, rel=0.01) and train.rate(99) < 0.06
    with pytest.raises(ValueError, match="multiple of 3"):
        train.accumulation(3)
