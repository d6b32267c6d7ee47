"""Exact match of generated answers on held-out rows, before and after training.

An answer is exact if the greedy completion equals the held-out row's answer, ignoring white space at the ends. Expected
answers that are too long to be generated completely are shown but not counted. Plain texts have no answers; for them
only the held-out loss is measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fettle.data import Row, ensure_chat_template, generation_prompt, has_own_chat_template
from fettle.data.fit import fit, without_ends
from fettle.data.tokenizer import Tokenizer
from fettle.data.turns import reasoning_of
from fettle.engine.request import Sampling
from fettle.engine.text import Engine
from fettle.errors import ModelFault, UserError

LONGEST_ANSWER = 256
"""Maximum number of generated tokens. A longer expected answer can never match, so it is not counted."""


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out row as a question: the text for the model to continue, the user's prompt, the expected answer.

    is_comparable: the expected answer has at most LONGEST_ANSWER tokens and no reasoning.
    """

    text: str
    prompt: str
    expected: str
    is_rendered: bool
    is_comparable: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """One question with the model's answer."""

    question: Question
    answer: str

    @property
    def is_exact(self) -> bool:
        return self.answer.strip() == self.question.expected.strip()


def questions(rows: Sequence[Row], tokenizer: Tokenizer) -> list[Question]:
    """Return the rows that end in an answer as questions; others, and answers that call a tool, are left out.

    Answers that are not trained on are left out too, as they are not the expected ones. As in training, a tokenizer
    without a chat template gets the default one for chats.
    """
    if any(row.messages for row in rows):
        ensure_chat_template(tokenizer)
    uses_turns = has_own_chat_template(tokenizer)
    found = []
    for row in rows:
        try:
            question = _question(fit(row, tokenizer, uses_turns), tokenizer)
        except ModelFault:
            raise
        except UserError:  # the template refuses the prompt, or the row is left out of training too
            continue
        if question is not None:
            found.append(question)
    return found


def _question(row: Row, tokenizer: Tokenizer) -> Question | None:
    """Return the row as a question; None if it has none, or no expected answer."""
    has_reasoning = False
    if row.messages:
        *before, last = row.messages
        if not before or last["role"] != "assistant" or not last.get("train", True) or "tool_calls" in last:
            return None
        text, prompt, expected = "", before[-1]["content"], last["content"]
        has_reasoning = reasoning_of(last) is not None
    elif row.prompt is not None and row.completion is not None:
        text = prompt = row.prompt
        expected = without_ends(row.completion, tokenizer)
    else:
        return None
    if not row.is_trained or not expected.strip():
        return None
    is_rendered = bool(row.messages) or row.is_rendered
    # With reasoning, the generated text is longer than the expected answer.
    is_comparable = not has_reasoning and _tokens(tokenizer, expected) <= LONGEST_ANSWER
    if row.messages:
        text = generation_prompt(tokenizer, before, row.tools)
    return Question(text, prompt, expected, is_rendered, is_comparable)


def answer(
    engine: Engine, asked: Sequence[Question], on_answer: Callable[[], None] | None = None
) -> list[Answer]:
    """Answer every question greedily, in order; those too long for the model's context are left out.

    on_answer: called for every question that has been answered.
    """
    if not asked:
        return []
    prompts, new_tokens = _lengths(asked, engine.tokenizer)
    room = engine.context_tokens - new_tokens
    asked = [q for q, tokens in zip(asked, prompts, strict=True) if tokens <= room]
    sampling = Sampling(max_new_tokens=new_tokens)
    answers: dict[str, str] = {}
    for is_rendered in (True, False):
        texts = list(dict.fromkeys(q.text for q in asked if q.is_rendered == is_rendered))
        tell = None if on_answer is None else lambda *_: on_answer()
        words = engine.complete(texts, sampling, is_rendered=is_rendered, on_answer=tell)
        answers |= dict(zip(texts, words, strict=True))
    return [Answer(q, answers[q.text]) for q in asked]


def longest_exchange(asked: Sequence[Question], tokenizer: Tokenizer, context: int) -> int:
    """Return the tokens of the longest question that fits the context, with its answer; 0 without questions."""
    if not asked:
        return 0
    prompts, new_tokens = _lengths(asked, tokenizer)
    return max((tokens + new_tokens for tokens in prompts if tokens + new_tokens <= context), default=0)


def _lengths(asked: Sequence[Question], tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Return the tokens of each prompt, and the maximum number of new tokens."""
    longest = max(_tokens(tokenizer, q.expected) for q in asked)
    prompts = tokenizer([q.text for q in asked], add_special_tokens=True)["input_ids"]
    return [len(ids) for ids in prompts], min(longest + 8, LONGEST_ANSWER)


def exact_share(answers: Sequence[Answer]) -> float | None:
    """Return the share of comparable answers that match exactly, 0 to 1; None if there are none."""
    comparable = [a for a in answers if a.question.is_comparable]
    return sum(a.is_exact for a in comparable) / len(comparable) if comparable else None


def _tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
