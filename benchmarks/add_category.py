"""Measure what adding a category to a fitted model costs the others and gains, compared with one fit on all.

Fits on some categories of a data set in MVTec layout, adds another with partial_fit, and scores the test images.

    python benchmarks/add_category.py ROOT --first bottle screw --then magnetic_tile
    python benchmarks/add_category.py ROOT --first bottle --then screw --set max_iter=4 d_model=64 --memory cache
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import vqad
from vqad.cli._arguments import assignment
from vqad.datasets import load_mvtec
from vqad.metrics import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--first", nargs="+", required=True, help="categories that fit learns")
    parser.add_argument("--then", nargs="+", required=True, help="categories that partial_fit adds")
    parser.add_argument("--detector", default="HVQTransDetector")
    parser.add_argument("--set", nargs="*", type=assignment, default=[], metavar="NAME=VALUE",
                        help="parameters of the detector")  # fmt: skip
    parser.add_argument("--memory", help="folder to keep features in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-reference", action="store_true", help="leave out the fit on all categories")
    args = parser.parse_args()

    make = getattr(vqad, args.detector)
    options = {"random_state": args.seed, "memory": args.memory, "verbose": 1, **dict(args.set)}
    first, then = (load_mvtec(args.root, categories=names) for names in (args.first, args.then))
    test = load_mvtec(args.root, categories=[*args.first, *args.then], split="test")
    old = np.isin(test.category, args.first)

    detector = make(**options)
    timed("fit", len(first), lambda: detector.fit(first, category=first.category))
    routed, scores = detector.predict_category(test), detector.score_samples(test)
    timed("partial_fit", len(then), lambda: detector.partial_fit(then, category=then.category))
    routed_after, scores_after = detector.predict_category(test), detector.score_samples(test)

    stays = routed_after == routed
    print(f"of {old.sum()} test images of known categories {(~stays & old).sum()} are now judged as another category")
    moved = stays & old & (scores != scores_after)
    print(f"of the others {moved.sum()} have another score")
    report("added with partial_fit", test, scores_after, routed_after)
    if not args.no_reference:
        everything = first + then
        reference = make(**options)
        timed("fit on all", len(everything), lambda: reference.fit(everything, category=everything.category))
        report("fitted on all", test, reference.score_samples(test), reference.predict_category(test))


def timed(name: str, n: int, work) -> None:
    started = time.perf_counter()
    work()
    print(f"{name}: {n} images, {time.perf_counter() - started:.0f} s", flush=True)


def report(name: str, test, scores: np.ndarray, routed: np.ndarray) -> None:
    print(f"\n{name}; category inferred correctly: {np.mean(routed == test.category):.4f}")
    print(evaluate(test.target, -scores, test.category), flush=True)


if __name__ == "__main__":
    main()
