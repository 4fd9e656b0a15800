"""What a fit and its model cost as images and categories become many: time, memory, the size of the file.

Drawn textures of so many kinds, an image every time at another place, in other light and with other noise; small images
and one pass over them, so that what does not belong to training weighs as much as it ever will. Each setting runs in a
process of its own, one after the other.

    python benchmarks/bench_scale.py --images 1000 4000 16000 --categories 10
    python benchmarks/bench_scale.py --images 6000 --categories 10 100 300 --no-labels --detector VQFlowDetector
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import ndimage
from sklearn.metrics import adjusted_rand_score

import vqad

SIZE, N_NEW = 64, 500


def draw(n: int, n_kinds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 64, 64, 3) of some kinds in turn, and the kind of each."""
    rng, kind_rng = np.random.default_rng(seed), np.random.default_rng(12345)
    patterns = []
    for _ in range(n_kinds):
        blur = kind_rng.uniform(1, 6)
        noise = kind_rng.standard_normal((SIZE, SIZE, 3))
        pattern = np.stack([ndimage.gaussian_filter(noise[..., k], blur, mode="wrap") for k in range(3)], -1)
        patterns.append(pattern / pattern.std() * kind_rng.uniform(20, 50) + kind_rng.uniform(60, 190, 3))
    kind = np.arange(n) % n_kinds
    images = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for image, k in zip(images, kind):
        shifted = np.roll(patterns[k], rng.integers(-2, 3, 2), (0, 1)) * rng.uniform(0.9, 1.1)
        image[:] = (shifted + rng.normal(0, 6, (SIZE, SIZE, 1))).clip(0, 255)
    return images, kind


def peak_memory() -> float:
    """GB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(args: argparse.Namespace, n: int, n_kinds: int) -> None:
    images, kind = draw(n, n_kinds, seed=0)
    new, new_kind = draw(N_NEW, n_kinds, seed=1)
    before = peak_memory()
    detector = getattr(vqad, args.detector)(image_size=SIZE, max_iter=args.max_iter, random_state=0)
    started = time.perf_counter()
    detector.fit(images, category=kind if args.labels else None)
    fit, held = time.perf_counter() - started, peak_memory() - before
    started = time.perf_counter()
    normal = detector.predict(new) == 1
    score = time.perf_counter() - started
    started = time.perf_counter()
    detector.predict(new[:1])
    one = time.perf_counter() - started
    agreement = adjusted_rand_score(new_kind, detector.predict_category(new))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        vqad.save(detector, path)
        size = path.stat().st_size / 1e6
    print(
        f"{args.detector}, {n} images of {n_kinds} kinds, {'with' if args.labels else 'no'} labels: fit {fit:.0f} s, "
        f"{1e3 * fit / n:.1f} ms an image, {held:.2f} GB on top of the images' {before:.2f}; scoring "
        f"{1e3 * score / N_NEW:.1f} ms an image, {1e3 * one:.0f} ms alone; {len(detector.categories_)} categories "
        f"(adjusted Rand index {agreement:.3f}), false alarms {(~normal).mean():.1%}; saved {size:.0f} MB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="HVQTransDetector", choices=["HVQTransDetector", "VQFlowDetector"])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 4000])
    parser.add_argument("--categories", type=int, nargs="+", default=[10])
    parser.add_argument("--no-labels", dest="labels", action="store_false")
    parser.add_argument("--max-iter", type=int, default=1)
    args = parser.parse_args()
    if len(args.images) == len(args.categories) == 1:
        measure(args, args.images[0], args.categories[0])
        return
    for n in args.images:
        for n_kinds in args.categories:
            command = [sys.executable, __file__, "--images", n, "--categories", n_kinds, "--max-iter", args.max_iter]
            command += ["--detector", args.detector] + ([] if args.labels else ["--no-labels"])
            subprocess.run([str(word) for word in command], check=True)


if __name__ == "__main__":
    main()
