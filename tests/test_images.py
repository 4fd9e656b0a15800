"""Every accepted form of X gives the same pixels, and every wrong one a message that helps."""

import io
import os
import pickle
import re
import signal
import struct
import warnings
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, features

import vqad.images
from vqad._decode import read_mask, to_unit_range
from vqad.datasets import load_folder
from vqad.images import ImageSequence, check_images

SMALL_UINT8 = hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3)))


def all_pixels(X, **kwargs):
    images = check_images(X, **kwargs)
    return np.stack([images.pixels(i) for i in range(len(images))])


def save_all(folder, images, suffix=".png"):
    paths = [folder / f"{k}{suffix}" for k in range(len(images))]
    for path, image in zip(paths, images):
        Image.fromarray(image).save(path)
    return paths


class Lazy:
    """A collection that is neither list nor array: len(X) and X[i]."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class LazyArray(Lazy):
    """What an HDF5 data set looks like; it refuses to be read whole."""

    @property
    def shape(self):
        return self.items.shape

    @property
    def dtype(self):
        return self.items.dtype

    @property
    def ndim(self):
        return self.items.ndim

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("read whole")


# ---- one picture, one array of pixels, whatever the form -----------------------------------------


def written(image, form="PNG"):
    """A file in memory as it is left by writing."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **({"lossless": True} if form == "WEBP" else {}))
    return file


def encoded(images, form):
    return [written(image, form).getvalue() for image in images]


FORMS = {
    "array": lambda x, folder: x,
    "read-only array": lambda x, folder: np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape),
    "strided array": lambda x, folder: np.repeat(x, 2, axis=2)[:, :, ::2],
    "Fortran array": lambda x, folder: np.asfortranarray(x),
    "big-endian uint16": lambda x, folder: (x.astype(np.uint16) * 257).astype(">u2"),
    "uint32": lambda x, folder: x.astype(np.uint32) * 16843009,
    "float32": lambda x, folder: x.astype(np.float32) / np.float32(255),
    "float64": lambda x, folder: x / 255,
    "tensor": lambda x, folder: torch.from_numpy(x),
    "float tensor with gradient": lambda x, folder: torch.tensor(x / 255, requires_grad=True),
    "array with opaque alpha": lambda x, folder: np.concatenate([x, np.full_like(x[..., :1], 255)], axis=3),
    "list of arrays": lambda x, folder: list(x),
    "tuple of tensors": lambda x, folder: tuple(torch.from_numpy(x)),
    "nested float lists": lambda x, folder: (x / 255).tolist(),
    "PIL images": lambda x, folder: [Image.fromarray(image) for image in x],
    "pathlib paths": lambda x, folder: save_all(folder, x),
    "string paths": lambda x, folder: [str(path) for path in save_all(folder, x)],
    "array of strings": lambda x, folder: np.array([str(path) for path in save_all(folder, x)]),
    "array of bytes": lambda x, folder: np.array([os.fsencode(path) for path in save_all(folder, x)]),
    "object array of paths": lambda x, folder: np.array(save_all(folder, x), dtype=object),
    "TIFF paths": lambda x, folder: save_all(folder, x, ".tiff"),
    "bytes of PNG files": lambda x, folder: encoded(x, "PNG"),
    "bytearrays": lambda x, folder: list(map(bytearray, encoded(x, "PNG"))),
    "views of bytes of TIFF files": lambda x, folder: tuple(map(memoryview, encoded(x, "TIFF"))),
    "array of bytes of PNG files": lambda x, folder: np.array(encoded(x, "PNG")),
    "array of bytes of BMP files": lambda x, folder: np.array(encoded(x, "BMP")),
    "object array of bytes": lambda x, folder: np.array(encoded(x, "WEBP"), dtype=object),
    "files in memory, at their end": lambda x, folder: [written(image) for image in x],
    "open files": lambda x, folder: [path.open("rb") for path in save_all(folder, x)],
    "lazy files": lambda x, folder: Lazy([io.BytesIO(file) for file in encoded(x, "PNG")]),
    "lazy": lambda x, folder: Lazy(x),
    "lazy paths": lambda x, folder: Lazy(save_all(folder, x)),
    "lazy array": lambda x, folder: LazyArray(x),
    "mixed": lambda x, folder: [x[0], *save_all(folder, x)[1:4], Image.fromarray(x[4])],
}


