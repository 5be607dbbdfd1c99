"""/openapi.json: every route is in it, its schemas are sound, and they agree with what the server takes."""

import jsonschema
import pytest

from actorserve.http.app import ROUTES
from actorserve.http.openai_types import OPENAI_REFUSED

pytestmark = pytest.mark.anyio
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def described(rig):
    return (await rig.http.get("/openapi.json")).json()


def schema_of(described, path, part="requestBody"):
    """The schema of a path's body or reply, with what it refers to."""
    operation = described["paths"][path]["post"]
    holder = operation[part] if part == "requestBody" else operation["responses"]["200"]
    return {**holder["content"]["application/json"]["schema"], "components": described["components"]}


async def test_every_route_is_described(described):
    assert described["openapi"] == "3.1.0"
    assert set(described["paths"]) == {path.replace(":path", "") for r in ROUTES for path in r.paths}
    operations = [one for item in described["paths"].values() for one in item.values()]
    assert len({one["operationId"] for one in operations}) == len(operations)
    assert all(one["summary"] for one in operations)
    assert described["paths"]["/v1/models/{id}"]["get"]["parameters"][0]["name"] == "id"


async def test_schemas_are_sound(described):
    jsonschema.Draft202012Validator.check_schema({"$defs": described["components"]["schemas"]})
    text = str(described)
    for name in described["components"]["schemas"]:
        assert f"#/components/schemas/{name}" in text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": USER, "temperature": 0.5, "stop": ["a"], "n": 2, "logit_bias": {"5": 1}}),
        ("/v1/chat/completions", {"messages": USER, "tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("/v1/completions", {"prompt": [[1, 2], [3]], "max_tokens": 3, "logprobs": 2}),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 4, "stop": "x"}}),
        ("/tokenize", {"prompt": ["a", "b"]}),
        ("/detokenize", {"tokens": [1, 2]}),
    ],
)
async def test_requests_and_replies_are_as_described(rig, described, path, body):
    jsonschema.validate(body, schema_of(described, path))
    reply = await rig.http.post(path, json=body)
    assert reply.status_code == 200
    jsonschema.validate(reply.json(), schema_of(described, path, "reply"))


@pytest.mark.parametrize(
    ("path", "valid", "wrong"),
    [
        ("/v1/chat/completions", {"messages": USER}, {"temperature": -1}),
        ("/v1/chat/completions", {"messages": USER}, {"top_logprobs": 21}),
        ("/v1/chat/completions", {"messages": USER}, {"tool_choice": "never"}),
        ("/v1/chat/completions", {"messages": USER}, {"messages": [{"role": "robot", "content": "x"}]}),
        ("/v1/completions", {"prompt": "a"}, {"n": 0}),
        ("/v1/completions", {"prompt": "a"}, {"stop": [""]}),
        ("/v1/completions", {"prompt": "a"}, {OPENAI_REFUSED[0]: "x"}),
        ("/generate", {"text": "a"}, {"sampling_params": {"top_p": 0}}),
        ("/generate", {"text": "a"}, {"sampling_params": {"unknown": 1}}),
    ],
)
async def test_what_the_document_forbids_is_refused(rig, described, path, valid, wrong):
    jsonschema.validate(valid, schema_of(described, path))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(valid | wrong, schema_of(described, path))
    assert (await rig.http.post(path, json=valid | wrong)).status_code == 400
