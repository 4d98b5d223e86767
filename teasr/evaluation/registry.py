"""Which metrics there are: label, direction, weight files, and the protocols of published tables."""

from __future__ import annotations

from dataclasses import dataclass

GRID_PX = 16  # also detects a period of 8 px: token grids of 8 or 16 px may show as artefacts


@dataclass(frozen=True)
class Protocol:
    """How PSNR and SSIM are computed; the other metrics use whole RGB pictures in every protocol."""

    name: str
    luma: bool
    border_px: int

    @property
    def text(self) -> str:
        """Describe the protocol in words."""
        space = "Y of BT.601 ycbcr (limited range)" if self.luma else "RGB"
        return f"{space}, {f'{self.border_px} px of border cropped' if self.border_px else 'no border cropped'}"


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("osediff", luma=True, border_px=0),  # used in the tables of OSEDiff, TSD-SR and TEASR
        Protocol("crop4", luma=True, border_px=4),  # used in classical SR and by SeeSR
        Protocol("rgb", luma=False, border_px=0),
    )
}


@dataclass(frozen=True)
class File:
    """A weight file by its published name; `sha256`: the beginning of its hash, as much of it as is published.

    `instead`: a larger file that holds the same weights and serves as well. made: whether `teasr weights` provides it.
    """

    name: str
    sha256: str = ""
    instead: File | None = None
    made: bool = False

    @property
    def versions(self) -> tuple[File, ...]:
        """This file and what serves instead of it."""
        return (self, *(self.instead.versions if self.instead else ()))


@dataclass(frozen=True)
class Metric:
    """A column of a table. kind: `full` (full reference), `none` (no reference) or `set` (all pictures at once).

    target: the best value, where neither the highest nor the lowest value is best.
    """

    name: str
    label: str
    higher: bool  # whether higher is better
    kind: str
    package: str | None = None
    files: tuple[File, ...] = ()
    about: str = ""
    target: float | None = None

    @property
    def better(self) -> str:
        """What is better, in words: higher, lower, or closer to the target."""
        return ("higher" if self.higher else "lower") if self.target is None else f"closer to {self.target:g}"

    @property
    def arrow(self) -> str:
        """The direction as a sign: up, down, or an arrow to the target."""
        return ("↑" if self.higher else "↓") if self.target is None else f"→ {self.target:g}"

    def merit(self, value: float) -> float:
        """A number that is larger the better `value` is: differences of it are gains, and its maximum is the best."""
        return (value if self.higher else -value) if self.target is None else -abs(value - self.target)


ALEX = File(
    "alexnet-features.safetensors", "9f97fd313f4da83dbe6bbfbe6effca1241de9edfcd7c53386261ed9697286dd9",
    File("alexnet-owt-7be5be79.pth", "7be5be79"), made=True,
)  # fmt: skip
VGG = File(
    "vgg16-features.safetensors", "cabd922aeb0dd6d56f2bed33221aee74b7f1e760ddd105c0e0891606cbab6d0d",
    File("vgg16-397923af.pth", "397923af"), made=True,
)  # fmt: skip
ALPHA_BETA = File(
    "dists_alpha_beta.safetensors", "50980d68bc38b2fcc738b1a8c3ae77a87cb73883b230951c2c57190855bdb52f",
    File("DISTS_weights-f5e65c96.pth", "f5e65c96"), made=True,
)  # fmt: skip
NIQE_TABLE = File("niqe_modelparameters.mat", made=True)

METRICS = {
    m.name: m
    for m in (
        Metric("psnr", "PSNR", True, "full"),
        Metric("ssim", "SSIM", True, "full"),
        Metric("lpips", "LPIPS", False, "full", "lpips", (ALEX,), "AlexNet, v0.1"),
        Metric("dists", "DISTS", False, "full", None, (VGG, ALPHA_BETA)),
        Metric(
            "fid", "FID", False, "set", "pyiqa", (File("pt_inception-2015-12-05-6726825d.pth", "6726825d"),),
            "whole pictures brought to 299 px by PIL's bicubic (clean-fid), no patches",
        ),
        Metric("niqe", "NIQE", False, "none", "pyiqa", (NIQE_TABLE,), "on yiq luma, BasicSR's table"),
        Metric(
            "musiq", "MUSIQ", True, "none", "pyiqa", (File("musiq_koniq_ckpt-e95806b9.pth", "e95806b9"),), "KonIQ-10k",
        ),
        Metric(
            "maniqa", "MANIQA", True, "none", "pyiqa",
            (
                File("MANIQA_PIPAL-ae6d356b.pth", "ae6d356b"),
                File("vit_base_patch8_224.augreg2_in21k_ft_in1k.safetensors"),
            ),
            "PIPAL (not pyiqa's default); the second file is model.safetensors of timm's model of that name",
        ),
        Metric(
            "clipiqa", "CLIPIQA", True, "none", "pyiqa",
            (File("RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),),
        ),
        Metric(
            "checkerboard", "Grid", False, "none",
            about=f"share of the high-pass energy that repeats every {GRID_PX} px",
        ),
        Metric(
            "seam", "Seam", False, "none",
            about="luma steps across block borders over those elsewhere, largest of 4, 8 and 16 px", target=1.0,
        ),
        Metric(
            "detail", "Flat/busy", False, "full",
            about="detail relative to HQ in flat areas, over the same in busy areas", target=1.0,
        ),
        Metric("energy", "Detail", False, "full", about="energy of detail relative to HQ", target=1.0),
        Metric(
            "patches", "Patches", False, "full", about="sliced Wasserstein distance of 7x7 patches of detail to HQ's",
        ),
    )
}  # fmt: skip

MEANINGS = {  # of the metrics, for readers who do not know them
    "psnr": (
        "Peak signal-to-noise ratio in dB: how close every pixel is to the original. It prefers blur to "
        "invented detail."
    ),
    "ssim": (
        "Structural similarity, 1 for identical pictures: how well contrast and structure match the original "
        "in small windows."
    ),
    "lpips": (
        "Distance to the original in the features of a network (AlexNet), 0 for identical pictures; closer to "
        "what people see than PSNR."
    ),
    "dists": (
        "Distance to the original in structure and texture (features of VGG16); another sample of the same "
        "texture costs little."
    ),
    "fid": (
        "Distance of the set of results to the set of originals in the features of Inception: how real the "
        "whole set looks. It needs many pictures."
    ),
    "niqe": (
        "Naturalness without an original: how far local statistics are from those of photographs. Noise can improve it."
    ),
    "musiq": "Quality from 0 to 100, as a network trained on people's ratings predicts it without an original.",
    "maniqa": "Quality from 0 to 1, as a transformer trained on people's ratings predicts it without an original.",
    "clipiqa": (
        "Whether CLIP finds a picture closer to “good photo” (1) than to “bad photo” (0), without an original."
    ),
    "checkerboard": (
        "Share of the finest detail that repeats every 16 px: high when the grid of the network's tokens is visible."
    ),
    "seam": (
        "Steps in brightness across the borders of blocks of 4, 8 or 16 px, relative to those elsewhere; 1: "
        "no visible blocks."
    ),
    "detail": (
        "Detail relative to the original in flat areas, over the same in busy ones; above 1: noise in skies, "
        "or blur in foliage."
    ),
    "patches": "How far the textures are from the original's, whatever their places: 0 for the same ones.",
    "energy": "Energy of the fine detail relative to the original: below 1 for blurred results, above 1 for noise.",
}
