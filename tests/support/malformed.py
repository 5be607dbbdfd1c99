"""Requests that are wrong in every way that a seed can think of, and connections to send them over.

Made from valid requests by changes to their JSON, their bytes, their heads and their framing. The same seed makes the
same requests.
"""

import asyncio
import copy
import json
import random
from typing import Any, NamedTuple

CHAT = {"messages": [{"role": "user", "content": "Hi there"}], "max_tokens": 6}
TEXT = {"prompt": "Once upon", "max_tokens": 6}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", None]}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "f", "description": "does", "parameters": SCHEMA}}
TURNS = [
    {"role": "system", "content": "Be"},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {
        "role": "assistant",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
    {"role": "tool", "content": "1", "tool_call_id": "c1"},
]
SAMPLING = {"max_new_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "stop": ["z"], "seed": 3, "n": 2}
BATCH = {"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"}
VALID: list[tuple[str, str, Any]] = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", CHAT | {"messages": TURNS, "tools": [TOOL], "tool_choice": "auto"}),
    ("POST", "/v1/chat/completions", CHAT | {"stream": True, "logprobs": True, "top_logprobs": 2, "stop": ["q"]}),
    ("POST", "/v1/chat/completions", CHAT | {"response_format": FORMAT}),
    ("POST", "/v1/completions", TEXT | {"n": 2, "best_of": 3, "echo": True, "logprobs": 1, "logit_bias": {"5": 1.5}}),
    ("POST", "/v1/completions", TEXT | {"prompt": [[5, 6], [7]], "seed": 1, "stream": True, "stop_token_ids": [9]}),
    ("POST", "/v1/completions", TEXT | {"regex": "[a-z]{1,5}(b|c)*"}),
    ("POST", "/v1/completions", TEXT | {"ebnf": 'root ::= "a" root | "b"', "min_tokens": 2}),
    ("POST", "/v1/completions", TEXT | {"choice": ["yes", "no"], "presence_penalty": 1.0, "repetition_penalty": 1.1}),
    ("POST", "/generate", {"text": ["a", "b"], "sampling_params": SAMPLING, "return_logprob": True}),
    ("POST", "/generate", {"input_ids": [5, 6, 7], "sampling_params": SAMPLING, "stream": True, "rid": "r"}),
    ("POST", "/generate", {"text": "a", "return_logprob": True, "logprob_start_len": 0, "token_ids_logprob": [5, 6]}),
    ("POST", "/v1/responses", {"input": "Hi", "max_output_tokens": 6, "instructions": "Be", "stream": True}),
    ("POST", "/v1/responses", {"input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 6, "tools": []}),
    ("POST", "/v1/messages", {"model": "", "max_tokens": 6, "messages": CHAT["messages"], "system": "Be"}),
    ("POST", "/v1/messages", {"model": "", "max_tokens": 6, "messages": CHAT["messages"], "stream": True}),
    ("POST", "/v1/messages/count_tokens", {"model": "", "messages": CHAT["messages"]}),
    ("POST", "/v1/score", {"query": "a", "items": ["b", "c"], "label_token_ids": [5, 6], "apply_softmax": True}),
    ("POST", "/v1/rerank", {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1, "return_documents": False}),
    ("POST", "/v1/embeddings", {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 3}),
    ("POST", "/encode", {"text": "a", "normalize": True}),
    ("POST", "/judge", {"conv": CHAT["messages"], "rid": "r"}),
    ("POST", "/v1/classify", {"input": [[5, 6], [7]]}),
    ("POST", "/start_profile", {"num_steps": 5, "activities": ["CPU"]}),
    ("POST", "/stop_profile", None),
    ("GET", "/v1/requests/cmpl-x/timeline", None),
    ("POST", "/update_weights_from_disk", {"model_path": "/nowhere", "abort_all_requests": False}),
    ("POST", "/v1/programs", {"program": [], "arguments": [{}]}),
    ("POST", "/parse_function_call", {"text": "<tool_call>{}", "tools": [TOOL], "tool_call_parser": "hermes"}),
    ("POST", "/separate_reasoning", {"text": "<think>a</think>b", "reasoning_parser": "deepseek-r1"}),
    ("GET", "/v1/loads", None),
    ("GET", "/get_load", None),
    ("GET", "/load", None),
    ("GET", "/ping", None),
    ("GET", "/version", None),
    ("POST", "/tokenize", {"prompt": ["a b", "c"]}),
    ("POST", "/detokenize", {"tokens": [[5, 6], [7]]}),
    ("POST", "/abort_request", {"rid": "nobody"}),
    ("POST", "/flush_cache", None),
    ("POST", "/v1/batches", BATCH),
    ("POST", "/v1/files", None),
    ("GET", "/v1/files", None),
    ("GET", "/v1/files/file-x/content", None),
    ("DELETE", "/v1/files/file-x", None),
    ("GET", "/v1/batches/batch-x", None),
    ("POST", "/v1/batches/batch-x/cancel", None),
    ("GET", "/v1/responses/resp-x", None),
    ("DELETE", "/v1/responses/resp-x", None),
    ("POST", "/v1/responses/resp-x/cancel", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/x/y", None),
    ("GET", "/model_info", None),
    ("GET", "/server_info", None),
    ("GET", "/metrics", None),
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("POST", "/ping", None),
    ("GET", "/version", None),
    ("GET", "/v1/loads?include=core,queues", None),
    ("GET", "/get_load", None),
    ("GET", "/load", None),
    ("POST", "/parse_function_call", {"text": "<tool_call>{}", "tools": [TOOL], "tool_call_parser": "hermes"}),
    ("POST", "/separate_reasoning", {"text": "<think>a</think>b", "reasoning_parser": "qwen3"}),
    ("GET", "/openapi.json", None),
    ("GET", "/v1/engine/stats", None),
    ("GET", "/", None),
]  # fmt: skip
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 127, 128, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30, 0.0,
    -0.5, 1e-300, 1e300, 0.1, "", "a", "\x00", "\U0001f600", "<|im_start|>", "a" * 300, "x" * 5000, "(a+)+b", "[", "{",
    "%s%n", "../../etc/passwd", "file:///etc/passwd", "{{ 7 * 7 }}", [], [[]], [None], {}, {"": ""}, {"$ref": "#"},
    [1, "a", None], [0] * 2000, ["a"] * 200, {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"role": "user", "content": 5},
]  # fmt: skip
RAW_JUNK = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    '"\\ud800"',
    '"\\udc00\\ud800"',
    "01",
    "9" * 5000,
    '{"a":1,"a":2}',
]
HEADERS = [
    b"content-type: text/plain", b"content-type: multipart/form-data; boundary=x", b"content-encoding: gzip",
    b"authorization: Bearer \xff\xfe", b"x-request-id: " + b"r" * 300, b"last-event-id: 3", b"last-event-id: x-99",
    b"x-resumable: true", b"expect: 100-continue", b"accept: \x80", b"range: bytes=0-1,5-2", b"upgrade: websocket",
    b"transfer-encoding: gzip", b"cookie: " + b"a=b;" * 500, b"host: evil", b"priority: u=9",
]  # fmt: skip


class Malformed(NamedTuple):
    """Bytes to send, and whether the client leaves without reading what comes."""

    route: str
    data: bytes
    leaves: bool = False


class Fuzzer:
    """`fields`: names of fields that the API knows, to add to bodies."""

    def __init__(self, seed: int, fields: list[str]) -> None:
        self._rng = random.Random(seed)
        self._fields = fields

    def request(self) -> Malformed:
        """The next one."""
        rng = self._rng
        method, path, body = rng.choice(VALID)
        if rng.random() < 0.1:
            method = rng.choice(
                ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW", "get", "P\xf6ST"]
            )
        route = path
        if rng.random() < 0.08:
            path = self._path(path)
        data = b"" if body is None else self._body(body)
        headers = [b"host: x", b"connection: close", b"content-type: application/json"]
        if rng.random() < 0.15:
            headers[rng.choice([0, 2])] = rng.choice(HEADERS)
        if path.startswith("/v1/files") and method == "POST" and rng.random() < 0.8:
            headers[2] = b"content-type: multipart/form-data; boundary=b"
            data = self._form()
        return self._framed(route, method, path, headers, data)

    # ------------------------------------------------------------------ bodies

    def _body(self, body: Any) -> bytes:
        rng = self._rng
        changed = copy.deepcopy(body)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            self._change(changed)
        text = json.dumps(changed)
        if rng.random() < 0.1 and '"JUNK"' not in text:
            text = json.dumps(self._with_marker(changed)).replace('"JUNK"', rng.choice(RAW_JUNK))
        data = text.encode("utf-8", "surrogatepass")
        if rng.random() < 0.15:
            data = self._bytes(data)
        if rng.random() < 0.02:
            depth = rng.choice([127, 128, 129, 1000, 100_000])
            data = data[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}"
        return data

    def _change(self, value: Any) -> None:
        """One change somewhere inside."""
        rng = self._rng
        places = list(_places(value))
        if not places:
            return
        holder, key = rng.choice(places)
        action = rng.random()
        if action < 0.6:
            holder[key] = copy.deepcopy(rng.choice(JUNK))
        elif action < 0.75:
            del holder[key]
        elif action < 0.85 and isinstance(holder, dict):
            holder[rng.choice(["", "A" * 100, f"{key} ", f"_{key}"])] = holder.pop(key)
        elif isinstance(value, dict):
            value[rng.choice(self._fields)] = copy.deepcopy(rng.choice(JUNK))

    def _with_marker(self, value: Any) -> Any:
        value = copy.deepcopy(value)
        places = list(_places(value))
        if places:
            holder, key = self._rng.choice(places)
            holder[key] = "JUNK"
        return value

    def _bytes(self, data: bytes) -> bytes:
        rng, made = self._rng, bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(made) + 1)
            match rng.randrange(5):
                case 0:
                    made[at:at] = rng.randbytes(rng.randint(1, 9))
                case 1:
                    del made[at:]
                case 2 if made:
                    made[at % len(made)] ^= 1 << rng.randrange(8)
                case 3:
                    made[at:at] = rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\xef\xbb\xbf"])
                case _:
                    made += made[: rng.randint(0, 40)]
        return bytes(made)

    def _form(self) -> bytes:
        rng = self._rng
        purpose, name = (
            rng.choice([b"batch", b"", b"\xff", b"fine-tune"]),
            rng.choice([b"a.jsonl", b"../x", b"", b"\xff" * 9]),
        )
        line = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": TEXT}).encode()
        content = rng.choice([line + b"\n", b"", b"{", b"\xff\xfe\n", line[:-3], rng.randbytes(50)])
        form = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n' + purpose
        form += b'\r\n--b\r\ncontent-disposition: form-data; name="file"; filename="' + name + b'"\r\n\r\n' + content
        form += b"\r\n--b--\r\n"
        return self._bytes(form) if rng.random() < 0.5 else form

    # ------------------------------------------------------------------ heads and framing

    def _path(self, path: str) -> str:
        rng = self._rng
        junk = [
            "/..",
            "%2e%2e",
            "//",
            "%00",
            "?",
            "?a=" + "b" * 500,
            "#x",
            "%ff",
            ";a",
            "\x7f",
            "é",
            "%",
            "/x" * 200,
            " ",
        ]
        at = rng.randrange(len(path) + 1)
        return path[:at] + rng.choice(junk) + path[at:]

    def _framed(self, route: str, method: str, path: str, headers: list[bytes], data: bytes) -> Malformed:
        rng = self._rng
        line = f"{method} {path} ".encode() + b"HTTP/1.1"
        length, leaves = [b"content-length: %d" % len(data)], False
        kind = rng.random()
        if kind < 0.05:
            wrong = [b"-1", b"x", b"", b"1, 2", b"0x10", b"9" * 30, b"%d" % (len(data) + 5)]
            length, leaves = [b"content-length: " + rng.choice(wrong)], True
        elif kind < 0.08:
            length.append(b"transfer-encoding: chunked")
        elif kind < 0.14:
            length, data = [b"transfer-encoding: chunked"], self._chunked(data)
            leaves = True
        elif kind < 0.16:
            line = rng.choice([line[:-8] + b"HTTP/9.9", line[:-9], b"", rng.randbytes(20), line.replace(b" ", b"  ")])
        head = b"\r\n".join([line, *headers, *length]) + b"\r\n\r\n"
        if rng.random() < 0.03:
            head = self._bytes(head)
            leaves = True
        whole = head + data
        if rng.random() < 0.04:
            return Malformed(route, whole[: rng.randrange(len(whole) + 1)], True)
        return Malformed(route, whole, leaves)

    def _chunked(self, data: bytes) -> bytes:
        rng, made = self._rng, b""
        while data:
            size = rng.choice([1, 3, 10, 100])
            part, data = data[:size], data[size:]
            wrong = rng.random() < 0.03
            made += (
                (rng.choice([b"zz", b"-1", b"ffffffffffffffffff", b""]) if wrong else b"%x" % len(part))
                + b"\r\n"
                + part
                + b"\r\n"
            )
        return made + b"0\r\n\r\n"


def _places(value: Any) -> Any:
    """(holder, key) of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


async def send(address: tuple[str, int], one: Malformed, seconds: float) -> tuple[int, bytes]:
    """(status, body) of what the server says; (0, b"") if it closes without a word. Raises TimeoutError.

    Who leaves, does so when the server has had a moment to look at what is there.
    """
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(*address, limit=1 << 22)
        try:
            writer.write(one.data)
            if one.leaves:
                writer.write_eof()
                try:
                    async with asyncio.timeout(0.05):
                        data = await reader.read()
                except TimeoutError:
                    return 0, b""
            else:
                data = await reader.read()
        except ConnectionError:
            return 0, b""
        finally:
            writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    while head.startswith(b"HTTP/1.1 100"):
        head, _, body = body.partition(b"\r\n\r\n")
    return (int(head[9:12]) if head.startswith(b"HTTP/1.") else 0), body
