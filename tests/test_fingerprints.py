from __future__ import annotations

import importlib
import sys
import textwrap
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import printed_elsewhere
from torch import nn

import skood
from skood.fingerprints import UnreadableError, _package, fingerprint

NET = """
import abc, enum, functools, threading
import torch
from dataclasses import dataclass, field
from types import SimpleNamespace
from torch import nn
from torch.nn import functional as F

{given}

class Net(nn.Module):
    {own}
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        {made}
    def forward(self, x):
        h = self.first(x)
        {used}
        return self.head(h)
"""


def made(given="", own="", made="", used=""):
    """A network of a class with some code of its own, as a script has it."""
    namespace = {"__name__": "__main__"}
    source = NET.format(given=textwrap.dedent(given), own=own, made=made, used=used)
    exec(compile(source, "script.py", "exec", dont_inherit=True), namespace)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return namespace["Net"]()


def filled(code, value):
    """Code with a value in the place of {0}."""
    return {name: text.replace("{0}", str(value)) for name, text in code.items()}


DECIDING = {
    "a float of the class": (dict(own="slope = {0}", used="h = h * self.slope"), 1.0, 2.0),
    "an int or a float": (dict(own="slope = {0}"), 1, 1.0),
    "a dict of the class": (dict(own="config = dict(slope={0})"), 1.0, 2.0),
    "a nested dict": (dict(own="config = dict(a=[dict(slope={0})])"), 1.0, 2.0),
    "a set of the class": (dict(own="config = set([1, {0}])"), 2, 3),
    "None or not": (dict(own="act = {0}"), None, False),
    "bytes": (dict(own="table = {0}"), b"a", b"b"),
    "an enum": (
        dict(given="class Kind(enum.Enum):\n    A, B = 1, 2", own="kind = Kind.{0}"),
        "A",
        "B",
    ),
    "the value of an enum": (
        dict(given="class Kind(enum.Enum):\n    A = {0}", own="kind = Kind.A"),
        1,
        2,
    ),
    "a module of the class": (dict(own="act = nn.LeakyReLU({0})"), 0.1, 0.2),
    "a class of torch's": (dict(own="act = nn.{0}"), "ReLU", "Tanh"),
    "a function of torch's": (dict(own="act = torch.{0}"), "relu", "tanh"),
    "a dataclass": (
        dict(given="@dataclass\nclass Conf:\n    slope: float = {0}", own="config = Conf()"),
        1.0,
        2.0,
    ),
    "the factory of a dataclass": (
        dict(
            given="@dataclass\nclass Conf:\n    a: list = field(default_factory=lambda: [{0}])",
            made="self.make = Conf",
        ),
        1.0,
        2.0,
    ),
    "slots": (
        dict(
            given="""
            class Conf:
                __slots__ = ("slope",)
                def __init__(self): self.slope = {0}
            """,
            own="config = Conf()",
        ),
        1.0,
        2.0,
    ),
    "a property": (dict(own="slope = property(lambda self: {0})"), 1.0, 2.0),
    "a cached property": (
        dict(own="slope = functools.cached_property(lambda self: {0})"),
        1.0,
        2.0,
    ),
    "a static method": (dict(own="scale = staticmethod(lambda x: x * {0})"), 2, 3),
    "a class method": (dict(own="scale = classmethod(lambda cls, x: x * {0})"), 2, 3),
    "a cached function": (
        dict(given="@functools.lru_cache\ndef f(x): return x * {0}", used="h = f(h)"),
        2,
        3,
    ),
    "a class that it derives from": (
        dict(
            given="""
            class Base(nn.Module):
                def forward(self, x): return x * {0}
            class Between(Base): pass
            """,
            made="self.between = Between()",
        ),
        2,
        3,
    ),
    "a metaclass": (
        dict(
            given="""
            class Meta(type):
                @property
                def slope(cls): return {0}
            class Conf(metaclass=Meta): pass
            """,
            used="h = h * Conf.slope",
        ),
        2,
        3,
    ),
    "an abstract class": (
        dict(
            given="""
            class Conf(abc.ABC):
                def slope(self): return {0}
            """,
            own="config = Conf()",
        ),
        2,
        3,
    ),
    "a global": (dict(given="SLOPE = {0}", used="h = h * SLOPE"), 1.0, 2.0),
    "a global of a nested function": (
        dict(given="SLOPE = {0}", used="h = torch.stack([(lambda: r * SLOPE)() for r in h])"),
        1.0,
        2.0,
    ),
    "a global object": (
        dict(given="config = SimpleNamespace(slope={0})", used="h = h * config.slope"),
        1.0,
        2.0,
    ),
    "a decorated function": (
        dict(given="@torch.no_grad()\ndef f(x): return x * {0}", used="h = f(h)"),
        2,
        3,
    ),
    "a function under the name of torch's": (
        dict(
            given="""
            @functools.wraps(F.relu)
            def f(x): return x * {0}
            """,
            used="h = f(h)",
        ),
        2,
        3,
    ),
    "a default": (
        dict(given="def f(x, slope={0}): return x * slope", used="h = f(h)"),
        2,
        3,
    ),
    "a default by keyword": (
        dict(given="def f(x, *, slope={0}): return x * slope", used="h = f(h)"),
        2,
        3,
    ),
    "a partial": (
        dict(given="f = functools.partial(torch.mul, other={0})", used="h = f(h)"),
        2,
        3,
    ),
    "a function with an attribute": (
        dict(given="def f(x): return x * f.slope\nf.slope = {0}", used="h = f(h)"),
        2,
        3,
    ),
    "a hook": (
        dict(made="self.first.register_forward_hook(lambda m, x, y: y * {0})"),
        2,
        3,
    ),
    "an attribute": (dict(made="self.slope = {0}"), 1.0, 2.0),
    "an array": (dict(made="import numpy as np; self.slope = np.array([{0}])"), 1.0, 2.0),
    "a masked array": (
        dict(made="import numpy as np; self.slope = np.ma.array([1, 2], mask=[0, {0}])"),
        0,
        1,
    ),
    "a sparse tensor": (dict(made="self.slope = (torch.eye(2) * {0}).to_sparse()"), 1, 2),
    "a tensor outside the state": (dict(made="self.slope = [torch.tensor({0})]"), 1.0, 2.0),
    "a float of 0 and of -0": (dict(made="self.slope = {0}"), 0.0, -0.0),
    "frozen weights": (dict(made="self.first.requires_grad_({0})"), True, False),
    "the mode of a part": (dict(made="self.first.train({0})"), True, False),
    "dropout": (dict(made="self.drop = nn.Dropout({0})"), 0.1, 0.2),
    "a branch": (dict(used="h = h.relu() if {0} else h"), True, False),
    "the order of modules": (
        dict(made="self.b = nn.ModuleDict({0})"),
        "dict(a=nn.ReLU(), b=nn.Tanh())",
        "dict(b=nn.Tanh(), a=nn.ReLU())",
    ),
    "a function that is compiled": (
        dict(given="f = torch.compiler.disable(lambda x: x * {0})", used="h = f(h)"),
        2,
        3,
    ),
    "an autograd function": (
        dict(
            given="""
            class Twice(torch.autograd.Function):
                @staticmethod
                def forward(ctx, x): return x * 2
                @staticmethod
                def backward(ctx, g): return g * {0}
            """,
            used="h = Twice.apply(h)",
        ),
        2,
        3,
    ),
    "parametrized weights": (
        dict(
            made="self.first = nn.utils.parametrizations.weight_norm(self.first, dim={0})",
        ),
        0,
        1,
    ),
}


