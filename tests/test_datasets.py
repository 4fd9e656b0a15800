"""Collections list the right files, open none before it is asked for, and stay lazy through scikit-learn."""

import os
import pickle
import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import KFold, ShuffleSplit, cross_val_score, train_test_split
from sklearn.utils import resample, shuffle

from vqad.datasets import (
    ElpvDataset,
    ImageDataset,
    load_elpv,
    load_folder,
    load_mvtec,
    load_visa,
    make_textured_parts,
)
from vqad.datasets.synthetic import DEFECTS, _draw
from vqad.images import check_images

# One image of the fixture has no mask on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:.*images? of defects without a mask:UserWarning")


def save_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def opened(monkeypatch):
    """The names of the image files that have been opened."""
    names = []
    real_open = Image.open

    def noting_open(file, *args):
        names.append(getattr(file, "name", file))
        return real_open(file, *args)

    monkeypatch.setattr(Image, "open", noting_open)
    return names


def ends(paths):
    return ["/".join(str(path).split(os.sep)[-3:]) for path in paths]


# ---- the MVTec AD layout -------------------------------------------------------------------------


def test_mvtec_train_split_is_the_normal_images(mvtec_root):
    data = load_mvtec(mvtec_root)
    assert ends(data.paths) == [f"train/good/{k}.png" for k in (0, 1, 2)] * 2
    assert data.category.tolist() == ["bolt"] * 3 + ["nut"] * 3
    assert data.target.tolist() == [1] * 6
    assert set(data.defect) == {"good"}


def test_mvtec_test_split_has_labels_and_masks_in_natural_order(mvtec_root):
    data = load_mvtec(mvtec_root, categories="nut", split="test")
    assert ends(data.paths) == [f"test/good/{k}.png" for k in range(2)] + [f"test/scratch/{k}.png" for k in range(11)]
    assert data.target.tolist() == [1] * 2 + [-1] * 11
    assert data.defect.tolist() == ["good"] * 2 + ["scratch"] * 11
    assert data.mask_paths[:2] == [None, None]
    assert data.mask_paths[-1] is None
    assert ends(data.mask_paths[2:12]) == [f"ground_truth/scratch/{k}_mask.png" for k in range(10)]
    masks = data.masks()
    assert [mask.sum() for mask in masks[:-1]] == [0, 0, *(10 * k for k in range(10))]
    assert masks[-1] is None
    assert {mask.shape for mask in masks[:-1]} == {(12, 10)}
    assert {mask.dtype for mask in masks[:-1]} == {np.dtype(bool)}
    assert [mask.sum() for mask in data.masks([5, 3])] == [30, 10]


def test_mvtec_all_is_train_and_test(mvtec_root):
    both = load_mvtec(mvtec_root, split="all")
    parts = [*load_mvtec(mvtec_root, split="train").paths, *load_mvtec(mvtec_root, split="test").paths]
    assert sorted(both.paths) == sorted(parts)


def test_mvtec_categories_come_in_the_order_asked_for(mvtec_root):
    data = load_mvtec(mvtec_root, categories=["nut", "bolt"])
    assert data.category.tolist() == ["nut"] * 3 + ["bolt"] * 3


def test_mvtec_root_may_be_one_category(mvtec_root, monkeypatch):
    expected = load_mvtec(mvtec_root, categories="nut", split="all")
    data = load_mvtec(mvtec_root / "nut", split="all")
    assert data.paths.tolist() == expected.paths.tolist()
    assert set(data.category) == {"nut"}
    monkeypatch.chdir(mvtec_root / "nut")
    assert set(load_mvtec(".").category) == {"nut"}


