"""Chat templates as text: read off Jinja templates, and the built-in ones against those of real models."""

import jinja2
import pytest

import actorserve.lang as sgl
from actorserve.errors import RequestError
from actorserve.lang.model_template import _text, derived, model_template
from actorserve.lang.templates import ChatTemplate, chat_template_of, get_chat_template

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if opened %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if opened %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {{ sys if loop.first else '' }}{{ m.content }} [/INST]"
    "{% else %}{{ m.content }} </s>{% endif %}{% endfor %}"
)


def render_of(source: str):
    template = jinja2.Environment().from_string(source)
    return lambda messages, opened: template.render(messages=messages, opened=opened)


def test_pieces_of_a_template():
    template = derived(render_of(CHATML))
    assert template.roles == get_chat_template("chatml").roles and template.default_system_prompt == "Be good."
    assert derived(render_of(LLAMA_3)).roles == get_chat_template("llama-3-instruct").roles


def test_a_template_that_is_more_than_pieces_gives_none():
    assert derived(render_of(LLAMA_2)) is None, "its system prompt stands inside the first user turn"
    assert derived(render_of("{{ messages[0].content }}")) is None


def test_the_built_in_llama_2_puts_the_system_prompt_into_the_first_turn():
    template = get_chat_template("llama-2-chat")
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    for messages in (turns, turns[1:]):
        assert _text(template, messages) == render_of(LLAMA_2)(messages, True)


@pytest.mark.parametrize(
    "model, name",
    [
        ("SmolLM2-135M-Instruct", "smollm"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3-instruct"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama-2-chat"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5"),
        ("Qwen/Qwen3-8B", "chatml"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistral"),
        ("google/gemma-2-9b-it", "gemma-it"),
        ("claude-x", "claude"),
        ("something", "default"),
    ],
)
def test_models_by_name(model, name):
    assert chat_template_of(model).name == name


def test_a_registered_template_goes_first():
    mine = ChatTemplate(name="mine", roles={"user": ("> ", "\n"), "assistant": ("< ", "\n")}, matches="llama-3-mine")
    sgl.register_chat_template(mine)
    assert chat_template_of("llama-3-mine-instruct") is mine
    with pytest.raises(RequestError, match="no role 'system'"):
        mine.prefix_and_suffix("system", [])
    with pytest.raises(RequestError, match="no chat template"):
        get_chat_template("none")


def test_the_real_models_template(smollm):
    own, built_in = model_template(smollm), get_chat_template("smollm")
    assert (own.roles, own.default_system_prompt) == (built_in.roles, built_in.default_system_prompt)
    assert model_template("/nowhere") is None
