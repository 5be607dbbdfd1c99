"""The environment of the engine's child processes: the parent's, without what is secret.

Used by life.py and compile_pool.py. A node computes; it logs in nowhere. Invariant: a variable whose name says that it
holds a key, a token or a password does not reach one, nor, by a crash report or a library, anybody else.
"""

import os
import re
from typing import Final

_SECRET: Final = re.compile(
    r"(^|_)(API_?KEY|ACCESS_KEY|SECRET|PRIVATE_KEY|KEY|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|AUTH|COOKIE)S?(_|$)",
    re.IGNORECASE,
)


def child_environment(**more: str) -> dict[str, str]:
    """Return it; `more` are further variables, which go before the parent's."""
    return {name: value for name, value in os.environ.items() if not _SECRET.search(name)} | more