@pytest.mark.filterwarnings("ignore:.*alpha:UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pixels(form, colour_images, tmp_path):
    X = FORMS[form](colour_images, tmp_path)
    expected = (colour_images / 255).astype(np.float32)
    pixels = all_pixels(X)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("form", ["list", "array", "uint8", "PIL", "path", "bool"])
def test_grey_is_repeated_to_three_channels(form, tmp_path):
    grey = np.random.default_rng(1).integers(0, 2, (3, 7, 9)).astype(np.uint8) * 255
    X = {
        "list": lambda: list(grey),
        "array": lambda: grey[..., None],
        "uint8": lambda: grey,
        "PIL": lambda: [Image.fromarray(image) for image in grey],
        "path": lambda: save_all(tmp_path, grey),
        "bool": lambda: grey == 255,
    }[form]()
    np.testing.assert_array_equal(all_pixels(X), np.stack([grey / 255] * 3, axis=-1).astype(np.float32))


def test_pandas_series_of_paths_is_read_by_position(colour_images, tmp_path):
    pandas = pytest.importorskip("pandas")
    paths = [str(path) for path in save_all(tmp_path, colour_images)]
    series = pandas.Series(paths, index=[9, 7, 5, 3, 1])
    np.testing.assert_array_equal(all_pixels(series), all_pixels(colour_images))
    series.iloc[3] = None
    with pytest.raises(ValueError, match=r"image 3 of X is missing"):
        check_images(series)


def test_object_with_paths_is_taken_as_its_paths(colour_images, tmp_path):
    collection = Lazy([])
    collection.paths = save_all(tmp_path, colour_images)
    np.testing.assert_array_equal(all_pixels(collection), all_pixels(colour_images))


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_rows_are_reshaped_to_image_shape(channels):
    shape = (4, 3) if channels is None else (4, 3, channels)
    images = np.random.default_rng(2).random((5, *shape))
    expected = images if channels == 3 else np.stack([images.reshape(5, 4, 3)] * 3, axis=-1)
    for rows in (
        images.reshape(5, -1),
        torch.from_numpy(images.reshape(5, -1)),
        images.reshape(5, -1).tolist(),
    ):
        pixels = all_pixels(rows, image_shape=shape)
        np.testing.assert_array_equal(pixels, expected.astype(np.float32))


def test_image_sequence_is_returned_as_it_is(colour_images):
    images = check_images(colour_images)
    assert check_images(images) is images


@given(SMALL_UINT8)
def test_pixels_do_not_depend_on_the_dtype(image):
    reference = all_pixels(image[None])
    assert reference.min() >= 0
    assert reference.max() <= 1
    for same in (image.astype(np.uint16) * 257, image / 255, (image / 255).astype(np.float32)):
        np.testing.assert_array_equal(all_pixels(same[None]), reference)


def test_integers_are_scaled_by_their_maximum():
    for dtype in (np.uint8, np.uint16, np.uint32, np.uint64):
        largest = np.iinfo(dtype).max
        image = np.array([[0, largest // 2, largest]], dtype=dtype)
        np.testing.assert_allclose(check_images([image]).pixels(0)[0, :, 0], [0, 0.5, 1], atol=0.003)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tensors_are_taken_at_their_value(dtype):
    image = torch.rand(6, 5, 3).to(dtype)
    np.testing.assert_array_equal(check_images([image]).pixels(0), image.float().numpy())


def test_x_is_never_written_to(colour_images):
    for X in (colour_images, (colour_images / 255).astype(np.float32), colour_images / 255 * 1.0005):
        before = X.copy()
        images = check_images(X)
        images.pixels(0)[:] = 0
        images.load([0, 1], (20, 24)).zero_()
        images.load([0, 1], (8, 8)).zero_()
        np.testing.assert_array_equal(X, before)


def test_floats_a_little_outside_are_clipped():
    pixels = check_images([np.array([[-0.0009, 0.5, 1.0009]])]).pixels(0)
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0.5, 1])


# ---- files ---------------------------------------------------------------------------------------


def saved(folder, image, name, **options):
    path = folder / name
    image.save(path, **options)
    return path


def test_sixteen_bit_png_keeps_its_depth(tmp_path):
    values = np.array([[0, 1, 256, 40000, 65535]], dtype=np.uint16)
    path = saved(tmp_path, Image.fromarray(values), "deep.png")
    expected = (values / 65535).astype(np.float32)
    np.testing.assert_array_equal(check_images([path]).pixels(0)[..., 0], expected)
    with Image.open(path) as image:
        np.testing.assert_array_equal(check_images([image]).pixels(0)[..., 0], expected)


def test_sixteen_bit_png_in_mode_i_is_sixteen_bit():
    """Older versions of Pillow open such files in mode I."""
    image = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    image.format = "PNG"
    assert image.mode == "I"
    np.testing.assert_array_equal(check_images([image]).pixels(0)[0, :, 0], [0, 1])


def test_signed_32_bit_image_is_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.arange(6, dtype=np.int32).reshape(2, 3)), "signed.tiff")
    with pytest.raises(ValueError, match=r"image 0 of X, path .*signed.tiff', has dtype int32.*astype"):
        check_images([path]).pixels(0)


def test_float_tiff_is_taken_as_0_to_1(tmp_path):
    values = np.array([[0, 0.25, 1]], dtype=np.float32)
    path = saved(tmp_path, Image.fromarray(values), "float.tiff")
    np.testing.assert_array_equal(check_images([path]).pixels(0)[..., 0], values)


def test_palette_cmyk_and_one_bit_images_show_their_colours(tmp_path):
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
    rgb = Image.fromarray(colours)
    palette = Image.fromarray(np.array([[0, 1], [2, 3]], dtype=np.uint8), mode="P")
    palette.putpalette(colours.ravel().tolist())
    one_bit = Image.fromarray(np.array([[True, False], [False, True]]))
    assert one_bit.mode == "1"
    paths = [
        saved(tmp_path, palette, "palette.png"),
        saved(tmp_path, rgb.convert("CMYK"), "cmyk.tiff"),
        saved(tmp_path, one_bit, "bit.png"),
    ]
    images = check_images(paths)
    np.testing.assert_array_equal(images.pixels(0), colours / 255)
    np.testing.assert_array_equal(images.pixels(1), colours / 255)
    np.testing.assert_array_equal(images.pixels(2)[..., 1], [[1, 0], [0, 1]])


TRANSPARENT = {
    "RGBA": lambda: Image.fromarray(np.array([[[10, 20, 30, 0], [40, 50, 60, 255]]], dtype=np.uint8)),
    "LA": lambda: Image.fromarray(np.array([[[10, 0], [40, 255]]], dtype=np.uint8), mode="LA"),
}


