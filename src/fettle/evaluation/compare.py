"""Before and after, on rows the training never saw: do the answers match, word for word?

An answer is exact when the greedy completion equals the held-out row's own answer, white space at the ends
aside. Plain texts have no answers; for them the held-out loss speaks alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.data import Row, generation_prompt, has_own_chat_template
from fettle.errors import UserError
from fettle.generation import Sampling, complete

LONGEST_ANSWER = 256
"""Tokens; a longer expected answer is compared in its beginning only, and so is never exact."""


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out row as a question: the text the model continues, the user's words, the right answer."""

    text: str
    prompt: str
    expected: str
    is_rendered: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """One question with the model's answer."""

    question: Question
    answer: str

    @property
    def is_exact(self) -> bool:
        return self.answer.strip() == self.question.expected.strip()


def questions(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """Return the rows that end in an answer as questions; others are left out."""
    found = []
    for row in rows:
        if row.messages and row.messages[-1]["role"] == "assistant":
            before, expected = list(row.messages[:-1]), row.messages[-1]["content"]
        elif row.prompt is not None and row.completion is not None:
            before, expected = [{"role": "user", "content": row.prompt}], row.completion
        else:
            continue
        if not before or not expected.strip():
            continue
        is_rendered = bool(row.messages) or has_own_chat_template(tokenizer)
        try:
            text = generation_prompt(tokenizer, before) if is_rendered else before[-1]["content"]
        except UserError:  # a template that cannot end there
            continue
        found.append(Question(text, before[-1]["content"], expected, is_rendered))
    return found


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    on_step: Callable[[], None] | None = None,
) -> list[Answer]:
    """Answer every question greedily, in order; those too long for the model's context are left out.

    on_step is called whenever a batch of answers has grown by a token.
    """
    if not asked:
        return []
    lengths = [
        len(ids) for ids in tokenizer([q.expected for q in asked], add_special_tokens=False)["input_ids"]
    ]
    new_tokens = min(max(lengths) + 8, LONGEST_ANSWER)
    room = model.config.max_position_embeddings - new_tokens
    prompts = [len(ids) for ids in tokenizer([q.text for q in asked], add_special_tokens=True)["input_ids"]]
    asked = [q for q, tokens in zip(asked, prompts, strict=True) if tokens <= room]
    sampling = Sampling(max_new_tokens=new_tokens)
    answers: dict[str, str] = {}
    for is_rendered in (True, False):
        texts = list(dict.fromkeys(q.text for q in asked if q.is_rendered == is_rendered))
        if texts:
            words = complete(model, tokenizer, texts, sampling, is_rendered=is_rendered, on_step=on_step)
            answers |= dict(zip(texts, words, strict=True))
    return [Answer(q, answers[q.text]) for q in asked]


def exact_share(answers: Sequence[Answer]) -> float:
    """The share of answers that are exact, 0 to 1."""
    return sum(a.is_exact for a in answers) / max(1, len(answers))
