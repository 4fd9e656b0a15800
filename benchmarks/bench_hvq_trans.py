"""Speed of HVQ-Trans against a plain implementation of the published training step, side by side in one process.

The plain step is what the paper describes, written with torch's own layers: the frozen backbone runs again for
every batch, attention is ``torch.nn.MultiheadAttention``, and every image of the batch is quantised and updates its
category's codebooks on its own. Ours trains on features that were extracted once. Both have the published size:
EfficientNet-B4 at 224², 272 channels on 14 x 14, d = 256, 4 layers, 512 codes, dropout 0.1, batch 16. Weights are
random: they do not change the time. Scoring is from pixels for both.

    python benchmarks/bench_hvq_trans.py --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
import torch.nn.functional as F
from torch import nn

from vqad.nn.hvq_trans import HVQTrans
from vqad.training import native_precision, pick_device

CHANNELS, GRID, WIDTH, LAYERS, HEADS, FEEDFORWARD, CODES, BATCH = 272, 14, 256, 4, 8, 1024, 512, 16
CATEGORIES = 15


def make_backbone() -> nn.Module:
    network = timm.create_model("tf_efficientnet_b4", features_only=True, out_indices=(0, 1, 2, 3))
    return network.eval().requires_grad_(False)


def extract(backbone: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    maps = backbone(pixels)
    return torch.cat([F.interpolate(m, (GRID, GRID), mode="bilinear", align_corners=True) for m in maps], 1)


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


def seconds(run, device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


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
    slow_backbone, backbone = make_backbone().to(device), make_backbone().to(device)
    backbone = backbone.to(memory_format=torch.channels_last)
    plain = PlainHVQTrans().to(device)
    ours = HVQTrans(CHANNELS, (GRID, GRID), CATEGORIES, transport="conditional").to(device)
    with torch.inference_mode():
        cached = extract(slow_backbone, pixels).clone()
    ours.initialise_codes([(cached.cpu(), category.cpu())] if device.type == "cpu" else [(cached, category)])
    optimizers = {m: torch.optim.AdamW(m.parameters(), 1e-4, weight_decay=1e-4) for m in (plain, ours)}

    def plain_train():
        with torch.no_grad():
            features = extract(slow_backbone, pixels)
        train_step(plain.train(), features, category, optimizers[plain], device, torch.float32)

    def ours_train():
        train_step(ours.train(), cached.clone(), category, optimizers[ours], device, dtype)

    @torch.inference_mode()
    def plain_score():
        plain.eval().anomaly_map(extract(slow_backbone, pixels), category)

    @torch.inference_mode()
    def ours_score():
        ours.eval()
        size = 1 if device.type == "cpu" else BATCH
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            for x, c in zip(pixels.split(size), category.split(size)):
                features = extract(backbone, x.contiguous(memory_format=torch.channels_last))
                ours.anomaly_map(features.float(), c, levels=[0])

    print(f"device {device}, precision of ours {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, first, second in (("training", plain_train, ours_train), ("scoring", plain_score, ours_score)):
        first(), second()
        pairs = [(seconds(first, device), seconds(second, device)) for _ in range(args.repeats)]
        a, b = (statistics.median(column) for column in zip(*pairs))
        ratio = statistics.median(x / y for x, y in pairs)
        print(f"{name}: plain {BATCH / a:.2f} images/s, vqad {BATCH / b:.2f} images/s, ratio {ratio:.2f} (median)")


if __name__ == "__main__":
    main()
