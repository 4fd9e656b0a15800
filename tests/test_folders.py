"""What lies in a folder and is not read, or is not what it seems, is said; labelled folders are not learned whole."""

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from vqad.cli._files import files, images_to_score, known_images, training_images
from vqad.datasets import _words, load_folder, load_mvtec, load_visa

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def fill(root, counts, suffix=".png"):
    """Images in folders, numbered from 0 in each."""
    for folder, n in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for k in range(n):
            Image.fromarray(PIXELS).save(root / folder / f"{k:03d}{suffix}")
    return root


def said_by(load, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = load(*args, **options)
    return found, [str(warning.message) for warning in caught]


def inside(paths, root):
    return sorted({Path(path).relative_to(root).parent.as_posix() for path in paths})


# ---- folders that are labelled by hand -----------------------------------------------------------

LABELLED = {
    "OK, NG, MASK": ("OK", ["NG"], ["MASK"]),
    "ok, nok": ("ok", ["nok"], []),
    "good, bad, ground_truth": ("good", ["bad"], ["ground_truth"]),
    "Normal, Abnormal, Masks": ("Normal", ["Abnormal"], ["Masks"]),
    "normal, anomaly, gt": ("normal", ["anomaly"], ["gt"]),
    "good, scratch, dent": ("good", ["scratch", "dent"], []),
    "Defect free, Defective": ("Defect free", ["Defective"], []),
    "non_defective, defective": ("non_defective", ["defective"], []),
    "OK, NotOK": ("OK", ["NotOK"], []),
    "0_good, 1_bad": ("0_good", ["1_bad"], []),
    "ok_front, def_front": ("ok_front", ["def_front"], []),
    "good parts, bad_parts": ("good parts", ["bad_parts"], []),
    "pass, fail": ("pass", ["fail"], []),
    "i.O., n.i.O.": ("i.O.", ["n.i.O."], []),
    "gut, fehler": ("gut", ["fehler"], []),
    "良品, 不良品": ("良品", ["不良品"], []),
    "Negative, Positive": ("Negative", ["Positive"], []),
    "normal, defect, label": ("normal", ["defect"], ["label"]),
}


@pytest.mark.parametrize("where", ["", "bolt", "line 1/bolt"])
@pytest.mark.parametrize("names", LABELLED)
def test_hand_labelled_folders_are_refused_at_any_depth(names, where, tmp_path):
    good, bad, masks = LABELLED[names]
    fill(tmp_path, {f"{where}/{name}".strip("/"): 3 for name in (good, *bad, *masks)})
    with pytest.raises(ValueError, match=r"names say that not all images are normal") as caught:
        load_folder(tmp_path)
    said = str(caught.value)
    assert f"such as {str(tmp_path / where / good)!r}" in said
    assert all(f"{name} (3 images)" in said for name in (good, *bad, *masks))
    for kind, names in (("normal", [good]), ("anomalous", bad), ("masks", masks)):
        places = [str(tmp_path / where / name) for name in sorted(names)]
        assert (f"{kind}={places if len(places) > 1 else places[0]!r}" if places else "normal=") in said


@pytest.mark.parametrize("names", LABELLED)
def test_the_command_learns_from_the_normal_ones_of_hand_labelled_folders(names, tmp_path):
    good, bad, masks = LABELLED[names]
    fill(tmp_path / "one", {good: 4} | dict.fromkeys(bad, 2) | dict.fromkeys(masks, 1))
    found, said = said_by(training_images, str(tmp_path / "one"))
    assert inside(found.paths, tmp_path) == [f"one/{good}"]
    assert set(found.target) == {1}
    assert set(found.category) == {"one"}
    assert len(said) == 1
    assert "left out: " in said[0]
    assert all(f"{name} (" in said[0] for name in (*bad, *masks))
    (found, is_known), said = said_by(known_images, str(tmp_path / "one"))
    assert is_known
    assert sorted(found.target) == [-1] * 2 * len(bad) + [1] * 4
    assert any("too few false alarms" in line for line in said)
    assert sum(path is not None for path in found.mask_paths) == len(masks)
    fill(tmp_path / "two" / "bolt", {good: 4} | dict.fromkeys(bad, 2))
    fill(tmp_path / "two" / "nut", {good: 3} | dict.fromkeys(bad, 2))
    found, _ = said_by(training_images, str(tmp_path / "two"))
    assert found.category.tolist() == ["bolt"] * 4 + ["nut"] * 3


@pytest.mark.parametrize(
    "names",
    [
        ("train", "test"),
        ("Train", "VALID"),
        ("training", "Testing", "val"),
        ("good", "test"),
        ("images", "masks"),
        ("img", "label"),
        ("bolt", "ground_truth"),
        ("bolt", "defects"),
        ("train/bolt", "test/bolt"),
        ("NG",),
        ("bolt/NG", "nut/NG"),
    ],
)
def test_what_is_not_all_normal_and_cannot_be_told_is_refused(names, tmp_path):
    fill(tmp_path, dict.fromkeys(names, 3))
    for load in (load_folder, lambda folder: training_images(str(folder))):
        with pytest.raises(ValueError, match=r"names say that not all images are normal"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "masks"),
    [
        ("Train/Good", "Test/Scratch", "Ground_Truth/Scratch"),
        ("train/OK", "test/NG", None),
        ("TRAIN/normal", "TEST/abnormal", "MASK"),
        ("Training/good", "testing/bad", "GT/BAD"),
        ("train/ok", "test/ko", "masks/ko"),
    ],
)
@pytest.mark.parametrize("where", ["part", "."])
def test_train_and_test_in_any_case_are_understood(train, test, masks, where, tmp_path):
    fill(tmp_path / where, {train: 4, test: 3} | ({masks: 3} if masks else {}))
    with pytest.raises(ValueError, match=r"load_mvtec reads"):
        load_folder(tmp_path)
    found, said = said_by(training_images, str(tmp_path))
    assert inside(found.paths, tmp_path / where) == [train]
    assert said == []
    found, said = said_by(load_mvtec, tmp_path, split="test")
    assert said == []
    assert found.target.tolist() == [-1] * 3
    assert found.defect.tolist() == [test.split("/")[1]] * 3
    assert [path is not None for path in found.mask_paths] == [masks is not None] * 3
    scored, said = said_by(images_to_score, [str(tmp_path)])
    assert inside(scored[0], tmp_path / where) == sorted([train, test])
    assert said == []


