"""The benchmark on real defects: what it counts, on numbers made by hand, and a run on drawn parts."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save_png

from vqad.datasets import make_textured_parts

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "real_defects.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs a checkout: benchmarks are no part of the package")
NORMAL = np.arange(1.0, 21.0)  # 1, 2, ..., 20
DEFECTIVE = np.array([0.0, 17.5, 18.5, 19.0, 19.5, 20.0, 20.5, 30.0])


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("real_defects", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


# The quantile is one of the scores: of 20 the 20th at 1 % and 5 %, the 19th at 10 %, the 11th at 50 %.
@pytest.mark.parametrize(("rate", "found"), [(0.01, 2 / 8), (0.05, 2 / 8), (0.1, 4 / 8), (0.5, 7 / 8)])
def test_found_at_a_rate_counts_defects_strictly_above_the_quantile(script, rate, found):
    order = np.random.default_rng(0).permutation(20)
    assert script.found_at_rate(NORMAL[order], DEFECTIVE, rate) == found


@pytest.mark.parametrize(
    ("n_alarms", "found"), [(0, 2 / 8), (1, 4 / 8), (2, 6 / 8), (3, 7 / 8), (19, 7 / 8), (20, 1.0)]
)
def test_found_at_as_many_alarms_has_just_so_many(script, n_alarms, found):
    order = np.random.default_rng(0).permutation(20)
    assert script.found_at_alarms(NORMAL[order], DEFECTIVE, n_alarms) == found


def test_predict_is_compared_with_the_scores_at_its_own_false_alarms(script):
    score = np.append(NORMAL, DEFECTIVE)
    target = np.repeat([1, -1], [20, 8])
    label = np.where(score > 19.2, -1, 1)  # one false alarm, 20, and 19.5, 20, 20.5 and 30 of the defects
    label[score == 30] = 1  # that one is missed
    row = script.predict_row(score, target, label)
    assert row == {"predict_found": 3 / 8, "predict_alarms": 1 / 20, "found_at_same": 4 / 8, "ratio": 3 / 4}


def test_a_ratio_to_nothing_is_not_a_number(script):
    row = script.predict_row(np.array([1.0, 2.0, 0.0]), np.array([1, 1, -1]), np.array([1, 1, 1]))
    assert row["found_at_same"] == 0
    assert np.isnan(row["ratio"])


def test_means_leave_out_sets_without_a_number(script):
    rows = {"a": {"image_auroc": 0.5, "aupro": np.nan}, "b": {"image_auroc": 1.0, "aupro": 0.25}, "c": {}}
    mean = script.with_mean(rows)["mean"]
    assert (mean["image_auroc"], mean["aupro"]) == (0.75, 0.25)
    assert np.isnan(mean["ratio"])


def test_a_run_with_the_yardstick_tells_of_sets_that_are_missing(script, tmp_path, capsys):
    parts = make_textured_parts(16, 4, categories=("disc",), image_size=32, random_state=0)
    for k, pixels in enumerate(parts.images):
        place = "train/good" if k < 10 else "test/good" if k < 16 else f"test/{parts.defect[k]}"
        save_png(tmp_path / "disc" / place / f"{k}.png", pixels)
    out = tmp_path / "out.json"
    script.main(
        [str(tmp_path), "--sets", "disc,gone", "--detectors", "yardstick", "--small", "disc=8", "--out", str(out)]
    )
    printed, complaint = capsys.readouterr()
    assert "yardstick on disc: 8 images learned, 10 judged" in printed
    assert "SKIPPED gone" in complaint
    found = json.loads(out.read_text())
    assert list(found["skipped"]) == ["gone"]
    (model,) = found["models"]
    score, is_good = np.array(model["images"]["score"]), np.array(model["images"]["defect"]) == "good"
    above = (score[~is_good, None] > score[is_good]).mean()
    assert model["rows"]["disc"]["image_auroc"] == pytest.approx(above)
    assert f"{above:.3f}" in printed
