"""What a server shows at /: page.html to a browser, a hint with a line to paste to everything else.

Routed by app.py. Invariant: the page holds no data of this server (it asks the API, with the key if there is one), and
its policy allows exactly its own script and style, by their hashes, and connections to its own server only.
"""

import base64
import functools
import hashlib
import re
from importlib import resources
from typing import TYPE_CHECKING, Final

from .exchange import Exchange, Header

if TYPE_CHECKING:
    from .service import Service

PLAIN: Final = b"text/plain; charset=utf-8"
HTML: Final = b"text/html; charset=utf-8"
HINT = """actorserve is serving {model}.

  curl {base}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"messages": [{{"role": "user", "content": "Hello!"}}]}}'

The API is described at {base}/openapi.json; a browser gets a page to chat, and to watch the engine, at {base}/
"""


async def index(service: "Service", exchange: Exchange) -> None:
    """Serve GET /: a page for browsers, a hint for other clients."""
    given = dict(exchange.scope["headers"])
    vary = (b"vary", b"accept")
    if b"text/html" in given.get(b"accept", b""):
        body, headers = page()
        await exchange.reply(body, content_type=HTML, headers=[*headers, vary])
        return
    host = given.get(b"host", b"").decode("latin-1")
    scheme, root = exchange.scope.get("scheme", "http"), service.config.root_path.rstrip("/")
    base = f"{scheme}://{host or f'{service.config.host}:{service.config.port}'}{root}"
    text = HINT.format(model=service.model_name, base=base)
    await exchange.reply(text.encode(), content_type=PLAIN, headers=[vary])


@functools.cache
def page() -> tuple[bytes, list[Header]]:
    """Return the page and its headers."""
    body = resources.files(__package__).joinpath("page.html").read_bytes()
    rules = [
        "default-src 'none'",
        f"script-src {_hash(body, b'script')}",
        f"style-src {_hash(body, b'style')}",
        "connect-src 'self'",
        "img-src data:",  # its icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    return body, [
        (b"content-security-policy", "; ".join(rules).encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    ]


def _hash(body: bytes, tag: bytes) -> str:
    """Return the CSP source that allows the page's one element of this name (W3C CSP Level 3, section 8.4)."""
    (text,) = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), body, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
