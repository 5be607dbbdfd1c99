"""Images by their addresses, from a stand-in server on this machine: what is fetched, and what is not, whoever asks."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio

from actorserve.actors import fetch
from actorserve.actors.fetch import Budget, Fetcher, address_of, fetched, hosts_of, is_public, not_fetched
from actorserve.actors.image_fields import MOST_BYTES
from actorserve.actors.messages import ImageFile, TextPrompt, VideoFile
from actorserve.errors import RequestError

Handler = Callable[[trio.SocketStream, str], Awaitable[None]]
IMAGE = bytes(range(256)) * 40


def reply(body: bytes, status: str = "200 OK", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


@contextlib.asynccontextmanager
async def server(handler: Handler, listens: bool = True) -> AsyncIterator[int]:
    """The port at which `handler` gets each connection, and the address that it was asked for."""

    async def serve(stream: trio.SocketStream) -> None:
        head = b""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while listens and b"\r\n\r\n" not in head:
                head += await stream.receive_some()
            assert not listens or (b"\r\nHost: " in head and b"\r\nConnection: close\r\n" in head)
            await handler(stream, head.split(b" ")[1].decode() if listens else "")
            await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def always(answer: bytes) -> Handler:
    async def handler(stream: trio.SocketStream, path: str) -> None:
        await stream.send_all(answer)

    return handler


def names(**hosts: str | list[str]) -> fetch.Resolve:
    """A resolver that knows these hosts; a list is what it says in turn."""

    async def resolve(host: str, port: int) -> list[str]:
        found = hosts[host.replace(".", "_")]
        return [found if isinstance(found, str) else found.pop(0)]

    return resolve


def fetcher(resolve: fetch.Resolve | None = None, domains: str = "localhost,127.0.0.1", seconds: float = 5) -> Fetcher:
    return Fetcher(hosts_of(domains), seconds, resolve or fetch.resolve)


def run(handler: Handler, use: Fetcher, url: str = "http://localhost:{}/a.png", most: int = MOST_BYTES) -> bytes:
    async def main() -> bytes | RequestError:
        async with server(handler) as port:
            try:
                return await use.fetch(url.format(port), Budget(most))
            except RequestError as error:
                return error

    found = trio.run(main)
    if isinstance(found, RequestError):
        raise found
    return found


def refusal(*args: Any, **more: Any) -> str:
    with pytest.raises(RequestError) as caught:
        run(*args, **more)
    assert caught.value.status == 400 and caught.value.code in ("image_not_fetched", "too_large")
    return caught.value.message


# ------------------------------------------------------------------ what is fetched


def test_an_image_comes_whatever_it_is_said_to_be() -> None:
    answer = reply(IMAGE, Content_Type="text/html", Content_Encoding="identity")
    assert run(always(answer), fetcher()) == IMAGE


def test_without_a_length_and_in_pieces() -> None:
    async def closing(stream: trio.SocketStream, path: str) -> None:
        assert path == "/a.png?size=3"
        await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
        for at in range(0, len(IMAGE), 1000):
            await stream.send_all(IMAGE[at : at + 1000])

    assert run(closing, fetcher(), "http://localhost:{}/a.png?size=3#part") == IMAGE

    async def named(stream: trio.SocketStream, path: str) -> None:
        await stream.send_all(reply(path.encode()))

    assert run(named, fetcher(), "http://localhost:{}/%20ü?a=b%2Fc") == b"/%20%C3%BC?a=b%2Fc"
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    assert run(always(chunked), fetcher()) == b"hello"


def test_redirects_are_followed_some_of_them() -> None:
    async def handler(stream: trio.SocketStream, path: str) -> None:
        left = int(path[1:])
        answer = reply(b"", "302 Found", Location=f"/{left - 1}") if left else reply(IMAGE)
        await stream.send_all(answer)

    most = fetch.MOST_REDIRECTS
    assert run(handler, fetcher(), f"http://localhost:{{}}/{most}") == IMAGE
    assert "redirects" in refusal(handler, fetcher(), f"http://localhost:{{}}/{most + 1}")


def test_all_images_of_a_prompt_at_once_others_as_they_are() -> None:
    """Each of three answers only when all were asked for; one that comes twice is fetched once."""

    async def main() -> None:
        asked, all_asked = list[str](), trio.Event()

        async def handler(stream: trio.SocketStream, path: str) -> None:
            asked.append(path)
            if len(asked) == 3:
                all_asked.set()
            await all_asked.wait()
            await stream.send_all(reply(path.encode()))

        async with server(handler) as port:
            files = [ImageFile(b"", f"field{i}", f"http://localhost:{port}/{i}") for i in range(3)]
            here = ImageFile(b"here", "field")
            prompt = TextPrompt("", images=(files[0], here, files[0]), videos=(VideoFile(tuple(files[1:]), "video"),))
            assert address_of(prompt) == files[0]
            found = await fetched(fetcher(), prompt)
        assert [image.data for image in found.images] == [b"/0", b"here", b"/0"]
        assert [frame.data for frame in found.videos[0].frames] == [b"/1", b"/2"]
        assert address_of(found) is None and sorted(asked) == ["/0", "/1", "/2"]

    trio.run(main)


# ------------------------------------------------------------------ what is not


ADDRESSES = """127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255
192.0.2.1 ::1 :: fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b::a00:1
2002:7f00:1:: 2001:db8::1 64:ff9b:1::7f00:1 64:ff9b:1:ffff::a00:1 ::127.0.0.1 ::ffff:0:7f00:1 fec0::1 5f00::1""".split()


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "64:ff9b::101:101"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


OURS = """http://localhost:{}/ http://127.0.0.1:{}/ http://[::1]:{}/ http://[::ffff:127.0.0.1]:{}/ http://2130706433:{}/
http://0x7f.1:{}/ http://0177.0.0.1:{}/ http://0:{}/ http://LOCALHOST.:{}/""".split()


