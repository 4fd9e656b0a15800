"""The arguments of the command, and its help: nothing here imports torch, so that both come at once."""

from __future__ import annotations

import argparse
import ast
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import vqad
from vqad import registry
from vqad.cli._messages import USER_ERROR

DEMO_FOLDER = "demo-output"
# Longest side of a heatmap: a map has some dozens of cells, and a photograph thousands of pixels.
DRAWN_SIDE = 1600


class _Parser(argparse.ArgumentParser):
    """argparse, with one line on stderr for a wrong argument, and for what `wrong` says of all of them."""

    wrong: Callable[[argparse.Namespace], str | None] | None = None

    def parse_known_args(self, *given: Any, **named: Any) -> Any:
        arguments, rest = super().parse_known_args(*given, **named)
        if self.wrong is not None and (said := self.wrong(arguments)):
            self.error(said)
        return arguments, rest

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message and any("=" in word and not word.startswith("-") for word in unknown.split()):
            message += "; each --set takes one NAME=VALUE"
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vqad",
        description="Find images that are not like the normal ones, and where. One model for many kinds of object.",
        epilog="examples:\n"
        "  vqad demo                                    see it work on real solar cells\n"
        "  vqad fit good-parts/ -o model.safetensors    learn from a folder of normal images\n"
        "  vqad score model.safetensors new-parts/ --maps heatmaps/\n"
        "exit codes: 0 done, 2 wrong arguments or unusable input, 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vqad {vqad.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_demo,
        _add_fit,
        _add_score,
        _add_evaluate,
        _add_compare,
        _add_report,
        _add_export,
        _add_recalibrate,
    ):
        command = add(commands)
        if add is not _add_demo:
            command.add_argument(
                "--any-size",
                action="store_true",
                help="read images of any number of pixels: Pillow refuses 179 million and more, as a small file may "
                "be made to fill all memory; only for files that you trust",
            )
        command.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def _command(commands: Any, name: str, text: str, more: str) -> _Parser:
    command: _Parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=name)
    return command


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "demo",
        "learn real solar cells with both detectors, measure beside an untrained Gaussian, and write heatmaps",
        "The images come with the package elpv-dataset (CC BY-NC-SA 4.0); nothing is downloaded.\n"
        "example:\n  vqad demo --out demo-output",
    )
    command.add_argument(
        "--out",
        type=_folder,
        default=Path(DEMO_FOLDER),
        metavar="DIR",
        help="for pages and models (default: %(default)s)",
    )
    command.add_argument("--quick", action="store_true", help="fewer cells and passes: a minute, and poorer results")
    _add_running(command)
    return command


def _add_fit(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "fit",
        "learn what normal looks like from a folder of normal images",
        "DIR holds images, or one sub-folder a category, or has the layout of MVTec AD (CATEGORY/train/good) or VisA\n"
        "(split_csv/1cls.csv). In a single folder categories are looked for; where there is no more than one, it has\n"
        "the folder's name. All images are taken as normal. Ctrl-C ends the training early and keeps what was learned\n"
        "(exit code 130).\n"
        "examples:\n"
        "  vqad fit good-parts/ -o model.safetensors\n"
        "  vqad fit mvtec/ -o model.safetensors --max-iter 40 --false-alarm-rate 0.005\n"
        "  vqad fit good-parts/ -o small.safetensors --image-size 160 --set d_model=64\n"
        "  vqad fit good-parts/ -o flow.safetensors --detector vq-flow\n"
        "  vqad fit good-parts/ -o model.safetensors --ignore time-stamp.png    # a mask: white where not to look\n"
        "  vqad fit good-parts/ -o model.safetensors --groups 'piece[0-9]+'    # piece07_left.png, piece07_right.png",
    )
    command.add_argument("directory", type=_name, metavar="DIR", help="folder of normal images")
    command.add_argument(
        "-o", "--output", type=_file, required=True, metavar="MODEL", help="file to write the model to"
    )
    group = command.add_mutually_exclusive_group()
    group.add_argument(
        "--category-from-folders",
        dest="by_folder",
        action="store_true",
        default=None,
        help="each sub-folder is a category (the default where there is more than one)",
    )
    group.add_argument(
        "--no-categories",
        dest="by_folder",
        action="store_false",
        help="find the categories in the images, whatever the folders are",
    )
    command.add_argument(
        "--groups",
        type=_pattern,
        metavar="REGEX",
        help="images in whose paths it finds the same, in its parentheses if it has some, belong together, such as "
        "pictures of one piece: thresholds are then for new pieces",
    )
    _add_ignore(command, "a file: one for all images, which the model keeps; ")
    command.add_argument("--detector", choices=registry.names(), default="hvq-trans", help="hvq-trans by default")
    command.add_argument("--max-iter", type=int, metavar="N", help="passes over the images")
    command.add_argument("--image-size", type=_size, metavar="N or HxW", help="pixels that the backbone sees")
    command.add_argument("--batch-size", type=int, metavar="N", help="images per training step")
    command.add_argument(
        "--false-alarm-rate", type=float, metavar="RATE", help="share of normal images that may be called anomalous"
    )
    command.add_argument(
        "--set",
        type=_assignment,
        action="append",
        metavar="NAME=VALUE",
        help="any parameter of the detector that has no option here; may be repeated",
    )
    _add_running(command)
    return command


