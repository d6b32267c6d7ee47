"""Chat templates from outside: rendered as transformers renders them, and stopped where they do not end."""

import os
import signal
import time
from threading import Thread

import pytest

from fettle.checkpoints.locate import embedded_model
from fettle.data import template
from fettle.data.template import render_template
from fettle.errors import ModelFault, UserError
from fettle.models.load import load_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": '  Wie groß ist 漢字? 🙂 <b> & "x"\n'},
    {"role": "assistant", "content": "42", "thinking": "hm", "tool_calls": None},
]

# What transformers adds to Jinja, and what its sandbox allows.
ORDINARY = [
    "{% for m in messages %}{{ m.role | upper }}: {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}",
    "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{%- macro show(m) %}<{{ m.content }}>{% endmacro -%}{% for m in messages %}{{ show(m) }}{% endfor %}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ messages[-1].reasoning_content }}{{ messages[-1].tool_calls is defined }}{{ bos_token }}",
    "{{ dict(a=1) }}{{ '%s-%d' % ('a', 3) }}{{ 'x' * 5 }}{{ range(3) | list }}{{ strftime_now('%Y') }}",
    "{% if add_generation_prompt %}ask{% else %}told{% endif %}{{ tools }}{{ undefined_name }}",
]

ENDLESS = {
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "CPU time"),
    "loops in a loop": ("{% for a in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}", "CPU time"),
    "power": ("{{ 9 ** (9 ** 9) }}", "CPU time"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deeply"),
    "two calls": ("{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}", "CPU"),
    "nested source": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "too deeply"),
    "repeated": ("{{ 'a' * 10 ** 10 }}", "memory"),
    "repeated, known when rendering": ("{{ messages[0].content * 10 ** 10 }}", "memory"),
    "list": ("{{ [messages] * 10 ** 10 }}", "memory"),
    "padded": ("{{ '%1000000000d' % messages | length }}", ""),  # time or memory
    "formatted": ("{{ '{:>2000000000}'.format(messages[0].content) }}", "memory"),
    "centred": ("{{ messages[0].content | center(10 ** 10) }}", "memory"),
    "doubled": (
        "{% set ns = namespace(t='ab') %}{% for i in range(64) %}{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t }}",
        "",  # time or memory
    ),
    "long text": ("{{ messages[0].content * 10 ** 7 }}", "characters"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded_model())


@pytest.fixture(scope="module")
def quick():
    """The limit on time shortened, for a process started after this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "CPU_SECONDS", 0.3)
        template._renderer.close()
        yield
        template._renderer.close()


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("source", ORDINARY)
def test_ordinary_templates_render_as_in_transformers(tokenizer, source, asks) -> None:
    tokenizer.chat_template = source
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=asks)
    assert render_template(tokenizer, CHAT, for_generation=asks) == expected


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_end_is_stopped_and_named(tokenizer, quick, kind) -> None:
    source, limit = ENDLESS[kind]
    tokenizer.chat_template = source
    with pytest.raises(ModelFault, match="chat template was stopped") as caught:
        render_template(tokenizer, CHAT)
    assert limit in str(caught.value)
    assert str(embedded_model() / "chat_template.jinja") in str(caught.value)
    started = time.perf_counter()
    with pytest.raises(ModelFault):  # it is not run again
        render_template(tokenizer, CHAT)
    assert time.perf_counter() - started < 0.1
    tokenizer.chat_template = "fine"
    assert render_template(tokenizer, CHAT) == "fine"


def test_a_template_that_ends_for_some_chats_only(tokenizer, quick) -> None:
    endless = ENDLESS["loops"][0]
    tokenizer.chat_template = f"{{% if messages | length > 1 %}}{endless}{{% endif %}}fine"
    assert render_template(tokenizer, CHAT[:1]) == "fine"
    with pytest.raises(ModelFault, match="CPU time"):
        render_template(tokenizer, CHAT)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for m in messages %}", "not valid Jinja"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].content.missing.deeper }}", "refuses this chat"),
        ("{{ raise_exception('no system turn') }}", 'refuses this chat: "no system turn"'),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ '\\ud800' }}", "surrogate"),
        ({"rag": "x"}, "multiple chat templates"),
    ],
)
def test_a_template_at_fault_is_one_sentence(tokenizer, source, says) -> None:
    tokenizer.chat_template = source
    with pytest.raises(UserError, match=says):
        render_template(tokenizer, CHAT)


def test_threads_share_the_process(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"
    found: dict[int, list[str]] = {}

    def work(number: int) -> None:
        chat = [{"role": "user", "content": str(number)}]
        found[number] = [render_template(tokenizer, chat) for _ in range(20)]

    threads = [Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [str(number)] * 20 for number in range(4)}


def test_an_interrupted_rendering_leaves_no_reply_behind(tokenizer, monkeypatch) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"

    def interrupt(stream: object) -> None:
        raise KeyboardInterrupt

    render_template(tokenizer, CHAT)
    with monkeypatch.context() as patch:
        patch.setattr(template, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render_template(tokenizer, CHAT[:1])
    assert render_template(tokenizer, CHAT[1:]) == CHAT[1]["content"]


def test_a_killed_process_is_an_error_and_the_next_starts(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages[1].content }}"
    os.killpg(template._renderer.start().pid, signal.SIGKILL)
    with pytest.raises(ModelFault, match="exit code -9"):
        render_template(tokenizer, CHAT)
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert render_template(tokenizer, CHAT) == "Be brief."


def test_an_error_that_a_template_raises_is_cut_to_one_line(tmp_path):
    """Its length and its line breaks are the template's choice."""
    tokenizer = load_tokenizer(embedded_model())
    for source in (
        "{{ raise_exception('A' * 5000000) }}",
        "{{ raise_exception('A\nB ' * 1000) }}",
        "{{ {}['B' * 5000000].y }}",
    ):
        tokenizer.chat_template = source
        with pytest.raises(UserError) as error:
            render_template(tokenizer, CHAT)
        assert len(str(error.value)) < 700 and "\n" not in str(error.value)