@pytest.mark.parametrize(
    "names",
    [
        ("bolt", "nut", "screw"),
        ("good",),
        ("bolt/good", "nut/good"),
        ("OK/bolt", "OK/nut"),
        ("train",),
        ("NG-300", "NG-500"),
        ("Bad Ischl", "Gutach"),
        ("hole puncher", "crack detector"),
        ("io", "cpu"),
        ("bolt-ok", "nut-ok"),
        ("goods", "testbed", "masked man"),
        ("1", "2", "10"),
    ],
)
def test_folders_of_products_stay_silent(names, tmp_path):
    fill(tmp_path, dict.fromkeys(names, 3))
    found, said = said_by(load_folder, tmp_path)
    assert len(found) == 3 * len(names)
    assert said == []
    scored, said = said_by(images_to_score, [str(tmp_path)])
    assert len(scored[0]) == len(found)
    assert said == []


@pytest.mark.parametrize("name", ["mask", "Masks", "test", "fault", "labels"])
def test_a_name_that_may_be_a_product_is_warned_of(name, tmp_path):
    fill(tmp_path, {"bolt": 3, name: 3})
    found, said = said_by(load_folder, tmp_path)
    assert len(found) == 6
    assert len(said) == 1
    assert f"has folders named {name!r}, which are taken for categories of normal images" in said[0]