def _add_score(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "score",
        "say of each image how anomalous it is and which category it was judged as",
        "score: higher is more anomalous; 0 is a typical normal image, 1 a standard deviation of normal images.\n"
        "p-value: share of normal images that score this high or higher.\n"
        "A damaged image, or a broken link in a folder, is named and left out; the exit code then is 2.\n"
        "examples:\n"
        "  vqad score model.safetensors new-parts/\n"
        "  vqad score model.safetensors a.png b.png --csv scores.csv --maps heatmaps/\n"
        "  vqad score model.safetensors --list millions.txt --csv scores.csv --resume --workers 8\n"
        "  vqad score model.safetensors --list - --csv scores.csv --scheduler tcp://10.0.0.1:8786 < millions.txt",
    )
    _add_model(command)
    command.add_argument("images", type=_name, nargs="*", metavar="DIR|FILE", help="images, or folders of images")
    command.add_argument(
        "--list",
        type=_name,
        metavar="FILE",
        help="also the images that a file names, one a line, however many; - reads standard input",
    )
    _add_ignore(command, "a file: one for all images, beside what the model ignores; ")
    command.add_argument("--csv", type=_file, metavar="FILE", help="also write the table to a CSV file, row by row")
    command.add_argument(
        "--resume", action="store_true", help="keep the rows that the CSV file has, and score only what it lacks"
    )
    command.add_argument(
        "--workers", type=_workers, metavar="N", help="processes that score, one core each; -1: one a core"
    )
    command.add_argument(
        "--scheduler",
        type=_name,
        metavar="ADDRESS",
        help="score on the workers of a cluster, which must see the images under the same paths: tcp://HOST:PORT of "
        "dask, ray://HOST:PORT of ray, or ray for the one that this machine is part of",
    )
    command.add_argument(
        "--maps", type=_folder, metavar="DIR", help=f"also write heatmaps, as PNG of up to {DRAWN_SIDE} pixels a side"
    )
    command.add_argument(
        "--false-alarm-rate", type=float, metavar="RATE", help="another share of false alarms than the model is set for"
    )
    command.wrong = _wrong_of_score
    _add_device(command)
    return command


def _add_recalibrate(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "recalibrate",
        "set the thresholds of a model anew, without training",
        "With --false-alarm-rate alone they come from the images that vqad fit held out. With DIR, a folder of new\n"
        "normal images or one sub-folder a category, scores are standardised by these: after a change of lamp or\n"
        "camera, normal images are normal again.\n"
        "examples:\n"
        "  vqad recalibrate model.safetensors --false-alarm-rate 0.01 -o strict.safetensors\n"
        "  vqad recalibrate model.safetensors good-parts-under-the-new-lamp/ -o new.safetensors",
    )
    _add_model(command)
    command.add_argument("directory", type=_name, nargs="?", metavar="DIR", help="folder of new normal images")
    _add_ignore(command, "a file: one for all images, beside what the model ignores; ")
    command.add_argument(
        "-o", "--output", type=_file, required=True, metavar="MODEL", help="file to write the model to"
    )
    command.add_argument(
        "--false-alarm-rate", type=float, metavar="RATE", help="share of normal images that may be called anomalous"
    )
    _add_device(command)
    return command


