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
from fettle.data.fit import fit, without_ends
from fettle.data.turns import reasoning_of
from fettle.engine.decode import BATCH_SIZE, Sampling, complete
from fettle.errors import ModelFault, UserError

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

    So are answers that are not trained on, for they are not the right ones. As in training, chats for a tokenizer
    without a template are written in the default one (it is set on it).
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
        except UserError:  # a template that cannot end there, or a row that is left out of training too
            continue
        if question is not None:
            found.append(question)
    return found


def _question(row: Row, tokenizer: PreTrainedTokenizerBase) -> Question | None:
    """The question that a row asks; None where it has none, or no words that answer it rightly."""
    has_reasoning = False
    if row.messages:
        *before, last = row.messages
        if not before or last["role"] != "assistant" or not last.get("train", True):
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
    # An answer with its reasoning is more than the words that are expected.
    is_comparable = not has_reasoning and _tokens(tokenizer, expected) <= LONGEST_ANSWER
    if row.messages:
        text = generation_prompt(tokenizer, before)
    return Question(text, prompt, expected, is_rendered, is_comparable)


def answer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Question],
    on_progress: Callable[[float], None] | None = None,
    *,
    at_once: int = BATCH_SIZE,
) -> list[Answer]:
    """Answer every question greedily, in order; those too long for the model's context are left out.

    on_progress is called whenever a batch of answers has grown by a token, with how many questions are answered; those
    of the batch count in part. at_once: how many are answered together.
    """
    if not asked:
        return []
    prompts, new_tokens = _lengths(asked, tokenizer)
    room = model.config.max_position_embeddings - new_tokens
    asked = [q for q, tokens in zip(asked, prompts, strict=True) if tokens <= room]
    sampling = Sampling(max_new_tokens=new_tokens)
    answers: dict[str, str] = {}
    for is_rendered in (True, False):
        texts = list(dict.fromkeys(q.text for q in asked if q.is_rendered == is_rendered))
        if texts:
            tell = None if on_progress is None else _counting_from(len(answers), on_progress)
            words = complete(
                *(model, tokenizer, texts, sampling),
                is_rendered=is_rendered,
                on_progress=tell,
                at_once=at_once,
            )
            answers |= dict(zip(texts, words, strict=True))
    return [Answer(q, answers[q.text]) for q in asked]


def _counting_from(first: int, tell: Callable[[float], None]) -> Callable[[float], None]:
    return lambda count: tell(first + count)


def longest_exchange(asked: Sequence[Question], tokenizer: PreTrainedTokenizerBase, context: int) -> int:
    """Tokens of the longest question that fits the context, with its answer; 0 where nothing is asked."""
    if not asked:
        return 0
    prompts, new_tokens = _lengths(asked, tokenizer)
    return max((tokens + new_tokens for tokens in prompts if tokens + new_tokens <= context), default=0)


def _lengths(asked: Sequence[Question], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Tokens of each prompt, and the most that an answer may have."""
    longest = max(_tokens(tokenizer, q.expected) for q in asked)
    prompts = tokenizer([q.text for q in asked], add_special_tokens=True)["input_ids"]
    return [len(ids) for ids in prompts], min(longest + 8, LONGEST_ANSWER)


def exact_share(answers: Sequence[Answer]) -> float | None:
    """The share of the comparable answers that are exact, 0 to 1; None where there are none."""
    comparable = [a for a in answers if a.question.is_comparable]
    return sum(a.is_exact for a in comparable) / len(comparable) if comparable else None


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