def test_mvtec_reads_the_layout_of_btad(tmp_path):
    """Normal kinds are called ok, and masks bear the name of the image with another suffix."""
    for kind in ("train/ok", "test/ok", "test/ko"):
        save_png(tmp_path / "01" / kind / "0000.png", np.zeros((5, 5), np.uint8))
    mask_folder = tmp_path / "01" / "ground_truth" / "ko"
    mask_folder.mkdir(parents=True)
    Image.fromarray(np.eye(5, dtype=np.uint8) * 255).save(mask_folder / "0000.bmp")
    data = load_mvtec(tmp_path, split="all")
    assert data.target.tolist() == [1, -1, 1]
    assert data.defect.tolist() == ["good", "ko", "good"]
    np.testing.assert_array_equal(data.mask(1), np.eye(5, dtype=bool))


def test_mvtec_mask_of_another_image_is_not_taken(mvtec_root):
    """Image 1 has no mask of its own, and that of image 11 or 10 is not one."""
    folder = mvtec_root / "nut" / "ground_truth" / "scratch"
    (folder / "1_mask.png").rename(folder / "11_mask.png")
    data = load_mvtec(mvtec_root, categories="nut", split="test")
    assert data.mask_paths[3] is None
    assert data.masks([2, 3])[1] is None


def test_mvtec_skips_hidden_files_and_other_files(mvtec_root):
    expected = load_mvtec(mvtec_root, split="all").paths.tolist()
    for folder in ("nut/train/good", "nut/test/scratch", "nut/test"):
        (mvtec_root / folder / "._0.png").write_bytes(b"")
        (mvtec_root / folder / "Thumbs.db").write_bytes(b"")
    (mvtec_root / ".cache").mkdir()
    (mvtec_root / "license.txt").write_text("")
    assert load_mvtec(mvtec_root, split="all").paths.tolist() == expected


