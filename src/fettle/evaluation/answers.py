"""Before and after, on rows the training never saw: do the answers match, word for word?

An answer is exact when the greedy completion equals the held-out row's own answer, white space at the ends
aside. Expected answers too long to be generated whole are shown but not counted. Plain texts have no answers;
for them the held-out loss speaks alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fettle.data import Row, ensure_chat_template, generation_prompt, has_own_chat_template
from fettle.errors import ModelFault, UserError
from fettle.generation import Sampling, complete

LONGEST_ANSWER = 256
"""Tokens generated at most. A longer expected answer can never be exact, and so does not count."""


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out row as a question: the text the model continues, the user's words, the right answer.

    is_comparable: the right answer has at most LONGEST_ANSWER tokens.
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


def questions(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    """Return the rows that end in an answer as questions; others are left out.

    As in training, chats for a tokenizer without a template are written in the default one (it is set on it).
    """
    if any(row.messages for row in rows):
        ensure_chat_template(tokenizer)
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
        except ModelFault:
            raise
        except UserError:  # a template that cannot end there
            continue
        is_comparable = _tokens(tokenizer, expected) <= LONGEST_ANSWER
        found.append(Question(text, before[-1]["content"], expected, is_rendered, is_comparable))
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
    longest = max(_tokens(tokenizer, q.expected) for q in asked)
    new_tokens = min(longest + 8, LONGEST_ANSWER)
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


def exact_share(answers: Sequence[Answer]) -> float | None:
    """The share of the comparable answers that are exact, 0 to 1; None where there are none."""
    comparable = [a for a in answers if a.question.is_comparable]
    return sum(a.is_exact for a in comparable) / len(comparable) if comparable else None


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
