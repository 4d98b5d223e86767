"""`teasr demo`: a local web page to try a model.

It shows the picture before and after restoration under a slider and offers the result as a download. No data leaves
the machine.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import cv2
import gradio as gr
import numpy as np

from teasr.imaging import color, picture
from teasr.restore.upscaler import Upscaler

MOST_STEPS = 30
SHOWN_PX = 2048  # longer side of the pictures in the slider; the download has full size
PROGRESS = gr.Progress()  # gradio recognises it as the default value of a parameter
FONTS = ["system-ui", "sans-serif"]  # gradio's default fonts would be downloaded


def build(upscaler: Upscaler, folder: Path) -> gr.Blocks:
    """Build the page for a model; results are written to `folder`."""

    def restore(path: str | None, steps: float, fidelity: float, color_fix: str, seed: float, progress=PROGRESS):
        if path is None:
            raise gr.Error("Choose an image first.")
        began, steps = time.monotonic(), int(steps)
        try:
            before = picture.read(Path(path))
            after = upscaler(
                before,
                steps,
                int(seed),
                fidelity=fidelity if steps > 1 else None,
                color_fix=color_fix,
                on_progress=lambda done, of: progress(done / of),
            )
        except (ValueError, OSError, MemoryError) as error:
            raise gr.Error(str(error)) from None
        target = (
            Path(tempfile.mkdtemp(dir=folder))
            / f"{Path(path).stem}_x{upscaler.scale}{picture.stored_suffix(Path(path))}"
        )
        picture.write(target, after)
        height, width = after.rgb.shape[:2]
        seconds = time.monotonic() - began
        summary = f"{before.rgb.shape[1]}x{before.rgb.shape[0]} → {width}x{height} px in {seconds:.1f} s"
        return (_shown(before.rgb, width, height), _shown(after.rgb, width, height)), str(target), summary

    with gr.Blocks(title="TEASR") as page:
        gr.Markdown("## TEASR\nOne step is fastest and most faithful; more steps add more detail.")
        with gr.Row():
            with gr.Column(scale=1):
                source = gr.Image(
                    label="Image", type="filepath", image_mode=None, height=260, sources=["upload", "clipboard"]
                )
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


def serve(upscaler: Upscaler, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page until Ctrl-C. Raises OSError if the port is in use."""
    with tempfile.TemporaryDirectory(prefix="teasr-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and previews are deleted with this folder when the server ends
        page = build(upscaler, Path(folder))
        theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
        print(f"open http://{host}:{port} in a browser; press Ctrl-C to stop", flush=True)
        page.launch(server_name=host, server_port=port, allowed_paths=[folder], theme=theme, quiet=True, share=False)


def _shown(x: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize a picture to [H, W, 3] uint8 for the slider, which needs two pictures of the same size."""
    factor = min(1.0, SHOWN_PX / max(width, height))
    x = (x >> 8).astype(np.uint8) if x.dtype == np.uint16 else x
    return cv2.resize(x, (round(width * factor), round(height * factor)), interpolation=cv2.INTER_CUBIC)
