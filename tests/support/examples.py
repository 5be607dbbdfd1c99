"""How many random examples a test takes: all with --thorough, else a part, which differs from run to run."""

import os


def examples(full: int, part: int) -> int:
    """For hypothesis' max_examples, which is read before there are fixtures; conftest.py sets the variable."""
    return full if "TESTS_THOROUGH" in os.environ else part
