"""Cost of the prefix cache's operations, beside a plain Python trie of dicts with one level per token.

Run as `python -m actorserve.perf.radix [--json FILE] [--nodes N]`. Rule: both structures see the same sequences in
the same run, each figure is the median of many single calls, garbage collection is off while timing (the server
freezes its heap after start-up), and the trie is spared what the tree must do besides (pages, namespaces, splitting).
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np

from ..kvstore.pages import Int32Array, PagePool
from ..kvstore.radix import Match, Node, RadixTree

PAGE = 16
VOCABULARY = 49152
TARGETS_US = {
    "match 8192 tokens, one node": 100.0,
    "match + lock + insert + unlock, 1024 tokens": 200.0,
    "evict, per page, calls of 64": 10.0,
}


@dataclass(slots=True, eq=False)
class TrieNode:
    """One token of the baseline."""

    parent: "TrieNode | None" = None
    token: int = 0
    page: int = -1
    locks: int = 0
    used: int = 0
    children: "dict[int, TrieNode]" = field(default_factory=dict)


class Trie:
    """The obvious prefix cache: a dict per token, locks along the path, eviction by sorting all leaves by last use."""

    def __init__(self) -> None:
        self.root = TrieNode()
        self.clock = count()

    def match(self, tokens: list[int]) -> tuple[TrieNode, list[int]]:
        node, pages, now = self.root, [], next(self.clock)
        for token in tokens:
            child = node.children.get(token)
            if child is None:
                break
            child.used = now
            pages.append(child.page)
            node = child
        return node, pages

    def insert(self, tokens: list[int], pages: list[int]) -> TrieNode:
        node, now = self.root, next(self.clock)
        for i, token in enumerate(tokens):
            child = node.children.get(token)
            if child is None:
                child = node.children[token] = TrieNode(node, token, pages[i // PAGE])
            child.used = now
            node = child
        return node

    def lock(self, node: TrieNode | None, by: int) -> None:
        while node is not None:
            node.locks += by
            node = node.parent

    def lock_and_unlock(self, node: TrieNode) -> None:
        self.lock(node, 1)
        self.lock(node, -1)

    def serve(self, tokens: Int32Array, pages: list[int]) -> None:
        node, _ = self.match(tokens[:-1].tolist())
        self.lock(node, 1)
        self.insert(tokens.tolist(), pages)
        self.lock(node, -1)

    def evict(self, num_tokens: int) -> int:
        leaves, stack = [], [self.root]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if not node.children and not node.locks:
                leaves.append(node)
        leaves.sort(key=lambda n: n.used, reverse=True)
        freed = 0
        while leaves and freed < num_tokens:
            node = leaves.pop()
            while node.parent is not None and not node.children and not node.locks and freed < num_tokens:
                del node.parent.children[node.token]
                node, freed = node.parent, freed + 1
        return freed


def median_us(calls: int, operation: Callable[[int], object]) -> float:
    """Median time of single calls, each with its own argument 0..calls-1."""
    times = []
    gc.collect()
    gc.disable()
    for i in range(calls):
        start = time.perf_counter_ns()
        operation(i)
        times.append(time.perf_counter_ns() - start)
    gc.enable()
    return statistics.median(times) / 1000


class Requests:
    """A reproducible stream of token sequences: short ones, half behind one of 50 shared prompts of 960 tokens."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.heads = [self.tokens(960) for _ in range(50)]

    def tokens(self, n: int) -> Int32Array:
        return self.rng.integers(0, VOCABULARY, n, dtype=np.int32)

    def request(self, i: int, tail: int) -> Int32Array:
        return np.concatenate([self.heads[i % len(self.heads)], self.tokens(tail)])

    def history(self, n: int) -> Iterator[Int32Array]:
        """What was served before: nodes under the root and under the shared prompts, both of them wide."""
        for i in range(n):
            yield self.request(i, 24) if i % 2 else self.tokens(24)


