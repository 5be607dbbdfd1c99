"""/v1/score over a fake text actor: what it asks for, and what it makes of the answer.

Named tokens have the logprob -0.1 - token / 100.
"""

import math

import pytest

URL = "/v1/score"
BODY = {"query": "q", "items": ["one", "two"], "label_token_ids": [5, 7]}
PROBABILITIES = [math.exp(-0.15), math.exp(-0.17)]


async def test_scores_are_probabilities_of_the_next_token(rig):
    reply = (await rig.http.post(URL, json=BODY | {"model": "fake-model"})).json()
    assert reply["scores"] == [pytest.approx(PROBABILITIES)] * 2
    assert (reply["object"], reply["model"], reply["usage"]["prompt_tokens"]) == ("scoring", "fake-model", 14)
    first, second = rig.text.generates
    assert (first.prompt.text, second.prompt.text) == ("qone", "qtwo")
    assert (first.params.max_new_tokens, first.params.token_ids_logprob) == (1, (5, 7))
    await rig.http.post(URL, json=BODY | {"cache_salt": "s", "priority": 2})
    assert (rig.text.generates[2].cache_salt, rig.text.generates[2].priority) == ("s", 2)


async def test_softmax_is_among_the_labels(rig):
    reply = (await rig.http.post(URL, json=BODY | {"apply_softmax": True, "items": "one"})).json()
    (scores,) = reply["scores"]
    assert sum(scores) == pytest.approx(1) and scores[0] / scores[1] == pytest.approx(math.exp(0.02))


async def test_items_may_come_first_and_be_tokens(rig):
    await rig.http.post(URL, json=BODY | {"item_first": True})
    body = BODY | {"query": [1, 2], "items": [[3], [4, 5]]}
    await rig.http.post(URL, json=body)
    await rig.http.post("/score", json=body | {"item_first": True})
    texts, ids = rig.text.generates[:2], [list(g.prompt.ids.cast("i")) for g in rig.text.generates[2:]]
    assert [g.prompt.text for g in texts] == ["oneq", "twoq"]
    assert ids == [[1, 2, 3], [1, 2, 4, 5], [3, 1, 2], [4, 5, 1, 2]]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"items": []}, "items"),
        ({"items": [[1]]}, "items"),
        ({"query": [1]}, "items"),
        ({"query": [1], "items": [[1000]]}, "items"),
        ({"query": [], "items": [[]]}, "items"),
        ({"label_token_ids": []}, "label_token_ids"),
        ({"label_token_ids": [1000]}, "label_token_ids"),
        ({"label_token_ids": [1] * 129}, "label_token_ids"),
        ({"label_token_ids": "yes"}, "label_token_ids"),
        ({"query": None}, "query"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"model": "other"}, "model"),
    ],
)
async def test_refused_with_the_field(rig, more, param):
    reply = await rig.http.post(URL, json=BODY | more)
    assert (reply.status_code, reply.json()["error"]["param"]) == (404 if param == "model" else 400, param)
    assert rig.text.got == [] and rig.front.client.table == {}
