"""A fitted detector as a file without code, and back."""

from __future__ import annotations

import inspect
import math
import platform
import typing
from collections.abc import Callable, Mapping
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import exceptions
from .engine.batches import Batcher, channels_first
from .engine.copying import copy_module
from .engine.folding import are_in
from .engine.hardware import MOST_ROWS, Precision
from .engine.layers import LAYERS
from .engine.network import Network
from .engine.shapes import Shapes
from .engine.watch import Scale, Watch
from .exceptions import SavedFileError, SavedFileWarning
from .fingerprints import UnreadableError, fingerprint
from .networks import BUILDERS, NormalizeImages, Standardize
from .notices import Doubts, first_line, quoted, warn_user
from .penalties import Relative, l1, l1_over_l2
from .rows import Kind
from .scores import SCORES, Head, apply_score, get_score
from .storage import (
    Reader,
    UnusableError,
    Writer,
    code_of,
    fits,
    place_of_file,
    read_file,
    replace_file,
    set_state,
    state_of,
    tensors_of,
    to_bytes,
)

__all__ = ["loaded", "saved"]

Detector = Any
"""A `SparseEnergyOODDetector`, which lives above this module."""

T = TypeVar("T", bound=BaseEstimator)

KIND = "detector"

OBJECTS: dict[str, type] = {
    "Batcher": Batcher,
    "Doubts": Doubts,
    "Head": Head,
    "Kind": Kind,
    "Network": Network,
    "NormalizeImages": NormalizeImages,
    "Precision": Precision,
    "Relative": Relative,
    "Scale": Scale,
    "Shapes": Shapes,
    "Standardize": Standardize,
    "Watch": Watch,
}
"""Classes that a file may name, beside those of `OWN_SCORES`; their arguments are attributes."""

OWN_SCORES = dict(SCORES)
"""Scores that a file may name: those of skood, not what users register."""

FUNCTIONS = {"channels_first": channels_first, "l1": l1, "l1_over_l2": l1_over_l2}
"""Functions that a file may name."""

GIVEN = ("module", "preprocess", "score_function")
"""Code that scoring needs, which users pass to `load`."""

NETWORKS = {"module", "_network.module", "_pretrained.module"}
"""Where a detector holds the network: as it was given, fine-tuned, and before that."""

FOR_TRAINING = ("penalty", "augment")
"""Code that only training needs."""

LEFT_OUT = {"memory"}
"""Parameters that no file keeps: they name a place on the machine that wrote it."""

FITTED: dict[str, Any] = {
    "_calibration_classes": np.ndarray | None,
    "_doubts": Doubts,
    "_kind": Kind,
    "_network": Network,
    "_pretrained": Network | None,
    "_seed_of_network": int,
    "_watch": Watch,
    "calibration_scores_": np.ndarray,
    "class_offsets_": np.ndarray | None,
    "classes_": np.ndarray,
    "history_": list,
    "id_accuracy_": dict,
    "offset_": Real,
    "path_": list,
    "score_function_": Callable,
    "sparsity_weight_": Real | None,
    "tpr_": Real,
}
"""Attributes without which no detector scores. A file holds whatever others there are."""

LONGEST_PATH = 80


