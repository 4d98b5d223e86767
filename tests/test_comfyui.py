"""integrations/comfyui: the nodes against ComfyUI's contract, imported from the folder as ComfyUI imports a node.

ComfyUI is an application and no package: a few small modules stand for those of it that the nodes import.
"""

import importlib.util
import json
import sys
import tomllib
import types

import numpy as np
import pytest
import torch
from conftest import ROOT

FOLDER = ROOT / "integrations/comfyui"
SETTINGS = {"fidelity": 0.0, "scale": 0.0, "tile_px": 0, "color_fix": "none", "seed": 0}


class Cancelled(Exception):
    """What ComfyUI raises after its cancel button was pressed."""


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """ComfyUI's modules: a progress bar that remembers, a cancel button, a models folder."""
    state = types.SimpleNamespace(progress=[], cancelled=False, models=tmp_path / "models", memory=[])

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None):
            state.progress.append(value / (total or self.total))

    def throw():
        if state.cancelled:
            raise Cancelled

    def free_memory(memory_required, device, keep_loaded=()):
        state.memory.append(("free", memory_required, device))

    def told(name, value=None):
        return lambda: state.memory.append((name,)) or value

    cpu = torch.device("cpu")
    management = {"throw_exception_if_processing_interrupted": throw, "free_memory": free_memory}
    management |= {"get_torch_device": lambda: cpu, "intermediate_device": lambda: cpu}
    management |= {name: told(name, cpu) for name in ("unet_offload_device", "soft_empty_cache")}
    modules = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": management,
        "folder_paths": {"models_dir": str(state.models)},
    }
    folders = {"teasr": [str(tmp_path / "elsewhere")]}  # as extra_model_paths.yaml adds them
    modules["folder_paths"] |= {
        "add_model_folder_path": lambda kind, path: path in folders[kind] or folders[kind].append(path),
        "get_folder_paths": lambda kind: folders[kind][:],
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[name]).update(content)
    for name in ("utils", "model_management"):
        setattr(sys.modules["comfy"], name, sys.modules[f"comfy.{name}"])
    return state


@pytest.fixture
def package(comfy, monkeypatch):
    """The package, imported as `load_custom_node` of ComfyUI's nodes.py does: by path, under the path as its name."""
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nodes(package):
    return package.NODE_CLASS_MAPPINGS


def test_every_node_keeps_the_contract(package, nodes):
    assert set(nodes) == set(package.NODE_DISPLAY_NAME_MAPPINGS) == {"TeasrLoad", "TeasrUpscale"}
    for kind in nodes.values():
        inputs = kind.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional", "hidden"}
        function = getattr(kind(), kind.FUNCTION)
        wanted = [name for group in inputs.values() for name in group]
        assert list(function.__code__.co_varnames[1 : function.__code__.co_argcount]) == wanted
        assert isinstance(kind.CATEGORY, str) and isinstance(kind.RETURN_TYPES, tuple)
        assert len(kind.RETURN_NAMES) == len(kind.RETURN_TYPES) and kind.DESCRIPTION
        for group in inputs.values():
            for name, (type_, *options) in group.items():
                assert isinstance(type_, str | list), f"{name}: ComfyUI checks the values of a list, not of a tuple"
                if options and type_ in ("INT", "FLOAT"):
                    assert options[0]["min"] <= options[0]["default"] <= options[0]["max"], name
        json.dumps(inputs)  # ComfyUI sends it to the browser


def test_a_batch_is_restored_like_by_the_upscaler(nodes, comfy, untrained):
    (model,) = nodes["TeasrLoad"]().load(str(untrained), "as trained", False)
    image = torch.rand(2, 10, 12, 4, generator=torch.Generator().manual_seed(0))  # with alpha
    (made,) = nodes["TeasrUpscale"]().upscale(model, image, 2, **SETTINGS | {"fidelity": 0.5, "seed": 2**64 - 1})
    assert made.shape == (2, 40, 48, 3) and made.dtype == torch.float32 and made.min() >= 0 and made.max() <= 1
    expected = model(image[1:, ..., :3].movedim(-1, 1), steps=2, seed=2**64 - 1, fidelity=0.5)
    assert torch.equal(made[1:], expected.movedim(1, -1))
    assert comfy.progress == sorted(comfy.progress) and comfy.progress[-1] == 1
    (half,) = nodes["TeasrUpscale"]().upscale(model, image[:1], 1, **SETTINGS | {"scale": 2.0, "fidelity": 0.5})
    assert half.shape == (1, 20, 24, 3)


