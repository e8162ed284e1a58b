"""Files without code: tensors, numbers, texts, and lists and dicts of them, written and read back.

A file is in the safetensors format. What is no tensor is JSON in its metadata, beside the versions
that wrote it and a digest of all bytes. Reading a file runs nothing that it names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import stat
import types
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from . import __version__
from .fingerprints import bytes_of, fingerprint
from .notices import first_line, quoted

__all__ = [
    "Module",
    "Reader",
    "UnusableError",
    "Writer",
    "code_of",
    "fits",
    "from_bytes",
    "place_of_file",
    "read_file",
    "replace_file",
    "set_state",
    "state_of",
    "tensors_of",
    "to_bytes",
]

FORMAT = 1
"""Version of the format. A change by which older files would be read wrongly raises it."""

UNFINISHED = ".tmp"
"""How the name of a file ends that is being written."""

MOST_OF_HEADER = 100_000_000
"""Bytes of a header, at most; safetensors reads no longer ones."""

NO_DIGEST = b'"digest":"' + 64 * b"0" + b'"'
DIGEST = re.compile(rb'"digest":"([0-9a-f]{64})"')

LONGEST_TEXT = 2**16
"""Characters that an array reserves for a text, at most."""

DTYPES = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}
"""Dtypes of tensors that a file holds."""

OF_EVERY_MODULE = set(vars(nn.Module()))
"""Attributes that torch gives each module."""

BUILT_ELSEWHERE = {"torch", "skood"}
"""Packages whose layers are made of their arguments, so that attributes are no state."""


class UnusableError(Exception):
    """Why something cannot be written or read, and what to do."""

    def __init__(self, reason: str, remedy: str = "Save the detector again") -> None:
        super().__init__(reason)
        self.remedy = remedy


# Files


def to_bytes(kind: str, content: Any, tensors: Mapping[str, Tensor]) -> bytes:
    """A file of a kind, with a content that JSON can hold, and tensors."""
    metadata = {
        "kind": kind,
        "format": str(FORMAT),
        "skood": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "content": json.dumps(content, allow_nan=False),
        "digest": 64 * "0",
    }
    data = safetensors.torch.save(dict(tensors), metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    digest = hashlib.sha256(data).hexdigest().encode()
    header = data[:start].replace(NO_DIGEST, NO_DIGEST.replace(64 * b"0", digest))
    return header + data[start:]


def from_bytes(kind: str, data: bytes) -> tuple[Any, dict[str, Tensor]]:
    """Content and tensors of a file of a kind."""
    metadata = _metadata(data)
    if metadata.get("kind") != kind:
        raise UnusableError(f"it holds no {kind} of skood's", _remedy_for(kind))
    written = f"skood {quoted(metadata.get('skood'))} in format {quoted(metadata.get('format'))}"
    if not re.fullmatch(r"[1-9]\d{0,5}", metadata.get("format", "")):
        raise UnusableError(f"it was written by {written}, which is none")
    if int(metadata["format"]) > FORMAT:
        raise UnusableError(
            f"it was written by {written}, and skood {__version__} reads format {FORMAT} at most",
            "Install a newer skood",
        )
    _check_digest(data)
    content = json.loads(metadata["content"], parse_constant=_refuse_constant)
    return content, safetensors.torch.load(data)


def read_file(kind: str, path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Content and tensors of the file at a path; nothing else is read far."""
    if path.is_dir():
        raise UnusableError("it is a folder", _remedy_for(kind))
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnusableError("it is no file", _remedy_for(kind))
        start = file.read(9)
        _check_start(kind, start, status.st_size)
        return from_bytes(kind, start + file.read())


