"""Benchmarks that others run on data and hardware of their own: each once, at tiny sizes."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save_png

from vqad.datasets import make_textured_parts

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="needs a checkout: benchmarks are no part of the package"),
]
TINY = {
    "hvq_trans": ["d_model=16", "n_layers=1", "n_heads=2", "dim_feedforward=16", "n_codes=8"],
    "vq_flow": ["n_concepts=2", "n_patterns=8", "d_concept=8", "d_position=8", "hidden=8", "n_blocks=(1,1,1)"],
}


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def mvtec_of_drawn_parts(root):
    """Two categories of drawn parts in the layout of MVTec AD, faults with masks."""
    parts = make_textured_parts(n_normal=10, n_anomalous=3, image_size=64, categories=("disc", "weave"), random_state=0)
    for k, (image, target, name) in enumerate(zip(parts.images, parts.target, parts.category)):
        folder = root / name
        if target == 1:
            split = "train" if k % 3 else "test"
            save_png(folder / split / "good" / f"{k}.png", image)
        else:
            save_png(folder / "test" / "fault" / f"{k}.png", image)
            mask = parts.masks[k] if parts.masks[k] is not None else np.zeros(image.shape[:2], np.uint8)
            save_png(folder / "ground_truth" / "fault" / f"{k}_mask.png", (np.asarray(mask) > 0).astype(np.uint8) * 255)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.filterwarnings("ignore")
def test_reproduce_runs_end_to_end_and_goes_on(tmp_path, name, capsys):
    reproduce = script("reproduce")
    mvtec_of_drawn_parts(tmp_path / "data")
    command = [
        str(tmp_path / "data"), "--detector", name, "--weights", "random", "--keep", str(tmp_path / "kept"),
        "--out", str(tmp_path / "out.json"), "--set-params", "backbone=tf_efficientnet_lite0", "image_size=64",
        "max_iter=2", "false_alarm_rate=0.3", *TINY[name],
    ]  # fmt: skip
    rows = reproduce.main(command)
    assert list(rows) == ["disc", "weave", "mean"]
    for metric in reproduce.METRICS:
        assert 0 <= rows["mean"][metric] <= 1
        assert rows["mean"][metric] == pytest.approx((rows["disc"][metric] + rows["weave"][metric]) / 2)
    printed = capsys.readouterr().out
    assert "published" in printed
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
    assert reproduce.main(command) == rows
    assert "using the existing model" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_gpu_check_runs_without_a_gpu(capsys):
    chosen = ["parity with the CPU", "no waiting in a step", "lack of memory"]
    assert script("gpu_check").main(["--device", "cpu", "--quick", "--only", *chosen]) == 0
    printed = capsys.readouterr().out
    assert all(title in printed for title in chosen)
    assert "FAILED" not in printed
