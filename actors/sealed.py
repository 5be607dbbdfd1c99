"""A TCP connection between two machines of one server: who is there proves it, and nothing that others wrote is read.

Used by gate.py, bridge.py and link.py. Before anything else both sides show by HMAC-SHA256 over fresh random numbers
that they have the key (--node-key-file); from then on what travels is cut into records, each with a MAC (keyed BLAKE2b,
a key for each direction of each connection) over its place in the stream and its bytes, so that none can be changed,
left out, repeated or brought from elsewhere. It is not encrypted: who can listen on the network can read it.
Invariant: no byte of the other side is interpreted, but for a record's length, before its MAC was right; of bytes that
have no right MAC yet no more is kept than a record and what is read at once.

    head   --MAGIC, number of 32 bytes-->      member
    head   <--MAGIC, number, the member's proof--
    head   --the head's proof-->
    both   records of [u32 length][16 bytes MAC][frames, cut anywhere]; a frame: [u8 kind][u32 epoch][u32 length][bytes]
"""

import contextlib
import hashlib
import hmac
import secrets
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import trio

from .lane import MAX_MESSAGE

MAGIC: Final = b"ACTNODE1"
NONCE: Final = 32
PROOF: Final = 32
MAX_RECORD: Final = 64 << 10
"""Bytes of a record's frames."""
AT_ONCE: Final = 256 << 10
"""Bytes read before what came is handed on."""
_MAC: Final = 16
_RECORD: Final = struct.Struct(f"<I{_MAC}s")
_FRAME: Final = struct.Struct("<BII")


class LinkLost(Exception):
    """The connection ended, or cannot be trusted any more; the text says why."""


class Keys(NamedTuple):
    """Those of one connection, as one of its sides has them."""

    sending: bytes
    receiving: bytes


class Frame(NamedTuple):
    """What travels: a message, and for which incarnation of whom. `kind` is the receiver's to know."""

    kind: int
    epoch: int
    payload: bytes


# ------------------------------------------------------------------ who is there


async def prove_as_head(stream: trio.abc.Stream, key: bytes) -> Keys:
    """The head's side. Raises LinkLost where the other one has not the key, trio's errors where it leaves."""
    ours = secrets.token_bytes(NONCE)
    await stream.send_all(MAGIC + ours)
    answer = await _exactly(stream, len(MAGIC) + NONCE + PROOF)
    theirs = answer[len(MAGIC) : -PROOF]
    if not answer.startswith(MAGIC) or not hmac.compare_digest(answer[-PROOF:], _proof(key, b"member", ours, theirs)):
        raise LinkLost("it has another key, or is no actorserve")
    await stream.send_all(_proof(key, b"head", ours, theirs))
    to_head, to_member = _session_keys(key, ours, theirs)
    return Keys(to_member, to_head)


async def prove_as_member(stream: trio.abc.Stream, key: bytes) -> Keys:
    """The other machine's side. Raises as `prove_as_head`."""
    greeting = await _exactly(stream, len(MAGIC) + NONCE)
    if not greeting.startswith(MAGIC):
        raise LinkLost("what answers there is no actorserve")
    theirs, ours = greeting[len(MAGIC) :], secrets.token_bytes(NONCE)
    await stream.send_all(MAGIC + ours + _proof(key, b"member", theirs, ours))
    try:
        proof = await _exactly(stream, PROOF)
    except LinkLost as error:
        raise LinkLost("it refuses our --node-key-file") from error
    if not hmac.compare_digest(proof, _proof(key, b"head", theirs, ours)):
        raise LinkLost("it has another key")
    to_head, to_member = _session_keys(key, theirs, ours)
    return Keys(to_head, to_member)


async def read_first(stream: trio.abc.Stream, keys: Keys) -> Frame:
    """The first frame, if it is all of the first record; not a byte more is read. Raises LinkLost."""
    opener = Opener(keys.receiving)
    head = await _exactly(stream, _RECORD.size)
    opener.feed(head)
    size, _ = _RECORD.unpack(head)
    frames = list(opener.feed(await _exactly(stream, size)))
    if len(frames) != 1:
        raise LinkLost("it does not say who it is")
    return frames[0]


def _proof(key: bytes, who: bytes, head: bytes, member: bytes) -> bytes:
    return hmac.digest(key, b"actorserve " + who + head + member, hashlib.sha256)


