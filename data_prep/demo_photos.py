"""Copy the colour photographs that ship with scikit-image into a training and a held-out folder.

python data_prep/demo_photos.py runs/demo/photos
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from teasr.util.optional import MissingPackage, needed_for

# According to scikit-image, these are public domain or CC0, except for the motorcycle (Middlebury stereo set,
# Scharstein et al. 2014), which is used here but never shipped.
PHOTOS = {
    "train": ("coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg", "hubble_deep_field.jpg", "ihc.png"),
    "heldout": ("astronaut.png", "chelsea.png"),
}


def main(arguments: list[str] | None = None) -> int:
    """Copy the photographs; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="output folder, in which train/ and heldout/ are created")
    options = parser.parse_args(arguments)
    try:
        with needed_for("copying the photographs of the demo"):
            import skimage.data
    except MissingPackage as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    source = Path(skimage.data.__file__).parent
    for part, names in PHOTOS.items():
        (options.out / part).mkdir(parents=True, exist_ok=True)
        for name in names:
            if not (source / name).is_file():
                print(
                    f"error: {source} does not contain {name}: install the scikit-image version in constraints.txt",
                    file=sys.stderr,
                )
                return 2
            shutil.copyfile(source / name, options.out / part / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
