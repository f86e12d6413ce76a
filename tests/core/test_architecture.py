"""The arrows of the house: who may import whom, read from the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import inferflux_core.errors

ROOT = Path(inferflux_core.errors.__file__).parent
PACKAGE = "inferflux_core"

# From top to bottom: a folder imports only from itself and from folders below it. "" are the modules at the root.
LAYERS = ("cli", "ui", "serving", "access", "models", "engine", "telemetry", "")
# Shipped test support stands beside `serving`: it may use everything below that, and nobody uses it but `builtin.py`.
TESTING = "testing"
# Data without dependencies, the vocabulary of all.
VOCABULARY = f"{PACKAGE}.engine.types"
# Registers what core itself offers, like any plugin: inside its hooks and factories it may import what it registers.
BUILTIN = f"{PACKAGE}.builtin"

NEVER_IN_CORE = {
    "torch",
    "llama_cpp",
    "onnxruntime",
    "transformers",
    "ray",
    # identity providers and policy engines have packages of their own
    "authlib",
    "jose",
    "jwt",
    "joserfc",
    "oauthlib",
    "msal",
    "cedarpy",
    "regopy",
}
# Libraries that a part of core uses and nothing else in it, loaded only by servers that need them.
ONLY_IN = {
    "casbin": {"access"},
    "cryptography": {"access", "serving"},
    "redis": {"access"},
    "llguidance": {"engine", "models"},
}
UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


@dataclass(frozen=True)
class Import:
    """One imported module: where, what, and whether it happens when the importing module is loaded."""

    importer: str
    imported: str
    line: int
    at_load: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def imports_of(source: str, module: str, is_package: bool = False) -> Iterator[Import]:
    """All imports of a module, those in functions and under TYPE_CHECKING too."""

    def visit(node: ast.AST, at_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, child.lineno, at_load)
            elif isinstance(child, ast.ImportFrom):
                parents = module.split(".")[: None if is_package and child.level == 1 else -child.level or None]
                base = ".".join([*(parents if child.level else []), *([child.module] if child.module else [])])
                for alias in child.names:
                    yield Import(module, _module_of(base, alias.name), child.lineno, at_load)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _is_type_checking(child)
                yield from visit(child, at_load and not inside)

    yield from visit(ast.parse(source), True)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _module_of(base: str, name: str) -> str:
    """`from base import name` imports a submodule if there is one of that name."""
    path = ROOT.parent.joinpath(*base.split("."), name)
    return f"{base}.{name}" if path.with_suffix(".py").exists() or path.is_dir() else base


def layer_of(module: str) -> str:
    parts = module.split(".")
    folder = parts[1] if len(parts) > 1 else ""
    return folder if (ROOT / folder).is_dir() else ""


def is_allowed(found: Import) -> bool:
    imported = found.imported
    if imported.partition(".")[0] != PACKAGE or imported == VOCABULARY:
        return True
    above, below = layer_of(found.importer), layer_of(imported)
    if found.importer == BUILTIN:
        return below == "" or (not found.at_load and below in ("access", "models", "engine", TESTING))
    if below == TESTING:
        return above == TESTING
    if above == TESTING:
        return LAYERS.index(below) > LAYERS.index("serving")
    return LAYERS.index(below) >= LAYERS.index(above)


def modules() -> list[tuple[Path, str]]:
    paths = sorted(ROOT.rglob("*.py"))
    return [(p, ".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")) for p in paths]


def all_imports() -> list[Import]:
    found: list[Import] = []
    for path, module in modules():
        found += imports_of(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
    return found


def violations(imports: Sequence[Import]) -> list[str]:
    return [str(found) for found in imports if not is_allowed(found)]


def test_every_folder_has_its_place() -> None:
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert folders <= {*LAYERS, TESTING}


def test_imports_point_downwards() -> None:
    assert violations(all_imports()) == []


def test_only_the_command_line_and_the_server_start_the_server() -> None:
    """Adapters translate; what they need of the application they are handed."""
    wiring = {f"{PACKAGE}.serving.app", f"{PACKAGE}.serving.server"}
    importers = {i.importer for i in all_imports() if i.imported in wiring}
    assert {m for m in importers if not m.startswith(f"{PACKAGE}.cli") and m not in wiring} == set()


def test_the_vocabulary_imports_nothing_of_ours() -> None:
    assert [str(i) for i in all_imports() if i.importer == VOCABULARY and i.imported.startswith(PACKAGE)] == []


def test_core_never_imports_what_plugins_bring() -> None:
    assert [str(i) for i in all_imports() if i.imported.partition(".")[0] in NEVER_IN_CORE] == []


def test_heavy_libraries_stay_in_their_folder() -> None:
    found = [i for i in all_imports() if i.imported.partition(".")[0] in ONLY_IN]
    assert {i.imported.partition(".")[0] for i in found} == set(ONLY_IN), "one of them is not used any more"
    assert [str(i) for i in found if layer_of(i.importer) not in ONLY_IN[i.imported.partition(".")[0]]] == []


def test_a_server_without_access_control_does_not_load_what_that_needs() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import inferflux_core.serving.app, inferflux_core.serving.pipeline, sys; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert set(ONLY_IN) & set(loaded) == set()


def test_nobody_unpickles() -> None:
    """Unpickling runs code. Other packages of the workspace are held to it as well."""
    found = [str(i) for i in all_imports() if i.imported.partition(".")[0] in UNPICKLING]
    for path in sorted(ROOT.parents[2].glob("inferflux-*/src/**/*.py")):
        source = path.read_text(encoding="utf-8")
        names = {i.imported.partition(".")[0] for i in imports_of(source, path.stem)}
        found += [str(path)] if names & UNPICKLING or re.search(r"(send|recv)_pyobj|allow_pickle=True", source) else []
    assert found == []


def test_plugins_use_the_public_half_of_core() -> None:
    """Our own plugins import what plugin authors may: interfaces, vocabulary, sampler, settings, errors, hooks, file names."""
    public = {
        "builtin",
        "client_network",
        "engine.sampling",
        "engine.types",
        "errors",
        "hookspecs",
        "identity",
        "interfaces",
        "models.shards",
        "plugins",
        "settings",
        "testing",
    }
    found = []
    plugins = [p for p in ROOT.parents[2].glob("inferflux-*/src/**/*.py") if ROOT not in p.parents]
    for path in sorted(plugins):
        for i in imports_of(path.read_text(encoding="utf-8"), path.stem):
            inner = i.imported.removeprefix(f"{PACKAGE}.")
            if i.imported.startswith(PACKAGE) and inner not in public and inner.partition(".")[0] != "testing":
                found.append(str(i))
    assert found == []


# --- the test can fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "fine"),
    [
        ("serving.pipeline", "from inferflux_core.engine.client import EngineClient", True),
        ("engine.loop", "from inferflux_core.serving import pipeline", False),
        ("engine.loop", "import inferflux_core.models.manager", False),
        ("engine.loop", "def f():\n    from inferflux_core.models.manager import x", False),
        ("engine.loop", "if TYPE_CHECKING:\n    from inferflux_core.models.manager import x", False),
        ("engine.loop", "from inferflux_core.plugins import load_plugins", True),
        ("engine.kv.paged", "from ..request import Request", True),
        ("engine.loop", "from ..models import manager", False),
        ("engine.loop", "from .. import models", False),
        ("engine.loop", "from inferflux_core.telemetry import metrics", True),
        ("telemetry.metrics", "from inferflux_core.engine.types import EngineStats", True),
        ("telemetry.metrics", "from inferflux_core.engine import types", True),
        ("telemetry.metrics", "from inferflux_core.engine.loop import EngineCore", False),
        ("interfaces", "from inferflux_core.engine.types import KVOps", True),
        ("interfaces", "from inferflux_core.engine.kv.manager import KVCacheManager", False),
        ("models.manager", "from inferflux_core.testing.fake_backend import FakeRunner", False),
        ("builtin", "from inferflux_core.testing.fake_backend import FakeRunner", False),
        ("builtin", "def f():\n    from inferflux_core.testing.fake_backend import FakeRunner", True),
        ("builtin", "def f():\n    from inferflux_core.serving.app import x", False),
        ("testing.driver", "from inferflux_core.engine.loop import EngineCore", True),
        ("testing.driver", "from inferflux_core.serving.app import x", False),
        ("serving.app", "from inferflux_core.cli.main import cli", False),
        ("serving.app", "import zmq, numpy", True),
    ],
)
def test_the_arrows(module: str, source: str, fine: bool) -> None:
    assert (violations(list(imports_of(source, f"{PACKAGE}.{module}"))) == []) is fine
