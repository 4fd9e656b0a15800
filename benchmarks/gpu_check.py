"""Check that vqad works on this GPU, and how fast: one table in less than ten minutes, without any data.

The checks are independent; if one fails, the others still run:

- parity: a detector fitted on the CPU gives the same scores on the device;
- no synchronisation: training steps under ``torch.cuda.set_sync_debug_mode("error")``;
- repeatability: two fits with the same ``random_state`` under ``torch.use_deterministic_algorithms``;
- resuming: a fit in another process is killed and resumes from its checkpoint;
- out of memory: a training with limited memory continues with smaller batches;
- speed: training steps and scored images per second, at default and published sizes, with the share of the device's
  peak performance and the peak memory.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --device cpu --quick
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vqad import HVQTransDetector, VQFlowDetector
from vqad.datasets import make_textured_parts
from vqad.engine import Engine, lent
from vqad.nn.hvq_trans import HVQTrans
from vqad.nn.vq_flow import VQFlow
from vqad.training import Trainer, codebooks
from vqad.training_run import TrainingPlan

DETECTORS = (HVQTransDetector, VQFlowDetector)
# Dense floating-point operations a second that makers state, by a part of the device's name: bfloat16, float32.
PEAKS = {"H200": (989e12, 67e12), "H100": (989e12, 67e12), "A100": (312e12, 19.5e12), "L4": (121e12, 30e12)}
KILLED_FIT = """
import sys, warnings
warnings.simplefilter("ignore")
import vqad
from vqad.datasets import make_textured_parts
parts = make_textured_parts(n_normal=24, n_anomalous=0, image_size=64, random_state=0)
detector = vqad.VQFlowDetector(weights="random", image_size=64, max_iter=int(sys.argv[3]), hidden=16, n_patterns=16,
                               random_state=0, device=sys.argv[1], checkpoint_dir=sys.argv[2])