def test_images_said_to_be_anomalous_may_lie_in_folders_named_so(tmp_path):
    fill(tmp_path, {"NG": 2, "defect": 1})
    found, said = said_by(load_folder, tmp_path, target=-1)
    assert found.target.tolist() == [-1] * 3
    assert said == []
    fill(tmp_path, {"OK": 2})
    with pytest.raises(ValueError, match="names say that not all images are normal"):
        load_folder(tmp_path, target=-1)
    assert len(load_folder(tmp_path / "NG")) == 2, "the folder itself was named by the caller"
    assert len(load_folder(fill(tmp_path, {".": 2}), recursive=False)) == 2


@pytest.mark.parametrize("names", [("0.png", "0_mask.png"), ("Part0.jpg", "Part0_label.bmp"), ("a.png", "a_GT.png")])
def test_masks_beside_their_images_are_no_normal_images(names, tmp_path):
    for name in (*names, "other.png"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    pattern = r"1 of 3 images that are named like masks of others, such as '\w+\.\w+' for '\w+'"
    with pytest.raises(ValueError, match=pattern):
        load_folder(tmp_path)
    (scored, _), said = said_by(images_to_score, [str(tmp_path)])
    assert [Path(path).name for path in scored] == sorted([names[0], "other.png"])
    assert len(said) == 1
    assert f"masks by their names, left out here: {names[1]}" in said[0]
    (tmp_path / names[0]).unlink()
    assert len(load_folder(tmp_path)) == 2, "a product may be called so"


def test_files_that_are_labelled_by_their_names_are_refused_or_warned_of(tmp_path):
    for names, what in (
        (["ok_1", "ok_2", "ng_1"], "refused"),
        (["good-1", "1-BAD", "good-2"], "refused"),
        (["bolt_normal", "bolt2_normal", "bolt_abnormal"], "refused"),
        (["1", "2", "3_defect"], "warned"),
        (["NG_1", "NG_2"], "warned"),
        (["ok_1", "ok_2"], "silent"),
        (["1", "badge_1", "NGC_2"], "silent"),
    ):
        root = tmp_path / "-".join(names)
        root.mkdir()
        for name in names:
            Image.fromarray(PIXELS).save(root / f"{name}.png")
        if what == "refused":
            with pytest.raises(ValueError, match=r"2 such as .*, 1 such as .*load_labelled"):
                load_folder(root)
            continue
        found, said = said_by(load_folder, root)
        assert len(found) == len(names)
        assert len(said) == (what == "warned")
        assert all("whose names say that they are not normal" in line for line in said)


def test_masks_that_are_only_called_so_are_left_out_of_scoring_and_named(tmp_path):
    fill(tmp_path, {"OK": 2, "NG": 2, "MASK": 2})
    (scored, _), said = said_by(images_to_score, [str(tmp_path)])
    assert inside(scored, tmp_path) == ["NG", "OK"]
    assert len(said) == 1
    assert "masks by their names, left out here: MASK." in said[0]


@pytest.mark.parametrize(
    ("names", "left", "is_said"),
    [
        (("images", "masks"), ["masks"], True),
        (("line/img", "line/label"), ["line/label"], True),
        (("good", "scratch", "GT"), ["GT"], True),
        (("bolt", "ground_truth"), [], True),
        (("bolt", "Masks"), [], False),
        (("bolt", "ground_truth", "Masks"), [], True),
    ],
)
def test_scoring_leaves_out_masks_of_images_beside_them_alone(names, left, is_said, tmp_path):
    fill(tmp_path, dict.fromkeys(names, 2))
    (scored, _), said = said_by(images_to_score, [str(tmp_path)])
    assert inside(scored, tmp_path) == sorted(set(names) - set(left))
    assert len(said) == is_said
    for name in left:
        assert f"left out here: {name}." in said[0]


def test_words_of_names():
    for name, kind in (("OK", "normal"), ("good parts", "normal"), ("NG 2", "anomalous"), ("Ground-Truth", "masks")):
        assert _words.kind_of(name) == kind
    for name in ("bolt", "ok bolt", "mask", "NG-300", "", "..."):
        assert _words.kind_of(name) is None
    for mask in ("012", "012_mask", "012-GT", "012 label", "012_ground_truth", "012.mask"):
        assert _words.image_of_mask(mask) == "012"
    assert _words.image_of_mask("bitmask") == "bitmask"


# ---- suffixes ------------------------------------------------------------------------------------

SUFFIXES = {
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".tga": "TGA",
    ".dib": "DIB",
    ".j2k": "JPEG2000",
    ".jpx": "JPEG2000",
    ".apng": "PNG",
    ".pbm": "PPM",
    ".PCX": "PCX",
    ".sgi": "SGI",
    ".ico": "ICO",
    ".webp": "WEBP",
    ".TIFF": "TIFF",
    ".dds": "DDS",
}


def with_suffix(folder, suffix, form):
    folder.mkdir(parents=True)
    for k in range(4):
        image = Image.fromarray(PIXELS)
        image = image.convert("1") if suffix == ".pbm" else image
        name, how = (f"{k}.png", "PNG") if k % 2 else (f"{k}{suffix}", form)
        image.save(folder / name, how)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_that_pillow_reads_is_an_image(suffix, tmp_path):
    if SUFFIXES[suffix] == "JPEG2000" and not features.check("jpg_2000"):
        pytest.skip("Pillow without JPEG 2000")
    for folder in ("part/train/good", "part/test/good", "plain"):
        with_suffix(tmp_path / folder, suffix, SUFFIXES[suffix])
    found, said = said_by(load_folder, tmp_path / "plain")
    assert len(found) == 4
    assert found[0].shape == (8, 8, 3)
    assert said == []
    found, said = said_by(load_mvtec, tmp_path / "part", split="all")
    assert len(found) == 8
    assert said == []
    (scored, _), said = said_by(images_to_score, [str(tmp_path / "plain")])
    assert len(scored) == 4
    assert said == []


@pytest.mark.parametrize("suffix", [".png.bak2", "", ".heic", ".cr2", ".npy", ".raw", ".hdf5"])
def test_other_files_are_counted_and_named_in_one_warning(suffix, tmp_path):
    for folder in ("part/train/good", "part/test/good", "plain", "deep/bolt"):
        with_suffix(tmp_path / folder, suffix, "PNG")
    for load, root, n, names in (
        (load_folder, "plain", 2, f"0{suffix}, 2{suffix}"),
        (load_folder, "deep", 2, f"bolt/0{suffix}, bolt/2{suffix}"),
        (
            load_mvtec,
            "part",
            4,
            f"test/good/0{suffix}, test/good/2{suffix}, train/good/0{suffix}, train/good/2{suffix}",
        ),
        (lambda root: images_to_score([str(root)])[0], "plain", 2, f"0{suffix}, 2{suffix}"),
    ):
        found, said = said_by(load, tmp_path / root)
        assert len(found) == 2
        assert len(said) == 1
        assert f"{n} files without the suffix of an image format that Pillow reads, left out here: {names}." in said[0]


def test_many_files_left_out_are_counted_and_texts_are_none(tmp_path):
    fill(tmp_path, {".": 2})
    for name in ("notes.txt", "labels.csv", "README", "LICENSE", "Thumbs.db", "a.json", ".DS_Store", "set.zip"):
        (tmp_path / name).write_text("")
    assert said_by(load_folder, tmp_path)[1] == []
    for k in range(7):
        (tmp_path / f"{k}.heic").write_text("")
    (tmp_path / "license plate").write_text("")
    [said] = said_by(load_folder, tmp_path)[1]
    assert "has 7 files without the suffix" in said
    assert said.endswith("0.heic, 1.heic, 2.heic, 3.heic, 4.heic and 2 more.")


def test_a_format_that_a_plug_in_adds_is_an_image(tmp_path, monkeypatch):
    fill(tmp_path, {".": 2})
    (tmp_path / "a.heic").write_bytes((tmp_path / "000.png").read_bytes())
    assert len(said_by(load_folder, tmp_path)[0]) == 2
    monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")
    found, said = said_by(load_folder, tmp_path)
    assert len(found) == 3
    assert said == []


# ---- what belongs together -----------------------------------------------------------------------


def mvtec_with(root, images, masks):
    fill(root, {"nut/train/good": 2, "nut/test/good": 1})
    for folder, names in (("nut/test", images), ("nut/ground_truth", masks)):
        for name in names:
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PIXELS).save(path)