@pytest.mark.parametrize("url", OURS)
def test_this_machine_is_not_asked_whatever_it_is_called(url: str) -> None:
    """Nor is it told what is there."""

    async def handler(stream: trio.SocketStream, path: str) -> None:
        raise AssertionError("it was asked")

    message = refusal(handler, fetcher(domains=""), url)
    assert "not a public host" in message or "cannot be reached" in message


def test_one_private_address_among_public_ones_is_enough() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["1.1.1.1", "10.0.0.1"]

    assert "not a public host" in refusal(always(reply(IMAGE)), fetcher(resolve, ""), "http://a.example:{}/")


def test_a_redirect_to_this_machine_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A public host, as far as its name says, sends us on to one that is not."""
    seen = []

    async def handler(stream: trio.SocketStream, path: str) -> None:
        seen.append(path)
        await stream.send_all(reply(b"", "302 Found", Location="http://inner.example:1/secret"))

    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")  # where the stand-in is
    use = fetcher(names(outer_example="127.0.0.1", inner_example="10.0.0.1"), "")
    assert "inner.example is not a public host" in refusal(handler, use, "http://outer.example:{}/a")
    assert seen == ["/a"]


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://localhost/a", "gopher://localhost:1/", "//[::1", "data:,a"]
)
def test_a_redirect_to_something_else_is_not_followed(target: str) -> None:
    message = refusal(always(reply(b"", "302 Found", Location=target)), fetcher())
    assert "must be http" in message or "no address" in message


def test_a_name_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when it is looked at, and this machine a moment later (DNS rebinding)."""
    connected = []

    async def connect(addresses: list[str], port: int) -> trio.abc.Stream:
        connected.extend(addresses)
        raise OSError("nobody there")

    monkeypatch.setattr(fetch, "_connected", connect)
    turns = ["1.1.1.1", "127.0.0.1"]
    assert "cannot be reached" in refusal(
        always(reply(IMAGE)), fetcher(names(a_example=turns), ""), "http://a.example:{}/"
    )
    assert connected == ["1.1.1.1"] and turns == ["127.0.0.1"]
    message = refusal(always(reply(IMAGE)), fetcher(names(a_example=turns), ""), "http://a.example:{}/")
    assert "not a public host" in message and len(connected) == 1


def test_only_listed_domains_where_there_is_a_list() -> None:
    use = fetcher(domains=" LocalHost ,images.example")
    assert run(always(reply(IMAGE)), use) == IMAGE
    assert "--allowed-media-domains" in refusal(always(reply(IMAGE)), use, "http://127.0.0.1:{}/")
    assert "--allowed-media-domains" in refusal(always(reply(IMAGE)), use, "http://a.images.example:{}/")
    elsewhere = always(reply(b"", "302 Found", Location="http://other.example/"))
    assert "--allowed-media-domains" in refusal(elsewhere, use)


