"""Attack the page of `teasr demo` with hostile uploads, eight at a time, and print what it does about them.

    python bench/attack_page.py [--uploads 200] [--model small]

Uploads are cut and altered pictures, files of other types under a picture's name, bombs that unpack to gigabytes, and
names that lead elsewhere. The server must answer every one without a traceback, write nothing outside its temporary
folder, delete this folder at its end, and restore a proper picture afterwards. Exit code 1 if it does not.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 600
NAMES = (
    "../../../../evil.png", "/etc/evil.png", "..\\..\\evil.png", "%2e%2e%2fevil.png", "evil.png/../../evil.png", "..",
    ".png", "", "a" * 400 + ".png", "nul\0.png", "line\nbreak.png", "<img src=x onerror=alert(1)>.png", "\u202egnp.exe",
    "no_extension", "evil.svg", "evil.png;touch evil", "$(touch evil).png", "con.jpg", "evil.xyz", "-o.png", "~.png",
)  # fmt: skip


def png_claiming(width: int, height: int, depth: int = 8, extra: bytes = b"") -> bytes:
    """A PNG of any claimed size whose data are 10 MB of zeros, in 10 kB."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(bytes(10**7))) + chunk(b"IEND", b"")


def pictures() -> list[bytes]:
    """Small proper pictures in many formats and modes."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    rgb, out = Image.fromarray(noise), []
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    saved = [(rgb.convert(mode), "PNG") for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    saved += [(rgb, name) for name in ("JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "ICO")]
    saved += [(rgb.convert("CMYK"), "JPEG"), (rgb.convert("CMYK"), "TIFF"), (ImageCms.applyTransform(rgb, lab), "TIFF")]
    for image, name in saved:
        file = io.BytesIO()
        image.save(file, name)
        out.append(file.getvalue())
    return out


def others() -> list[bytes]:
    """Files that are no pictures, and pictures that claim to be enormous."""
    tiff, bmp = (bytearray(next(x for x in pictures() if x.startswith(mark))) for mark in (b"II*", b"BM"))
    at = struct.unpack("<I", tiff[4:8])[0]
    for i in range(struct.unpack("<H", tiff[at : at + 2])[0]):
        entry = at + 2 + 12 * i
        if struct.unpack("<H", tiff[entry : entry + 2])[0] in (256, 257):  # width, height
            tiff[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 100_000)
    bmp[18:26] = struct.pack("<ii", 2**31 - 1, 2**31 - 1)
    texts = (
        "",
        "x",
        "<svg onload='alert(1)'/>",
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run",
        "{}",
        "%PDF-1.7",
    )
    binaries = (b"\x7fELF" + bytes(100), b"PK\3\4" + bytes(100), b"II*\0" + b"\xff" * 40, b"\x89PNG\r\n\x1a\n", b"RIFF")
    claims = ((60000, 60000), (30000, 5000), (2**31 - 1, 2**31 - 1), (1, 10**8), (0, 0), (12000, 12000))
    bombs = [png_claiming(*size) for size in claims] + [png_claiming(60000, 60000, 16), bytes(tiff), bytes(bmp)]
    return [text.encode() for text in texts] + list(binaries) + bombs


def hostile_uploads(count: int) -> Iterator[tuple[str, bytes]]:
    """Yield `count` pairs of a file name and its bytes, the same every time."""
    rng, good, bad = np.random.default_rng(0), pictures(), others()
    endings = ("png", "jpg", "webp", "tif", "bmp")
    for i in range(count):
        kind, data = i % 4, good[i // 4 % len(good)]
        name = f"picture{i}.{endings[i % len(endings)]}"
        if kind == 0:
            name, data = NAMES[i // 4 % len(NAMES)], good[0]
        elif kind == 1:
            data = bad[i // 4 % len(bad)]
        elif kind == 2:
            data = data[: rng.integers(0, len(data))]
        else:
            data = bytearray(data)
            for at in rng.integers(0, len(data), 8):
                data[at] = rng.integers(0, 256)
        yield name, bytes(data)


class Page:
    """A client of the page, as a browser talks to it."""

    def __init__(self, url: str):
        self.url = url

    def get(self, path: str) -> tuple[int, str]:
        """Return the status and the text of an address."""
        return self._ask(urllib.request.Request(self.url + path))

    def upload(self, name: str, data: bytes) -> tuple[int, str]:
        """Upload a file; return the status, and where the server has put it or what it says."""
        head = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="' + name.encode() + b'"\r\n\r\n'
        kind = {"Content-Type": "multipart/form-data; boundary=edge"}
        body = head + data + b"\r\n--edge--\r\n"
        status, text = self._ask(urllib.request.Request(self.url + "/gradio_api/upload", body, kind))
        return status, json.loads(text)[0] if status == 200 else text

    def restore(self, path: str, *rest: object) -> tuple[int, str]:
        """Restore a file of the server in one step; return the status and the last event.

        rest: steps, fidelity, strength, scale, tile, colour correction and seed.
        """
        data = [
            [{"path": path, "meta": {"_type": "gradio.FileData"}}],
            *(rest or (1, 0, "the model's own", 4, "auto", "none", 0)),
        ]
        address = self.url + "/gradio_api/call/restore"
        kind = {"Content-Type": "application/json"}
        status, text = self._ask(urllib.request.Request(address, json.dumps({"data": data}).encode(), kind))
        return self.get(f"/gradio_api/call/restore/{json.loads(text)['event_id']}") if status == 200 else (status, text)

    @staticmethod
    def _ask(request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")


def attack(url: str, count: int) -> Counter:
    """Send the uploads and return how many were restored, refused with a reason, and refused without one.

    Raises AssertionError for a traceback, and if the server does not restore a proper picture afterwards.
    """
    page = Page(url)

    def one(upload: tuple[str, bytes]) -> str:
        status, told = page.upload(*upload)
        if status != 200:
            return f"not taken ({status})"
        status, told = page.restore(told)
        assert "Traceback" not in told and 'File "' not in told, f"{upload[0]!r}: a traceback is shown: {told[-300:]}"
        if "event: complete" in told:
            return "restored"
        return "refused" if status == 200 and '"error": null' not in told else "refused without a reason"

    with ThreadPoolExecutor(8) as pool:
        outcomes = Counter(pool.map(one, hostile_uploads(count)))
    for address in ("file=/etc/passwd", "file=../../../../etc/passwd", "file=C:/", "file=%2fetc%2fpasswd"):
        status, told = page.get(f"/gradio_api/{address}")
        assert status >= 400 and "root:" not in told, f"{address} is given away"
    assert "event: complete" not in page.restore("/etc/passwd")[1], "a file of the server was read"
    status, path = page.upload("proper.png", pictures()[0])
    assert "event: complete" in page.restore(path)[1], "a proper picture is not restored any more"
    return outcomes


def files_below(folder: Path) -> set[str]:
    """All files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def serve_and_attack(folder: Path, count: int, model: str = "small") -> str:
    """Start a server that regards `folder` as all of the disk it may use, attack it, and stop it."""
    from teasr.util.distributed import free_port

    places = {name: folder / name for name in ("TMPDIR", "HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR")}
    for place in (*places.values(), folder / "cwd"):
        place.mkdir()
    env = os.environ | {name: str(place) for name, place in places.items()} | {"PYTHONPATH": str(ROOT)}
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "teasr.cli", "demo", "--model", model, "--port", str(port)]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, cwd=folder / "cwd", env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait(url, server)
        before = files_below(folder)
        outcomes = attack(url, count)
        own = ("TMPDIR/teasr-", "MPLCONFIGDIR/")  # the temporary folder, and matplotlib's list of fonts
        written = {name for name in files_below(folder) - before if not name.startswith(own)}
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(PATIENCE_S)
    written |= {name for name in files_below(folder) if name.startswith("TMPDIR/teasr-")}
    assert not written, f"written outside the temporary folder, or left there: {sorted(written)[:5]}"
    return ", ".join(f"{number} {what}" for what, number in sorted(outcomes.items()))


def _wait(url: str, server: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE_S
    while server.poll() is None and time.monotonic() < until:
        try:
            urllib.request.urlopen(url, timeout=10).read()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server does not start")


def main() -> int:
    """Run the attack; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uploads", type=int, default=200, help="number of uploads (default: 200)")
    parser.add_argument("--model", default="small", help="model of the page (default: small)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            print(f"{options.uploads} uploads: {serve_and_attack(Path(folder), options.uploads, options.model)}")
        except AssertionError as error:
            print(f"BAD: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
