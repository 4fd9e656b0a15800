"""Fuzz vqad with damaged and hostile image files, model files, checkpoints and command lines.

    python benchmarks/fuzz.py [--images N] [--models N] [--checkpoints N] [--commands N] [--seed N]

An input fails if it raises anything but a documented error, takes more than 10 s, adds more than 1 GB to the memory of
the process, or ends the process. Each input has a number, from which it can be reproduced with --seed and --first. Each
kind of input runs in its own process.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import resource
import signal
import struct
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SECONDS, MEGABYTES = 10, 1000
TOLD = (ValueError, TypeError, OSError, ImportError)
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "TGA", "PCX", "SGI", "ICO", "JPEG2000", "DDS")
MODES = ("L", "RGB", "RGBA", "P", "I;16", "LA", "CMYK", "1", "F", "I")
EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, moved, repeated or left out, numbers at the edge of their range above all."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 8))):
        if not data:
            return b"\0"
        # Headers decide most: half of all changes are near the beginning.
        place = int(rng.integers(0, min(len(data), 64) if rng.random() < 0.5 else len(data)))
        match int(rng.integers(0, 6)):
            case 0:
                data[place] ^= 1 << int(rng.integers(0, 8))
            case 1:
                size = int(rng.choice([1, 2, 4, 8]))
                value = int(EDGES[int(rng.integers(0, len(EDGES)))]) % 2 ** (8 * size)
                data[place : place + size] = value.to_bytes(size, "little" if rng.random() < 0.5 else "big")
            case 2:
                del data[place : place + int(rng.integers(1, 64))]
            case 3:
                data[place:place] = rng.bytes(int(rng.integers(1, 32)))
            case 4:
                del data[place:]
            case 5:
                start = int(rng.integers(0, len(data)))
                data[place:place] = data[start : start + int(rng.integers(1, 256))]
    return bytes(data)


# ---- images --------------------------------------------------------------------------------------


def image_files() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    made = []
    for kind in FORMATS:
        for mode in MODES:
            image = Image.fromarray(pixels)
            out = io.BytesIO()
            with contextlib.suppress(Exception):
                image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
                image.save(out, kind)
                made.append(out.getvalue())
    for kind, more in (
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("PNG", {"exif": True}),
    ):
        exif = Image.Exif()
        exif[0x0112] = 6
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, kind, **{k: exif if v is True else v for k, v in more.items()})
        made.append(out.getvalue())
    return made


def try_images(folder: Path) -> Callable[[np.random.Generator], None]:
    from vqad.images import check_images

    files = image_files()

    def attempt(rng: np.random.Generator) -> None:
        content = mutated(files[int(rng.integers(0, len(files)))], rng)
        item: Any = content
        if rng.random() < 0.5:
            item = str(folder / "image.png")
            Path(item).write_bytes(content)
        data = check_images([item])
        data.size(0)
        data.load([0], (16, 16))
        data.pixels(0)

    return attempt


# ---- models --------------------------------------------------------------------------------------


def fitted_detectors() -> list[Any]:
    from vqad import HVQTransDetector, VQFlowDetector

    rows = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    options = {"backbone": None, "max_iter": 1, "false_alarm_rate": 0.2, "random_state": 0}
    return [
        HVQTransDetector(d_model=8, n_codes=4, n_layers=1, n_heads=2, **options).fit(rows),
        VQFlowDetector(n_concepts=2, n_patterns=4, n_blocks=(1, 1, 1), hidden=8, **options).fit(rows),
    ]


def with_valid_checksum(content: bytes) -> bytes:
    """The file with the checksum of its content, as somebody would make it who means harm."""
    import safetensors.torch

    from vqad.persistence import _checksum

    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    metadata["checksum"] = _checksum(metadata, safetensors.torch.load(content))
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + content[8 + length :]


def changed_in_json(content: bytes, rng: np.random.Generator) -> bytes:
    """Values in the description of a detector replaced by others, of another kind or size."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    description = json.loads(header["__metadata__"]["detector"])
    places = list(walk(description))
    values = [None, True, -1, 0, 10**9, 2**70, 1.5, float("inf"), "", "x" * 100, [], {}, [1, 2], {"a": 1}]
    for _ in range(int(rng.integers(1, 4))):
        holder, key = places[int(rng.integers(0, len(places)))]
        with contextlib.suppress(LookupError, TypeError):
            other, its = places[int(rng.integers(0, len(places)))]
            holder[key] = values[int(rng.integers(0, len(values)))] if rng.random() < 0.7 else other[its]
    with contextlib.suppress(ValueError, RecursionError):  # what holds itself is no JSON
        header["__metadata__"]["detector"] = json.dumps(description)
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + content[8 + length :]


