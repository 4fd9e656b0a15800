"""The arguments of the command and its help. Nothing here imports torch, so that both appear at once."""

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
# Longest side of a heatmap in pixels: a map has a few dozen cells a side, a photograph thousands of pixels.
DRAWN_SIDE = 1600


class _Parser(argparse.ArgumentParser):
    """argparse with one line on stderr per error; `wrong` may reject arguments that do not go together."""

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
        description="Find anomalous images and show where they are anomalous. One model serves many kinds of object.",
        epilog="examples:\n"
        "  vqad demo                                    see it work on real solar cells\n"
        "  vqad fit good-parts/ -o model.safetensors    learn from a folder of normal images\n"
        "  vqad score model.safetensors new-parts/ --maps heatmaps/\n"
        "exit codes: 0 success, 2 wrong arguments or unusable input, 130 interrupted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vqad {vqad.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    for add in (_add_fit, _add_score, _add_evaluate, _add_compare, _add_report, _add_export, _add_recalibrate):
        add(commands).add_argument(
            "--any-size",
            action="store_true",
            help="read images of any size; by default, images of more than 179 million pixels, and small files of more "
            "than 50 million, are refused because they may fill all memory: use it only for files that you trust",
        )
    for command in commands.choices.values():
        command.add_argument("--traceback", action="store_true", help="show where in the code an error occurred")
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


def _add_demo(commands: Any) -> None:
    command = _command(
        commands,
        "demo",
        "fit both detectors on real solar cells, compare them with an untrained Gaussian, and write heatmaps",
        "The images come with the package elpv-dataset (CC BY-NC-SA 4.0); nothing is downloaded.\n"
        "example:\n  vqad demo --out demo-output",
    )
    command.add_argument(
        "--out",
        type=_folder,
        default=Path(DEMO_FOLDER),
        metavar="DIR",
        help="folder for pages and models (default: %(default)s)",
    )
    command.add_argument("--quick", action="store_true", help="fewer cells and passes: a minute, and worse results")
    _add(command, "--device", "--seed")


def _add_fit(commands: Any) -> _Parser:
    command = _command(
        commands,
        "fit",
        "learn what normal looks like from a folder of normal images",
        "DIR holds images, or one sub-folder per category, or has the layout of MVTec AD (CATEGORY/train/good) or of\n"
        "VisA (split_csv/1cls.csv). In a single folder, categories are discovered; if there is only one, it is named\n"
        "after the folder, or after the one above if that is called good, train or the like. All images are taken as\n"
        "normal. Ctrl-C ends the training early and keeps what was learned (exit code 130).\n"
        "examples:\n"
        "  vqad fit good-parts/ -o model.safetensors\n"
        "  vqad fit mvtec/ -o model.safetensors --max-iter 40 --false-alarm-rate 0.005\n"
        "  vqad fit good-parts/ -o small.safetensors --image-size 160 --set d_model=64\n"
        "  vqad fit good-parts/ -o flow.safetensors --detector vq-flow\n"
        "  vqad fit good-parts/ -o model.safetensors --ignore time-stamp.png    # a mask: white where not to look\n"
        "  vqad fit good-parts/ -o model.safetensors --groups 'piece[0-9]+'    # piece07_left.png, piece07_right.png",
    )
    command.add_argument("directory", type=_name, metavar="DIR", help="folder of normal images")
    _add_output(command, "MODEL", "model file to write")
    group = command.add_mutually_exclusive_group()
    group.add_argument(
        "--category-from-folders",
        dest="by_folder",
        action="store_true",
        default=None,
        help="each sub-folder is a category (the default if there are several)",
    )
    group.add_argument(
        "--no-categories",
        dest="by_folder",
        action="store_false",
        help="discover the categories in the images and ignore the folders",
    )
    command.add_argument(
        "--groups",
        type=_pattern,
        metavar="REGEX",
        help="images that belong together, such as pictures of one piece: those in whose paths REGEX, or its capturing "
        "groups, match the same text. Thresholds then hold for new pieces",
    )
    _add_ignore(command, "a file is one mask for all images, stored in the model")
    command.add_argument("--detector", choices=registry.names(), default="hvq-trans", help="default: %(default)s")
    command.add_argument("--max-iter", type=int, metavar="N", help="passes over the images")
    command.add_argument("--image-size", type=_size, metavar="N or HxW", help="pixels that the backbone sees")
    command.add_argument("--batch-size", type=int, metavar="N", help="images per training step")
    command.add_argument(
        "--set",
        type=assignment,
        action="append",
        metavar="NAME=VALUE",
        help="any other parameter of the detector; may be repeated",
    )
    _add(command, "--false-alarm-rate", "--device", "--seed")
    return command


