"""The shape of the code base: packaging, layers, and what shipped code never does. Sizes are printed: make size."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BASE = {"config", "errors"}
"""Root modules that every layer may import."""
MAY_IMPORT = {
    "fsm": set[str](),
    "kvstore": set[str](),
    "sampler": set[str](),
    "models": {"fsm", "kvstore", "sampler"},
    "actors": {"fsm", "kvstore", "sampler", "models"},
    "http": {"fsm", "kvstore", "sampler", "models", "actors", "lang"},  # lang: programs that run on the server
    "lang": {"models", "engine", "outputs", "actors"},  # the public API, formats of reasoning, a front's client
}
FREE = {"examples", "perf", "tests"}
FOLDERS = set(MAY_IMPORT) | {"examples", "perf"}
SHIPPED = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")) + sorted(ROOT.glob("*.py"))
SHIPPED_ONLY = [path for path in SHIPPED if path.relative_to(ROOT).parts[0] != "perf"]
HEAVY = {"torch", "transformers", "starlette", "uvicorn", "trio", "gguf"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def python(code: str) -> str:
    """What a fresh interpreter in the root prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ------------------------------------------------------------------ packaging


def test_http_has_no_init_file() -> None:
    """With one, a program started in the root would import our http instead of the standard library's."""
    assert not (ROOT / "http" / "__init__.py").exists()


def test_standard_http_from_the_root() -> None:
    assert python("import http.client, http; print(http.__file__)").endswith("/http/__init__.py")
    assert not python("import http; print(http.__file__)").startswith(str(ROOT))


def test_import_is_light() -> None:
    """The root package is imported in every process of the engine."""
    assert python(f"import actorserve, sys; print({HEAVY} & set(sys.modules))") == "set()"


def test_command_line_is_light() -> None:
    """`actorserve -h` answers at once; and the root process never needs torch."""
    assert python(f"import actorserve.cli, sys; print({HEAVY} & set(sys.modules))") == "set()"
    root = "import actorserve.serve, actorserve.models.resolve, sys"
    assert python(f"{root}; print({HEAVY - {'trio'}} & set(sys.modules))") == "set()"


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(("actorserve", *path.parent.relative_to(ROOT).parts)) for path in SHIPPED}
    assert set(listed) == found


def test_every_folder_of_code_is_known() -> None:
    """A new folder must be entered above, with what it may import."""
    folders = {path.parent.name for path in ROOT.glob("*/*.py") if not path.parent.name.startswith((".", "build"))}
    assert folders == FOLDERS | {"tests"}


def test_no_module_takes_a_standard_name() -> None:
    """Root modules would shadow the standard library for programs started in the root; inside, they confuse."""
    names = {path.stem for path in SHIPPED if name_of(path) != "perf/http.py"} | FOLDERS - {"http"}
    assert not names & set(sys.stdlib_module_names)


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


# ------------------------------------------------------------------ layers


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module below actorserve) of every import of our own code, at any depth of the file."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from ((node.lineno, f"{module}.{alias.name}".lstrip(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "actorserve":
            yield node.lineno, f"absolute.{node.module}"
        elif isinstance(node, ast.Import):
            ours = [
                alias.name for alias in node.names if alias.name.split(".")[0] in {"actorserve", *FOLDERS - {"http"}}
            ]
            yield from ((node.lineno, f"absolute.{name}") for name in ours)


def test_layers() -> None:
    """A folder imports itself, those below it, and the base; imports of our own code are relative."""
    for path in SHIPPED:
        check_layer(path)


def check_layer(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for line, module in imports(path):
        top = module.split(".")[0]
        if folder not in FREE:
            assert top != "absolute", f"{name_of(path)}:{line}: import our own code relatively"
        if folder in MAY_IMPORT:
            allowed = MAY_IMPORT[folder] | BASE | {folder}
            assert top in allowed, f"{name_of(path)}:{line}: {folder} may not import {module}"


def test_layers_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "kvstore").mkdir()
    file = tmp_path / "kvstore" / "bad.py"
    for bad in (
        "from ..actors.lane import Lane",
        "def f():\n    from ..http import app",
        "from actorserve.config import X",
    ):
        file.write_text(bad)
        with pytest.raises(AssertionError):
            check_layer(file)
    file.write_text("from ..errors import RequestError\nfrom .pages import PagePool\nimport http.client")
    check_layer(file)


# ------------------------------------------------------------------ what never appears in shipped code

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load")}


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that could turn data into code."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, a.name) for a in names if a.name.split(".")[0] in FORBIDDEN_MODULES)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in FORBIDDEN_MODULES:
                yield node.lineno, module
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN_CALLS:
                yield node.lineno, name
            case ast.Attribute(value=ast.Name(id=owner), attr=attr) if (owner, attr) in FORBIDDEN_ATTRIBUTES:
                yield node.lineno, f"{owner}.{attr}"
            case ast.keyword(arg="trust_remote_code" | "allow_pickle", value=ast.Constant(value=True)):
                yield node.value.lineno, str(node.arg)


# The comparators of the benchmarks do what other engines do; nothing of the engine imports perf.
def test_no_code_from_data() -> None:
    found = {name_of(path): list(forbidden(tree_of(path))) for path in SHIPPED_ONLY}
    assert not any(found.values()), {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from marshal import loads",
        "def f(x):\n    return eval(x)",
        "exec('1')",
        "torch.load(p)",
        "np.load(p)",
        "f(trust_remote_code=True)",
    ],
)
def test_code_from_data_would_be_noticed(code: str) -> None:
    assert list(forbidden(ast.parse(code)))


def test_every_file_says_what_it_is() -> None:
    silent = [name_of(path) for path in SHIPPED if not ast.get_docstring(tree_of(path))]
    assert not silent, f"without a first paragraph: {silent}"


def test_architecture_names_every_file() -> None:
    document = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    lacking = []
    for path in SHIPPED_ONLY:
        title = "### Root" if path.parent == ROOT else f"### `{path.parent.name}/`"
        section = document.partition(f"\n{title}\n")[2].partition("\n### ")[0]
        if path.name != "__init__.py" and f"`{path.name}`" not in section:
            lacking.append(name_of(path))
    assert not lacking, f"docs/architecture.md lacks {lacking}"
