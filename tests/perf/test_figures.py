"""Figures of a load that need more than one record: steady decoding, floors, bursts; the floor of a whole workload."""

import argparse
from typing import Any

import pytest

from actorserve.models.floors import Limits, decode_seconds, prefill_seconds
from actorserve.perf import roofline
from actorserve.perf.clients import Result
from actorserve.perf.figures import add_floors, gaps, steady, summarize, tokens_by
from actorserve.perf.join import report_join, summarize_join
from actorserve.perf.roofline import spec_of_model, workload_seconds
from actorserve.perf.stream_client import Record

H200 = Limits(4.3e12, 790e12)
QWEN = spec_of_model("qwen2-7b")


def record(start: float, first: float, tokens: int, step: float, prompt: int = 100, **fields: Any) -> Record:
    """A request whose tokens come every `step` seconds, one an event."""
    times = [first + step * i for i in range(tokens)]
    return Record(
        0, start=start, times=times, end=times[-1], prompt_tokens=prompt, completion_tokens=tokens,
        wanted_tokens=tokens, **fields,
    )  # fmt: skip


# ------------------------------------------------------------------ the floor of a workload


def test_one_request() -> None:
    expected = prefill_seconds(QWEN, 100, H200) + sum(decode_seconds(QWEN, 1, 100 + i, H200) for i in (1, 2, 3))
    assert workload_seconds(QWEN, [(100, 4)], 8, H200) == pytest.approx(expected)
    assert workload_seconds(QWEN, [(100, 1)], 8, H200) == pytest.approx(prefill_seconds(QWEN, 100, H200))


def test_a_place_is_taken_as_soon_as_it_is_free() -> None:
    lengths = [(10, 3), (10, 5), (10, 3)]
    one, two = (lambda *contexts: sum(decode_seconds(QWEN, 1, c, H200) for c in contexts)), 0.0
    two = sum(decode_seconds(QWEN, 2, c, H200) for c in (11, 12, 12, 13))  # the third joins after two steps
    prefill = 3 * prefill_seconds(QWEN, 10, H200)
    # Contexts of the two differ by two tokens once the third has joined: their mean counts.
    assert workload_seconds(QWEN, lengths, 2, H200) == pytest.approx(prefill + two, rel=1e-6)
    single = prefill + one(11, 12) + one(11, 12, 13, 14) + one(11, 12)
    assert workload_seconds(QWEN, lengths, 1, H200) == pytest.approx(single)
    assert workload_seconds(QWEN, lengths * 3, 1, H200) == pytest.approx(3 * single)


def test_offline_floor_of_the_peers_workload() -> None:
    assert workload_seconds(QWEN, [(1024, 512)] * 512, 256, H200) == pytest.approx(17.95, abs=0.01)
    assert workload_seconds(QWEN, [(1024, 512)] * 512, 256, H200, kv_bytes=1.0) < 16


def test_roofline_command(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["qwen2-7b", "--batch", "128", "--context", "1024"])
    assert "   128     1024    5.036    25,415" in capsys.readouterr().out
    roofline.main(["llama-3.1-8b", "--json"])
    assert '"decode"' in capsys.readouterr().out
    with pytest.raises(SystemExit, match="neither a known shape"):
        roofline.main(["/no/where"])


# ------------------------------------------------------------------ steady decoding


def test_steady_is_from_the_last_first_token_to_the_first_end() -> None:
    records = [record(0.0, 1.0, 101, 0.01), record(0.0, 1.5, 101, 0.01)]
    figures = steady(records)
    assert figures["steady_seconds"] == pytest.approx(0.5)
    assert figures["steady_streams"] == 2
    assert figures["steady_step_ms"] == pytest.approx(10.0)
    assert figures["steady_output_throughput"] == pytest.approx(200.0)
    assert figures["steady_context"] == pytest.approx(100 + (51 + 101 + 1 + 51) / 4)
    assert steady([records[0], record(0.0, 3.0, 10, 0.01)]) == {}, "they never decode at the same time"
    assert steady([]) == {}


def test_tokens_of_events_with_and_without_counts() -> None:
    burst = Record(0, times=[1.0, 2.0, 3.0], counts=[1, 5, 6], completion_tokens=6)
    assert [tokens_by(burst, t) for t in (0.5, 1.0, 2.5, 9.0)] == [0, 1, 5, 6]
    burst.counts = []
    assert tokens_by(burst, 2.5) == 4
    assert gaps(burst) == [1.0, 1.0]
    assert gaps(burst, since=1.5) == [1.0]


def test_floors_beside_a_run() -> None:
    records = [record(0.0, 0.1 + 0.001 * i, 50, 0.005, prompt=1000) for i in range(4)]
    figures = summarize(records)
    assert figures["max_output_tokens_per_s"] == 200
    assert figures["mean_e2e_latency_ms"] == figures["mean_e2el_ms"]
    add_floors(figures, records, QWEN, H200, 2.0)
    assert figures["steady_floor_step_ms"] == pytest.approx(1e3 * decode_seconds(QWEN, 4, 1025, H200), rel=1e-2)
    assert figures["steady_share_of_floor"] == pytest.approx(figures["steady_floor_step_ms"] / 5, rel=1e-2)
    floor = workload_seconds(QWEN, [(1000, 50)] * 4, 4, H200)
    assert figures["share_of_floor"] == pytest.approx(floor / figures["duration"])


# ------------------------------------------------------------------ joining


def join_arguments(**fields: Any) -> argparse.Namespace:
    limits = {"bandwidth": 4.3, "tflops": 790.0, "kv_bytes": 2.0}
    return argparse.Namespace(**limits | {"join_input_len": 1024, "shape": "qwen2-7b"} | fields)


def test_join_figures() -> None:
    """Two streams at 10 ms a token; each of two joiners stalls them by 30 ms once."""
    streams = []
    for _ in range(2):
        times = [0.5 + 0.01 * i for i in range(1000)]
        times = [t + 0.03 * (t > 5.005) + 0.03 * (t > 6.005) for t in times]
        counts = list(range(1, 1001))
        streams.append(Record(0, start=0.0, times=times, counts=counts, end=times[-1], prompt_tokens=50))
    joiners = [record(5.0, 5.05, 16, 0.01), record(6.0, 6.07, 16, 0.01)]
    args = join_arguments()
    figures = summarize_join([Result(streams[:1], 1.0), Result(streams[1:], 0.5)], Result(joiners, 0.1), args)
    assert figures["p50_join_ttft_ms"] == pytest.approx(60)
    assert figures["p99_quiet_itl_ms"] == pytest.approx(10)
    assert figures["p50_joining_itl_ms"] == pytest.approx(10)
    assert figures["std_joining_itl_ms"] > 0
    assert figures["stream_context"] == 1050
    assert figures["join_prefill_floor_ms"] == pytest.approx(17.18, abs=0.01)
    assert figures["client_cpu_share"] == pytest.approx(1.0 / joiners[-1].end)
    assert "ITL while they join" in report_join(figures)


def test_join_needs_streams_throughout() -> None:
    joiners = Result([record(5.0, 5.1, 4, 0.01)], 0.0)
    with pytest.raises(SystemExit, match=r"first request joined: 1; raise --join-settle"):
        summarize_join([Result([record(0.0, 5.2, 100, 0.01)], 0.0)], joiners, join_arguments())
    with pytest.raises(SystemExit, match=r"before the last joiner: 1; raise --random-output-len"):
        summarize_join([Result([record(0.0, 0.2, 100, 0.01)], 0.0)], joiners, join_arguments())
