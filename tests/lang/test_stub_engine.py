"""Thousands of states on an engine whose executor is the stub: all there is but the model is real."""

import threading
from pathlib import Path

import pytest
from stub_model import stub_folder

import actorserve.lang as sgl

STATES, WRONG = 2000, 777
TOKENS = 4
SEEDED = sgl.gen("x", max_tokens=TOKENS, seed=7, ignore_eos=True)


@sgl.function
async def program(s, i):
    s += f"{i} is a number."
    forks = s.fork(2)
    for k, fork in enumerate(forks):
        fork += f" Branch {k}:"
        fork += sgl.gen("x", max_tokens=TOKENS, regex="(?=a)b") if (i, k) == (WRONG, 1) else SEEDED
    forks.join()
    if i != WRONG:
        return await s.aget_var("x")


def alone_states(backend: object, i: int) -> list[str]:
    """What the branches of a state say when nothing else runs."""
    return [
        sgl.function(lambda s, k=k: s.__iadd__(f"{i} is a number. Branch {k}:" + SEEDED)).run(backend=backend)["x"]
        for k in range(2)
    ]


def test_thousands_of_states_with_forks(tmp_path: Path) -> None:
    """No thread is made for a state, each branch says what the engine says by itself, and one that fails is named."""
    options = {"load_format": "stub", "stub_step_ms": 0.0, "max_total_tokens": 1 << 18}
    with sgl.Engine(stub_folder(tmp_path), **options, max_running_requests=256) as backend:
        alone = [alone_states(backend, i) for i in range(0, STATES, 100)]
        before, seen, over = threading.active_count(), [0], threading.Event()

        def watch() -> None:
            while not over.wait(0.01):
                seen.append(threading.active_count())

        threading.Thread(target=watch, daemon=True).start()
        states = program.run_batch([(i,) for i in range(STATES)], backend=backend)
        over.set()
    assert max(seen) <= before + 2, "the watcher's, and at most the loop's own"
    assert [states[i]["x"] for i in range(0, STATES, 100)] == alone
    assert all(len(state["x"]) == 2 and all(state["x"]) for state in states if state is not states[WRONG])
    with pytest.raises(sgl.ProgramError, match=r"variable 'x' in branch 1: .*test_stub_engine.py:\d+"):
        states[WRONG]["x"]
