"""What a thing does, as a digest: equal for things that behave alike, in any process.

Everything is read by value, code included. Code of installed packages, which have a version, is
read as name and version. Neither the names of functions nor files, lines, docstrings and
annotations count.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pickle
import platform
import re
import sys
import sysconfig
import threading
import types
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .notices import first_line

__all__ = ["UnreadableError", "fingerprint", "found"]

PACKAGE = __name__.partition(".")[0]

UNTELLING = {
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__firstlineno__"),
    *("__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"),
    *("__static_attributes__", "__orig_bases__", "__parameters__", "__type_params__"),
    *("__abstractmethods__", "_abc_impl", "__match_args__", "__slotnames__"),
    *("__dataclass_fields__", "__dataclass_params__"),  # __init__ has what they hold
    "_backward_cls",  # of an autograd function, with a number of its own
}
"""Attributes of a class that do not decide what it does, or that others tell."""

LOOKS_UP_ANYTHING = {"eval", "exec", "globals", "__import__"}
"""Builtins by which a function may reach whatever it likes."""

READS_OF_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
READS_OF_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD"}

HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name]

ABSENT = object()


class UnreadableError(TypeError):
    """What a thing does cannot be told from its parts."""


def fingerprint(thing: Any, name: str = "it") -> bytes:
    """Digest of what a thing does, which outlives the process.

    An `UnreadableError` says which part of `name` can be neither read nor pickled.
    """
    reader = _Reader(ChainMap())
    try:
        reader.read(thing)
    except Exception as error:  # whatever the user's __reduce__, properties and such may raise
        place = ".".join([name, *reader.place])
        reason = first_line(error)[:120]
        raise UnreadableError(f"{place[:120]} ({reason or type(error).__name__})") from error
    return reader.digest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The values of a dense tensor as bytes, in their order, however they lie in memory."""
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
    return values.view(torch.uint8).numpy().data


