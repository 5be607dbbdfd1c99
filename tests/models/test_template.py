"""Chat templates: what they get, what they may not do, and that hostile ones end soon."""

from typing import Any

import msgspec
import pytest

from actorserve.errors import ActorserveError, RequestError, StartupError
from actorserve.models.control import ControlTokens
from actorserve.models.sandbox import MAX_CHARS
from actorserve.models.template import MAX_MESSAGES, ChatTemplate, decode_chat

CONTROL = ControlTokens(["<|im_start|>", "<|im_end|>", "<s>"])
USER = [{"role": "user", "content": "hi"}]
ECHO = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}go{% endif %}"


def render(source: str | dict[str, str], messages: list[dict[str, Any]] = USER, **more: Any) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"}, CONTROL)
    payload = msgspec.json.encode({"messages": messages} | more)
    return CONTROL.unmask(template.render(decode_chat(payload)))


# ------------------------------------------------------------------ the same as Hugging Face


HELPERS = """{%- set state = namespace(n=0) %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% continue %}{% endif %}
    {%- set state.n = state.n + 1 %}
    {% generation %}{{ bos_token }}{{ m | tojson }}{{ m.content | trim }}
    {{- state.n ~ '/' ~ loop.length }}{% endgeneration %}
    {%- if state.n > 2 %}{% break %}{% endif %}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson(indent=2) }}
    {{- tools | tojson(separators=(',', ':'), sort_keys=true) }}{% endif %}
{%- macro shout(x) %}{{ x | upper }}!{% endmacro %}{{ shout('ok') }}{{ tools is defined }}{{ documents }}
{{- '%s and %d' % ('é', 3) }}{{ ['a', 'b'] | join(', ') }}{{ {'k': '<é>'} | tojson(ensure_ascii=True) }}
{{- messages[1].content | tojson(ensure_ascii=True) }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'x' * 3 }}{{ '{}-{}'.format(1, 'b') }}
"""


def test_renders_as_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    tools = [{"type": "function", "function": {"name": "f", "description": 'it\'s <b> & "é"'}}]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "  a < b\n é 🎉 "},
        {"role": "assistant", "content": "x > y"},
        *USER * 3,
    ]
    for given in (None, tools):
        want, _ = render_jinja_template([messages], tools=given, chat_template=HELPERS, bos_token="<s>")
        assert render(HELPERS, messages, tools=given, add_generation_prompt=False) == want[0]


def test_continue_final_message_as_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [*USER, {"role": "assistant", "content": "Once upon  "}]
    for source in (ECHO, ECHO.replace("m.content", "m.content | trim")):
        want, _ = render_jinja_template([messages], chat_template=source, continue_final_message=True)
        assert render(source, messages, continue_final_message=True) == want[0]


def test_continue_needs_the_final_message() -> None:
    with pytest.raises(RequestError) as caught:
        render("{% for m in messages[:-1] %}{{ m.content }}{% endfor %}", continue_final_message=True)
    assert caught.value.param == "continue_final_message"
    with pytest.raises(RequestError):
        render(ECHO, continue_final_message=True, add_generation_prompt=True)


# ------------------------------------------------------------------ options


def test_generation_prompt() -> None:
    assert render(ECHO) == "user:hi;go"
    assert render(ECHO, add_generation_prompt=False) == "user:hi;"


def test_parts_are_joined_unless_the_template_takes_them() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert render(ECHO, parts) == "user:a\nb;go"
    loop = "{% for p in m.content %}[{{ p.text }}]{% endfor %}"
    takes = "{% for m in messages %}" + loop + "{% endfor %}"
    assert render(takes, parts) == "[a][b]"
    assert render(takes, USER) == "[hi]"  # a template that takes parts only gets a string as one
    both = takes.replace(loop, "{% if m.content is string %}{{ m.content }}{% else %}" + loop + "{% endif %}")
    assert render(both, USER) == "hi" and render(both, parts) == "[a][b]"


def test_other_parts_are_refused() -> None:
    for content in ([{"type": "image_url", "image_url": {"url": "x"}}], [3], 3, [{"type": "text"}]):
        with pytest.raises(RequestError) as caught:
            render(ECHO, [{"role": "user", "content": content}])
        assert caught.value.param == "messages"


def test_kwargs() -> None:
    source = ECHO + "{{ enable_thinking }}"
    assert render(source, chat_template_kwargs={"enable_thinking": False, "unknown": 1}) == "user:hi;goFalse"
    for name in ("messages", "tokenize", "tools", "bos_token", "range", "_x", "a b"):
        with pytest.raises(RequestError) as caught:
            render(source, chat_template_kwargs={name: 1})
        assert caught.value.param == "chat_template_kwargs"


def test_tools_choose_the_template() -> None:
    sources = {"default": "plain", "tool_use": "{{ tools[0].name }}"}
    assert render(sources) == "plain"
    assert render(sources, tools=[{"name": "f"}]) == "f"


