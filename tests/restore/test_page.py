"""`teasr demo` with a real server and a headless browser: upload, restore, move the slider, download."""

import io
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile

import numpy as np
import pytest
import skimage.data
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "bench"))
import attack_page

from teasr import Upscaler, cli
from teasr.util.distributed import free_port

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OWN = "the model's own"
PHOTO = np.ascontiguousarray(skimage.data.coffee()[100:140, 200:256])  # 56 x 40


@pytest.fixture(scope="module")
def address(untrained):
    port = free_port()
    command = [sys.executable, "-m", "teasr.cli", "demo", "--model", str(untrained), "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until, url = time.monotonic() + 900, f"http://127.0.0.1:{port}"
    while True:
        try:
            urllib.request.urlopen(url, timeout=10).read()
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < until, server.stdout.read()
            time.sleep(0.2)
    yield url
    server.send_signal(2)
    out, _ = server.communicate(timeout=60)
    assert f"open {url} in a browser".encode() in out


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_upload_restore_slide_download(address, browser, untrained, tmp_path):
    Image.fromarray(PHOTO.astype(np.uint8)).convert("LA").save(tmp_path / "photo.png")
    page = browser.new_page(viewport={"width": 1400, "height": 1000}, accept_downloads=True)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.set_input_files("input[type=file]", tmp_path / "photo.png")
    page.get_by_label("number input for Steps").fill("2")
    page.get_by_text("More settings").click()
    page.get_by_label("lab", exact=True).check()
    page.get_by_label("Seed").fill("5")
    page.locator("[aria-label='photo.png']").first.wait_for()
    page.click("#restore")
    page.wait_for_function("document.querySelector('#summary textarea').value.includes('56x40 → 224x160 px')")

    pictures = page.locator("#compared img")
    pictures.first.wait_for()
    assert {tuple(x) for x in pictures.evaluate_all("all => all.map(x => [x.naturalWidth, x.naturalHeight])")} == {
        (224, 160)
    }
    handle = page.locator("#compared .inner")
    before = handle.bounding_box()
    page.mouse.move(before["x"] + before["width"] / 2, before["y"] + before["height"] / 2)
    page.mouse.down()
    page.mouse.move(before["x"] - 120, before["y"], steps=5)
    page.mouse.up()
    assert handle.bounding_box()["x"] < before["x"] - 80

    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "photo_x4.png"
    download.value.save_as(tmp_path / "result.png")
    with Image.open(tmp_path / "result.png") as result, Image.open(tmp_path / "photo.png") as photo:
        wanted = Upscaler.from_pretrained(untrained)(photo, steps=2, seed=5, color_fix="lab")
        assert result.mode == "LA" and np.array_equal(np.asarray(result), np.asarray(wanted))
    assert all(url.startswith((address, "data:", "blob:", "ws:")) for url in asked)
    page.close()


def test_several_files_at_another_scale_come_as_a_zip_and_a_broken_one_is_named(address, browser, untrained, tmp_path):
    (tmp_path / "other").mkdir()
    files = [tmp_path / name for name in ("one.png", "broken.png", "other/one.png", "two.jpg")]
    for shift, file in enumerate(files):
        Image.fromarray(np.roll(PHOTO, shift, 0).astype(np.uint8)).save(file)
    files[1].write_bytes(b"no picture")
    page = browser.new_page(viewport={"width": 1400, "height": 1000}, accept_downloads=True)
    page.goto(address)
    page.set_input_files("input[type=file]", files)
    page.get_by_label("number input for Scale").fill("2.5")
    page.get_by_text("More settings").click()
    page.get_by_label("Tile").click()
    page.get_by_role("option", name="128").click()
    page.locator("[aria-label='two.jpg']").first.wait_for()
    page.click("#restore")
    page.wait_for_function("document.querySelector('#summary textarea').value.includes('two.jpg')")
    told = page.locator("#summary textarea").input_value().splitlines()
    assert len(told) == 4 and told[0].startswith("one.png: 56x40 → 140x100 px")
    assert told[1].startswith("broken.png") and "→" not in told[1]
    with page.expect_download() as download:
        page.click("#download-all")
    download.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        assert archive.namelist() == ["one_x2.5.png", "one_x2.5-2.png", "two_x2.5.jpg"]
        with Image.open(archive.open("one_x2.5.png")) as result, Image.open(files[0]) as photo:
            wanted = Upscaler.from_pretrained(untrained)(photo, scale=2.5, tile_px=128)
            assert np.array_equal(np.asarray(result), np.asarray(wanted))
    page.locator("#results .thumbnail-item").nth(2).click()
    page.get_by_text("Download two_x2.5.jpg").wait_for()
    page.close()


def test_mistakes_are_shown_on_the_page(address, browser):
    page = browser.new_page()
    page.goto(address)
    page.click("#restore")
    page.get_by_text("Choose an image first.").wait_for()
    page.close()


def test_a_port_that_is_taken_is_named(address, untrained, capsys):
    port = address.rpartition(":")[2]
    assert cli.main(["demo", "--model", str(untrained), "--port", port]) == 2
    assert port in capsys.readouterr().err


def test_hostile_uploads_are_refused_and_the_server_keeps_answering(untrained, tmp_path):
    """Cut pictures, bombs, other types, names that lead elsewhere: bench/attack_page.py, here with 44 uploads."""
    outcomes = attack_page.serve_and_attack(tmp_path, 44, str(untrained))
    assert "refused" in outcomes and "restored" in outcomes and "without a reason" not in outcomes


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ((1e9, 0, OWN, 4, "auto", "none", 0), "greater than maximum"),
        ((2, float("nan"), OWN, 4, "auto", "none", 0), "fidelity = nan: must be a number from 0 to 1"),
        ((1, 0, OWN, 99, "auto", "none", 0), "greater than maximum"),
        ((1, 0, OWN, 4, "1000000", "none", 0), "not in the list of choices"),
        ((1, 0, OWN, 4, "auto", "none", None), "seed = None: must be a number"),
        ((1, 0, OWN, 4, "auto", "none", -1), "less than minimum"),
        ((1, 0, OWN, 4, "auto", "sepia", 0), "not in the list of choices"),
        ((1, 0, "2", 4, "auto", "none", 0), "not in the list of choices"),
        ((1, 0, "0.5", 4, "auto", "none", 0), "this model has no setting strength: its settings are fidelity"),
    ],
)
def test_values_that_the_page_cannot_send_are_refused(address, values, told):
    page = attack_page.Page(address)
    _, path = page.upload("photo.png", attack_page.pictures()[0])
    status, said = page.restore(path, *values)
    assert status == 200 and "event: error" in said and told in said


def test_the_result_has_a_format_that_can_hold_it_whatever_the_file_is_called(address):
    """A file of 16 bits called .jpg, and one called .php: the results are PNG files."""
    page = attack_page.Page(address)
    deep = io.BytesIO()
    Image.fromarray(PHOTO[..., 0].astype(np.uint16) * 257).save(deep, "PNG")
    for name in ("deep.jpg", "photo.php"):
        _, path = page.upload(name, deep.getvalue())
        said = page.restore(path)[1]
        assert "event: complete" in said and f"{name.partition('.')[0]}_x4.png" in said


def test_too_large_a_picture_for_the_page_is_refused_from_its_header(address):
    page = attack_page.Page(address)
    _, path = page.upload("large.png", attack_page.png_claiming(4000, 3200))
    said = page.restore(path)[1]
    assert "4000x3200 px is too large for this page, whose results have at most 200 million pixels" in said
    assert "/tmp" not in said and "use teasr upscale" in said