def _add_score(commands: Any) -> _Parser:
    command = _command(
        commands,
        "score",
        "say how anomalous each image is and which category it was judged as",
        "score: higher is more anomalous; 0 is a typical normal image, the unit is a standard deviation of normal\n"
        "images. p-value: share of normal images that score this high or higher.\n"
        "Damaged images and broken links in a folder are reported and skipped; the exit code is then 2.\n"
        "examples:\n"
        "  vqad score model.safetensors new-parts/\n"
        "  vqad score model.safetensors a.png b.png --csv scores.csv --maps heatmaps/\n"
        "  vqad score model.safetensors --list millions.txt --csv scores.csv --resume --workers 8\n"
        "  vqad score model.safetensors --list - --csv scores.csv --scheduler tcp://10.0.0.1:8786 < millions.txt",
    )
    _add(command, "model")
    command.add_argument("images", type=_name, nargs="*", metavar="DIR|FILE", help="images, or folders of images")
    command.add_argument(
        "--list",
        type=_name,
        metavar="FILE",
        help="also score the images listed in a file, one path per line, any number of them; - reads standard input",
    )
    _add_ignore(command, "a file is one mask for all images, in addition to what the model ignores")
    command.add_argument("--csv", type=_file, metavar="FILE", help="also write the table to a CSV file, row by row")
    command.add_argument(
        "--resume", action="store_true", help="keep the rows of an existing CSV file and score only the other images"
    )
    command.add_argument(
        "--workers", type=_workers, metavar="N", help="processes that score, one core each; -1: one per core"
    )
    command.add_argument(
        "--scheduler",
        type=_name,
        metavar="ADDRESS",
        help="score on the workers of a cluster, which must see the images under the same paths: tcp://HOST:PORT for "
        "dask, ray://HOST:PORT for ray, or ray for the ray cluster that this machine belongs to",
    )
    command.add_argument(
        "--maps", type=_folder, metavar="DIR", help=f"also write heatmaps, as PNG of up to {DRAWN_SIDE} pixels a side"
    )
    _add(command, "--false-alarm-rate", "--device")
    command.wrong = _wrong_of_score
    return command


def _add_recalibrate(commands: Any) -> _Parser:
    command = _command(
        commands,
        "recalibrate",
        "reset the thresholds of a model without training",
        "With --false-alarm-rate alone, the thresholds come from the images that vqad fit held out. With DIR, a\n"
        "folder of new normal images or one sub-folder per category, scores are standardised anew on these images:\n"
        "use it after a change of lamp or camera.\n"
        "examples:\n"
        "  vqad recalibrate model.safetensors --false-alarm-rate 0.01 -o strict.safetensors\n"
        "  vqad recalibrate model.safetensors good-parts-under-the-new-lamp/ -o new.safetensors",
    )
    _add(command, "model")
    command.add_argument("directory", type=_name, nargs="?", metavar="DIR", help="folder of new normal images")
    _add_ignore(command, "a file is one mask for all images, in addition to what the model ignores")
    _add_output(command, "MODEL", "model file to write")
    _add(command, "--false-alarm-rate", "--device")
    return command


def _add_evaluate(commands: Any) -> _Parser:
    command = _command(
        commands,
        "evaluate",
        "measure a model on labelled test images",
        "ROOT has the layout of MVTec AD (CATEGORY/test/good, CATEGORY/test/DEFECT, CATEGORY/ground_truth/DEFECT)\n"
        "or of VisA (split_csv/1cls.csv).\n"
        "example:\n  vqad evaluate model.safetensors mvtec/ --json metrics.json",
    )
    _add(command, "model")
    _add_root(command)
    command.add_argument("--json", type=_file, metavar="FILE", help="also write the metrics to a JSON file")
    command.add_argument(
        "--fpr-limit",
        type=float,
        default=0.3,
        metavar="X",
        help="false-positive rate up to which AUPRO integrates (default: %(default)s)",
    )
    _add(command, "--no-pixels", "--device")
    return command


