"""Time of a training step against the number of categories, side by side in one process.

Every batch holds 16 images of as many categories as there are (at most 16). Codebooks and heads of categories that are
not in a batch take no part in its step.

    python benchmarks/bench_categories.py --categories 2 16 64 256
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from vqad.nn.hvq_trans import HVQTrans

CHANNELS, GRID, BATCH = 152, 28, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--categories", type=int, nargs="+", default=[2, 64])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    features = torch.randn(BATCH, CHANNELS, GRID, GRID)
    runs = {}
    for n in args.categories:
        model = HVQTrans(
            CHANNELS, (GRID, GRID), n, d_model=128, n_layers=2, dim_feedforward=256, dropout=0.0, patch_size=2,
            transport="nearest",
        ).train()  # fmt: skip
        runs[n] = (model, torch.optim.AdamW(model.parameters(), 1e-3), torch.arange(BATCH) % n, [])
    for repeat in range(args.repeats + 1):
        for model, optimizer, category, seconds in runs.values():
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            model.loss(features, category).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            for codebook in model.quantizers:
                codebook.step()
            if repeat:  # the first round warms up
                seconds.append(time.perf_counter() - started)
    first = next(iter(runs.values()))[3]
    for n, (*_, seconds) in runs.items():
        ratio = statistics.median(b / a for a, b in zip(first, seconds))
        print(f"{n:4d} categories: median {statistics.median(seconds):.3f} s a step, {ratio:.2f} times the first")


if __name__ == "__main__":
    main()