class _Reader:
    """Writes into a digest what it reads: kind and value, part by part.

    What was read before is named by its number: so a thing may hold itself, and whether two parts
    are one, as tied weights are, makes a difference.
    """

    def __init__(self, seen: ChainMap[int, tuple[int, Any]], number: int = 0) -> None:
        self.place: list[str] = []
        self._hashed = hashlib.sha256()
        self._seen = seen  # by identity; with the thing, so that no other takes its place
        self._number = number

    def digest(self) -> bytes:
        return self._hashed.digest()

    def read(self, thing: Any) -> None:
        """Write what a thing does."""
        kind = type(thing)
        if kind in VALUES:
            self._write(kind.__name__, VALUES[kind](thing))
        elif kind is tuple:
            self._sequence(thing)
        elif kind is frozenset:
            self._unordered(thing)
        elif isinstance(thing, np.generic):
            self._write(repr(thing.dtype), thing.tobytes())
        elif isinstance(thing, NAMED) and (name := _name_in_package(thing)):
            self._write("name", name)
        elif self._is_new(thing):
            if kind in BUILTIN:
                BUILTIN[kind](self, thing)
                return
            for kinds, read in READERS:
                if isinstance(thing, kinds):
                    read(self, thing)
                    return
            self._instance(thing)

    def _write(self, kind: str, value: str | bytes = b"") -> None:
        value = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        self._hashed.update(f"{kind}:{len(value)}:".encode())
        self._hashed.update(value)

    def _is_new(self, thing: Any) -> bool:
        """Whether a thing was not read before; writes its number if it was."""
        if id(thing) in self._seen:
            self._write("again", str(self._seen[id(thing)][0]))
            return False
        self._seen[id(thing)] = self._number, thing
        self._number += 1
        return True

    def _sequence(self, things: Iterable[Any]) -> None:
        things = list(things)
        self._write(f"{len(things)} parts")
        for thing in things:
            self.read(thing)

    def _unordered(self, things: Iterable[Any]) -> None:
        digests = []
        for thing in things:
            reader = _Reader(self._seen.new_child(), self._number)
            reader.read(thing)
            digests.append(reader.digest())
        self._write("set", b"".join(sorted(digests)))

    def _namespace(self, things: Mapping[str, Any]) -> None:
        """Things by names, whose order means nothing."""
        self._write(f"{len(things)} names")
        for name in sorted(things):
            self.place.append(name)
            self._write("name", name)
            self.read(things[name])
            self.place.pop()

    def _dict(self, things: dict[Any, Any]) -> None:
        self._write(f"{len(things)} pairs")
        for key, value in things.items():
            self.place.append(str(key) if isinstance(key, str | int) else type(key).__name__)
            self.read(key)
            self.read(value)
            self.place.pop()

    def _set(self, things: set[Any] | frozenset[Any]) -> None:
        self.read(type(things))
        self._unordered(things)
        self.read(getattr(things, "__dict__", None))

    def _array(self, array: np.ndarray[Any, Any]) -> None:
        self._write(f"array {array.dtype!r} {array.shape}")
        if array.dtype.hasobject:
            self._sequence(array.ravel().tolist())
        else:
            self._hashed.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def _tensor(self, tensor: Tensor) -> None:
        self.read(type(tensor))
        if nn.parameter.is_lazy(tensor):
            self._write(f"lazy {tensor.dtype} {tensor.requires_grad}")
            return
        shape = tuple(tensor.shape)
        self._write(f"tensor {tensor.dtype} {shape} {tensor.layout} {tensor.requires_grad}")
        plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        if tensor.is_meta:
            return
        if not plain or tensor.layout != torch.strided or tensor.is_quantized:
            self._reduced(tensor)
            return
        self._write(f"laid out {tensor.stride()} {tensor.storage_offset()}")
        self._is_new(tensor.untyped_storage())  # which other tensors may share
        self._namespace(vars(tensor))
        self._hashed.update(bytes_of(tensor))

    def _storage(self, storage: torch.UntypedStorage | torch.TypedStorage) -> None:
        self._write("storage", bytes(getattr(storage, "_untyped_storage", storage).cpu()))

    def _method(self, method: types.MethodType) -> None:
        self._sequence([method.__func__, method.__self__])

    def _builtin(self, function: Any) -> None:
        """A method of a builtin type, with the object that it belongs to."""
        owner = getattr(function, "__self__", None)
        if owner is None or isinstance(owner, types.ModuleType):
            raise TypeError(f"{function!r} is compiled code without a version")
        self._write("builtin", function.__name__)
        self.read(owner)

    def _descriptor(self, descriptor: Any) -> None:
        self._write("descriptor", descriptor.__name__)
        self.read(descriptor.__objclass__)

    def _property(self, thing: property) -> None:
        self._sequence([type(thing), thing.fget, thing.fset, thing.fdel])

    def _wrapper(self, thing: Any) -> None:
        self._sequence([type(thing), thing.__func__])

    def _cached(self, function: Any) -> None:
        self._sequence(["cached", function.__wrapped__])

    def _reference(self, reference: weakref.ref[Any]) -> None:
        self._sequence(["reference", reference()])

    def _nothing(self, thing: Any) -> None:
        """A thing that decides nothing."""
        self._write("of no account", type(thing).__name__)

    def _class(self, thing: type) -> None:
        self._write("class", thing.__qualname__)
        self._sequence([type(thing), thing.__bases__])
        self._namespace({k: v for k, v in vars(thing).items() if k not in UNTELLING})

    def _module(self, module: types.ModuleType) -> None:
        """A module of the user's that is used otherwise than by the names in it."""
        names = {k: v for k, v in vars(module).items() if not k.startswith("__")}
        self._namespace(names)

    def _network(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError("TorchScript hides its code")
        self.read(type(module))
        made = {"_graph"} if isinstance(module, torch.fx.GraphModule) else set()  # into code
        made |= {"_compiled_call_impl", "_is_torch_compile"}
        state = {k: v for k, v in vars(module).items() if k not in made}
        hooks = {k: state.pop(k) for k in HOOKS if k in state}
        # The numbers of hooks go on from one module to the next; their order is what counts.
        told = {k: v for k, v in hooks.items() if "state_dict" not in k}
        for name, numbered in told.items():
            if name.endswith("_hooks"):
                settings = [v for k, v in told.items() if k.startswith(name + "_")]
                state[name] = [
                    (hook, *(number in setting for setting in settings))
                    for number, hook in numbered.items()
                ]
        self._namespace(state)

    def _function(self, function: types.FunctionType) -> None:
        original = getattr(function, "_torchdynamo_orig_callable", None)
        if original is not None:
            self._sequence(["compiled or not to be", function.__code__, original])
            return
        self.read(function.__code__)
        self.read(function.__defaults__)
        self._namespace(function.__kwdefaults__ or {})
        self._namespace({k: v for k, v in vars(function).items() if k != "__wrapped__"})
        self._sequence(map(_content, function.__closure__ or ()))
        if _is_of_package(function):
            self._write("globals of", str(_package(function.__globals__["__name__"])))
            return
        for name, attributes in sorted(set(_lookups(function.__code__))):
            self._write("global", name)
            if name in function.__globals__:
                self.read(_reached(function.__globals__[name], attributes))
            elif name in LOOKS_UP_ANYTHING:
                raise TypeError(f"{function.__qualname__} calls {name}")
        for name, level, attributes in _imports(function.__code__):
            package = function.__globals__.get("__package__")
            self._imported(importlib.util.resolve_name("." * level + name, package), attributes)

    def _imported(self, name: str, attributes: tuple[str, ...]) -> None:
        """What a function imports when it runs, of the user's."""
        package = _package(name)
        self._write("import", package or "")
        if package is None:
            try:
                module = importlib.import_module(name)
            except ImportError:
                self._write("absent", name)
                return
            for attribute in attributes or (None,):
                self.read(_reached(module, (attribute,) if attribute else ()))

    def _code(self, code: types.CodeType) -> None:
        arguments = inspect.getargs(code)
        self._write("code", repr((code.co_flags, code.co_posonlyargcount, arguments)))
        self._write("exceptions", code.co_exceptiontable)
        for instruction in dis.get_instructions(code):
            if instruction.opcode in dis.hasconst:
                self._write(instruction.opname)
                self.read(instruction.argval)
            else:
                self._write(instruction.opname, repr(instruction.argval))

    def _instance(self, thing: Any) -> None:
        self.read(type(thing))
        self._reduced(thing)

    def _reduced(self, thing: Any) -> None:
        """What pickle would write of an object."""
        reduce = copyreg.dispatch_table.get(type(thing))
        reduced = reduce(thing) if reduce is not None else thing.__reduce_ex__(4)
        if isinstance(reduced, str):
            place = getattr(thing, "__module__", None) or pickle.whichmodule(thing, reduced)  # type: ignore[attr-defined]
            package = _package(place)
            if package is None:
                raise TypeError(f"{reduced} is known by its name alone")
            self._write("name", f"{place}.{reduced} of {package}")
            return
        function, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        self._sequence([function, arguments])
        for part in state if isinstance(state, tuple) else (state,):
            named = type(part) is dict and all(isinstance(k, str) for k in part)
            self._namespace(part) if named else self.read(part)
        self._sequence(items or ())
        self._sequence(pairs or ())


VALUES: dict[type, Callable[[Any], str | bytes]] = {
    type(None): repr,
    type(...): repr,
    type(NotImplemented): repr,
    bool: repr,
    int: hex,
    float: float.hex,
    complex: repr,
    str: str,
    bytes: bytes,
    range: repr,
    torch.dtype: repr,
    torch.layout: repr,
    torch.memory_format: repr,
    torch.device: lambda device: device.type,  # of which a process has the one that it has
}
"""What is told by a text or bytes, and is the same wherever it is equal."""

NAMED = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    np.ufunc,
)

