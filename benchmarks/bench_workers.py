"""Scoring many images in one process and on workers: same scores, models sent, memory and time.

    python benchmarks/bench_workers.py --images 5000 --engines loky dask ray

Images of 64 pixels and a small backbone of random weights, so that what it costs to hand images over shows: with the
default backbone an image takes some twenty times as long, and the same handing over.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import joblib
import numpy as np
from PIL import Image

import vqad.workers
from vqad import HVQTransDetector
from vqad.datasets import make_textured_parts
from vqad.workers import map_in_order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engines", nargs="+", default=["loky", "dask", "ray"])
    parser.add_argument("--backbone", default="test_efficientnet")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), arguments.images)
        detector = fitted(arguments.backbone)
        content = vqad.workers._packed(detector.scorer_, detector.features_)[1]
        print(json.dumps({"images": len(paths), "model_bytes": content.nbytes}), flush=True)
        for engine in arguments.engines:
            with cluster(engine, arguments.workers) as config:
                measure(detector, paths, engine, config)


def write_images(folder: Path, n: int) -> list[str]:
    parts = make_textured_parts(50, 14, categories=("disc",), image_size=64, random_state=1).images
    paths = [str(folder / f"{k:06d}.png") for k in range(n)]
    for k, path in enumerate(paths):
        Image.fromarray(np.roll(parts[k % len(parts)], k // len(parts), axis=1)).save(path)
    return paths


def fitted(backbone: str) -> HVQTransDetector:
    parts = make_textured_parts(60, 0, categories=("disc",), image_size=64, random_state=0)
    weights = "random" if backbone.startswith("test_") else None
    made = HVQTransDetector(backbone=backbone, weights=weights, image_size=64, max_iter=1, random_state=0)
    return made.fit(parts.images)


def measure(detector: HVQTransDetector, paths: list[str], engine: str, config: dict) -> None:
    """One process and the workers, which take turns with the same images."""
    seen = []

    def noted(*args):
        for done in map_in_order(*args):
            seen.append(done)
            yield done

    vqad.workers.map_in_order = noted
    detector.score_samples(paths[:64])
    with joblib.parallel_config(**config):  # workers start, import and open the model
        detector.score_samples(paths[:256])
    first = {done.worker: done.n_opened for done in seen}
    times: dict[str, list[float]] = {"one process": [], "workers": []}
    for _ in range(2):
        started = time.perf_counter()
        alone = detector.score_samples(paths)
        times["one process"].append(time.perf_counter() - started)
        seen.clear()
        started = time.perf_counter()
        with joblib.parallel_config(**config):
            shared = detector.score_samples(paths)
        times["workers"].append(time.perf_counter() - started)
    opened = {done.worker: done.n_opened for done in seen}
    vqad.workers.map_in_order = map_in_order
    memory = [peak_megabytes(int(worker.split()[-1])) for worker in opened]
    result = {
        "engine": engine, "seconds": times, "ratio": min(times["workers"]) / min(times["one process"]),
        "largest_difference": float(np.abs(alone - shared).max()), "tasks": len(seen),
        "models_opened_by_each_worker": sorted(opened.values()), "after_the_first_call": sorted(first.values()),
        "peak_megabytes_of_each_worker": memory,
        "peak_megabytes_here": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip
    print(json.dumps(result), flush=True)


def peak_megabytes(pid: int) -> int | None:
    """Peak resident memory of another process, of Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), None)


class cluster:
    """Workers of an engine on this machine, one thread each."""

    def __init__(self, engine: str, workers: int) -> None:
        self.engine, self.workers = engine, workers

    def __enter__(self) -> dict:
        if self.engine == "dask":
            from distributed import Client

            self.client = Client(n_workers=self.workers, threads_per_worker=1, dashboard_address=None)
            return {"backend": "dask"}
        if self.engine == "ray":
            os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
            import ray
            from ray.util.joblib import register_ray

            ray.init(num_cpus=self.workers, include_dashboard=False, log_to_driver=False)
            register_ray()
        return {"backend": self.engine, "n_jobs": self.workers}

    def __exit__(self, *error: object) -> None:
        if self.engine == "dask":
            self.client.close()
        elif self.engine == "ray":
            import ray

            ray.shutdown()


if __name__ == "__main__":
    main()
