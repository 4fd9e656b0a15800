"""Check that thresholds keep their false-alarm rate with tiles, ignored regions and copies: 200 fits of each.

    python benchmarks/validity.py

Each fit uses other synthetic images, 19 of which are held out, for a rate of 10 %. In theory new normal images are
called anomalous with a probability of at most 2/20, however few images there are. It is less, because scores of
held-out images are standardised without themselves, which widens their tails. The backbone does not matter here, so a
trivial one is used. The script prints the share of false alarms with its standard error.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from vqad import HVQTransDetector
from vqad.images import check_images

RATE, N, HELD, NEW, SIDE = 0.1, 47, 19, 20, 48
SMALL = {
    "d_model": 8, "n_heads": 2, "n_layers": 1, "dim_feedforward": 8, "n_codes": 8, "max_iter": 1,
    "false_alarm_rate": RATE, "calibration_fraction": HELD / N,
}  # fmt: skip


class Blocks(TransformerMixin, BaseEstimator):
    """Mean, deviation and slopes of the blocks of a grid of 4 x 4."""

    def fit(self, X: Any, y: Any = None) -> Blocks:
        """Nothing is learned."""
        self.is_fitted_ = True
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Maps (n, 4, 4, 4)."""
        return np.stack([self._blocks(np.asarray(image).mean(2)) for image in X])

    def _blocks(self, grey: np.ndarray) -> np.ndarray:
        h, w = (side // 4 for side in grey.shape)
        cells = grey[: 4 * h, : 4 * w].reshape(4, h, 4, w).transpose(0, 2, 1, 3)
        across, down = np.diff(cells, axis=3), np.diff(cells, axis=2)
        parts = (cells.mean((2, 3)), cells.std((2, 3)), np.abs(across).mean((2, 3)), np.abs(down).mean((2, 3)))
        return np.stack(parts, -1).astype(np.float32)


def draw(n: int, rng: np.random.Generator) -> np.ndarray:
    """Grey noise of a brightness and contrast of its own on every image."""
    light, contrast = rng.normal(110, 12, (n, 1, 1)), rng.gamma(20, 1, (n, 1, 1))
    return (light + contrast * rng.standard_normal((n, SIDE, SIDE))).clip(0, 255).astype(np.uint8)


def plain(n: int, rng: np.random.Generator, learned: bool) -> tuple[Any, dict[str, Any]]:
    """Images seen as a whole."""
    return draw(n, rng), {}


def tiles(n: int, rng: np.random.Generator, learned: bool) -> tuple[Any, dict[str, Any]]:
    """Images in four tiles each."""
    return draw(n, rng), {"tiles": (32, 16)}


def fixed(n: int, rng: np.random.Generator, learned: bool) -> tuple[Any, dict[str, Any]]:
    """A half that is ignored, and in which there is something else on new images than on those learned from."""
    images = draw(n, rng)
    images[:, :, : SIDE // 2] = 0 if learned else 255
    mask = np.zeros((SIDE, SIDE), bool)
    mask[:, : SIDE // 2] = True
    return images, {"ignore": mask}


def moving(n: int, rng: np.random.Generator, learned: bool) -> tuple[Any, dict[str, Any]]:
    """A region of each image that is ignored, somewhere else each time."""
    images, masks = draw(n, rng), np.zeros((n, SIDE, SIDE), bool)
    for image, mask in zip(images, masks):
        top, left = rng.integers(0, SIDE // 2, 2)
        mask[top : top + SIDE // 2, left : left + SIDE // 2] = True
        image[mask] = 0 if learned else 255
    return check_images(images).ignoring([*masks]), {}


def copies(n: int, rng: np.random.Generator, learned: bool) -> tuple[Any, dict[str, Any]]:
    """Of each image learned from one to four near copies; new ones come once."""
    images = draw(n, rng)
    if learned:
        images = images[np.repeat(np.arange(n), rng.integers(1, 5, n))]
        images = (images + rng.integers(-1, 2, images.shape)).clip(0, 255).astype(np.uint8)
    return images, {}


KINDS: tuple[Callable[[int, np.random.Generator, bool], tuple[Any, dict[str, Any]]], ...] = (
    plain, tiles, fixed, moving, copies,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=200, help="of each kind (default: %(default)s)")
    parser.add_argument("--only", choices=[kind.__name__ for kind in KINDS])
    a = parser.parse_args()
    for kind in KINDS:
        if a.only not in (None, kind.__name__):
            continue
        started, alarms, held = time.monotonic(), [], set()
        for seed in range(a.fits):
            rng = np.random.default_rng(seed)
            X, told = kind(N, rng, True)
            detector = HVQTransDetector(backbone=Blocks(), random_state=seed, **SMALL, **told)
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "Of .* images .* are exact or near copies|.* of .* images are not used"
                )
                detector.fit(X, category=["part"] * len(X))
            held.add(len(detector.fitted_.held_out))
            alarms.append(float((detector.predict(kind(NEW, rng, False)[0]) == -1).mean()))
        error = np.std(alarms, ddof=1) / np.sqrt(a.fits)
        print(
            f"{kind.__name__:<7} {np.mean(alarms):.4f} false alarms, standard error {error:.4f}; {RATE} at most; "
            f"held out {sorted(held)}; {a.fits} fits in {time.monotonic() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
