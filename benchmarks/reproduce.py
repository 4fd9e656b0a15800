"""Run a published configuration on MVTec AD or VisA, and print its results next to the paper's.

One model of all categories is fitted on the normal training images; HVQ-Trans is told their categories, as in the
paper, and VQ-Flow is not. The test images are scored without labels. An interrupted run resumes when the same command
is given again: features and training are kept in ``--keep``.

The papers' backbones have no weight package: give a file, or let timm's hub download them.

    python benchmarks/reproduce.py ROOT --detector hvq_trans --weights hub
    python benchmarks/reproduce.py ROOT --detector vq_flow --weights convnextv2_base.safetensors --out vq_flow.json
    python benchmarks/reproduce.py ROOT --detector vq_flow --data visa --weights hub
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vqad
from vqad import HVQTransDetector, VQFlowDetector
from vqad.cli._arguments import assignment
from vqad.datasets import load_mvtec, load_visa
from vqad.images import check_images
from vqad.metrics import evaluate

DETECTORS = {"hvq_trans": HVQTransDetector, "vq_flow": VQFlowDetector}
KNOW_CATEGORIES = ("hvq_trans",)
DATA = {"mvtec": load_mvtec, "visa": load_visa}
# Image and pixel AUROC, averaged over the categories, as stated in the abstracts.
PUBLISHED = {("hvq_trans", "mvtec"): (0.980, 0.973), ("vq_flow", "mvtec"): (0.995, 0.983)}
METRICS = ("image_auroc", "pixel_auroc", "aupro")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    args = parsed(argv)
    train, test = (DATA[args.data](args.root, split=split) for split in ("train", "test"))
    Path(args.keep).mkdir(parents=True, exist_ok=True)
    detector = DETECTORS[args.detector].paper(
        **{
            "weights": args.weights, "random_state": args.seed, "verbose": 1, "n_jobs": args.n_jobs,
            "memory": str(Path(args.keep) / "features"), "checkpoint_dir": str(Path(args.keep) / "training"),
            **dict(args.set_params),
        }
    )  # fmt: skip
    print(f"{detector}\n{len(train)} images to learn, {len(test)} to judge", flush=True)
    model = Path(args.keep) / f"{args.detector}.safetensors"
    seconds = fitted_and_saved(detector, train, args.detector in KNOW_CATEGORIES, model)
    started = time.perf_counter()
    judged = vqad.load(model).set_params(verbose=1).judge(test)
    judging = time.perf_counter() - started
    rows = table_of(judged, test)
    print(text(rows, PUBLISHED.get((args.detector, args.data))))
    print(f"fit {seconds:.0f} s, scored {len(test) / judging:.1f} images/s, torch {torch.__version__}, {where()}")
    if args.out:
        record = {"arguments": vars(args), "rows": rows, "fit_seconds": seconds, "versions": {"vqad": vqad.__version__}}
        Path(args.out).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return rows


def fitted_and_saved(detector: Any, train: Any, knows: bool, path: Path) -> float:
    """Fit, unless an earlier run has done so; returns the seconds spent now."""
    if path.exists():
        print(f"using the existing model {path}", flush=True)
        return 0.0
    started = time.perf_counter()
    detector.fit(train, category=train.category if knows else None)
    vqad.save(detector, path)
    return time.perf_counter() - started


def table_of(judged: Any, test: Any) -> dict[str, dict[str, float]]:
    """Metrics of each category and their mean, one category at a time because all maps may not fit into memory."""
    rows = {}
    for name in dict.fromkeys(test.category.tolist()):
        own = np.flatnonzero(test.category == name)
        images = test[own]
        data = check_images(images)
        maps = [judged.anomaly_map(int(i), data.size(k)) for k, i in enumerate(own)]
        found = evaluate(images.target, judged.score[own], masks=images.masks(), maps=maps).mean
        rows[name] = {metric: float(found[metric]) for metric in METRICS}
    rows["mean"] = {metric: float(np.mean([row[metric] for row in rows.values()])) for metric in METRICS}
    return rows


def text(rows: dict[str, dict[str, float]], published: tuple[float, float] | None) -> str:
    """The rows as a table, followed by the published figures."""
    width = max(map(len, [*rows, "published"]))
    lines = [f"{'':{width}}  image AUROC  pixel AUROC  AUPRO"]
    for name, row in rows.items():
        image, pixel, pro = (row[metric] for metric in METRICS)
        lines.append(f"{name:{width}}  {image:11.3f}  {pixel:11.3f}  {pro:5.3f}")
    if published:
        lines.append(f"{'published':{width}}  {published[0]:11.3f}  {published[1]:11.3f}      -")
    return "\n".join(lines)


def where() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="the data set's folder")
    parser.add_argument("--detector", choices=DETECTORS, required=True)
    parser.add_argument("--data", choices=DATA, default="mvtec", help="layout of the folder (%(default)s)")
    parser.add_argument("--weights", help="file with the backbone's weights, or 'hub'")
    parser.add_argument(
        "--keep", default="reproduce-kept", help="folder for features, checkpoints and model (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-jobs", type=int, default=None, help="threads that read images ahead")
    parser.add_argument("--set-params", nargs="+", type=assignment, default=[], metavar="NAME=VALUE",
                        help="parameters that replace published ones")  # fmt: skip
    parser.add_argument("--out", metavar="FILE", help="write all numbers here as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
