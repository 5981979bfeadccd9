"""Chat templates run in a sandbox with limits."""

from __future__ import annotations

import time

import pytest
from stepwire_scheduler import chat_template
from stepwire_scheduler.chat_template import ChatTemplate
from stepwire_scheduler.errors import ChatTemplateError

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, str]] | None = None) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages or USER)


def test_messages_special_tokens_and_the_generation_prompt_are_there() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert render(source) == "<s>[user]hi[assistant]"


def test_what_templates_of_published_models_use_works() -> None:
    assert render("{{ messages | tojson }}") == '[{"role": "user", "content": "hi"}]'
    assert render("{{ {'é': 1} | tojson(indent=1) }}") == '{\n "é": 1\n}'
    loop = "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(loop) == "1"
    assert render("a{% generation %}b{% endgeneration %}c") == "abc"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("{% set ns = namespace(x=1) %}{% set ns.x = ns.x * 2 %}{{ ns.x }}") == "2"


def test_content_is_never_run_as_a_template() -> None:
    content = "{{ 7 * 7 }} {% for %} {{ messages.__class__ }}"
    assert render("{{ messages[0].content }}", [{"role": "user", "content": content}]) == content


def test_a_refusal_is_one_line_in_the_templates_words() -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must\n alternate') }}")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__()[0] }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}{{ cycler.__init__.__globals__.os.system('id') }}",
        "{{ undefined_name.attribute }}",
        "{{ 1 / 0 }}",
        "{{ 'x' * 10000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ range(999999999) }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_an_escape_or_a_failure_is_an_error_without_internals(source: str) -> None:
    with pytest.raises(ChatTemplateError) as caught:
        render(source)
    assert "Error" not in caught.value.message
    assert "/" not in caught.value.message


def test_a_source_that_is_no_template_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 0.1)
    started = time.monotonic()
    with pytest.raises(ChatTemplateError, match=r"took too long|wrote too much"):
        render(source)
    assert time.monotonic() - started < 30  # without the limit: hours