def _session_keys(key: bytes, head: bytes, member: bytes) -> tuple[bytes, bytes]:
    """(to the head, to the member)"""
    return _proof(key, b"to head", head, member), _proof(key, b"to member", head, member)


async def _exactly(stream: trio.abc.Stream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await stream.receive_some(size - len(data))
        if not more:
            raise LinkLost("it closed the connection")
        data += more
    return data


# ------------------------------------------------------------------ records


def _mac(key: bytes, number: int, body: bytes | memoryview) -> bytes:
    made = hashlib.blake2b(struct.pack("<QI", number, len(body)), key=key, digest_size=_MAC)
    made.update(body)
    return made.digest()


class Sealer:
    """Bytes to records."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0

    def seal(self, body: bytes | memoryview) -> bytes:
        """One record of at most MAX_RECORD bytes."""
        mac = _mac(self._key, self._number, body)
        self._number += 1
        return _RECORD.pack(len(body), mac) + body


class Opener:
    """Records to frames, as their bytes come."""

    def __init__(self, key: bytes, number: int = 0) -> None:
        """`number`: records that others took from the stream before."""
        self._key = key
        self._number = number
        self._sealed = bytearray()
        self._open = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take bytes; returns the frames that they complete. Raises LinkLost at the first wrong record, even unread."""
        sealed, place = self._sealed, 0
        sealed += data
        while len(sealed) - place >= _RECORD.size:
            size, mac = _RECORD.unpack_from(sealed, place)
            if not 0 < size <= MAX_RECORD:
                raise LinkLost(f"a record of {size} bytes")
            start = place + _RECORD.size
            if len(sealed) < start + size:
                break
            body = bytes(sealed[start : start + size])
            if not hmac.compare_digest(mac, _mac(self._key, self._number, body)):
                raise LinkLost("a record that it did not write")
            self._number += 1
            self._open += body
            place = start + size
        del sealed[:place]
        return iter(self._frames())

    def _frames(self) -> list[Frame]:
        frames, plain, place = [], self._open, 0
        while len(plain) - place >= _FRAME.size:
            kind, epoch, size = _FRAME.unpack_from(plain, place)
            if size > MAX_MESSAGE:
                raise LinkLost(f"a message of {size} bytes")
            start = place + _FRAME.size
            if len(plain) < start + size:
                break
            frames.append(Frame(kind, epoch, bytes(plain[start : start + size])))
            place = start + size
        del plain[:place]
        return frames


class SealedSocket:
    """A connection whose sides know each other. Never blocks. Not to be used any more after LinkLost."""

    def __init__(self, sock: socket.socket, keys: Keys, received: int = 0) -> None:
        """Takes ownership of `sock`. `received`: records that were read before (`read_first`)."""
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # a socket pair in a test has none
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._sealer = Sealer(keys.sending)
        self._opener = Opener(keys.receiving, received)
        self._plain = bytearray()
        self._sealed = bytearray()

    def fileno(self) -> int:
        """To wait for."""
        return self._socket.fileno()

    @property
    def backlog(self) -> int:
        """Bytes that were put and that the kernel has not taken."""
        return len(self._plain) + len(self._sealed)

    def put(self, kind: int, epoch: int, payload: bytes | memoryview) -> None:
        """Queue one frame; `flush` sends it."""
        self._plain += _FRAME.pack(kind, epoch, len(payload))
        self._plain += payload

    def flush(self) -> None:
        """Send what the kernel takes now. Raises LinkLost."""
        try:
            while self._sealed or self._plain:
                if not self._sealed:
                    self._sealed += self._sealer.seal(bytes(self._plain[:MAX_RECORD]))
                    del self._plain[:MAX_RECORD]
                del self._sealed[: self._socket.send(self._sealed)]
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkLost(f"the connection broke: {error.strerror}") from error

    def receive(self) -> Iterator[Frame]:
        """The frames that have come by now; waits for none. Raises LinkLost, also when the other side closed."""
        try:
            data = self._socket.recv(AT_ONCE)
        except BlockingIOError:
            return iter(())
        except OSError as error:
            raise LinkLost(f"the connection broke: {error.strerror}") from error
        if not data:
            raise LinkLost("the other machine closed the connection")
        return self._opener.feed(data)

    def close(self) -> None:
        """The other side sees the end."""
        self._socket.close()
