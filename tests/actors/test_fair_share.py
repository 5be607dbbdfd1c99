"""Fair shares: who is served how much when several tenants wait, whatever their requests are like."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actorserve.actors.fair_share import FairShare
from actorserve.actors.request import Request
from actorserve.sampler.params import SamplingParams

PARAMS = SamplingParams()


def request(rid, tenant, length=10, weight=1.0, priority=0):
    return Request(
        rid, array("i", [1] * length), length, PARAMS, "", priority, 0, length + 5, tenant=tenant, weight=weight
    )  # fmt: skip


def names(requests):
    return "".join(r.tenant for r in requests)


def test_tenants_take_turns():
    waiting = [request(i, "a") for i in range(4)] + [request(9 + i, "b") for i in range(2)]
    assert names(FairShare().arrange(waiting, [])) == "ababaa"


def test_one_tenant_keeps_the_policys_order():
    waiting = [request(i, "a", priority=i) for i in range(4)]
    assert FairShare().arrange(waiting, []) is waiting


def test_weights():
    waiting = [request(i, "a", weight=3.0) for i in range(9)] + [request(20 + i, "b") for i in range(9)]
    assert names(FairShare().arrange(waiting, []))[:8].count("a") == 6


def test_a_higher_priority_goes_first():
    share = FairShare()
    share.served = {"a": 0.0, "b": 1e6}
    share._active = {"a", "b"}
    waiting = [request(0, "b", priority=1), request(1, "a"), request(2, "b")]
    assert [r.rid for r in share.arrange(waiting, [])] == [0, 1, 2]


def test_what_runs_is_counted():
    share = FairShare()
    running = request(0, "a")
    waiting = [request(1, "a"), request(2, "b")]
    share.arrange(waiting, [])
    assert names(share.arrange(waiting, [running])) == "ba"
    served = share.served["a"]
    share.charge(running)
    assert share.served["a"] == served, "once"
    running.append(5)
    share.charge(running)
    assert share.served["a"] == served + 1


def test_idle_time_is_no_credit():
    share = FairShare()
    share.served = {"a": 1000.0, "c": 1000.0}
    share._active = {"a", "c"}
    waiting = [request(i, "a") for i in range(3)] + [request(9 + i, "b") for i in range(3)]
    assert names(share.arrange(waiting, [])) == "ababab"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30), st.integers(0, 2)), max_size=40))
def test_nobody_is_lost_and_tenants_keep_their_order(spec):
    waiting = [request(i, tenant, length, priority=p) for i, (tenant, length, p) in enumerate(spec)]
    waiting.sort(key=lambda r: -r.priority)
    arranged = FairShare().arrange(waiting, [])
    assert sorted(r.rid for r in arranged) == sorted(r.rid for r in waiting)
    for tenant in "abc":
        own = [r for r in waiting if r.tenant == tenant]
        assert [r for r in arranged if r.tenant == tenant] == own
    assert [r.priority for r in arranged] == sorted((r.priority for r in arranged), reverse=True)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 50), min_size=60, max_size=60), st.floats(0.25, 4))
def test_shares_follow_the_weights(lengths, weight):
    """Of tenants that always wait, each gets tokens by its weight, to within one request."""
    share = FairShare()
    queues = {"a": lengths[:30], "b": lengths[30:]}
    weights = {"a": weight, "b": 1.0}
    got = {"a": 0.0, "b": 0.0}
    while all(queues.values()):
        waiting = [request(i, name, queue[0], weights[name]) for i, (name, queue) in enumerate(queues.items())]
        first = share.arrange(waiting, [])[0]
        share.charge(first)
        queues[first.tenant].pop(0)
        got[first.tenant] += len(first.tokens) / first.weight
        assert got == pytest.approx(share.served)
        assert abs(got["a"] - got["b"]) <= 50 / min(weights.values()) + 1e-6