def walk(value: Any) -> Any:
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from walk(value[key])


def try_models(folder: Path) -> Callable[[np.random.Generator], None]:
    import vqad

    files = []
    for k, detector in enumerate(fitted_detectors()):
        vqad.save(detector, folder / f"{k}.safetensors")
        files.append((folder / f"{k}.safetensors").read_bytes())

    def attempt(rng: np.random.Generator) -> None:
        content = files[int(rng.integers(0, len(files)))]
        content = changed_in_json(content, rng) if rng.random() < 0.6 else mutated(content, rng)
        with contextlib.suppress(Exception):
            content = with_valid_checksum(content)
        path = folder / "model.safetensors"
        path.write_bytes(content)
        detector = vqad.load(path)
        detector.score_samples(np.zeros((2, 6), np.float32))

    return attempt


# ---- checkpoints ---------------------------------------------------------------------------------


def try_checkpoints(folder: Path) -> Callable[[np.random.Generator], None]:
    import torch

    from vqad.checkpoint import _MAGIC, Checkpoint

    checkpoint = Checkpoint(folder, "a" * 64, 0)
    out = io.BytesIO()
    state = {"seed": 1, "model": {"weight": torch.zeros(3, 4)}, "passes": [0.5], "done": False}
    torch.save(state, out)

    def attempt(rng: np.random.Generator) -> None:
        body = mutated(out.getvalue(), rng)
        content = _MAGIC + hashlib.sha256(body).digest() + body
        if rng.random() < 0.3:
            content = mutated(content, rng)
        checkpoint.path.write_bytes(content)
        Checkpoint(folder, "a" * 64, 0)

    return attempt


# ---- command lines -------------------------------------------------------------------------------


def try_commands(folder: Path) -> Callable[[np.random.Generator], None]:
    import vqad
    from vqad.cli import main

    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(b"no image")
    vqad.save(fitted_detectors()[0], folder / "model")
    words = [
        *("fit", "score", "evaluate", "report", "export", "recalibrate", "--help", "--version", "--", "-"),
        *(
            "-o",
            "--output",
            "--csv",
            "--maps",
            "--json",
            "--false-alarm-rate",
            "--set",
            "--groups",
            "--device",
            "--seed",
        ),
        *("--max-iter", "--image-size", "--batch-size", "--detector", "--n-images", "--title", "--fpr-limit"),
        *(
            "--no-pixels",
            "--no-categories",
            "--category-from-folders",
            "--images",
            "cpu",
            "cuda:9",
            "vq-flow",
            "hvq-trans",
        ),
        *(
            "",
            " ",
            "0",
            "-1",
            "1e999",
            "nan",
            "99999999999999999999",
            "0.5",
            "0x0",
            "1x1",
            "x",
            "a=b",
            "max_iter=",
            "=1",
        ),
        *(
            "n_codes=[1,2",
            "backbone=None",
            "weights=hub",
            "((((",
            "[a-z",
            "(?P<",
            "\udcff",
            "\0",
            "é" * 300,
            "*",
            "~",
            "..",
        ),
        *(str(folder / name) for name in ("images", "model", "nothing", "images/a.png", "out", "out/deep/file")),
    ]

    def attempt(rng: np.random.Generator) -> None:
        chosen = [words[int(k)] for k in rng.integers(0, len(words), int(rng.integers(0, 9)))]
        if rng.random() < 0.8:
            chosen.insert(0, words[int(rng.integers(0, 6))])
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            with contextlib.redirect_stderr(io.StringIO()):
                code = main(chosen)
            if code not in (0, 2, 130, 141):
                raise AssertionError(f"exit code {code} of {chosen}")

    return attempt


