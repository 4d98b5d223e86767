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
        ("train.updates=[", "override 'train.updates=[': the value is not valid YAML"),
        ("train.updates=" + "[" * 5000, "the value is not valid YAML"),
        ("train={updates: 1, updates: 2}", "the key updates is given twice"),
        ("train.learning_rate=.nan", "train.learning_rate = nan: must be a finite number"),
        ("train.learning_rate=1e999", "train.learning_rate = inf: must be a finite number"),
        ("train.learning_rate=1" + "0" * 400, "train.learning_rate = inf: must be a finite number"),
        ("train.learning_rate=0", "train.learning_rate = 0.0: must be > 0, such as 5e-5"),
        ("train.betas=[0.9, 1]", "train.betas[1] = 1.0: must be in [0, 1)"),
        ("train.clip_norm=0", "train.clip_norm = 0.0: must be > 0"),
        ("train.warmup_updates=-1", "train.warmup_updates = -1: must be >= 0"),
        ("train.cpu_threads=0", "train.cpu_threads = 0: must be in [1, 1024], or null"),
        ("train.max_hours=0", "train.max_hours = 0.0: must be > 0, such as 23.5, or null for no limit"),
        ("method.w_cap=.nan", "method.w_cap = nan: must be a finite number"),
        ("method.ramps.rectify.start=.inf", "method.ramps.rectify.start = inf: must be a finite number"),
        ("method.score_clamp=-1", "method.score_clamp = -1.0: must be > 0, or null for none"),
        ("method.s_range=[.nan, 1]", "method.s_range[0] = nan: must be a finite number"),
        ("backbone.heads=0", "backbone.heads = 0: must be in [1, 1024]"),
        ("backbone.name=[tiny]", "backbone.name = ['tiny']: allowed are"),
        ("data.streams=0", "data.streams = 0: must be >= 1"),
        ("data.max_bad_share=2", "data.max_bad_share = 2.0: must be in [0, 1]"),
        ("preview.steps=[1, 0]", "preview.steps[1] = 0: must be in [1, 1000]"),
        ("preview=0", "preview must be a section"),
        ("seed=-1", "seed = -1: must be in [0, 9223372036854775807]"),
        ("run_dir=''", "run_dir = '': must be the path of a folder"),
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


def test_every_error_names_the_file_or_the_override(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(small_recipe(tmp_path, tmp_path, train__update=3)))
    with pytest.raises(ValueError, match=rf"^{path}: config key train.update does not exist: did you mean updates"):
        recipe.load(path)
    path.write_text(yaml.safe_dump(small_recipe(tmp_path, tmp_path)))
    with pytest.raises(ValueError, match=rf"^{path} with seed=-1: config key seed = -1"):
        recipe.load(path, ["run_dir=x", "seed=-1"])
    for text, message in (("{}", "config key run_dir is missing"), ("5", "a config has `key: value` lines")):
        with pytest.raises(ValueError, match=f"^some source: {message}"):
            recipe.parse_text(text, "some source")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", "the key c is given twice"),
        ("a: &a {b: *a}\n", "recursive"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a: 2020-13-01\n", "not valid YAML"),
        ("? [1, 2]\n: 3\n", "unhashable"),
        ("\x00", "not allowed"),
        (b"a: \xff\n", "invalid start byte"),
    ],
)
def test_strange_yaml_is_named(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"^config {path} cannot be read: .*{message}"):
        cfg.read_yaml(path)
    with pytest.raises(ValueError, match="/dev/zero cannot be read: it has more than"):
        cfg.read_yaml("/dev/zero")
    path.write_text("base: &base {c: 1}\nd: {<<: *base, e: 2}\n")
    assert cfg.read_yaml(path)["d"] == {"c": 1, "e": 2}


def test_other_files_are_read_as_strictly(tmp_path):
    from teasr.config.reading import read_json
    from teasr.data.pairs import read_datasets
    from teasr.data.prep.plan import PrepConfig

    path, good = tmp_path / "file", "X: {hq: a, lq: b, scale: 4, count: 5, get: there}\n"
    path.write_text(good)
    assert read_datasets(path)["X"].count == 5 and len(read_datasets(ROOT / "eval/datasets.yaml")) == 5
    for wrong, message in (
        ("scale: 9", r"X\.scale = 9: must be in \[1, 4\]"),
        ("scales: 4", r"X\.scales does not exist"),
    ):
        path.write_text(good.replace("scale: 4", wrong))
        with pytest.raises(ValueError, match=f"^{path}: config key {message}"):
            read_datasets(path)
    for text, message in (
        ('{"a": 1, "a": 2}', "a is given twice"),
        ('{"a": NaN}', "NaN is not"),
        ("[]", "must contain"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(path)
    for given, message in ((["photos=x", "out=y", "seed=-1"], "seed = -1"), (["out=y"], "photos is missing")):
        with pytest.raises(ValueError, match=f"^command line: config key {message}"):
            cfg.load(PrepConfig, None, given)


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
