"""Speed of VQ-Flow against a plain implementation of the published one, on the same backbone, side by side.

The plain step has the published sizes (512-wide concepts, 512 patterns, 2, 5 and 8 blocks, subnets as wide as their
input), writes the condition of every cell out and convolves it, runs in float32, and passes the images through the
backbone again in every step. Ours trains on features that were extracted once; at the default width, and at the
published one. Scoring is from pixels for all. The backbone is tf_efficientnet_lite0 at 224² with random weights, which
do not change the time.

    python benchmarks/bench_vq_flow.py --repeats 3
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from torch import nn

from vqad import BackboneFeatures, VQFlowDetector
from vqad.engine import chunk_size, native_precision, pick_device, side_by_side
from vqad.nn.fast.efficientnet import ready_network
from vqad.nn.vq_flow import VQFlow
from vqad.training import codebooks

BATCH, CHANNELS = 16, (24, 40, 112, 320)
SIZES = ("n_concepts", "n_patterns", "d_concept", "d_position", "n_blocks", "hidden")


def sizes(detector) -> dict:
    return {name: getattr(detector, name) for name in SIZES}


class System:
    """A model with its backbone, in one precision, trained from pixels or from features."""

    def __init__(self, model, device, dtype, plain):
        self.model, self.device, self.dtype, self.plain = model.to(device), device, dtype, plain
        self.backbone = BackboneFeatures(weights="random", stages=(1, 2, 3, 4), merge=False, device=device).fit()
        network = self.backbone.network_.to(device=device, memory_format=torch.channels_last)
        self.network = ready_network(network, torch.float32) if device.type == "cpu" and not plain else network
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=not plain)

    def extract(self, pixels):
        """Features in float32, as the detectors compute them."""
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return self.network(pixels)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def train(self, pixels, features):
        if self.plain:
            features = [m.clone() for m in self.extract(pixels)]
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.model.train().loss(features)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimizer.step()
        for codebook in codebooks(self.model):
            codebook.step()

    def score(self, pixels):
        self.model.eval()
        # Ours scores chunks of a fixed size, so that an image's score does not depend on its company, a core each.
        size = len(pixels) if self.plain else min(len(pixels), chunk_size(self.device, 49))

        prepared = self.model.ready()

        def some(rows):
            with torch.inference_mode(), self.autocast():
                for part in pixels[rows].split(size):
                    prepared.anomaly_map(self.extract(part.contiguous(memory_format=torch.channels_last)))
            return rows

        list(side_by_side(some, np.arange(len(pixels)), self.device, wanted=not self.plain))


def seconds(run, device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    native = native_precision(device)
    torch.manual_seed(0)
    published = sizes(VQFlowDetector.paper())
    systems = {
        "plain": System(VQFlow(CHANNELS, condition_path="convolution", **published), device, torch.float32, True),
        "vqad, published width": System(VQFlow(CHANNELS, **published), device, native, False),
        "vqad, default": System(VQFlow(CHANNELS, **sizes(VQFlowDetector())), device, native, False),
    }
    pixels = torch.randn(4 * BATCH, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    features = [m.clone() for m in systems["vqad, default"].extract(pixels[:BATCH])]
    for system in systems.values():
        system.model.initialise_codes([(features, None)])
    print(f"{device}, ours in {native}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, system in systems.items():
        print(f"{name}: {sum(p.numel() for p in system.model.parameters()) / 1e6:.1f} million parameters")
    jobs = {
        "training": (BATCH, lambda system: system.train(pixels[:BATCH], features)),
        "scoring": (len(pixels), lambda system: system.score(pixels)),
    }
    for job, (n, run) in jobs.items():
        for system in systems.values():
            run(system)
        rows = [[seconds(lambda s=s, run=run: run(s), device) for s in systems.values()] for _ in range(args.repeats)]
        for name, column in zip(systems, zip(*rows)):
            ratio = statistics.median(row[0] / t for row, t in zip(rows, column))
            print(
                f"{job}, {name}: {n / statistics.median(column):.2f} images/s, ratio {ratio:.2f} (median)", flush=True
            )


if __name__ == "__main__":
    main()
