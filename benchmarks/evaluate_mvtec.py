"""Accuracy of one model over several categories of a data set in MVTec layout.

Fits on the normal training images of all categories together, with the default parameters unless told otherwise, and
scores the test images without telling their categories. No test image is looked at before the model is done.

    python benchmarks/evaluate_mvtec.py ROOT --categories bottle screw --seed 0
    python benchmarks/evaluate_mvtec.py ROOT --set max_iter=48 d_model=192
"""

from __future__ import annotations

import argparse
import ast
import json
import time

import numpy as np

import vqad
from vqad.datasets import load_mvtec
from vqad.metrics import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root")
    parser.add_argument("--categories", nargs="+")
    parser.add_argument("--detector", default="HVQTransDetector")
    parser.add_argument("--no-labels", action="store_true", help="let fit discover the categories")
    parser.add_argument("--no-maps", action="store_true", help="image metrics only")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="parameters of the detector")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", help="write the fitted detector here (.safetensors)")
    parser.add_argument("--json", help="write the table here")
    args = parser.parse_args()

    train = load_mvtec(args.root, categories=args.categories)
    test = load_mvtec(args.root, categories=args.categories, split="test")
    parameters = {}
    for pair in args.set:
        name, value = pair.split("=", 1)
        parameters[name] = ast.literal_eval(value) if value[:1] not in "abcdefghijklmnopqrstuvwxyz/" else value
    detector = getattr(vqad, args.detector)(random_state=args.seed, verbose=1, **parameters)
    print(detector, flush=True)

    started = time.perf_counter()
    detector.fit(train, category=None if args.no_labels else train.category)
    fit_time = time.perf_counter() - started
    if args.save:
        vqad.save(detector, args.save)
    started = time.perf_counter()
    score = -detector.score_samples(test)
    score_time = time.perf_counter() - started
    found = detector.predict_category(test)
    predicted = detector.predict(test)
    maps = None if args.no_maps else detector.anomaly_map(test)

    result = evaluate(test.target, score, test.category, masks=None if maps is None else test.masks(), maps=maps)
    print(result)
    if args.no_labels:
        owner = {c: max(set(test.category[found == c]), key=list(test.category[found == c]).count) for c in set(found)}
        found = np.array([owner[c] for c in found])
        print(f"categories found: {len(detector.categories_)}")
    normal = test.target == 1
    print(f"category inferred right: {np.mean(found == test.category):.4f}")
    print(f"false alarms on normal test images: {np.mean(predicted[normal] == -1):.4f}")
    print(f"defects found: {np.mean(predicted[~normal] == -1):.4f}")
    print(f"fit {fit_time:.0f} s on {len(train)} images; scoring {len(test) / score_time:.1f} images/s")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({**result.to_dict(), "fit_seconds": fit_time, "parameters": parameters}, file, indent=1)


if __name__ == "__main__":
    main()