SENSELESS = (
    """http:///a http://user@localhost:{}/ http://u:p@localhost:{}/ http://localhost:99999/ http://[zz]/""".split()
)


@pytest.mark.parametrize(
    "url",
    [
        *SENSELESS,
        "http://local host/",
        "http://localhost:{}/a\r\nX: y",
        "http://localhost:{}/\x00",
        "http://" + "a" * 9000,
    ],
)
def test_addresses_that_make_no_sense(url: str) -> None:
    refusal(always(reply(IMAGE)), fetcher(), url)


# ------------------------------------------------------------------ servers of bad will


async def endless(stream: trio.SocketStream, path: str) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        await stream.send_all(bytes(1 << 16))


async def endless_head(stream: trio.SocketStream, path: str) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\n")
    while True:
        await stream.send_all(b"X-A: " + b"a" * 1000 + b"\r\n")


async def endless_hints(stream: trio.SocketStream, path: str) -> None:
    while True:
        await stream.send_all(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await trio.sleep(0.01)


async def silent(stream: trio.SocketStream, path: str) -> None:
    await trio.sleep_forever()


async def slow(stream: trio.SocketStream, path: str) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
    while True:
        await stream.send_all(b"a")
        await trio.sleep(0.05)


HUGE = b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n"


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (endless, "more than"),
        (always(HUGE + bytes(1000)), "more than"),
        (always(b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 500 + b"\r\n\r\n"), ""),
        (endless_head, "does not answer as one"),
        (endless_hints, "within"),
        (silent, "within"),
        (slow, "within"),
        (always(b""), "does not answer as one"),
        (always(b"SSH-2.0-OpenSSH\r\n"), "does not answer as one"),
        (always(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"), "does not answer as one"),
        (always(reply(IMAGE, "404 Not Found")), "answered 404"),
        (always(reply(b"", "302 Found")), "answered 302"),
        (always(reply(IMAGE, Content_Encoding="gzip")), "encoding"),
    ],
)
def test_servers_of_bad_will(handler: Handler, message: str) -> None:
    """An end in bounded time and memory, and words that say nothing of what else is on the network."""
    assert message in refusal(handler, fetcher(seconds=0.5), most=1 << 20)


def test_images_of_a_prompt_share_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MOST_BYTES", 3 * len(IMAGE))

    async def main() -> None:
        async with server(always(reply(IMAGE))) as port:
            files = tuple(ImageFile(b"", f"image{i}", f"http://localhost:{port}/{i}") for i in range(3))
            assert len((await fetched(fetcher(), TextPrompt("", images=files))).images) == 3
            with pytest.raises(RequestError, match="bytes together") as caught:
                await fetched(fetcher(), TextPrompt("", images=(*files, ImageFile(b"one", "x"))))
            assert caught.value.param in ("image0", "image1", "image2") and caught.value.code == "too_large"

    trio.run(main)


def test_a_slow_server_delays_nobody_else() -> None:
    async def main() -> None:
        async with server(silent) as port, server(always(reply(IMAGE))) as quick:
            use = fetcher(seconds=60)
            with trio.move_on_after(60) as scope:
                async with trio.open_nursery() as nursery:
                    for _ in range(50):
                        nursery.start_soon(use.fetch, f"http://localhost:{port}/", Budget(9))
                    assert await use.fetch(f"http://localhost:{quick}/", Budget(MOST_BYTES)) == IMAGE
                    nursery.cancel_scope.cancel()
            assert not scope.cancelled_caught

    trio.run(main)


def test_tls_knows_its_host() -> None:
    """A server without a certificate for the name is not asked for anything."""

    async def main() -> None:
        async with server(always(reply(IMAGE)), listens=False) as port:
            with pytest.raises(RequestError, match="cannot be reached"):
                await fetcher().fetch(f"https://localhost:{port}/", Budget(MOST_BYTES))

    trio.run(main)


def test_off_is_said_with_the_flag() -> None:
    error = not_fetched(ImageFile(b"", "messages[0]", "http://localhost/"))
    assert error.param == "messages[0]" and "--allow-image-urls" in error.message
