"""Encoding a detector as JSON and tensors, and decoding it. Nothing that is read is ever called or imported."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils._metadata_requests import SIMPLE_METHODS, MetadataRequest
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vqad.backbones import load_backbone, state_digest
from vqad.base import BaseImageDetector
from vqad.calibration import ConformalCalibration, HeldOut, Seen, Thresholds
from vqad.features import BackboneFeatures
from vqad.fitted import Fitted, History
from vqad.nn.quantize import VectorQuantizer
from vqad.prototypes import Prototypes
from vqad.registry import detector_classes
from vqad.scoring import Scorer
from vqad.training_run import TrainingLog

# Classes that a file may name, in addition to the detectors. Dataclasses are created from their fields, other classes
# without arguments, and then their attributes are set. Names are never imported. Never remove a class: files of earlier
# versions may name it.
PARTS = (Fitted, HeldOut, Seen, Thresholds, History, TrainingLog, BackboneFeatures, ConformalCalibration, Prototypes)
# Types that each field of a dataclass may have. Annotations are evaluated here, not while a file is read.
ALLOWED = {
    cls: {
        name: tuple(get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)))
        for name, hint in get_type_hints(cls).items()
    }
    for cls in PARTS
    if is_dataclass(cls)
}
DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
# Weights that could only be drawn or downloaded again: they are always written.
UNFINDABLE = ("random", "hub")
# The parameter memory belongs to a machine, not to a detector; and a file must not choose a folder of pickles to read.
LEFT_OUT = "memory"


class Refused(ValueError):
    """The content of a file is not accepted."""


class WrongArgument(Exception):
    """An argument of the caller does not match the file."""

    def __init__(self, kind: type[Exception], message: str):
        super().__init__(message)
        self.kind = kind


class _Kind(NamedTuple):
    """How to write one kind of value, as ``{name: content}`` with JSON content, and how to read it.

    Values that JSON has itself (null, booleans, integers, finite floats, strings, lists) are written as they are.
    """

    matches: Callable[[Any], bool]
    encode: Callable[[Writer, Any, str], Any]
    decode: Callable[[Reader, Any], Any]


class Writer:
    """Encodes a detector as JSON, and collects its tensors."""

    def __init__(self, include_backbone: bool):
        self.include_backbone = include_backbone
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[int, int] = {}
        self.foreign = ""

    def encode(self, value: Any, where: str) -> Any:
        plain = value is None or type(value) in (bool, int, str)
        if plain or (type(value) is float and math.isfinite(value)):
            return value
        if type(value) is list:
            return self.items(value, where)
        for name, kind in KINDS.items():
            if kind.matches(value):
                return {name: kind.encode(self, value, where)}
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which the format does not support. "
            "joblib.dump can save any object, but opening its file runs code that it contains."
        )

    def items(self, values: Any, where: str) -> list[Any]:
        return [self.encode(value, f"{where}.{k}") for k, value in enumerate(values)]

    def tensor(self, value: Tensor, where: str) -> dict[str, Any]:
        """Store a tensor with the memory order of its axes, on which the last bits of a matrix product depend."""
        axes = _axes(value.stride(), value.is_contiguous())
        name = where.removeprefix("detector.")
        if name in self.tensors:
            raise TypeError(f"{where}: two tensors would have this name.")
        self.tensors[name] = value.detach().permute(axes).cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name} if axes == sorted(axes) else {"tensor": name, "axes": axes}

    def array(self, value: np.ndarray, where: str) -> dict[str, Any]:
        axes = _axes(value.strides, value.flags.c_contiguous)
        native = np.array(value.transpose(axes), dtype=value.dtype.newbyteorder("="), order="C", subok=False)
        return {**self.tensor(torch.from_numpy(native), where), **({} if axes == sorted(axes) else {"axes": axes})}

    def object(self, value: Any, where: str) -> dict[str, Any]:
        """Encode an object of a class of vqad; one that was encoded before is referred to by number."""
        if id(value) in self.numbers:
            return {"again": self.numbers[id(value)]}
        self.numbers[id(value)] = len(self.numbers)
        parts = {name: part for name, part in vars(value).items() if name != LEFT_OUT}
        for name in parts:
            _check_attribute(value, name)
        state = {name: self.attribute(value, name, part, f"{where}.{name}") for name, part in parts.items()}
        return {"class": type(value).__name__, "state": state}

    def attribute(self, owner: Any, name: str, value: Any, where: str) -> Any:
        """Like `encode`, with special cases that depend on the owner of the attribute."""
        if isinstance(value, nn.Module):
            return {"module": self.module(owner, name, value, where)}
        is_backbone = (isinstance(owner, BaseImageDetector) and name == "backbone") or (
            isinstance(owner, Fitted) and name == "features"
        )
        if is_backbone and not isinstance(value, (str, type(None))) and not _is_own(value):
            return {"foreign": self.foreign_backbone(value)}
        if isinstance(value, MetadataRequest):
            return {"requests": value._serialize()}
        return self.encode(value, where)

    def foreign_backbone(self, value: Any) -> str:
        self.foreign = type(value).__name__
        if self.include_backbone:
            raise TypeError(
                f"include_backbone=True: the backbone is your own {self.foreign}, which cannot be restored from a file "
                "without running code. Leave include_backbone out and pass it to vqad.load(path, backbone=...), or use "
                "joblib.dump."
            )
        return self.foreign

    def module(self, owner: Any, name: str, module: nn.Module, where: str) -> dict[str, Any]:
        if isinstance(module, Scorer):
            state = self.state_dict(module, where, without=VectorQuantizer.DERIVED)
            return {"state": state, "config": self.encode(module.config(), where)}
        if isinstance(owner, BackboneFeatures) and name == "network_":
            included = self.include_backbone or owner.weights in UNFINDABLE
            return {
                "state": self.state_dict(module, where) if included else None,
                "normalization": self.encode(module.normalization, where),
            }
        raise TypeError(f"{where} is a torch module that the format does not support.")

    def state_dict(self, module: nn.Module, where: str, without: str | None = None) -> dict[str, Any]:
        state = {name: value for name, value in module.state_dict().items() if name.rpartition(".")[2] != without}
        return {name: self.tensor(value, f"{where}.{name}") for name, value in state.items()}


class Reader:
    """Decodes a detector from JSON and tensors. Invalid content raises an exception and never leads to a call."""

    def __init__(self, tensors: dict[str, Tensor], backbone: Any, weights: str | None):
        self.tensors = tensors
        self.backbone = backbone
        self.weights = weights
        self.objects: list[Any] = []
        self.foreign = ""
        self.detector: type[BaseImageDetector] | None = None

    def decode(self, data: Any) -> Any:
        if isinstance(data, list):
            return self.items(data)
        if not isinstance(data, dict):
            return data
        ((name, content),) = data.items()
        if name not in KINDS:
            raise Refused(f"it has values of the unknown kind {name!r}")
        return KINDS[name].decode(self, content)

    def items(self, data: list[Any]) -> list[Any]:
        return [self.decode(value) for value in data]

    def tensor(self, data: dict[str, Any]) -> Tensor:
        tensor, axes = self.tensors[data["tensor"]], data.get("axes")
        return tensor if axes is None else tensor.permute([axes.index(k) for k in range(len(axes))])

    def array(self, data: dict[str, Any]) -> np.ndarray:
        return np.array(self.tensor(data).numpy(), order="K")

    def object(self, data: dict[str, Any]) -> Any:
        if "again" in data:
            return self.objects[data["again"]]
        cls = classes().get(data["class"])
        if cls is None:
            raise Refused(f"it has an object of the class {data['class']!r}, but a model may hold only classes of vqad")
        if is_dataclass(cls):
            return self.parts(cls, data["state"])
        made = cls()
        self.objects.append(made)
        if isinstance(made, BaseImageDetector):
            self.detector = type(made)
        for name in data["state"]:
            _check_attribute(made, name)
        modules = {name: content for name, content in data["state"].items() if _is_kind(content, "module")}
        for name, content in data["state"].items():
            if name not in modules:
                setattr(made, name, self.attribute(made, content))
        for name, content in modules.items():
            setattr(made, name, self.module(made, name, content["module"]))
        return made

    def parts(self, cls: type, state: dict[str, Any]) -> Any:
        """Create a dataclass from its fields."""
        place = len(self.objects)
        self.objects.append(None)
        fields = {}
        for name, content in state.items():
            is_module = _is_kind(content, "module")
            fields[name] = self.module(cls, name, content["module"]) if is_module else self.attribute(cls, content)
        _check_kinds(cls, fields)
        self.objects[place] = made = cls(**fields)
        return made

    def attribute(self, owner: Any, content: Any) -> Any:
        if _is_kind(content, "foreign"):
            return self.foreign_backbone(content["foreign"])
        if _is_kind(content, "requests"):
            return _requests(owner, content["requests"])
        return self.decode(content)

    def foreign_backbone(self, name: str) -> Any:
        self.foreign = name
        if self.backbone is None:
            raise WrongArgument(
                ValueError,
                f"was fitted with your own backbone, a {name}, which the file does not hold: pass it, fitted as it "
                "was, to vqad.load(path, backbone=...).",
            )
        if type(self.backbone).__name__ != name:
            raise WrongArgument(
                TypeError, f"was fitted with a {name} as backbone; got backbone={type(self.backbone).__name__}."
            )
        try:
            check_is_fitted(self.backbone)
        except NotFittedError as error:
            raise WrongArgument(ValueError, f"needs its backbone fitted, but the given {name} is not.") from error
        return self.backbone

    def module(self, owner: Any, name: str, data: dict[str, Any]) -> nn.Module:
        state = None if data["state"] is None else {key: self.tensor(value) for key, value in data["state"].items()}
        if owner is Fitted and state is not None and self.detector is not None:
            with torch.device("meta"), _Unfilled():  # allocate nothing: the file's tensors are assigned
                scorer = Scorer.make(self.detector.model_class, self.decode(data["config"])).eval()
            scorer.load_state_dict(state, assign=True)
            return scorer
        if isinstance(owner, BackboneFeatures) and name == "network_":
            return self.network(owner, state, self.decode(data["normalization"]))
        raise Refused(f"it has an unknown module {name!r}")

    def network(self, features: BackboneFeatures, state: dict[str, Tensor] | None, normalization: Any) -> nn.Module:
        if state is not None:
            network = load_backbone(features.backbone, "random", features.network_stages_, features.size_)
            network.load_state_dict(state, assign=True)
        elif self.weights is None and features.weights in UNFINDABLE:
            raise Refused(f"it lacks the backbone's weights, which were {features.weights!r}")
        else:
            weights = features.weights if self.weights is None else self.weights
            network = load_backbone(features.backbone, weights, features.network_stages_, features.size_)
        digest = state_digest(network)
        if digest != features.digest_:
            raise Refused(
                f"the weights found here for backbone={features.backbone!r} differ from those it was fitted with "
                f"(SHA-256 {digest[:12]}..., not {str(features.digest_)[:12]}...). Pass the right file as "
                "vqad.load(path, weights=...), or save with include_backbone=True on a machine that has them"
            )
        network.normalization = normalization
        return network.requires_grad_(False)


class _Unfilled(TorchFunctionMode):
    """Replace functions whose Python versions for the meta device take two seconds to import."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.rand, torch.randn):
            func = torch.empty
        elif func is torch.cat:
            first, *others = args[0]
            return first.new_empty(len(first) + sum(map(len, others)), *first.shape[1:])
        return func(*args, **(kwargs or {}))


