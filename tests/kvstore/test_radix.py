"""RadixTree against kvstore/reference.py and against a simulated KV store.

`Engine` plays scheduler and executor: requests match, copy the partial page, compute, insert as they run and at the
end; every KV slot holds the whole prefix that it stands for, and freed pages are scribbled over. So whatever the tree
says can be checked for what counts: that each matched page really holds the KV of the tokens asked for.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from actorserve.kvstore.eviction import make_policy
from actorserve.kvstore.pages import PagePool
from actorserve.kvstore.radix import Inserted, Match, Node, RadixTree
from actorserve.kvstore.reference import Path, ReferenceCache
from examples import examples

Tokens = tuple[int, ...]


def ids(tokens: Tokens | range | str) -> np.ndarray:
    """int32 token ids; of a string, its characters' codes."""
    return np.array([ord(t) if isinstance(t, str) else t for t in tokens], np.int32)


def true_logprobs(tokens: Tokens, namespace: str) -> np.ndarray:
    """float32 [n, 3]: numbers for each prefix."""
    numbers = np.array([hash((namespace, tokens[: i + 1])) % 9973 for i in range(len(tokens))], np.float32)
    return numbers[:, None] + np.float32(0.25) * np.arange(3, dtype=np.float32)


class Store(PagePool):
    """A pool with simulated KV: slot j of a page holds (namespace, all tokens up to it), or None."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        super().__init__(num_pages)
        self.kv: list[list[Any]] = [[None] * page_size for _ in range(num_pages)]
        self.freed: list[int] = []

    def free(self, pages: Any) -> None:
        super().free(pages)
        for page in np.asarray(pages).tolist():
            self.kv[page] = [None] * len(self.kv[page])
            self.freed.append(page)


@dataclass(eq=False)
class Request:
    namespace: str
    tokens: Tokens
    pages: list[int]
    owned: list[bool]
    computed: int
    node: Node
    path: Path


class Engine:
    """Tree, reference and simulated KV in step. Every method asserts that tree and reference agree."""

    def __init__(self, page_size: int, num_pages: int = 24, policy: str = "lru") -> None:
        self.size = page_size
        self.pool = Store(num_pages, page_size)
        self.tree = RadixTree(self.pool, page_size, make_policy(policy))
        self.reference = ReferenceCache(page_size, least_hits_first=policy == "lfu")
        self.running: list[Request] = []

    def match(self, tokens: Tokens, namespace: str = "") -> tuple[Match, Path]:
        length = self.tree.match_length(ids(tokens), namespace)
        match = self.tree.match(ids(tokens), namespace)
        pages, partial, candidates, path = self.reference.match(tokens, namespace)
        assert match.pages.dtype == np.int32 and match.pages.tolist() == pages
        assert match.partial_tokens == partial and match.partial_page in candidates
        assert match.length == length == self.size * len(pages) + partial
        self.check_path(match.node, path)
        whole = len(pages) * self.size
        assert self.read(pages) == [(namespace, tokens[: i + 1]) for i in range(whole)]
        if partial:
            slots = self.pool.kv[match.partial_page][:partial]
            assert slots == [(namespace, tokens[: whole + i + 1]) for i in range(partial)]
        return match, path

    def check_logprobs(self, tokens: Tokens, namespace: str) -> np.ndarray:
        """What the tree knows of the tokens' logprobs: of as many as it has, and never another prefix's."""
        found = self.tree.logprobs(ids(tokens), 3, namespace)
        assert np.array_equal(found[:, :1], self.tree.logprobs(ids(tokens), 1, namespace), equal_nan=True)
        assert found.dtype == np.float32 and len(found) == self.tree.match_length(ids(tokens), namespace)
        known = ~np.isnan(found)
        assert np.array_equal(found[known], true_logprobs(tokens, namespace)[: len(found)][known])
        return found

    def read(self, pages: list[int]) -> list[Any]:
        return [slot for page in pages for slot in self.pool.kv[page]]

    def evict(self, num_pages: int) -> None:
        self.pool.freed.clear()
        expected = self.reference.evict(num_pages)
        assert self.tree.evict(num_pages) == len(expected)
        assert sorted(self.pool.freed) == sorted(expected)

    def allocate(self, n: int) -> list[int] | None:
        """Pages of garbage, evicting for them; None if there are not enough."""
        if n > self.pool.num_free + self.tree.num_evictable:
            return None
        self.evict(n - self.pool.num_free)
        return self.pool.allocate(n).tolist()

    def admit(self, tokens: Tokens, namespace: str = "") -> Request | None:
        """As the scheduler does: all but the last token may come from the cache."""
        match, path = self.match(tokens[:-1], namespace)
        copied = self.pool.kv[match.partial_page][: match.partial_tokens]  # all sources are read before any write
        self.lock(match.node, path)
        fresh = self.allocate(-(-len(tokens) // self.size) - len(match.pages))
        if fresh is None:
            self.unlock(match.node, path)
            return None
        if match.partial_tokens:
            self.pool.kv[fresh[0]][: match.partial_tokens] = copied
        owned = [False] * len(match.pages) + [True] * len(fresh)
        request = Request(namespace, tokens, match.pages.tolist() + fresh, owned, match.length, match.node, path)
        self.running.append(request)
        return request

    def compute(self, request: Request, n: int) -> None:
        """Writes the KV of the next n tokens in place; only pages of its own may be written."""
        for i in range(request.computed, min(request.computed + n, len(request.tokens))):
            page = i // self.size
            assert request.owned[page]
            self.pool.kv[request.pages[page]][i % self.size] = (request.namespace, request.tokens[: i + 1])
            request.computed = i + 1

    def generate(self, request: Request, tokens: Tokens) -> bool:
        fresh = self.allocate(-(-(len(request.tokens) + len(tokens)) // self.size) - len(request.pages))
        if fresh is None:
            return False
        request.tokens += tokens
        request.pages += fresh
        request.owned += [True] * len(fresh)
        return True

    def insert(self, request: Request, length: int) -> Inserted:
        tokens, count = request.tokens[:length], -(-length // self.size)
        pages = request.pages[:count]
        self.pool.freed.clear()
        done = self.tree.insert(ids(tokens), np.array(pages, np.int32), request.namespace)
        taken_from, path, freed = self.reference.insert(tokens, pages, request.namespace)
        assert done.taken_from == taken_from and self.pool.freed == freed
        # The contract's account of who owns what and the list of duplicates must say the same.
        owned = request.owned[:taken_from] + [False] * (count - taken_from)
        assert owned == [page in done.duplicates for page in pages]
        request.owned[:count] = owned
        self.check_path(done.node, path)
        self.lock(done.node, path)
        self.unlock(request.node, request.path)
        request.node, request.path = done.node, path
        return done

    def insert_running(self, request: Request) -> Inserted:
        return self.insert(request, request.computed // self.size * self.size)

    def finish(self, request: Request) -> Inserted:
        done = self.insert(request, request.computed)
        self.release(request)
        return done

    def release(self, request: Request) -> None:
        self.running.remove(request)
        self.unlock(request.node, request.path)
        self.pool.free([page for page, own in zip(request.pages, request.owned, strict=True) if own])

    def lock(self, node: Node, path: Path) -> None:
        self.tree.lock(node)
        self.reference.lock(path)

    def unlock(self, node: Node, path: Path) -> None:
        self.tree.unlock(node)
        self.reference.unlock(path)

    def run(self, tokens: Tokens, namespace: str = "") -> Inserted:
        """A whole request with nothing beside it."""
        request = self.admit(tokens, namespace)
        assert request is not None
        self.compute(request, len(tokens))
        return self.finish(request)

    def warm(self, tokens: Tokens, namespace: str = "") -> None:
        """Inserts a computed sequence that nobody locks, without a match before."""
        fresh = self.allocate(-(-len(tokens) // self.size))
        if fresh is None:
            return
        for i in range(len(tokens)):
            self.pool.kv[fresh[i // self.size]][i % self.size] = (namespace, tokens[: i + 1])
        done = self.tree.insert(ids(tokens), np.array(fresh, np.int32), namespace)
        taken_from, path, _ = self.reference.insert(tokens, fresh, namespace)
        assert done.taken_from == taken_from and done.duplicates.tolist() == fresh[:taken_from]
        self.check_path(done.node, path)
        self.pool.free(done.duplicates)

    def check_path(self, node: Node, path: Path) -> None:
        below: list[int] = []
        while node.parent is not None:
            below = [*node.tokens.tolist(), *below]
            node = node.parent
        assert tuple(below) == path.tokens and node.namespace == path.namespace

    def check(self) -> None:
        self.tree.check()
        self.pool.check()
        assert self.tree.num_pages == self.reference.num_pages
        assert self.tree.num_evictable == self.reference.num_evictable
        in_tree = {entry.page for entry in self.reference.entries.values()}
        owned = [p for r in self.running for p, own in zip(r.pages, r.owned, strict=True) if own]
        assert len(set(owned)) == len(owned) and not in_tree & set(owned)
        assert not self.pool.is_free(owned).any()
        assert self.pool.num_free + len(in_tree) + len(owned) == self.pool.num_pages
        for (namespace, key), entry in self.reference.entries.items():
            start = (len(key) - 1) // self.size * self.size
            slots = self.pool.kv[entry.page][: len(key) - start]
            assert slots == [(namespace, key[: i + 1]) for i in range(start, len(key))]
        for r in self.running:
            slots = self.read(r.pages)[: r.computed]
            assert slots == [(r.namespace, r.tokens[: i + 1]) for i in range(r.computed)]


NAMESPACES = st.sampled_from(["", "", "", "salt"])


class RadixMachine(RuleBasedStateMachine):
    """Interleaved requests over a small alphabet. Subclasses set the page size and the policy."""

    page_size = 4
    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(self.page_size, 24, self.policy)
        self.history: list[Tokens] = [()]

    def draw_tokens(self, data: st.DataObject, pages: int) -> Tokens:
        """Runs of equal tokens, so that long prefixes in common are likely."""
        run = st.tuples(st.integers(1, 2), st.integers(1, max(1, self.page_size * 3 // 4)))
        return tuple(t for token, n in data.draw(st.lists(run, max_size=2 * pages)) for t in (token,) * n)

    def pick(self, data: st.DataObject) -> Request:
        return data.draw(st.sampled_from(self.engine.running))

    def draw_prompt(self, data: st.DataObject) -> Tokens:
        """A new prompt, a cut earlier one, or one with more text behind it (a chat's next turn)."""
        earlier = data.draw(st.sampled_from(self.history))
        cut = data.draw(st.one_of(st.just(len(earlier)), st.integers(0, len(earlier))))
        return (*earlier[:cut], *self.draw_tokens(data, 3), 3)[: 12 * self.page_size]

    @rule(data=st.data(), namespace=NAMESPACES)
    def admit(self, data: st.DataObject, namespace: str) -> None:
        self.engine.admit(self.draw_prompt(data), namespace)

    @rule(data=st.data(), namespace=NAMESPACES)
    def warm(self, data: st.DataObject, namespace: str) -> None:
        tokens = self.draw_prompt(data)
        self.engine.warm(tokens, namespace)
        self.history.append(tokens)

    @rule(data=st.data(), namespace=NAMESPACES)
    def match(self, data: st.DataObject, namespace: str) -> None:
        tokens = self.draw_prompt(data)
        self.engine.match(tokens, namespace)
        self.engine.check_logprobs(tokens, namespace)

    @rule(data=st.data(), namespace=NAMESPACES)
    def keep_logprobs(self, data: st.DataObject, namespace: str) -> None:
        tokens = self.draw_prompt(data)
        columns = data.draw(st.integers(1, 3))
        chance = np.random.default_rng(data.draw(st.integers(0, 99)))
        kept = (chance.random((len(tokens), 1)) < 0.7) & (np.arange(3) < columns)
        values = np.where(kept, true_logprobs(tokens, namespace), np.float32(np.nan))[:, :columns]
        before = self.engine.check_logprobs(tokens, namespace)
        self.engine.tree.keep_logprobs(ids(tokens), values, namespace)
        after = self.engine.check_logprobs(tokens, namespace)
        known = kept[: len(before)] | ~np.isnan(before)
        assert np.array_equal(~np.isnan(after), known), "as much as before, and what was given"

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def compute(self, data: st.DataObject) -> None:
        request = self.pick(data)
        self.engine.compute(request, data.draw(st.sampled_from([1, self.page_size, 99])))

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def generate(self, data: st.DataObject) -> None:
        request = self.pick(data)
        if self.engine.generate(request, self.draw_tokens(data, 1)):
            self.engine.compute(request, 99)

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def insert_running(self, data: st.DataObject) -> None:
        self.engine.insert_running(self.pick(data))

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def insert_tail_and_run_on(self, data: st.DataObject) -> None:
        """A lock on a partial leaf. The request itself goes on in a new page, as it has given its tail away."""
        request = self.pick(data)
        tail = request.computed % self.page_size
        last = request.computed // self.page_size
        self.engine.insert(request, request.computed)
        if tail and not request.owned[last]:
            fresh = self.engine.allocate(1)
            if fresh is None:
                return self.engine.release(request)
            self.engine.pool.kv[fresh[0]][:tail] = self.engine.pool.kv[request.pages[last]][:tail]
            request.pages[last], request.owned[last] = fresh[0], True
        return None

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = self.pick(data)
        self.history.append(request.tokens)
        self.engine.finish(request)

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.release(self.pick(data))

    @rule(num_pages=st.integers(0, 30))
    def evict(self, num_pages: int) -> None:
        self.engine.evict(num_pages)

    @rule()
    def clear(self) -> None:
        tree = self.engine.tree
        if tree.num_evictable < tree.num_pages:
            with pytest.raises(ValueError, match="locked"):
                tree.clear()
        elif not self.engine.running:
            tree.clear()
            self.engine.reference.evict(99)
            assert tree.snapshot() == [] and self.engine.pool.num_free == 24

    @invariant()
    def all_is_well(self) -> None:
        self.engine.check()


def machine(size: int, policy_name: str, count: int) -> Any:
    class Machine(RadixMachine):
        page_size = size
        policy = policy_name

    case = Machine.TestCase
    case.settings = settings(max_examples=count, stateful_step_count=40, deadline=None)
    return case


TestPages4 = machine(4, "lru", examples(80, 40))
TestPages16 = machine(16, "lru", examples(40, 20))
TestPages1 = machine(1, "lru", 20)
TestLeastHits = machine(4, "lfu", examples(40, 20))


# ---------------------------------------------------------------------- the tricky cases, one by one


@pytest.fixture
def engine() -> Any:
    """Pages of 4 tokens; every test ends with a full check."""
    engine = Engine(4, 40)
    yield engine
    engine.check()


def chars(text: str) -> Tokens:
    return tuple(ord(c) for c in text)


def edges(engine: Engine) -> list[str]:
    """The tree as text, depth first: two spaces per level, a bar between pages, * for each lock."""

    def show(node: Node, depth: int) -> list[str]:
        text = "".join(map(chr, node.tokens))
        pages = "|".join(text[i : i + engine.size] for i in range(0, len(text), engine.size))
        below = [line for key in sorted(node.children) for line in show(node.children[key], depth + 1)]
        return ["  " * depth + pages + "*" * node.locks, *below]

    roots = [engine.tree._roots[name] for name in sorted(engine.tree._roots)]
    return [line for root in roots for child in root.children.values() for line in show(child, 0)]


def test_empty_tree_and_empty_sequences(engine: Engine) -> None:
    match, _ = engine.match(chars("abc"))
    assert match.length == 0 and match.pages.tolist() == []
    engine.tree.lock(match.node)
    engine.tree.unlock(match.node)
    assert engine.tree.insert(ids(""), ids("")).taken_from == 0
    assert engine.tree.evict(5) == 0 and engine.tree.snapshot() == []
    engine.run(chars("abcdefg"))
    assert engine.match(())[0].length == 0


def test_whole_pages_and_a_tail(engine: Engine) -> None:
    assert engine.run(chars("aaaabbbbcc")).taken_from == 0
    assert edges(engine) == ["aaaa|bbbb|cc"]
    assert engine.match(chars("aaaabbbbcc"))[0].length == 10
    assert edges(engine) == ["aaaa|bbbb", "  cc"]  # so that a lock on the match leaves the tail free


def test_divergence_inside_a_page_is_found_by_order(engine: Engine) -> None:
    """Children that share the first tokens of their first page each have it in a page of their own."""
    for text in ("aaaabbbb1", "aaaabbxx1", "aaaabyyy1", "aaaazzzz1"):
        engine.run(chars(text))
    assert edges(engine) == ["aaaa", "  bbbb|1", "  bbxx|1", "  byyy|1", "  zzzz|1"]
    match, _ = engine.match(chars("aaaabbxy"))
    assert (len(match.pages), match.partial_tokens) == (1, 3)
    assert engine.match(chars("aaaaby"))[0].partial_tokens == 2
    assert engine.match(chars("aaaac"))[0].partial_page == -1
    assert engine.match(chars("a"))[0].partial_tokens == 1


@pytest.mark.parametrize("low", [0, 1, 255, 256, 65535, 2**31 - 1])
def test_neighbours_in_byte_order_are_nearest_for_any_ids(low: int) -> None:
    """Byte order of little-endian ids is not numeric order; the longest common prefix is beside it all the same."""
    engine = Engine(4, 64)
    ids_used = [0, 1, 2, 255, 256, 257, 65535, 65536, 2**24, 2**31 - 1]
    for a in (low, 1, 256):
        for b in ids_used[:4]:
            engine.run((a, b, low, b, 7))
    for a in (low, *ids_used):
        for b in ids_used:
            engine.match((a, b, low, low))
    engine.check()


def test_divergence_inside_an_edge(engine: Engine) -> None:
    engine.run(chars("aaaabbbbccccd"))
    match, _ = engine.match(chars("aaaabbbbccxx"))
    assert (len(match.pages), match.partial_tokens) == (2, 2)
    assert edges(engine) == ["aaaa|bbbb", "  cccc|d"]
    assert engine.match(chars("aaaabbx"))[0].length == 6


def test_next_turn_extends_the_partial_leaf(engine: Engine) -> None:
    """The tail page of the first turn is copied, and freed once the longer page is in the tree."""
    engine.run(chars("hello, you"))
    tail = engine.match(chars("hello, you"))[0].partial_page
    request = engine.admit(chars("hello, you there, again"))
    assert request is not None and request.computed == 10
    engine.compute(request, 99)
    assert engine.tree.num_pages == 3
    engine.insert_running(request)
    assert engine.pool.freed == [tail]
    assert edges(engine) == ["hell|o, y*", "  ou t|here|, ag*"]
    engine.finish(request)
    assert edges(engine) == ["hell|o, y", "  ou t|here|, ag", "    ain"]


def test_partial_leaf_of_several_pages_is_extended(engine: Engine) -> None:
    engine.run(chars("aaaab"))
    engine.run(chars("aaaabc"))
    assert edges(engine) == ["aaaa", "  bc"]


def test_locked_partial_leaf_is_kept(engine: Engine) -> None:
    first = engine.admit(chars("aab"))
    assert first is not None
    engine.compute(first, 3)
    leaf = engine.insert(first, 3).node
    engine.run(chars("aabbcc"))
    assert edges(engine) == ["aab*", "aabb|cc"]
    assert leaf.locks == 1
    engine.release(first)
    engine.run(chars("aabcc"))  # contains the leaf as well, which nobody holds by now
    assert edges(engine) == ["aabb|cc", "aabc|c"]


def test_duplicate_tail(engine: Engine) -> None:
    """A tail that another page begins with is not taken; the caller's page is reported and freed by it."""
    one, two, three = (engine.admit(chars(text)) for text in ("aaaabbbbc", "aaaabb", "aaaabb"))
    assert one and two and three
    for request in (one, two, three):
        engine.compute(request, 99)
    engine.finish(one)
    done = engine.insert(two, 6)
    assert done.taken_from == 2 and done.duplicates.tolist() == two.pages
    assert edges(engine) == ["aaaa*", "  bbbb|c"]
    engine.release(two)
    engine.finish(three)
    assert engine.tree.num_pages == 3


def test_same_prefix_computed_twice_at_once(engine: Engine) -> None:
    """Neither request saw the other's pages; the second keeps its copies, and goes on behind the first's."""
    one, two = engine.admit(chars("aaaabbbbcccc1")), engine.admit(chars("aaaabbbbdddd1"))
    assert one and two
    engine.compute(one, 99)
    engine.compute(two, 99)
    engine.insert_running(one)
    done = engine.insert_running(two)
    assert done.taken_from == 2 and done.duplicates.tolist() == two.pages[:2]
    assert edges(engine) == ["aaaa|bbbb**", "  cccc*", "  dddd*"]
    assert engine.generate(two, chars("dddd")) is True
    engine.compute(two, 99)
    assert engine.insert_running(two).duplicates.tolist() == two.pages[:2]
    engine.finish(two)
    engine.finish(one)
    assert engine.pool.num_free == 40 - engine.tree.num_pages


def test_split_of_a_locked_node_keeps_the_counts(engine: Engine) -> None:
    one = engine.admit(chars("aaaabbbbcccc1"))
    assert one is not None
    engine.compute(one, 99)
    node = engine.insert_running(one).node
    two = engine.admit(chars("aaaaxxxx1"))
    assert two is not None
    assert edges(engine) == ["aaaa**", "  bbbb|cccc*"]
    assert node.tokens.tobytes() == ids("bbbbcccc").tobytes()  # the holder's node is still the lower end
    assert engine.tree.num_evictable == 0 and engine.tree.evict(9) == 0
    engine.release(one)
    assert engine.tree.num_evictable == 2
    engine.release(two)
    assert edges(engine) == ["aaaa", "  bbbb|cccc"]


def test_eviction_trims_the_tail_first(engine: Engine) -> None:
    pages = engine.run(chars("aaaabbbbccccdd")).node.pages.tolist()
    engine.evict(1)
    assert engine.pool.freed == pages[3:] and edges(engine) == ["aaaa|bbbb|cccc"]
    engine.evict(2)
    assert edges(engine) == ["aaaa"]
    assert engine.match(chars("aaaabbbb"))[0].length == 4
    engine.run(chars("aaaabbbbc"))
    assert edges(engine) == ["aaaa", "  bbbb|c"]


def test_eviction_takes_leaves_by_recency_then_their_parents(engine: Engine) -> None:
    for text in ("aaaa1111", "aaaa2222", "bbbb", "aaaa3333"):
        engine.run(chars(text))
    engine.match(chars("aaaa1111"))
    left = []
    for _ in range(5):
        engine.evict(1)
        left.append([line.strip() for line in edges(engine)])
    assert left == [["aaaa", "1111", "3333", "bbbb"], ["aaaa", "1111", "3333"], ["aaaa", "1111"], ["aaaa"], []]
    assert engine.pool.num_free == 40


def test_a_locked_path_is_never_evicted(engine: Engine) -> None:
    engine.run(chars("aaaabbbbcccc"))
    match, path = engine.match(chars("aaaabbbb"))
    engine.lock(match.node, path)
    engine.lock(match.node, path)
    engine.evict(99)
    engine.unlock(match.node, path)
    engine.evict(99)
    assert edges(engine) == ["aaaa|bbbb*"]
    with pytest.raises(ValueError, match="2 pages are locked"):
        engine.tree.clear()
    engine.unlock(match.node, path)
    with pytest.raises(ValueError, match="not locked"):
        engine.tree.unlock(match.node)
    engine.evict(99)
    with pytest.raises(ValueError, match="evicted"):
        engine.tree.lock(match.node)
    with pytest.raises(ValueError, match="not locked"):
        engine.tree.unlock(match.node)
    assert engine.tree.statistics().namespaces == 0


def test_least_frequently_used_keeps_what_is_matched_often() -> None:
    engine = Engine(4, 40, "lfu")
    for text in ("aaaa", "bbbb", "cccc"):
        engine.run(chars(text))
    for text in ("aaaa", "aaaa", "bbbb"):
        engine.match(chars(text))
    engine.match(chars("cccc"))
    assert edges(engine) == ["aaaa", "bbbb", "cccc"]
    engine.match(chars("bbbb"))
    kept = []
    for _ in range(3):
        engine.evict(1)
        kept.append(edges(engine))
    assert kept == [["aaaa", "bbbb"], ["bbbb"], []]
    engine.check()


def test_namespaces_share_nothing(engine: Engine) -> None:
    engine.run(chars("aaaabbbb1"), "one")
    assert engine.match(chars("aaaabbbb"), "two")[0].length == 0
    assert engine.tree.statistics().namespaces == 1  # asking made none
    assert engine.run(chars("aaaabbbb1"), "two").taken_from == 0
    assert engine.tree.num_pages == 6
    engine.match(chars("aaaabbbb1"), "two")
    engine.evict(3)
    assert engine.tree.statistics().namespaces == 1
    assert engine.match(chars("aaaabbbb1"), "two")[0].length == 9


def test_expelled_pages_are_matched_no_more() -> None:
    """All that begins with the first page; what is locked goes when it is unlocked."""
    engine = Engine(4, 40)
    tree, pool = engine.tree, engine.tree._pool
    free = pool.num_free
    for text in ("abcdefgh", "abcdijkl", "abcdefghmnop", "xbcdefgh"):
        engine.run(chars(text))
    held = tree.match(ids("abcdefgh"))
    tree.lock(held.node)
    mine = held.pages.tolist()
    assert tree.expel(ids("abcdefghqqqq")) == 4
    tree.check()
    assert tree.match_length(ids("abcdefghmnop")) == 0 and tree.match_length(ids("xbcdefgh")) == 8
    assert held.node.namespace != "" and not pool.is_free(np.array(mine)).any(), "its owner reads them still"
    assert pool.num_free == free - 2 - 2
    pages = pool.allocate(2)
    done = tree.insert(ids("abcdefgh"), pages)
    assert done.taken_from == 0 and tree.match(ids("abcdefgh")).pages.tolist() == pages.tolist()
    tree.check()
    tree.unlock(held.node)
    assert tree.evict(100) == 6 and pool.num_free == free and tree.statistics().namespaces == 0
    tree.check()


def test_what_is_not_there_cannot_be_expelled() -> None:
    engine = Engine(4, 40)
    assert engine.tree.expel(ids("abcd")) == 0
    engine.run(chars("abcdefgh"))
    assert engine.tree.expel(ids("xbcdefgh")) == 0 and engine.tree.expel(ids("abcd"), "other") == 0
    assert engine.tree.expel(ids("abxx")) == 2, "its page is what `abxx` would have copied from"
    engine.tree.check()


def test_root_may_go_while_a_request_without_prefix_runs(engine: Engine) -> None:
    """Locks on a root protect nothing, so they must not keep an empty namespace either, nor break the next one."""
    engine.run(chars("xxxx"))
    request = engine.admit(chars("aaaab"))
    assert request is not None
    engine.evict(9)
    assert engine.tree.statistics().namespaces == 0
    engine.compute(request, 99)
    engine.finish(request)
    assert edges(engine) == ["aaaa|b"]


def test_disabled_tree_matches_nothing_and_takes_nothing() -> None:
    pool = PagePool(8)
    tree = RadixTree(pool, 4, enabled=False)
    pages = pool.allocate(2)
    done = tree.insert(ids("aaaabb"), pages)
    assert done.taken_from == 2 and done.duplicates.tolist() == pages.tolist()
    match = tree.match(ids("aaaabb"))
    assert match.length == tree.match_length(ids("aaaabb")) == len(match.pages) == 0
    for node in (done.node, match.node):
        tree.lock(node)
        tree.unlock(node)
    pool.free(done.duplicates)
    assert tree.num_pages == 0 and pool.num_free == 8
    tree.clear()
    tree.check()


def test_wrong_page_counts_and_sizes_are_refused() -> None:
    tree = RadixTree(PagePool(8), 4)
    for tokens, pages in (("aaaa", [0, 1]), ("aaaaa", [0]), ("", [0])):
        with pytest.raises(ValueError, match="do not fill"):
            tree.insert(ids(tokens), np.array(pages, np.int32))
    with pytest.raises(ValueError, match="page_size"):
        RadixTree(PagePool(8), 0)
    with pytest.raises(ValueError, match="no eviction policy 'fifo': lru, lfu"):
        make_policy("fifo")
    assert tree.snapshot() == []


def test_other_integer_types_and_strides_are_accepted(engine: Engine) -> None:
    engine.run(chars("aaaabbbb"))
    tokens = np.repeat(ids("aaaabbbb").astype(np.int64), 2)[::2]
    assert engine.tree.match_length(tokens) == engine.tree.match(tokens).length == 8


def test_results_survive_later_changes(engine: Engine) -> None:
    """Matched pages are a copy, and the caller may reuse the arrays it passed in."""
    tokens, pages = ids("aaaabbbb"), engine.pool.allocate(2)
    engine.tree.insert(tokens, pages)
    tokens[:] = 0
    pages[:] = 0
    match = engine.tree.match(ids("aaaabbbb"))
    match.pages[:] = 7
    assert engine.tree.match(ids("aaaabbbb")).pages.tolist() == [0, 1]
    assert engine.tree.evict(9) == 2


@pytest.mark.parametrize("length", [12, 10, 9, 8, 6, 4, 1])
def test_inserting_the_trees_own_pages_again_makes_no_duplicates(length: int) -> None:
    pool = PagePool(8)
    tree = RadixTree(pool, 4)
    pages = pool.allocate(3)
    tree.insert(ids("aaaabbbbcc"), pages)
    count = -(-min(length, 10) // 4)
    done = tree.insert(ids("aaaabbbbcc"[:length]), pages[:count])
    assert done.taken_from == count and done.duplicates.tolist() == []
    tree.check()


def test_an_insert_counts_as_a_use(engine: Engine) -> None:
    """Also where nothing is new, and without any lock."""
    for text in ("aaaa", "bbbb", "aaaa", "cccc", "bbbbdddd"):
        engine.warm(chars(text))
        engine.check()
    engine.evict(2)
    assert edges(engine) == ["bbbb", "  dddd"]


def test_split_keeps_the_hits_of_both_halves() -> None:
    engine = Engine(4, 40, "lfu")
    for text in ("aaaabbbb", "cccc"):
        engine.warm(chars(text))
    for text in ("cccc", "aaaabbbb", "aaaabbbb", "aaaa"):
        engine.match(chars(text))
        engine.check()
    engine.evict(1)
    assert edges(engine) == ["aaaa", "  bbbb"]


def test_snapshot_and_statistics(engine: Engine) -> None:
    engine.run(chars("aaaabbbb1"))
    engine.run(chars("aaaacccc1"))
    rows = engine.tree.snapshot()
    assert [(row.tokens, row.pages, row.locks) for row in rows] == [(0, 0, 0), (4, 1, 0), (5, 2, 0), (5, 2, 0)]
    assert [row.parent for row in rows] == [None, rows[0].id, rows[1].id, rows[1].id]
    assert [row.hits for row in rows] == [1, 1, 0, 0]
    assert engine.tree.snapshot(limit=2) == rows[:2]
    engine.evict(2)
    stats = engine.tree.statistics()
    assert (stats.nodes, stats.pages, stats.evictable_pages, stats.namespaces) == (2, 3, 3, 1)
    assert (stats.lookups, stats.lookup_tokens, stats.matched_tokens) == (2, 16, 4)
    assert (stats.inserted_pages, stats.evicted_pages) == (5, 2)


def test_long_chat_reuses_every_turn(engine: Engine) -> None:
    """Each turn computes its new text only, whatever the place in a page where the last one ended."""
    text: Tokens = ()
    for turn in range(1, 12):
        prompt = (*text, *range(100 * turn, 100 * turn + 3))
        request = engine.admit(prompt)
        assert request is not None and request.computed == len(text)
        engine.compute(request, 99)
        assert engine.generate(request, (turn, turn, turn)[: 1 + turn % 3])
        engine.compute(request, 99)
        text = request.tokens
        engine.finish(request)
        assert engine.tree.num_pages == -(-len(text) // 4)


def test_logprobs_move_with_their_tokens() -> None:
    """Through a split, into the longer page that replaces a tail, and off with what is evicted."""
    engine = Engine(page_size=4)
    tokens = tuple(range(10))
    engine.run(tokens)
    engine.tree.keep_logprobs(ids(tokens), true_logprobs(tokens, ""))
    engine.match((*tokens[:6], 99))  # splits
    assert np.array_equal(engine.tree.logprobs(ids(tokens), 3), true_logprobs(tokens, ""))
    assert len(engine.tree.logprobs(ids(tokens), 3, "salt")) == 0
    longer = (*tokens, 50, 51)
    engine.warm(longer)
    found = engine.check_logprobs(longer, "")
    assert np.isnan(found).all(1).tolist() == np.isnan(found).any(1).tolist() == [False] * 10 + [True] * 2
    engine.evict(1)
    assert len(engine.check_logprobs(longer, "")) == 8
