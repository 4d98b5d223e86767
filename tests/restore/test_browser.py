"""docs/try: the page restores a dropped picture in Chromium as `teasr` does, and its tiles join without seams."""

import functools
import importlib.util
import io
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from conftest import ROOT
from PIL import Image

from teasr import Upscaler
from teasr.restore import onnx_export

pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
CHROMIUM = Path("/usr/bin/chromium")
spec = importlib.util.spec_from_file_location("browser", ROOT / "docs/site/browser.py")
browser = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser)
pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium in /usr/bin"),
    pytest.mark.skipif(not browser.RUNTIME.is_dir(), reason="needs onnxruntime-web: run `make docs` once"),
]
DROP = """async ([bytes, name]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
}"""
PIXELS = """() => {
  const canvas = document.getElementById("after");
  return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
}"""
TOLD = """() => {
  const status = document.getElementById("status");
  window.told = [];
  new MutationObserver(() => told.push(status.textContent)).observe(status, { childList: true });
}"""
NOISE = """async ([seed, ...shape]) => [...(await import("./noise.js")).noise(seed, ...shape)]"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The assembled page, open in Chromium."""
    from playwright.sync_api import sync_playwright

    folder = tmp_path_factory.mktemp("try")
    browser.assemble(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = chromium.new_page()
        page.failures = []
        page.on("pageerror", lambda error: page.failures.append(str(error)))
        page.on(
            "request", lambda r: None if "127.0.0.1" in r.url or r.url[:5] == "blob:" else page.failures.append(r.url)
        )
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        yield page
        chromium.close()
    server.shutdown()
    server.server_close()


def restored(page, picture: np.ndarray) -> np.ndarray:
    """Drop a picture onto the page and return the result's pixels."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    page.evaluate(DROP, [list(file.getvalue()), "x.png"])
    page.wait_for_function("['done', 'error'].includes(document.getElementById('status').className)", timeout=300_000)
    assert page.get_attribute("#status", "class") == "done", page.inner_text("#status")
    size = [page.evaluate(f"document.getElementById('after').{side}") for side in ("height", "width")]
    assert not page.failures
    made = np.array(page.evaluate(PIXELS), np.uint8).reshape(*size, 4)[..., :3]
    page.evaluate("document.getElementById('status').className = ''")
    return made


def noise_of_the_page(page, shape: tuple[int, int, int, int]) -> torch.Tensor:
    _, channels, height, width = shape
    return torch.tensor(page.evaluate(NOISE, [0, channels, 0, 0, height, width])).reshape(shape)


def test_a_dropped_picture_of_several_tiles_is_restored_like_by_pytorch(page):
    """PyTorch restores it in one piece with the page's noise."""
    upscaler = Upscaler.from_pretrained("small", device="cpu")
    side = upscaler.backbone.tile_px // upscaler.scale
    picture = np.ascontiguousarray(skimage.data.coffee()[100 : 100 + side + 7, 200 : 200 + side // 2 + 3])
    page.evaluate(TOLD)
    made = restored(page, picture)
    assert {"loading the model …", "restoring …"} <= set(page.evaluate("told")), "a first part can take long"
    noise = noise_of_the_page(page, onnx_export.noise_shape(upscaler, *picture.shape[:2]))
    image = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        expected = onnx_export.Steps(upscaler)(image, noise)[0].permute(1, 2, 0).numpy() * 255
    assert made.shape == expected.shape
    difference = np.abs(made - expected)
    assert difference.mean() < 1.5 and np.quantile(difference, 0.99) < 8, (difference.mean(), difference.max())
    name = page.get_attribute("#download", "download")
    assert name == "x_restored.png" and page.get_attribute("#download", "href").startswith("blob:")


def test_the_noise_is_normal_and_a_function_of_the_position(page):
    whole = noise_of_the_page(page, (1, 8, 40, 50))[0]
    part = torch.tensor(page.evaluate(NOISE, [0, 8, 10, 20, 5, 6])).reshape(8, 5, 6)
    assert torch.equal(part, whole[:, 10:15, 20:26])
    assert abs(whole.mean()) < 0.03 and abs(whole.std() - 1) < 0.03 and abs((whole**4).mean() - 3) < 0.3
    neighbours = [(whole[:, 1:] * whole[:, :-1]), (whole[..., 1:] * whole[..., :-1]), (whole[1:] * whole[:-1])]
    assert max(abs(x.mean()) for x in neighbours) < 0.03


def test_a_file_that_is_no_picture_is_refused(page):
    page.evaluate(DROP, [[1, 2, 3], "x.png"])
    page.wait_for_function("document.getElementById('status').className == 'error'")
    assert page.inner_text("#status") == "This file is not a picture that the browser can read."