@pytest.mark.parametrize("mode", TRANSPARENT)
def test_transparent_colours_are_kept_as_stored(mode, tmp_path):
    path = saved(tmp_path, TRANSPARENT[mode](), "transparent.png")
    expected = np.array([[[10, 20, 30], [40, 50, 60]]] if mode == "RGBA" else [[[10] * 3, [40] * 3]])
    with pytest.warns(UserWarning, match=r"image 0 of X, path .*, has an alpha channel"):
        pixels = check_images([path]).pixels(0)
    np.testing.assert_array_equal(pixels, (expected / 255).astype(np.float32))


def test_transparent_palette_is_warned_about(tmp_path):
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([9, 8, 7, 6, 5, 4])
    path = saved(tmp_path, palette, "palette.png", transparency=bytes([0, 255]))
    with pytest.warns(UserWarning, match="alpha") as caught:
        pixels = check_images([path]).pixels(0)
    assert len(caught) == 1, "Pillow's own warning is passed on"
    np.testing.assert_array_equal(pixels, (np.array([[[9, 8, 7], [6, 5, 4]]]) / 255).astype(np.float32))


def test_pil_images_without_pixels_and_of_closed_files_are_told(tmp_path):
    for mode in ("L", "F", "RGB"):
        with pytest.raises(ValueError, match=r"image 1 of X must have shape .* got 5 x 0, which has no pixels"):
            check_images([Image.new("L", (4, 4)), Image.new(mode, (0, 5))])
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(ValueError, match="image 0 of X is truncated or not an image"):
        check_images([image]).pixels(0)


def test_one_lazy_pil_image_may_be_in_x_many_times(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for _ in range(5):
        with Image.open(tmp_path / "a.png") as image, ThreadPoolExecutor(8) as pool:
            for read in pool.map(check_images([image] * 16).pixels, range(16)):
                np.testing.assert_array_equal(read, pixels / np.float32(255))


def test_paths_as_bytes_may_have_any_byte(tmp_path):
    path = os.fsencode(tmp_path) + b"/bad\xff.png"
    Image.new("L", (4, 4)).save(os.fsdecode(path))
    assert check_images(np.array([path])).size(0) == (4, 4)


def test_alpha_is_warned_about_once_and_at_the_callers_line(colour_images):
    X = np.concatenate([colour_images, colour_images[..., :1]], axis=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = check_images(X)
        images.load(range(5), (8, 8))
        images.subset([2, 3]).load([0, 1], (8, 8))
        images.pixels(4)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_exif_orientation_is_applied_and_size_agrees(orientation, suffix, tmp_path):
    """Checked against what the orientations mean: which corner of the scene the first pixel shows."""
    scene = np.zeros((24, 40), dtype=np.uint8)
    scene[:12, :20], scene[:12, 20:], scene[12:, :20] = 240, 160, 80
    stored = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.T,
        6: scene.T[::-1],
        7: scene[::-1, ::-1].T,
        8: scene.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {".jpg": {"quality": 100}, ".webp": {"lossless": True}}.get(suffix, {})
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), f"turned{suffix}", exif=exif, **options)
    images = check_images([path])
    assert images.size(0) == (24, 40)
    np.testing.assert_allclose(images.pixels(0)[..., 0], scene / 255, atol=0.02)
    # As a file object: Pillow 13 scrambles plain TIFF files that are turned and opened by name.
    with open(path, "rb") as file, Image.open(file) as image:
        of_pil = check_images([image])
        assert of_pil.size(0) == (24, 40)
        np.testing.assert_array_equal(of_pil.pixels(0), images.pixels(0))


@pytest.mark.parametrize("suffix", ["tiff", "gif", "png", "webp"])
def test_first_frame_of_many_is_taken_with_a_warning(suffix, tmp_path):
    frames = [Image.fromarray(np.full((4, 5), value, dtype=np.uint8)) for value in (50, 200)]
    options = {"lossless": True} if suffix == "webp" else {}
    one = saved(tmp_path, frames[0], f"one.{suffix}", **options)
    many = saved(tmp_path, frames[0], f"many.{suffix}", save_all=True, append_images=frames[1:], **options)
    images = check_images([one, many, many])
    images.pixels(0)
    with pytest.warns(UserWarning, match=rf"image 1 of X, path '.*many\.{suffix}', has several pages") as caught:
        read = [images.pixels(i) for i in (1, 2)]
    assert len(caught) == 1
    assert (np.stack(read) == np.float32(50 / 255)).all()


def png_of_16_bits(pixels):
    """What Pillow cannot write."""
    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    written = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ):
        written += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return written


