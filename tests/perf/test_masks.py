"""perf.masks: each library is asked for a mask once a token, whoever says which token comes."""

import numpy as np

from actorserve.fsm.errors import MatcherError
from actorserve.perf import masks


class Counted:
    """A grammar that allows two tokens, of which one is the end, and after `left` steps nothing but that."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.calls: list[str] = []

    def mask(self) -> np.ndarray:
        self.calls.append("mask")
        return np.array([3 if self.left else 1], np.int32)

    def step(self, token: int) -> None:
        assert token == 1
        self.left -= 1
        self.calls.append("step")


class Refusing(Counted):
    """It takes one token."""

    def step(self, token: int) -> None:
        if self.calls.count("step"):
            raise ValueError(f"token {token} is refused")
        super().step(token)


class Exhausted(Counted):
    """It has a mask for one state."""

    def mask(self) -> np.ndarray:
        if self.calls:
            raise MatcherError("too many expressions")
        return super().mask()


def test_a_library_without_a_mask_ends() -> None:
    """Also the first one, and the only one."""
    times = masks.measure({"exhausted": Exhausted(9), "second": Counted(3)}, (0,), 50)
    assert {name: len(spent) for name, spent in times.items()} == {"exhausted": 2, "second": 3}
    assert len(masks.measure({"exhausted": Exhausted(9)}, (0,), 50)["exhausted"]) == 2


def test_one_mask_a_token() -> None:
    """The first one's second mask of a state would be of what its caches hold."""
    first, second, refusing = Counted(3), Counted(9), Refusing(9)
    times = masks.measure({"first": first, "second": second, "refusing": refusing}, (0,), 50)
    assert first.calls == second.calls == ["mask", "step"] * 3 + ["mask"]
    assert refusing.calls == ["mask", "step", "mask"]
    assert {name: len(spent) for name, spent in times.items()} == {"first": 3, "second": 3, "refusing": 2}
    assert all(t > 0 for spent in times.values() for t in spent)
