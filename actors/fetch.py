"""Fetcher: images that clients name by an address, where the operator allows it (--allow-image-urls).

Used by the text actor, in its loop. Whoever may name an address may make this process talk to it, so: a host is
resolved once, no address of it may lie in a private, local or otherwise special network, and the connection goes to the
address that was looked at, at every redirect anew. Hosts of --allowed-media-domains are the operator's own word: they
may lie anywhere, and where there are any, no others are fetched. Invariant: what one fetch takes is bounded in seconds
and bytes while it is read, whatever the other side sends or claims.
"""

import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Final
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import h11
import trio
from msgspec.structs import replace

from ..errors import RequestError
from .image_fields import MOST_BYTES, checked
from .messages import ImageFile, Prompt

MOST_CHARS: Final = 8192
"""Of an address."""
MOST_REDIRECTS: Final = 3
MOST_AT_ONCE: Final = 64
"""Prompts whose images are fetched; more wait."""
HEAD_BYTES: Final = 32 << 10
READ_BYTES: Final = 64 << 10
SAFE: Final = "%/?:@!$&'()*+,;=[]~"
"""What an address has as it is sent, beside letters and digits."""
NAT64: Final = IPv6Network("64:ff9b::/96")
NOT_PUBLIC: Final = tuple(map(IPv6Network, ("64:ff9b:1::/48", "::/96", "::ffff:0:0:0/96", "fec0::/10", "5f00::/16")))
"""Networks that Python's own list lacks, wholly or in some versions: NAT64 of one's own (RFC 8215) and other forms of
IPv4 addresses, which lead to any; sites' own (fec0); segment routing (5f00)."""
CODE: Final = "image_not_fetched"
PORTS: Final = {"http": 80, "https": 443}

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""(host, port) -> its addresses."""


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, by the system's resolver. Raises OSError."""
    found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(slots=True)
class Fetcher:
    """`domains`: hosts that may be fetched from; (): all whose addresses are public. `seconds`: of a whole fetch."""

    domains: tuple[str, ...]
    seconds: float
    resolve: Resolve = resolve
    tls: ssl.SSLContext = field(default_factory=ssl.create_default_context)
    at_once: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(MOST_AT_ONCE))
    """For who holds the files of a prompt."""

    def __post_init__(self) -> None:
        "a".encode("idna")  # the codec is imported now: nothing is while requests run

    async def fetch(self, url: str, budget: "Budget") -> bytes:
        """What an http(s) address holds. Raises RequestError without a field."""
        try:
            with trio.fail_after(self.seconds):
                return await self._follow(url, budget)
        except trio.TooSlowError:
            raise refused(f"the image did not come within {self.seconds:g} seconds") from None
        except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError, UnicodeError) as error:
            # What the network said stays here: it might tell of hosts that a client cannot see.
            raise refused("the image's server cannot be reached, or does not answer as one") from error

    async def _follow(self, url: str, budget: "Budget") -> bytes:
        for _ in range(MOST_REDIRECTS + 1):
            answer = await self._get(self._checked(url), budget)
            if isinstance(answer, bytes):
                return answer
            try:
                url = urljoin(url, answer.target)
            except ValueError:
                raise refused("the image's server sends us on to what is no address") from None
        raise refused(f"more than {MOST_REDIRECTS} redirects")

    def _checked(self, url: str) -> SplitResult:
        """The address in parts. Raises RequestError for one that is not fetched whatever its host resolves to."""
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise refused("this is no address") from None
        if parts.scheme not in PORTS or not host or len(url) > MOST_CHARS or not url.isprintable() or " " in url:
            raise refused("an address must be http:// or https:// and a host")
        if parts.username is not None or parts.password is not None:
            raise refused("addresses with a user or a password are not fetched")
        if self.domains and not self._listed(host):
            raise refused(f"images are not fetched from {host[:100]} (--allowed-media-domains)")
        return parts

    def _listed(self, host: str) -> bool:
        return host.lower().rstrip(".") in self.domains

    async def _get(self, parts: SplitResult, budget: "Budget") -> "bytes | Redirect":
        """One request. Returns the body, or where the server sends us on to."""
        host = parts.hostname
        assert host is not None
        port = parts.port or PORTS[parts.scheme]
        addresses = await self.resolve(host, port)
        if not self._listed(host) and not all(map(is_public, addresses)):
            raise refused(f"{host[:100]} is not a public host")
        stream = await _connected(addresses, port)
        try:
            if parts.scheme == "https":
                stream = trio.SSLStream(stream, self.tls, server_hostname=host, https_compatible=True)
            return await _exchange(stream, parts, budget)
        finally:
            await trio.aclose_forcefully(stream)


@dataclass(frozen=True, slots=True)
class Redirect:
    """Where a server sends us on to."""

    target: str


@dataclass(slots=True)
class Budget:
    """Bytes that the images of one prompt may still have."""

    left: int

    def check(self, size: int) -> None:
        """Raise RequestError where `size` more are too many."""
        if size > self.left:
            raise RequestError(f"the prompt's images have more than {MOST_BYTES} bytes together", code="too_large")

    def take(self, size: int) -> None:
        """Raises as `check`."""
        self.check(size)
        self.left -= size


