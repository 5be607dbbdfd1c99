"""Pins: prefixes that their owners will come back to, locked in the radix tree between two requests.

The tree has one Pins; the scheduler pins what a program's request leaves, until the program's next. A pin is a wish:
the one used longest ago is given up when its pages are needed to go on at all. Invariant: each pin holds exactly one
lock on its node, and no other lock is held here.
"""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .nodes import Node
    from .radix import RadixTree

MOST_PINS: Final = 4096


class Pins:
    """Pinned nodes by the owner's number, the one used longest ago first.

    A node that is expelled (RadixTree.expel) stays locked, for nothing, until its pin holds another one.
    """

    def __init__(self, tree: "RadixTree") -> None:
        self._tree = tree
        self._nodes: dict[int, Node] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def hold(self, pin: int, node: "Node") -> None:
        """Pin a node of the tree, instead of what the pin held before. Raises ValueError if the node is gone."""
        self._tree.lock(node)
        self.release(pin)
        self._nodes[pin] = node
        if len(self._nodes) > MOST_PINS:
            self.drop()

    def release(self, pin: int) -> None:
        """Let go what the pin holds, if it holds something: the tree may still keep it."""
        node = self._nodes.pop(pin, None)
        if node is not None:
            self._tree.unlock(node)

    def drop(self) -> bool:
        """Give up the pin used longest ago; False if there is none."""
        if not self._nodes:
            return False
        self.release(next(iter(self._nodes)))
        return True

    def clear(self) -> None:
        """Give up all."""
        while self.drop():
            pass

    def pages(self) -> int:
        """Pages that pins hold, also those that others hold too. Walks all of them."""
        seen: dict[int, int] = {}
        for node in self._nodes.values():
            while node.parent is not None and node.id not in seen:
                seen[node.id] = len(node.pages)
                node = node.parent
        return sum(seen.values())