@pytest.mark.parametrize("kind", ["png 1", "png 2", "png 3", "png 4", "ppm"])
def test_colours_of_16_bits_are_read_with_8_and_a_warning(kind, tmp_path):
    """Of grey all 16 are read."""
    channels = 3 if kind == "ppm" else int(kind[-1])
    pixels = np.random.default_rng(0).integers(0, 65536, (4, 5, channels)).astype(np.uint16)
    ppm = b"P6 5 4 65535\n" + pixels[:, :, :3].astype(">u2").tobytes()
    (tmp_path / "a").write_bytes(ppm if kind == "ppm" else png_of_16_bits(pixels))
    images = check_images([tmp_path / "a", tmp_path / "a"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read = images.pixels(0)
        images.pixels(1)
    said = [str(w.message) for w in caught if "has 16 bits per channel, of which 8 are read" in str(w.message)]
    assert len(said) == (channels > 1)
    expected = pixels[:, :, :1] if channels < 3 else pixels[:, :, :3]
    exact = 1e-6 if channels == 1 else 0.005
    np.testing.assert_allclose(read, np.broadcast_to(expected / 65535, (4, 5, 3)), atol=exact)


def test_16_bits_a_pixel_are_not_16_a_channel(tmp_path):
    header = struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0) + struct.pack(
        "<III", 0xF800, 0x07E0, 0x001F
    )
    (tmp_path / "a.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 74, 0, 0, 66) + header + bytes(range(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_images([tmp_path / "a.bmp"]).pixels(0).shape == (2, 2, 3)


def test_previews_of_photographs_are_no_pages(tmp_path):
    frames = [Image.fromarray(np.full((4, 5), value, dtype=np.uint8)) for value in (50, 200)]
    path = saved(tmp_path, frames[0], "photo.mpo", save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_images([path]).pixels(0).shape == (4, 5, 3)


def test_a_gif_that_is_cut_off_in_its_second_frame_is_its_first(tmp_path):
    frames = [Image.fromarray(np.random.default_rng(k).integers(0, 256, (9, 7), dtype=np.uint8)) for k in (0, 1)]
    whole = saved(tmp_path, frames[0], "whole.gif", save_all=True, append_images=frames[1:]).read_bytes()
    first = saved(tmp_path, frames[0], "first.gif").read_bytes()
    (tmp_path / "cut.gif").write_bytes(whole[: len(first) + 6])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pixels = check_images([tmp_path / "cut.gif"]).pixels(0)
    np.testing.assert_array_equal(pixels[..., 0], np.asarray(frames[0]) / np.float32(255))


ORIENTATIONS = {
    "text": (2, b"6\0"),
    "byte": (1, b"\6"),
    "nan": (11, b"\0\0\xc0\x7f"),
    "infinity": (11, b"\0\0\x80\x7f"),
}


@pytest.mark.parametrize("kind", [*ORIENTATIONS, "nine"])
def test_an_orientation_that_is_none_turns_nothing(kind, tmp_path):
    type_, value = ORIENTATIONS.get(kind, (3, b"\t\0"))
    count = len(value) if type_ == 2 else 1
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, type_, count, value, 0)
    path = saved(tmp_path, Image.new("L", (6, 4), 90), "turned.jpg", exif=exif)
    images = check_images([path])
    assert images.size(0) == (4, 6)
    np.testing.assert_allclose(images.pixels(0), np.full((4, 6, 3), 90 / 255), atol=0.01)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("keep", [0, 20, 60, 200])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff"])
def test_truncated_file_is_named(keep, suffix, tmp_path, colour_images):
    paths = save_all(tmp_path, colour_images, suffix)
    paths[3].write_bytes(paths[3].read_bytes()[:keep])
    images = check_images(paths)
    with pytest.raises(ValueError, match=rf"image 3 of X, path .*3{suffix}', is truncated or not an image \("):
        images.load(range(5), (8, 8))
    with pytest.raises(ValueError, match=r"^image 3 of X, path"):
        images.subset([4, 3]).pixels(1)


def test_truncated_pil_image_is_named(colour_images):
    buffer = io.BytesIO()
    Image.fromarray(colour_images[0]).save(buffer, "PNG")
    image = Image.open(io.BytesIO(buffer.getvalue()[:300]))
    with pytest.raises(ValueError, match=r"^image 1 of X is truncated or not an image"):
        check_images([colour_images[0], image]).pixels(1)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_a_broken_avif_file_is_named(tmp_path, colour_images):
    path = saved(tmp_path, Image.fromarray(colour_images[0]), "broken.avif")
    content = path.read_bytes()
    start = content.index(b"mdat") + 8
    path.write_bytes(content[:start] + bytes(len(content) - start))
    with pytest.raises(ValueError, match=r"broken\.avif', is truncated or not an image"):
        check_images([path]).pixels(0)


def test_text_file_is_not_an_image(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not pixels")
    images = check_images([path])
    for read in (images.pixels, images.size):
        with pytest.raises(ValueError, match=r"notes\.png', is truncated or not an image"):
            read(0)


def test_missing_path_and_folder_are_named(tmp_path, colour_images):
    paths = save_all(tmp_path, colour_images)
    gone = tmp_path / "gone.png"
    with pytest.raises(FileNotFoundError, match=r"image 2 of X, path '.*gone\.png', does not exist"):
        check_images([*paths[:2], gone])
    with pytest.raises(IsADirectoryError, match=r"image 1 of X, path .*load_folder\("):
        check_images([paths[0], tmp_path])
    images = check_images(paths)
    paths[4].unlink()
    with pytest.raises(FileNotFoundError, match=r"image 4 of X, path '.*4\.png'"):
        images.pixels(4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders on this system")
def test_pipes_devices_and_links_in_a_circle_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    for path in (tmp_path / "pipe.png", tmp_path / "circle.png", "/dev/zero"):
        with pytest.raises(FileNotFoundError, match=rf"image 0 of X, path '{path}', is not a file but a device"):
            check_images([path])
    signal.alarm(10)
    try:  # unchecked, a pipe would be waited for, and a device read without end
        for path in (tmp_path / "pipe.png", "/dev/zero"):
            images = ImageSequence([str(path)], np.arange(1))
            for read in (images.pixels, images.size, images.digest):
                with pytest.raises(FileNotFoundError, match="is not a file but"):
                    read(0)
        with pytest.raises(FileNotFoundError, match=r"mask '.*pipe\.png' is not a file but"):
            read_mask(str(tmp_path / "pipe.png"))
    finally:
        signal.alarm(0)


def test_a_deleted_working_folder_hides_no_name(tmp_path, monkeypatch):
    def no_folder():
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "getcwd", no_folder)
    with pytest.raises(FileNotFoundError, match=r"image 0 of X, path 'gone\.png', does not exist \(nor does the work"):
        check_images(["gone.png"])
    with pytest.raises(FileNotFoundError, match=r"root 'gone' does not exist \(nor does the working"):
        load_folder("gone")


def test_no_file_is_opened_by_checking(tmp_path, colour_images, monkeypatch):
    paths = save_all(tmp_path, colour_images)
    opened = []
    real_open = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *args: opened.append(file.name) or real_open(file, *args))
    images = check_images(paths)
    images.subset([1, 2]).name(0)
    assert opened == []
    images.load([3], (8, 8))
    assert opened == [str(paths[3])]


def test_size_of_a_file_reads_only_its_header(tmp_path, colour_images):
    [path] = save_all(tmp_path, colour_images[:1])
    path.write_bytes(path.read_bytes()[:100])  # header whole, pixels not
    assert check_images([path]).size(0) == (20, 24)


def test_bytes_are_the_file_that_they_are_of(tmp_path, colour_images):
    """Size, digest and warnings too; what is no image is named."""
    [path] = save_all(tmp_path, colour_images[:1])
    images = check_images([path, path.read_bytes(), io.BytesIO(path.read_bytes())])
    assert len({images.digest(i) for i in range(3)}) == 1
    assert [images.size(i) for i in range(3)] == [(20, 24)] * 3
    assert [images.path(i) for i in range(3)] == [str(path), None, None]
    assert torch.equal(pickle.loads(pickle.dumps(images)).load([2], (8, 8)), images.load([0], (8, 8)))
    broken = check_images([path.read_bytes(), path.read_bytes()[:80], b"no image"])
    for i in (1, 2):
        with pytest.raises(ValueError, match=rf"^image {i} of X is truncated or not an image"):
            broken.pixels(i)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(colour_images[0]).save(file, "JPEG", exif=exif)
    assert check_images([file]).pixels(0).shape == (24, 20, 3)
    frames = [Image.new("L", (5, 4), value) for value in (50, 200)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"^image 0 of X has several pages or frames"):
        check_images([file.getvalue()]).pixels(0)


def test_a_file_that_cannot_be_rewound_is_read_once(colour_images):
    class Upload:
        """What a web server gives."""

        def __init__(self, content):
            self.content = content

        def read(self):
            return self.content

    class AsyncUpload(Upload):
        async def read(self):
            return self.content

    content = written(colour_images[0]).getvalue()
    np.testing.assert_array_equal(
        check_images([Upload(content)]).pixels(0), (colour_images[0] / 255).astype(np.float32)
    )
    with pytest.raises(
        TypeError, match=r"image 0 of X is a file, .*AsyncUpload, that returns coroutine instead of bytes"
    ):
        check_images([AsyncUpload(content)])


def test_data_set_of_pairs_is_refused_with_the_way_out():
    image = Image.new("L", (5, 5))
    for item, way in (
        ((image, 0), r"a tuple of PIL\.Image\.Image, int.*\[item\[0\] for item in X\].*labels as y"),
        ({"image": image, "label": 0}, r"a dict of 'image', 'label'.*\[item\['image'\] for item in X\]"),
        ({"label": 0, "pixels": image}, r"item\['pixels'\]"),
        ([torch.zeros(3, 5, 5), 1], r"a list of torch\.Tensor, int"),
        ((), "a tuple of nothing; an image is an array"),
    ):
        with pytest.raises(TypeError, match=rf"image 1 of X is {way}" if way[0] == "a" else way):
            check_images(Lazy([image, item])).load([1], (8, 8))
    rows = [[np.full((4, 3), value) for value in (0.1, 0.2)], [np.full((4, 3), value) for value in (0.3, 0.4)]]
    assert check_images(rows).size(1) == (2, 4), "nested rows of pixels are no pairs"


# ---- images over Pillow's limit ------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "bytes"])
def test_an_image_over_pillows_limit_is_refused_with_the_remedy_and_read_when_the_limit_is_lifted(
    form, tmp_path, colour_images, monkeypatch
):
    path = tmp_path / "line"
    Image.fromarray(colour_images[0]).save(path, "PNG" if form == "bytes" else form)
    X = [path.read_bytes()] if form == "bytes" else [path]
    expected = check_images(X).pixels(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 239)
    images = check_images(X)
    assert images.size(0) == (20, 24)
    for read in (images.pixels, lambda i: images.load([i], (8, 8))):
        with pytest.raises(
            ValueError, match=r"has 20 x 24 pixels, 480, which is refused.*MAX_IMAGE_PIXELS = None.*crop"
        ):
            read(0)
    assert images.digest(0)
    assert Image.MAX_IMAGE_PIXELS == 239
    for limit in (None, 480):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        np.testing.assert_array_equal(images.pixels(0), expected)


def test_a_decoder_that_has_the_limit_itself_refuses_with_the_remedy(tmp_path, monkeypatch):
    Image.new("L", (24, 20), 255).save(tmp_path / "a.webp")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.webp', has .* pixels.* which is refused.*MAX_IMAGE_PIXELS = None"):
        check_images([tmp_path / "a.webp"]).pixels(0)


def test_a_large_image_that_is_turned_has_its_size_upright_and_a_large_mask_is_refused_too(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "a.png"):
        Image.new("L", (24, 20), 255).save(tmp_path / name, exif=exif)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name in ("a.jpg", "a.png"):
        assert check_images([tmp_path / name]).size(0) == (24, 20)
    with pytest.raises(ValueError, match=r"^mask '.*a\.png' has 20 x 24 pixels, 480, .*MAX_IMAGE_PIXELS"):
        read_mask(str(tmp_path / "a.png"))
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"b\.png', is truncated or not an image"):
        check_images([tmp_path / "b.png"]).size(0)


def test_pillows_warning_of_a_large_image_may_be_an_error(tmp_path, monkeypatch):
    Image.new("L", (24, 20), 255).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # from there on it warns, from twice as many it refuses
    images = check_images([tmp_path / "a.png"])
    with pytest.warns(Image.DecompressionBombWarning):
        assert images.pixels(0).shape == (20, 24, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"a\.png', has 20 x 24 pixels, 480, .*MAX_IMAGE_PIXELS"):
            images.pixels(0)
        assert images.size(0) == (20, 24)


# ---- loading -------------------------------------------------------------------------------------


def ragged_images():
    rng = np.random.default_rng(3)
    sizes = [(1, 1), (8, 8), (30, 17), (64, 64), (5, 90)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (33, 20), (100, 120)])