def _check_attribute(owner: Any, name: str) -> None:
    """Raise if an attribute in a file would hide a method or property, or is an unknown parameter."""
    covered = getattr(type(owner), name, None)
    is_covered = callable(covered) or isinstance(covered, property)
    if not name.isidentifier() or name.startswith("__") or name == LEFT_OUT or is_covered:
        raise Refused(f"a file may not set the attribute {name!r} of {type(owner).__name__}")
    is_parameter = isinstance(owner, BaseEstimator) and not name.startswith("_") and not name.endswith("_")
    if is_parameter and name not in owner.get_params(deep=False):
        raise Refused(
            f"{type(owner).__name__} has no parameter {name!r}; other attributes start or end with an underscore"
        )


def _check_kinds(cls: type, fields: dict[str, Any]) -> None:
    """Raise if a field of a dataclass has a type other than its annotation allows."""
    for name, allowed in ALLOWED[cls].items():
        if name in fields and Any not in allowed and not isinstance(fields[name], allowed):
            raise Refused(f"its {cls.__name__} has {type(fields[name]).__name__} as {name}")


def _requests(owner: Any, given: dict[str, dict[str, Any]]) -> MetadataRequest:
    """Metadata requests, as made by set_fit_request and similar methods."""
    request = owner._get_metadata_request()
    for method, parameters in given.items():
        if method not in SIMPLE_METHODS:
            raise Refused(f"no method {method!r} takes metadata")
        for parameter, alias in parameters.items():
            getattr(request, method).add_request(param=parameter, alias=alias)
    return request


