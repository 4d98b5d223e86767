"""eval/report.py: tables beside published numbers, curves, and a page that a browser shows without network requests."""

import json
import re
import shutil
import sys

import pytest
import warm
import yaml
from conftest import ROOT
from test_evaluation import benchmark, folders  # noqa: F401 - a fixture
from test_page import browser  # noqa: F401 - a fixture


@pytest.fixture(scope="module")
def results(untrained, folders, tmp_path_factory):  # noqa: F811
    """An evaluation saved in a folder and in MLflow."""
    root = tmp_path_factory.mktemp("report")
    run = shutil.copytree(untrained, root / "mine")
    recipe = yaml.safe_load((run / "checkpoints/step-00000001/config.yaml").read_text())
    recipe["tracking"] = {"mlflow": True, "experiment": "some", "uri": f"sqlite:///{root}/mlflow.db"}
    path = run / "checkpoints/step-00000001"
    manifest = json.loads((path / "MANIFEST.json").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(recipe))
    import hashlib

    text = (path / "config.yaml").read_bytes()
    manifest["config.yaml"] = [len(text), hashlib.sha256(text).hexdigest()]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    code, out, err = benchmark(run, "--data", f"{folders / 'lq'}:{folders / 'hq'}", "--steps", 1, 2, 4)
    assert code == 0 and "logged to" in out, err
    return root, run / "eval/hq"


def report(*arguments):
    command = [sys.executable, str(ROOT / "eval/report.py"), *map(str, arguments)]
    done = warm.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_rows_deltas_notes_and_skipped_metrics(results, tmp_path):
    _, folder = results
    scores = json.loads((folder / "scores.json").read_text())
    ours = scores["methods"]["1 step"]
    (tmp_path / "published.yaml").write_text(
        "- {source: some paper, protocol: osediff, hq: {Them: {psnr: 30.0, ssim: 0.9, lpips: 0.1}}}\n"
        "- {source: another, protocol: crop4, hq: {Not these: {psnr: 1.0}}}\n"
    )
    code, out, err = report(folder, "--published", tmp_path / "published.yaml", "--out", tmp_path / "out")
    assert code == 0 and "report.html" in out, err
    text = (tmp_path / "out/report.md").read_text()
    assert f"| mine, 1 step | {ours['psnr']['mean']:.2f} | {ours['ssim']['mean']:.4f} |" in text
    assert f"| Them * | 30.00 ({ours['psnr']['mean'] - 30:+.2f}) | 0.9000 (" in text and "Not these" not in text
    assert "\\* some paper." in text and "LPIPS skipped: run `teasr weights" in text and "commit" in text
    assert f"mine, 1 step, gain over bicubic: {ours['psnr']['gain_mean']:+.3f} PSNR" in text


def test_from_mlflow(results, tmp_path):
    root, folder = results
    uri = f"sqlite:///{root}/mlflow.db"
    code, _, err = report("--mlflow", uri, "--experiment", "some", "--out", tmp_path / "a")
    assert code == 0, err
    report(folder, "--out", tmp_path / "b")
    first, second = ((tmp_path / name / "report.md").read_text() for name in "ab")
    assert re.sub(r"^run\b", "mine", first.replace("| run, ", "| mine, "), flags=re.M) == second
    assert "- MLflow: http://127.0.0.1:5000/#/experiments/" in first
    assert (tmp_path / "a/report.html").stat().st_size > 20_000  # the images are embedded
    code, _, err = report("--mlflow", uri, "--experiment", "none", "--out", tmp_path / "c")
    assert code == 2 and "has no experiment none: choose one of some" in err


def test_mistakes(tmp_path):
    for arguments, message in (([], "nothing to report"), ([tmp_path], "contains no scores.json of `teasr benchmark`")):
        code, _, err = report(*arguments, "--out", tmp_path / "out")
        assert code == 2 and message in err


def test_the_page_in_a_browser(results, browser, tmp_path):  # noqa: F811
    _, folder = results
    assert report(folder, "--out", tmp_path)[0] == 0
    page, asked, errors = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator("tbody tr").count() == 4 and page.locator("svg polyline").count() == 7
    assert "Peak signal-to-noise ratio" in page.locator("thead th").nth(1).get_attribute("title")
    made = page.locator("section > dl").inner_text()
    assert all(word in made for word in ("benchmark.py", "commit", "hardware", "UTC", "mlflow ui --backend-store-uri"))
    assert "/runs/" in page.locator("section > dl a").get_attribute("href")
    first = page.locator(".compare").first
    assert first.locator("img.before").evaluate("x => [x.naturalWidth, x.naturalHeight]") == [96, 64]
    caption = first.locator("figcaption").inner_text()
    assert "mine, picture" in caption and "bicubic: PSNR" in caption and "1 step: PSNR" in caption
    _drag(page, first.locator(".stage"), 0.5, 0.2)
    assert re.search(r"inset\(0(px)? (79|80|81)", first.locator("img.before").get_attribute("style"))
    before = first.locator("img.after").get_attribute("src")
    first.locator("select").nth(1).select_option("HQ")
    assert (
        first.locator("img.after").get_attribute("src") != before and "HQ" in first.locator(".tag.after").inner_text()
    )
    small = first.locator(".stage").bounding_box()["width"]
    first.locator(".stage").click(position={"x": 30, "y": 30})
    assert page.locator("dialog .stage").bounding_box()["width"] > 1.5 * small
    page.keyboard.press("Escape")
    page.locator("dialog .compare").wait_for(state="detached")
    assert page.locator(".pictures > .compare").count() == page.locator(".compare").count()
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert not errors and [url for url in asked if not url.startswith("data:")] == [(tmp_path / "report.html").as_uri()]
    page.close()