def test_load_gives_one_tensor_in_the_unit_range(size):
    images = check_images(ragged_images())
    batch = images.load(range(5), size)
    assert batch.shape == (5, 3, *size)
    assert batch.dtype == torch.float32
    assert batch.min() >= 0
    assert batch.max() <= 1
    assert [images.size(i) for i in range(5)] == [images.pixels(i).shape[:2] for i in range(5)]


@given(st.permutations(range(5)), st.integers(1, 5))
def test_loaded_pixels_do_not_depend_on_company_or_order(order, n):
    images = check_images(ragged_images())
    batch = images.load(order[:n], (16, 12))
    for row, i in zip(batch, order):
        assert torch.equal(row, images.load([i], (16, 12))[0])


def test_loading_at_the_own_size_changes_nothing(colour_images):
    images = check_images(colour_images)
    expected = (colour_images.transpose(0, 3, 1, 2) / 255).astype(np.float32)
    np.testing.assert_array_equal(images.load(range(5), (20, 24)).numpy(), expected)


@pytest.mark.parametrize("shape", [(90, 120, 3), (64, 48), (32, 48, 3), (20, 30, 3)])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_views_are_what_the_image_gives_at_each_size(shape, kind, monkeypatch):
    monkeypatch.setattr(vqad.images, "BAND_PIXELS", 1000)
    image = np.random.default_rng(0).integers(0, 256, shape).astype(kind) / (255 if kind is np.float32 else 1)
    images, sizes = check_images([image.astype(kind)]), [(32, 48), (24, 36), (64, 48)]
    views = images.views(0, sizes)
    assert [tuple(view.shape) for view in views] == [(1, 3, *size) for size in sizes]
    for view, size in zip(views, sizes):
        assert torch.equal(view, images.load([0], size))