class NotKept:
    """Stands in a loaded detector for code that only training needs; it cannot be called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *_: Any) -> Any:
        raise SavedFileError(
            f"The detector was loaded from a file, which holds no code, and {self.name}= was code. "
            f"Pass it before fit: detector.set_params({self.name}={self.name})."
        )

    def __repr__(self) -> str:
        return f"<the {self.name} that no file keeps>"


def saved(detector: Detector, path: str | PathLike[str]) -> None:
    """Write a fitted detector to a file, which is there whole or not at all."""
    place = place_of_file(Path(path))
    writer = _DetectorWriter()
    parameters = detector.get_params(deep=False)
    kept = {name: x for name, x in parameters.items() if name not in LEFT_OUT}
    fitted = {name: x for name, x in vars(detector).items() if name not in parameters}
    try:
        content = {
            "parameters": {name: writer.write(x, name) for name, x in kept.items()},
            "fitted": {name: writer.write(x, name) for name, x in fitted.items()},
            "needs": writer.needs,
        }
    except UnusableError as error:
        raise SavedFileError(f"The detector cannot be saved: {error}. {error.remedy}.") from error
    _warn_if_more_has_changed(detector)
    replace_file(place, to_bytes(KIND, content, writer.tensors))


def loaded(kind: type[T], path: str | PathLike[str], given: Mapping[str, Any]) -> T:
    """The detector in a file, with the code that users pass, by the names in `GIVEN`."""
    place = Path(path)
    try:
        content, tensors = read_file(KIND, place)
        with torch.inference_mode(False), torch.no_grad():
            return _detector(kind, content, _DetectorReader(tensors, given))
    except (OSError, Warning):
        raise
    except UnusableError as error:
        raise _error(place, error) from error
    except Exception as error:  # whatever the content of a hostile file may raise
        told = UnusableError(f"it is damaged, or not written by skood ({_shown(error)})")
        raise _error(place, told) from error


def _error(path: Path, problem: UnusableError) -> SavedFileError:
    text = str(path)
    shown = text if len(text) <= LONGEST_PATH else f"...{text[-LONGEST_PATH:]}"
    return SavedFileError(f"{shown} cannot be loaded: {problem}. {problem.remedy}.")


def _detector(kind: type[T], content: Any, reader: _DetectorReader) -> T:
    reader.check_given(content["needs"])
    parameters = reader.read(content["parameters"])
    detector = kind(**parameters)
    detector._validate_params()
    fitted = reader.read(content["fitted"])
    for name in fitted:
        if not name.isidentifier() or not (name.endswith("_") or name.startswith("_")):
            raise ValueError(f"{quoted(name)} is no fitted attribute")
        if hasattr(kind, name):
            raise ValueError(f"{quoted(name)} is not to be set")
    _check_fitted(fitted, own_score="score_function" not in content["needs"])
    vars(detector).update(fitted)
    return detector


def _check_fitted(fitted: Mapping[str, Any], *, own_score: bool) -> None:
    """Refuse what no fit leaves behind, and would show late or never."""
    for name, hint in FITTED.items():
        if name not in fitted or not fits(fitted[name], hint):
            raise TypeError(f"{name} is missing or of another type")
    network, scores = fitted["_network"], fitted["calibration_scores_"]
    if scores.dtype != np.float64 or scores.ndim != 1 or not scores.size:
        raise ValueError(f"calibration_scores_ has dtype {scores.dtype}, shape {scores.shape}")
    if not (np.isfinite(scores).all() and math.isfinite(fitted["offset_"])):
        raise ValueError("offset_ or calibration_scores_ is NaN or infinite")
    offsets, of_classes = fitted["class_offsets_"], fitted["_calibration_classes"]
    if (offsets is None) != (of_classes is None):
        raise ValueError("one of class_offsets_ and _calibration_classes is missing")
    if offsets is not None:
        if offsets.shape != (network.n_logits,) or not np.isfinite(offsets).all():
            raise ValueError("class_offsets_ has not one number for each logit")
        if of_classes.shape != scores.shape or of_classes.dtype != np.int64:
            raise ValueError("_calibration_classes has not one class for each score")
        if not 0 <= of_classes.min() <= of_classes.max() < network.n_logits:
            raise ValueError("_calibration_classes are no logits")
    if not 0 < fitted["tpr_"] < 1:
        raise ValueError("tpr_ is not between 0 and 1")
    if fitted["classes_"].shape != (network.n_logits,):
        raise ValueError(f"classes_ has not one label for each of {network.n_logits} logits")
    shape = fitted.get("input_shape_", (fitted.get("n_features_in_"),))
    if not fits(shape, tuple[int, ...]):
        raise TypeError("n_features_in_ or input_shape_ is missing or no shape")
    names = fitted.get("feature_names_in_", np.empty(shape, dtype=object))
    if not isinstance(names, np.ndarray) or names.shape != shape:
        raise ValueError("feature_names_in_ has not one name for each column")
    score = fitted["score_function_"]
    if own_score:
        logits = torch.zeros(1, network.n_logits, dtype=torch.float64)
        features = torch.zeros(1, getattr(score, "_width", 1), dtype=torch.float64)
        layers = torch.zeros(1, 2, getattr(score, "_channels", 1), dtype=torch.float64)
        apply_score(score, features, logits, layers)


class _DetectorWriter(Writer):
    """Also writes skood's own objects, and notes what code of the user's there is."""

    def __init__(self) -> None:
        super().__init__()
        self.needs: dict[str, str] = {}

    def other(self, thing: Any, place: str) -> Any:
        if type(thing) in OBJECTS.values():
            return self._object(thing, place)
        if type(thing) in OWN_SCORES.values():
            (name,) = (name for name, kind in OWN_SCORES.items() if kind is type(thing))
            return {"$score": name, "state": self.write(dict(vars(thing)), place)}
        if type(thing) is np.random.RandomState:
            return {"$random_state": self.write(thing.get_state(), place)}
        if isinstance(thing, type) and thing.__name__ in exceptions.__all__:
            return {"$warning": thing.__name__}
        for name, function in FUNCTIONS.items():
            if thing is function:
                return {"$function": name}
        return self._code(thing, place)

    def module(self, module: nn.Module, place: str) -> Any:
        if type(module) in (NormalizeImages, Standardize) and _is_as_made(module):
            return self._object(module, place)
        if place not in NETWORKS:
            return self._code(module, place)
        module = copy_module(module) if place == "module" else module
        _check_holds_no_more(module, place)
        made_by, code = _made_by(module), None
        if made_by is None:
            self.needs["module"] = f"a {type(module).__name__}"
            code = _behaviour(code_of, module) if place == "module" else None
        written = super().module(module, place)
        return {"$module": written | {"made_by": self.write(made_by, place), "code": code}}

    def _object(self, thing: Any, place: str) -> Any:
        fields = {name: _field(thing, name) for name in _hints(type(thing))}
        written = {name: self.write(x, f"{place}.{name}") for name, x in fields.items()}
        return {"$object": type(thing).__name__, "fields": written}

    def _code(self, thing: Any, place: str) -> Any:
        """What stands for code of the user's, which `load` is given."""
        name = _name_of_code(place)
        root = name.partition(".")[0]
        if not callable(thing) or root not in (*GIVEN, *FOR_TRAINING):
            return super().other(thing, place)
        if root in GIVEN:
            kind = f"a {type(thing).__name__}"
            self.needs[root] = getattr(thing, "__name__", kind)
        is_fitted = place.startswith("score_function_") and hasattr(thing, "fit")
        state = self.write(dict(vars(thing)), place) if is_fitted else None
        code = _behaviour(fingerprint, thing) if place in GIVEN else None
        return {"$code": name, "state": state, "code": code}


