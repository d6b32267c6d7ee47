"""The trained part of a chat is the assistant's words and the token that ends its turn, in any template."""

import pytest
from transformers import PreTrainedTokenizerFast

from fettle.data import (
    DEFAULT_CHAT_TEMPLATE,
    end_of_turn,
    ensure_chat_template,
    generation_prompt,
    has_own_chat_template,
    render,
)
from fettle.errors import UserError

TURNS = [
    {"role": "user", "content": "Hello there!"},
    {"role": "assistant", "content": "Hello! How are you?"},
    {"role": "user", "content": "The sum of two and two?"},
    {"role": "assistant", "content": "It is 4."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def trained(tokenizer, messages, **options) -> list[str]:
    return [segment.text for segment in render(tokenizer, messages, **options) if segment.is_trained]


def whole(tokenizer, messages) -> str:
    return "".join(segment.text for segment in render(tokenizer, messages))


def test_trained_are_the_words_and_the_end_token(family):
    expected = [family.answer(turn["content"]) for turn in TURNS if turn["role"] == "assistant"]
    assert trained(family.tokenizer, TURNS) == expected
    assert all(segment.text for segment in render(family.tokenizer, TURNS))
    assert whole(family.tokenizer, TURNS) == family.tokenizer.apply_chat_template(TURNS, tokenize=False)


@pytest.mark.parametrize("head", ["", " \n "])
@pytest.mark.parametrize("tail", ["", " ", "\n\n"])
def test_white_space_around_the_words_may_be_trimmed(family, head, tail):
    turns = [{**turn, "content": f"{head}{turn['content']}{tail}"} for turn in TURNS]
    words = [text.removesuffix(family.end).strip() for text in trained(family.tokenizer, turns)]
    assert words == ["Hello! How are you?", "It is 4."]
    assert whole(family.tokenizer, turns) == family.tokenizer.apply_chat_template(turns, tokenize=False)


def test_words_that_look_like_the_template_stay_whole(family):
    """An answer may quote the template itself; its end is where the whole piece after it fits."""
    template_text = whole(family.tokenizer, TURNS[:2]).replace("think>", "")
    turns = [TURNS[0], {"role": "assistant", "content": f"It writes:\n{template_text}so"}, *TURNS[2:]]
    expected = [family.answer(turns[1]["content"]), family.answer("It is 4.")]
    assert trained(family.tokenizer, turns) == expected


def test_repeated_and_nested_words_are_told_apart(family):
    turns = [{**turn, "content": "It" if index % 2 else "It is"} for index, turn in enumerate(TURNS * 2)]
    segments = render(family.tokenizer, turns)
    assert [s.text.removesuffix(family.end).strip() for s in segments if s.is_trained] == ["It"] * 4
    assert all(not segment.text.strip().endswith("It") for segment in segments if not segment.is_trained)


def test_system_text_is_read_and_not_trained(family):
    text = whole(family.tokenizer, [SYSTEM, *TURNS])
    assert text.count("Be brief.") == 1
    assert text.index("Be brief.") < text.index("Hello there!")
    assert not any("Be brief." in words for words in trained(family.tokenizer, [SYSTEM, *TURNS]))


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_system_turn_the_template_has_no_place_for_joins_the_user_turn(families, name):
    tokenizer = families[name].tokenizer
    joined = [{"role": "user", "content": "Be brief.\n\nHello there!"}, *TURNS[1:]]
    assert whole(tokenizer, [SYSTEM, *TURNS]) == tokenizer.apply_chat_template(joined, tokenize=False)
    prompt = generation_prompt(tokenizer, [SYSTEM, TURNS[0]])
    assert prompt == tokenizer.apply_chat_template(joined[:1], tokenize=False, add_generation_prompt=True)


def test_generation_prompt_is_how_the_training_text_begins(family):
    prompt = generation_prompt(family.tokenizer, TURNS[:1])
    assert whole(family.tokenizer, TURNS[:2]).startswith(prompt)
    assert "Hello! How" not in prompt


def test_what_follows_the_generation_prompt_is_trained_from_its_first_character(family):
    """Nothing lies between the prompt that the model is given in use and what it learned to say."""
    prompt = generation_prompt(family.tokenizer, TURNS[:1])
    text = whole(family.tokenizer, TURNS[:2])
    if family.name != "thinking":  # which writes an empty block of thoughts itself
        assert text.startswith(prompt + trained(family.tokenizer, TURNS[:2])[0])


def test_the_end_of_turn_is_found(family):
    assert end_of_turn(family.tokenizer) == family.end


def test_only_the_completion_is_trained_where_it_is_marked(family):
    words = trained(family.tokenizer, [SYSTEM, *TURNS], completion_turns=1)
    assert [text.removesuffix(family.end).strip() for text in words] == ["It is 4."]


def test_an_empty_answer_is_not_trained(family):
    turns = [TURNS[0], {"role": "assistant", "content": ""}, *TURNS[2:]]
    words = trained(family.tokenizer, turns)
    assert [text.removesuffix(family.end).strip() for text in words] == ["It is 4."]


def test_turns_that_do_not_alternate_are_refused_in_the_templates_words(families):
    with pytest.raises(UserError, match="Conversation roles must alternate"):
        render(families["gemma"].tokenizer, [TURNS[0], *TURNS])


def test_a_turn_that_the_template_drops_is_refused(families):
    turns = [*TURNS, {"role": "tool", "content": "4"}, TURNS[3]]
    with pytest.raises(UserError, match=r'turn 5 \(role "tool"\)'):
        render(families["phi"].tokenizer, turns)


def test_a_template_that_changes_the_words_beyond_recognition_is_refused(families):
    tokenizer = make_like(
        families["chatml"].tokenizer, "{% for m in messages %}{{ m['content'] | title }}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"cannot be located|dropped"):
        render(tokenizer, TURNS)


def test_thoughts_belong_to_the_last_answer_and_are_gone_from_earlier_ones(families):
    thought = "<think>\nTwo and two\n</think>\n\n"
    turns = [
        TURNS[0],
        {"role": "assistant", "content": thought + "Hello!"},
        TURNS[2],
        {"role": "assistant", "content": thought + "It is 4."},
    ]
    tokenizer = families["thinking"].tokenizer
    assert whole(tokenizer, turns) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert trained(tokenizer, turns) == ["Hello!<|im_end|>", thought + "It is 4.<|im_end|>"]


def test_a_template_without_an_end_token_trains_the_words_alone(families):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = make_like(families["chatml"].tokenizer, template)
    assert end_of_turn(tokenizer) is None
    assert trained(tokenizer, TURNS) == ["Hello! How are you?", "It is 4."]


def test_a_base_model_gets_a_template_that_needs_no_new_tokens(base: PreTrainedTokenizerFast):
    size = len(base)
    assert not has_own_chat_template(base)
    assert ensure_chat_template(base)
    assert not ensure_chat_template(base)
    assert not has_own_chat_template(base)
    assert len(base) == size
    text = whole(base, [SYSTEM, *TURNS[:2]])
    assert text == (
        "<s><|system|>\nBe brief.</s>\n<|user|>\nHello there!</s>\n<|assistant|>\nHello! How are you?</s>\n"
    )
    assert trained(base, TURNS[:2]) == ["Hello! How are you?</s>"]
    assert generation_prompt(base, TURNS[:1]).endswith("</s>\n<|assistant|>\n")


def test_the_default_template_starts_as_the_tokenizer_does(families):
    tokenizer = make_like(families["chatml"].tokenizer, None)  # adds no <s> of its own
    ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE


def make_like(tokenizer: PreTrainedTokenizerFast, template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )
