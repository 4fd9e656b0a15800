"""`vqad score` of many images: on workers, from lists, cut short and gone on with."""

import csv
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import save_png

import vqad.cli._scoring
from vqad import HVQTransDetector, save
from vqad.cli import main
from vqad.cli._files import CSV_COLUMNS, RowsBefore
from vqad.datasets import make_textured_parts
from vqad.workers import map_in_order


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With a small backbone of random weights."""
    parts = make_textured_parts(24, 0, categories=("disc",), image_size=64, random_state=0)
    made = HVQTransDetector(
        backbone="test_efficientnet", weights="random", image_size=64, max_iter=1, d_model=16, n_codes=8,
        false_alarm_rate=0.3, random_state=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save(made.fit(parts.images), path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """120 images, one of which is cut short."""
    parts = make_textured_parts(12, 0, categories=("disc",), image_size=32, random_state=1)
    for k in range(120):
        save_png(tmp_path / "new" / f"{k:03d}.png", np.roll(parts.images[k % 12], k, axis=0))
    whole = (tmp_path / "new" / "077.png").read_bytes()
    (tmp_path / "new" / "077.png").write_bytes(whole[:-60])
    return tmp_path / "new"


@pytest.fixture
def few_at_once(monkeypatch):
    monkeypatch.setattr(vqad.cli._scoring, "ROWS_AT_ONCE", 8)


def rows_of(table):
    with open(table, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_workers_write_what_one_process_writes(model, folder, tmp_path, few_at_once, capfd):
    alone, shared = tmp_path / "alone.csv", tmp_path / "shared.csv"
    assert main(["score", model, str(folder), "--csv", str(alone)]) == 2
    said = capfd.readouterr()
    assert main(["score", model, str(folder), "--csv", str(shared), "--workers", "2"]) == 2
    again = capfd.readouterr()
    assert shared.read_text() == alone.read_text()
    assert len(rows_of(alone)) == 1 + 119
    assert again.out == said.out
    assert again.err == said.err
    assert "image 77 of X, path" in said.err


def test_a_list_names_images_one_a_line(model, folder, tmp_path, capsys, monkeypatch):
    listed, table = tmp_path / "list.txt", tmp_path / "scores.csv"
    paths = [str(folder / f"{k:03d}.png") for k in (5, 3, 77, 4)]
    listed.write_text("\n".join([paths[0], "", *paths[1:], "gone.png"]))
    assert main(["score", model, "--list", str(listed), "--csv", str(table), "--maps", str(tmp_path / "maps")]) == 2
    said = capsys.readouterr()
    assert [row[0] for row in rows_of(table)[1:]] == [paths[0], paths[1], paths[3]]
    assert "gone.png" in said.err
    assert "077.png" in said.err
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["003_map.png", "004_map.png", "005_map.png"]
    before = table.read_bytes()
    with open(listed) as file:
        monkeypatch.setattr(sys, "stdin", file)
        main(["score", model, "--list", "-", "--csv", str(table)])
    assert table.read_bytes() == before
    assert main(["score", model, "--list", str(listed), "--csv", paths[1]]) == 2
    assert "would overwrite an input" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [0, 1, 2, 30])
def test_a_table_that_was_cut_short_is_completed(model, folder, tmp_path, cut, capsys):
    whole, table = tmp_path / "whole.csv", tmp_path / "scores.csv"
    main(["score", model, str(folder), "--csv", str(whole)])
    expected = capsys.readouterr().out.splitlines()
    lines = whole.read_bytes().splitlines(keepends=True)
    kept = b"".join(lines[:41])
    table.write_bytes(kept[: len(kept) - cut])
    assert main(["score", model, str(folder), "--csv", str(table), "--resume"]) == 2
    said = capsys.readouterr()
    n_before = 40 - bool(cut)
    assert f"already has rows for {n_before} images" in said.err
    assert table.read_bytes() == whole.read_bytes()
    assert said.out.splitlines()[1:] == expected[1 + n_before :]
    main(["score", model, str(folder), "--csv", str(table), "--resume"])
    assert table.read_bytes() == whole.read_bytes()


def test_a_table_of_another_kind_or_model_is_not_gone_on_with(model, folder, tmp_path, capsys):
    table = tmp_path / "scores.csv"
    arguments = ["score", model, str(folder / "000.png"), "--csv", str(table), "--resume"]
    assert main(arguments) == 0
    before = table.read_bytes()
    assert main([*arguments, "--false-alarm-rate", "0.7"]) == 2
    assert "another model or false-alarm rate" in capsys.readouterr().err
    assert table.read_bytes() == before
    table.write_bytes(b"a,b\r\n1,2\r\n")
    assert main(arguments) == 2
    assert "was not written by vqad score" in capsys.readouterr().err
    assert table.read_bytes() == b"a,b\r\n1,2\r\n"


def test_rows_with_line_breaks_in_a_path_end_where_they_end(tmp_path):
    table = tmp_path / "scores.csv"
    row = ["a\nb,c.png", "x", "0.5", "1.0", "0.3", "normal"]
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([CSV_COLUMNS, row, row])
    content = table.read_bytes()
    for end in range(len(content)):
        table.write_bytes(content[:end])
        before = RowsBefore(table)
        n = len(list(before))
        assert before.end == sum(
            len(each) for each in [b",".join(map(str.encode, CSV_COLUMNS)) + b"\r\n"] if end >= len(each)
        ) + n * len(b'"a\nb,c.png",x,0.5,1.0,0.3,normal\r\n')
        assert n < 2


def test_arguments_that_do_not_go_together(model, capsys):
    for arguments, expected in (
        ([], "no images"),
        (["x.png", "--resume"], "name it with --csv"),
        (["x.png", "--workers", "0"], "not a number of workers"),
    ):
        with pytest.raises(SystemExit):
            main(["score", model, *arguments])
        assert expected in capsys.readouterr().err


# The command in a process that kills itself while its workers go on.
DYING = """
import os, signal, sys
import vqad.cli._scoring as scoring
from vqad.cli import main

scoring.ROWS_AT_ONCE = 8
map_in_order = scoring.map_in_order

def and_die(*args):
    for k, each in enumerate(map_in_order(*args)):
        if k == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield each

scoring.map_in_order = and_die
main(sys.argv[1:])
"""


@pytest.fixture
def scored_by_workers(model, folder, tmp_path):
    """Arguments to score images of a list, one of which is cut short, to a table; and the names of the others."""
    names = sorted(map(str, folder.iterdir()))
    (tmp_path / "list.txt").write_text("\n".join(names))
    arguments = ["score", model, "--list", str(tmp_path / "list.txt"), "--csv", str(tmp_path / "scores.csv")]
    return [*arguments, "--resume", "--workers", "2"], [name for name in names if "077" not in name]


@pytest.mark.slow
def test_after_a_kill_the_next_run_gives_every_image_one_row(scored_by_workers, tmp_path, few_at_once, capsys):
    arguments, names = scored_by_workers
    with open(tmp_path / "said.txt", "w") as said:  # which the workers of a killed process keep open for a while
        killed = subprocess.run([sys.executable, "-c", DYING, *arguments], stdout=said, stderr=said, check=False)
    assert killed.returncode == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    n_before = len(rows_of(tmp_path / "scores.csv")) - 1
    assert 0 < n_before < len(names)
    assert main(arguments) == 2
    assert "already has rows for" in capsys.readouterr().err
    assert [row[0] for row in rows_of(tmp_path / "scores.csv")[1:]] == names


@pytest.mark.slow
def test_of_a_worker_that_is_killed_no_row_is_lost(scored_by_workers, tmp_path, few_at_once, monkeypatch, capsys):
    (arguments, names), killed = scored_by_workers, []

    def and_kill(*args):
        for each in map_in_order(*args):
            if not killed:
                killed.append(int(each.worker.split()[-1]))
                os.kill(killed[0], signal.SIGKILL)
            yield each

    monkeypatch.setattr(vqad.cli._scoring, "map_in_order", and_kill)
    assert main(arguments) == 2
    assert "A worker was lost" in capsys.readouterr().err
    assert killed
    assert killed[0] != os.getpid()
    assert [row[0] for row in rows_of(tmp_path / "scores.csv")[1:]] == names
