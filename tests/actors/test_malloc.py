"""What malloc is told arrives there."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, sys, threading
from actorserve.actors.malloc import share_arenas
if sys.argv[2] == "shared":
    share_arenas()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes, libc.fclose.argtypes = [ctypes.c_int, ctypes.c_void_p], [ctypes.c_void_p]
together = threading.Barrier(7)
def work():
    libc.malloc(1000)
    together.wait()
    together.wait()
for _ in range(6):
    threading.Thread(target=work).start()
together.wait()
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
together.wait()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_threads_share_arenas(tmp_path: Path) -> None:
    counts = {}
    for how in ("shared", "own"):
        found = tmp_path / how
        subprocess.run([sys.executable, "-c", SCRIPT, str(found), how], check=True)
        counts[how] = found.read_text().count("<heap nr=")
    assert counts["shared"] <= 2 < counts["own"]