def hosts_of(domains: str | None) -> tuple[str, ...]:
    """--allowed-media-domains as Fetcher has them."""
    return tuple(host.strip().lower() for host in (domains or "").split(",") if host.strip())


def address_of(prompt: Prompt) -> ImageFile | None:
    """The first of a prompt's images that is to be fetched; None if there is none."""
    return next((file for file in _files(prompt) if file.url), None)


def not_fetched(file: ImageFile) -> RequestError:
    """The error of a server that fetches nothing."""
    text = "addresses are not fetched (--allow-image-urls); send the image itself, as data:image/png;base64,..."
    return RequestError(text, param=file.field, code="unsupported_value")


async def fetched(fetcher: Fetcher, prompt: Prompt) -> Prompt:
    """The prompt with its images and frames in the place of their addresses, all fetched at once.

    Raises RequestError naming the field of one that is not to be had.
    """
    files = dict.fromkeys(file for file in _files(prompt) if file.url)
    found, errors = dict[ImageFile, ImageFile](), list[RequestError]()
    budget = Budget(MOST_BYTES - sum(len(file.data) for file in _files(prompt)))
    async with trio.open_nursery() as nursery:
        for file in files:
            nursery.start_soon(partial(_fetch_one, fetcher, file, budget, found, errors, nursery.cancel_scope))
    if errors:
        raise errors[0]
    videos = tuple(replace(video, frames=tuple(found.get(f, f) for f in video.frames)) for video in prompt.videos)
    prompt = replace(prompt, images=tuple(found.get(f, f) for f in prompt.images), videos=videos)
    checked(_files(prompt))  # one that comes twice counts twice
    return prompt


async def _fetch_one(
    fetcher: Fetcher,
    file: ImageFile,
    budget: Budget,
    found: dict[ImageFile, ImageFile],
    errors: list[RequestError],
    others: trio.CancelScope,
) -> None:
    try:
        found[file] = ImageFile(await fetcher.fetch(file.url, budget), file.field)
    except RequestError as error:
        errors.append(RequestError(error.message, param=file.field, code=error.code))
        others.cancel()


def _files(prompt: Prompt) -> list[ImageFile]:
    return [*prompt.images, *(frame for video in prompt.videos for frame in video.frames)]


def refused(text: str) -> RequestError:
    """The error of an image that is not fetched."""
    return RequestError(text, code=CODE)


def is_public(text: str) -> bool:
    """Whether an address is one of the public internet, also the IPv4 address that is in some of IPv6."""
    address = ip_address(text.partition("%")[0])
    inner: list[IPv4Address | IPv6Address | None] = []
    if isinstance(address, IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in NAT64:
            inner.append(IPv4Address(int(address) & 0xFFFFFFFF))
        if any(address in network for network in NOT_PUBLIC):
            return False
    return all(one.is_global and not one.is_multicast for one in [address, *inner] if one is not None)


async def _connected(addresses: Sequence[str], port: int) -> trio.abc.Stream:
    """A connection to the first of the addresses that takes one. They are numbers: nothing is resolved again."""
    error: OSError = OSError("no addresses")
    for address in addresses:
        family = trio.socket.AF_INET6 if ":" in address else trio.socket.AF_INET
        socket = trio.socket.socket(family, trio.socket.SOCK_STREAM)
        try:
            await socket.connect((address, port))
            return trio.SocketStream(socket)
        except OSError as failed:
            socket.close()
            error = failed
        except BaseException:
            socket.close()
            raise
    raise error


async def _exchange(stream: trio.abc.Stream, parts: SplitResult, budget: Budget) -> bytes | Redirect:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES)
    target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=SAFE)
    headers = [
        ("Host", parts.netloc.rpartition("@")[2]), ("User-Agent", "actorserve"), ("Accept", "image/*"),
        ("Accept-Encoding", "identity"), ("Connection", "close"),
    ]  # fmt: skip
    try:
        request = h11.Request(method="GET", target=target, headers=headers)
    except h11.LocalProtocolError:
        raise refused("this is no address") from None
    await stream.send_all((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
    answer = await _next_event(stream, connection)
    while isinstance(answer, h11.InformationalResponse):
        answer = await _next_event(stream, connection)
    if not isinstance(answer, h11.Response):
        raise h11.RemoteProtocolError("no response")
    said = {name.lower(): value.decode("ascii", "replace") for name, value in answer.headers}
    if answer.status_code in (301, 302, 303, 307, 308) and b"location" in said:
        return Redirect(said[b"location"])
    if answer.status_code != 200:
        raise refused(f"the image's server answered {answer.status_code}")
    if said.get(b"content-encoding", "identity") != "identity":
        raise refused("the image's server answered with an encoding that it was not asked for")
    budget.check(int(said.get(b"content-length", "0")[:20]))
    body = bytearray()
    while isinstance(event := await _next_event(stream, connection), h11.Data):
        budget.take(len(event.data))
        body += event.data
    return bytes(body)


async def _next_event(stream: trio.abc.Stream, connection: h11.Connection) -> h11.Event:
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(READ_BYTES)))
        elif isinstance(event, h11.Event):
            return event
        else:
            raise h11.RemoteProtocolError("the server ended the connection")