def test_halving_by_load_averages_the_area():
    """Halving with a bilinear filter and antialiasing weighs 1 3 3 1 over 8 in each direction."""
    image = np.random.default_rng(4).random((12, 16))
    weights = np.array([1, 3, 3, 1]) / 8
    expected = np.array(
        [[weights @ image[2 * i - 1 : 2 * i + 3, 2 * j - 1 : 2 * j + 3] @ weights for j in (1, 2, 3)] for i in (1, 2)]
    )
    loaded = check_images([image]).load([0], (6, 8))[0, 0, 1:3, 1:4]
    np.testing.assert_allclose(loaded.numpy(), expected, atol=1e-6)


def test_constant_image_stays_constant_at_any_size():
    images = check_images([np.full((13, 7), 0.3), np.full((90, 200), 0.3)])
    for size in ((1, 1), (8, 50), (224, 224)):
        np.testing.assert_allclose(images.load([0, 1], size).numpy(), 0.3, atol=1e-6)


def test_load_does_not_depend_on_torchs_default_dtype(colour_images):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert check_images(colour_images).load([0], (8, 8)).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_empty_selection_gives_an_empty_batch(colour_images):
    assert check_images(colour_images).load([], (8, 9)).shape == (0, 3, 8, 9)


@pytest.mark.parametrize(
    "indices", [[3, 1], np.array([3, 1]), slice(1, 4, 2), np.array([False, True, False, True, False]), []]
)
def test_subset_is_a_view_with_the_original_names(indices, colour_images):
    numbers = np.arange(5)[indices].tolist()
    part = check_images(colour_images).subset(indices)
    assert len(part) == len(numbers)
    assert [part.name(i) for i in range(len(part))] == [f"image {number} of X" for number in numbers]
    for i, number in enumerate(numbers):
        np.testing.assert_array_equal(part.pixels(i), (colour_images[number] / 255).astype(np.float32))


def test_subset_of_a_subset_keeps_the_original_names(colour_images):
    X = colour_images / 255
    X[3, 0, 0, 0] = np.nan
    part = check_images(X).subset([4, 3, 2]).subset([2, 1])
    assert part.name(0) == "image 2 of X"
    with pytest.raises(ValueError, match=r"^image 3 of X contains NaN or infinite pixels"):
        part.load([0, 1], (8, 8))


@pytest.mark.parametrize("form", ["array", "pathlib paths", "PIL images"])
def test_pickling_keeps_pixels_and_names(form, colour_images, tmp_path):
    images = check_images(FORMS[form](colour_images, tmp_path)).subset([4, 0])
    again = pickle.loads(pickle.dumps(images))
    assert isinstance(again, ImageSequence)
    assert torch.equal(again.load([0, 1], (9, 9)), images.load([0, 1], (9, 9)))
    assert again.name(0) == images.name(0)


def test_pickled_paths_do_not_carry_pixels(tmp_path):
    noise = np.random.default_rng(5).integers(0, 256, (2, 200, 200), dtype=np.uint8)
    images = check_images(save_all(tmp_path, noise))
    images.load([0, 1], (200, 200))
    assert len(pickle.dumps(images)) < 5_000


# ---- what is refused, and how --------------------------------------------------------------------