@pytest.mark.parametrize("name", DECIDING)
def test_what_decides_makes_another_fingerprint(name):
    code, first, second = DECIDING[name]
    prints = [fingerprint(made(**filled(code, x))) for x in (first, second, first)]
    assert prints[0] == prints[2]
    assert prints[0] != prints[1]


IRRELEVANT = {
    "a global with the name of an attribute": ({"given": "first = {0}"}, 1, 2),
    "a global that nothing reads": ({"given": "other = {0}"}, 1, "open"),
    "a docstring": ({"given": "def f(x):\n    '{0}'\n    return x", "used": "h = f(h)"}, "a", "b"),
    "a docstring of a class": ({"own": "'{0}'"}, "a", "b"),
    "an annotation": ({"own": "def f(self, x: {0}): return x"}, "int", "float"),
    "the type of a field": (
        {"given": "@dataclass\nclass C:\n    x: {0} = 1", "own": "config = C()"},
        "int",
        "float",
    ),
    "lines": ({"given": "{0}\ndef f(x): return x", "used": "h = f(h)"}, "", "\n\n# a comment\n"),
    "the order of a set": ({"own": "names = {0}"}, "{'a', 'b', 'c'}", "{'c', 'a', 'b'}"),
    "the order of methods": (
        {"own": "{0}"},
        "a = lambda self: 1; b = lambda self: 2",
        "b = lambda self: 2; a = lambda self: 1",
    ),
    "a lock": (
        {"given": "lock = threading.Lock()\n{0}", "used": "with lock: pass"},
        "",
        "lock.acquire(blocking=False)",
    ),
}


