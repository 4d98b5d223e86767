"""Evaluate a model, or existing pictures, on a set of pairs, with resuming.

The results are pictures, scores with confidence intervals, and comparison sheets. For every pair, the pictures and a
part file with the scores are written. The pairs are distributed over the ranks in turn; rank 0 waits for all part files
and merges them, so `scores.json` does not depend on the number of ranks or on interruptions. Folder names contain a
hash of everything that determines their content, so outdated results are never used.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import resource
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from teasr.data.pairs import Pairs
from teasr.data.shards import Sample
from teasr.evaluation.metrics import Scorer
from teasr.evaluation.names import BICUBIC, CAPTION, INPUT, SHOWN, shown_name
from teasr.evaluation.registry import METRICS
from teasr.imaging import images
from teasr.tracking.environment import processor
from teasr.util.files import write_atomic
from teasr.util.progress import ProgressLine

COMPARED = 6  # the most pictures in comparison.png
EXTREMES = 5  # number of best and of worst pictures in extremes.png
SHOWN_PX = 384  # largest side of a picture in a sheet; larger ones are cropped to their centre
RESAMPLES = 1000  # number of bootstrap resamples
Restore = Callable[[Sample], np.ndarray]


@dataclass
class Evaluation:
    """An evaluation of one or several methods on a set of pairs.

    methods: name -> function that restores a picture. made_by: what determines their pictures (checkpoint, seed, ..);
    existing results are reused only if it is unchanged.
    """

    pairs: Pairs
    scorer: Scorer
    out: Path
    methods: dict[str, Restore]
    made_by: dict
    keep_images: bool = True
    beside_baseline: bool = True
    commit: str = "unknown"
    command: str = "unknown"  # what was typed
    rank: int = 0
    world: int = 1
    scores: dict = field(default_factory=dict)

    def __post_init__(self):
        made = {"made_by": self.made_by, "pairs": self.pairs.identity}
        self.images = self.out / f"images-{_hash(made)}"
        scored = made | {"methods": list(self.methods), "metrics": self.scorer.identity}
        scored |= {} if self.beside_baseline else {"beside_bicubic": False}
        self.parts = self.out / f"parts-{_hash(scored)}"
        self.settings = scored

    def run(self) -> None:
        """Evaluate this rank's pairs; rank 0 then writes the results.

        Raises ValueError naming a pair that cannot be read or whose pictures do not match in size.
        """
        keys = []
        with ProgressLine("evaluate", len(self.pairs), "pictures", enabled=self.rank == 0) as line:
            for i, (key, load) in enumerate(self.pairs):
                keys.append(key)
                if i % self.world == self.rank:
                    if self._part(key) is None:
                        self._score(key, load())
                    line.show(i + 1)
        if self.rank == 0:
            self._wait_for_others(keys)
            self._put_together(keys)

    def image_path(self, method: str, key: str) -> Path:
        """Return the path of a method's picture for a pair."""
        return self.images / method.replace(" ", "_") / f"{key}.png"

    @property
    def _names(self) -> list[str]:
        return [self.baseline, *self.methods] if self.beside_baseline else list(self.methods)

    @property
    def baseline(self) -> str:
        """Name of LQ itself in the results: upscaled bicubically, or the input where nothing is upscaled."""
        return INPUT if self.pairs.scale == 1 else BICUBIC

    def _part(self, key: str) -> dict | None:
        try:
            return json.loads((self.parts / f"{key}.json").read_text())
        except (OSError, ValueError):
            return None

    def _score(self, key: str, sample: Sample) -> None:
        part = {"scores": {}, "seconds": {}}
        for name, x in self._pictures(key, sample, part["seconds"]):
            try:
                part["scores"][name] = self.scorer.picture(x, sample.hq)
            except ValueError as error:
                raise ValueError(f"{key}, {name}: {error}") from None
        path = self.parts / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(part).encode())

    def _pictures(self, key: str, sample: Sample, seconds: dict[str, float]) -> Iterable[tuple[str, np.ndarray]]:
        """Yield the baseline (unless the pairs have no LQ) and the picture of every method; existing ones are read."""
        if self.beside_baseline:
            yield self.baseline, sample.lq_up
        for name, restore in self.methods.items():
            path = self.image_path(name, key)
            if self.keep_images and path.is_file():
                yield name, images.read_rgb(path)
                continue
            began = time.perf_counter()
            made = restore(sample)
            seconds[name] = time.perf_counter() - began
            if self.keep_images:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, images.png_bytes(made))
            yield name, made

    def _wait_for_others(self, missing: list[str]) -> None:
        with ProgressLine("waiting for the other ranks:", len(self.pairs), "pictures") as line:
            while missing := [key for key in missing if not (self.parts / f"{key}.json").is_file()]:
                line.show(len(self.pairs) - len(missing))
                time.sleep(0.2)

    def _put_together(self, keys: list[str]) -> None:
        parts = {key: self._part(key) for key in keys}
        self._collect_sets()
        names = self._names
        self.scores = {
            "dataset": self.pairs.name, "scale": self.pairs.scale, "pictures": len(self.pairs),
            "protocol": self.scorer.protocol.name, "metrics": self.scorer.identity,
            "baseline": self.baseline if self.beside_baseline else None,
            "methods": {name: self._means(list(parts.values()), name) | self._set_scores(name) for name in names},
        }  # fmt: skip
        text = io.StringIO()
        writer = csv.DictWriter(text, ["picture", "method", *self.scorer.picture_names], lineterminator="\n")
        writer.writeheader()
        for key, part in parts.items():
            writer.writerows({"picture": key, "method": name} | part["scores"][name] for name in names)
        write_atomic(self.out / "scores_by_picture.csv", text.getvalue().encode())
        self._write_speed(parts)
        self._draw_sheets(parts)
        write_atomic(self.out / "scores.json", json.dumps(self.scores, indent=1).encode())
        for old in (*self.out.glob("images-*"), *self.out.glob("parts-*")):
            if old not in (self.images, self.parts):
                shutil.rmtree(old)

    def _means(self, parts: list[dict], method: str) -> dict[str, dict[str, float]]:
        """Return the mean of every metric with its 95 % bootstrap interval over pictures.

        The same is returned for the gain over the baseline, taken picture by picture.
        """
        draws = np.random.default_rng(0).integers(0, len(parts), (RESAMPLES, len(parts)))

        def interval(values: np.ndarray, prefix: str = "") -> dict[str, float]:
            low, high = np.percentile(values[draws].mean(1), (2.5, 97.5))
            return {f"{prefix}mean": float(values.mean()), f"{prefix}low": float(low), f"{prefix}high": float(high)}

        found = {}
        for metric in self.scorer.picture_names:
            values = np.array([part["scores"][method][metric] for part in parts])
            found[metric] = interval(values)
            if self.beside_baseline and method != self.baseline:
                base = np.array([part["scores"][self.baseline][metric] for part in parts])
                found[metric] |= interval(values - base, "gain_")
        return found

    def _collect_sets(self) -> None:
        if self.scorer.status.get("fid") != "ok":
            return
        for key, load in self.pairs:
            sample = load()
            self.scorer.add_to_set("hq", sample.hq)
            for name, x in self._pictures(key, sample, {}):
                self.scorer.add_to_set(name, x)

    def _set_scores(self, name: str) -> dict[str, dict[str, float]]:
        return {metric: {"mean": value} for metric, value in self.scorer.sets(name, "hq").items()}

    def _write_speed(self, parts: dict[str, dict]) -> None:
        """Write speed.json with the median seconds per picture and the peak memory.

        The median covers the pictures of this and earlier runs; the first picture is excluded if there are others.
        """
        import torch

        speed = {}
        for name in self.methods:
            seconds = [part["seconds"][name] for part in parts.values() if name in part["seconds"]]
            if seconds:
                speed[name] = {"seconds_median": float(np.median(seconds[1:] or seconds)), "pictures": len(seconds)}
        gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        threads = torch.get_num_threads()
        device = torch.cuda.get_device_name() if gpu else f"{processor()}, {threads} thread{'s' * (threads > 1)}"
        found = {
            "date": datetime.now(UTC).isoformat(timespec="minutes"),
            "command": self.command,
            "commit": self.commit,
            "device": device,
            "peak_bytes_of_rank_0": peak,
            "ranks": self.world,
            "methods": speed,
        }
        write_atomic(self.out / "speed.json", json.dumps(found, indent=1).encode())

    def _write_shown(self, rows: dict[str, list[np.ndarray]], titles: list[str], parts: dict[str, dict]) -> None:
        """Write the centre of each compared picture as its own file, such as shown/0/bicubic.png, for web pages.

        caption.json beside it names the picture and has its scores.
        """
        shutil.rmtree(self.out / SHOWN, ignore_errors=True)
        for i, (key, row) in enumerate(rows.items()):
            caption = {"picture": key, "scores": parts[key]["scores"]}
            for title, x in zip(titles, row, strict=True):
                path = self.out / SHOWN / str(i) / shown_name(title)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, images.png_bytes(x))
            write_atomic(path.parent / CAPTION, json.dumps(caption, indent=1).encode())

    def _draw_sheets(self, parts: dict[str, dict]) -> None:
        """Draw comparison.png, with pictures spread over the set, and extremes.png, with the best and worst pictures.

        Best and worst refer to the first metric (PSNR by default): gain over the baseline, or value without one.
        """
        keys = list(parts)
        spread = {keys[round(i * (len(keys) - 1) / max(1, COMPARED - 1))] for i in range(COMPARED)}
        first, metric = next(iter(self.methods)), self.scorer.picture_names[0]
        merit = METRICS[metric].merit
        base = {k: merit(p["scores"][self.baseline][metric]) if self.beside_baseline else 0 for k, p in parts.items()}
        gain = {k: merit(p["scores"][first][metric]) - base[k] for k, p in parts.items()}
        ranked = sorted(keys, key=gain.get, reverse=True)
        chosen = list(dict.fromkeys([*ranked[:EXTREMES], *ranked[-EXTREMES:]]))
        rows = {}
        for key, load in self.pairs:
            if key in spread or key in chosen:
                sample = load()
                made = [x for _, x in self._pictures(key, sample, {})]
                rows[key] = [_centre(x) for x in (*made, sample.hq)]
        titles = [*self._names, "HQ"]
        self._write_shown({key: rows[key] for key in keys if key in spread}, titles, parts)
        for name, wanted in (("comparison", [k for k in keys if k in spread]), ("extremes", chosen)):
            sheet = images.comparison(_same_size([rows[key] for key in wanted]), titles)
            write_atomic(self.out / f"{name}.png", images.png_bytes(sheet))