def place_of_file(path: Path) -> Path:
    """Where a file is written that the user names; an OSError says if none can be there.

    A link stays one, and what it points to is replaced.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {str(path.parent)!r} is not there: make it first.")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; pass the name of a file.")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{str(path)!r} is a device or a pipe; pass the name of a file.")
    return Path(os.path.realpath(path))


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in place of the one before, if any; at any time there is one or the other."""
    unfinished = path.with_name(secrets.token_hex(8) + UNFINISHED)
    try:
        with open(unfinished, "xb") as file:
            if path.exists():
                os.chmod(unfinished, stat.S_IMODE(path.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe is not waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_start(kind: str, start: bytes, size: int) -> None:
    """Refuse what begins otherwise than a file of tensors, before all of it is read."""
    length = int.from_bytes(start[:8], "little")
    if size == 0:
        raise UnusableError("it is empty")
    if start.startswith(b"PK"):
        raise UnusableError(
            "it is a zip archive, as torch.save and torch.export.save write", _remedy_for(kind)
        )
    if len(start) < 9 or start[8:] != b"{" or length > MOST_OF_HEADER:
        pickled = ", but perhaps a pickle" * start.startswith(b"\x80")
        raise UnusableError(f"it is no file of tensors{pickled}", _remedy_for(kind))
    if length > size - 8:
        raise UnusableError("it is damaged: its end is missing")


def _remedy_for(kind: str) -> str:
    return f"Pass a file that the detector's save has written, not another {kind}"


def _metadata(data: bytes) -> dict[str, str]:
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__", {})
        return {str(name): str(value) for name, value in metadata.items()}
    except Exception as error:  # RecursionError among them
        raise UnusableError(f"it is damaged: no header ({first_line(error)[:80]})") from error


def _check_digest(data: bytes) -> None:
    """Refuse a file of which any bit has changed since it was written."""
    start = 8 + int.from_bytes(data[:8], "little")
    found = DIGEST.findall(data[:start])
    hashed = hashlib.sha256(DIGEST.sub(NO_DIGEST, data[:start]))
    hashed.update(memoryview(data)[start:])
    if found != [hashed.hexdigest().encode()]:
        raise UnusableError("it is damaged: its digest is that of other bytes")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"JSON has no {name}")


# Values


class Writer:
    """Turns things into what JSON can hold, and collects their tensors.

    A dict with one key that begins with ``$`` stands for what JSON does not have.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}

    def write(self, thing: Any, place: str) -> Any:
        """A thing, found at a place, which names its tensors."""
        kind = type(thing)
        if thing is None or kind in (bool, int, str):
            return thing
        if kind is float:
            return thing if math.isfinite(thing) else {"$float": repr(thing)}
        if kind in (list, tuple):
            values = [self.write(x, f"{place}.{number}") for number, x in enumerate(thing)]
            return values if kind is list else {"$tuple": values}
        if kind is dict:
            return self._dict(thing, place)
        if isinstance(thing, np.generic):
            return {"$scalar": [_plain_dtype(thing.dtype, place), thing.item()]}
        if kind is np.ndarray:
            return self._array(thing, place)
        if isinstance(thing, Tensor):
            return self.tensor(thing, place)
        if kind is torch.dtype:
            return {"$dtype": str(thing).removeprefix("torch.")}
        if kind is torch.device:
            return {"$device": str(thing)}
        if isinstance(thing, nn.Module):
            return self.module(thing, place)
        return self.other(thing, place)

    def other(self, thing: Any, place: str) -> Any:
        """A thing that is none of the above."""
        raise UnusableError(
            f"{place} is a {type(thing).__name__}, which is code or has some", "Use pickle instead"
        )

    def module(self, module: nn.Module, place: str) -> Any:
        """What a module holds beside its code."""
        state = state_of(module)
        return {
            "tensors": {k: self.tensor(x, f"{place}.{k}") for k, x in state.tensors.items()},
            "frozen": state.frozen,
            "values": {
                part: {k: self.write(x, f"{place}.{part}.{k}") for k, x in values.items()}
                for part, values in state.values.items()
            },
        }

    def tensor(self, tensor: Tensor, place: str) -> Any:
        """A tensor; equal ones are kept once."""
        if not _is_plain(tensor) or tensor.dtype not in DTYPES:
            raise UnusableError(
                f"{place} is a tensor of {tensor.dtype}, {tensor.layout}, which no file of tensors "
                "holds",
                "Use pickle instead",
            )
        values = tensor.detach().resolve_conj().resolve_neg().cpu()
        # How they lie in memory decides the last bits of products, even where a size is 1.
        strides = list(values.stride())
        values = values.clone(memory_format=torch.contiguous_format)
        digest = hashlib.sha256(bytes_of(values)).digest()
        name = self._names.setdefault((values.dtype, values.shape, digest), place)
        self.tensors.setdefault(name, values)
        if strides == list(values.stride()) or not _is_dense(values.shape, strides):
            return {"$tensor": name}
        return {"$tensor": name, "strides": strides}

    def _dict(self, thing: dict[Any, Any], place: str) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in thing):
            return {key: self.write(value, f"{place}.{key}") for key, value in thing.items()}
        pairs = [(key, value, f"{place}.{quoted(key)}") for key, value in thing.items()]
        return {"$dict": [[self.write(k, where), self.write(x, where)] for k, x, where in pairs]}

    def _array(self, array: np.ndarray[Any, Any], place: str) -> Any:
        if array.dtype.kind in "biuf" and array.dtype.itemsize <= 8:
            native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
            return {"$array": self.tensor(torch.from_numpy(native), place)}
        if array.dtype.kind in "UO" and array.ndim == 1:
            values = self.write(array.tolist(), place)
            return {"$objects" if array.dtype.kind == "O" else "$texts": values} | (
                {"dtype": array.dtype.str} if array.dtype.kind == "U" else {}
            )
        raise UnusableError(
            f"{place} is an array of {array.dtype} in {array.ndim} dimensions, which no file holds",
            "Use pickle instead",
        )


class Reader:
    """Turns what a `Writer` has written into things again. Whatever it cannot read is an error."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.tags: dict[str, Callable[..., Any]] = {
            "$float": self._float,
            "$tuple": lambda code: tuple(self.read(x) for x in _list(code)),
            "$dict": lambda code: {self.read(k): self.read(x) for k, x in _list(code)},
            "$scalar": self._scalar,
            "$array": lambda code: self.read(code).numpy(),
            "$texts": self._texts,
            "$objects": self._objects,
            "$tensor": self._tensor,
            "$dtype": self._dtype,
            "$device": self._device,
        }

    def read(self, code: Any) -> Any:
        """The thing that is written so."""
        if isinstance(code, list):
            return [self.read(x) for x in code]
        if not isinstance(code, dict):
            return code
        tags = [key for key in code if key.startswith("$")]
        if not tags:
            return {key: self.read(value) for key, value in code.items()}
        (tag,) = tags
        if tag not in self.tags:
            raise ValueError(f"{quoted(tag)} is unknown")
        options = {key: value for key, value in code.items() if key != tag}
        return self.tags[tag](code[tag], **options)

    def state(self, code: Any) -> Module:
        """What a module holds beside its code."""
        tensors = {k: self.read(x) for k, x in code["tensors"].items()}
        if not all(isinstance(x, Tensor) for x in tensors.values()):
            raise TypeError("a parameter or buffer is no tensor")
        return Module(tensors, _list(code["frozen"]), self.read(code["values"]))

    def _tensor(self, name: str, strides: Any = None) -> Tensor:
        values = self.tensors[name]
        if strides is None:
            return values.clone()  # in memory that torch aligns
        if not fits(strides, list[int]) or not _is_dense(values.shape, strides):
            raise ValueError(f"{quoted(name)} cannot lie in memory by strides {quoted(strides)}")
        # A layout in which values share a place is refused by torch.
        return torch.empty_strided(values.shape, strides, dtype=values.dtype).copy_(values)

    def _float(self, text: str) -> float:
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[text]

    def _scalar(self, code: Any) -> Any:
        dtype, value = code
        return np.dtype(_plain_dtype(np.dtype(str(dtype)), "a number")).type(value)

    def _texts(self, texts: Any, dtype: str) -> Any:
        if not all(isinstance(text, str) for text in _list(texts)):
            raise TypeError("an array of texts holds something else")
        if not re.fullmatch(r"[<>=|]?U\d{1,5}", dtype) or np.dtype(dtype).itemsize > LONGEST_TEXT:
            raise ValueError(f"no array of texts has dtype {quoted(dtype)}")
        return np.array(texts, dtype=dtype)

    def _objects(self, values: Any) -> Any:
        array = np.empty(len(_list(values)), dtype=object)
        array[:] = self.read(values)
        return array

    def _dtype(self, name: str) -> torch.dtype:
        return {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}[name]

    def _device(self, name: str) -> torch.device:
        device = torch.device(str(name))
        if device.type == "meta":
            raise ValueError("on the meta device, tensors have no values")
        return device


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a hint names."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if Callable in (hint, origin):
        return callable(value)
    if origin is type:
        return isinstance(value, type) and issubclass(value, arguments[0])
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(fits(k, arguments[0]) and fits(x, arguments[1]) for k, x in pairs)
    if origin is list:
        return isinstance(value, list) and all(fits(x, arguments[0]) for x in value)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        each = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        return len(each) == len(value) and all(map(fits, value, each))
    if hint in (int, float):
        return type(value) is int or (hint is float and type(value) is float)
    return isinstance(value, hint)


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether values with these strides take as much memory as there are values."""
    if len(shape) != len(strides) or min(strides, default=0) < 0 or 0 in shape:
        return False
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return extent == math.prod(shape)


def _list(code: Any) -> list[Any]:
    if not isinstance(code, list):
        raise TypeError(f"{quoted(code)} is no list")
    return code


def _plain_dtype(dtype: np.dtype[Any], place: str) -> str:
    """The name of a dtype of plain numbers or texts."""
    if dtype.kind not in "biufU" or (dtype.kind != "U" and dtype.itemsize > 8):
        raise UnusableError(f"{place} has dtype {dtype}, which no file holds", "Use pickle instead")
    return dtype.str


# Modules


@dataclass(frozen=True)
class Module:
    """What a module holds beside its code.

    Parameters
    ----------
    tensors : dict
        Parameters and buffers by name, also buffers that are not persistent.
    frozen : list of str
        Names of the parameters that require no gradient.
    values : dict
        Of parts of classes of the user's: numbers, None and tensors in attributes, by part.
    """

    tensors: dict[str, Tensor]
    frozen: list[str]
    values: dict[str, dict[str, Any]]


def state_of(module: nn.Module) -> Module:
    """What a module holds beside its code."""
    tensors = tensors_of(module)
    return Module(
        {name: x for name, x in tensors.items() if not is_lazy(x)},
        [k for k, x in tensors.items() if isinstance(x, nn.Parameter) and not x.requires_grad],
        {
            name: values
            for name, part in module.named_modules()
            if (values := {k: x for k, x in _attributes(part).items() if _is_value(part, x)})
        },
    )


def set_state(module: nn.Module, state: Module) -> nn.Module:
    """Put into a module what one of the same make held; an error names what does not fit."""
    if any(x.is_meta and not is_lazy(x) for x in tensors_of(module).values()):
        module.to_empty(device="cpu")
    own = tensors_of(module)
    _check_fits(own, state)
    for name, values in state.tensors.items():
        tensor = own[name]
        if is_lazy(tensor):
            tensor.materialize(values.shape, dtype=values.dtype)
        tensor.data = values  # in place, so that what is tied stays so
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(name not in state.frozen)
    parts = dict(module.named_modules())
    for place, attributes in state.values.items():
        for key, value in attributes.items():
            part = parts.get(place)
            before = {} if part is None else _attributes(part)
            if part is None or key not in before or not _is_value(part, before[key]):
                raise UnusableError(f"module= has no {quoted(f'{place}.{key}')}", OTHER_MODULE)
            if not _is_value(part, value):
                raise TypeError(f"{quoted(key)} is no number")
            part.__dict__[key] = value
    return module


def code_of(module: nn.Module) -> bytes:
    """Digest of what a module does, apart from its `state_of`."""
    parts = module.named_modules(remove_duplicate=False)
    return fingerprint([(name, _emptied(part)) for name, part in parts], "module")


def _emptied(part: nn.Module) -> nn.Module:
    """A part without its state, of the class that it had before parametrizations made another."""
    kind: type[nn.Module] = type_before_parametrizations(part)
    twin = kind.__new__(kind)
    rest = {name: x for name, x in vars(part).items() if not _is_value(part, x)}
    vacant: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_modules": {}, "training": False}
    twin.__dict__.update(rest | vacant)
    return twin


OTHER_MODULE = "Pass a module of the architecture that was saved"


def _check_fits(own: Mapping[str, Tensor], state: Module) -> None:
    """Refuse a module with other tensors than those kept."""
    shapes = {name: tuple(x.shape) for name, x in state.tensors.items()}
    lacking = [name for name in own if name not in shapes and not is_lazy(own[name])]
    strange = [name for name in shapes if name not in own]
    others = [
        f"{name} {tuple(own[name].shape)} instead of {shape}"
        for name, shape in shapes.items()
        if name in own and not is_lazy(own[name]) and tuple(own[name].shape) != shape
    ]
    told = {"has more": lacking, "lacks": strange, "has other shapes": others}
    found = [f"{what}: {_some(names)}" for what, names in told.items() if names]
    if found:
        raise UnusableError(f"the module does not fit, as it {'; '.join(found)}", OTHER_MODULE)


def _some(names: list[str]) -> str:
    shown = ", ".join(name if len(name) < 60 else f"...{name[-57:]}" for name in names[:2])
    return shown + f" and {len(names) - 2} others" * (len(names) > 2)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names, also those of tied ones."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _attributes(part: nn.Module) -> dict[str, Any]:
    """What a part holds that torch does not know of."""
    return {name: x for name, x in vars(part).items() if name not in OF_EVERY_MODULE}


def _is_value(part: nn.Module, thing: Any) -> bool:
    """Whether a thing in an attribute of a part is one that its code counts or remembers."""
    package = type(part).__module__.partition(".")[0]
    if package in BUILT_ELSEWHERE or isinstance(part, torch.jit.ScriptModule):
        return False
    return type(thing) in (bool, int, float, type(None)) or _is_plain(thing)


def _is_plain(thing: Any) -> bool:
    """Whether a thing is a tensor with values of its own in memory."""
    return (
        isinstance(thing, Tensor)
        and type(thing) in (Tensor, nn.Parameter, nn.Buffer)
        and not is_lazy(thing)
        and thing.layout == torch.strided
        and not (thing.is_quantized or thing.is_meta)
    )