@pytest.mark.parametrize(
    ("images", "masks", "said"),
    [
        (["dent/0.png", "dent/1.png"], ["dent/0_mask.png", "dent/1.bmp"], None),
        (["dent/0.png", "dent/1.png"], ["dent/0_GT.png", "dent/1-mask.png"], None),
        (["dent/0.png", "Hole/1.png"], ["Dent/0.png", "hole/1.png"], None),
        (["dent/0.png", "dent/1.png"], [], None),
        (["label/0.png", "mask/1.png"], ["label/0.png", "mask/1_mask.png"], None),  # kinds of defects too
        (["label/0.png", "dent/1.png"], [], None),
        (["dent/0.png", "hole/0.png"], ["dent/0.png", "hole/0.png", "good/000.png"], None),
        (
            ["dent/0.png", "dent/1.png"],
            ["dent/0.png"],
            "1 image of defects without a mask, where others have one (nut/",
        ),
        (["dent/0.png", "hole/1.png", "hole/2.png"], ["dent/0.png"], "2 images of defects without a mask"),
        (
            ["dent/0.png"],
            ["dent/0.png", "dent/7_mask.png"],
            "1 mask without an image (nut/ground_truth/dent/7_mask.png)",
        ),
        (["dent/0.png"], ["hole/0.png", "hole/1.png"], "2 masks without an image"),
        (["dent/0.png", "dent/1.png"], ["dent/0.png", "dent/01.png"], "1 image of defects without a mask"),
        (["dent/0.png", "dent/1.png"], ["dent/0.png", "dent/01.png"], "and 1 mask without an image"),
        (["dent/0.png", "hole/0.png"], ["0.png"], "1 mask without an image"),
    ],
)
def test_masks_and_images_that_do_not_match_are_counted(images, masks, said, tmp_path):
    mvtec_with(tmp_path, images, masks)
    assert said_by(load_mvtec, tmp_path)[1] == [], "training images have no masks"
    found, lines = said_by(load_mvtec, tmp_path, split="test")
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]
    if said is None:
        found = found[found.target == -1]
        assert [path is not None for path in found.mask_paths] == [bool(masks)] * len(images)


def test_images_of_visa_that_are_not_in_its_table_are_named(visa_root):
    assert said_by(load_visa, visa_root, split="all")[1] == []
    fill(visa_root, {"candle/Data/Images/Normal": 2}, ".JPG")
    (visa_root / "candle/Data/Images/Anomaly/1.heic").write_bytes(b"")
    [said] = said_by(load_visa, visa_root)[1]
    assert "has 2 images that are not in split_csv/1cls.csv, left out here: candle/Data/Images/Normal/000.JPG" in said
    assert "1 file without the suffix" in said
    assert said_by(load_visa, visa_root, categories="pcb1")[1] == []


def test_what_is_read_of_a_collection_has_every_mask(tmp_path):
    mvtec_with(tmp_path, ["dent/0.png"], ["dent/0/000.png", "dent/0/001.png"])
    found = load_mvtec(tmp_path, split="test")
    assert [os.path.basename(path) for path in files(found)] == ["0.png", "000.png", "000.png", "001.png"]
