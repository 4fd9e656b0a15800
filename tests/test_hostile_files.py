"""Small files that are made to fill memory or time: each is refused with a sentence, or read within bounds.

`benchmarks/fuzz.py` tries many damaged files; these are built by hand.
"""

import json
import multiprocessing
import resource
import struct
import zlib

import numpy as np
import pytest

import vqad
from vqad.images import check_images

MEGABYTES = 1000


def png(width, height, *, kind=2, depth=8, content=None):
    """A PNG file of this size: all zero, or of this compressed content."""
    channels = {0: 1, 2: 3, 6: 4}[kind]
    if content is None:
        packer = zlib.compressobj(9)
        row = bytes(1 + (width * channels * depth + 7) // 8)
        content = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)),
        (b"IDAT", content),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def tiff(width, height, strip_bytes):
    """A grey TIFF file whose only strip claims to have so many bytes."""
    entries = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    entries += [(278, 4, height), (279, 4, strip_bytes)]
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in entries)
    return b"II*\0" + struct.pack("<I", 8) + body + bytes(4)


def gif(width, height):
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + b"\x80\0\0"
        + bytes(6)
        + b","
        + struct.pack("<HHHH", 0, 0, width, height)
        + b"\0\x02\x02\x44\x01\0;"
    )


BOMBS = {
    "of 400 million pixels": lambda: png(20_000, 20_000, kind=0, depth=1, content=b""),
    "of colour, just under twice Pillow's limit": lambda: png(13_300, 13_300),
    "16 bits of four channels, just under our limit": lambda: png(7_000, 7_000, kind=6, depth=16),
    "TIFF with a huge strip": lambda: tiff(60_000, 2_900, 2**32 - 1),
    "GIF of the largest size": lambda: gif(65_535, 65_535),
}


def read(content, answer):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        data = check_images([content])
        data.size(0)
        data.load([0], (64, 64))
        outcome = "read"
    except ValueError as error:
        outcome = str(error)
    answer.put((outcome, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BOMBS)
def test_a_small_image_file_fills_no_memory(name):
    content = BOMBS[name]()
    assert len(content) < 2_000_000
    context = multiprocessing.get_context("forkserver")  # each from one process that has imported what it takes
    context.set_forkserver_preload(["vqad.images"])
    answer = context.Queue()
    process = context.Process(target=read, args=(content, answer))
    process.start()
    outcome, megabytes = answer.get(timeout=100)
    process.join()
    assert megabytes < MEGABYTES
    assert outcome == "read" or outcome.startswith("image 0 of X")


@pytest.mark.parametrize("length", [0, 10, 2**20, 2**40, 2**63, 2**64 - 1])
def test_a_model_file_with_a_header_of_any_length_is_refused(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b'{"__metadata__":{"format":"vqad"}}')
    with pytest.raises(ValueError, match=r"is no model that vqad.save or vqad fit wrote, or is damaged"):
        vqad.load(path)


@pytest.mark.parametrize("shape", [[2**40], [2**62, 4], [-1], [2**31] * 3])
def test_a_model_file_whose_tensors_claim_any_size_is_refused(tmp_path, shape):
    metadata = {"format": "vqad", "format_version": "1", "packages": "{}", "detector": "{}", "checksum": "0"}
    tensor = {
        "dtype": "F32",
        "shape": shape,
        "data_offsets": [0, min(4 * abs(int(np.prod(shape, dtype=object))), 2**63)],
    }
    header = json.dumps({"__metadata__": metadata, "a": tensor}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(ValueError, match=r"is no model that vqad.save or vqad fit wrote, or is damaged"):
        vqad.load(path)
