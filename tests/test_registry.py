"""registry.py: every pair of backbone and method is either in the table, or refused with a sentence that says why."""

from itertools import product

import pytest

from teasr import registry, run_config


def test_the_table_knows_every_backbone_and_every_method():
    assert registry.FITTING.keys() == registry.BACKBONES.keys()
    methods = {name for fitting in registry.FITTING.values() for name in fitting}
    assert methods == registry.NEEDS.keys() and methods <= registry.METHODS.keys()


@pytest.mark.parametrize(("backbone", "method"), product(registry.FITTING, registry.NEEDS))
def test_a_config_of_a_pair_is_read_or_refused(backbone, method):
    small = {"tiny": {}, "pixel_cnn": {}, "unet": {"base": "random"}}
    needed = small.get(backbone, {"model": "random", "prompt": "random"})
    data = {
        "run_dir": "unused",
        "backbone": {"name": backbone} | needed,
        "method": {"name": method},
        "data": {"shards": "unused"},
        "train": {"updates": 1, "batch": 1, "micro_batch": 1, "learning_rate": 1e-3},
    }
    if method in registry.FITTING[backbone]:
        assert run_config.parse(data).method_name == method
        return
    lacks = f"{registry.NEEDS[method]}, which backbone.name = {backbone} lacks"
    message = lacks if registry.FITTING[backbone] else f"{backbone} cannot restore: it belongs into the section prior"
    with pytest.raises(ValueError, match=message):
        run_config.parse(data)
