"""Time and peak memory of the pixel metrics, beside scikit-learn's at a size that it can do.

Every metric runs in a process of its own. Memory is the peak of the process above what it held with the input
loaded; time is the median of the repeats. The input is synthetic: float32 maps of 512 x 512 pixels, 2 % of
them defect pixels in square regions that partly stand out, all scores practically distinct (the worst case).

    OMP_NUM_THREADS=1 python benchmarks/bench_metrics.py --pixels 1e8
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from vqad import metrics

SIDE = 512
Metric = Callable[[np.ndarray, np.ndarray], float]


def sklearn_f1_max(masks: np.ndarray, maps: np.ndarray) -> float:
    precision, recall, _ = precision_recall_curve(masks.ravel(), maps.ravel())
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


CANDIDATES: dict[str, dict[str, Metric]] = {
    "vqad": {
        "pixel_auroc": metrics.pixel_auroc,
        "pixel_average_precision": metrics.pixel_average_precision,
        "pixel_f1_max": metrics.pixel_f1_max,
        "aupro": metrics.aupro,
        "pixel_auroc from generators": lambda masks, maps: metrics.pixel_auroc(iter(masks), iter(maps)),
    },
    "scikit-learn": {
        "pixel_auroc": lambda masks, maps: float(roc_auc_score(masks.ravel(), maps.ravel())),
        "pixel_average_precision": lambda masks, maps: float(average_precision_score(masks.ravel(), maps.ravel())),
        "pixel_f1_max": sklearn_f1_max,
    },
}


def make_images(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks with a square of side 36, and some with six, in three images of four."""
    n = max(pixels // SIDE**2, 4)
    rng = np.random.default_rng(0)
    masks = np.zeros((n, SIDE, SIDE), bool)
    maps = np.empty(masks.shape, np.float32)
    for i in range(n):
        rng.standard_normal(out=maps[i], dtype=np.float32)
        for _ in range(i % 4 * 3):
            row, column = rng.integers(0, SIDE - 36, 2)
            masks[i, row : row + 36, column : column + 36] = True
        maps[i][masks[i]] += 1.5
    return masks, maps


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status (Linux); 0 elsewhere."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def measure(library: str, name: str, pixels: int, repeats: int) -> dict[str, float]:
    """Run one metric in this process."""
    masks, maps = make_images(pixels)
    metric = CANDIDATES[library][name]
    metric(masks[:4], maps[:4])  # imports and first-call work are not what is measured
    before = memory("VmRSS")
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # sets the peak back to the present
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        value = metric(masks, maps)
        seconds.append(time.perf_counter() - start)
    return {
        "pixels": masks.size,
        "defects": float(masks.mean()),
        "value": value,
        "seconds": statistics.median(seconds),
        "bytes": memory("VmHWM") - before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=float, default=1e8)
    parser.add_argument("--sklearn-pixels", type=float, default=1e7, help="most given to scikit-learn, 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs=2, metavar=("LIBRARY", "METRIC"), help="measure here, print JSON")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(*options.only, int(options.pixels), options.repeats)))
        return
    print(f"{'library':14}{'metric':30}{'pixels':>9}{'defects':>9}{'seconds':>9}{'peak MB':>9}  value")
    for library, candidates in CANDIDATES.items():
        pixels = options.pixels if library == "vqad" else min(options.pixels, options.sklearn_pixels)
        for name in candidates if pixels else ():
            command = [sys.executable, __file__, "--pixels", str(pixels), "--repeats", str(options.repeats)]
            run = subprocess.run([*command, "--only", library, name], check=True, stdout=subprocess.PIPE)
            row = json.loads(run.stdout)
            print(
                f"{library:14}{name:30}{row['pixels']:9.2g}{row['defects']:9.1%}{row['seconds']:9.2f}"
                f"{row['bytes'] / 1e6:9.0f}  {row['value']:.12f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
