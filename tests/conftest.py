"""Small data that several test files share."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# Where tests run in several processes, each has its share of the cores. It is read when torch is imported, later.
if "PYTEST_XDIST_WORKER" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

# Threads of torch wait for each other by the microsecond: on a busy machine those that spin meanwhile take most of the
# time. It is read when torch is imported, later.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# How long an example takes says nothing on a busy machine.
settings.register_profile("vqad", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("vqad")


@pytest.fixture
def colour_images():
    """Five RGB images, uint8 of shape (5, 20, 24, 3), with every value from 0 to 255 in them."""
    return np.random.default_rng(0).integers(0, 256, (5, 20, 24, 3), dtype=np.uint8)


@pytest.fixture
def mvtec_root(tmp_path):
    """A folder in the layout of MVTec AD: categories "bolt" and "nut", grey PNG files of 12 x 10 pixels.

    Each has 3 training images and, in test, 2 good and 11 scratched ones, of which the last has no mask.
    Pixels are the image's number in its folder; the mask of image k marks its k first rows.
    """
    for category in ("bolt", "nut"):
        for kind, n in (("train/good", 3), ("test/good", 2), ("test/scratch", 11)):
            for k in range(n):
                save_png(tmp_path / category / kind / f"{k}.png", np.full((12, 10), k, np.uint8))
        for k in range(10):
            mask = np.zeros((12, 10), np.uint8)
            mask[:k] = 255
            save_png(tmp_path / category / "ground_truth" / "scratch" / f"{k}_mask.png", mask)
    return tmp_path


@pytest.fixture
def visa_root(tmp_path):
    """A folder in VisA's own layout, with categories "candle" and "pcb1", images of 8 x 10 pixels.

    Training images are normal: three candles and one pcb1. In test are a candle with two kinds of defect, a normal
    candle, and a defective pcb1 without a mask.
    """
    root = tmp_path / "visa"
    lines = ["object,split,label,image,mask"]
    for category, split, label, k in (
        ("candle", "train", "normal", 0),
        ("candle", "train", "normal", 10),
        ("candle", "train", "normal", 1),
        ("pcb1", "train", "normal", 0),
        ("candle", "test", "anomaly", 0),
        ("candle", "test", "normal", 2),
        ("pcb1", "test", "anomaly", 1),
    ):
        image, mask = f"{category}/Data/Images/{label.capitalize()}/{k}.JPG", ""
        save_png(root / image, np.full((8, 10, 3), 10 * k, np.uint8))
        if label == "anomaly" and category == "candle":
            mask, kinds = f"{category}/Data/Masks/Anomaly/{k}.png", np.zeros((8, 10), np.uint8)
            kinds[1, 2], kinds[5, 6] = 1, 3
            save_png(root / mask, kinds)
        lines.append(f"{category},{split},{label},{image},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def save_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