class _DetectorReader(Reader):
    """Also reads skood's own objects, and puts in the code that users pass."""

    def __init__(self, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.given = given
        self.tags |= {
            "$object": self._object,
            "$score": self._score,
            "$module": self._module,
            "$code": self._code,
            "$function": lambda name: FUNCTIONS[name],
            "$random_state": self._random_state,
            "$warning": self._warning,
        }

    def check_given(self, needs: Any) -> None:
        """Refuse code that is missing, or of no use."""
        if not fits(needs, dict[str, str]) or not set(needs) <= set(GIVEN):
            raise TypeError("needs names other code than load takes")
        missing = [f"{k}= ({quoted(what)})" for k, what in needs.items() if self.given[k] is None]
        if missing:
            raise UnusableError(
                f"it holds no code, and needs {', '.join(missing)}",
                "Pass to load what you passed to fit; the module may be untrained",
            )
        for name, thing in self.given.items():
            right = isinstance(thing, nn.Module) if name == "module" else callable(thing)
            if thing is not None and (isinstance(thing, type) or not right):
                kind = "nn.Module" if name == "module" else "object to be called"
                raise UnusableError(f"{name}={quoted(thing)} is no {kind}", "Pass what fit had")
            if thing is not None and name != "module" and name not in needs:
                raise UnusableError(
                    f"it takes no {name}=, as fit had none, or one of skood's, which is in it",
                    f"Leave {name}= out",
                )

    def _object(self, name: str, fields: Any) -> Any:
        kind = OBJECTS[name]
        hints, values = _hints(kind), _defaults(kind) | self.read(fields)
        for field, hint in hints.items():
            if not fits(values[field], hint):
                raise TypeError(f"{field} of {name} is of another type")
        if kind is Network:
            _check_network(values)
            network = Network.__new__(Network)
            network.__setstate__(values)
            return network
        return kind(**{field: values[field] for field in hints})

    def _score(self, name: str, state: Any) -> Any:
        kind, values = OWN_SCORES[name], self.read(state)
        parameters = kind._get_param_names()
        score = kind(**{k: values.pop(k) for k in parameters})
        if hasattr(kind, "_parameter_constraints"):
            score._validate_params()
        if any(hasattr(kind, k) for k in values):
            raise ValueError(f"an attribute of {name} is not to be set")
        vars(score).update(values)
        return score

    def _module(self, code: Any) -> nn.Module:
        state = self.state(code)
        given, made_by = self.given["module"], self.read(code["made_by"])
        if given is not None:
            module = set_state(copy_module(given), state)
            self._compare(code["code"], code_of, module, "module")
            return module
        if made_by is None:
            raise ValueError("a module is not said to be needed")
        name, arguments = made_by
        values = sum(x.numel() for x in state.tensors.values())
        if any(x > values for x in torch.utils._pytree.tree_leaves(arguments)):
            raise ValueError("its network is larger than its tensors")
        with torch.device("meta"):
            module = BUILDERS[name](**arguments)
        return set_state(module, state)

    def _code(self, name: str, state: Any, code: Any) -> Any:
        root, *rest = name.split(".")
        if root in FOR_TRAINING:
            return NotKept(root)
        thing = self.given[root]
        for attribute in rest:
            if attribute not in vars(thing):
                raise UnusableError(f"{root}= has no {quoted(attribute)}", "Pass what fit had")
            thing = vars(thing)[attribute]
        if thing is None:
            raise ValueError(f"{root} is not said to be needed")
        if state is None:
            self._compare(code, fingerprint, thing, root)
            return thing
        fitted = get_score(thing)
        vars(fitted).update(self.read(state))
        return fitted

    def _compare(self, code: Any, read: Callable[..., bytes], thing: Any, name: str) -> None:
        """Warn if code that is passed does something else than that of fit."""
        now = None if code is None else _behaviour(read, thing)
        if now is not None and now["by"] == code["by"] and now["digest"] != code["digest"]:
            warn_user(
                f"{name}= does not do what fit had as {name}=: its code, its settings or the "
                "version of its package is another. So the detector may score otherwise. Pass "
                "what fit had, or compare scores.",
                SavedFileWarning,
            )

    def _random_state(self, code: Any) -> np.random.RandomState:
        state = np.random.RandomState(0)
        state.set_state(self.read(code))
        return state

    def _warning(self, name: str) -> Any:
        if name not in exceptions.__all__ or not name.endswith("Warning"):
            raise ValueError(f"{quoted(name)} is no warning of skood's")
        return getattr(exceptions, name)


def _made_by(module: nn.Module) -> Any:
    """Name in `BUILDERS` and arguments that make a module; None if it is the user's."""
    noted = vars(module).get("_made_by")
    if noted is None:
        return None
    with torch.device("meta"):
        twin = BUILDERS[noted[0]](**noted[1])
    try:
        set_state(twin, state_of(module))
        return list(noted) if code_of(twin) == code_of(module) else None
    except (UnusableError, UnreadableError):
        return None  # its layers were changed


def _behaviour(read: Callable[..., bytes], thing: Any) -> dict[str, str] | None:
    """Digest of what code does, and what it can be compared with; None if that cannot be told."""
    by = f"Python {platform.python_version()}, torch {torch.__version__}"
    try:
        return {"digest": read(thing).hex(), "by": by}
    except UnreadableError:
        return None  # such as TorchScript


def _check_holds_no_more(module: nn.Module, place: str) -> None:
    """Refuse a module with values that are neither parameters nor buffers, as quantized ones."""
    more = set(module.state_dict()) - set(tensors_of(module))
    if more:
        raise UnusableError(
            f"{place} holds {quoted(min(more))} otherwise than as a parameter or buffer, as "
            "quantized layers do",
            "Use pickle instead",
        )


def _is_as_made(module: nn.Module) -> bool:
    """Whether a module of `OBJECTS` is what its arguments make, and no hook was added."""
    twin = type(module)(module.mean, module.std)
    same = [x.dtype for x in twin.buffers()] == [x.dtype for x in module.buffers()]
    return same and code_of(twin) == code_of(module)


def _warn_if_more_has_changed(detector: Detector) -> None:
    """Warn if the network has become another than its code makes, with its tensors in it."""
    if detector.module is None:
        return
    given = copy_module(detector.module)
    if any(is_lazy(x) for x in tensors_of(given).values()):
        return  # a layer becomes another when it gets its tensors
    network = detector._network.public
    try:
        # As when it is loaded: of its tensors, some layers also keep lists.
        now, before = code_of(network), code_of(set_state(given, state_of(network)))
    except (UnreadableError, UnusableError):
        return  # such as TorchScript, which cannot be trained
    if now != before:
        warn_user(
            "The network has changed since fit was given it, in more than its tensors and numbers: "
            "in texts, lists, objects or hooks, which the file does not keep. So the detector may "
            "score otherwise when it is loaded: compare scores, or use pickle.",
            SavedFileWarning,
        )


def _name_of_code(place: str) -> str:
    """By what name `load` is given what is found at a place."""
    parts = [part.strip("_") for part in place.split(".")]
    return "preprocess" if parts[-2:] == ["batcher", "preprocess"] else ".".join(parts)


def _check_network(fields: Mapping[str, Any]) -> None:
    """Refuse settings of a network that would show late, or take all memory."""
    ladder, small = fields["shapes"].ladder, fields["shapes"].small
    most = max(MOST_ROWS.values())
    if not ladder or list(ladder) != sorted(ladder) or not 1 <= ladder[0] <= ladder[-1] <= most:
        raise ValueError(f"no network scores {quoted(ladder)} rows at a time")
    if not 0 <= small <= most or fields["widest"] < 1:
        raise ValueError("no network scores so few rows at a time")
    if not are_in(fields["module"], fields["pairs"]):
        raise ValueError("the network has no such layers to fold")
    parts = dict(fields["module"].named_modules())
    if not all(isinstance(parts.get(layer), LAYERS) for layer in fields["layers"]):
        raise ValueError("the network has no such layers to look at")
    dtypes = (fields["default_dtype"], fields["batcher"].dtype)
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise ValueError("the dtype of a network is none of floats")


def _hints(kind: type) -> dict[str, Any]:
    """Arguments that make an object of a class, which are its attributes, and their types."""
    if kind in (NormalizeImages, Standardize):
        return {"mean": Tensor, "std": Tensor}
    hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
    return {name: hints[name] for name in list(inspect.signature(kind).parameters)}


def _defaults(kind: type) -> dict[str, Any]:
    """Arguments that files of older versions may lack."""
    parameters = inspect.signature(kind).parameters
    return {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _field(thing: Any, name: str) -> Any:
    if isinstance(thing, Network) and name == "module":
        return thing.public
    value = getattr(thing, name)
    return list(value) if isinstance(thing, Doubts) else value


def _shown(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:100]}"
