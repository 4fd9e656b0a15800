"""The `vqad` command."""

from __future__ import annotations

import argparse
import ast
import csv
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

import vqad
from vqad.base import BaseImageDetector
from vqad.datasets import ImageDataset, load_folder, load_mvtec
from vqad.datasets._layouts import loader_of
from vqad.demo import DETECTORS, FULL, QUICK, run_demo
from vqad.images import ImageSequence, check_images
from vqad.metrics import evaluate
from vqad.persistence import replaceable
from vqad.report import Verdicts, judge, overlay, write_report

OK, USER_ERROR, INTERRUPTED, BROKEN_PIPE = 0, 2, 130, 141
DEMO_FOLDER = "demo-output"
# Images that are scored, and then told of, together.
ROWS_AT_ONCE = 32
# Longest side of a heatmap: a map has some dozens of cells, and a photograph thousands of pixels.
DRAWN_SIDE = 1600


class _Parser(argparse.ArgumentParser):
    """argparse, with one line on stderr for a wrong argument."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message and any("=" in word and not word.startswith("-") for word in unknown.split()):
            message += "; each --set takes one NAME=VALUE"
        self.exit(USER_ERROR, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str, default=None
        Arguments after the command's name; None: those of the process.

    Returns
    -------
    int
        Exit code: 0 done, 2 for what the user can mend (one line on stderr says what), 130 after Ctrl-C.

    Raises
    ------
    SystemExit
        By argparse: code 0 after --help and --version, 2 for wrong arguments.
    """
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may have what it cannot say
            stream.reconfigure(errors="backslashreplace")
    try:
        with _one_line_warnings():
            code: int = arguments.run(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (vqad score ... | head). Nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, TypeError, OSError, ImportError) as error:
        if arguments.traceback:
            raise
        _complain(f"error: {_one_line(error)}")
        return USER_ERROR


# ---- the commands --------------------------------------------------------------------------------


def _fit(arguments: argparse.Namespace) -> int:
    images = _training_images(arguments.directory)
    names, counts = np.unique(images.category, return_counts=True)
    target = _writable(arguments.output)
    replaceable(target)
    _spare(_files(images), [target])
    by_folder = len(names) > 1 if arguments.by_folder is None else arguments.by_folder
    detector = _detector(arguments)
    listed = ", ".join(f"{name} {count}" for name, count in zip(names, counts))
    origin = "from the folders" if by_folder else "to be found"
    print(f"{len(images)} normal images ({listed}); categories {origin}")
    started = time.monotonic()
    detector.fit(images, category=images.category if by_folder else None)
    if arguments.by_folder is None and not by_folder and len(detector.categories_) == 1:  # no other kind was found
        detector.router_.categories_ = detector.categories_ = names
    vqad.save(detector, target)
    found = [str(name) for name in detector.categories_]
    n_passes, seconds = detector.n_iter_, time.monotonic() - started
    print(f"{len(found)} {'category' if len(found) == 1 else 'categories'}: {', '.join(found)}")
    print(f"{n_passes} pass{'' if n_passes == 1 else 'es'} in {seconds:.0f} s; threshold {_thresholds(detector)}")
    print(f"model written to {target}")
    return INTERRUPTED if detector.training_log_.interrupted else OK


