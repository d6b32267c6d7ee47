"""Held-out rows as questions, and answers that are exact or not."""

import pytest

from fettle.data.formats import Row
from fettle.engine.load import load
from fettle.engine.request import Sampling
from fettle.engine.text import Engine, generate
from fettle.evaluation import Answer, Question, answer, exact_share, questions
from fettle.evaluation.answers import LONGEST_ANSWER

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def chat(*turns: tuple[str, str], where: str = "row 1") -> Row:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Row(where, "messages", messages=messages)


@pytest.fixture(scope="module")
def loaded(small_model):
    return load(small_model, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


def test_a_chat_becomes_the_question_before_its_last_answer(tokenizer):
    row = chat(("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D"))
    (question,) = questions([row], tokenizer)
    assert question == Question(
        text="<|system|>\nS<|end|>\n<|user|>\nA<|end|>\n<|assistant|>\nB<|end|>\n<|user|>\nC<|end|>\n<|assistant|>\n",
        prompt="C",
        expected="D",
        is_rendered=True,
    )


def test_a_prompt_and_its_completion_are_a_turn_where_there_is_a_template(tokenizer, small_model):
    row = Row("row 1", "prompt / completion", prompt="A", completion="B")
    (question,) = questions([row], tokenizer)
    assert (question.text, question.expected) == ("<|user|>\nA<|end|>\n<|assistant|>\n", "B")
    plain = load(small_model)[1]
    plain.chat_template = None
    (question,) = questions([row], plain)
    assert (question.text, question.is_rendered) == ("A", False)


@pytest.mark.parametrize(
    "row",
    [
        Row("row 1", "text", text="A text has no answer."),
        chat(("user", "A"), ("assistant", "B"), ("user", "C")),
        chat(("user", "A"), ("assistant", "  ")),
        chat(("assistant", "B")),
    ],
    ids=["text", "ends with the user", "empty answer", "no question"],
)
def test_rows_without_an_answer_are_left_out(tokenizer, row):
    assert questions([row], tokenizer) == []


def test_rows_that_the_template_refuses_are_left_out(small_model):
    _, tokenizer = load(small_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    rows = [chat(("user", "no"), ("assistant", "B")), chat(("user", "yes"), ("assistant", "B"))]
    assert [question.prompt for question in questions(rows, tokenizer)] == ["yes"]


def test_answers_come_in_order_and_are_the_greedy_ones(loaded):
    model, tokenizer = loaded
    prompts = ["What is the capital of France?", "Say 3.", "Say 3.", "Be brief."]
    asked = questions([chat(("user", p), ("assistant", "Here is 1!")) for p in prompts], tokenizer)
    room = len(tokenizer("Here is 1!")["input_ids"]) + 8
    given = answer(Engine(model, tokenizer), asked)
    assert [a.question for a in given] == asked
    assert [a.answer for a in given] == [
        generate(model, tokenizer, p, sampling=Sampling(max_new_tokens=room)) for p in prompts
    ]


def test_questions_longer_than_the_context_are_left_out(loaded):
    long = chat(("user", "1 " * 300), ("assistant", "B"))
    asked = questions([long, chat(("user", "Say 3."), ("assistant", "B"))], loaded[1])
    assert [a.question.prompt for a in answer(Engine(*loaded), asked)] == ["Say 3."]
    assert answer(Engine(*loaded), asked[:1]) == answer(Engine(*loaded), []) == []


def test_only_the_very_words_are_exact(trained):
    model, tokenizer = load(trained, device="cpu")
    words = generate(model, tokenizer, "Say 5.", sampling=Sampling(max_new_tokens=30))
    expected = [words, f" {words}\n", words + ".", words.upper(), words[:-1]]
    asked = questions([chat(("user", "Say 5."), ("assistant", e)) for e in expected], tokenizer)
    given = answer(Engine(model, tokenizer), asked)
    assert [a.is_exact for a in given] == [True, True, False, False, False]
    assert exact_share(given) == 0.4


def test_an_expected_answer_too_long_to_be_given_does_not_count(loaded):
    tokenizer = loaded[1]
    texts = ["!" * n for n in (LONGEST_ANSWER, LONGEST_ANSWER + 1)]
    assert [len(tokenizer(text)["input_ids"]) for text in texts] == [256, 257]
    rows = [chat(("user", "A"), ("assistant", text)) for text in texts]
    short, long = questions(rows, tokenizer)
    assert short.is_comparable and not long.is_comparable
    right, wrong, cut = Answer(short, short.expected), Answer(short, "no"), Answer(long, long.expected[:99])
    assert exact_share([right, wrong, cut]) == 0.5
    assert exact_share([right, cut]) == 1.0
    assert exact_share([cut]) is None


def test_there_is_no_share_of_no_answers():
    assert exact_share([]) is None
    assert exact_share([Answer(Question("t", "p", "e", False), "e")]) == 1.0


def test_chats_for_a_tokenizer_without_a_template_are_written_in_the_default_one(small_model):
    _, tokenizer = load(small_model)
    tokenizer.chat_template = None
    (question,) = questions([chat(("user", "A"), ("assistant", "B"))], tokenizer)
    assert question.text == f"<|user|>\nA{tokenizer.eos_token}\n<|assistant|>\n"