def test_a_model_in_the_models_folder(nodes, comfy, untrained):
    from teasr import Upscaler

    first = Upscaler.from_pretrained(untrained)
    first.save_pretrained(comfy.models / "teasr/mine")
    (comfy.models.parent / "elsewhere/theirs").mkdir(parents=True)
    assert nodes["TeasrLoad"].INPUT_TYPES()["required"]["model"][0] == ["small", "mine", "theirs"]
    (model,) = nodes["TeasrLoad"]().load("mine", "fp32", False)
    photo = np.zeros((8, 8, 3), np.uint8)
    assert np.array_equal(model(photo), first(photo))
    with pytest.raises(ValueError, match="model nothing: no such folder exists"):
        nodes["TeasrLoad"]().load("small", "as trained", False, "nothing")


def test_other_models_make_room_and_the_model_leaves_at_the_end_and_when_cancelled(nodes, comfy, untrained):
    (model,) = nodes["TeasrLoad"]().load(str(untrained), "as trained", False)
    moved, move = [], model.to
    model.to = lambda device: moved.append(device) or move(device)
    comfy.cancelled = True
    with pytest.raises(Cancelled):
        nodes["TeasrUpscale"]().upscale(model, torch.rand(1, 8, 8, 3), 1, **SETTINGS)
    (first, needed, device), *rest = comfy.memory
    weights = sum(p.numel() * p.element_size() for p in model.backbone.net.parameters())
    assert first == "free" and needed > weights and device == moved[0]
    assert rest == [("unet_offload_device",), ("soft_empty_cache",)] and len(moved) == 2
    model.offloaded, comfy.cancelled = True, False
    comfy.memory.clear()
    nodes["TeasrUpscale"]().upscale(model, torch.rand(1, 8, 8, 3), 1, **SETTINGS)
    assert not comfy.memory and len(moved) == 2


def test_the_strength_of_one_step(nodes, comfy, untrained):
    from teasr import Upscaler

    small, node, image = (
        Upscaler.from_pretrained("small", device="cpu"),
        nodes["TeasrUpscale"](),
        torch.rand(1, 8, 8, 3),
    )
    own, set_ = (node.upscale(small, image, 1, **SETTINGS, strength=strength)[0] for strength in (-1.0, 0.5))
    assert torch.equal(own, small(image.movedim(-1, 1)).movedim(1, -1))
    assert torch.equal(set_, small(image.movedim(-1, 1), strength=0.5).movedim(1, -1))
    (without,) = nodes["TeasrLoad"]().load(str(untrained), "as trained", False)
    with pytest.raises(ValueError, match="this model has no setting strength: its settings are fidelity"):
        node.upscale(without, image, 1, **SETTINGS, strength=0.5)


def test_the_example_workflow_fits_the_nodes(nodes):
    workflow = json.loads((FOLDER / "example_workflows/teasr_upscale.json").read_text())
    by_id = {node["id"]: node for node in workflow["nodes"]}
    assert {"TeasrLoad", "TeasrUpscale", "LoadImage", "SaveImage"} == {node["type"] for node in by_id.values()}
    for number, source, output, target, slot, type_ in workflow["links"]:
        assert by_id[source]["outputs"][output]["type"] == type_ == by_id[target]["inputs"][slot]["type"]
        assert number in by_id[source]["outputs"][output]["links"] and by_id[target]["inputs"][slot]["link"] == number
    for node in by_id.values():
        if kind := nodes.get(node["type"]):
            inputs = {name: about for group in kind.INPUT_TYPES().values() for name, about in group.items()}
            linked = {socket["name"]: socket["type"] for socket in node["inputs"]}
            assert {name: inputs[name][0] for name in linked} == linked
            widgets = []
            for name, (_, *options) in inputs.items():
                if name not in linked:  # the frontend adds a widget that says how a seed changes
                    control = options and options[0].get("control_after_generate")
                    widgets += [name, "control"] if control else [name]
            assert len(node["widgets_values"]) == len(widgets)
            for name, value in zip(widgets, node["widgets_values"], strict=True):
                type_, *options = inputs.get(name, ("CONTROL",))
                assert value in type_ if isinstance(type_, list) else True
                assert options[0]["min"] <= value <= options[0]["max"] if type_ in ("INT", "FLOAT") else True


def test_the_registry_finds_what_it_asks_for():
    import teasr

    settings = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    assert settings["project"]["name"] == "teasr-upscale" and settings["project"]["version"] == teasr.__version__
    assert {"PublisherId", "DisplayName", "Icon"} <= set(settings["tool"]["comfy"])
