"""Copies of images count as one piece wherever images are split."""

import io

import numpy as np
import pytest
from PIL import Image

from vqad import HVQTransDetector
from vqad.copies import Watched, exact_copies, find_copies, merged, near_copies, pieces
from vqad.datasets import make_textured_parts
from vqad.images import check_images
from vqad.splitting import hold_out

PARTS = make_textured_parts(48, 0, categories=("disc", "tile"), image_size=128, random_state=0)
TINY = HVQTransDetector(
    backbone=None, d_model=8, n_heads=2, n_layers=1, dim_feedforward=8, n_codes=8, max_iter=1, false_alarm_rate=0.1,
    random_state=0,
)  # fmt: skip


def small_pictures(images):
    return Watched(check_images(images)).small_pictures(np.arange(len(images)))[0]


def saved(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def smaller(pixels):
    return np.asarray(Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC))


def noisy(pixels):
    return (pixels + np.random.default_rng(0).normal(0, 0.5, pixels.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "change",
    [lambda p: saved(p, 90), lambda p: saved(p, 70), smaller, noisy],
    ids=["JPEG 90", "JPEG 70", "half", "noise"],
)
def test_what_is_saved_again_is_found_and_nothing_else(change):
    images = [*PARTS.images, *(change(pixels) for pixels in PARTS.images[:8])]
    index = np.array([0, 1] * 24 + [0, 1] * 4)
    pairs = near_copies(small_pictures(images), index)
    assert sorted(pairs) == [(k, 48 + k) for k in range(8)]


def test_other_images_are_no_copies():
    index = np.array([0, 1] * 24)
    assert near_copies(small_pictures(PARTS.images), index) == []
    rng = np.random.default_rng(0)
    for n, d in ((20, 3), (500, 8), (3000, 256)):  # few numbers, many images
        assert near_copies(rng.standard_normal((n, d)), np.zeros(n, int)) == []


def test_images_that_differ_in_nothing_are_as_many_as_they_are():
    """Sensor noise alone: what tells them apart is noise, and they are no copies."""
    noise = np.random.default_rng(0).normal(0, 2, (40, 64, 64, 3))
    flat = (128 + noise).clip(0, 255).astype(np.uint8)
    assert near_copies(small_pictures(flat), np.zeros(40, int)) == []


def test_exact_copies_are_those_of_all_bits():
    rows = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)[[0, 1, 0, 2, 1]]
    np.testing.assert_array_equal(merged(None, exact_copies(rows)), [0, 1, 0, 2, 1])
    rows[4, 3] = np.nextafter(rows[4, 3], 9)
    np.testing.assert_array_equal(merged(None, exact_copies(rows)), [0, 1, 0, 2, 3])
    assert merged(None, exact_copies(rows[[0, 1, 3]])) is None


def test_copies_join_groups():
    found = merged(np.array([0, 0, 1, 2, 3, 4]), np.array([0, 1, 2, 1, 4, 5]), [(4, 5)])
    assert len(set(found[[0, 1, 3]])) == 1
    assert found[4] == found[5]
    assert len(set(found)) == 3


def test_a_copy_is_never_kept_where_the_other_is_held_out():
    images = [*PARTS.images[::2], *(saved(p, 90) for p in PARTS.images[::2])]
    with pytest.warns(UserWarning, match="Of 48 images 24 are exact or near copies of others"):
        piece = pieces(
            Watched(check_images(images)), np.arange(48), None, np.arange(48.0)[:, None], np.zeros(48, int), 0
        )
    kept, held = hold_out(np.zeros(48, int), 0.3, 0, piece)
    assert not set(kept % 24) & set(held % 24)
    assert len(set(held % 24)) == len(held) == round(0.3 * 24)


@pytest.mark.filterwarnings("ignore:Of .* images .* are exact or near copies")
def test_thresholds_hold_for_new_pieces_where_each_came_several_times():
    """With copies on both sides of the split new pieces would be called anomalous four times as often."""
    alarms = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        X = np.repeat(rng.standard_normal((95, 6)), rng.integers(1, 4, 95), axis=0)
        made = TINY.set_params(random_state=seed).fit(X, category=["part"] * len(X))
        assert len(made.fitted_.held_out) == 19
        alarms.append((made.predict(rng.standard_normal((200, 6))) == -1).mean())
    # 19 images held out: 0.1 is expected, with a deviation of 0.065 from one fit to the other.
    assert np.mean(alarms) == pytest.approx(0.1, abs=3 * 0.065 / np.sqrt(30))


@pytest.mark.filterwarnings("ignore:Of .* images .* are exact or near copies")
def test_later_images_that_are_copies_count_once_too():
    rng = np.random.default_rng(0)
    made = TINY.fit(rng.standard_normal((60, 6)), category=[0] * 60)
    before = len(made.fitted_.held_out)
    new = rng.standard_normal((10, 6))
    made.partial_fit(np.tile(new, (4, 1)) + 50, category=[1] * 40)
    assert len(made.fitted_.held_out) == before + 2
    made.recalibrate(np.tile(rng.standard_normal((25, 6)), (3, 1)), category=[0] * 75)
    assert (made.fitted_.held_out.category == 0).sum() == 25


def test_copies_are_found_for_splits_of_ones_own(tmp_path):
    for k, (pixels, name) in enumerate(zip(PARTS.images[:12:2], "abcdef")):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        if k < 2:
            Image.fromarray(pixels).save(tmp_path / f"{name}2.bmp")
    paths = sorted(map(str, tmp_path.iterdir()))
    paths.append(paths[0])
    found = find_copies([*paths, *PARTS.images[12::2]], category=["disc"] * (len(paths) + 18))
    assert found[0] == found[1] == found[len(paths) - 1]
    assert found[2] == found[3]
    assert len(set(found)) == 24


def test_a_collection_that_gives_an_image_once_is_asked_once():
    """Copies are known by what was read for the features; with those found in memory, nothing is read again."""

    class Once:
        def __init__(self):
            self.left = dict(enumerate([*PARTS.images[:8:2], saved(PARTS.images[0], 90), *PARTS.images[8::2]]))

        def __len__(self):
            return 25

        def __getitem__(self, i):
            return self.left.pop(i)

    images = Watched(check_images(Once()))
    images.load(np.arange(25), (64, 64))
    picture, known = images.small_pictures(np.arange(25))
    np.testing.assert_array_equal(known, np.arange(25))
    assert near_copies(picture, np.zeros(25, int)) == [(0, 4)]
    images = Watched(check_images(Once()))
    images.pixels(3)
    assert images.small_pictures(np.arange(25))[1].tolist() == [3]
