"""Colour spaces of picture files: conversion to RGB, and whether a profile describes the pixels it comes with."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms

WHITE_D50 = np.array([0.96422, 1.0, 0.82521], np.float32)
TO_SRGB_D50 = np.array(  # linear sRGB from XYZ relative to D50, as in the ICC profile of sRGB
    [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]],
    np.float32,
)


def space_of(profile: bytes | None) -> str | None:
    """Return the colour space of an ICC profile, such as `RGB`, `GRAY`, `CMYK` or `Lab`; None if it is no profile."""
    if not profile or len(profile) < 128 or profile[36:40] != b"acsp":
        return None
    return profile[16:20].decode("latin-1").strip()


def is_srgb(profile: bytes) -> bool:
    """Whether a profile says that it is sRGB."""
    try:
        return "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    except (ImageCms.PyCMSError, OSError):
        return False


def fitting(profile: bytes | None, grey: bool) -> tuple[bytes | None, bool]:
    """Return the profile to attach to pixels in RGB or grey, and whether they stay grey.

    A profile of another space says nothing about them. Grey pixels with a profile of an RGB space become RGB, unless it
    is sRGB, which grey is taken for without a profile.
    """
    space = space_of(profile)
    if grey and space == "RGB":
        return (None, True) if is_srgb(profile) else (profile, False)
    return (profile if space == ("GRAY" if grey else "RGB") else None), grey


def lab_to_rgb(stored: np.ndarray, icc: bool) -> np.ndarray:
    """Convert CIELAB as TIFF stores it, [H, W, 3] uint8 or uint16, to sRGB of the same dtype.

    icc: a* and b* have an offset, as in ICC profiles; otherwise they are two's complements.
    """
    out = np.empty_like(stored)
    for top in range(0, len(stored), 64):
        out[top : top + 64] = _lab_to_rgb(stored[top : top + 64], icc)
    return out


def _lab_to_rgb(stored: np.ndarray, icc: bool) -> np.ndarray:
    deep = stored.dtype == np.uint16
    unit, offset = (256, 0x8000) if deep else (1, 0x80)
    light = stored[..., 0] * np.float32(100 / (0xFF00 if deep and icc else 0xFFFF if deep else 0xFF))
    signed = np.int16 if deep else np.int8
    ab = (stored[..., 1:] ^ stored.dtype.type(offset) if icc else stored[..., 1:]).view(signed)
    ab = ab.astype(np.float32) / unit
    y = (light + 16) / 116
    f = np.stack((y + ab[..., 0] / 500, y, y - ab[..., 1] / 200), axis=-1)
    xyz = np.where(f > 6 / 29, f**3, (f - 16 / 116) * np.float32(108 / 841)) * WHITE_D50
    linear = (xyz @ TO_SRGB_D50.T).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, linear * np.float32(12.92), 1.055 * linear ** np.float32(1 / 2.4) - 0.055)
    return np.rint(srgb * np.iinfo(stored.dtype).max).astype(stored.dtype)


def grey_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an image of mode L or LA with a grey profile to RGB or RGBA in sRGB."""
    grey = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    made = ImageCms.profileToProfile(image.getchannel(0), grey, ImageCms.createProfile("sRGB"), outputMode="RGB")
    if image.mode == "LA":
        made.putalpha(image.getchannel("A"))
    return made


def unmultiplied(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Divide colours [H, W, 3] uint16, which were multiplied by alpha [H, W], by it."""
    out = np.empty_like(rgb)
    for row, (colours, share) in enumerate(zip(rgb, alpha, strict=True)):
        wide = colours.astype(np.uint32) * 65535 + share[:, None] // 2
        out[row] = np.minimum(wide // np.maximum(share[:, None], 1), 65535)
    return out