def test_tool_arguments_are_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    source = "{{ messages[1].tool_calls[0].function.arguments | tojson }}{{ messages[1].content is defined }}"
    assert render(source, messages) == '{"a": [1]}False'
    call["function"]["arguments"] = "no json"
    assert render(source, messages) == '"no json"False'


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b"{}",
        b'{"messages": []}',
        b'{"messages": [1]}',
        b'{"messages": [{"content": "x"}]}',
        b'{"messages": [{"role": "user"}]}',
        b'{"messages": [{"role": "endoftext", "content": "x"}]}',
        b'{"messages": [{"role": ["user"], "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "tools": 3}',
        b'{"messages": [{"role": "user", "content": "x"}], "tokenize": false}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": ' + b"[" * 5000,
        b'{"messages": [{"role": "user", "content": "x", "y": ' + b"[" * 900 + b"]" * 900 + b"}]}",
        b'{"messages": [' + b",".join([b'{"role": "user", "content": "x"}'] * (MAX_MESSAGES + 1)) + b"]}",
    ],
)
def test_bad_conversations(payload: bytes) -> None:
    template = ChatTemplate("{{ messages | tojson }}", {}, CONTROL)
    with pytest.raises(RequestError) as caught:
        template.render(decode_chat(payload))
    assert caught.value.param == "messages"


def test_what_a_template_says_reaches_the_client() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError) as caught:
        render("{{ messages[0].content.x.y }}")
    assert "object" not in caught.value.message  # nothing of Python's inside


def test_a_broken_template_is_a_startup_error() -> None:
    for source in (
        "{% for %}",
        "{{ x",
        "{% nosuchtag %}",
        "{{ x | nosuchfilter }}",
        "{% if 1 %}" * 200 + "{% endif %}" * 200,
    ):
        with pytest.raises(StartupError):
            ChatTemplate(source, {}, CONTROL)


# ------------------------------------------------------------------ hostile templates

DOUBLE = "{%% set n = namespace(x='aaaa') %%}{%% for i in range(60) %%}{%% set n.x = %s %%}{%% endfor %%}{{ n.x }}"
LAUGH = "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
HOSTILE = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "much output": "{% for i in range(9999) %}{{ 'x' * 10000 }}{% endfor %}",
    "much output in a set": "{% set x %}{% for i in range(9999) %}{{ 'x' * 10000 }}{% endfor %}{% endset %}",
    "much output in a macro": "{% macro m() %}{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}{% endmacro %}"
    "{{ m() }}",
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat a list": "{{ [0] * 10**10 }}",
    "repeat by a bool": "{{ ('a' * 16000000) * 2 }}",
    "power": "{{ 10 ** 10 ** 10 }}",
    "power by steps": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "center": "{{ 'a' | center(10**9) }}",
    "constant center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent from arguments": "{{ '%*d' % (1000000000, 1) }}",
    "percent often": "{{ ('%s' * 99999) % (('a' * 99999,) * 99999) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format from arguments": "{{ '{:>{}}'.format(1, 1000000000) }}",
    "format often": "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "tilde": DOUBLE % "n.x ~ n.x",
    "plus": DOUBLE % "n.x + n.x",
    "join filter": DOUBLE % "[n.x, n.x] | join",
    "join method": DOUBLE % "''.join([n.x, n.x])",
    "replace filter": DOUBLE % "n.x | replace('a', 'aa')",
    "replace method": DOUBLE % "n.x.replace('a', 'aa')",
    "billion laughs, json": LAUGH + "{{ n.x | tojson }}",
    "billion laughs, output": LAUGH + "{{ n.x }}",
    "billion laughs, string": LAUGH + "{{ n.x | string | length }}",
    "billion laughs, percent": LAUGH + "{{ '%s' % (n.x,) }}",
    "sum of lists": "{{ ([range(9999) | list] * 9999) | sum(start=[]) | length }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "call blocks": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}{% macro g(n) %}{% call m() %}"
    "{% if n %}{{ g(n - 1) }}{% endif %}{% endcall %}{% endmacro %}{{ g(50) }}",
    "endless loop": "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    "indent": "{{ 'a\n' | indent(10**8) }}",
    "wordwrap": "{{ ('a' * 99999) | wordwrap(1, wrapstring='b' * 99999) | length }}",
    "batch": "{{ [1] | batch(10**8, 'x') | list }}",
    "round": "{{ 1.5 | round(10**8, 'ceil') }}",
    "json indent": "{{ [1] | tojson(indent=10**9) }}",
    "strftime": "{{ strftime_now('%100000000d') }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "globals of a helper": "{{ raise_exception.__globals__.json.x }}",
    "environment": "{{ self._TemplateReference__context.environment.x }}",
    "change of the messages": "{{ messages.append(1) }}",
    "change of a message": "{{ messages[0].update(role='system') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_an_error(name: str) -> None:
    """Also what runs at compile time (constant folding) is limited: the test would hang or die of memory."""
    template = ChatTemplate(HOSTILE[name], {}, CONTROL)
    with pytest.raises(ActorserveError) as caught:
        template.render(decode_chat(msgspec.json.encode({"messages": USER})))
    assert isinstance(caught.value, RequestError) and caught.value.param == "messages"


def test_large_conversations_pass() -> None:
    text = "word " * (MAX_CHARS // 40)
    messages = [{"role": "user", "content": text}] * 4 + USER * 1000
    assert len(render(ECHO, messages)) == 4 * len("user:;" + text) + 1000 * len("user:hi;") + 2
    with pytest.raises(RequestError, match="too large"):
        render(ECHO, [{"role": "user", "content": "x" * (MAX_CHARS + 1)}])
