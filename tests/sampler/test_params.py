"""SamplingParams: what is accepted, what is refused, and which field the refusal names."""

import math

import msgspec
import pytest

from actorserve.errors import RequestError
from actorserve.sampler.params import (
    MAX_BIASES,
    MAX_LISTED,
    MAX_SEED,
    MAX_STOP_CHARS,
    MAX_STOP_IDS,
    MAX_STOP_STRINGS,
    MIN_SEED,
)
from actorserve.sampler.params import SamplingParams as P

VOCAB = 100


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 100.0, "top_p": 1e-9, "min_p": 1.0, "top_k": 1},
        {"top_k": -1},
        {"top_k": VOCAB * 1000},
        {"max_new_tokens": None, "min_new_tokens": 5},
        {"max_new_tokens": 5, "min_new_tokens": 5},
        {"frequency_penalty": -2.0, "presence_penalty": 2.0, "repetition_penalty": 2.0},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"seed": -1},
        {"seed": MIN_SEED},
        {"logprobs": 0},
        {"logprobs": 20, "logprob_start_len": 0, "token_ids_logprob": (VOCAB - 1,) * MAX_LISTED},
        {"stop": ("x" * MAX_STOP_CHARS,) * MAX_STOP_STRINGS, "stop_token_ids": (VOCAB - 1,) * MAX_STOP_IDS},
        {"logit_bias": {0: -100.0, VOCAB - 1: 100.0}},
    ],
)
def test_accepted(fields):
    P(**fields).check(VOCAB)


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("max_new_tokens", (-1, 1 << 40)),
        ("min_new_tokens", (-1, 129)),
        ("temperature", (-0.1, 101.0, math.nan, math.inf)),
        ("top_p", (0.0, -1.0, 1.01, math.nan)),
        ("top_k", (0, -2)),
        ("min_p", (-0.1, 1.1, math.nan)),
        ("frequency_penalty", (-2.1, 2.1, math.inf)),
        ("presence_penalty", (-2.1, 2.1, math.nan)),
        ("repetition_penalty", (0.0, -1.0, 2.1)),
        ("seed", (MIN_SEED - 1, MAX_SEED + 1)),
        ("logprobs", (-1, 21)),
        ("logprob_start_len", (-2, 1 << 40)),
        ("token_ids_logprob", ((VOCAB,), (-1,), (1,) * (MAX_LISTED + 1))),
        ("stop", (("",), ("x",) * (MAX_STOP_STRINGS + 1), ("x" * (MAX_STOP_CHARS + 1),))),
        ("stop_token_ids", ((VOCAB,), (-1,), (1,) * (MAX_STOP_IDS + 1))),
        ("logit_bias", ({VOCAB: 1.0}, {-1: 1.0}, {1: 100.5}, {1: math.nan}, dict.fromkeys(range(MAX_BIASES + 1), 1.0))),
    ],
)
def test_refused_by_name(param, values):
    for value in values:
        with pytest.raises(RequestError) as refused:
            P(**{param: value}).check(VOCAB if param != "logit_bias" or len(value) == 1 else 1 << 20)
        assert refused.value.param == param
        assert refused.value.status == 400


@pytest.mark.parametrize("huge", [10**400, -(10**400), 10**9000], ids=["large", "negative", "unprintable"])
def test_integers_beyond_every_float_are_refused_like_others(huge):
    """Python's own errors would make a server error of them: no float holds them, and str() refuses the last."""
    fields = ["max_new_tokens", "min_new_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty"]
    for name in (*fields, "presence_penalty", "repetition_penalty", "seed", "logprobs"):
        with pytest.raises(RequestError, match=f"{name} must be between -?[0-9]+ and [0-9]+$") as refused:
            P(**{name: huge}).check(VOCAB)
        assert refused.value.param == name
    for bias in ({huge: 1.0}, {1: huge}):
        with pytest.raises(RequestError, match="logit_bias"):
            P(logit_bias=bias).check(VOCAB)
    with pytest.raises(RequestError, match="stop_token_ids"):
        P(stop_token_ids=(huge,)).check(VOCAB)


def test_the_refusal_names_the_value():
    for fields, text in (({"temperature": 101.5}, "0 and 100, not 101.5"), ({"top_p": math.nan}, "0 and 1, not nan")):
        with pytest.raises(RequestError, match=text):
            P(**fields).check(VOCAB)
    with pytest.raises(RequestError, match="0 and 2147483648, not -3"):
        P(max_new_tokens=-3).check(VOCAB)


def test_greedy_is_temperature_zero_or_top_k_one():
    assert P(temperature=0.0).greedy
    assert P(temperature=1e-7).greedy
    assert P(top_k=1).greedy
    assert not P(temperature=1e-5).greedy
    assert not P(top_k=2).greedy


def test_has_penalty():
    assert not P().has_penalty
    for field, value in (("frequency_penalty", -0.1), ("presence_penalty", 0.1), ("repetition_penalty", 0.9)):
        assert P(**{field: value}).has_penalty


def test_survives_a_message():
    params = P(temperature=0.5, seed=3, logit_bias={7: -1.5}, stop=("a", "b"), stop_token_ids=(1,), logprobs=2)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=P) == params
    assert msgspec.json.decode(msgspec.json.encode(params), type=P) == params


def test_unknown_and_mistyped_fields_are_refused():
    for text in (b'{"temprature": 1}', b'{"top_k": 2.5}', b'{"top_k": true}', b'{"logit_bias": {"a": 1}}'):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(text, type=P)
