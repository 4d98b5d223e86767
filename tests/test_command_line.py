"""The command `teasr`: help, wrong options, presets, completion; the programs of the repository are the same."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import teasr
from teasr import assets, cli, run_config
from teasr.commands import completion, train
from teasr.config import presets

SCRIPTS = {
    "data_prep/make_shards.py": "prepare",
    "data_prep/verify_shards.py": "verify",
    "data_prep/cache_latents.py": "cache-latents",
    "data_prep/cache_prompt.py": "cache-prompt",
    "eval/benchmark.py": "benchmark",
    "eval/report.py": "report",
    "launch/export.py": "export",
    "launch/train.py": "train",
}


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_has_examples_and_a_wrong_option_shows_the_usage(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(f"usage: teasr {verb} ")
    assert f"teasr {verb}" in text.split("examples:")[1] and "{prog}" not in text
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--no-such-option"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"usage: teasr {verb} ") and "\nteasr " in error


def test_no_help_waits_for_a_library():
    """numpy alone takes as long to import as all of it; torch takes two seconds."""
    code = (
        "import sys; from teasr import cli\n"
        "for verb in cli.VERBS: cli.command(verb).parser('teasr').format_help()\n"
        "print(*{m.partition('.')[0] for m in sys.modules} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"numpy", "torch", "cv2", "PIL", "yaml", "deepspeed", "mlflow", "diffusers"}


def test_version_and_verbs(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"teasr {teasr.__version__}\n"
    assert cli.main([]) == 2
    text = capsys.readouterr().err
    assert all(re.search(rf"^  {verb} +\w", text, re.M) for verb in cli.VERBS)
    with pytest.raises(SystemExit) as end:
        cli.main(["upscal"])
    assert end.value.code == 2 and "invalid choice: 'upscal'" in capsys.readouterr().err


@pytest.mark.parametrize(("script", "verb"), SCRIPTS.items())
def test_the_programs_of_the_repository_are_the_verbs(script, verb):
    spec = importlib.util.spec_from_file_location("program", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main.func is cli.command(verb).main and module.main.keywords == {"prog": f"python {script}"}
    assert f"`teasr {verb}`" in module.__doc__


def test_presets_are_listed_with_their_purpose_and_printed(capsys):
    assert cli.main(["presets"]) == 0
    listed = capsys.readouterr().out
    for folder in presets.KINDS:
        for name, path in presets.names(folder).items():
            summary = presets.summary(path)
            assert len(summary) > 10 and re.search(rf"^  {name} +{re.escape(summary)}$", listed, re.M), name
    assert set(assets.MODELS) == set(assets.names())
    assert all(re.search(rf"^  {name} +{re.escape(what)}$", listed, re.M) for name, what in assets.MODELS.items())
    assert cli.main(["presets", "show", "tiny_teasr"]) == 0
    assert capsys.readouterr().out == (ROOT / "launch/presets/tiny_teasr.yaml").read_text()
    assert cli.main(["presets", "show", "tiny_tesar"]) == 2
    assert "did you mean tiny_teasr?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["presets", "show"])


def test_names_of_presets_are_unique():
    names = [name for folder in presets.KINDS for name in presets.names(folder)]
    assert len(names) == len(set(names)) >= 20


def test_a_file_comes_before_a_preset_of_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert presets.find("demo", presets.RUNS) == ROOT / "launch/presets/demo.yaml"
    (tmp_path / "demo").mkdir()  # a folder is no config
    assert presets.find("demo", presets.RUNS) == ROOT / "launch/presets/demo.yaml"
    (tmp_path / "demo.yaml").write_text("run_dir: mine\n")
    assert str(presets.find("demo.yaml", presets.RUNS)) == "demo.yaml"
    assert str(presets.find("other/demo.yaml", presets.RUNS)) == "other/demo.yaml"
    assert cli.main(["train", "--config", "tiny_tesar"]) == 2
    assert "did you mean tiny_teasr?" in capsys.readouterr().err
    assert cli.main(["train", "--config", "tiny_teasr", "--print", "run_dir=mine"]) == 0
    assert capsys.readouterr().out.startswith("run_dir: mine\n")
    assert cli.main(["prepare", "--config", "denoise", "photos=/nowhere"]) == 2
    assert "/nowhere is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("teasr", {*cli.VERBS, "--help", "--version"}),
        ("teasr up", {"upscale"}),
        ("teasr upscale --col", {"--color"}),
        ("teasr upscale --color w", {"wavelet"}),
        ("teasr train --config tiny", {"tiny_teasr"}),
        ("teasr prepare --config den", {"denoise"}),
        ("teasr completion ", {"-h", "--help", "bash", "zsh", "fish"}),
        ("teasr presets show zero3_", {"zero3_nvme", "zero3_offload"}),
        ("teasr report --out ", set()),  # files, which bash completes itself
    ],
)
def test_bash_completes(words, expected, tmp_path, capsys):
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "teasr.bash").write_text(capsys.readouterr().out)
    parts = words.split(" ") if " " in words else [words, ""]
    array = " ".join(f"'{part}'" for part in parts)
    code = f"source teasr.bash; COMP_WORDS=({array}); COMP_CWORD={len(parts) - 1}; _teasr; echo ${{COMPREPLY[*]}}"
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == "" and set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_every_verb_and_option(shell, tmp_path, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for verb in cli.VERBS:
        assert verb in script
        for option in completion.options_of(verb):
            for name in option.names:
                written = f"{name}[" if shell == "zsh" else re.sub("^--", "-l ", name)
                assert written in script or f"-s {name[1:]}" in script, (verb, name)
    either = "{compadd deblur" if shell == "zsh" else "-l config -r -a 'deblur"
    assert either in script  # a preset or a file
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        assert subprocess.run([shell, "-n", tmp_path / "script"]).returncode == 0


def test_public_names_are_documented_and_there():
    assert teasr.__all__ == sorted(teasr.__all__) and set(teasr.__all__) <= set(dir(teasr))
    page = (ROOT / "docs/restoring.md").read_text()
    for name in teasr.__all__:
        assert getattr(teasr, name) is not None
        assert name.startswith("_") or (getattr(teasr, name).__doc__ and f"`{name}`" in teasr.__doc__), name
        assert name.startswith("_") or f"`{name}`" in page, name
    with pytest.raises(AttributeError, match="no Upscalers"):
        _ = teasr.Upscalers


def test_a_finished_training_says_how_to_use_the_model():
    settings = run_config.load(ROOT / "launch/presets/tiny_teasr.yaml", ["run_dir=runs/mine", "preview.shards=held"])
    text = train._next_commands(settings, restores=True)
    assert "teasr upscale photo.jpg -o photo_x4.png --model runs/mine" in text and "--data held" in text
    assert "backbone.base=runs/mine" in train._next_commands(settings, restores=False)
