"""Draw a contact sheet of a verified shard set: samples with their key and source."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from teasr.data.prep.verifying import read_samples
from teasr.imaging import images

SHEET_SAMPLES, THUMB_PX = 24, 192


def contact_sheet(folder: Path, index: dict) -> np.ndarray:
    """Up to 24 samples spread over the set, enlarged LQ beside HQ, with key and source: [H, W, 3] uint8.

    Raises ValueError that names a sample which cannot be drawn.
    """
    total = sum(row["nsamples"] for row in index["shards"])
    chosen = sorted(set(np.linspace(0, total - 1, min(SHEET_SAMPLES, total)).round().astype(int).tolist()))
    tiles, first = [], 0
    for row in index["shards"]:
        mine = [i - first for i in chosen if first <= i < first + row["nsamples"]]
        if mine:
            samples = list(read_samples((folder / row["shard"]).read_bytes()))
            tiles += [_tile(*samples[i]) for i in mine if i < len(samples)]
        first += row["nsamples"]
    columns = min(4, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    return np.vstack([np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)])


def _tile(key: str, members: dict[str, bytes]) -> np.ndarray:
    tile = Image.new("RGB", (2 * THUMB_PX + 12, THUMB_PX + 40), "white")
    try:
        hq = next(data for field, data in members.items() if field.startswith("hq."))
        lq, source = members["lq.png"], str(json.loads(members["json"])["source"])
    except (StopIteration, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{key} cannot be drawn ({error!r}): run `teasr verify` without --share") from None
    for i, (data, way) in enumerate(((lq, Image.Resampling.NEAREST), (hq, Image.Resampling.LANCZOS))):
        picture = Image.fromarray(images.decode_rgb(data, key))
        tile.paste(picture.resize((THUMB_PX, THUMB_PX), way), (4 + i * (THUMB_PX + 4), 4))
    draw = ImageDraw.Draw(tile)
    draw.text((4, THUMB_PX + 7), key, fill="black")
    draw.text((4, THUMB_PX + 21), source if len(source) < 60 else f"..{source[-58:]}", fill="black")
    return np.asarray(tile)