def _add_evaluate(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "evaluate",
        "measure a model on test images whose labels are known",
        "ROOT has the layout of MVTec AD, CATEGORY/test/good, CATEGORY/test/DEFECT, CATEGORY/ground_truth/DEFECT,\n"
        "or of VisA, split_csv/1cls.csv.\n"
        "example:\n  vqad evaluate model.safetensors mvtec/ --json metrics.json",
    )
    _add_model(command)
    command.add_argument("directory", type=_name, metavar="ROOT", help="folder of categories, or of one category")
    command.add_argument("--json", type=_file, metavar="FILE", help="also write the metrics to a JSON file")
    command.add_argument("--no-pixels", action="store_true", help="leave out the pixel metrics")
    command.add_argument(
        "--fpr-limit", type=float, default=0.3, metavar="X", help="where AUPRO stops (default: %(default)s)"
    )
    _add_device(command)
    return command


def _add_compare(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "compare",
        "say which of two models finds more on test images whose labels are known",
        "Image AUROC, and the share of the anomalies that are found where each model calls as many normal images\n"
        "anomalous; of both the difference, b less a, with an interval that other test images leave but one time in\n"
        "twenty (paired bootstrap). It says nothing of another training of either.\n"
        "example:\n  vqad compare old.safetensors new.safetensors mvtec/",
    )
    for name in ("a", "b"):
        command.add_argument(name, type=_name, metavar=name.upper(), help="file that vqad fit wrote")
    command.add_argument("directory", type=_name, metavar="ROOT", help="folder as of vqad evaluate")
    command.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.05,
        metavar="RATE",
        help="share of the normal images over the threshold of each (default: %(default)s)",
    )
    _add_running(command)
    return command


def _add_report(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "report",
        "write an HTML page to look at heatmaps and try thresholds",
        "The page is one file, which loads nothing from anywhere. For a folder in the layout of MVTec AD or VisA it\n"
        "is about the test images, counts misses and false alarms, and has metrics with intervals.\n"
        'Needs jinja2 and matplotlib: pip install "vqad[report]".\n'
        "example:\n  vqad report model.safetensors new-parts/ -o page.html",
    )
    _add_model(command)
    command.add_argument("directory", type=_name, metavar="DIR", help="folder of images")
    command.add_argument("-o", "--output", type=_file, required=True, metavar="FILE", help="HTML file to write")
    command.add_argument("--title", help="of the page")
    command.add_argument(
        "--n-images", type=int, default=1000, metavar="N", help="images to show at the most (default: %(default)s)"
    )
    command.add_argument("--no-pixels", action="store_true", help="leave out the pixel metrics")
    _add_device(command)
    return command


def _add_export(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "export",
        "write a model as an ONNX graph, which runs without Python and torch",
        "The graph takes an image of any size, float32 (height, width, 3) in 0..1, and gives score (higher is more\n"
        "normal: vqad score with the other sign), label (+1 normal, -1 anomaly), map (higher is more anomalous) and\n"
        "category. It computes in float32, and is compared with the model in float32 before it is written.\n"
        'Needs onnx, onnxscript and onnxruntime: pip install "vqad[onnx]".\n'
        "example:\n  vqad export model.safetensors -o model.onnx --images new-parts/",
    )
    _add_model(command)
    command.add_argument("-o", "--output", type=_file, required=True, metavar="FILE", help="ONNX file to write")
    command.add_argument(
        "--images", type=_name, metavar="DIR", help="folder of images to compare on (default: drawn ones)"
    )
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=_name, metavar="MODEL", help="file that vqad fit wrote")


def _add_ignore(command: argparse.ArgumentParser, of_a_file: str) -> None:
    command.add_argument(
        "--ignore",
        type=_name,
        metavar="FILE|DIR",
        help="mask of where not to look, black elsewhere; "
        f"{of_a_file}a folder: one for each image, of the same name, or of that and _mask",
    )


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")


def _add_running(command: argparse.ArgumentParser) -> None:
    _add_device(command)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="makes runs repeat (default: %(default)s)")


def _name(text: str) -> str:
    """The name of a file or folder: an empty one, as of a variable that is not set, would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def _folder(text: str) -> Path:
    return Path(_name(text))


def _file(text: str) -> str:
    """The name of a file to write."""
    if _name(text).endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"{text!r} is the name of a folder; give that of a file")
    return text


def _wrong_of_score(arguments: argparse.Namespace) -> str | None:
    if not arguments.images and arguments.list is None:
        return "no images: give files or folders, or --list FILE"
    if arguments.resume and arguments.csv is None:
        return "--resume goes on with a table: give it with --csv FILE"
    return None


def _workers(text: str) -> int:
    if not re.fullmatch(r"-1|[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of workers: give 1 or more, or -1 for one a core")
    return int(text)


def _size(text: str) -> int | tuple[int, int]:
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor HxW, such as 224x320")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE; a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
