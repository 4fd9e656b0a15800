"""Time of a grid search with and without features kept on disk: 6 candidates, 3 folds, and the fit on everything.

Draws textured parts, writes them to image files, and searches over the files twice, each time with the same detector,
candidates and folds: once without ``memory``, once with one that is empty at first. Counts images that pass the
backbone.

    OMP_NUM_THREADS=1 python benchmarks/bench_search.py
    python benchmarks/bench_search.py --normal 200 --anomalous 40 --image-size 224 --max-iter 8
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.model_selection import GridSearchCV

import vqad
from vqad.datasets import ImageDataset, make_textured_parts
from vqad.features import BackboneFeatures
from vqad.model_selection import InlierKFold, image_auroc_scorer

GRID = {"learning_rate": [1e-3, 4e-3], "weight_decay": [1e-5, 1e-4, 1e-3]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", default="HVQTransDetector")
    parser.add_argument("--normal", type=int, default=60, help="images without a defect")
    parser.add_argument("--anomalous", type=int, default=12, help="images with one")
    parser.add_argument("--image-size", type=int, default=128, help="pixels, of the files and for the backbone")
    parser.add_argument("--max-iter", type=int, default=2, help="passes of each fit")
    args = parser.parse_args()
    parts = make_textured_parts(args.normal, args.anomalous, image_size=args.image_size, random_state=0)
    detector = getattr(vqad, args.detector)(image_size=args.image_size, max_iter=args.max_iter, random_state=0)
    passed = count_images()
    with tempfile.TemporaryDirectory() as folder:
        images = write(Path(folder), parts)
        detector.set_params(max_iter=1).fit(images, images.target).score_samples(images)  # warms up
        detector.set_params(max_iter=args.max_iter)
        print(f"{args.detector}, {args.normal} normal and {args.anomalous} defective images, {args.image_size} pixels")
        print(f"{'memory':<10}{'seconds':>10}{'images through the backbone':>30}{'best AUROC':>12}")
        found = []
        for name, memory in (("none", None), ("on disk", Path(folder, "memory"))):
            passed.clear()
            search = GridSearchCV(
                detector.set_params(memory=memory), GRID, scoring=image_auroc_scorer,
                cv=InlierKFold(3, random_state=0), error_score="raise",
            )  # fmt: skip
            started = time.perf_counter()
            search.fit(images, images.target)
            seconds = time.perf_counter() - started
            found.append((seconds, search.cv_results_["mean_test_score"]))
            print(f"{name:<10}{seconds:>10.1f}{sum(passed):>30}{search.best_score_:>12.3f}", flush=True)
    (without, scores), (with_memory, scores_with) = found
    print(f"{without / with_memory:.2f} times as fast; scores identical: {np.array_equal(scores, scores_with)}")


def count_images() -> list[int]:
    """A list that grows by the number of images of every call of a backbone from now on."""
    passed: list[int] = []
    maps = BackboneFeatures._maps

    def counted(self, network, pixels, dtype):
        passed.append(len(pixels))
        return maps(self, network, pixels, dtype)

    BackboneFeatures._maps = counted
    return passed


def write(folder: Path, parts) -> ImageDataset:
    paths = [folder / f"{k}.png" for k in range(len(parts.images))]
    for path, image in zip(paths, parts.images):
        Image.fromarray(image).save(path)
    return ImageDataset(paths, target=parts.target)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*too few for false_alarm_rate")
    main()