def closed_file():
    file = io.BytesIO(b"\x89PNG")
    file.close()
    return file


BAD_FORMS = {
    "empty list": ([], ValueError, "X is empty"),
    "empty array": (np.zeros((0, 8, 8)), ValueError, "X is empty"),
    "None": (None, TypeError, "X must be an array .* got NoneType"),
    "generator": ((x for x in [1]), TypeError, r"got generator\. Use list\(X\)"),
    "dict": ({"a": 1}, TypeError, "got dict"),
    "one grey image": (np.zeros((9, 8)), ValueError, r"\(9, 8\).*image_shape=.*backbone=None.*X\[None\]"),
    "one RGB image": (np.zeros((9, 8, 3)), ValueError, r"\(9, 8, 3\).*looks like one image.*X\[None\]"),
    "one RGBA image": (np.zeros((9, 8, 4)), ValueError, r"looks like one image.*X\[None\]"),
    "one path": ("part.png", ValueError, r"single path, 'part.png'.*\[path\]"),
    "one pathlib path": (Path("part.png"), ValueError, r"single path, 'part.png'"),
    "one folder": (os.path.dirname(__file__), IsADirectoryError, "load_folder"),
    "one PIL image": (Image.new("L", (5, 5)), ValueError, r"single PIL image.*\[image\]"),
    "numbers": ([1.0, 2.0], ValueError, "X has one dimension"),
    "one number": (np.float64(3), ValueError, r"got an array of shape \(\)"),
    "ragged rows": ([[1.0], [1.0, 2.0]], ValueError, "list of list that does not make one array"),
    "5-D": (np.zeros((2, 2, 5, 5, 3)), ValueError, r"shape \(2, 2, 5, 5, 3\)"),
    "5 channels": (np.zeros((2, 8, 8, 5)), ValueError, r"C = 5 channels, but 1 \(grey\), 3 \(RGB\) or 4"),
    "2 channels in a list": ([np.zeros((8, 8, 2))], ValueError, r"image 0 of X .*C = 2 channels"),
    "channels first": (torch.zeros(2, 3, 8, 8), ValueError, r"C = 8.*np\.moveaxis\(X, 1, -1\)"),
    "channels first in a list": ([np.zeros((3, 8, 8))], ValueError, r"np\.moveaxis\(image, 0, -1\)"),
    "no pixels": (np.zeros((2, 0, 8)), ValueError, "no pixels"),
    "no pixels in a list": ([np.zeros((5, 5)), np.zeros((0, 5))], ValueError, "image 1 of X .* no pixels"),
    "4-D item": ([np.zeros((1, 8, 8, 3))], ValueError, r"image 0 of X must have shape \(H, W\) or"),
    "int64": (np.zeros((2, 8, 8), np.int64), ValueError, r"X has dtype int64.*astype\(np\.uint8\)"),
    "int64 tensor": (
        torch.zeros(2, 8, 8, dtype=torch.int64),
        ValueError,
        r"torch\.int64.*astype\(np\.uint8\)",
    ),
    "int16 in a list": ([np.zeros((8, 8), np.int16)], ValueError, "image 0 of X has dtype int16"),
    "complex": (np.zeros((2, 8, 8), complex), ValueError, "dtype complex128; pixels must be"),
    "table of strings": (np.array([["a.png"], ["b.png"]]), ValueError, "entries are not numbers.*the column"),
    "path and number": (np.array([__file__, 3], dtype=object), TypeError, "image 1 of X is int; an image is"),
    "list with None": ([np.zeros((8, 8)), None], ValueError, "image 1 of X is missing \\(None\\): give its path, or"),
    "nan among paths": (np.array([__file__, np.nan], dtype=object), ValueError, "image 1 of X is missing \\(nan"),
    "no bytes": ([b""], ValueError, "image 0 of X is empty"),
    "the bytes of one image": (b"\x89PNG", ValueError, r"bytes of a single image.*\[X\]"),
    "one open file": (io.BytesIO(b"\x89PNG"), ValueError, r"single file, _io\.BytesIO: pass a list of files, \[X\]"),
    "closed file": ([closed_file()], ValueError, "image 0 of X is a file that cannot be read: I/O operation on closed"),
    "file of text": ([io.StringIO("a")], TypeError, "is a file, _io.StringIO, that returns str instead of bytes.*'rb'"),
    "base64": (["data:image/png;base64,iVBO"], ValueError, r"is a str of 26 characters.*base64\.b64decode"),
    "long base64": (["iVBO" * 2000], ValueError, r"is a str of 8000 characters, .*base64\.b64decode"),
    "pairs": (
        [(np.zeros((8, 8)), 1)],
        ValueError,
        r"list of tuples of numpy.ndarray, int.*\[item\[0\] for item in X\]",
    ),
    "pairs of path and label": (
        [("a.png", 0)],
        ValueError,
        r"tuples of str, int, as from a data set of \(image, label\)",
    ),
    "pairs of image and mask": ([[Image.new("L", (5, 5))] * 2], ValueError, r"lists of PIL.*an object whose X\[i\]"),
    "pairs of tensors": ([(torch.zeros(8, 8, 3), torch.tensor(1))], ValueError, "tuples of torch.Tensor, torch.Tensor"),
    "rows of a data set": (
        [{"label": 1, "image": np.zeros((8, 8))}],
        TypeError,
        r"dict of 'label', 'image'.*item\['image'\]",
    ),
    "dict of images": ({"a": np.zeros((8, 8))}, TypeError, r"It has 'a': pass one of its values, or list\(X\.values"),
    "loader of batches": (
        torch.utils.data.DataLoader([1, 2]),
        TypeError,
        r"got torch\.utils\.data\.dataloader\.DataLoader\. Pass its images.*X\.dataset",
    ),
}


