"""A disk that is full: whatever is written, the error names the file."""

import errno
import io
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import save_png

import vqad
from vqad import HVQTransDetector
from vqad._writing import not_written, writing
from vqad.cli import main
from vqad.datasets import make_textured_parts
from vqad.report import write_report

SMALL = {"image_size": 64, "d_model": 16, "n_layers": 1, "n_codes": 8, "max_iter": 1, "false_alarm_rate": 0.25}
PARTS = make_textured_parts(16, 2, categories=("disc",), image_size=64, random_state=0)

full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here, where nothing fits")


@contextmanager
def no_file_longer_than(n):
    """As a disk with so much room, for files alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def detector():
    return HVQTransDetector(random_state=0, weights="random", **SMALL).fit(PARTS.images[:16])


@pytest.fixture(scope="module")
def files(detector, tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    vqad.save(detector, root / "model.safetensors")
    for k, pixels in enumerate(PARTS.images[14:]):
        save_png(root / "new" / f"{k}.png", pixels)
    return root


def test_a_model_is_named_and_the_old_one_stays(detector, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    with (
        no_file_longer_than(50_000),
        pytest.raises(OSError, match=r"model.safetensors' could not be written: File too"),
    ):
        vqad.save(detector, path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_page_is_named(detector, tmp_path):
    pytest.importorskip("jinja2")
    with (
        no_file_longer_than(10_000),
        pytest.raises(OSError, match=r"page.html' could not be written.* Free some space"),
    ):
        write_report(tmp_path / "page.html", detector, PARTS.images[14:])


def test_a_graph_is_named(detector, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("vqad.export._to_onnx", lambda *args: onnx.ModelProto(producer_name="x" * 9000))
    monkeypatch.setattr("vqad.export._compare", lambda *args: None)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *args, **more: None)
    with no_file_longer_than(5000), pytest.raises(OSError, match=r"m.onnx' could not be written: File too large"):
        vqad.export_onnx(detector, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_checkpoints_say_where_and_the_fit_goes_on(tmp_path):
    made = HVQTransDetector(random_state=0, weights="random", checkpoint_dir=tmp_path, **SMALL)
    with (
        no_file_longer_than(5000),
        pytest.warns(UserWarning, match=rf"The checkpoint could not .*{tmp_path.name}.*File too large"),
    ):
        made.fit(PARTS.images[:16])
    assert np.isfinite(made.score_samples(PARTS.images[16:])).all()


@pytest.mark.filterwarnings("ignore:Unable to cache")
def test_memory_says_where_and_the_work_goes_on(detector, tmp_path):
    expected = detector.score_samples(PARTS.images[14:])
    made = HVQTransDetector(**{**detector.get_params(), "memory": str(tmp_path)})
    vars(made).update(_fitted=detector.fitted_)
    with (
        no_file_longer_than(5000),
        pytest.warns(UserWarning, match=rf"memory='.*{tmp_path.name}' cannot store features"),
    ):
        np.testing.assert_array_equal(made.score_samples(PARTS.images[14:]), expected)


@full
def test_the_command_names_a_table(files, capsys):
    assert main(["score", str(files / "model.safetensors"), str(files / "new"), "--csv", "/dev/full"]) == 2
    assert "'/dev/full' could not be written: No space left on device." in capsys.readouterr().err


def test_the_command_names_a_heatmap(files, tmp_path, capsys):
    with no_file_longer_than(300):
        code = main(["score", str(files / "model.safetensors"), str(files / "new"), "--maps", str(tmp_path / "maps")])
    assert code == 2
    assert "0_map.png' could not be written: File too large. Free some space" in capsys.readouterr().err


def test_what_is_printed_is_named_too(files, capsys, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    forgotten = []
    monkeypatch.setattr("sys.stdout", Full())
    monkeypatch.setattr("vqad.cli._forget_output", lambda: forgotten.append(True))
    assert main(["score", str(files / "model.safetensors"), str(files / "new")]) == 2
    assert forgotten == [True]
    assert "the output could not be written: No space left on device" in capsys.readouterr().err


def test_errors_keep_their_kind_and_number():
    made = not_written("a.txt", PermissionError(errno.EACCES, "Permission denied"))
    assert (type(made), made.errno, str(made)) == (
        PermissionError, errno.EACCES, "'a.txt' could not be written: Permission denied.",
    )  # fmt: skip
    with pytest.raises(BrokenPipeError), writing("a.txt"):
        raise BrokenPipeError
    with pytest.raises(io.UnsupportedOperation), writing("a.txt"):
        raise io.UnsupportedOperation("not writable")
