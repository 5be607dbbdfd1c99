"""TokenizerTables: the tokens of one tokenizer as bytes, sorted and as a trie, for compiling grammars.

Built once per tokenizer and shared by all grammars; used by token_walk.py and canonical.py. The trie's nodes are
numbered level by level, because all nodes of a level are visited at once; sorted by bytes, the tokens below a node are
a range. Invariant: a token without bytes (special, unused, padding) is in none of the tables, so no mask ever has it.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .alphabet import Int32Array, Int64Array

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TokenizerTables:
    """The tables. N nodes of the trie, V token ids, U tokens with bytes."""

    size: int
    """V: one more than the highest id that a logit has."""
    eos: tuple[int, ...]
    """Ids that end an output."""
    data: bytes
    """The bytes of all tokens in the order of `order`, joined."""
    offsets: Int64Array
    """int64 [U + 1]: where each begins in `data`."""
    order: Int32Array
    """int32 [U]: token ids, sorted by bytes, then id."""
    place: Int32Array
    """int32 [V]: the place of each id in `order`, -1 for tokens without bytes."""
    node: Int32Array
    """int32 [U]: the trie node at which each token of `order` ends."""
    parent: Int32Array
    """int32 [N]; node 0 is the root."""
    byte: npt.NDArray[np.uint8]
    """uint8 [N]: the byte between parent and node."""
    levels: tuple[int, ...]
    """The nodes of depth d are levels[d] to levels[d + 1] - 1."""
    has_longer: BoolArray
    """bool [V]: the token is a proper prefix of another one."""
    alone: BoolArray
    """bool [256]: the byte is a token of its own."""
    fingerprint: str
    """Equal for equal tokens, eos ids and sizes."""

    @property
    def words(self) -> int:
        """32-bit words of a mask row."""
        return -(-self.size // 32)

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of a token, None if it has none."""
        if not 0 <= token < self.size or (place := int(self.place[token])) < 0:
            return None
        return self._at(place)

    def longer(self, prefix: bytes) -> Int32Array:
        """The ids of all tokens that begin with these bytes and are longer."""
        return self.order[self._bisect(prefix, longer=False) : self._bisect(prefix, longer=True)]

    def _at(self, place: int) -> bytes:
        return self.data[self.offsets.item(place) : self.offsets.item(place + 1)]

    def _bisect(self, prefix: bytes, longer: bool) -> int:
        """The first place whose token is greater than the prefix, and with `longer` doesn't begin with it either."""
        low, high = 0, len(self.order)
        while low < high:
            middle = (low + high) // 2
            token = self._at(middle)
            if token <= prefix or (longer and token.startswith(prefix)):
                low = middle + 1
            else:
                high = middle
        return low


def build_tables(tokens: Sequence[bytes | None], eos: Iterable[int]) -> TokenizerTables:
    """Return the tables of a tokenizer.

    tokens: what each id adds to the output, None or b"" for ids that a grammar must never use (added tokens, as special
    ones and <tool_call>, which mean more than their text; ids beyond the vocabulary); in SentencePiece vocabularies
    with a space for each ▁, and one byte for <0xNN>. eos: the ids that end an output, whatever their bytes.
    """
    ends = tuple(sorted({i for i in eos if 0 <= i < len(tokens)}))
    usable = [(token, i) for i, token in enumerate(tokens) if token and i not in ends]
    usable.sort()
    joined = b"".join([token for token, _ in usable])
    data = np.frombuffer(joined, np.uint8)
    lengths = np.fromiter((len(token) for token, _ in usable), np.int64, len(usable))
    order = np.fromiter((i for _, i in usable), np.int32, len(usable))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    place = np.full(len(tokens), -1, np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    node, parent, byte, levels = _trie(data, offsets[:-1], lengths)
    has_child = np.zeros(len(parent), np.bool_)
    has_child[parent[1:]] = True
    has_longer = np.zeros(len(tokens), np.bool_)
    has_longer[order] = has_child[node]
    alone = np.zeros(256, np.bool_)
    alone[data[offsets[:-1][lengths == 1]]] = True
    digest = hashlib.blake2b(joined, digest_size=16)
    for array in (np.array([len(tokens), *ends], np.int64), order, lengths):
        digest.update(array.tobytes())
    return TokenizerTables(
        len(tokens), ends, joined, offsets, order, place, node, parent, byte, levels, has_longer, alone,
        digest.hexdigest(),
    )  # fmt: skip


def _trie(
    data: npt.NDArray[np.uint8], starts: Int64Array, lengths: Int64Array
) -> tuple[Int32Array, Int32Array, npt.NDArray[np.uint8], tuple[int, ...]]:
    """(node of each token, parent and byte of each node, first node of each level) of sorted tokens."""
    at = np.zeros(len(starts), np.int32)  # the node that each token has reached
    alive = np.arange(len(starts))
    parents, read, levels = [np.zeros(1, np.int32)], [np.zeros(1, np.uint8)], [0, 1]
    depth = 0
    while len(alive := alive[lengths[alive] > depth]):
        byte, parent = data[starts[alive] + depth], at[alive]
        new = np.ones(len(alive), np.bool_)  # tokens are sorted: equal prefixes are neighbours
        new[1:] = (parent[1:] != parent[:-1]) | (byte[1:] != byte[:-1])
        at[alive] = levels[-1] + np.cumsum(new, dtype=np.int32) - 1
        parents.append(parent[new])
        read.append(byte[new])
        levels.append(levels[-1] + len(parents[-1]))
        depth += 1
    return at, np.concatenate(parents), np.concatenate(read), tuple(levels)