def _score(arguments: argparse.Namespace) -> int:
    paths, outputs = _images_to_score(arguments.images)
    drawn = [] if arguments.maps is None else [arguments.maps / output for output in outputs]
    _spare([arguments.model, *paths], [arguments.csv, *drawn])
    if arguments.csv is not None:
        _writable(arguments.csv)
    if arguments.maps is not None:
        _check_folder_of_maps(arguments.maps, arguments.images)
    data = check_images(paths)
    detector = _loaded(arguments)
    if arguments.maps is not None:
        arguments.maps.mkdir(parents=True, exist_ok=True)
    shown = [_printable(path) for path in paths]
    wide = max(len("path"), *map(len, shown))
    kind = max(len("category"), *(len(str(name)) for name in detector.categories_))
    print(f"{'path':<{wide}}  {'category':<{kind}}  {'score':>8}  {'p-value':>7}  label")
    n_anomalies = n_scored = 0
    with _csv_rows(arguments.csv) as write:
        for start in range(0, len(paths), ROWS_AT_ONCE):
            rows, verdicts = _judged(detector, data, range(start, min(start + ROWS_AT_ONCE, len(paths))))
            if verdicts is None:
                continue
            for k, i in enumerate(rows):
                label = "anomaly" if verdicts.label[k] == -1 else "normal"
                name, score, p = verdicts.category[k], float(verdicts.score[k]), float(verdicts.p_value[k])
                print(f"{shown[i]:<{wide}}  {name!s:<{kind}}  {score:8.3f}  {p:7.4f}  {label}", flush=True)
                write([paths[i], name, score, float(verdicts.threshold[k]), p, label])
                if arguments.maps is not None:
                    _write_image(arguments.maps / outputs[i], _drawn(detector, data, i, verdicts, k))
            n_anomalies += int((verdicts.label == -1).sum())
            n_scored += len(rows)
    print(f"{n_anomalies} of {n_scored} images are anomalous (scores over {_thresholds(detector)})")
    return OK if n_scored == len(paths) else USER_ERROR


def _judged(detector: BaseImageDetector, data: ImageSequence, rows: range) -> tuple[Sequence[int], Verdicts | None]:
    """What is said of those images that can be read, and which these are; complain of the others."""
    try:
        return rows, judge(detector, data, rows)
    except (ValueError, OSError):
        readable = [i for i in rows if _is_readable(data, i)]
        if len(readable) == len(rows):
            raise
        return readable, judge(detector, data, readable) if readable else None


def _is_readable(data: ImageSequence, i: int) -> bool:
    try:
        data.load([i], (1, 1))
    except (ValueError, OSError) as error:
        _complain(f"error: {_one_line(error)}")
        return False
    return True


def _evaluate(arguments: argparse.Namespace) -> int:
    images = (loader_of(Path(arguments.directory)) or load_mvtec)(arguments.directory, split="test")
    target = None if arguments.json is None else _writable(arguments.json)
    _spare([arguments.model, *_files(images)], [target])
    detector = _loaded(arguments)
    verdicts = judge(detector, images)
    data = check_images(images)
    pixels: dict[str, Any] = {}
    if any(path is not None for path in images.mask_paths) and not arguments.no_pixels:
        # Made one at a time: at full size they would not fit into memory.
        maps = _Lazy(len(images), lambda i: verdicts.anomaly_map(i, data.size(i)))
        pixels = {"masks": _Lazy(len(images), images.mask), "maps": maps, "fpr_limit": arguments.fpr_limit}
    found = evaluate(images.target, verdicts.score, images.category, **pixels)
    print(found)
    alarm = verdicts.label == -1
    for label, what in ((1, "false alarms: {} of {} normal images"), (-1, "found: {} of {} anomalies")):
        mine = images.target == label
        print(what.format(int(alarm[mine].sum()), int(mine.sum())))
    if not detector.router_.discovered_ and set(images.category) <= set(detector.categories_.astype(str)):
        right = (verdicts.category.astype(str) == images.category).mean()
        print(f"category inferred right: {right:.1%}")
    if target is not None:
        target.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    return OK


def _report(arguments: argparse.Namespace) -> int:
    images, truth = _known_images(arguments.directory)
    target = _writable(arguments.output)
    _spare([arguments.model, *_files(images)], [target])
    detector = _loaded(arguments)
    page = write_report(
        target,
        detector,
        images,
        y=images.target if truth else None,
        category=images.category if truth else None,
        title=arguments.title or f"Anomaly report: {Path(arguments.directory).resolve().name}",
        n_images=arguments.n_images,
    )
    print(f"page written to {page}")
    return OK


def _export(arguments: argparse.Namespace) -> int:
    images = None if arguments.images is None else _known_images(arguments.images)[0]
    target = _writable(arguments.output)
    replaceable(target)
    _spare([arguments.model, *_files(images)], [target])
    detector = vqad.load(arguments.model)
    try:
        vqad.export_onnx(detector, target, X=images)
    except RuntimeError as error:  # of the comparison, or of torch's exporter
        raise ValueError(f"the model could not be exported: {error}") from error
    compared = "drawn images" if images is None else f"{len(images)} images"
    size = target.stat().st_size / 1e6
    print(f"graph written to {target} ({size:.1f} MB); on {compared} it gives what the model gives in float32")
    print("input: image, float32 (height, width, 3) in 0..1; outputs: score (higher is more normal), label,")
    print("map (higher is more anomalous), category")
    return OK


