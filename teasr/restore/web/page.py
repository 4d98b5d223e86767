"""`teasr demo`: a local web page to try a model.

It restores one or several files, shows each before and after under a slider, and offers the results as downloads. No
data leaves the machine.
"""

from __future__ import annotations

import html
import os
import signal
import tempfile
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from teasr.imaging import color
from teasr.restore.frames import MAX_SCALE
from teasr.restore.upscaler import Upscaler
from teasr.restore.web import files
from teasr.util.optional import needed_for

with needed_for("the web page"):
    import gradio as gr

MOST_STEPS = 30
MOST_BYTES = "200mb"  # of an upload
AUTO = "auto"
OWN = "the model's own"  # strength
STRENGTHS = (OWN, *(f"{tenths / 10:g}" for tenths in range(11)))
TILES = (128, 192, 256, 384, 512, 768, 1024)
PROGRESS = gr.Progress()  # gradio recognises it as the default value of a parameter
CSS = """
#results .grid-container {grid-template-columns: repeat(auto-fill, 120px) !important; grid-auto-rows: 120px}
#results .thumbnail-item {width: 120px; height: 120px; aspect-ratio: 1}
"""
FONTS = ["system-ui", "sans-serif"]  # gradio's default fonts would be downloaded
INTRO = (
    "## TEASR\nDrop one or several pictures and press *Restore*. One step is fastest and most faithful; more steps add "
    "more detail. Nothing leaves this machine."
)


def build(upscaler: Upscaler, folder: Path) -> gr.Blocks:
    """Build the page for a model; results are written to `folder`."""

    def restore(paths: list[str], steps, fidelity, strength, scale, tile, color_fix, seed, progress=PROGRESS):
        values = (steps, fidelity, strength, scale, tile, color_fix, seed)
        return _restore(upscaler, folder, [Path(path) for path in paths], values, progress)

    about = upscaler.descriptor
    dials = {dial.name: dial for dial in about.dials}
    tiles = [AUTO, *(str(px) for px in TILES if about.min_tile_px <= px and px % about.pixel_multiple == 0)]
    with gr.Blocks(title="TEASR", delete_cache=(files.KEPT_S, files.KEPT_S)) as page:
        gr.Markdown(INTRO)
        done = gr.State([])  # of this visitor: what `files.restore` returned for each file
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                sources = gr.File(label="Images", file_count="multiple", file_types=["image"], height=200)
                # gradio would judge files by their names; ours are judged by their headers, with a reason
                sources.preprocess = lambda uploads: [each.path for each in uploads.root] if uploads else []
                steps = gr.Slider(1, MOST_STEPS, value=1, step=1, label="Steps")
                fidelity = gr.Slider(
                    0, 1, value=0, step=0.05, label="Fidelity", info="0: result of all steps, 1: one-step result",
                    visible="fidelity" in dials,
                )  # fmt: skip
                strength = gr.Dropdown(
                    list(STRENGTHS), value=OWN, label="Strength", info="of one step, from faithful (0) to detailed (1)",
                    visible="strength" in dials,
                )  # fmt: skip
                if "strength" not in dials:
                    gr.Markdown(f"This model has no setting strength: its settings are {', '.join(dials) or 'none'}.")
                scale = gr.Slider(
                    1, MAX_SCALE, value=about.scale, step=0.5, label="Scale",
                    info=f"factor of width and height; the model was trained for {about.scale}",
                )  # fmt: skip
                with gr.Accordion("More settings", open=False, elem_id="more"):
                    tile = gr.Dropdown(
                        tiles, value=AUTO, label="Tile", info="side in pixels; smaller tiles need less memory"
                    )
                    colors = gr.Radio(list(color.KINDS), value="none", label="Colour correction")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                start = gr.Button("Restore", variant="primary", elem_id="restore")
            with gr.Column(scale=3):
                compared = gr.ImageSlider(label="Before and after", type="filepath", height=560, elem_id="compared")
                gallery = gr.Gallery(
                    label="Results", columns=8, height=180, visible=False, allow_preview=False, elem_id="results"
                )
                summary = gr.Textbox(label="Result", interactive=False, lines=1, max_lines=12, elem_id="summary")
                with gr.Row():
                    download = gr.DownloadButton("Download", interactive=False, elem_id="download")
                    download_all = gr.DownloadButton("Download all (zip)", visible=False, elem_id="download-all")
        results = [done, compared, gallery, summary, download, download_all]
        start.click(
            restore, [sources, steps, fidelity, strength, scale, tile, colors, seed], results, concurrency_limit=1
        )
        gallery.select(_choose, [done], [compared, download], api_name=False)
    return page


