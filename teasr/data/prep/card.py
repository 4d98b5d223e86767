"""The data card of a shard set: contents, sources and licences."""

from __future__ import annotations

from collections import Counter

from teasr.data.layout import DEFAULT_SCALE


def card(settings: dict, licences: dict[str, str], index: dict) -> str:
    """Return the data card as Markdown.

    `licences` maps a sub-folder of the sources, or "." for all others, to a licence.
    """
    licence_counts = Counter(_licence(source["name"], licences) for source in index["sources"])
    reasons = Counter(row["reason"].split(":")[0] for row in index["skipped"])
    samples, size = sum(s["nsamples"] for s in index["shards"]), sum(s["bytes"] for s in index["shards"])
    pairs = (
        "real images"
        if settings["lq"]
        else f"degradation preset `{settings['degradation']}`, {settings['variants']} variant(s) of each HQ"
    )
    lines = [
        "# Data card",
        "",
        f"{samples} training pairs in {len(index['shards'])} shards, {size / 1e6:.1f} MB; "
        f"HQ crops of {settings['crop_px']} px as "
        f"{settings['hq_format']}, LQ as PNG at scale {settings.get('scale', DEFAULT_SCALE)} ({pairs}).",
        *(["Each sample has a caption, the text file beside its photograph."] * (settings.get("captions") == "files")),
        f"Set hash {index['set_sha256']}.",
        "",
        "| photographs | licence |",
        "|---|---|",
        *(f"| {n} | {licence} |" for licence, n in licence_counts.most_common()),
        "",
        "The rights to the photographs remain with their owners. Their licences may apply to models trained on them.",
        "",
        *(f"- skipped images, {reason}: {n}" for reason, n in reasons.most_common()),
        "",
        f"Made by teasr in format {index['format']}. index.json lists the settings and the hash of every source image. "
        "Library versions: "
        + "; ".join(", ".join(f"{k} {v}" for k, v in row.items()) for row in index["libraries"])
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _licence(name: str, licences: dict[str, str]) -> str:
    """Licence of the deepest folder in `licences` that contains the file."""
    folders = [f for f in licences if f == "." or name.startswith(f.rstrip("/") + "/")]
    return licences[max(folders, key=lambda f: 0 if f == "." else len(f))] if folders else "not stated"