def _axes(strides: tuple[int, ...], is_contiguous: bool) -> list[int]:
    """Axes in memory order, outermost first."""
    axes = range(len(strides))
    return [*axes] if is_contiguous else sorted(axes, key=lambda k: -abs(strides[k]))


def classes() -> dict[str, type]:
    """All classes that a file may name."""
    return {cls.__name__: cls for cls in (*detector_classes(), *PARTS)}


def _is_own(value: Any) -> bool:
    return classes().get(type(value).__name__) is type(value)


def _is_kind(content: Any, name: str) -> bool:
    return isinstance(content, dict) and content.keys() == {name}


def dtype_name(value: Tensor | np.ndarray) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else value.dtype.name


def _is_array(value: Any) -> bool:
    return type(value) in (np.ndarray, np.memmap)


def _is_text(value: Any) -> bool:
    is_objects = _is_array(value) and value.dtype == object
    return (_is_array(value) and value.dtype.kind == "U") or (is_objects and all(type(v) is str for v in value.flat))


def _encode_text(value: np.ndarray) -> dict[str, Any]:
    width = None if value.dtype == object else value.dtype.itemsize // 4
    return {"items": value.ravel().tolist(), "shape": list(value.shape), "width": width}


def _decode_text(data: dict[str, Any]) -> np.ndarray:
    dtype = object if data["width"] is None else f"<U{int(data['width'])}"
    text: np.ndarray = np.array([str(item) for item in data["items"]], dtype=dtype).reshape(data["shape"])
    return text


