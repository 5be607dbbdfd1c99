"""Under `python -O`, which drops asserts: what production code checks, it checks without them."""

import subprocess
import sys
from pathlib import Path

NO_SUCH_WARNING = "ignore:assertions not in test modules or plugins will be ignored"
ROOT = Path(__file__).resolve().parent.parent
SAMPLE = [
    "tests/http/test_limits.py",
    "tests/kvstore/test_pages.py",
    "tests/sampler/test_params.py",
]
"""Files that try what is refused. pytest's own asserts hold in them, for it rewrites those."""


def test_a_sample_without_asserts(thorough: bool) -> None:
    files = ["tests/actors", "tests/fsm", "tests/http", "tests/kvstore", "tests/sampler"] if thorough else SAMPLE
    command = [
        sys.executable,
        "-O",
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-W",
        NO_SUCH_WARNING,
        *files,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