@pytest.mark.parametrize("name", IRRELEVANT)
def test_what_decides_nothing_leaves_the_fingerprint(name):
    code, *values = IRRELEVANT[name]
    first, second = (fingerprint(made(**filled(code, value))) for value in values)
    assert first == second


def test_neither_the_order_of_attributes_nor_the_number_of_a_hook_counts():
    first, second = made(), made()
    first.a, first.b = 1, 2
    second.b, second.a = 2, 1
    second.head.register_forward_hook(print).remove()
    for net in (first, second):
        net.handle = net.first.register_forward_hook(print)
    assert fingerprint(first) == fingerprint(second)
    kept = fingerprint(first)
    first.first.register_forward_hook(print, always_call=True)
    second.first.register_forward_hook(print)
    assert len({kept, fingerprint(first), fingerprint(second)}) == 3


UNREADABLE = {
    "an open file": ({"made": "self.log = open('/dev/null')"}, r"it\.log \("),
    "a generator": ({"own": "values = (x for x in [1])"}, "generator"),
    "a file that a function reads": (
        {"given": "log = open('/dev/null')", "used": "log.read()"},
        "TextIOWrapper",
    ),
    "TorchScript": ({"made": "self.script = torch.jit.script(nn.ReLU())"}, "TorchScript hides"),
    "names looked up at run time": ({"used": "h = eval('h')"}, "forward calls eval"),
    "what a thread holds": ({"made": "self.local = threading.local()"}, "_thread._local"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_told_is_an_error_that_names_the_part(name):
    code, message = UNREADABLE[name]
    with pytest.raises(UnreadableError, match=message) as raised:
        fingerprint(made(**code))
    assert len(str(raised.value)) < 250


class Refuses:
    def __reduce__(self):
        raise ZeroDivisionError


def deep(levels):
    nested = []
    for _ in range(levels):
        nested = [nested]
    return nested


@pytest.mark.parametrize("thing", [Refuses(), deep(10_000)], ids=["a refusal", "too deep"])
def test_whatever_fails_while_it_is_read_cannot_be_told(thing):
    with pytest.raises(UnreadableError):
        fingerprint(thing)


# Identity


def tied(how):
    first, second = (nn.Linear(4, 4, bias=False) for _ in range(2))
    second.weight.data.copy_(first.weight.data)
    if how == "one parameter":
        second.weight = first.weight
    if how == "one memory":
        second.weight = nn.Parameter(first.weight.data)
    if how == "one module":
        second = first
    return nn.Sequential(first, second)


def test_tied_weights_are_told_from_equal_ones():
    assert len({fingerprint(tied(how)) for how in (None, "one parameter", "one memory")}) == 3
    assert fingerprint(tied("one module")) != fingerprint(tied("one parameter"))


def test_equal_values_are_equal_whether_or_not_they_are_one_object():
    text = "".join(["a", "b"])
    assert fingerprint([text, text]) == fingerprint(["ab", "".join(["a", "b"])])
    assert fingerprint((1.5, (1.5,))) == fingerprint((1.5, (float("1.5"),)))


def test_things_that_hold_themselves_are_read():
    for value in (1, 2):
        loop = [value]
        loop.append(loop)
        assert len(fingerprint(loop)) == 32
    net = made()
    net.parents = [net]
    assert fingerprint(net) == fingerprint(net)


def test_reading_leaves_no_trace():
    class Plain:
        pass

    thing = Plain()
    assert fingerprint(thing) == fingerprint(thing) == fingerprint(Plain())


# Modules of the user's


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A function that writes and imports a module of the user's, and forgets it afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def write(name, text):
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for loaded in set(sys.modules) - before:
            del sys.modules[loaded]
        importlib.invalidate_caches()

    yield write
    for loaded in set(sys.modules) - before:
        del sys.modules[loaded]


USES = {
    "by a module": "import helpers\ndef f(x): return helpers.scale(x)",
    "by an import inside": "def f(x):\n    import helpers\n    return helpers.scale(x)",
    "by a name imported inside": "def f(x):\n    from helpers import scale\n    return scale(x)",
    "by a package": "import users.helpers\ndef f(x): return users.helpers.scale(x)",
    "by getattr": "import helpers\ndef f(x): return getattr(helpers, 'scale')(x)",
    "by a module of a module": "import users\ndef f(x): return users.here.scale(x)",
}


@pytest.mark.parametrize("how", USES)
def test_a_function_of_another_module_is_read(users, how):
    prints = []
    for factor, other in ((2, 0), (3, 0), (2, 1)):
        users("users.__init__", "from . import helpers as here\n")
        for name in ("helpers", "users.helpers"):
            users(name, f"def scale(x): return x * {factor}\ndef other(): return {other}\n")
        namespace = {}
        exec(USES[how], namespace)
        prints.append(fingerprint(namespace["f"]))
    assert prints[0] != prints[1]
    # What nothing uses does not count, unless anything of the module may be used.
    assert (prints[0] == prints[2]) == (how not in ("by getattr", "by an import inside"))


def test_a_module_that_is_not_there_is_no_obstacle():
    namespace = {}
    exec("def f(x):\n    import there_is_no_such_module\n    return x", namespace)
    assert fingerprint(namespace["f"]) == fingerprint(namespace["f"])


def installed(folder, version):
    """A package and its record, as an installer writes them."""
    (folder / "told").mkdir(parents=True, exist_ok=True)
    (folder / "told" / "__init__.py").write_text(
        "import threading\nLOCAL = threading.local()\ndef f(x): return LOCAL\n"
    )
    for old in folder.glob("*.dist-info"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    info = folder / f"Told-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: Told\nVersion: {version}\n")
    (info / "RECORD").write_text("told/__init__.py,,\nTold-1.dist-info/METADATA,,\n")


def test_an_installed_package_counts_as_its_version_wherever_it_lies(tmp_path, monkeypatch, users):
    from skood import fingerprints

    prints = []
    for version in ("1.0", "2.0", "1.0"):
        installed(tmp_path, version)
        users("unrelated", "")
        fingerprints._installed.cache_clear()
        told = importlib.import_module("told")
        assert _package("told") == f"Told {version}"
        prints.append(fingerprint(told.f))
    assert prints[0] == prints[2] != prints[1]
    # Beside it, the user's own code, which no record lists.
    users("mine", "def f(x): return x\n")
    importlib.import_module("mine")
    assert _package("mine") is None


def test_a_package_in_a_zip_without_a_version_is_read(tmp_path, monkeypatch, users):
    prints = []
    for factor in (2, 3):
        users("unrelated", "")
        path = tmp_path / f"code{factor}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("zipped.py", f"def f(x): return x * {factor}\n")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(path)
            prints.append(fingerprint(importlib.import_module("zipped").f))
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("math", "Python"),
        ("os.path", "Python"),
        ("logging", "Python"),
        ("builtins", "Python"),
        ("torch._C._nn", "torch"),
        ("numpy.linalg", "numpy"),
        ("sklearn.base", "scikit-learn"),
        ("skood.detector", "skood"),
        ("__main__", None),
        (__name__, None),
        ("there_is_no.such_module", None),
    ],
)
def test_packages_are_known_by_name_and_version(name, package):
    assert ((_package(name) or "None").split()[0]) == str(package)