def _decode_scalar(reader: Reader, data: dict[str, Any]) -> Any:
    if data["dtype"] not in DTYPES:
        raise Refused(f"it has a number of the type {data['dtype']!r}")
    return np.dtype(data["dtype"]).type(reader.decode(data["value"]))


def _encode_random_state(value: np.random.RandomState) -> dict[str, Any]:
    state = value.get_state(legacy=False)
    return {**state, "state": {"key": state["state"]["key"].tolist(), "pos": state["state"]["pos"]}}


def _decode_random_state(data: dict[str, Any]) -> np.random.RandomState:
    made = np.random.RandomState(0)
    made.set_state({**data, "state": {**data["state"], "key": np.array(data["state"]["key"], np.uint32)}})
    return made


def _is_random_state(value: Any) -> bool:
    return type(value) is np.random.RandomState and value.get_state(legacy=False)["bit_generator"] == "MT19937"


KINDS: dict[str, _Kind] = {
    # JSON has neither nan nor infinity.
    "float": _Kind(lambda v: type(v) is float, lambda w, v, at: repr(v), lambda r, d: float(d)),
    "tuple": _Kind(
        lambda v: type(v) in (tuple, torch.Size), lambda w, v, at: w.items(v, at), lambda r, d: tuple(r.items(d))
    ),
    "dict": _Kind(
        lambda v: type(v) is dict,
        lambda w, v, at: [[w.encode(k, at), w.encode(part, f"{at}.{k}")] for k, part in v.items()],
        lambda r, d: {r.decode(k): r.decode(part) for k, part in d},
    ),
    "array": _Kind(
        lambda v: _is_array(v) and v.dtype.name in DTYPES, lambda w, v, at: w.array(v, at), lambda r, d: r.array(d)
    ),
    "text": _Kind(_is_text, lambda w, v, at: _encode_text(v), lambda r, d: _decode_text(d)),
    "tensor": _Kind(
        lambda v: type(v) is Tensor and v.layout == torch.strided and dtype_name(v) in DTYPES,
        lambda w, v, at: w.tensor(v, at),
        lambda r, d: r.tensor(d),
    ),
    "number": _Kind(
        lambda v: isinstance(v, np.generic) and v.dtype.name in DTYPES,
        lambda w, v, at: {"dtype": v.dtype.name, "value": w.encode(v.item(), at)},
        _decode_scalar,
    ),
    "str": _Kind(lambda v: type(v) is np.str_, lambda w, v, at: str(v), lambda r, d: np.str_(d)),
    "path": _Kind(lambda v: isinstance(v, Path), lambda w, v, at: str(v), lambda r, d: Path(d)),
    "device": _Kind(lambda v: isinstance(v, torch.device), lambda w, v, at: str(v), lambda r, d: torch.device(d)),
    "random_state": _Kind(
        _is_random_state, lambda w, v, at: _encode_random_state(v), lambda r, d: _decode_random_state(d)
    ),
    "object": _Kind(_is_own, lambda w, v, at: w.object(v, at), lambda r, d: r.object(d)),
}