def _restore(upscaler: Upscaler, folder: Path, paths: list[Path], values: tuple, progress: gr.Progress) -> tuple:
    """Restore the files and return what the page shows; files that fail are named in the summary.

    Raises gr.Error with the reason if a setting is wrong, or if no file could be restored.
    """
    try:
        how = _settings(*values)
        if not paths:
            raise ValueError("Choose an image first.")
        if len(paths) > files.MOST_FILES:
            raise ValueError(f"{len(paths)} files: this page takes {files.MOST_FILES} at once; use teasr upscale")
        work = files.work_folder(folder)
    except (ValueError, OSError) as error:
        raise _shown_error(str(error).replace(f"{folder}", "the server's disk")) from None
    done, lines = [], []
    for i, path in enumerate(paths):

        def on_progress(part: int, of: int, i=i, path=path) -> None:
            progress((i + part / of) / len(paths), desc=f"{i + 1}/{len(paths)} {path.name}")

        try:
            restored = files.restore(upscaler, path, work, how, on_progress)
        except (ValueError, OSError, MemoryError) as error:
            text = str(error).replace(f"{path}", path.name).replace(f"{folder}", "the server's disk")
            lines.append(text if text.startswith(path.name) else f"{path.name}: {text}")
            continue
        done.append(restored)
        lines.append(f"{path.name}: {restored.text}")
    if not done:
        raise _shown_error("\n".join(lines))
    several = len(done) > 1
    archive = str(files.packed((each.path for each in done), work)) if several else None
    thumbs = [(each.shown[1], each.path.name) for each in done]
    return (
        done,
        done[0].shown,
        gr.Gallery(thumbs, visible=several, selected_index=0 if several else None),
        "\n".join(lines),
        gr.DownloadButton(_label(done[0]), value=str(done[0].path), interactive=True),
        gr.DownloadButton(value=archive, visible=several),
    )


def _choose(done: list[files.Restored], event: gr.SelectData) -> tuple:
    """Show the result that was clicked in the gallery."""
    chosen = done[event.index]
    return chosen.shown, gr.DownloadButton(_label(chosen), value=str(chosen.path))


def _label(restored: files.Restored) -> str:
    return f"Download {restored.path.name}"


def _settings(
    steps: float, fidelity: float, strength: str, scale: float, tile: str, color_fix: str, seed: float
) -> dict:
    """Return the arguments of `Upscaler.__call__`. Raises ValueError for a value that the page cannot send."""
    steps = int(_number(steps, 1, MOST_STEPS, "steps"))
    how = {"steps": steps, "seed": int(_number(seed, 0, 2**53, "seed")), "color_fix": color_fix}
    fidelity = _number(fidelity, 0, 1, "fidelity")
    how["fidelity"] = fidelity if steps > 1 and fidelity else None
    how["strength"] = None if strength == OWN else float(strength)
    how["tile_px"] = None if tile == AUTO else int(tile)
    return how | {"scale": float(_number(scale, 1, MAX_SCALE, "scale"))}


def _number(value: object, low: float, high: float, name: str) -> float:
    if not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} = {value}: must be a number from {low} to {high:g}")
    return value


def _shown_error(text: str) -> gr.Error:
    return gr.Error(html.escape(text, quote=False).replace("\n", "<br>"), print_exception=False)


def serve(upscaler: Upscaler, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page until Ctrl-C or SIGTERM. Raises OSError if the port is in use."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="teasr-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and previews are deleted with this folder when the server ends
        page = build(upscaler, Path(folder))
        theme = gr.themes.Default(font=FONTS, font_mono=["monospace"])
        print(f"open http://{host}:{port} in a browser; press Ctrl-C to stop", flush=True)
        places = {"server_name": host, "server_port": port, "allowed_paths": [folder]}
        page.launch(**places, max_file_size=MOST_BYTES, theme=theme, css=CSS, quiet=True, share=False)