# ---- running -------------------------------------------------------------------------------------

KINDS = {"images": try_images, "models": try_models, "checkpoints": try_checkpoints, "commands": try_commands}


class Hang(BaseException):
    """An input took too long."""


def peak() -> float:
    """Peak memory of this process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(kind: str, n: int, seed: int, first: int, report: Any) -> None:
    """Try inputs of a kind; send the number of each that begins, and what failed."""

    def too_long(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, too_long)
    warnings.simplefilter("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        attempt, told = KINDS[kind](Path(name)), Counter()
        attempt_one(attempt, seed, first)  # imports what is imported late
        longest, before = 0.0, peak()
        start = before
        for k in range(first, first + n):
            report.send(("begin", k))
            began = time.monotonic()
            outcome, failure = attempt_one(attempt, seed, k)
            took, now = time.monotonic() - began, peak()
            told[outcome] += 1
            longest = max(longest, took)
            if now - before > MEGABYTES:
                failure = f"{now - before:.0f} MB"
            before = now
            if failure:
                report.send(("failed", k, failure))
        report.send(("end", dict(told), longest, peak() - start))


def attempt_one(attempt: Callable[[np.random.Generator], None], seed: int, k: int) -> tuple[str, str]:
    """What came of an input, and why that is a failure if it is one."""
    signal.alarm(SECONDS)
    try:
        attempt(np.random.default_rng([seed, k]))
        return "accepted", ""
    except TOLD as error:
        return type(error).__name__, ""
    except Hang:
        return "hang", f"over {SECONDS} s"
    except BaseException as error:
        return "crash", f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-6)}"
    finally:
        signal.alarm(0)


def supervise(kind: str, n: int, seed: int, first: int) -> int:
    """Run a kind in a process of its own, and again behind an input that ended it; give the number of failures."""
    failures, last = 0, first - 1
    while last < first + n - 1:
        here, there = multiprocessing.Pipe(duplex=False)
        rest = (kind, first + n - last - 1, seed, last + 1, there)
        process = multiprocessing.get_context("spawn").Process(target=run, args=rest)
        process.start()
        there.close()
        ended = False
        with contextlib.suppress(EOFError):
            while True:
                what, *more = here.recv()
                if what == "begin":
                    last = more[0]
                elif what == "failed":
                    failures += 1
                    print(f"{kind} {more[0]}: {more[1]}", flush=True)
                else:
                    told, longest, grown = more
                    ended = True
        process.join()
        if ended:
            listed = ", ".join(f"{count:,} {name}" for name, count in sorted(told.items(), key=lambda item: -item[1]))
            print(f"{kind}: {n:,} inputs: {listed}; longest {longest:.2f} s; memory grew by {grown:.0f} MB", flush=True)
            break
        if last < first:
            raise RuntimeError(f"{kind}: the process ended with {process.exitcode} before its first input")
        failures += 1
        print(f"{kind} {last}: the process ended with {process.exitcode}", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    arguments = parser.parse_args()
    failures = 0
    for kind in KINDS:
        if n := getattr(arguments, kind):
            failures += supervise(kind, n, arguments.seed, arguments.first)
    print(f"{failures} failures")
    raise SystemExit(failures > 0)


if __name__ == "__main__":
    main()
