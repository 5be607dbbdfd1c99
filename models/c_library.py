"""C source to a loaded library: compiled for this very CPU at the first use, then taken from the cache folder.

Used by cpu_kernels.py, and by actors/ring.py for an extension module of Python. Needs a C compiler at run time, as
Triton does on a GPU; who calls has another way where there is none. Invariant: a cached library was made from these
files, by this compiler, for a CPU with these features.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from ..errors import StartupError
from .cache import cache_folder

FLAGS: Final = ("-O3", "-march=native", "-fPIC", "-shared", "-pthread")
COMPILE_SECONDS: Final = 120.0


def load_library(*files: Path) -> ctypes.CDLL:
    """Compile `files`, C sources and the headers that they include, unless that was done before; load the library.

    It is named after the first. Symbols that are not defined are looked up among those of the libraries that torch has
    loaded. Raises StartupError when there is no compiler, or when what it makes does not run here.
    """
    try:
        return ctypes.CDLL(str(compile_library(*files)))
    except OSError as error:
        raise StartupError(f"{files[0].name} cannot be compiled and loaded: {error}") from error


def compile_library(*files: Path, options: tuple[str, ...] = ()) -> Path:
    """`load_library` without loading: the path of the shared object. `options` go to the compiler too.

    Raises StartupError.
    """
    compiler = find_compiler()
    target = cache_folder() / "kernels" / f"{files[0].stem}-{_key(files, compiler, options)}.so"
    try:
        if not target.exists():
            _compile(compiler, options, [str(file) for file in files if file.suffix == ".c"], target)
    except OSError as error:
        raise StartupError(f"{files[0].name} cannot be compiled: {error}") from error
    return target


def include_python() -> tuple[str, ...]:
    """Options that compile an extension module of this very Python. Raises StartupError without its headers."""
    folder = Path(sysconfig.get_path("include"))
    if not (folder / "Python.h").exists():
        raise StartupError("there are no headers of Python (python3-dev)")
    return (f"-I{folder}", f"-DINTERPRETER_{sysconfig.get_config_var('SOABI').replace('-', '_')}")


def find_compiler() -> str:
    """The path of $CC, or of the first C compiler of the usual names. Raises StartupError if there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    raise StartupError("there is no C compiler (cc, gcc or clang, or the one that $CC names)")


def _key(files: tuple[Path, ...], compiler: str, options: tuple[str, ...]) -> str:
    digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in files))
    digest.update(" ".join((os.path.realpath(compiler), *FLAGS, *options, *_cpu_features())).encode())
    return digest.hexdigest()[:16]


def _cpu_features() -> list[str]:
    """What /proc/cpuinfo says of the first CPU; a cache folder may be shared by machines."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return []
    return [line for line in first if line.startswith(("model name", "flags", "Features"))]


def _compile(compiler: str, options: tuple[str, ...], sources: list[str], target: Path) -> None:
    """Run the compiler, on all files at once; the library appears under its name whole or not at all."""
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, ThreadPoolExecutor() as pool:
        made = Path(folder) / target.name
        objects = [str(Path(folder) / f"{number}.o") for number in range(len(sources))]

        def compile_one(source: str, to: str) -> None:
            _run([compiler, *FLAGS, *options, "-c", source, "-o", to], Path(source).name)

        list(pool.map(compile_one, sources, objects))
        _run([compiler, *FLAGS, *options, *objects, "-o", str(made)], target.name)
        os.replace(made, target)


def _run(command: list[str], name: str) -> None:
    """Run the compiler for `name`. Raises StartupError with the first line of what it says."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        raise StartupError(f"{command[0]} did not end within {COMPILE_SECONDS:.0f} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise StartupError(f"{command[0]} does not compile {name}: {lines[0] if lines else 'no reason given'}")
