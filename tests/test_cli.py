"""The vqad command, run as a user runs it but in this process; and the demonstration behind `vqad demo`."""

import contextlib
import csv
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save_png

import vqad.cli._commands
import vqad.cli._scoring
import vqad.demo
import vqad.registry
from vqad import HVQTransDetector, VQFlowDetector
from vqad._yardstick import GaussianYardstick
from vqad.cli import main
from vqad.cli._files import groups_of
from vqad.datasets import load_elpv, load_mvtec, load_visa, make_textured_parts
from vqad.demo import FULL, QUICK, DemoSize, split_cells
from vqad.metrics import bootstrap_interval, evaluate, image_auroc
from vqad.training import Trainer

TINY = ["--image-size", "64", "--max-iter", "1", "--false-alarm-rate", "0.2"]
TINY += ["--set", "d_model=32", "--set", "n_codes=16"]
ROOT = Path(__file__).parents[1]
TINY_DEMO = DemoSize(
    20,
    8,
    8,
    {
        "hvq-trans": {"image_size": 64, "d_model": 32, "n_codes": 16, "max_iter": 1, "false_alarm_rate": 0.2},
        "vq-flow": {"image_size": 64, "hidden": 8, "n_patterns": 16, "max_iter": 2, "false_alarm_rate": 0.25},
    },
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """good/ and bad/ with sub-folders disc and weave, and mvtec/, the same images in the layout of MVTec AD."""
    root = tmp_path_factory.mktemp("parts")
    parts = make_textured_parts(24, 6, categories=("disc", "weave"), image_size=64, random_state=0)
    for k, (pixels, kind) in enumerate(zip(parts.images, parts.category)):
        is_good, file = parts.target[k] == 1, f"{k}.png"
        save_png(root / ("good" if is_good else "bad") / kind / file, pixels)
        place = "train/good" if k < 20 else "test/good" if is_good else f"test/{parts.defect[k]}"
        save_png(root / "mvtec" / kind / place / file, pixels)
        if not is_good:
            truth = root / "mvtec" / kind / "ground_truth" / parts.defect[k] / f"{k}_mask.png"
            save_png(truth, parts.masks[k].astype(np.uint8) * 255)
    return root


@pytest.fixture(scope="module")
def model(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "new" / "model.safetensors"
    assert main(["fit", str(folders / "good"), "-o", str(path), *TINY]) == 0
    return path


def complaint(capsys):
    """What the command said on stderr, which must be one line."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def never(*args, **more):
    raise AssertionError("must not be reached")


# ---- fit -----------------------------------------------------------------------------------------


def test_fit_takes_parameters_and_categories_from_the_command_line(model):
    detector = vqad.load(model)
    given = {"image_size": 64, "max_iter": 1, "false_alarm_rate": 0.2, "d_model": 32, "n_codes": 16, "random_state": 0}
    assert given.items() <= detector.get_params().items()
    assert list(detector.categories_) == ["disc", "weave"]
    assert not detector.scorer_.router.discovered


def test_fit_finds_categories_where_folders_do_not_tell_them(folders, tmp_path):
    path = str(tmp_path / "model.safetensors")
    for arguments in (["good", "--no-categories"], ["good/disc"]):
        assert main(["fit", str(folders / arguments[0]), *arguments[1:], "-o", path, *TINY]) == 0
        assert vqad.load(path).scorer_.router.discovered


def test_kinds_in_one_folder_are_found(folders, tmp_path):
    mixed, path = tmp_path / "mixed", str(tmp_path / "model.safetensors")
    mixed.mkdir()
    for image in (folders / "good").rglob("*.png"):
        shutil.copy(image, mixed / f"{image.parent.name}-{image.name}")
    assert main(["fit", str(mixed), "-o", path, *TINY]) == 0
    assert list(vqad.load(path).categories_) == [0, 1]


@pytest.mark.parametrize("place", ["good/disc", "mvtec/disc"])
def test_one_product_has_its_folders_name(folders, tmp_path, capsys, place):
    path = str(tmp_path / "model.safetensors")
    assert main(["fit", str(folders / place), "-o", path, *TINY]) == 0
    printed = capsys.readouterr().out
    assert "1 category: disc\n1 pass in " in printed
    detector = vqad.load(path)
    assert list(detector.categories_) == ["disc"]
    weave = sorted(map(str, (folders / "good" / "weave").glob("*.png")))
    assert list(detector.partial_fit(weave, category=["weave"] * len(weave)).categories_) == ["disc", "weave"]


@pytest.mark.parametrize("place", ["ring/train/good", "ring/train", "ring/OK", "ring/good-parts"])
def test_no_anomaly_is_of_a_category_called_good(folders, tmp_path, capsys, place):
    path, table = str(tmp_path / "model.safetensors"), tmp_path / "scores.csv"
    images = tmp_path / place / ("good" if place.endswith("train") else "")
    shutil.copytree(folders / "good" / "disc", images)
    assert main(["fit", str(tmp_path / place), "-o", path, *TINY]) == 0
    assert "1 category: ring\n" in capsys.readouterr().out
    assert main(["score", path, str(folders / "bad"), "--csv", str(table)]) == 0
    printed = capsys.readouterr().out.splitlines()[1:-2]
    assert {line.split()[1] for line in printed} == {"ring"}
    with open(table, newline="") as file:
        assert {row["category"] for row in csv.DictReader(file)} == {"ring"}


def test_fit_on_mvtec_layout_learns_from_its_training_images(folders, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(HVQTransDetector, "fit", lambda self, X, **given: seen.update(given, X=X))
    # Nothing was fitted, so there is nothing to save.
    assert main(["fit", str(folders / "mvtec"), "-o", str(tmp_path / "x"), "--image-size", "64x96"]) == 2
    expected = load_mvtec(folders / "mvtec", split="train")
    assert list(seen["X"].paths) == list(expected.paths)
    assert list(seen["category"]) == list(expected.category)


def test_fit_on_visa_layout_learns_from_its_training_images(visa_root, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(HVQTransDetector, "fit", lambda self, X, **given: seen.update(given, X=X))
    assert main(["fit", str(visa_root), "-o", str(tmp_path / "x")]) == 2
    expected = load_visa(visa_root, split="train")
    assert list(seen["X"].paths) == list(expected.paths)
    assert list(seen["category"]) == list(expected.category)


def test_interrupted_training_keeps_what_was_learned(folders, tmp_path, monkeypatch, capsys):
    one_pass = Trainer._one_pass

    def interrupted_in_the_second(self, *args):
        if interrupted_in_the_second.done:
            raise KeyboardInterrupt
        interrupted_in_the_second.done = True
        return one_pass(self, *args)

    interrupted_in_the_second.done = False
    monkeypatch.setattr(Trainer, "_one_pass", interrupted_in_the_second)
    path = tmp_path / "model.safetensors"
    arguments = ["fit", str(folders / "good"), "-o", str(path), *TINY, "--max-iter", "3"]
    assert main(arguments) == 130
    assert "interrupted after 1 of 3 passes" in complaint(capsys)
    detector = vqad.load(path)
    assert detector.n_iter_ == 1
    assert detector.predict([str(folders / "good" / "disc" / "0.png")]).shape == (1,)


def test_pictures_of_one_piece_can_be_told(folders, tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(vqad.cli._commands, "groups_of", lambda *given: seen.append(groups_of(*given)) or seen[-1])
    small = ["--image-size", "64", "--max-iter", "1", "--false-alarm-rate", "0.4"]
    arguments = ["fit", str(folders / "good"), "-o", str(tmp_path / "m.safetensors"), *small, "--groups"]
    assert main([*arguments, r"(\w+)/([0-9])"]) == 0
    n = len(set(seen[0]))
    assert f" normal images in groups: {n} (" in capsys.readouterr().out
    assert len(seen[0]) > n > 1
    assert "disc\x001" in seen[0]
    assert main([*arguments, "[0-9]"]) == 0  # of each category, though the pattern finds the same in both
    assert f" normal images in groups: {n} (" in capsys.readouterr().out
    assert len(vqad.load(tmp_path / "m.safetensors").fitted_.held_out.score) < 0.2 * len(seen[0]) - 1
    for pattern in ("piece[0-9]+", "x*", "(x)?disc|weave"):
        assert main([*arguments, pattern]) == 2
        said = complaint(capsys)
        assert said.startswith(f"vqad: error: --groups {pattern!r} does not match '")
        assert said.endswith("': each image needs a group.")
    for pattern in ("piece(", "x{99999999999999999999}"):
        with pytest.raises(SystemExit):
            main([*arguments, pattern])
        assert f"{pattern!r} is not a regular expression: " in complaint(capsys)


def test_the_detector_can_be_chosen(folders, tmp_path, capsys):
    path = tmp_path / "flow.safetensors"
    small = ["--image-size", "64", "--max-iter", "1", "--false-alarm-rate", "0.2", "--set", "hidden=8"]
    assert main(["fit", str(folders / "good"), "-o", str(path), "--detector", "vq-flow", *small]) == 0
    assert isinstance(vqad.load(path), VQFlowDetector)
    assert main(["score", str(path), str(folders / "good" / "disc")]) == 0
    assert "images are anomalous" in capsys.readouterr().out


def test_too_few_images_for_the_rate_are_warned_of_in_one_line(folders, tmp_path, capsys):
    arguments = ["fit", str(folders / "good"), "-o", str(tmp_path / "x"), *TINY, "--false-alarm-rate", "0.001"]
    assert main(arguments) == 0
    assert re.match("vqad: warning: .*too few for false_alarm_rate=0.001", complaint(capsys))


def test_an_output_that_cannot_be_written_is_told_before_the_work(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(HVQTransDetector, "fit", never)
    assert main(["fit", str(folders / "good"), "-o", str(tmp_path)]) == 2
    assert "is a folder" in complaint(capsys)
    assert main(["fit", str(folders / "good"), "-o", os.devnull]) == 2
    assert "is a device" in complaint(capsys)


def test_thresholds_of_categories_are_printed_with_their_names(folders, tmp_path, capsys):
    arguments = [str(folders / "good"), "-o", str(tmp_path / "m"), *TINY, "--set", "threshold=category"]
    assert main(["fit", *arguments, "--false-alarm-rate", "0.4"]) == 0
    disc, weave = -vqad.load(tmp_path / "m").offset_
    assert f"threshold disc {disc:.3f}, weave {weave:.3f}\n" in capsys.readouterr().out


# ---- score ---------------------------------------------------------------------------------------


def test_nothing_is_written_over_the_model_or_an_image(folders, model, tmp_path, capsys):
    shutil.copytree(folders / "mvtec", tmp_path / "mvtec")
    image = next((tmp_path / "mvtec").rglob("test/*/*.png"))
    mask, learned = (next((tmp_path / "mvtec").rglob(f"{part}/*/*.png")) for part in ("ground_truth", "train"))
    kept = image.with_name(f"{image.stem}_map.png")
    shutil.copy(image, kept)
    shutil.copy(next((tmp_path / "mvtec").rglob(f"{image.stem}_mask.png")), mask.with_name(f"{kept.stem}_mask.png"))
    before = {path: path.read_bytes() for path in (model, image, kept, mask, learned)}
    for target in (model, image):
        for command in (
            ["score", str(model), str(image), "--csv", str(target)],
            ["report", str(model), str(tmp_path / "mvtec"), "-o", str(target)],
            ["evaluate", str(model), str(tmp_path / "mvtec"), "--no-pixels", "--json", str(target)],
        ):
            assert main(command) == 2
            assert "would overwrite an input" in complaint(capsys)
    for command in (
        ["fit", str(tmp_path / "mvtec"), "-o", str(learned)],
        ["evaluate", str(model), str(tmp_path / "mvtec"), "--json", str(mask)],
        ["report", str(model), str(tmp_path / "mvtec"), "-o", str(mask)],
        ["export", str(model), "--images", str(tmp_path / "mvtec"), "-o", str(image)],
    ):
        assert main(command) == 2
        assert "would overwrite an input" in complaint(capsys)
    assert main(["score", str(model), str(image), str(kept), "--maps", str(image.parent)]) == 2
    assert "would overwrite an input" in complaint(capsys)
    assert {path: path.read_bytes() for path in before} == before


def test_a_file_may_have_any_name(folders, model, tmp_path, capsys):
    image = next((folders / "bad").rglob("*.png"))
    names = [b"two\nlines.png", b"no utf-8 \xff.png", "ü.png".encode()]
    for name in names:
        shutil.copy(image, os.path.join(os.fsencode(tmp_path), name))
    assert main(["score", str(model), str(tmp_path), "--csv", str(tmp_path / "scores.csv")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6
    assert any("two\\nlines.png" in line for line in printed)
    table = (tmp_path / "scores.csv").read_bytes()
    assert all(name in table for name in names)
    assert main(["report", str(model), str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize(
    "arguments",
    ["fit '' -o m", "fit good -o ''", "score '' bad", "score m ''", "score m bad --csv ''", "score m bad --maps ''",
     "evaluate m ''", "report m '' -o p", "export m -o o --images ''", "demo --out ''"],
)  # fmt: skip
def test_an_empty_name_is_not_the_working_directory(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(shlex.split(arguments))
    assert end.value.code == 2
    assert "the name is empty" in complaint(capsys)


@pytest.mark.parametrize("arguments", ["fit good -o models/", "score m bad --csv tables/", "report m bad -o pages/"])
def test_a_file_to_write_is_not_given_as_a_folder(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert "names a folder; give the name of a file" in complaint(capsys)


def test_score_judges_all_images_of_a_folder_but_masks(folders, model, tmp_path, capsys):
    """Also where a folder in it has a layout that says what its images are."""
    image = next((folders / "bad").rglob("*.png"))
    wanted = ["a.png", "part/b.png", "part/extra/c.png", "part/test/good/d.png", "part/test/good/deep/e.png", "f/g.png"]
    wanted += ["Masks/train/good/h.png", "deep/er/mvtec/nut/train/good/i.png", "ground_truth/j.png"]
    masks = [
        "part/ground_truth/hole/k.png",
        "deep/er/mvtec/nut/ground_truth/l.png",
        "visa/pcb/Data/Masks/Anomaly/m.png",
    ]
    wanted += ["visa/pcb/Data/Images/Normal/n.png"]
    for name in (*wanted, *masks):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, tmp_path / name)
    assert main(["score", str(model), str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()[1:-2]
    assert sorted(line.split()[0] for line in printed) == sorted(str(tmp_path / name) for name in wanted)


def test_score_names_broken_links_and_goes_on(folders, model, tmp_path, capsys):
    image = next((folders / "bad").rglob("*.png"))
    (tmp_path / "b.png").symlink_to(tmp_path / "gone")
    (tmp_path / "itself.png").symlink_to("itself.png")
    assert main(["score", str(model), str(tmp_path)]) == 2
    assert "b.png' is not a file but a device, a pipe or a broken link" in capsys.readouterr().err
    shutil.copy(image, tmp_path / "a.png")
    assert main(["score", str(model), str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "of 1 images are anomalous" in said.out
    assert "broken link" in said.err
    assert main(["fit", str(tmp_path), "-o", str(tmp_path / "m")]) == 2
    assert "broken link" in complaint(capsys)


def test_score_says_what_the_detector_says(folders, model, tmp_path, capsys):
    table = tmp_path / "new" / "scores.csv"
    assert main(["score", str(model), str(folders / "bad"), "--csv", str(table)]) == 0
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths = [row["path"] for row in rows]
    assert sorted(paths) == sorted(map(str, (folders / "bad").rglob("*.png")))
    detector = vqad.load(model)
    labels = detector.predict(paths)
    assert [row["label"] for row in rows] == ["anomaly" if label == -1 else "normal" for label in labels]
    np.testing.assert_array_equal([float(row["anomaly_score"]) for row in rows], -detector.score_samples(paths))
    np.testing.assert_array_equal([float(row["p_value"]) for row in rows], detector.p_values(paths))
    assert [row["category"] for row in rows] == list(detector.predict_category(paths))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(paths) + 3
    for path, line in zip(paths, printed[1:]):
        assert line.startswith(path)
    assert printed[-2].startswith(f"{(labels == -1).sum()} of {len(paths)} images are anomalous")
    p = detector.drift(paths)
    assert printed[-1].startswith(f"drift: p = {p:.2g}, ")


def test_every_image_gets_its_own_map_at_its_own_size(model, tmp_path):
    pixels = make_textured_parts(1, 0, image_size=64, random_state=1).images[0]
    for name in ("part.png", "part.bmp", "deep/er/part.png"):
        save_png(tmp_path / "new" / name, pixels[:48])
    save_png(tmp_path / "part.png", pixels)
    arguments = ["score", str(model), str(tmp_path / "new"), str(tmp_path / "part.png")]
    assert main([*arguments, "--maps", str(tmp_path / "maps")]) == 0
    maps = sorted((tmp_path / "maps").rglob("*.png"))
    assert len(maps) == 4
    assert (tmp_path / "maps" / "deep" / "er" / "part_map.png") in maps
    sizes = [vqad.images.check_images([path]).size(0) for path in maps]
    assert sorted(sizes) == [(48, 64), (48, 64), (48, 64), (64, 64)]


def test_the_help_names_the_detectors_that_there_are(monkeypatch, capsys):
    monkeypatch.setitem(vqad.registry._DETECTORS, "of-ones-own", HVQTransDetector)
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    out = "".join(capsys.readouterr().out.split())
    assert all(name in out[out.index("--detector{") :] for name in vqad.registry.names())
    assert {"hvq-trans", "vq-flow", "of-ones-own"} <= set(vqad.registry.names())
    assert vqad.registry.detector_class("of-ones-own") is HVQTransDetector


def test_maps_of_large_images_are_drawn_smaller(model, tmp_path, monkeypatch):
    pixels = make_textured_parts(1, 0, image_size=64, random_state=1).images[0]
    save_png(tmp_path / "new" / "part.png", pixels[:33])
    monkeypatch.setattr(vqad.cli._scoring, "DRAWN_SIDE", 32)
    assert main(["score", str(model), str(tmp_path / "new"), "--maps", str(tmp_path / "maps")]) == 0
    (drawn,) = (tmp_path / "maps").rglob("*.png")
    assert vqad.images.check_images([str(drawn)]).size(0) == (16, 32)


def test_a_broken_image_is_named_and_the_others_are_scored(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vqad.cli._scoring, "ROWS_AT_ONCE", 2)
    for name in "abcde":
        save_png(tmp_path / "new" / f"{name}.png", np.zeros((64, 64), np.uint8))
    whole = (tmp_path / "new" / "a.png").read_bytes()
    for name in "bcd":  # c and d are all that is in the second part
        (tmp_path / "new" / f"{name}.png").write_bytes(whole[:-30])
    table, maps = tmp_path / "scores.csv", tmp_path / "maps"
    assert main(["score", str(model), str(tmp_path / "new"), "--csv", str(table), "--maps", str(maps)]) == 2
    said = capsys.readouterr()
    for line, (i, name) in zip(said.err.splitlines(), enumerate("bcd", 1), strict=True):
        assert re.match(rf"vqad: error: image {i} of X, path '.*{name}\.png', is truncated", line)
    with open(table, newline="", encoding="utf-8") as file:
        assert [Path(row["path"]).name for row in csv.DictReader(file)] == ["a.png", "e.png"]
    assert len(said.out.splitlines()) == 5
    assert " of 2 images are anomalous" in said.out
    assert sorted(path.name for path in maps.iterdir()) == ["a_map.png", "e_map.png"]
    assert main(["score", str(model), str(tmp_path / "new" / "b.png")]) == 2
    said = capsys.readouterr()
    assert not said.out  # no table of nothing
    assert "is truncated" in said.err


def test_an_error_of_no_image_stops(folders, model, capsys):
    assert main(["score", str(model), str(folders / "bad"), "--device", "nowhere"]) == 2
    assert "device='nowhere' is not a torch device" in complaint(capsys)


def test_a_model_of_another_device_works_on_the_one_that_is_here(folders, model, tmp_path):
    elsewhere = tmp_path / "model.safetensors"
    vqad.save(vqad.load(model).set_params(device="meta"), elsewhere)
    root, page, bad = str(folders / "mvtec"), str(tmp_path / "page.html"), str(folders / "bad" / "disc")
    for command, *rest in (
        ["score", bad],
        ["evaluate", root, "--no-pixels"],
        ["report", root, "-o", page],
    ):
        assert main([command, str(elsewhere), *rest]) == 0
        assert main([command, str(elsewhere), *rest, "--device", "cpu"]) == 0


def test_heatmaps_do_not_go_among_the_images(folders, model, monkeypatch, capsys):
    monkeypatch.setattr(vqad, "load", never)
    for maps in (folders / "good", folders / "good" / "disc" / "maps"):
        assert main(["score", str(model), str(folders / "bad"), str(folders / "good"), "--maps", str(maps)]) == 2
        assert "Name a folder outside it" in complaint(capsys)
        assert not (folders / "good" / "disc" / "maps").exists()


def test_what_score_cannot_read_or_write_is_told_before_the_model_is_opened(folders, model, monkeypatch, capsys):
    monkeypatch.setattr(vqad, "load", never)
    image = str(folders / "good" / "disc" / "0.png")
    for arguments, expected in (
        ([image, "nowhere.png"], "does not exist"),
        ([image, "--csv", str(folders)], "is a folder"),
        ([image, "--maps", str(model)], "is a file; name a folder"),
    ):
        assert main(["score", str(model), *arguments]) == 2
        assert expected in complaint(capsys)


@pytest.mark.skipif(os.name != "posix", reason="devices of POSIX")
def test_the_table_may_go_to_a_device_in_a_folder_that_is_not_ours(folders, model, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert main(["score", str(model), str(folders / "good" / "disc" / "0.png"), "--csv", os.devnull]) == 0


# ---- evaluate and report -------------------------------------------------------------------------


def test_evaluate_gives_the_metrics_of_the_test_images(folders, model, tmp_path, capsys):
    target = tmp_path / "metrics.json"
    assert main(["evaluate", str(model), str(folders / "mvtec"), "--json", str(target)]) == 0
    test, detector = load_mvtec(folders / "mvtec", split="test"), vqad.load(model)
    expected = evaluate(
        test.target,
        -detector.score_samples(test),
        test.category,
        masks=test.masks(),
        maps=detector.anomaly_map(test),
    )
    assert json.loads(target.read_text()) == expected.to_dict()
    printed = capsys.readouterr().out
    assert str(expected) in printed
    false, found = ((detector.predict(test) == -1)[test.target == label].sum() for label in (1, -1))
    assert f"false alarms: {false} of 4 normal images" in printed
    assert f"found: {found} of 6 anomalies" in printed


def test_evaluate_without_pixels_leaves_the_masks_alone(folders, model, capsys):
    assert main(["evaluate", str(model), str(folders / "mvtec"), "--no-pixels"]) == 0
    printed = capsys.readouterr().out
    assert "AUROC" in printed
    assert "pixel" not in printed


def test_report_of_known_images_has_their_metrics(folders, model, tmp_path):
    pages = [tmp_path / "known.html", tmp_path / "unknown.html"]
    assert main(["report", str(model), str(folders / "mvtec"), "-o", str(pages[0]), "--title", "Parts"]) == 0
    assert main(["report", str(model), str(folders / "bad"), "-o", str(pages[1]), "--n-images", "2"]) == 0
    known, unknown = (page.read_text(encoding="utf-8") for page in pages)
    assert "<h1>Parts</h1>" in known
    assert known.count("data:image/jpeg") == 10
    assert "image AUROC" in known
    assert "AUPRO" in known
    assert unknown.count("data:image/jpeg") == 2
    assert "AUROC" not in unknown


# ---- errors and exit codes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("fit {tmp}/nowhere -o {tmp}/m", "does not exist"),
        ("fit {tmp} -o {tmp}/m", "has no images"),
        ("fit {good} -o {tmp}/m --max-iter 0", "'max_iter' parameter"),
        ("fit {good} -o {tmp}/m --set colour=red", "Invalid parameter 'colour'"),
        ("fit {good} -o {tmp}/m --max-iter 1 --set max_iter=2", "give it as --max-iter"),
        ("fit {good} -o {tmp}/m --set random_state=2", "give it as --seed"),
        ("fit {good} -o {tmp}/m --set backbone=None", "images need a backbone"),
        ("score {tmp}/nowhere {good}", "make one with vqad fit"),
        ("score {tmp} {good}", "is a folder"),
        ("score {model} {tmp}/nowhere", "does not exist"),
        ("score {model} {tmp}", "has no images"),
        ("evaluate {model} {good}", "does not have the layout of MVTec AD"),
        ("report {model} {tmp}/nowhere -o {tmp}/page.html", "does not exist"),
        ("report {model} {good} -o {tmp}/page.html --n-images 0", "n_images must be at least 1"),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_line(folders, model, tmp_path, capsys, arguments, expected):
    places = {"tmp": tmp_path, "good": folders / "good", "model": model}
    assert main([part.format(**places) for part in arguments.split()]) == 2
    said = complaint(capsys)
    assert said.startswith("vqad: error: ")
    assert expected in said


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "paint",
        "fit",
        "fit x",
        "fit x -o y --no-categories --category-from-folders",
        "fit x -o y --max-iter many",
        "fit x -o y --image-size 1x2x3",
        "fit x -o y --set d_model",
        "score model.safetensors",
        "evaluate m r --fpr-limit",
    ],
)
def test_wrong_arguments_are_said_in_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert "error: " in complaint(capsys)


def test_a_second_pair_after_set_is_refused_with_the_way_to_give_it(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "x", "-o", "y", "--set", "d_model=32", "n_codes=16"])
    said = complaint(capsys)
    assert "n_codes=16" in said
    assert "each --set takes one NAME=VALUE" in said


@pytest.mark.parametrize("command", ["", "demo", "fit", "score", "evaluate", "report"])
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert f"  vqad {command}" in capsys.readouterr().out


def test_python_runs_the_package_as_the_command():
    said = subprocess.run([sys.executable, "-m", "vqad", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"vqad {vqad.__version__}\n"


def test_an_error_shows_its_place_in_the_code_if_asked_to(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="make one with vqad fit"):
        main(["score", "--traceback", str(tmp_path / "nowhere"), str(folders / "bad")])


def test_an_error_that_is_no_users_fault_is_not_dressed_as_one(folders, model, monkeypatch):
    def broken(*args):
        raise RuntimeError

    monkeypatch.setattr(vqad.workers, "judge_readable", broken)
    with pytest.raises(RuntimeError):
        main(["score", str(model), str(folders / "bad")])


def test_ctrl_c_ends_with_130(folders, model, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(vqad.workers, "judge_readable", interrupted)
    assert main(["score", str(model), str(folders / "bad")]) == 130
    assert complaint(capsys) == "vqad: interrupted"


# ---- model files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x80\x04garbage"])
def test_a_file_that_is_no_model_is_refused_in_one_line(folders, tmp_path, capsys, content):
    (tmp_path / "file").write_bytes(content)
    assert main(["score", str(tmp_path / "file"), str(folders / "bad")]) == 2
    assert "is no model that vqad.save or vqad fit wrote" in complaint(capsys)


def test_a_damaged_model_is_refused_in_one_line(folders, model, tmp_path, capsys):
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    (tmp_path / "file").write_bytes(content)
    assert main(["score", str(tmp_path / "file"), str(folders / "bad")]) == 2
    assert "is damaged" in complaint(capsys)


def test_a_model_file_is_what_vqad_save_writes(folders, model, tmp_path):
    detector = vqad.load(model)
    vqad.save(detector, tmp_path / "again")
    paths = sorted(map(str, (folders / "bad").rglob("*.png")))
    np.testing.assert_array_equal(vqad.load(tmp_path / "again").score_samples(paths), detector.score_samples(paths))


# ---- demo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [FULL, QUICK], ids=["full", "quick"])
def test_demo_cells_are_disjoint_surely_labelled_and_in_proportion(size):
    cells = load_elpv()
    train, test = split_cells(cells, size, 0)
    assert len(train) == size.n_train
    assert (test.target == 1).sum() == size.n_test_normal
    assert (test.target == -1).sum() == size.n_test_defective
    assert len({*train.paths, *test.paths}) == len(train) + len(test)
    assert (train.probability == 0).all()
    assert np.isin(test.probability, (0, 1)).all()
    for drawn, p in ((train, 0), (test[test.target == 1], 0), (test[test.target == -1], 1)):
        share = (cells.category[cells.probability == p] == "mono").mean()
        assert abs((drawn.category == "mono").sum() - share * len(drawn)) <= 1
    again, other = split_cells(cells, size, 0)[0], split_cells(cells, size, 1)[0]
    assert list(again.paths) == list(train.paths)
    assert list(other.paths) != list(train.paths)


def test_demo_tells_of_passes_and_leaves_the_log_as_it_was(caplog):
    log, lines = logging.getLogger("vqad"), []
    before = log.level, list(log.filters)
    with vqad.demo._passes_told("Detector", 600, lines.append):
        for k in range(1, 13):
            log.info("pass %d/%d: %s", k, 12, {})
        log.warning("something else")
    log.info("pass 12/12: after it")
    assert lines == [f"  Detector: learning 600 cells, pass {k} of 12 done" for k in (1, 3, 6, 9, 12)]
    assert caplog.messages == ["something else"]
    assert (log.level, log.filters) == before


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Folder and printed lines of a small demonstration, and the cells that it measured on."""
    folder, printed = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(vqad.cli._commands, "QUICK", TINY_DEMO)
        assert main(["demo", "--quick", "--out", str(folder)]) == 0
    return folder, printed.getvalue(), split_cells(load_elpv(), TINY_DEMO, 0)[1]


@pytest.mark.slow
def test_demo_prints_what_the_saved_models_say_side_by_side(demo):
    folder, printed, test = demo
    assert "Learning from 20 sound solar cells (8 mono, 12 poly)" in printed
    steps = printed[: printed.index("Learned from 20")].strip().splitlines()[1:]
    for name, n_passes in (("HVQTransDetector", 1), ("VQFlowDetector", 2)):
        own = [step.strip().removeprefix(f"{name}: ") for step in steps if name in step]
        passes = [f"learning 20 cells, pass {k} of {n_passes} done" for k in range(1, n_passes + 1)]
        assert own[:-1] == ["reading 20 cells", *passes, "scoring 16 cells"]
        assert own[-1].startswith("learned in")
    head, *lines = printed[printed.index("Learned from 20") :].splitlines()[1:]
    assert head.split() == ["HVQTransDetector", "VQFlowDetector", "untrained", "Gaussian"]
    cells = [re.split(r"  +", line.strip()) for line in lines if line.startswith("  ")]
    table = {what: values for what, *values in cells}
    for k, name in enumerate(("hvq-trans", "vq-flow")):
        detector = vqad.load(folder / f"model-{name}.safetensors")
        assert TINY_DEMO.parameters[name].items() <= detector.get_params().items()
        score = -detector.score_samples(test)
        found = evaluate(test.target, score, test.category)
        parts = {**found.per_category, "mean": found.mean, "pooled": found.pooled}
        assert parts.keys() == {"mono", "poly", "mean", "pooled"}
        for part, row in parts.items():
            assert table[f"image AUROC, {part}"][k] == f"{row['image_auroc']:.3f}"
        right = np.mean(detector.predict_category(test) == test.category)
        assert table["kind of cell inferred correctly"][k] == f"{right:.1%}"
        assert table["threshold of the anomaly score"][k] == f"{-detector.offset_:.3f}"
        for target, what in ((1, "false alarms on held-out sound cells"), (-1, "defective cells found")):
            alarms = (detector.predict(test[test.target == target]) == -1).sum()
            assert table[what][k] == f"{alarms} of 8 ({alarms / 8:.1%})"
    assert table["set for false alarms of"] == ["20.0%", "25.0%", "-"]
    for what in ("seconds to fit", "cells scored per second"):
        assert all(float(value) > 0 for value in table[what])


@pytest.mark.slow
def test_demo_prints_the_untrained_gaussians_column(demo):
    _, printed, test = demo
    train = split_cells(load_elpv(), TINY_DEMO, 0)[0]
    score = GaussianYardstick().fit(train, train.category).anomaly_score(test, test.category)
    low, high = bootstrap_interval(image_auroc, test.target, score, random_state=0)
    pooled = image_auroc(test.target, score)
    assert re.search(rf"image AUROC, pooled .* {pooled:.3f}\n", printed)
    assert re.search(rf"95 % interval over test cells .* {low:.3f} to {high:.3f}\n", printed)
    assert re.search(r"threshold of the anomaly score .* -\n", printed)


@pytest.mark.slow
def test_demo_writes_heatmaps_of_each_detector_and_a_page_that_links_them(demo):
    folder, printed, _ = demo
    names = ["solar-cells.html", "solar-cells-hvq-trans.html", "solar-cells-vq-flow.html"]
    pages = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    assert str(folder / names[0]) in printed
    for name, page in pages.items():
        assert set(re.findall(r'href="(.*?)"', page)) == {*names} - {name}
        assert page.count("data:image/jpeg") == (0 if name == names[0] else 16)
    _, *rows = re.findall(r"<tr>(.*?)</tr>", pages[names[0]])
    for row in rows:
        values = re.findall(r">([^<]+)</t[hd]>", row)
        assert re.search(" +".join(map(re.escape, values)), printed)
    assert len(rows) == 12


@pytest.mark.parametrize("interrupted_fit", [1, 2])
def test_interrupted_demo_stops(monkeypatch, capsys, tmp_path, interrupted_fit):
    one_pass, trained = Trainer._one_pass, []

    def interrupted(self, *args):
        trained.append(self)
        if len({*map(id, trained)}) == interrupted_fit:
            raise KeyboardInterrupt
        return one_pass(self, *args)

    monkeypatch.setattr(Trainer, "_one_pass", interrupted)
    monkeypatch.setattr(vqad.demo, "GaussianYardstick", never)
    monkeypatch.setattr(vqad.cli._commands, "QUICK", TINY_DEMO)
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 130
    assert "vqad: interrupted" in capsys.readouterr().err
    assert len({*map(id, trained)}) == interrupted_fit


# ---- README --------------------------------------------------------------------------------------


def test_the_readmes_python_runs(folders, tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S).group(1)
    fast = "image_size=64, d_model=32, n_codes=16, max_iter=1, false_alarm_rate=0.2, random_state=0"
    assert "random_state=0" in code
    (tmp_path / "good-parts").symlink_to(folders / "good")
    (tmp_path / "new-parts").symlink_to(folders / "bad")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("random_state=0", fast), names)
    assert names["maps"].shape == (6, 64, 64)
    assert len(capsys.readouterr().out.split("\n")) > 3