def _add_compare(commands: Any) -> _Parser:
    command = _command(
        commands,
        "compare",
        "say which of two models finds more on labelled test images",
        "Compares image AUROC, and recall at the threshold where each model has the given false-alarm rate. Each\n"
        "difference, b minus a, comes with a 95 % interval over the choice of test images (paired bootstrap). The\n"
        "interval does not cover how much results vary from one training to the next.\n"
        "example:\n  vqad compare old.safetensors new.safetensors mvtec/",
    )
    for name in ("a", "b"):
        command.add_argument(name, type=_name, metavar=name.upper(), help="model file written by vqad fit")
    _add_root(command)
    command.add_argument(
        "--false-alarm-rate",
        type=float,
        default=0.05,
        metavar="RATE",
        help="share of the normal images above each model's threshold (default: %(default)s)",
    )
    _add(command, "--device", "--seed")
    return command


def _add_report(commands: Any) -> _Parser:
    command = _command(
        commands,
        "report",
        "write an HTML page to look at heatmaps and try thresholds",
        "The page is one file that loads nothing else. For a folder in the layout of MVTec AD or VisA it shows the\n"
        "test images, counts misses and false alarms, and gives metrics with confidence intervals.\n"
        'Needs jinja2 and matplotlib: pip install "vqad[report]".\n'
        "example:\n  vqad report model.safetensors new-parts/ -o page.html",
    )
    _add(command, "model")
    command.add_argument("directory", type=_name, metavar="DIR", help="folder of images")
    _add_output(command, "FILE", "HTML file to write")
    command.add_argument("--title", help="title of the page")
    command.add_argument(
        "--n-images",
        type=int,
        default=1000,
        metavar="N",
        help="largest number of images to show (default: %(default)s)",
    )
    _add(command, "--no-pixels", "--device")
    return command


def _add_export(commands: Any) -> _Parser:
    command = _command(
        commands,
        "export",
        "write a model as an ONNX graph, which runs without Python and torch",
        "The graph takes an image of any size, float32 (height, width, 3) in 0..1, and returns score (higher is more\n"
        "normal: the negative of what vqad score prints), label (+1 normal, -1 anomaly), map (higher is more\n"
        "anomalous) and category. It computes in float32, and is checked against the model in float32 before it is\n"
        "written.\n"
        'Needs onnx, onnxscript and onnxruntime: pip install "vqad[onnx]".\n'
        "example:\n  vqad export model.safetensors -o model.onnx --images new-parts/",
    )
    _add(command, "model")
    _add_output(command, "FILE", "ONNX file to write")
    command.add_argument(
        "--images", type=_name, metavar="DIR", help="folder of images to check the graph on (default: synthetic ones)"
    )
    return command


# ---- arguments that several commands have ----------------------------------------------------------


def _add(command: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        command.add_argument(name, **_SHARED[name])


def _add_root(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", type=_name, metavar="ROOT", help="folder of labelled categories, or one of them")


def _add_output(command: argparse.ArgumentParser, metavar: str, text: str) -> None:
    command.add_argument("-o", "--output", type=_file, required=True, metavar=metavar, help=text)


def _add_ignore(command: argparse.ArgumentParser, of_a_file: str) -> None:
    command.add_argument(
        "--ignore",
        type=_name,
        metavar="FILE|DIR",
        help=f"mask of where not to look, black elsewhere: {of_a_file}; a folder holds one mask per image, named like "
        "the image, with or without _mask",
    )


def _name(text: str) -> str:
    """The name of a file or folder. An empty one, say from an unset variable, would mean the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def _folder(text: str) -> Path:
    return Path(_name(text))


def _file(text: str) -> str:
    """The name of a file to write."""
    if _name(text).endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"{text!r} names a folder; give the name of a file")
    return text


def _wrong_of_score(arguments: argparse.Namespace) -> str | None:
    if not arguments.images and arguments.list is None:
        return "no images: give files or folders, or --list FILE"
    if arguments.resume and arguments.csv is None:
        return "--resume continues a table: name it with --csv FILE"
    return None


def _workers(text: str) -> int:
    if not re.fullmatch(r"-1|[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers: give 1 or more, or -1 for one per core")
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
        raise argparse.ArgumentTypeError(f"{text!r} is not a regular expression: {error}") from error


def assignment(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE; a value that is not a Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


_SHARED: dict[str, dict[str, Any]] = {
    "model": {"type": _name, "metavar": "MODEL", "help": "model file written by vqad fit"},
    "--false-alarm-rate": {
        "type": float, "metavar": "RATE", "help": "share of normal images that may be called anomalous",
    },
    "--no-pixels": {"action": "store_true", "help": "leave out the pixel metrics"},
    "--device": {"default": "auto", "help": "auto, cpu, cuda, ... (default: %(default)s)"},
    "--seed": {"type": int, "default": 0, "metavar": "N", "help": "makes runs repeatable (default: %(default)s)"},
}  # fmt: skip