detector.fit(parts.images, category=parts.category)
print("loss", detector.loss_curve_[-1])
"""


def parts(n: int, size: int) -> Any:
    return make_textured_parts(n_normal=n, n_anomalous=2, image_size=size, categories=("disc", "weave"), random_state=0)


def small(detector: Any, **options: Any) -> Any:
    sizes = {"d_model": 32, "n_codes": 32} if detector is HVQTransDetector else {"hidden": 16, "n_patterns": 16}
    given = {"weights": "random", "image_size": 96, "max_iter": 2, "random_state": 0, "false_alarm_rate": 0.2}
    return detector(**{**given, **sizes, **options})


# ---- checks ----------------------------------------------------------------------------------------


def parity(device: torch.device, quick: bool) -> str:
    told = []
    for cls in DETECTORS:
        images = parts(16, 96)
        detector = small(cls, device="cpu").fit(images.images, category=images.category)
        here = detector.score_samples(images.images), detector.predict(images.images)
        detector.set_params(device=str(device), precision="float32")
        there = detector.score_samples(images.images), detector.predict(images.images)
        difference = float(np.abs(there[0] - here[0]).max())
        told.append(f"{cls.__name__} {difference:.1e}")
        assert difference < 0.05, f"scores differ by {difference}"
        assert (here[1] == there[1]).mean() > 0.98, "labels differ"
    return "largest difference of scores: " + ", ".join(told)


def no_waiting(device: torch.device, quick: bool) -> str:
    for name, (model, features, category) in models(device, quick).items():
        step = training_step(model, features, category, torch.bfloat16)
        step()
        with sync_is_an_error(device):
            step()
        del model, name
    return "no step of training waits for the device" if device.type == "cuda" else "not on a CPU"


def repeatability(device: torch.device, quick: bool) -> str:
    images, told = parts(16, 96), []
    for cls in DETECTORS:
        scores = []
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(2):
                    detector = small(cls, device=str(device)).fit(images.images, category=images.category)
                    scores.append(detector.score_samples(images.images))
        finally:
            torch.use_deterministic_algorithms(False)
        named = sorted({str(w.message).split(" ")[0] for w in caught if "determinis" in str(w.message)})
        told.append(f"{cls.__name__} {np.abs(scores[0] - scores[1]).max():.1e} {' '.join(named)}".strip())
    return "two fits differ by " + ", ".join(told)


def resume(device: torch.device, quick: bool) -> str:
    passes = "6" if quick else "60"
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as cut:
        command = [sys.executable, "-c", KILLED_FIT, str(device)]
        expected = loss_of(subprocess.run([*command, whole, passes], capture_output=True, text=True, check=True).stdout)
        process = subprocess.Popen([*command, cut, passes])
        deadline = time.monotonic() + 120
        while process.poll() is None and not list(Path(cut).iterdir()) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        got = loss_of(subprocess.run([*command, cut, passes], capture_output=True, text=True, check=True).stdout)
    assert abs(got - expected) < 0.05 * abs(expected) + 0.05, f"loss {got} in place of {expected}"
    return f"last loss {got:.5f}, uninterrupted {expected:.5f}"


def loss_of(printed: str) -> float:
    return float(printed.split("loss")[-1])


def lack_of_memory(device: torch.device, quick: bool) -> str:
    if device.type != "cuda":
        return "not on a CPU"
    model, features, category = models(device, quick)["HVQTrans default"]
    total = torch.cuda.get_device_properties(device).total_memory
    taken = torch.cuda.memory_allocated(device)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((taken + 2**28) / total, device)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            many = [f.repeat(8, 1, 1, 1) for f in features]
            log = trained(model, many, category.repeat(8), device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    halved = [str(w.message) for w in caught if "Out of device memory" in str(w.message)]
    assert np.isfinite(log.loss_curve).all()
    return halved[-1] if halved else "there was enough"


def speed(device: torch.device, quick: bool) -> str:
    lines = []
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,):
        for name, (model, features, category) in models(device, quick).items():
            step = training_step(model, features, category, dtype)
            lines.append(timed(f"{name}, training step, {dtype}", step, len(category), device, dtype))
    for cls in DETECTORS:
        n = 8 if quick else 512
        images = parts(n, 96 if quick else 288)
        given = {} if quick else {"image_size": 288, "d_model": 256} if cls is HVQTransDetector else {"image_size": 288}
        detector = small(cls, device=str(device), **given).fit(images.images[:16], category=images.category[:16])
        many = list(images.images)
        detector.score_samples(many[:32])
        for label, work, count in (
            ("many", lambda d=detector, m=many: d.score_samples(m), len(many)),
            ("one at a time", lambda d=detector, m=many: [d.score_samples(m[i : i + 1]) for i in range(8)], 8),
        ):
            lines.append(timed(f"{cls.__name__}, scoring {label}, arrays", work, count, device, None))
    return "\n" + "\n".join(lines)


# ---- how ---------------------------------------------------------------------------------------------


def models(device: torch.device, quick: bool) -> dict[str, tuple[nn.Module, list[torch.Tensor], torch.Tensor]]:
    """Models on the device with random features of a batch on the device."""
    torch.manual_seed(0)
    n = 4 if quick else 16
    category = torch.arange(n) % (2 if quick else 15)
    sizes = {
        "HVQTrans default": HVQTrans(
            152, (36, 36), 15, d_model=128, n_layers=2, dim_feedforward=256, dropout=0.0, patch_size=2,
            transport="nearest",
        ),
        "VQFlow default": VQFlow((24, 40, 112, 512), n_patterns=128, d_concept=64, d_position=32, hidden=64,
                                 n_blocks=(1, 2, 4)),
    }  # fmt: skip
    shapes = {"HVQTrans default": [(152, 36)], "VQFlow default": [(24, 72), (40, 36), (112, 18), (512, 9)]}
    if not quick:
        sizes["HVQTrans published"] = HVQTrans(272, (14, 14), 15)
        shapes["HVQTrans published"] = [(272, 14)]
        sizes["VQFlow published"] = VQFlow((128, 256, 512, 1024))
        shapes["VQFlow published"] = [(128, 96), (256, 48), (512, 24), (1024, 12)]
    made = {}
    for name, model in sizes.items():
        features = [torch.randn(n, c, side, side, device=device) for c, side in shapes[name]]
        with lent(model, device):
            model.start([(features[0] if len(features) == 1 else features, category)])
        made[name] = (model.to(device), features, category)
    return made


def training_step(model: nn.Module, features: list[Any], category: torch.Tensor, dtype: Any) -> Callable[[], None]:
    device = features[0].device
    engine = Engine(device, dtype if device.type == "cuda" else torch.float32)
    optimizer = torch.optim.AdamW(model.train().parameters(), 1e-4, fused=True)
    given = features[0] if len(features) == 1 else features

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with engine.autocast():
            loss = model.loss(given, category)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), model.clip_norm)
        optimizer.step()
        for codebook in codebooks(model):
            codebook.step()

    return step


class _Batch:
    def __init__(self, features: list[torch.Tensor]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features[0])

    def batch(self, indices: Any) -> Any:
        rows = torch.as_tensor(indices).to(self.features[0].device)
        chosen = [f.index_select(0, rows) for f in self.features]
        return chosen[0] if len(chosen) == 1 else chosen


def trained(model: nn.Module, features: list[torch.Tensor], category: torch.Tensor, device: torch.device) -> Any:
    plan = TrainingPlan(max_iter=2, batch_size=len(category), learning_rate=1e-4)
    return Trainer(model, _Batch(features), category, plan, device=device).fit(torch.arange(len(category)))


@contextmanager
def sync_is_an_error(device: torch.device) -> Any:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def timed(name: str, work: Callable[[], Any], n: int, device: torch.device, dtype: Any) -> str:
    """Images a second, the median of five, with share of the peak and memory where they can be told."""
    on_cuda = device.type == "cuda"
    work()
    told = ""
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    if dtype is not None:
        with FlopCounterMode(display=False) as counter:
            work()
        told = f"{counter.get_total_flops() / n / 1e9:8.2f} GFLOP an image"
    seconds = []
    for _ in range(5):
        if on_cuda:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if on_cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    rate = n / float(np.median(seconds))
    if on_cuda:
        memory = torch.cuda.max_memory_allocated(device) / 2**30
        peak = next((p for part, p in PEAKS.items() if part in torch.cuda.get_device_name(device)), None)
        if dtype is not None and peak is not None:
            share = counter.get_total_flops() / n * rate / peak[0 if dtype == torch.bfloat16 else 1]
            told += f"  {100 * share:5.1f} % of the peak"
        told += f"  {memory:5.1f} GiB"
    return f"  {name:52s} {rate:10.1f} images/s  {told}"


CHECKS = {
    "parity with the CPU": parity,
    "no waiting in a step": no_waiting,
    "repeatability": repeatability,
    "going on after a kill": resume,
    "lack of memory": lack_of_memory,
    "speed": speed,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that the script works")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    args = parser.parse_args(argv)
    device = Engine.pick(args.device).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}, CUDA {torch.version.cuda}", flush=True)
    failed = 0
    for title in args.only:
        started = time.perf_counter()
        try:
            outcome = CHECKS[title](device, args.quick)
        except Exception as error:  # the others are still to be seen
            failed += 1
            outcome = f"FAILED: {type(error).__name__}: {error}"
        print(f"{title} ({time.perf_counter() - started:.0f} s): {outcome}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