def _drag(page, stage, start, end):
    """Drag the pointer over a picture; start, end: shares of its width."""
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    page.mouse.move(box["x"] + start * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], box["y"] + 30, steps=3)
    page.mouse.up()


def test_ticks_are_round_numbers_with_the_digits_that_tell_them_apart():
    from teasr.evaluation.report_chart import digits, ticks

    for low, high, wanted in (
        (20.9, 24.6, [21, 22, 23, 24]),
        (0.0183, 0.1075, [0.02, 0.04, 0.06, 0.08, 0.1]),
        (1.1, 2.3, [1.25, 1.5, 1.75, 2, 2.25]),
        (-3.0, 12.0, [0, 5, 10]),
        (10_000, 60_000, [10_000, 20_000, 30_000, 40_000, 50_000, 60_000]),
    ):
        assert ticks(low, high) == pytest.approx(wanted)
    assert [digits(x) for x in ([21, 22], [0.02, 0.04], [1.25, 1.5], [1e4, 2e4])] == [0, 2, 2, 0]


def test_the_label_of_the_baseline_stands_clear_of_the_curve(tmp_path):
    from teasr.evaluation.report import Result
    from teasr.evaluation.report_chart import chart

    for values, anchor in (((24.0, 23.5), "start"), ((23.5, 24.0), "end")):
        methods = {"bicubic": 23.5, "1 step": values[0], "4 steps": values[1]}
        scores = {"methods": {name: {"psnr": {"mean": value}} for name, value in methods.items()}}
        figure = chart("psnr", [Result("mine", tmp_path, scores, {})])
        assert re.findall('text-anchor="([a-z]*)">bicubic<', figure) == [anchor]


def test_every_metric_is_explained():
    from teasr.evaluation.registry import MEANINGS, METRICS

    assert MEANINGS.keys() == METRICS.keys()


def test_published_numbers_are_of_known_metrics_and_protocols():
    from teasr.evaluation.registry import METRICS, PROTOCOLS

    known = yaml.safe_load((ROOT / "eval/datasets.yaml").read_text())
    for block in yaml.safe_load((ROOT / "eval/published.yaml").read_text()):
        assert block["source"] and block["protocol"] in {*PROTOCOLS, "unknown"}
        for dataset in block.keys() - {"source", "protocol"}:
            assert dataset in {*known, "RealSet65", "RealLR200"}  # the last two have no originals
            for row in block[dataset].values():
                assert row.keys() <= METRICS.keys() and all(isinstance(value, float) for value in row.values())


def test_the_chart_of_fidelity_against_perception_joins_steps_and_strengths(tmp_path):
    """Points of one line are in the order of the dial, wherever they lie; labels are not written over each other."""
    from teasr.evaluation.names import dial_of
    from teasr.evaluation.report import Result
    from teasr.evaluation.report_trade import trade

    assert dial_of("1 step at 0.25") == (1, 0.25) and not any(map(dial_of, ("1 step", "theirs at 3", "1 step at x")))
    values = {"bicubic": (24.0, 0.64), "1 step at 1": (24.1, 0.48), "1 step at 0": (24.3, 0.55)}
    values |= {"1 step at 0.5": (24.3, 0.55), "4 steps": (24.0, 0.46), "1 step": (24.2, 0.49), "theirs": (23.0, 0.3)}
    methods = {name: {"psnr": {"mean": x}, "lpips": {"mean": y}} for name, (x, y) in values.items()}
    result = Result("a<b", tmp_path, {"methods": methods}, {})
    figure = trade("lpips", [result])
    assert "a&lt;b, strength of 1 step" in figure and figure.count("bicubic</text>") == 1
    lines = [[float(pair.split(",")[0]) for pair in x.split()] for x in re.findall(r'polyline points="([^"]*)', figure)]
    (steps, strengths) = sorted(lines, key=len)
    assert len(steps) == 2 and steps[0] > steps[1]
    assert len(strengths) == 3 and strengths[0] == strengths[1] > strengths[2]
    labels = re.findall(r">([^<>]+)</text>", figure)
    assert {"0", "0.5", "4", "theirs"} <= set(labels)
    boxes = [(float(x), float(y)) for x, y in re.findall(r'class="halo" x="([^"]*)" y="([^"]*)"', figure)]
    assert len(boxes) == len(set(boxes)) == len(values)
    assert trade("dists", [result]) == "" and trade("lpips", []) == ""
