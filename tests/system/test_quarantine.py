"""A request that an actor really dies of, among others: it is refused after few deaths, and the others see a pause.

The engine's own processes and its own limit of restarts, on the stub executor.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from crashing_actors import FILE, GRAMMAR, GUILTY
from stub_model import stub_folder

import actorserve
from actorserve.actors import embedded_root
from actorserve.actors.topology import ActorSpec, Topology, engine_topology
from actorserve.errors import EngineDown, RequestError

INNOCENT = 12
INNOCENTS_GRAMMAR = 'root ::= "(" root ")" | [a-z]+'
CASES = {
    "EncodingText": ("text", "text_crashed", 2),
    "DecodingText": ("text", "text_crashed", 2),
    "CrashingScheduler": ("sched", "scheduler_crashed", 2),
    "CrashingFsm": ("fsm", "fsm_crashed", 2),
    "CrashingExecutor": ("exec.0", "executor_crashed", 3),
}
"""Class: the actor, the refusal's code, and most deaths until it comes: of an executor the first may be everybody's."""


def topology_with(name: str, actor: str) -> Any:
    """engine_topology with another class for one actor."""

    def made(config: Any, fronts: Any) -> Topology:
        topology = engine_topology(config, fronts, "process")
        other = ActorSpec(actor, f"crashing_actors:{name}")
        nodes = [
            replace(node, actors=tuple(other if one.name == actor else one for one in node.actors))
            for node in topology.nodes
        ]
        return Topology(tuple(nodes), topology.lanes)

    return made


@pytest.mark.parametrize("name", CASES)
def test_the_guilty_is_refused_and_nobody_else(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, code, most = CASES[name]
    deaths = tmp_path / "deaths"
    deaths.touch()
    monkeypatch.setenv(FILE, str(deaths))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"), prepend=os.pathsep)
    monkeypatch.setattr(embedded_root, "engine_topology", topology_with(name, actor))
    folder = stub_folder(tmp_path / "model")

    async def ask(engine: actorserve.Engine, seed: int, grammar: str = "") -> list[int]:
        more = {"ebnf": grammar} if grammar else {}
        return (await engine.generate(f"Once {seed % 4}", seed=seed, max_new_tokens=60, **more)).ids

    async def crowd(engine: actorserve.Engine, said: list[list[int]]) -> None:
        async def one(number: int) -> None:
            said[number] = await ask(engine, number, INNOCENTS_GRAMMAR if number % 4 == 3 else "")

        async with anyio.create_task_group() as group:
            for number in range(INNOCENT):
                group.start_soon(one, number)
            await anyio.sleep(0.3)
            if said is after:
                with pytest.raises(EngineDown) as caught:
                    await ask(engine, GUILTY, GRAMMAR if actor == "fsm" else "")
                assert caught.value.code == code
                with pytest.raises(RequestError) as again:  # as clients do
                    await ask(engine, GUILTY, GRAMMAR if actor == "fsm" else "")
                assert again.value.code == "quarantined"

    before: list[list[int]] = [[] for _ in range(INNOCENT)]
    after: list[list[int]] = [[] for _ in range(INNOCENT)]

    async def main() -> None:
        settings = {"load_format": "stub", "stub_step_ms": 20.0, "max_running_requests": 8, "log_level": "error"}
        async with actorserve.Engine(folder, placement="inline", **settings) as engine:  # the root: a thread of ours
            await crowd(engine, before)
            assert not deaths.read_text()
            await crowd(engine, after)

    anyio.run(main)
    assert all(before) and after == before
    assert 2 <= len(deaths.read_text()) <= most
