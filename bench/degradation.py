"""Measure the cost of degrading an image on one core, compared with public code and with the image codecs alone.

    python bench/degradation.py [--photos FOLDER] [--pictures 48] [--rounds 3]

Everything runs in one process on one thread, alternating, on the same 512 px crops with the same number of draws.
`peers` is the pipeline of Real-ESRGAN as PyTorch code runs it (bench/peer_degradation.py, a re-implementation of
BasicSR's operators). `codecs` is the work that any degradation needs: decode the photo, two JPEG round trips at the
drawn sizes, encode HQ and LQ.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import peer_degradation as peers
import torch

from teasr import degradation
from teasr.data.prep.sources import find
from teasr.degradation import fast
from teasr.imaging import images

CROP_PX = 512
PHOTO_PX = (1008, 756)  # 0.76 megapixels


def photographs(folder: Path | None, n: int) -> list[np.ndarray]:
    """Return `n` images of 0.76 megapixels, from a folder or from those that ship with scikit-image."""
    if folder is None:
        import skimage.data

        found = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    else:
        names = [file[0] for chunk in find(folder, Path("/nowhere"))[0] for file in chunk.files]
        found = [images.read_rgb(folder / name) for name in names[:n]]
    sized = [cv2.resize(x, PHOTO_PX, interpolation=cv2.INTER_CUBIC) for x in found]
    return [np.roll(sized[i % len(sized)], 37 * i, axis=1) for i in range(n)]


def crop(photo: np.ndarray) -> np.ndarray:
    """Return the central square of a photo."""
    top, left = ((n - CROP_PX) // 2 for n in photo.shape[:2])
    return np.ascontiguousarray(photo[top : top + CROP_PX, left : left + CROP_PX])


def compare(ways: dict[str, Callable[[int], None]], pictures: int, rounds: int) -> dict[str, float]:
    """Return the milliseconds per image of each variant, alternating between variants for every image.

    The result is the mean over images and the median over rounds.
    """
    totals = {name: [] for name in ways}
    for way in ways.values():
        way(0)
    for _ in range(rounds):
        seconds = dict.fromkeys(ways, 0.0)
        for i in range(pictures):
            for name, way in ways.items():
                started = time.perf_counter()
                way(i)
                seconds[name] += time.perf_counter() - started
        for name in ways:
            totals[name].append(seconds[name] / pictures * 1e3)
    return {name: statistics.median(rows) for name, rows in totals.items()}


def against_peers(crops: list[np.ndarray], rounds: int) -> None:
    """Compare the degradation alone, with images in memory."""
    plain, sharp = degradation.preset("osediff"), degradation.preset("realesrgan_usm")
    exact, usm = degradation.preset("osediff", peer_exact=True), peers.Usm()

    def ours(settings: degradation.Degradation) -> Callable[[int], None]:
        return lambda i: degradation.degrade(
            degradation.sharpen(crops[i], settings), settings, np.random.default_rng(i)
        )

    def theirs(sharpen: bool) -> Callable[[int], None]:
        def run(i: int) -> None:
            x = torch.from_numpy(crops[i]).permute(2, 0, 1)[None].float() / 255
            x = usm(x) if sharpen else x
            peers.degrade(x, peers.OPTIONS["osediff"], np.random.default_rng(i), torch.Generator().manual_seed(i))

        return run

    ways = {"peers": theirs(False), "teasr": ours(plain), "teasr, peer_exact": ours(exact)}
    ways |= {"peers with USM": theirs(True), "teasr with USM": ours(sharp)}
    ms = compare(ways, len(crops), rounds)
    for name, value in ms.items():
        base = ms["peers with USM" if "USM" in name else "peers"]
        print(f"{name:28s} {value:8.2f} ms   {1000 / value:7.1f} images/s   {base / value:6.1f} x")


def against_codecs(photos: list[np.ndarray], rounds: int) -> None:
    """Compare the whole work, from the bytes of a photo to the bytes of a pair."""
    settings = degradation.preset("osediff")
    round_trips = []
    for i, photo in enumerate(photos):
        stages = degradation.draw(settings, np.random.default_rng(i))["stages"]
        small = fast.resize_by(crop(photo), stages[0]["resize"], "area")
        round_trips.append((small, stages[0]["jpeg"], cv2.resize(photo, (128, 128)), stages[1]["jpeg"]))
    lq = [degradation.degrade(crop(p), settings, np.random.default_rng(i))[0] for i, p in enumerate(photos)]
    jpeg, png = [images.jpeg_bytes(p, 90) for p in photos], [images.png_bytes(p) for p in photos]
    for title, sources, encode in (
        ("JPEG photo, jpeg98 HQ", jpeg, lambda x: images.jpeg_bytes(x, 98)),
        ("JPEG photo, PNG HQ", jpeg, images.png_bytes),
        ("PNG photo, PNG HQ", png, images.png_bytes),
        ("PNG photo, WebP HQ", png, images.webp_bytes),
    ):

        def whole(i: int, sources=sources, encode=encode) -> None:
            hq = crop(images.read_rgb(sources[i]))
            encode(hq)
            images.png_bytes(degradation.degrade(hq, settings, np.random.default_rng(i))[0])

        def codecs(i: int, sources=sources, encode=encode) -> None:
            encode(crop(images.read_rgb(sources[i])))
            first, quality, second, other = round_trips[i]
            fast.jpeg(first, quality)
            fast.jpeg(second, other)
            images.png_bytes(lq[i])

        ms = compare({"codecs": codecs, "teasr": whole}, len(photos), rounds)
        print(
            f"{title:28s} {ms['teasr']:8.2f} ms   {1000 / ms['teasr']:7.1f} images/s   "
            f"codecs alone {ms['codecs']:6.2f} ms   {ms['teasr'] / ms['codecs']:5.2f} x their time"
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, help="folder of photographs (default: those of scikit-image)")
    parser.add_argument("--pictures", type=int, default=48, help="number of images per round (default: 48)")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; times are medians (default: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    photos = photographs(options.photos, options.pictures)
    print(
        f"{len(photos)} crops of {CROP_PX} px, one thread; degradation only, images in memory; speed relative to peers:"
    )
    against_peers([crop(p) for p in photos], options.rounds)
    print("all work, from the encoded photo (0.76 megapixels) to the encoded HQ/LQ pair:")
    against_codecs(photos, options.rounds)


if __name__ == "__main__":
    main()
