"""How well a category of few images is learned, by defects that are planted into those of them that were left out.

The normal training images of one category are cut into five blocks, in the order of the numbers in their names, so that
neighbours, which often show the same piece, stay together. In turn a detector learns all blocks but one, and is asked
to tell the images of that one from copies with a planted defect: small ones (radii of 2 to 20 percent of the side) and
large ones (12 to 30 percent), four of each an image. Test images play no part.

    python benchmarks/few_images.py ROOT cookie --detector VQFlowDetector --folds 0 2 4 --set max_iter=80
"""

from __future__ import annotations

import argparse
import ast
import re

import numpy as np
from planted_defects import plant, plant_large

import vqad
from vqad.datasets import load_mvtec
from vqad.images import check_images
from vqad.metrics import image_auroc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("category")
    parser.add_argument("--detector", default="VQFlowDetector")
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters of the detector")
    args = parser.parse_args()
    parameters = {name: ast.literal_eval(value) for name, value in (pair.split("=", 1) for pair in args.set)}

    images = check_images(load_mvtec(args.root, categories=[args.category]))
    pixels = [images.pixels(i) for i in range(len(images))]
    order = sorted(range(len(images)), key=lambda i: int(re.findall(r"\d+", images.name(i))[-1]))
    blocks = np.array_split(order, 5)
    rows = []
    for fold in args.folds:
        left_out = set(blocks[fold].tolist())
        detector = getattr(vqad, args.detector)(random_state=fold, false_alarm_rate=0.2, **parameters)
        detector.fit(
            [pixels[i] for i in order if i not in left_out], category=[args.category] * (len(order) - len(left_out))
        )
        normal, small, large = [pixels[i] for i in blocks[fold]], [], []
        for i in blocks[fold]:
            rng = np.random.default_rng(1000 + i)
            for copies, make in ((small, plant), (large, plant_large)):
                copies += [make(pixels[i].astype(float), rng).astype(np.float32) for _ in range(4)]
        score = {
            name: -detector.score_samples(x) for name, x in (("normal", normal), ("small", small), ("large", large))
        }
        rows.append(
            [
                image_auroc(
                    np.repeat([1, -1], [len(normal), len(score[size])]), np.append(score["normal"], score[size])
                )
                for size in ("small", "large")
            ]
        )
        print(
            f"block {fold}: image AUROC of small defects {rows[-1][0]:.3f}, of large ones {rows[-1][1]:.3f}", flush=True
        )
    small, large = np.mean(rows, 0)
    print(f"mean: small {small:.3f}, large {large:.3f}")


if __name__ == "__main__":
    main()
