"""Requests that are made of /openapi.json, right and wrong ones, against a whole server without a model.

No reply takes long; none has a 5xx status but 429's neighbour 503; what is right gets what the document promises; every
error has its protocol's shape and names the field. CI takes over a thousand requests, the same ones each time, few of
them where making one takes long, as where schemas refer to themselves; --thorough takes as many of each.
"""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from live_server import LiveServer, live_server, wait_until
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from stub_model import stub_folder

SECONDS = 20
"""A reply that takes longer is a hang."""
FEW, MANY = 20, 45
"""Requests a route; --thorough."""
COSTLY = {"/v1/programs": 3, "/v1/messages": 3, "/v1/messages/count_tokens": 3, "/v1/chat/completions": 6}
"""Of these there are fewer in CI."""
PROMISES = ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("stub")
    flags = ["--model", stub_folder(folder / "model", context_length=512), "--load-format", "stub"]
    flags += ["--stub-step-ms", "0", "--grammar-seconds", "0.3", "--data-dir", str(folder / "data")]
    flags += ["--weights-root", str(folder), "--profile-dir", str(folder / "profiles")]
    with live_server(folder, *flags) as server:
        yield server
        assert "Traceback" not in server.log.read_text()
        wait_until(server.is_ready, 10, "all of it is well")
        server.assert_pages_add_up()


@pytest.fixture(scope="module")
def operations(stub: LiveServer) -> list[Any]:
    api = schemathesis.openapi.from_url(stub.url + "/openapi.json")
    found = [result.ok() for result in api.get_all_operations()]
    assert len(found) > 40
    return found


def check_error(path: str, reply: Any) -> None:
    """The shape of an error, and its field."""
    error = json.loads(reply.text)["error"]
    assert error["message"] and error["type"], reply.text
    if path.startswith("/v1/messages"):
        assert set(error) == {"message", "type"}, reply.text
        return
    assert set(error) == {"message", "type", "param", "code"}, reply.text
    if reply.status_code == 400 and error["param"] is None:
        whole = ("invalid request: ", "the body ", "the JSON body ", "a stub has ")
        assert error["message"].startswith(whole), f"no field is named: {reply.text}"


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_every_reply_is_as_described(
    stub: LiveServer, operations: list[Any], mode: GenerationMode, thorough: bool
) -> None:
    statuses: Counter[int] = Counter()
    checks = [CHECKS.get_one(name) for name in PROMISES]
    with requests.Session() as session:
        for operation in operations:
            if mode is GenerationMode.NEGATIVE and operation.method.upper() != "POST":
                continue  # a path or an address that nothing can be wrong with
            count = MANY if thorough else COSTLY.get(operation.path, FEW)

            @seed(1)
            @settings(
                max_examples=count, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                reply = case.call(session=session, timeout=SECONDS)
                statuses[reply.status_code] += 1
                if case.path == "/pause_generation":
                    session.post(stub.url + "/continue_generation", timeout=SECONDS)
                assert reply.status_code < 500 or reply.status_code == 503, (case.as_curl_command(), reply.text)
                if 400 <= reply.status_code < 500:
                    check_error(case.path, reply)
                case.validate_response(reply, checks=checks)

            try:
                ask()
            except Unsatisfiable:
                assert mode is GenerationMode.NEGATIVE  # a route whose requests cannot be wrong
    print(f"\n{mode.value}: {sum(statuses.values())} requests, replies {dict(sorted(statuses.items()))}")
    assert sum(statuses.values()) > 150
    assert statuses[200] > 50 if mode is GenerationMode.POSITIVE else statuses[400] > 140