LOCKS = (type(threading.Lock()), type(threading.RLock()))

BUILTIN: dict[type, Callable[[_Reader, Any], None]] = {
    list: _Reader._sequence,
    dict: _Reader._dict,
    types.MappingProxyType: lambda reader, things: reader._dict(dict(things)),
    np.ndarray: _Reader._array,
    np.memmap: _Reader._array,
}
"""How things of exactly these types are read."""

READERS: list[tuple[Any, Callable[[_Reader, Any], None]]] = [
    (types.FunctionType, _Reader._function),
    (type, _Reader._class),
    (nn.Module, _Reader._network),
    (Tensor, _Reader._tensor),
    ((torch.UntypedStorage, torch.TypedStorage), _Reader._storage),
    (types.ModuleType, _Reader._module),
    (types.CodeType, _Reader._code),
    (types.MethodType, _Reader._method),
    ((types.BuiltinFunctionType, types.MethodWrapperType), _Reader._builtin),
    (
        (
            types.MethodDescriptorType,
            types.WrapperDescriptorType,
            types.ClassMethodDescriptorType,
            types.MemberDescriptorType,
            types.GetSetDescriptorType,
        ),
        _Reader._descriptor,
    ),
    (property, _Reader._property),
    ((staticmethod, classmethod), _Reader._wrapper),
    (functools._lru_cache_wrapper, _Reader._cached),
    (weakref.ref, _Reader._reference),
    ((*LOCKS, RemovableHandle), _Reader._nothing),
    ((set, frozenset), _Reader._set),
]
"""How things of these types, and of kinds of them, are read; all others as pickle has them."""