def test_a_module_made_at_run_time_is_the_users():
    module = types.ModuleType("math_of_mine")
    assert _package(module.__name__) is None


def test_another_release_of_skood_makes_another_fingerprint(tmp_path, monkeypatch):
    from skood import fingerprints

    before = fingerprint(skood.penalties.l1)
    source = Path(skood.__file__).parent
    (tmp_path / "engine").mkdir()
    for name in ("__init__.py", "engine/training.py"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    monkeypatch.setattr(fingerprints.resources, "files", lambda package: tmp_path)
    prints = []
    for change in (b"", b"\n# another loop\n"):
        with open(tmp_path / "engine" / "training.py", "ab") as file:
            file.write(change)
        fingerprints._own_code.cache_clear()
        prints.append(fingerprint(skood.penalties.l1))
    fingerprints._own_code.cache_clear()
    assert len({before, *prints}) == 3


# Other processes

SCRIPT = """
import enum, functools, sys, threading
import numpy as np, torch
from torch import nn
from torch.nn import functional as F
from skood.fingerprints import fingerprint

class Kind(enum.Enum):
    A, B = {"a", "b"}, {"c"}

class Net(nn.Module):
    names, kind, lock = {"x", "y", "z"}, Kind.A, threading.Lock()
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
        self.first.register_forward_hook(lambda m, x, y: y * 2)
        self.frozen = frozenset("abc")
    def forward(self, x):
        return F.relu(self.first(x)) if "x" in {"x", "y", "w"} else np.sqrt(x)

def show():
    double = functools.partial(torch.mul, other=2)
    print(fingerprint([Net(), double, lambda x: x in {"a", "b"}]).hex())

if __name__ == "__main__":
    show()
"""


def test_fingerprints_outlive_the_process_and_its_hashes(users, tmp_path, capsys):
    users("script", SCRIPT)
    importlib.import_module("script").show()
    as_module = capsys.readouterr().out
    as_script = printed_elsewhere(str(tmp_path / "script.py"))
    assert len(as_script.strip()) == 64
    assert as_module == as_script


def test_a_copy_in_a_pickle_has_the_same_fingerprint():
    cloudpickle = pytest.importorskip("cloudpickle")
    code, value, _ = DECIDING["a decorated function"]
    net = made(**filled(code, value))
    net.table = {"a": [np.arange(3)], "lock": None}
    copy = cloudpickle.loads(cloudpickle.dumps(net))
    assert fingerprint(copy) == fingerprint(net)


def test_a_large_set_is_read_fast():
    reader = {f"word {i}" for i in range(20_000)}
    assert fingerprint(reader) == fingerprint(set(sorted(reader)))


def test_arrays_of_any_kind_are_read_by_value():
    arrays = [
        np.zeros(2),
        np.zeros(2, dtype=int),
        np.zeros((2, 1)),
        np.array(["a", None], dtype=object),
        np.array([(1, 2.0)], dtype=[("a", int), ("b", float)]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.float64(0.0),
        torch.zeros(2),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.zeros(2, device="meta"),
        nn.Parameter(torch.zeros(2)),
    ]
    assert len({fingerprint(array) for array in arrays}) == len(arrays)
    assert fingerprint(np.zeros((3, 2)).T) == fingerprint(np.zeros((2, 3)))
