"""save and load: a fitted detector as one safetensors file, from which nothing is ever executed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors.torch import save_file
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

import vqad
from vqad._codec import Reader, Refused, Writer, WrongArgument, dtype_name
from vqad._warn import warn
from vqad._writing import room_for, writing
from vqad.base import BaseImageDetector
from vqad.engine import undisturbed
from vqad.fitted import Fitted
from vqad.registry import detector_classes

FORMAT_VERSION = 1
PACKAGES = ("torch", "timm", "scikit-learn", "numpy")


def save(detector: BaseImageDetector, path: str | os.PathLike[str], *, include_backbone: bool = False) -> None:
    """Write a fitted detector to one ``.safetensors`` file, atomically.

    Parameters
    ----------
    detector : HVQTransDetector or VQFlowDetector
        Fitted.
    path : path-like
        An existing file is replaced once the new one is complete. A link is followed: its target is replaced.
    include_backbone : bool, default=False
        Whether to write the backbone's weights too, so that the file opens on machines that do not have them. If not,
        `load` takes them from where `fit` did and compares their digest. With ``weights="random"`` and ``"hub"`` they
        are always written.

    Raises
    ------
    NotFittedError
        When the detector is not fitted.
    OSError
        When the file cannot be written, as on a full disk. An existing file stays unchanged.
    TypeError
        When it is not one of vqad's detectors, when ``include_backbone=True`` and its backbone is your own
        transformer, or when it has an attribute of a type that the format does not support.

    Warns
    -----
    UserWarning
        When its backbone is your own transformer. The file does not contain it: pass it to `load`.

    Notes
    -----
    Tensors and arrays are the file's tensors; everything else is JSON in its header, along with a format version, the
    versions of the packages and a SHA-256 over all of it. Parameters that were changed after `fit` are saved as they
    are now: they take effect at the next `fit`, and scores are those of the last one. A ``RandomState`` is saved in
    its current state. The parameter ``memory`` is not saved.
    """
    if type(detector) not in detector_classes():
        raise TypeError(
            f"vqad.save takes a fitted HVQTransDetector or VQFlowDetector; got {type(detector).__name__}. Of a search "
            "pass search.best_estimator_, of a pipeline pipeline[-1]. joblib.dump takes any object, but opening its "
            "file runs code that the file holds."
        )
    check_is_fitted(detector)
    writer = Writer(include_backbone)
    metadata = {
        "format": "vqad",
        "format_version": str(FORMAT_VERSION),
        "packages": json.dumps(_packages()),
        "detector": json.dumps(writer.encode(detector, "detector"), allow_nan=False, separators=(",", ":")),
    }
    metadata["checksum"] = _checksum(metadata, writer.tensors)
    if writer.foreign:
        warn(
            f"The file does not hold the detector's backbone, a {writer.foreign} of your own: keep that too, fitted "
            "(detector.features_), and give it to vqad.load(path, backbone=...)."
        )
    with replacing(Path(path)) as unfinished:
        save_file(writer.tensors, unfinished, metadata)


def load(path: str | os.PathLike[str], *, backbone: Any = None, weights: str | os.PathLike[str] | None = None) -> Any:
    """Read a detector that `save` wrote. Runs no code from the file, and downloads nothing.

    Parameters
    ----------
    path : path-like
    backbone : transformer, default=None
        The fitted transformer (``detector.features_``), if the detector was fitted with your own transformer as
        backbone. Otherwise leave it out.
    weights : path-like, default=None
        File of the timm backbone's weights, if they are neither in the model file nor where `fit` found them.

    Returns
    -------
    detector : HVQTransDetector or VQFlowDetector
        Fitted. On the same machine and versions its scores are those of the saved one to the last bit.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        When there is no such file, or the backbone's weights are not on this machine.
    ValueError
        When the file is not a saved detector, is damaged, or has a newer format; when the backbone's weights differ
        from those of `fit`; when ``backbone`` is needed and missing.
    TypeError
        When ``backbone`` is not the transformer that is needed, or none is needed.
    """
    path = Path(path)
    with torch.inference_mode(False):
        metadata, tensors = _read(path)
        reader = Reader(tensors, backbone, None if weights is None else os.fspath(weights))
        detector = _decode(path, metadata, reader)
    if backbone is not None and not reader.foreign:
        raise TypeError(f"model {str(path)!r} was not fitted with a transformer as backbone: leave backbone= out.")
    return detector


def _decode(path: Path, metadata: dict[str, str], reader: Reader) -> BaseImageDetector:
    try:
        # The models that are filled from the file start from random draws.
        with undisturbed():
            detector = reader.decode(json.loads(metadata["detector"]))
        if not isinstance(detector, BaseImageDetector):
            raise Refused("it holds no detector")
        if not isinstance(vars(detector).get("_fitted"), Fitted):
            raise Refused("its detector is not fitted")
        return detector
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"model {str(path)!r} needs the weights of its backbone: {error} For vqad.load they may also be named by "
            "weights=, or be in the file if it is saved with include_backbone=True."
        ) from error
    except WrongArgument as error:
        raise error.kind(f"model {str(path)!r} {error}") from error
    except Refused as error:
        raise ValueError(f"model {str(path)!r} cannot be opened: {error}. {_versions(metadata)}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model {str(path)!r} cannot be opened: {type(error).__name__}: {error} {_versions(metadata)} "
            "Open it with those versions, or fit it again."
        ) from error


# ---- the file ------------------------------------------------------------------------------------


def _packages() -> dict[str, str]:
    return {"vqad": vqad.__version__, **{name: version(name) for name in PACKAGES}}


def _versions(metadata: dict[str, str]) -> str:
    """Sentence on the packages whose versions differ from those that wrote the file."""
    try:
        wrote, here = dict(json.loads(metadata["packages"])), _packages()
    except (KeyError, TypeError, ValueError):
        return "It does not say what wrote it."
    others = [f"{name} {wrote.get(name)} (here {here[name]})" for name in here if wrote.get(name) != here[name]]
    return f"It was written with {', '.join(others)}." if others else "It was written with the same versions as here."


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the file's metadata and tensors, without the checksum itself."""
    digest = hashlib.sha256()
    for key in sorted(metadata.keys() - {"checksum"}):
        digest.update(json.dumps([key, metadata[key]]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, dtype_name(tensor), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def replaceable(path: Path) -> Path:
    """Resolve links in ``path`` and check that a file can be written there, or replaced."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; give the name of a file.")
    if target.exists() and not target.is_file():
        raise OSError(f"{str(path)!r} is a device or a pipe, which no file can replace; give the name of a file.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{str(path)!r} cannot be written: there is no folder {str(target.parent)!r}.")
    return target


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that replaces it at the end, or is deleted on an error."""
    target = replaceable(path)
    with writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
    unfinished = Path(name)
    try:
        with room_for(path):
            yield unfinished
        umask = os.umask(0)
        os.umask(umask)
        with writing(path):
            unfinished.chmod(0o666 & ~umask)
            os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def read_checksum(path: str | os.PathLike[str]) -> str:
    """Checksum of a saved detector, from the file's header alone."""
    return _header(Path(path))["checksum"]


def _header(path: Path) -> dict[str, str]:
    """Read the metadata of a saved detector, and check its format version."""
    if path.is_dir():
        raise IsADirectoryError(f"model {str(path)!r} is a folder; a file that vqad.save or vqad fit wrote is needed.")
    if not path.is_file():
        raise FileNotFoundError(f"model {str(path)!r} does not exist: make one with vqad fit or vqad.save.")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, UnicodeError) as error:
        raise _foreign(path) from error
    if metadata.get("format") != "vqad" or "checksum" not in metadata:
        raise _foreign(path)
    _check_version(path, metadata)
    return metadata


def _foreign(path: Path) -> ValueError:
    return ValueError(
        f"{str(path)!r} is no model that vqad.save or vqad fit wrote, or is damaged or truncated: copy or save it "
        "again. (What joblib.dump wrote opens with joblib.load, which runs code that the file holds.)"
    )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and tensors of a saved detector, and check its format version and checksum."""
    metadata = _header(path)
    try:
        tensors = _tensors(path)
    except (safetensors.SafetensorError, LookupError, AttributeError, UnicodeError) as error:
        raise _foreign(path) from error
    if metadata["checksum"] != _checksum(metadata, tensors):
        raise ValueError(f"model {str(path)!r} is damaged: its content is not what was saved. Copy or save it again.")
    return metadata, tensors


def _tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors into memory allocated by torch: a matrix product's last bits may depend on alignment."""
    try:
        str(path).encode()
    except UnicodeError:  # torch opens no file whose name is not UTF-8
        return {name: tensor.clone() for name, tensor in safetensors.torch.load(path.read_bytes()).items()}
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def _check_version(path: Path, metadata: dict[str, str]) -> None:
    found = metadata.get("format_version", "")
    if not found.isdecimal():
        raise ValueError(f"model {str(path)!r} is damaged: it has no format version. Copy or save it again.")
    if int(found) > FORMAT_VERSION:
        raise ValueError(
            f"model {str(path)!r} has format version {found}, which is newer than this vqad {vqad.__version__} knows "
            f"({FORMAT_VERSION}). {_versions(metadata)} Install a newer vqad."
        )
