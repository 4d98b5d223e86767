"""The description of a run, in Markdown, as MLflow shows it at the top of the run's page."""

from __future__ import annotations

from pathlib import Path

from teasr.tracking.metric_names import LEGEND

ROWS = {  # title -> parameters, joined with commas
    "updates": ("train.updates",),
    "batch": ("train.batch",),
    "learning rate": ("train.learning_rate",),
    "trained weights": ("trainable_parameters",),
    "training data": ("data.shards", "data.sets"),
    "samples": ("samples",),
    "scored on": ("preview.shards",),
    "started from": ("train.start_from", "backbone.base", "backbone.model", "backbone.lora"),
    "device": ("device",),
    "commit": ("commit",),
}


def description(run_dir: Path, params: dict) -> str:
    """Return the description of the run in a folder. params: its parameters by dotted key."""
    if "method.name" not in params:
        return f"Scores of existing pictures (`{params.get('predictions', run_dir)}`), by `teasr benchmark`."
    scale = params.get("scale")
    what = f"enlarges pictures {scale} times" if scale and int(scale) > 1 else "restores pictures at their own size"
    head = f"A model that {what}: method `{params['method.name']}` on backbone `{params['backbone.name']}`."
    rows = {title: _values(params, names) for title, names in ROWS.items()}
    table = "\n".join(f"| {title} | {value} |" for title, value in rows.items() if value)
    legend = "\n".join(f"- **{group}/**: {text}" for group, text in LEGEND.items())
    return (
        f"{head}\n\n| | |\n|---|---|\n{table}\n| folder | `{run_dir}` |\n\n"
        f"Use it: `teasr upscale photo.jpg -o restored.png --model {run_dir}`. Pictures of the training are in "
        f"*Model metrics* (the image grid `preview`, with a slider over the updates).\n\nMetrics:\n\n{legend}\n"
    )


def _values(params: dict, names: tuple[str, ...]) -> str:
    found = [params[name] for name in names if params.get(name) not in (None, "None", "")]
    return ", ".join(f"`{value}`" if isinstance(value, str) else f"{value}" for value in found)