def table(scores: dict) -> str:
    """Format the results as a text table, with the skipped metrics listed below."""
    names = [m for m in scores["metrics"] if any(m in row for row in scores["methods"].values())]
    lines = [f"{'':>14s}" + "".join(f"  {METRICS[m].label:>9s}" for m in names)]
    for name, row in scores["methods"].items():
        cells = (f"  {row[m]['mean']:9.{2 if METRICS[m].label in ('PSNR', 'FID', 'MUSIQ') else 4}f}" for m in names)
        lines.append(f"{name:>14s}" + "".join(cells))
    for name, row in scores["methods"].items():
        if "gain_low" in row.get(names[0], {}):
            first = row[names[0]]
            unit = METRICS[names[0]].label
            lines.append(
                f"{name} - {scores.get('baseline', BICUBIC)}: {first['gain_mean']:+.3f} {unit}, "
                f"95 % interval {first['gain_low']:+.3f} to {first['gain_high']:+.3f}"
            )
            break
    for name, metric in scores["metrics"].items():
        if metric["status"] != "ok":
            lines.append(f"{METRICS[name].label} {metric['status']}")
    return "\n".join(lines)


def _hash(what: dict) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def _centre(x: np.ndarray) -> np.ndarray:
    top, left = (max(0, (n - SHOWN_PX) // 2) for n in x.shape[:2])
    return x[top : top + SHOWN_PX, left : left + SHOWN_PX]


def _same_size(rows: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """Pad all pictures with white to the size of the largest."""
    height, width = (max(row[0].shape[axis] for row in rows) for axis in (0, 1))
    return [
        [np.pad(x, ((0, height - x.shape[0]), (0, width - x.shape[1]), (0, 0)), constant_values=255) for x in row]
        for row in rows
    ]