@pytest.mark.parametrize("form", BAD_FORMS)
def test_wrong_form_gets_a_message_that_helps(form):
    X, error, message = BAD_FORMS[form]
    with pytest.raises(error, match=message):
        check_images(X)


def test_sparse_matrix_is_refused():
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"sparse.*X\.toarray\(\)"):
        check_images(sparse.eye(4).tocsr())


def test_lazy_item_of_a_wrong_form_is_named_when_it_is_read():
    images = check_images(Lazy([np.zeros((8, 8)), (np.zeros((8, 8)), 1)]))
    images.pixels(0)
    with pytest.raises(TypeError, match=r"image 1 of X is a tuple"):
        images.pixels(1)


@pytest.mark.parametrize(
    ("image_shape", "message"),
    [
        ((5, 5), r"X has 12 columns, but image_shape=\(5, 5\) means 5 x 5 = 25 columns"),
        ((2, 2, 3, 1), "image_shape must be"),
        ((3, 2, 2), "C = 1, 3 or 4"),
        ((-3, -4), "image_shape must be"),
        ((3.0, 4.0), "image_shape must be"),
    ],
)
def test_wrong_image_shape_is_explained(image_shape, message):
    with pytest.raises(ValueError, match=message):
        check_images(np.zeros((4, 12)), image_shape=image_shape)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", [np.asarray, list, torch.from_numpy])
def test_non_finite_pixels_are_named(bad, form):
    X = np.zeros((4, 8, 8, 3))
    X[2, 5, 5, 1] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = check_images(form(X))
        with pytest.raises(ValueError, match=r"^image 2 of X contains NaN or infinite"):
            images.load(range(4), (8, 8))


def test_float_pixels_of_0_to_255_are_explained():
    X = np.full((2, 8, 8), 0.5)
    X[1, 0, 0] = 250.0
    with pytest.raises(ValueError, match=r"image 1 of X has float pixels from 0\.5 to 250.*divide them by 255"):
        check_images(X).load([0, 1], (8, 8))
    with pytest.raises(ValueError, match=r"from -1 to 0"):
        check_images([np.array([[-1.0, 0.0]])]).pixels(0)


def test_narrow_grey_images_are_taken_with_an_explicit_channel():
    """The way out that the message for an ambiguous shape names."""
    X = np.random.default_rng(6).random((5, 9, 3))
    with pytest.raises(ValueError, match=re.escape("X[..., None]")):
        check_images(X)
    assert check_images(X[..., None]).size(4) == (9, 3)
    assert check_images(X[None]).size(0) == (5, 9)


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
@pytest.mark.parametrize("high", [1, 255])
def test_mask_is_true_wherever_it_is_not_black(dtype, high, tmp_path):
    marked = np.random.default_rng(7).random((9, 11)) < 0.3
    path = saved(tmp_path, Image.fromarray((marked * high).astype(dtype)), "mask.png")
    np.testing.assert_array_equal(read_mask(str(path)), marked)


def test_mask_in_one_colour_counts(tmp_path):
    marked = np.zeros((9, 11), dtype=bool)
    marked[2:5, 3:4] = True
    path = saved(tmp_path, Image.fromarray(marked[..., None] * np.uint8([0, 0, 200])), "mask.png")
    np.testing.assert_array_equal(read_mask(str(path)), marked)


def test_jpeg_mask_file_is_read_without_its_noise(tmp_path):
    marked = np.zeros((64, 64), dtype=bool)
    marked[18:40, 9:32] = True
    path = saved(tmp_path, Image.fromarray(marked * np.uint8(255)), "mask.jpg", quality=60)
    with Image.open(path) as image:
        assert ((np.asarray(image) > 0) != marked).any(), "no compression noise: this test shows nothing"
    np.testing.assert_array_equal(read_mask(str(path)), marked)


def test_broken_mask_is_named(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match=r"mask .*mask\.png' is truncated or not an image"):
        read_mask(str(path))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
@pytest.mark.parametrize("shape", [(61, 43), (61, 43, 3), (9, 70, 4), (70, 9, 1)])
@pytest.mark.parametrize("size", [(20, 32), (61, 43), (80, 80)])
def test_rows_of_large_images_may_become_smaller_some_at_a_time(dtype, shape, size, monkeypatch):
    image = np.random.default_rng(0).integers(0, 2 if dtype is bool else np.iinfo(dtype).max, shape).astype(dtype)
    if shape[2:] == (4,):
        if dtype is bool:
            return
        with pytest.warns(UserWarning, match="alpha"):
            whole = check_images([image]).load([0], size)
        image = image[:, :, :3]
    else:
        whole = check_images([image]).load([0], size)
    for pixels in (1, 100, 1000):
        monkeypatch.setattr(vqad.images, "BAND_PIXELS", pixels)
        assert torch.equal(check_images([image]).load([0], size), whole)
    monkeypatch.setattr(vqad.images, "BAND_PIXELS", 100)
    kept, made = [], []

    def scaled(raw, name):
        kept.append(sum(band() is not None for band in made))
        band = to_unit_range(raw, name)
        made.append(weakref.ref(band))
        return band

    with monkeypatch.context() as patch:
        patch.setattr(vqad.images, "to_unit_range", scaled)
        check_images([image]).load([0], size)
    assert max(kept) <= 1  # the one before
    if image.ndim == 2 or image.shape[2] == 1:  # and grey may become colour after it
        assert torch.equal(check_images([np.repeat(image.reshape(*shape[:2], 1), 3, 2)]).load([0], size), whole)
