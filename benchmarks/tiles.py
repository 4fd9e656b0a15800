"""Measure tiles: a defect of 12 pixels in synthetic textures of 6,000 x 2,000, with and without tiles.

python benchmarks/tiles.py                  # a quarter of an hour on two CPU cores
python benchmarks/tiles.py --width 3000     # half of that
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from vqad import HVQTransDetector
from vqad.metrics import image_auroc


def draw(height: int, width: int, seed: int, fault: int = 0) -> np.ndarray:
    """A rolled surface: grain, brightness that drifts, fine streaks; with a dent of ``fault`` pixels across.

    Light from the left makes one side of the dent bright and the other dark: seen small, it is not there.
    """
    rng = np.random.default_rng(seed)
    fine = ndimage.gaussian_filter(rng.standard_normal((height, width), dtype=np.float32), 1.2)
    coarse = ndimage.zoom(rng.standard_normal((height // 200 + 2, width // 200 + 2)).astype(np.float32), 200, order=1)
    streaks = ndimage.gaussian_filter1d(rng.standard_normal(height).astype(np.float32), 2)[:, None]
    grey = 0.5 + 0.05 * fine / fine.std() + 0.03 * coarse[:height, :width] + 0.02 * streaks / streaks.std()
    if fault:
        top, left = rng.integers(fault, height - 2 * fault), rng.integers(fault, width - 2 * fault)
        y, x = np.mgrid[:fault, :fault] - (fault - 1) / 2
        slope = np.clip(1.2 - np.hypot(y, x) / (fault / 2), 0, 1) * x / (fault / 2)
        grey[top : top + fault, left : left + fault] += 0.5 * slope
    return (np.clip(grey, 0, 1) * 255).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=2000)
    parser.add_argument("--width", type=int, default=6000)
    parser.add_argument("--fault", type=int, default=12, help="pixels across")
    parser.add_argument("--train", type=int, default=20)
    parser.add_argument("--test", type=int, default=12, help="of normal and of faulty images each")
    parser.add_argument("--size", type=int, default=288, help="of tiles, in pixels")
    parser.add_argument("--only-tiles", action="store_true")
    parser.add_argument("--without-tiles", action="store_true", help="alone")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for k in range(a.train + 2 * a.test):
            paths.append(str(Path(folder) / f"{k}.bmp"))
            is_faulty = k >= a.train + a.test  # the same surface as one of the normal ones
            pixels = draw(a.height, a.width, k - a.test * is_faulty, a.fault * is_faulty)
            Image.fromarray(pixels).save(paths[-1])
        truth = np.repeat([1, -1], a.test)
        for tiles in [None] * (not a.only_tiles) + [a.size] * (not a.without_tiles):
            started = time.monotonic()
            detector = HVQTransDetector(tiles=tiles, false_alarm_rate=0.2, random_state=0).fit(paths[: a.train])
            fitted = time.monotonic() - started
            score = -detector.score_samples(paths[a.train :])
            print(
                f"tiles={tiles}: image AUROC {image_auroc(truth, score):.3f}; normal {np.round(score[: a.test], 1)}, "
                f"faulty {np.round(score[a.test :], 1)}; fit {fitted:.0f} s, {a.test * 2} images scored in "
                f"{time.monotonic() - started - fitted:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