def _name_in_package(thing: Any) -> str | None:
    """Name and version under which an installed package holds a thing; None of what is no one's."""
    if isinstance(thing, types.ModuleType):
        package = _package(thing.__name__)
        return f"{thing.__name__} of {package}" if package else None
    place = getattr(thing, "__module__", None)
    if not isinstance(place, str):
        place = type(getattr(thing, "__self__", None)).__module__
    if isinstance(thing, types.FunctionType) and not _is_of_package(thing):
        return None
    package = _package(place)
    for name in (getattr(thing, "__qualname__", None), thing.__name__):
        if package and name and found(place, name) is thing:
            return f"{place}.{name} of {package}"
    return None


def _is_of_package(function: types.FunctionType) -> bool:
    """Whether a function was written in an installed package, whatever name it bears."""
    name = str(function.__globals__.get("__name__"))
    scope = sys.modules.get(name)
    own = scope is not None and vars(scope) is function.__globals__
    return own and _package(name) is not None


def found(place: str, name: str) -> Any:
    """What a module holds under a dotted name."""
    thing: Any = sys.modules.get(place)
    for part in name.split("."):
        thing = getattr(thing, part, ABSENT)
    return thing


def _reached(value: Any, attributes: tuple[str, ...]) -> Any:
    """What a chain of attributes reaches through modules of the user's."""
    for name in attributes:
        if not isinstance(value, types.ModuleType) or _package(value.__name__):
            break
        value = getattr(value, name, "absent")
    return value


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return "empty"


def _instructions(code: types.CodeType) -> Iterator[list[dis.Instruction]]:
    """Instructions of a function, and of those defined in it."""
    yield [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _instructions(part)


def _lookups(code: types.CodeType) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Global names that code reads, each with the attributes that it takes of it at once."""
    for instructions in _instructions(code):
        for position, instruction in enumerate(instructions):
            if instruction.opname in READS_OF_GLOBALS:
                following = islice(instructions, position + 1, None)
                chain = takewhile(lambda i: i.opname in READS_OF_ATTRIBUTES, following)
                yield instruction.argval, tuple(i.argval for i in chain)


def _imports(code: types.CodeType) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Modules that code imports: name, level, and what it takes from them."""
    for instructions in _instructions(code):
        for position, instruction in enumerate(instructions):
            if instruction.opname == "IMPORT_NAME":
                level, names = (i.argval for i in instructions[position - 2 : position])
                yield instruction.argval, level, names or ()


def _package(name: str) -> str | None:
    """Name and version of the installed package that a module is of; None of the user's own."""
    top = name.partition(".")[0]
    if top in VERSIONS:
        return f"{top} {VERSIONS[top]()}"
    try:
        loaded = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    except (ImportError, ValueError, AttributeError):
        spec = None
    if name == "__main__" or spec is None or spec.origin is None:
        parent = name.rpartition(".")[0]
        return _package(parent) if parent else None
    python = f"Python {platform.python_version()}"
    if spec.origin in ("built-in", "frozen"):
        return python
    folders = Path(spec.origin).parents
    depth = name.count(".") + (spec.submodule_search_locations is not None)
    if depth >= len(folders):
        return None
    if top in sys.stdlib_module_names and any(map(folders[depth].is_relative_to, _standard())):
        return python
    return _installed(folders[depth]).get(top)


@cache
def _standard() -> list[str]:
    return [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]


@cache
def _installed(folder: Path) -> dict[str, str]:
    """Names and versions of the distributions that were installed into a folder, by module.

    What an installer has written has a record there. Code that is installed as "editable" has none:
    it changes without a change of its version.
    """
    packages: dict[str, list[str]] = {}
    for found in metadata.distributions(path=[str(folder)]):
        record = found.read_text("RECORD")
        names = set(re.findall(r"^[^/.\n]+", record or "", re.MULTILINE))
        if record is None and (folder.suffix == ".egg" or folder.name.endswith("-packages")):
            names = set((found.read_text("top_level.txt") or found.name).split())
        for name in names:
            packages.setdefault(name, []).append(f"{found.name} {found.version}")
    return {name: ", ".join(sorted(versions)) for name, versions in packages.items()}


@cache
def _own_code() -> str:
    """Digest of the sources of this package, which may change without a change of its version."""
    hashed = hashlib.sha256()
    for content in sorted(_sources(resources.files(PACKAGE))):
        hashed.update(hashlib.sha256(content).digest())
    return hashed.hexdigest()


def _sources(folder: Traversable) -> Iterator[bytes]:
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            yield from _sources(entry)
        elif entry.name.endswith((".py", ".pyc")):
            yield entry.read_bytes()


VERSIONS: dict[str, Callable[[], str]] = {
    PACKAGE: _own_code,
    "torch": lambda: str(torch.__version__),
    "numpy": lambda: np.__version__,
}
"""Versions of the packages that train, however they were installed."""