def _demo(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = run_demo(
        QUICK if arguments.quick else FULL,
        random_state=arguments.seed,
        device=arguments.device,
        verbose=int(sys.stderr.isatty()),
        say=lambda line: print(line, flush=True),
    )
    print(f"\n{result.summary()}\n")
    page = result.write_pages(arguments.out)
    models = result.save_models(arguments.out)
    print(f"Heatmaps: {page.resolve()}")
    print(f"Models:   {', '.join(str(path.resolve()) for path in models)}")
    print(f"Total:    {time.monotonic() - started:.0f} s")
    return OK


# ---- models --------------------------------------------------------------------------------------


def _detector(arguments: argparse.Namespace) -> BaseImageDetector:
    """A detector with the parameters that were given, the defaults for the rest."""
    named = ("max_iter", "image_size", "batch_size", "false_alarm_rate", "device")
    given = {name: value for name in named if (value := getattr(arguments, name)) is not None}
    more = dict(arguments.set or ())
    options = {**{name: name for name in named}, "random_state": "seed"}
    for name in more:
        if name in options:
            raise ValueError(f"--set {name} is not taken: give it as --{options[name].replace('_', '-')}.")
    if more.get("backbone", "") is None:
        raise ValueError("--set backbone=None is for features: images need a backbone, such as the default one.")
    detector = DETECTORS[arguments.detector](random_state=arguments.seed, verbose=int(sys.stderr.isatty()))
    detector.set_params(**given, **more)
    return detector


def _loaded(arguments: argparse.Namespace) -> BaseImageDetector:
    """The model, to work on the device of this machine that was asked for, not on the one it was fitted on."""
    detector: BaseImageDetector = vqad.load(arguments.model)
    detector.set_params(device=arguments.device)
    return detector


def _thresholds(detector: BaseImageDetector) -> str:
    values = [f"{-value:.3f}" for value in np.atleast_1d(detector.offset_)]
    if len(values) > 1:
        values = [f"{name} {value}" for name, value in zip(detector.categories_, values)]
    return ", ".join(values)


# ---- images --------------------------------------------------------------------------------------


def _training_images(folder: str) -> ImageDataset:
    loader = loader_of(Path(folder))
    return load_folder(folder) if loader is None else loader(folder, split="train")


def _known_images(folder: str) -> tuple[ImageDataset, bool]:
    """Images of a folder, and whether it says what they are: then they are its test images."""
    loader = loader_of(Path(folder))
    return (load_folder(folder), False) if loader is None else (loader(folder, split="test"), True)


def _files(images: ImageDataset | None) -> list[str]:
    """What is read of a collection: images and masks."""
    return [] if images is None else [*images.paths, *filter(None, images.mask_paths)]


def _images_to_score(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Paths of all images in files and folders, and where under a folder of maps each one's map belongs."""
    paths: list[str] = []
    outputs: list[Path] = []
    taken: set[Path] = set()
    for argument in arguments:
        root = Path(argument)
        if not argument:
            raise ValueError("an image or folder has the empty name ''.")
        if not root.is_dir():
            found, root = [argument], root.parent
        elif loader := loader_of(root):
            found = list(loader(root, split="all").paths)
        else:
            found = list(load_folder(root).paths)
        for path in found:
            output = _free(Path(os.path.relpath(path, root)), taken)
            taken.add(output)
            paths.append(path)
            outputs.append(output)
    return paths, outputs


def _free(path: Path, taken: set[Path]) -> Path:
    """A name of its own for the map of an image: a.jpg and a.png in one folder are two images."""
    output, k = path.with_name(f"{path.stem}_map.png"), 2
    while output in taken:
        output, k = path.with_name(f"{path.stem}_map-{k}.png"), k + 1
    return output


class _Lazy:
    """What a function makes of 0, 1, ..., made whenever it is asked for."""

    def __init__(self, n: int, make: Callable[[int], Any]):
        self._n, self._make = n, make

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> Any:
        return self._make(i)


# ---- output --------------------------------------------------------------------------------------


def _drawn(detector: BaseImageDetector, data: ImageSequence, i: int, verdicts: Verdicts, k: int) -> Any:
    size = data.size(i)
    shrink = min(1.0, DRAWN_SIDE / max(size))
    size = max(1, round(shrink * size[0])), max(1, round(shrink * size[1]))
    pixels = data.load([i], size)[0].permute(1, 2, 0).numpy()
    return overlay(pixels, verdicts.anomaly_map(k, size), detector.map_threshold_)


def _write_image(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@contextmanager
def _csv_rows(path: str | None) -> Iterator[Callable[[list[Any]], Any]]:
    """A function that writes a row, into nothing if there is no path."""
    if path is None:
        yield lambda row: None
        return
    with open(_writable(path), "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "category", "anomaly_score", "threshold", "p_value", "label"])
        yield writer.writerow


def _check_folder_of_maps(folder: Path, arguments: list[str]) -> None:
    """Raise where there is a file, or where the heatmaps would be among the images of the next call."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--maps {str(folder)!r} is a file; give the name of a folder.")
    for root in map(Path, arguments):
        if root.is_dir() and folder.resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"--maps {str(folder)!r} is in {str(root)!r}, where a second call would take the heatmaps for images; "
                "give a folder outside it."
            )


def _writable(path: str | os.PathLike[str]) -> Path:
    """Make the folder of an output file: before the work, which must not be lost at its end."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"the output {str(path)!r} is a folder; give the name of a file.")
    if path.exists() and not path.is_file():  # a device or a pipe, such as /dev/stdout
        return path
    parent = Path(os.path.realpath(path)).parent
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"nothing may be written to the folder {str(parent)!r}.")
    return path


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Show warnings meant for users, one line each, without the place in the code."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            _complain(f"warning: {_one_line(message)}")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


def _spare(inputs: list[Any], outputs: list[Any]) -> None:
    """Raise where an output would be written over what is read."""
    read = {Path(path).resolve() for path in inputs}
    for path in outputs:
        if path is not None and Path(path).resolve() in read:
            raise ValueError(f"the output {str(path)!r} is the model or one of the images or masks; give another name.")


def _printable(text: str) -> str:
    """On one line, whatever a file is called."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _complain(text: str) -> None:
    print(f"vqad: {text}", file=sys.stderr)


def _one_line(message: object) -> str:
    if isinstance(message, OSError) and message.strerror:
        return f"{message.strerror}: {message.filename!r}" if message.filename else message.strerror
    return " ".join(str(message).split()) or type(message).__name__


# ---- arguments -----------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
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
    for add in (_add_demo, _add_fit, _add_score, _add_evaluate, _add_report, _add_export):
        command = add(commands)
        command.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


def _command(commands: Any, name: str, run: Callable[..., int], text: str, more: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "demo",
        _demo,
        "learn real solar cells with both detectors, measure beside a memory bank of patches, and write heatmaps",
        "The images come with the package elpv-dataset (CC BY-NC-SA 4.0); nothing is downloaded.\n"
        "example:\n  vqad demo --out demo-output",
    )
    command.add_argument(
        "--out", type=Path, default=Path(DEMO_FOLDER), metavar="DIR", help="for pages and models (default: %(default)s)"
    )
    command.add_argument("--quick", action="store_true", help="fewer cells and passes: a minute, and poorer results")
    _add_running(command)
    return command


def _add_fit(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "fit",
        _fit,
        "learn what normal looks like from a folder of normal images",
        "DIR holds images, or one sub-folder a category, or has the layout of MVTec AD (CATEGORY/train/good) or VisA\n"
        "(split_csv/1cls.csv). In a single folder categories are looked for; where there is no more than one, it has\n"
        "the folder's name. All images are taken as normal. Ctrl-C ends the training early and keeps what was learned\n"
        "(exit code 130).\n"
        "examples:\n"
        "  vqad fit good-parts/ -o model.safetensors\n"
        "  vqad fit mvtec/ -o model.safetensors --max-iter 40 --false-alarm-rate 0.005\n"
        "  vqad fit good-parts/ -o small.safetensors --image-size 160 --set d_model=64\n"
        "  vqad fit good-parts/ -o flow.safetensors --detector vq-flow",
    )
    command.add_argument("directory", metavar="DIR", help="folder of normal images")
    command.add_argument("-o", "--output", required=True, metavar="MODEL", help="file to write the model to")
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
    command.add_argument("--detector", choices=sorted(DETECTORS), default="hvq-trans", help="hvq-trans by default")
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
        _score,
        "say of each image how anomalous it is and which category it was judged as",
        "score: higher is more anomalous; 0 is a typical normal image, 1 a standard deviation of normal images.\n"
        "p-value: share of normal images that score this high or higher.\n"
        "A damaged image is named and left out; the exit code then is 2.\n"
        "examples:\n"
        "  vqad score model.safetensors new-parts/\n"
        "  vqad score model.safetensors a.png b.png --csv scores.csv --maps heatmaps/",
    )
    _add_model(command)
    command.add_argument("images", nargs="+", metavar="DIR|FILE", help="images, or folders of images")
    command.add_argument("--csv", metavar="FILE", help="also write the table to a CSV file")
    command.add_argument(
        "--maps", type=Path, metavar="DIR", help=f"also write heatmaps, as PNG of up to {DRAWN_SIDE} pixels a side"
    )
    _add_device(command)
    return command


def _add_evaluate(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "evaluate",
        _evaluate,
        "measure a model on test images whose labels are known",
        "ROOT has the layout of MVTec AD, CATEGORY/test/good, CATEGORY/test/DEFECT, CATEGORY/ground_truth/DEFECT,\n"
        "or of VisA, split_csv/1cls.csv.\n"
        "example:\n  vqad evaluate model.safetensors mvtec/ --json metrics.json",
    )
    _add_model(command)
    command.add_argument("directory", metavar="ROOT", help="folder of categories, or of one category")
    command.add_argument("--json", metavar="FILE", help="also write the metrics to a JSON file")
    command.add_argument("--no-pixels", action="store_true", help="leave out the pixel metrics")
    command.add_argument(
        "--fpr-limit", type=float, default=0.3, metavar="X", help="where AUPRO stops (default: %(default)s)"
    )
    _add_device(command)
    return command


def _add_report(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "report",
        _report,
        "write an HTML page of scores and heatmaps",
        "For a folder in the layout of MVTec AD or VisA the page is about its test images, and has their metrics.\n"
        'Needs jinja2 and matplotlib: pip install "vqad[report]".\n'
        "example:\n  vqad report model.safetensors new-parts/ -o page.html",
    )
    _add_model(command)
    command.add_argument("directory", metavar="DIR", help="folder of images")
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="HTML file to write")
    command.add_argument("--title", help="of the page")
    command.add_argument(
        "--n-images", type=int, default=40, metavar="N", help="images to show at the most (default: %(default)s)"
    )
    _add_device(command)
    return command


def _add_export(commands: Any) -> argparse.ArgumentParser:
    command = _command(
        commands,
        "export",
        _export,
        "write a model as an ONNX graph, which runs without Python and torch",
        "The graph takes an image of any size, float32 (height, width, 3) in 0..1, and gives score (higher is more\n"
        "normal: vqad score with the other sign), label (+1 normal, -1 anomaly), map (higher is more anomalous) and\n"
        "category. It computes in float32, and is compared with the model in float32 before it is written.\n"
        'Needs onnx, onnxscript and onnxruntime: pip install "vqad[onnx]".\n'
        "example:\n  vqad export model.safetensors -o model.onnx --images new-parts/",
    )
    _add_model(command)
    command.add_argument("-o", "--output", required=True, metavar="FILE", help="ONNX file to write")
    command.add_argument("--images", metavar="DIR", help="folder of images to compare on (default: drawn ones)")
    return command


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="file that vqad fit wrote")


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")


def _add_running(command: argparse.ArgumentParser) -> None:
    _add_device(command)
    command.add_argument("--seed", type=int, default=0, metavar="N", help="makes runs repeat (default: %(default)s)")


def _size(text: str) -> int | tuple[int, int]:
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor HxW, such as 224x320")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE; a value that is no Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    sys.exit(main())
