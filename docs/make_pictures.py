"""Draw the README's picture from a model of `vqad demo`: python docs/make_pictures.py [MODEL] [--seed N] [--quick].

The cells are not chosen by hand: of each kind the picture shows the defective test cells at three quantiles of
the score, so that the least convincing are among them, and the sound one in the middle.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import vqad
from vqad.cli._arguments import DEMO_FOLDER
from vqad.datasets import load_elpv
from vqad.demo import DETECTOR_MODEL, FULL, QUICK, split_cells
from vqad.report import judge, overlay

PICTURE = Path(__file__).parent / "images" / "solar-cells.png"
DEFECTIVE_QUANTILES = (0.9, 0.5, 0.1)
SOUND_QUANTILE = 0.5
CELL_INCHES = 1.35
DPI = 120


def main() -> None:
    arguments = _arguments()
    detector = vqad.load(arguments.model)
    _, cells = split_cells(load_elpv(), QUICK if arguments.quick else FULL, arguments.seed)
    verdicts = judge(detector, cells)
    rows = [row for kind in np.unique(cells.category) for row in _chosen(cells, verdicts.score, kind)]
    figure = Figure(figsize=(CELL_INCHES * len(rows), CELL_INCHES * 2.42), layout="constrained")
    for axis, i in zip(figure.subplots(2, len(rows)).T, rows):
        pixels = cells[i]
        drawn = overlay(pixels, verdicts.anomaly_map(i, pixels.shape[:2]), detector.map_threshold_)
        truth = "sound" if cells.target[i] == 1 else "defective"
        judged = "normal" if verdicts.label[i] == 1 else "anomaly"
        axis[0].set_title(f"{verdicts.category[i]}, {truth}", fontsize=9)
        axis[0].imshow(pixels)
        axis[1].imshow(drawn)
        axis[1].set_xlabel(f"{judged}\nscore {verdicts.score[i]:.1f}, p = {verdicts.p_value[i]:.3f}", fontsize=8)
        for part in axis:
            part.set(xticks=[], yticks=[])
            part.spines[:].set_visible(False)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=DPI)
    print(f"picture written to {arguments.out}")


def _chosen(cells, score, kind) -> list[int]:
    """Rows of one kind: defective cells at the quantiles, then the sound one."""
    wanted = [(-1, q) for q in DEFECTIVE_QUANTILES] + [(1, SOUND_QUANTILE)]
    chosen = []
    for target, quantile in wanted:
        rows = np.flatnonzero((cells.category == kind) & (cells.target == target))
        chosen.append(int(rows[np.argsort(score[rows])[round(quantile * (len(rows) - 1))]]))
    return chosen


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", nargs="?", default=f"{DEMO_FOLDER}/{DETECTOR_MODEL.format('hvq-trans')}", help="of vqad demo"
    )
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--seed", type=int, default=0, help="as given to vqad demo")
    parser.add_argument("--quick", action="store_true", help="the model is that of vqad demo --quick")
    return parser.parse_args()


if __name__ == "__main__":
    main()
