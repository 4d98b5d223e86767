"""`teasr demo`: a local web page to try a model.

It shows the picture before and after restoration under a slider and offers the result as a download. No data leaves
the machine.
"""

from __future__ import annotations

import html
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import cv2
import numpy as np

from teasr.imaging import color, formats, picture
from teasr.restore import frames
from teasr.restore.upscaler import Upscaler
from teasr.util.optional import needed_for
from teasr.util.scratch import Scratch

with needed_for("the web page"):
    import gradio as gr

MOST_STEPS = 30
MOST_PIXELS = 200 * 10**6  # of a result: more would keep everybody else waiting
MOST_BYTES = "200mb"  # of an upload
KEPT_S = 3600  # how long uploads and results are kept
RESULT = "result-"
SHOWN_PX = 2048  # longer side of the pictures in the slider; the download has full size
PROGRESS = gr.Progress()  # gradio recognises it as the default value of a parameter
FONTS = ["system-ui", "sans-serif"]  # gradio's default fonts would be downloaded


def build(upscaler: Upscaler, folder: Path) -> gr.Blocks:
    """Build the page for a model; results are written to `folder`."""

    def restore(path: str | None, steps: float, fidelity: float, color_fix: str, seed: float, progress=PROGRESS):
        try:
            if path is None:
                raise ValueError("Choose an image first.")
            steps = int(_number(steps, 1, MOST_STEPS, "steps"))
            how = {"steps": steps, "seed": int(_number(seed, 0, 2**53, "seed")), "color_fix": color_fix}
            how["fidelity"] = _number(fidelity, 0, 1, "fidelity") if steps > 1 else None
            return _restored(upscaler, Path(path), folder, how, lambda done, of: progress(done / of))
        except (ValueError, OSError, MemoryError) as error:
            text = str(error).replace(f"{path}", Path(path or "").name).replace(f"{folder}", "the server's disk")
            raise gr.Error(html.escape(text, quote=False), print_exception=False) from None

    with gr.Blocks(title="TEASR", delete_cache=(KEPT_S, KEPT_S)) as page:
        gr.Markdown("## TEASR\nOne step is fastest and most faithful; more steps add more detail.")
        with gr.Row():
            with gr.Column(scale=1):
                source = gr.Image(label="Image", type="filepath", height=260, sources=["upload", "clipboard"])
                # gradio would open the file, and fail for some of ours and for damaged ones, without a reason
                source.preprocess = lambda upload: None if upload is None else upload.path
                steps = gr.Slider(1, MOST_STEPS, value=1, step=1, label="Steps")
                fidelity = gr.Slider(
                    0, 1, value=0, step=0.05, label="Fidelity", info="0: result of all steps, 1: one-step result"
                )
                colors = gr.Radio(list(color.KINDS), value="none", label="Colour correction")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                start = gr.Button("Restore", variant="primary", elem_id="restore")
            with gr.Column(scale=3):
                compared = gr.ImageSlider(
                    label="Before and after", type="numpy", format="png", height=620, elem_id="compared"
                )
                summary = gr.Textbox(label="Result", interactive=False, elem_id="summary")
                download = gr.DownloadButton("Download", elem_id="download")
        start.click(
            restore, [source, steps, fidelity, colors, seed], [compared, download, summary], concurrency_limit=1
        )
    return page


def _number(value: object, low: int, high: int, name: str) -> float:
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} = {value}: must be a number from {low} to {high}")
    return value


def _restored(upscaler: Upscaler, path: Path, folder: Path, how: dict, on_progress: Callable) -> tuple:
    """Restore a file; return the two pictures to show, the path of the result, and a summary."""
    began, given = time.monotonic(), picture.layout(path)
    size = frames.size_of_result(given.height, given.width, upscaler.scale, None)
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(
            f"{given.width}x{given.height} px is too large for this page, whose results have at most "
            f"{MOST_PIXELS // 10**6} million pixels: use teasr upscale"
        )
    _forget_old(folder)
    work = Path(tempfile.mkdtemp(dir=folder, prefix=RESULT))
    before, scratch = picture.read(path), Scratch(work)
    after = upscaler(before, on_progress=on_progress, scratch=scratch, **how)
    target = work / f"{path.stem[:100]}_x{upscaler.scale}{_suffix(path, after)}"
    picture.write(target, after)
    shown = _shown(before.rgb, size[1], size[0]), _shown(after.rgb, size[1], size[0])
    seconds = time.monotonic() - began
    summary = f"{given.width}x{given.height} → {size[1]}x{size[0]} px in {seconds:.1f} s"
    return shown, str(target), summary


def _suffix(path: Path, result: picture.Picture) -> str:
    """Return the suffix of the source, or .png if its format cannot hold the result or is not ours to write."""
    suffix = formats.stored_suffix(path)
    try:
        formats.check(Path(f"x{suffix}"), result.layout)
    except ValueError:
        return ".png"
    return suffix


def _forget_old(folder: Path) -> None:
    """Delete results that gradio has copied and nobody has asked for since."""
    for old in folder.glob(f"{RESULT}*"):
        if time.time() - old.stat().st_mtime > KEPT_S:
            shutil.rmtree(old, ignore_errors=True)


def serve(upscaler: Upscaler, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page until Ctrl-C or SIGTERM. Raises OSError if the port is in use."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="teasr-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and previews are deleted with this folder when the server ends
        page = build(upscaler, Path(folder))
        theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
        print(f"open http://{host}:{port} in a browser; press Ctrl-C to stop", flush=True)
        places = {"server_name": host, "server_port": port, "allowed_paths": [folder]}
        page.launch(**places, max_file_size=MOST_BYTES, theme=theme, quiet=True, share=False)


def _shown(x: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize a picture to [H, W, 3] uint8 for the slider, which needs two pictures of the same size."""
    factor = min(1.0, SHOWN_PX / max(width, height))
    x = (x >> 8).astype(np.uint8) if x.dtype == np.uint16 else x
    return cv2.resize(x, (round(width * factor), round(height * factor)), interpolation=cv2.INTER_CUBIC)
