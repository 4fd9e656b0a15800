"""Data sets as they are distributed, on tiny trees of their exact layout; and images whose labels the caller gives."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqad.cli._files import images_to_score, known_images, training_images
from vqad.datasets import (
    ImageDataset,
    load_btad,
    load_folder,
    load_ksdd2,
    load_labelled,
    load_mpdd,
    load_mvtec,
    load_mvtec_ad2,
    load_mvtec_loco,
)
from vqad.datasets._layouts import loader_of


def save(path, rows=None):
    """An image of 6 x 8 pixels, or a mask that marks some rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((6, 8, 3), 90, np.uint8)
    if rows is not None:
        pixels = np.zeros((6, 8), np.uint8)
        pixels[list(rows)] = 255
    Image.fromarray(pixels).save(path)


def names(paths, root):
    return [Path(path).relative_to(root).as_posix() for path in paths]


@pytest.fixture(autouse=True)
def _silent():
    """These trees are whole: nothing is to be warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def ad2(tmp_path):
    root = tmp_path / "mvtec_ad_2"
    for category in ("can", "rice"):
        folder = root / category
        for name in ("train/good/000_regular", "train/good/001_regular", "validation/good/000_regular"):
            save(folder / f"{name}.png")
        for name in ("good/000_overexposed", "bad/000_regular", "bad/000_underexposed", "bad/001_shift_1"):
            save(folder / "test_public" / f"{name}.png")
        for k, name in enumerate(("000_regular", "000_underexposed", "001_shift_1")):
            save(folder / "test_public" / "ground_truth" / "bad" / f"{name}_mask.png", [k])
        save(folder / "test_private" / "000.png")
        save(folder / "test_private_mixed" / "000.png")
    return root


@pytest.fixture
def loco(tmp_path):
    root = tmp_path / "mvtec_loco_anomaly_detection"
    for category in ("breakfast_box", "pushpins"):
        folder = root / category
        for name in ("train/good/000", "train/good/001", "validation/good/000", "test/good/000"):
            save(folder / f"{name}.png")
        for kind, masks in (
            ("logical_anomalies", {"000": [[0], [1, 2]], "001": [[3]]}),
            ("structural_anomalies", {"000": [[5]]}),
        ):
            for image, marked in masks.items():
                save(folder / "test" / kind / f"{image}.png")
                for k, rows in enumerate(marked):
                    save(folder / "ground_truth" / kind / image / f"{k:03d}.png", rows)
        (folder / "defects_config.json").write_text("[]")
    for name in ("license.txt", "readme.txt"):
        (root / name).write_text("")
    return root


@pytest.fixture
def btad(tmp_path):
    root = tmp_path / "BTech_Dataset_transformed"
    for category, image, mask in (("01", ".bmp", ".png"), ("02", ".png", ".png"), ("03", ".bmp", ".bmp")):
        for k in range(2):
            for kind in ("train/ok", "test/ok", "test/ko"):
                save(root / category / kind / f"{k:04d}{image}")
            save(root / category / "ground_truth" / "ko" / f"{k:04d}{mask}", [k])
    return root


@pytest.fixture
def mpdd(tmp_path):
    root = tmp_path / "MPDD"
    for category, kind in (("bracket_black", "hole"), ("tubes", "anomalous")):
        for k in range(2):
            for place in ("train/good", "test/good", f"test/{kind}"):
                save(root / category / place / f"{k:03d}.png")
            save(root / category / "ground_truth" / kind / f"{k:03d}_mask.png", [k])
    return root


@pytest.fixture
def ksdd2(tmp_path):
    root = tmp_path / "KolektorSDD2"
    for split, first in (("train", 10000), ("test", 20000)):
        for k, rows in enumerate(([], [2], [], [0, 1])):
            save(root / split / f"{first + k}.png")
            save(root / split / f"{first + k}_GT.png", rows)
    return root


# ---- MVTec AD 2 ----------------------------------------------------------------------------------


def test_mvtec_ad_2_has_its_public_test_images_and_their_masks(ad2):
    train = load_mvtec_ad2(ad2)
    assert names(train.paths, ad2) == [
        f"{category}/train/good/{k}_regular.png" for category in ("can", "rice") for k in ("000", "001")
    ]
    assert names(load_mvtec_ad2(ad2, split="validation", categories="rice").paths, ad2) == [
        "rice/validation/good/000_regular.png"
    ]
    test = load_mvtec_ad2(ad2, split="test", categories="can")
    assert names(test.paths, ad2 / "can" / "test_public") == [
        "bad/000_regular.png",
        "bad/000_underexposed.png",
        "bad/001_shift_1.png",
        "good/000_overexposed.png",
    ]
    assert test.target.tolist() == [-1, -1, -1, 1]
    assert [mask[:, 0].nonzero()[0].tolist() for mask in test.masks()] == [[0], [1], [2], []]
    assert len(load_mvtec_ad2(ad2, split="all")) == 2 * (2 + 1 + 4)
    assert load_mvtec_ad2(ad2 / "can").category.tolist() == ["can", "can"]
    assert len(load_folder(ad2 / "can" / "test_private")) == 1


# ---- MVTec LOCO AD -------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_mvtec_loco, load_mvtec])
def test_mvtec_loco_has_all_masks_of_an_image_in_one(load, loco):
    with warnings.catch_warnings():
        warnings.simplefilter("error" if load is load_mvtec_loco else "ignore")  # it does not know validation
        test = load(loco, split="test", categories="pushpins")
    assert test.defect.tolist() == ["good", "logical_anomalies", "logical_anomalies", "structural_anomalies"]
    assert [mask[:, 0].nonzero()[0].tolist() for mask in test.masks()] == [[], [0, 1, 2], [3], [5]]
    folder = loco / "pushpins" / "ground_truth" / "logical_anomalies"
    assert [path if path is None else tuple(names(np.atleast_1d(path), folder)) for path in test.mask_paths[:3]] == [
        None,
        ("000/000.png", "000/001.png"),
        ("001/000.png",),
    ]
    again = (test + test)[[5, 1, 0]]
    assert again.mask_paths == [test.mask_paths[1], test.mask_paths[1], None]


def test_mvtec_loco_has_validation_images(loco):
    assert names(load_mvtec_loco(loco, split="validation").paths, loco) == [
        "breakfast_box/validation/good/000.png",
        "pushpins/validation/good/000.png",
    ]
    assert len(load_mvtec_loco(loco)) == 4
    assert len(load_mvtec_loco(loco, split="all")) == 2 * (2 + 1 + 4)
    with pytest.raises(ValueError, match=r"split must be one of \('train', 'validation', 'test', 'all'\); got 'val'"):
        load_mvtec_loco(loco, split="val")
    with pytest.warns(UserWarning, match=r"left out here: breakfast_box/validation, pushpins/validation\.$"):
        load_mvtec(loco)


def test_an_image_without_its_folder_of_masks_is_counted(loco):
    folder = loco / "pushpins" / "ground_truth" / "logical_anomalies"
    (folder / "001").rename(folder / "007")
    with pytest.warns(UserWarning, match=r"1 image of defects without a mask.*001\.png.* and 1 mask without an image"):
        load_mvtec_loco(loco, split="test")


# ---- BTAD and MPDD -------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_btad, load_mvtec])
def test_btad_has_masks_of_any_suffix(load, btad):
    assert load(btad).category.tolist() == ["01", "01", "02", "02", "03", "03"]
    test = load(btad, split="test")
    assert test.target.tolist() == [-1, -1, 1, 1] * 3
    assert [None if mask is None else mask[:, 0].nonzero()[0].tolist() for mask in test.masks()] == [
        [0],
        [1],
        [],
        [],
    ] * 3
    assert len(load(btad, split="all", categories="02")) == 6


@pytest.mark.parametrize("load", [load_mpdd, load_mvtec])
def test_mpdd_has_the_layout_of_mvtec_ad(load, mpdd):
    assert len(load(mpdd)) == 4
    test = load(mpdd, split="test")
    assert test.defect.tolist() == ["good", "good", "hole", "hole", "anomalous", "anomalous", "good", "good"]
    assert [mask[:, 0].nonzero()[0].tolist() for mask in test.masks()] == [[], [], [0], [1], [0], [1], [], []]


# ---- KolektorSDD2 --------------------------------------------------------------------------------


def test_ksdd2_is_labelled_by_its_masks(ksdd2):
    train, test, both = (load_ksdd2(ksdd2, split=split) for split in ("train", "test", "all"))
    assert names(train.paths, ksdd2) == ["train/10000.png", "train/10002.png"]
    assert set(train.target) == {1}
    assert names(test.paths, ksdd2) == [f"test/{20000 + k}.png" for k in range(4)]
    assert test.target.tolist() == [1, -1, 1, -1]
    assert [mask[:, 0].nonzero()[0].tolist() for mask in test.masks()] == [[], [2], [], [0, 1]]
    assert both.target.tolist() == [1, -1, 1, -1] * 2
    assert set(both.category) == {"KolektorSDD2"}


def test_ksdd2_says_what_it_leaves_out(ksdd2):
    save(ksdd2 / "test" / "20009.png")
    save(ksdd2 / "test" / "20010_GT.png", [1])
    save(ksdd2 / "test" / "20001_GT copy.png", [1])
    (ksdd2 / "test" / "20011.heic").write_bytes(b"")
    assert len(load_ksdd2(ksdd2)) == 2
    with pytest.warns(
        UserWarning, match=r"has 3 unpaired images or masks, .*20009\.png.*; and 1 file without the suffix"
    ):
        test = load_ksdd2(ksdd2, split="test")
    assert len(test) == 4
    (ksdd2 / "test" / "20000_GT.png").write_bytes(b"no mask")
    with pytest.raises(ValueError, match=r"mask .*20000_GT\.png' is truncated or not an image"):
        load_ksdd2(ksdd2, split="test")


def test_ksdd2_errors_say_what_was_found(ksdd2, mpdd):
    with pytest.raises(
        ValueError, match=r"not have the layout of KolektorSDD2, .*contains bracket_black/, tubes/.*load_labelled"
    ):
        load_ksdd2(mpdd)
    with pytest.raises(ValueError, match=r"split must be one of .*got 'validation'"):
        load_ksdd2(ksdd2, split="validation")
    for path in (ksdd2 / "test").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no images for split='test'"):
        load_ksdd2(ksdd2, split="test")


# ---- all of them ---------------------------------------------------------------------------------

LOADERS = {
    "ad2": load_mvtec_ad2,
    "loco": load_mvtec_loco,
    "btad": load_mvtec,
    "mpdd": load_mvtec,
    "ksdd2": load_ksdd2,
}


@pytest.mark.parametrize("name", LOADERS)
def test_the_command_knows_the_layout(name, request):
    root, load = request.getfixturevalue(name), LOADERS[name]
    assert loader_of(root) is load
    assert training_images(str(root)).paths.tolist() == load(root).paths.tolist()
    found, is_known = known_images(str(root))
    assert is_known
    assert found.paths.tolist() == load(root, split="test").paths.tolist()
    with pytest.raises(ValueError, match=rf"vqad\.datasets\.{load.__name__} reads"):
        load_folder(root)


@pytest.mark.parametrize("name", LOADERS)
def test_scoring_a_folder_leaves_out_its_masks(name, request):
    root = request.getfixturevalue(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name == "ksdd2" else "error")  # they lie among the images
        paths, _ = images_to_score([str(root)])
    marked = [path for path in names(paths, root) if "ground_truth" in path or "_GT" in path]
    assert marked == []
    split = LOADERS[name](root, split="all").paths
    assert set(split) <= set(paths)


@pytest.mark.parametrize("load", [load_mvtec, load_mvtec_ad2, load_mvtec_loco, load_btad, load_mpdd, load_ksdd2])
def test_a_folder_without_the_layout_is_refused(load, tmp_path):
    save(tmp_path / "OK" / "a.png")
    save(tmp_path / "NG" / "b.png")
    with pytest.raises(ValueError, match=r"does not have the layout of .*it contains NG/, OK/.*load_labelled"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "nowhere")


def test_the_loader_of_another_layout_is_named(ad2):
    warnings.simplefilter("ignore")
    with pytest.raises(ValueError, match=r"no images for split='test'.*look like MVTec AD 2: use .*load_mvtec_ad2"):
        load_mvtec(ad2, split="test")


# ---- images that the caller labels ---------------------------------------------------------------


@pytest.fixture
def parts(tmp_path):
    for k in range(12):
        save(tmp_path / "OK" / f"{k}.png")
    for k in range(4):
        save(tmp_path / "NG" / f"{k}.png")
        save(tmp_path / "MASK" / f"{k}_mask.png", [k])
    return tmp_path


def marked(found):
    return [None if mask is None else mask[:, 0].nonzero()[0].tolist() for mask in found.masks()]


@pytest.mark.parametrize(
    "given",
    [
        lambda root: (root / "OK", root / "NG", root / "MASK"),
        lambda root: (str(root / "OK" / "*.png"), str(root / "NG" / "*"), [str(root / "MASK" / "*_mask.png")]),
        lambda root: tuple(
            sorted((root / name).iterdir(), key=lambda path: (len(path.name), path.name))
            for name in ("OK", "NG", "MASK")
        ),
        lambda root: (
            [f"{root}/OK/?.png", root / "OK" / "10.png", root / "OK" / "11.png"],
            [f"{root}/N*/"],
            f"{root}/**/*mask*",
        ),
        lambda root: (os.path.relpath(root / "OK"), np.array([str(root / "NG")]), (path for path in [root / "MASK"])),
    ],
)
def test_labelled_images_come_from_folders_patterns_and_lists(given, parts):
    found = load_labelled(*given(parts), category="bolt")
    assert [Path(path).name for path in found.paths] == [f"{k}.png" for k in (*range(12), *range(4))]
    assert found.target.tolist() == [1] * 12 + [-1] * 4
    assert set(found.category) == {"bolt"}
    assert found.defect.tolist() == ["good"] * 12 + ["defect"] * 4
    assert marked(found) == [[]] * 12 + [[k] for k in range(4)]
    assert isinstance(found, ImageDataset)


def test_labelled_images_may_have_one_name_in_several_folders(tmp_path):
    for kind, rows in (("dent", [1]), ("hole", [2])):
        save(tmp_path / "bad" / kind / "0.png")
        save(tmp_path / "marks" / kind / "0_GT.png", rows)
    save(tmp_path / "good" / "0.png")
    found = load_labelled(tmp_path / "good", tmp_path / "bad", tmp_path / "marks")
    assert found.defect.tolist() == ["good", "dent", "hole"]
    assert marked(found) == [[], [1], [2]]
    save(tmp_path / "flat" / "0.png", [3])
    with pytest.raises(ValueError, match=r"mask '.*flat/0\.png' may belong to '.*dent/0\.png' or to '.*hole/0\.png'"):
        load_labelled(anomalous=tmp_path / "bad", masks=tmp_path / "flat")


def test_labelled_images_may_have_several_masks(tmp_path):
    for name in ("000", "001"):
        save(tmp_path / "bad" / f"{name}.png")
    for name, rows in (("000/000", [0]), ("000/001", [4]), ("001/000", [2])):
        save(tmp_path / "marks" / f"{name}.png", rows)
    assert marked(load_labelled(anomalous=tmp_path / "bad", masks=tmp_path / "marks")) == [[0, 4], [2]]


def test_labelled_masks_may_lie_beside_their_images(tmp_path):
    for k in range(3):
        save(tmp_path / f"Part{k}.jpg")
        save(tmp_path / f"Part{k}_label.bmp", [k])
    found = load_labelled(anomalous=f"{tmp_path}/*.jpg", masks=f"{tmp_path}/*_label.bmp")
    assert marked(found) == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("remove", "add", "said"),
    [
        (["MASK/0_mask.png"], [], "have 1 image of defects without a mask, where others have one"),
        (["NG/0.png", "NG/1.png"], [], None),  # of normal images of these names
        ([], ["MASK/77.png", "MASK/78_GT.png"], "have 2 masks without an image"),
        (
            ["MASK/3_mask.png"],
            ["MASK/03.png"],
            "have 1 image of defects without a mask, .* and 1 mask without an image",
        ),
    ],
)
def test_labelled_images_and_masks_that_do_not_match_are_counted(remove, add, said, parts):
    for name in remove:
        (parts / name).unlink()
    for name in add:
        save(parts / name, [0])
    if said is None:
        load_labelled(parts / "OK", parts / "NG", parts / "MASK")
    else:
        with pytest.warns(UserWarning, match=f"the images and masks given {said}"):
            load_labelled(parts / "OK", parts / "NG", parts / "MASK")
    assert marked(load_labelled(parts / "OK", parts / "NG", None))[-1] is None


def test_labelled_images_errors_say_what_to_do(parts):
    (parts / "empty").mkdir()
    for given, error, message in (
        ({}, ValueError, "normal and anomalous have no images"),
        ({"normal": parts / "empty"}, ValueError, r"normal: '.*empty' has no images"),
        ({"normal": f"{parts}/*.tif"}, ValueError, r"normal: '.*\*\.tif' has no images"),
        ({"anomalous": parts / "nowhere"}, FileNotFoundError, r"anomalous: '.*nowhere' does not exist"),
        ({"normal": f"{parts}/*/*.png", "anomalous": parts / "NG"}, ValueError, "is in both normal and anomalous"),
        ({"anomalous": parts / "NG", "masks": parts / "NG"}, ValueError, "is in both anomalous and masks"),
        ({"normal": [parts / "OK", parts / "OK" / "3.png"]}, ValueError, r"normal has '.*3\.png' twice"),
        ({"normal": [1, 2]}, TypeError, "normal must be paths of folders or files, or patterns; got 1"),
        ({"normal": parts / "OK", "category": ["a"]}, TypeError, "category must be a str"),
    ):
        with pytest.raises(error, match=message):
            load_labelled(**given)
    (parts / "OK" / "a.heic").write_bytes(b"")
    for given in (parts / "OK", f"{parts}/OK/*"):
        with pytest.warns(UserWarning, match=r"normal has 1 file without the suffix of an image .*a\.heic\.$"):
            load_labelled(given)


# ---- masks of photographs that are turned --------------------------------------------------------


def photograph(tmp_path, turn, size=(48, 64), suffix=".jpg", of_mask=None):
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(tmp_path / f"a{suffix}", exif=exif)
    mask = np.zeros(size, np.uint8)
    mask[:8, :8] = 255
    options = {} if of_mask is None else {"exif": exif}
    Image.fromarray(mask).save(tmp_path / "m.png", **options)
    return ImageDataset([tmp_path / f"a{suffix}"], target=[-1], mask_paths=[tmp_path / "m.png"])


@pytest.mark.parametrize("turn", [5, 6, 7, 8])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_a_mask_that_an_exif_tag_makes_misfit_is_told_so(turn, suffix, tmp_path):
    data = photograph(tmp_path, turn, suffix=suffix)
    with pytest.raises(
        ValueError, match=rf"m\.png' has shape \(48, 64\).*, has \(64, 48\): its EXIF orientation, {turn}, "
    ):
        data.mask(0)
    assert photograph(tmp_path, turn, suffix=suffix, of_mask=turn).mask(0).shape == (64, 48)


@pytest.mark.parametrize(("turn", "size"), [(2, (48, 64)), (3, (48, 64)), (4, (48, 64)), (6, (48, 48)), (8, (32, 32))])
def test_a_mask_that_may_have_been_drawn_before_the_turn_is_warned_of_once(turn, size, tmp_path):
    data = photograph(tmp_path, turn, size)
    with pytest.warns(
        UserWarning, match=rf"has an EXIF orientation, {turn}, that .*its mask has none: the mask is taken as"
    ):
        assert data.mask(0)[:8, :8].all()
    data.mask(0)
    mask = photograph(tmp_path, turn, size, of_mask=turn).mask(0)
    assert mask.sum() == 64


def test_another_misfit_is_not_laid_to_the_tag(tmp_path):
    data = photograph(tmp_path, 6)
    save(tmp_path / "m.png", [1])
    with pytest.raises(ValueError, match=r"m\.png' has shape \(6, 8\), but .*, has \(64, 48\)\.$"):
        data.mask(0)
    assert photograph(tmp_path, 1).mask(0).sum() == 64
