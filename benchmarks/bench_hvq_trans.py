"""Speed of HVQ-Trans against a plain implementation of the published training step, side by side in one process.

The plain step is what the paper describes, written with torch's own layers: the frozen backbone runs again for
every batch, attention is ``torch.nn.MultiheadAttention``, and every image of the batch is quantised and updates its
category's codebooks on its own, all in float32. Ours trains on features that were extracted once. Both have the
published size: EfficientNet-B4 at 224², cut after the last stage that is needed, 272 channels on 14 x 14, d = 256, 4
layers, 512 codes, dropout 0.1, batch 16. Weights are random: they do not change the time. Scoring is from pixels for
both; ours passes one image at a time through one core of a CPU, as the detectors do. Freed memory is kept for both.

The machine may be busy otherwise: beside images a second, the best and the median of the repeats, stands the ratio of
the processor time that both take, on a CPU, which other programs disturb less.

    python benchmarks/bench_hvq_trans.py --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vqad.backbones import load_backbone
from vqad.engine import native_precision, pick_device, side_by_side
from vqad.nn.fast.efficientnet import ready_network
from vqad.nn.fast.memory import keep_freed_memory
from vqad.nn.fields import merge_maps
from vqad.nn.hvq_trans import HVQTrans
from vqad.training import codebooks

CHANNELS, GRID, WIDTH, LAYERS, HEADS, FEEDFORWARD, CODES, BATCH = 272, 14, 256, 4, 8, 1024, 512, 16
CATEGORIES = 15


def make_backbone() -> nn.Module:
    return load_backbone("tf_efficientnet_b4", "random", (0, 1, 2, 3)).requires_grad_(False)


def extract(backbone: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return merge_maps(backbone(pixels), (GRID, GRID))


class PlainLayer(nn.Module):
    """Post-norm layer with torch's attention: self, then cross when there is a memory, then feed-forward."""

    def __init__(self, width: int, cross: bool):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, dropout=0.1, batch_first=True)
        self.cross = nn.MultiheadAttention(width, HEADS, dropout=0.1, batch_first=True) if cross else None
        self.feedforward = nn.Sequential(
            nn.Linear(width, FEEDFORWARD), nn.ReLU(), nn.Dropout(0.1), nn.Linear(FEEDFORWARD, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, position, memory=None):
        q = x + position
        x = self.norms[0](x + self.dropout(self.attention(q, q, x)[0]))
        if self.cross is not None:
            x = self.norms[1](x + self.dropout(self.cross(x + position, memory + position, memory)[0]))
        return self.norms[2](x + self.dropout(self.feedforward(x)))


class PlainCodebook(nn.Module):
    """One codebook that looks up and follows one image at a time."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("embed", torch.randn(CODES, width))
        self.register_buffer("size", torch.zeros(CODES))
        self.register_buffer("average", self.embed.clone())

    def forward(self, x):
        distance = x.square().sum(1, keepdim=True) - 2 * x @ self.embed.T + self.embed.square().sum(1)
        index = distance.argmin(1)
        one_hot = F.one_hot(index, CODES).type(x.dtype)
        quantized = self.embed[index]
        if self.training:
            with torch.no_grad():
                self.size.mul_(0.99).add_(one_hot.sum(0), alpha=0.01)
                self.average.mul_(0.99).add_(one_hot.T @ x, alpha=0.01)
                n = self.size.sum()
                self.embed.copy_(self.average / ((self.size + 1e-5) / (n + CODES * 1e-5) * n).unsqueeze(1))
        return x + (quantized - x).detach(), F.mse_loss(quantized.detach(), x)


class PlainHVQTrans(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(CHANNELS, WIDTH)
        self.position = nn.Parameter(torch.randn(GRID * GRID, WIDTH))
        self.encoder = nn.ModuleList(PlainLayer(WIDTH, False) for _ in range(LAYERS))
        self.decoder = nn.ModuleList(PlainLayer(2 * WIDTH, True) for _ in range(LAYERS))
        self.books = nn.ModuleList(
            nn.ModuleList(PlainCodebook(WIDTH if j == LAYERS else 2 * WIDTH) for _ in range(CATEGORIES))
            for j in range(LAYERS + 1)
        )
        self.norm = nn.LayerNorm(2 * WIDTH)
        self.heads = nn.ModuleList(nn.Linear(2 * WIDTH, CHANNELS) for _ in range(CATEGORIES))

    def quantise(self, level, states, category):
        pairs = [self.books[level][c](x) for x, c in zip(states, category.tolist())]
        return torch.stack([q for q, _ in pairs]), torch.stack([loss for _, loss in pairs]).mean()

    def forward(self, features, category):
        cells = features.flatten(2).mT
        states = [self.project(cells)]
        for layer in self.encoder:
            states.append(layer(states[-1], self.position))
        top, commitment = self.quantise(LAYERS, states[-1], category)
        memory, first = [], None
        for j in reversed(range(LAYERS)):
            first = torch.cat([states[j], top], -1)
            quantized, loss = self.quantise(j, first, category)
            memory.append(quantized)
            commitment = commitment + loss
        x, position = memory[0], torch.cat([self.position, self.position], 1)
        for layer, m in zip(self.decoder, memory):
            x = layer(x, position, m)
        x = self.norm(x)
        rebuilt = torch.stack([self.heads[c](row) for row, c in zip(x, category.tolist())])
        return rebuilt, cells, commitment, first

    def loss(self, features, category):
        rebuilt, cells, commitment, _ = self(features, category)
        return F.mse_loss(rebuilt, cells) + 0.25 * commitment

    def anomaly_map(self, features, category):
        rebuilt, cells, _, z = self(features, category)
        codes = torch.stack([self.books[0][c].embed for c in category.tolist()])
        plan = (z @ codes.mT / CODES).softmax(-1)
        cost = 1 - F.normalize(z, dim=-1) @ F.normalize(codes, dim=-1).mT
        return (rebuilt - cells).norm(dim=-1) + 80 * (plan * cost).sum(-1)


def train_step(model, features, category, optimizer, device, dtype):
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = model.loss(features, category)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    for codebook in codebooks(model):
        codebook.step()


def seconds(run, device) -> tuple[float, float]:
    """Time on the clock and of the processor."""
    started, busy = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - busy


def compare(name, plain, ours, repeats, device) -> None:
    """Print images a second of both, run in turns."""
    plain(), ours()
    runs = [(seconds(plain, device), seconds(ours, device)) for _ in range(repeats)]
    (wall, busy), (our_wall, our_busy) = (list(zip(*column)) for column in zip(*runs))
    speeds = [
        f"{label} {BATCH / min(times):.2f} ({BATCH / statistics.median(times):.2f})"
        for label, times in (("plain", wall), ("vqad", our_wall))
    ]
    ratio = statistics.median(a / b for a, b in zip(wall, our_wall))
    line = f"{name}: images/s, best (median): {', '.join(speeds)}; ratio {ratio:.2f} (median)"
    if device.type == "cpu":
        line += f", of processor time {statistics.median(a / b for a, b in zip(busy, our_busy)):.2f}"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    dtype = native_precision(device)
    torch.manual_seed(0)
    pixels = torch.randn(BATCH, 3, 224, 224, device=device)
    category = torch.arange(BATCH, device=device) % CATEGORIES
    backbone = make_backbone().to(device)
    with torch.inference_mode():
        cached = extract(backbone, pixels).clone()

    def make_plain_training():
        plain = PlainHVQTrans().to(device).train()
        optimizer = torch.optim.AdamW(plain.parameters(), 1e-4, weight_decay=1e-4)

        def step():
            with torch.no_grad():
                features = extract(backbone, pixels)
            train_step(plain, features, category, optimizer, device, torch.float32)

        return step

    def make_training(dropout):
        ours = HVQTrans(CHANNELS, (GRID, GRID), CATEGORIES, dropout=dropout).to(device).train()
        ours.initialise_codes([(cached, category)])
        fused = device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(ours.parameters(), 1e-4, weight_decay=1e-4, fused=fused)
        return lambda: train_step(ours, cached.clone(), category, optimizer, device, dtype)

    def make_plain_scoring():
        plain = PlainHVQTrans().to(device).eval()

        @torch.inference_mode()
        def score():
            plain.anomaly_map(extract(backbone, pixels), category)

        return score

    def make_scoring():
        ours = HVQTrans(CHANNELS, (GRID, GRID), CATEGORIES).to(device).eval()
        size = 1 if device.type == "cpu" else BATCH
        # As in the detectors, the backbone computes in float32.
        network = ready_network(backbone, torch.float32) if device.type == "cpu" else backbone

        @torch.inference_mode()
        def score_some(rows):
            for part in torch.from_numpy(rows).split(size):
                features = extract(network, pixels[part].contiguous(memory_format=torch.channels_last))
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    ours.anomaly_map(features.float(), category[part], levels=[0])
            return rows

        return lambda: list(side_by_side(score_some, np.arange(BATCH), device))

    if device.type == "cpu":
        keep_freed_memory()
    print(f"device {device}, precision of ours {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    plain = make_plain_training()
    compare("training", plain, make_training(0.1), args.repeats, device)
    compare("training, ours without dropout", plain, make_training(0.0), args.repeats, device)
    compare("scoring", make_plain_scoring(), make_scoring(), args.repeats, device)


if __name__ == "__main__":
    main()
