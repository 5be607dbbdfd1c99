"""Orders and questions that fronts have for the schedulers: each goes to all replicas, and is answered once.

Part of the text actor. Invariant: what was asked is answered when every replica has answered that is not gone with its
machine, or not at all if its front is gone; a scheduler that comes up is told what it has not answered.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from msgspec.structs import replace

from .messages import AskTimelines, Done, Look, Order, Refused, Seen, Timelines
from .totals import side_by_side

Question: TypeAlias = Order | Look | AskTimelines
Reply: TypeAlias = Done | Seen | Timelines | Refused


@dataclass(slots=True)
class Asked:
    """A question, who has it, and what the replicas have answered."""

    front: str
    question: Question
    waits: set[int]
    """Replicas that have not answered."""
    replies: dict[int, Reply] = field(default_factory=dict)


class Orders:
    """The open ones, by id."""

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas
        self._open: dict[int, Asked] = {}

    def ask(self, question: Question, front: str, among: Collection[int]) -> Question:
        """Note it; returns what each replica `among` all is to be asked."""
        self._open[question.rid] = Asked(front, question, set(among))
        return self._part(question)

    def unanswered(self, replica: int) -> list[Question]:
        """What this replica is to be asked (again)."""
        return [self._part(asked.question) for asked in self._open.values() if replica in asked.waits]

    def answered(self, reply: Reply, replica: int) -> tuple[Asked, Reply] | None:
        """Take a replica's answer; returns the question and what to answer, once all have."""
        asked = self._open.get(reply.rid)
        if asked is None:
            return None
        asked.replies[replica] = reply
        return self._without(replica, asked)

    def gone(self, replica: int) -> list[tuple[Asked, Reply]]:
        """It will not answer what it has not answered; returns what thereby is answered by all, as `answered` does."""
        found = [self._without(replica, asked) for asked in list(self._open.values())]
        return [one for one in found if one is not None]

    def _without(self, replica: int, asked: Asked) -> tuple[Asked, Reply] | None:
        waited = replica in asked.waits
        asked.waits.discard(replica)
        if asked.waits or not waited:
            return None
        del self._open[asked.question.rid]
        return asked, _together({number: asked.replies[number] for number in sorted(asked.replies)})

    def withdraw(self, rid: int) -> str:
        """Forget one; returns its front, or "" if it is none of these."""
        asked = self._open.pop(rid, None)
        return "" if asked is None else asked.front

    def drop(self, front: str) -> None:
        """Forget those of a front that is gone."""
        self._open = {rid: asked for rid, asked in self._open.items() if asked.front != front}

    def _part(self, question: Question) -> Question:
        """One replica's part of it: an answer must stay as small as if there were one."""
        if not isinstance(question, Look):
            return question
        nodes, requests = question.nodes // self._replicas, question.requests // self._replicas
        return replace(question, nodes=nodes, requests=requests)


def _together(by_replica: Mapping[int, Reply]) -> Reply:
    """One answer of all. A replica that refused speaks for all, though others may have done as they were told."""
    replies = list(by_replica.values())
    first = replies[0]
    if len(replies) == 1:
        return first
    for number, reply in by_replica.items():
        if isinstance(reply, Refused):
            return replace(reply, message=f"replica {number}: {reply.message}")
    match first:
        case Seen():
            return side_by_side([reply for reply in replies if isinstance(reply, Seen)])
        case Timelines():
            found = [one for reply in replies if isinstance(reply, Timelines) for one in reply.timelines]
            return replace(first, timelines=found)
        case _:
            texts = dict.fromkeys(reply.text for reply in replies if isinstance(reply, Done) and reply.text)
            return Done(first.rid, ", ".join(texts))