class Server:
    """A tree, its pool, and the calls that a scheduler makes for one request."""

    def __init__(self, num_pages: int) -> None:
        self.pool = PagePool(num_pages)
        self.tree = RadixTree(self.pool, PAGE)

    def add(self, tokens: Int32Array) -> None:
        pages = self.pool.allocate(-(-len(tokens) // PAGE))
        self.pool.free(self.tree.insert(tokens, pages).duplicates)

    def serve(self, tokens: Int32Array) -> None:
        match = self.tree.match(tokens[:-1])
        self.tree.lock(match.node)
        fresh = self.pool.allocate(-(-len(tokens) // PAGE) - len(match.pages))
        done = self.tree.insert(tokens, np.concatenate([match.pages, fresh]))
        self.tree.unlock(match.node)
        self.pool.free(done.duplicates)

    def find(self, tokens: Int32Array, _: int) -> Match:
        return self.tree.match(tokens)

    def lock_and_unlock(self, node: Node) -> None:
        self.tree.lock(node)
        self.tree.unlock(node)


def measure_tree(nodes: int) -> dict[str, float]:
    load, server = Requests(), Server(4 * nodes + 20_000)
    tree, rows = server.tree, {}
    for tokens in load.history(nodes):
        server.add(tokens)
    assert tree.statistics().nodes >= nodes
    whole = load.tokens(8192)
    server.add(whole)
    rows["match 8192 tokens, one node"] = median_us(300, lambda _: tree.match(whole))
    rows["match_length 8192 tokens, one node"] = median_us(300, lambda _: tree.match_length(whole))
    for turns in (32, 512):
        chat = load.tokens(8192)
        for turn in range(1, turns + 1):
            server.add(chat[: 8192 // turns * turn])
        rows[f"match 8192 tokens, {turns} nodes in a row"] = median_us(100, partial(server.find, chat))
    misses = [load.tokens(8192) for _ in range(300)]
    rows["match 8192 tokens, a miss"] = median_us(300, lambda i: tree.match(misses[i]))
    requests = [load.request(i, 64) for i in range(1000)]
    rows["match + lock + insert + unlock, 1024 tokens"] = median_us(1000, lambda i: server.serve(requests[i]))
    node = tree.match(requests[0]).node
    rows["lock + unlock"] = median_us(300, lambda _: server.lock_and_unlock(node))
    rows["allocate + free 64 pages"] = median_us(300, lambda _: server.pool.free(server.pool.allocate(64)))
    rows["evict, per page, calls of 1"] = median_us(1000, lambda _: tree.evict(1))
    rows["evict, per page, calls of 64"] = median_us(300, lambda _: tree.evict(64)) / 64
    pages = tree.num_pages
    rows["evict, per page, all that is left"] = median_us(1, lambda _: tree.clear()) / max(pages, 1)
    return rows


def measure_trie(nodes: int) -> dict[str, float]:
    """Filled with the first tenth of the same sequences, for memory's sake: its cost per token does not depend on
    its size. Its eviction does (it visits every token): that figure flatters it tenfold."""
    load, trie, rows = Requests(), Trie(), {}
    pages = list(range(512))
    for tokens in load.history(nodes // 10):
        trie.insert(tokens.tolist(), pages)
    whole = load.tokens(8192)
    trie.insert(whole.tolist(), pages)
    rows["match 8192 tokens, one node"] = median_us(50, lambda _: trie.match(whole.tolist()))
    misses = [load.tokens(8192) for _ in range(50)]
    rows["match 8192 tokens, a miss"] = median_us(50, lambda i: trie.match(misses[i].tolist()))
    requests = [load.request(i, 64) for i in range(200)]
    rows["match + lock + insert + unlock, 1024 tokens"] = median_us(200, lambda i: trie.serve(requests[i], pages))
    node, _ = trie.match(requests[0].tolist())
    rows["lock + unlock"] = median_us(100, lambda _: trie.lock_and_unlock(node))
    rows["evict, per page, calls of 64"] = median_us(5, lambda _: trie.evict(64 * PAGE)) / 64
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="prefix cache: cost per operation beside a trie of dicts")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--nodes", type=int, default=100_000, help="nodes in the tree before timing")
    options = parser.parse_args()
    tree, trie = measure_tree(options.nodes), measure_trie(options.nodes)
    print(f"{options.nodes:,} nodes, pages of {PAGE}; median microseconds per call")
    print(f"{'':46}{'radix tree':>12}{'dict trie':>12}{'ratio':>8}{'target':>9}")
    for name, value in tree.items():
        other = f"{trie[name]:12.2f}{trie[name] / value:8.0f}" if name in trie else " " * 20
        target = f"{TARGETS_US[name]:9.0f}" if name in TARGETS_US else ""
        print(f"{name:46}{value:12.2f}{other}{target}")
    if options.json:
        figures = {"nodes": options.nodes, "radix_us": tree, "trie_us": trie, "targets_us": TARGETS_US}
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