def test_mvtec_names_folders_of_images_beside_the_categories(mvtec_root):
    """A licence and hidden files are none, nor is an empty folder."""
    (mvtec_root / "license.txt").write_text("")
    for name in ("papers", ".cache", "nut/validation/good"):
        (mvtec_root / name).mkdir(parents=True)
    save_png(mvtec_root / ".cache" / "a.png", np.zeros((4, 4), np.uint8))
    for category in ("bolt", "nut"):
        (mvtec_root / category / "test" / "scratch" / "10.png").unlink()  # it has no mask
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for split in ("train", "test", "all"):
            load_mvtec(mvtec_root, split=split)
            load_mvtec(mvtec_root / "nut", split=split)
    save_png(mvtec_root / "screw" / "deep" / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.warns(UserWarning, match=r"has images outside .* too, left out here: screw\.$"):
        data = load_mvtec(mvtec_root)
    assert set(data.category) == {"bolt", "nut"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_mvtec(mvtec_root, categories=["nut"])
    save_png(mvtec_root / "nut" / "validation" / "good" / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.warns(UserWarning, match=r"left out here: nut/validation\.$"):
        load_mvtec(mvtec_root, categories=["nut"])


def test_mvtec_errors_say_what_was_found(mvtec_root, tmp_path_factory):
    plain = tmp_path_factory.mktemp("plain")
    save_png(plain / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"CATEGORY/train/good.*contains a\.png.*load_folder"):
        load_mvtec(plain)
    with pytest.raises(ValueError, match=r"no category \['screw'\]; it has \['bolt', 'nut'\]"):
        load_mvtec(mvtec_root, categories=["nut", "screw"])
    with pytest.raises(ValueError, match=r"split must be one of .*got 'validation'"):
        load_mvtec(mvtec_root, split="validation")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_mvtec(mvtec_root / "nowhere")
    with pytest.raises(NotADirectoryError, match="is a file"):
        load_mvtec(plain / "a.png")
    (plain / "a.png").rename(plain / "moved.png")
    (plain / "cup" / "train" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no images for split='train' in the categories \['cup'\]"):
        load_mvtec(plain)


# ---- VisA ----------------------------------------------------------------------------------------


def test_visa_splits_are_those_of_its_table(visa_root):
    train, test = load_visa(visa_root), load_visa(visa_root, split="test")
    assert ends(train.paths) == [f"Images/Normal/{k}.JPG" for k in (0, 1, 10)] + ["Images/Normal/0.JPG"]
    assert train.category.tolist() == ["candle"] * 3 + ["pcb1"]
    assert set(train.target) == {1}
    assert ends(test.paths) == ["Images/Anomaly/0.JPG", "Images/Normal/2.JPG", "Images/Anomaly/1.JPG"]
    assert test.category.tolist() == ["candle", "candle", "pcb1"]
    assert test.target.tolist() == [-1, 1, -1]
    both = load_visa(visa_root, split="all", categories=["pcb1", "candle"])
    assert both.category.tolist() == ["pcb1"] * 2 + ["candle"] * 5
    assert sorted(both.paths) == sorted([*train.paths, *test.paths])


def test_visa_masks_mark_every_kind_of_defect(visa_root):
    defective, normal, without_mask = load_visa(visa_root, split="test").masks()
    expected = np.zeros((8, 10), bool)
    expected[1, 2] = expected[5, 6] = True  # kinds 1 and 3
    np.testing.assert_array_equal(defective, expected)
    assert not normal.any()
    assert without_mask is None


def test_visa_is_read_lazily(visa_root, opened):
    data = load_visa(visa_root, categories="pcb1", split="all")
    assert opened == []
    assert data[0].shape == (8, 10, 3)


def test_visa_root_may_be_one_object(visa_root, monkeypatch):
    expected = load_visa(visa_root, categories="candle", split="all")
    assert load_visa(visa_root / "candle", split="all").paths.tolist() == expected.paths.tolist()
    monkeypatch.chdir(visa_root / "candle")
    assert set(load_visa(".").category) == {"candle"}


def test_visa_without_its_table_or_from_further_up_is_no_folder_of_normal_images(visa_root, mvtec_root):
    for root in (visa_root / "candle", visa_root, visa_root.parent):
        with pytest.raises(ValueError, match=r"load_(visa|mvtec) reads.*tells defects and masks from normal"):
            load_folder(root)
    (visa_root / "split_csv" / "1cls.csv").unlink()
    for root in (visa_root / "candle", visa_root):
        with pytest.raises(ValueError, match=r"candle' has a layout that vqad\.datasets\.load_visa reads"):
            load_folder(root)
        with pytest.raises(ValueError, match=r"no 'split_csv/1cls\.csv', which labels the images"):
            load_visa(root)


def test_visa_errors_say_what_was_found(visa_root, mvtec_root):
    with pytest.raises(ValueError, match=r"no 'split_csv/1cls\.csv'.*it contains bolt/, nut/.*load_mvtec"):
        load_visa(mvtec_root)
    with pytest.raises(ValueError, match=r"no category \['fryum'\]; it has \['candle', 'pcb1'\]"):
        load_visa(visa_root, categories="fryum")
    with pytest.raises(ValueError, match=r"split must be one of"):
        load_visa(visa_root, split="2cls")
    table = visa_root / "split_csv" / "1cls.csv"
    text = table.read_text()
    for change, message in (
        (("object,", "class,"), "is not a table of VisA: it lacks the columns object"),
        (("test,anomaly", "test,broken"), r"line 6 must name an image, .*label normal or anomaly.*'broken'"),
        (("\npcb1", "\n\n\npcb1"), None),
        (("test,anomaly", "train,anomaly"), "line 6 has an anomaly in the training split"),
        (("candle/Data/Images/Anomaly", "/tmp"), "line 6 has a path outside the data set"),
        (("candle/Data/Masks", "../Masks"), "line 6 has a path outside the data set"),
        (("test,normal,candle", "\n\ntest,normal,candle"), "line 7 must name an image"),
    ):
        table.write_text(text.replace(*change, 1))
        if message:
            with pytest.raises(ValueError, match=message):
                load_visa(visa_root)
        else:
            assert len(load_visa(visa_root, split="all")) == 7
    table.write_bytes(text.replace("candle", "k\xe4se").encode("latin-1"))
    with pytest.raises(ValueError, match=r"1cls\.csv' is not a table of VisA: 'utf-8' codec"):
        load_visa(visa_root)
    table.write_text("object,split,label,image,mask\npcb1,train,normal,pcb1/a.JPG,\n")
    with pytest.raises(ValueError, match=r"no images for split='test' in the categories \['pcb1'\]"):
        load_visa(visa_root, split="test")


# ---- plain folders -------------------------------------------------------------------------------


def test_folder_of_images_is_one_category_in_natural_order(tmp_path):
    root = tmp_path / "bolts"
    for k in (1, 2, 10):
        save_png(root / f"part-{k}.PNG", np.zeros((4, 4), np.uint8))
    (root / ".hidden.png").write_bytes(b"")
    (root / "notes.txt").write_text("")
    data = load_folder(root)
    assert ends(data.paths) == [f"{tmp_path.name}/bolts/part-{k}.PNG" for k in (1, 2, 10)]
    assert data.category.tolist() == ["bolts"] * 3
    assert data.target.tolist() == [1] * 3


def test_subfolders_are_categories(tmp_path):
    for name in ("nut/a.png", "bolt/b.png", "bolt/deep/c.jpg", "bolt/.git/d.png"):
        save_png(tmp_path / name, np.zeros((4, 4), np.uint8))
    data = load_folder(tmp_path)
    assert [path.rsplit("/", 1)[1] for path in data.paths] == ["b.png", "c.jpg", "a.png"]
    assert data.category.tolist() == ["bolt", "bolt", "nut"]
    save_png(tmp_path / "e.png", np.zeros((4, 4), np.uint8))
    assert load_folder(tmp_path).category.tolist() == [tmp_path.name, "bolt", "bolt", "nut"]
    assert load_folder(tmp_path, recursive=False).category.tolist() == [tmp_path.name]


def test_folder_category_and_target_can_be_given(tmp_path):
    for name in ("good/a.png", "bad/b.png"):
        save_png(tmp_path / name, np.zeros((4, 4), np.uint8))
    data = load_folder(tmp_path / "good", category="nut") + load_folder(tmp_path / "bad", category="nut", target=-1)
    assert data.category.tolist() == ["nut", "nut"]
    assert data.target.tolist() == [1, -1]
    assert data.defect.tolist() == ["good", "defect"]


def test_mvtec_names_images_that_lie_astray(mvtec_root):
    astray = ["a.png", "nut/a.png", "nut/train/a.png", "nut/train/bad/a.png", "nut/test/good/night/a.png"]
    kept = [load_mvtec(mvtec_root, split=split).paths.tolist() for split in ("train", "test")]
    for k, name in enumerate(astray):
        save_png(mvtec_root / name, np.zeros((4, 4), np.uint8))
        with pytest.warns(UserWarning, match=rf"left out here: .*{re.escape(', '.join(astray[: k + 1]))}\.$"):
            found = [load_mvtec(mvtec_root, split=split).paths.tolist() for split in ("train", "test")]
        assert found == kept
    save_png(mvtec_root / "bolt" / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.warns(UserWarning, match=r"left out here: a.png, bolt/a.png, .* and 1 more\.$"):
        load_mvtec(mvtec_root)
    with pytest.warns(UserWarning, match=r"left out here: bolt/a.png\.$"):
        load_mvtec(mvtec_root, categories="bolt")


def test_links_to_folders_are_followed_at_any_depth_and_broken_ones_listed(tmp_path):
    root, store = tmp_path / "root", tmp_path / "store"
    for path in (root / "nut" / "a.png", store / "b.png", store / "deep" / "c.png"):
        save_png(path, np.zeros((4, 4), np.uint8))
    (root / "nut" / "linked").symlink_to(store, target_is_directory=True)
    (store / "back").symlink_to(root / "nut", target_is_directory=True)
    (store / "up").symlink_to(tmp_path, target_is_directory=True)
    (store / "again").symlink_to(store / "deep", target_is_directory=True)
    save_png(root / "bolt" / "deep" / "d.png", np.zeros((4, 4), np.uint8))
    (root / "nut" / "bolts").symlink_to(root / "bolt", target_is_directory=True)
    save_png(root / ".kept" / "e.png", np.zeros((4, 4), np.uint8))
    (root / "nut" / "kept").symlink_to(root / ".kept", target_is_directory=True)
    bolt, *paths = load_folder(root).paths
    assert bolt == str(root / "bolt" / "deep" / "d.png")
    names = [Path(path).relative_to(root / "nut").as_posix() for path in paths]
    assert names.pop(1) == "kept/e.png"
    assert names == ["a.png", "linked/b.png", "linked/deep/c.png"]
    (root / "nut" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "nut" / "gone").symlink_to(tmp_path / "nowhere")
    paths = load_folder(root).paths.tolist()
    assert paths[2] == str(root / "nut" / "gone.png")
    with pytest.raises(
        FileNotFoundError, match=r"image 2 of X, .*gone.png', is not a file but a device, a pipe or a broken link"
    ):
        check_images(paths)


def test_folder_does_not_follow_a_link_to_itself(tmp_path):
    save_png(tmp_path / "nut" / "a.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "nut" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(load_folder(tmp_path)) == 1
    for name, target in (("itself", "."), ("above", "..")):
        (tmp_path / name).symlink_to(target, target_is_directory=True)
    assert load_folder(tmp_path).category.tolist() == ["nut"]
    (tmp_path / "bolt").symlink_to(tmp_path / "nut", target_is_directory=True)
    assert load_folder(tmp_path).category.tolist() == ["bolt", "nut"]


def test_subfolders_that_are_left_out_are_named(tmp_path):
    save_png(tmp_path / "nut" / "a.png", np.zeros((4, 4), np.uint8))
    for name in ("bolt", "nut/deep", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "bolt" / "a.heic").write_bytes(b"")
    with pytest.warns(
        UserWarning, match=r"without an image, which are not categories: bolt; and 1 file .*: bolt/a\.heic"
    ):
        data = load_folder(tmp_path)
    assert set(data.category) == {"nut"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_folder(tmp_path / "nut", recursive=False)


def test_folder_errors_say_what_was_found(tmp_path, mvtec_root):
    with pytest.raises(ValueError, match=r"vqad\.datasets\.load_mvtec reads.*tells defects and masks from normal"):
        load_folder(mvtec_root)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no images .* contains nothing"):
        load_folder(empty)
    (empty / "table.csv").write_text("")
    with pytest.raises(ValueError, match=r"no images .* contains table\.csv"):
        load_folder(empty)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_folder(tmp_path / "nowhere")


# ---- the collection ------------------------------------------------------------------------------


def test_nothing_is_opened_before_it_is_asked_for(mvtec_root, opened):
    data = load_mvtec(mvtec_root, split="all")
    repr(data)
    np.asarray(data)
    part = (data + load_folder(mvtec_root / "nut" / "train"))[data.target.shape[0] - 3 :]
    images = check_images(part)
    train_test_split(data, data.target, random_state=0)
    pickle.loads(pickle.dumps(data))
    assert opened == []
    images.pixels(1)
    part[2]
    assert opened == [part.paths[1], part.paths[2]]


def test_one_image_is_read_as_uint8(mvtec_root):
    data = load_mvtec(mvtec_root, categories="nut")
    for i in (2, -1, np.int64(2)):
        assert data[i].dtype == np.uint8
        np.testing.assert_array_equal(data[i], np.full((12, 10, 3), 2))
    assert [int(image.max()) for image in data] == [0, 1, 2]
    with pytest.raises(IndexError, match="image 3 is out of range for a dataset of 3"):
        data[3]


@pytest.mark.parametrize(
    "key",
    [
        slice(1, 9, 3),
        [4, 0, 4],
        np.array([7, -1]),
        np.arange(26) % 5 == 0,
        (np.arange(26) % 5 == 0).tolist(),
        [],
    ],
)
def test_taking_a_part_keeps_every_column_in_step(key, mvtec_root):
    data = load_mvtec(mvtec_root, split="test")
    rows = np.arange(26)[key if isinstance(key, slice) or len(key) else slice(0)]
    for part in (data[key], data[key, ...]):
        assert type(part) is ImageDataset
        assert part.paths.tolist() == data.paths[rows].tolist()
        assert part.target.tolist() == data.target[rows].tolist()
        assert part.category.tolist() == data.category[rows].tolist()
        assert part.defect.tolist() == data.defect[rows].tolist()
        assert part.mask_paths == [data.mask_paths[i] for i in rows]


@pytest.mark.parametrize("form", [list, tuple, np.array, "Series"])
def test_mask_paths_come_in_every_form_of_a_column(form):
    given = ["a_mask.png", None, Path("None")]
    if form == "Series":
        form = pytest.importorskip("pandas").Series
        given[2] = "None"  # pandas has no column of paths and str
    assert ImageDataset(["a.png", "b.png", "c.png"], mask_paths=form(given)).mask_paths == ["a_mask.png", None, "None"]


@pytest.mark.parametrize("missing", [None, np.nan, "NA"])
def test_a_missing_category_is_no_name(missing):
    missing = pytest.importorskip("pandas").NA if missing == "NA" else missing
    for category in (["nut", missing], np.array(["nut", missing], dtype=object)):
        with pytest.raises(ValueError, match=r"category is missing \(.*\) for 1 images"):
            ImageDataset(["a.png", "b.png"], category=category)
    assert ImageDataset(["a.png", "b.png"], category=["nan", "None"]).category.tolist() == ["nan", "None"]


@pytest.mark.parametrize("key", ["a", 1.5, [0.5], None, np.zeros((2, 2), int)])
def test_other_keys_are_refused(key, mvtec_root):
    with pytest.raises(TypeError):
        load_mvtec(mvtec_root)[key]


def test_scikit_learn_splits_shuffles_and_resamples_it_lazily(mvtec_root, opened):
    data = load_mvtec(mvtec_root, split="all")
    one, other, y_one, y_other = train_test_split(data, data.target, stratify=data.category, random_state=0)
    for part, y in ((one, y_one), (other, y_other)):
        assert isinstance(part, ImageDataset)
        np.testing.assert_array_equal(part.target, y)
    assert sorted([*one.paths, *other.paths]) == sorted(data.paths)
    for train, test in (*KFold(4).split(data), *ShuffleSplit(2, random_state=0).split(data)):
        assert len(data[train]) + len(data[test]) == len(data)
    assert sorted(shuffle(data, random_state=0).paths) == sorted(data.paths)
    assert len(resample(data, n_samples=7, random_state=0)) == 7
    assert opened == []


def test_scikit_learn_hands_it_to_estimators_as_it_is(mvtec_root):
    from sklearn.base import BaseEstimator

    seen = []

    class Detector(BaseEstimator):
        def fit(self, X, y=None):
            seen.append(X)
            return self

        def score(self, X, y=None):
            return float(np.mean(X.target == y))

    data = load_mvtec(mvtec_root, split="test")
    assert cross_val_score(Detector(), data, data.target, cv=3).tolist() == [1, 1, 1]
    assert [type(X) for X in seen] == [ImageDataset] * 3


def test_it_is_x_like_its_paths(mvtec_root):
    data = load_mvtec(mvtec_root, split="test")[::5]
    for X in (data, data.paths.tolist(), np.asarray(data), [data[i] for i in range(len(data))], list(data)):
        images = check_images(X)
        assert len(images) == len(data)
        for i in range(len(data)):
            np.testing.assert_array_equal(images.pixels(i), (data[i] / 255).astype(np.float32))


def test_concatenation_puts_one_behind_the_other(mvtec_root):
    train, test = load_mvtec(mvtec_root), load_mvtec(mvtec_root, split="test")
    both = train + test
    assert both.paths.tolist() == [*train.paths, *test.paths]
    assert both.target.tolist() == [*train.target, *test.target]
    assert both.mask_paths == [*train.mask_paths, *test.mask_paths]
    assert (both + both[:0]).paths.tolist() == both.paths.tolist()
    with pytest.raises(TypeError):
        train + list(test.paths)


def test_repr_counts_images_and_masks(mvtec_root):
    assert repr(load_mvtec(mvtec_root, split="all")).splitlines() == [
        "ImageDataset: 32 images",
        "  bolt  5 normal, 11 anomalous, 10 masks",
        "  nut   5 normal, 11 anomalous, 10 masks",
    ]
    assert repr(load_mvtec(mvtec_root)[:0]) == "ImageDataset: 0 images"


def test_mask_of_another_size_is_refused(mvtec_root):
    save_png(mvtec_root / "nut" / "ground_truth" / "scratch" / "4_mask.png", np.zeros((6, 5), np.uint8))
    data = load_mvtec(mvtec_root, categories="nut", split="test")
    with pytest.raises(ValueError, match=r"4_mask\.png' has shape \(6, 5\), but image 6 of X.*4\.png', has \(12, 10\)"):
        data.mask(6)


def test_wrong_columns_are_refused():
    with pytest.raises(ValueError, match=r"target must be \+1 \(normal\) or -1 \(anomaly\)"):
        ImageDataset(["a.png", "b.png"], target=[0, 1])
    with pytest.raises(ValueError, match="category has 3 entries for 2 paths"):
        ImageDataset(["a.png", "b.png"], category=["x", "y", "z"])
    with pytest.raises(TypeError, match="sequence of file paths"):
        ImageDataset("a.png")


def test_pickled_collection_is_the_same(mvtec_root):
    data = load_mvtec(mvtec_root, split="test")
    again = pickle.loads(pickle.dumps(data))
    assert again.paths.tolist() == data.paths.tolist()
    np.testing.assert_array_equal(again[4], data[4])
    np.testing.assert_array_equal(again.mask(5), data.mask(5))


# ---- solar cells ---------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("elpv_dataset") is None, reason="elpv-dataset is not installed")
def test_elpv_agrees_with_its_own_package(opened, tmp_path):
    from elpv_dataset.utils import load_dataset

    data = load_elpv()
    assert len(data) == 2624
    assert opened == []
    # Its loader reads every image of the table it is given: this one has every 60th row.
    folder = Path(find_spec("elpv_dataset").origin).parent / "data"
    rows = (folder / "labels.csv").read_text().splitlines(keepends=True)
    (tmp_path / "labels.csv").write_text("".join(rows[::60]))
    (tmp_path / "images").symlink_to(folder / "images")
    images, probability, kinds = load_dataset(str(tmp_path / "labels.csv"))
    data = data[::60]
    assert data.category.tolist() == kinds.tolist()
    np.testing.assert_allclose(data.probability, probability, atol=1e-3)
    np.testing.assert_array_equal(data.target, np.where(probability == 0, 1, -1))
    for ours, theirs in zip(data, images, strict=True):
        np.testing.assert_array_equal(ours, np.stack([theirs] * 3, axis=-1))


@pytest.mark.skipif(find_spec("elpv_dataset") is None, reason="elpv-dataset is not installed")
def test_elpv_probability_follows_indexing():
    data = load_elpv()
    sure = data[np.isin(data.probability, (0, 1))]
    assert isinstance(sure, ElpvDataset)
    np.testing.assert_array_equal(sure.target, np.where(sure.probability == 0, 1, -1))
    part, _ = train_test_split(sure, train_size=40, random_state=0)
    np.testing.assert_array_equal(part.target, np.where(part.probability == 0, 1, -1))
    mono, poly = load_elpv(category="mono"), load_elpv(category="poly")
    assert len(mono + poly) == len(data)
    assert (mono + poly).probability.tolist() == [*mono.probability, *poly.probability]
    assert set(mono.category) == {"mono"}
    with pytest.raises(ValueError, match="category must be 'mono', 'poly' or None; got 'multi'"):
        load_elpv(category="multi")


def test_elpv_without_its_package_names_the_command(monkeypatch):
    monkeypatch.setattr("vqad.datasets.elpv.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install vqad\[demo\]"):
        load_elpv()


# ---- drawn parts ---------------------------------------------------------------------------------


def test_drawn_parts_have_the_promised_shapes_and_counts():
    parts = make_textured_parts(9, 16, image_size=48, random_state=0)
    assert parts.images.shape == (25, 48, 48, 3)
    assert parts.images.dtype == np.uint8
    assert parts.masks.shape == (25, 48, 48)
    assert parts.masks.dtype == bool
    assert parts.target.tolist() == [1] * 9 + [-1] * 16
    assert parts.category[:5].tolist() == ["disc", "weave", "tile", "pill", "disc"]
    assert (parts.defect[:9] == "good").all()
    pairs = set(zip(parts.category[9:], parts.defect[9:]))
    assert len(pairs) == 16, "four rounds show each category every defect"


def test_drawn_parts_depend_on_random_state_alone():
    np.random.seed(0)  # noqa: NPY002 (the global state is what this is about)
    one = make_textured_parts(8, 8, image_size=32, random_state=3)
    again = make_textured_parts(8, 8, image_size=32, random_state=3)
    other = make_textured_parts(8, 8, image_size=32, random_state=4)
    after = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    assert after == np.random.random(), "the global state was touched"  # noqa: NPY002
    np.testing.assert_array_equal(one.images, again.images)
    np.testing.assert_array_equal(one.masks, again.masks)
    assert all((a != b).any() for a, b in zip(one.images, other.images))


def test_longer_calls_begin_with_the_shorter_ones_images():
    short = make_textured_parts(3, 2, image_size=32, random_state=0)
    long = make_textured_parts(5, 6, image_size=32, random_state=0)
    np.testing.assert_array_equal(long.images[:3], short.images[:3])
    np.testing.assert_array_equal(long.images[5:7], short.images[3:])


@pytest.mark.parametrize("category", ["disc", "weave", "tile", "pill"])
@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("n", [16, 64])
def test_defects_change_the_part_inside_their_mask_only(category, kind, n):
    for number in range(6):
        damaged, mask = _draw(category, kind, n, (11, 0, number))
        sound, nothing = _draw(category, "good", n, (11, 0, number))
        assert not nothing.any()
        assert 0 < mask.mean() < 0.3
        np.testing.assert_array_equal(damaged[~mask], sound[~mask])
        change = np.abs(damaged.astype(int) - sound).max(axis=2)[mask]
        assert change.mean() > 15, "the defect can hardly be seen"


def test_parts_of_one_kind_vary_and_kinds_differ():
    parts = make_textured_parts(40, 0, image_size=32, random_state=0)
    means = {name: parts.images[parts.category == name].mean(axis=(1, 2)) for name in np.unique(parts.category)}
    for name, of_kind in means.items():
        assert of_kind.std(axis=0).max() > 2, f"every {name} is equally bright"
        others = np.concatenate([values for other, values in means.items() if other != name])
        gap = np.linalg.norm(others - of_kind.mean(axis=0), axis=1).min()
        assert gap > np.linalg.norm(of_kind - of_kind.mean(axis=0), axis=1).mean()


def test_drawn_parts_can_be_none_of_one_sort():
    assert len(make_textured_parts(0, 3, image_size=16, random_state=0).images) == 3
    parts = make_textured_parts(3, 0, categories=["tile"], image_size=16, random_state=0)
    assert parts.category.tolist() == ["tile"] * 3
    assert not parts.masks.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"categories": ["disc", "gear"]}, "categories must be some of .*disc"),
        ({"categories": []}, "categories must be some of"),
        ({"categories": "disc"}, "categories must be some of"),
        ({"image_size": 8}, "image_size must be at least 16; got 8"),
        ({"n_normal": -1}, "must not be negative"),
    ],
)
def test_wrong_requests_for_parts_are_explained(wrong, message):
    with pytest.raises(ValueError, match=message):
        make_textured_parts(**wrong)
