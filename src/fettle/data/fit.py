"""Fit a row to one tokenizer's chat template before it is rendered, for training, scoring and generation alike.

Data is often partly rendered already: the answer ends in `<|end|>`, or the prompt is the whole rendered question.
Applying a template to it would write those tokens a second time, and the model would learn a layout that it never
sees in use.  So end tokens at the end of a turn are removed, as the template adds its own; a prompt that is already
rendered is used as it is; and text with the template's role tags inside is refused.
"""

import json
import re
from collections import Counter
from dataclasses import replace

from fettle.data.layout import layout
from fettle.data.rows import Row
from fettle.data.tokenizer import Tokenizer, cached
from fettle.data.tool_layout import fit_tools
from fettle.data.turns import Message, reasoning_of
from fettle.errors import UserError

# Tokens that end a turn or a text in some model family; those that a tokenizer has count as end tokens for it.
_ENDS = (
    *(
        "</s>",
        "<eos>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|im_end|>",
        "<|end|>",
    ),
    *("<end_of_turn>", "<|eos|>", "<|return|>"),
)
_HTML = ("<s>", "</s>")  # also HTML's strike-through tags
_FOREIGN = re.compile(
    r"<\|im_start\|>|<start_of_turn>|\[/INST\]|<\|start_header_id\|>|<\|(?:user|assistant)\|>|<｜(?:User|Assistant)｜>"
)


def fit(row: Row, tokenizer: Tokenizer, uses_turns: bool, noted: Counter[str] | None = None) -> Row:
    """Return the row prepared for the tokenizer's chat template; changes are counted in `noted`.

    uses_turns: turn a prompt and its completion into a chat, or mark them `is_rendered` if they already are one.
    The tokenizer must have a chat template if `uses_turns` is set or the row is a chat.  Raises `UserError` for text
    that the template would write twice or not at all.
    """
    noted = Counter() if noted is None else noted
    if row.prompt is not None and row.completion is not None and uses_turns:
        if _is_rendered(row.prompt, row.completion, tokenizer):
            noted["already rendered in the chat template, used as they are"] += 1
            return _as_rendered(row, row.prompt, row.completion, tokenizer)
        turns = ({"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion})
        row = replace(row, messages=turns, prompt=None, completion=None)
    if not row.messages:
        return row
    messages = tuple(
        _fit_turn(turn, number, tokenizer, noted) for number, turn in enumerate(row.messages, start=1)
    )
    row, changed = fit_tools(replace(row, messages=_fit_reasoning(messages, tokenizer, noted)), tokenizer)
    if changed:
        noted[changed] += 1
    return row


def without_ends(text: str, tokenizer: Tokenizer) -> str:
    """Return the text without end-of-turn and end-of-text tokens at its end."""
    bare = text
    while token := _end_token(bare, tokenizer):
        bare = bare.rstrip().removesuffix(token)
    return bare


def _end_token(text: str, tokenizer: Tokenizer) -> str | None:
    bare = text.rstrip()
    for token in _end_tokens(tokenizer, str(tokenizer.chat_template)):
        if bare.endswith(token) and not (token == "</s>" and "<s>" in bare):
            return token
    return None


@cached
def _end_tokens(tokenizer: Tokenizer, template: str) -> tuple[str, ...]:
    known = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} & set(_ENDS)
    of_turn = layout(tokenizer).end_of_turn if tokenizer.chat_template else None
    return tuple(known | {token for token in (tokenizer.eos_token, of_turn) if token})


def _fit_turn(turn: Message, number: int, tokenizer: Tokenizer, noted: Counter[str]) -> Message:
    words = without_ends(turn["content"], tokenizer)
    if words != turn["content"]:
        noted["end token at the end of a turn, removed because the chat template adds it"] += 1
    bos = tokenizer.bos_token
    if bos and words.lstrip().startswith(bos) and not (bos == "<s>" and "</s>" in words):
        words = words.lstrip().removeprefix(bos)
        noted[
            "beginning-of-text token at the start of a turn, removed because the chat template adds it"
        ] += 1
    template = layout(tokenizer)
    tags = {*template.tags, bos, tokenizer.eos_token, template.end_of_turn} - {None, ""}
    calls = "".join(json.dumps(call, ensure_ascii=False) for call in turn.get("tool_calls", ()))
    if found := sorted(tag for tag in tags if (tag in words and tag not in _HTML) or tag in calls):
        raise UserError(
            f"turn {number} contains {' and '.join(f'`{tag}`' for tag in found)}, which the model's chat template "
            "adds itself; remove it, or give the whole rendered chat as `prompt` and `completion` or as `text`."
        )
    if foreign := _FOREIGN.search(words):
        noted[f"`{foreign[0]}` of another model's chat template, treated as plain text"] += 1
    return turn if words == turn["content"] else {**turn, "content": words}


def _fit_reasoning(
    messages: tuple[Message, ...], tokenizer: Tokenizer, noted: Counter[str]
) -> tuple[Message, ...]:
    """Return the messages with their reasoning under the field name that the template uses."""
    fitted = []
    for number, turn in enumerate(messages, start=1):
        name = reasoning_of(turn)
        if name is not None:
            known = layout(tokenizer).reasoning
            if known is None:
                raise UserError(
                    f"turn {number} has `{name}`, which the model's chat template does not render, so it would be "
                    "lost; move it into the content (as <think>...</think>), or remove it."
                )
            if known != name:
                noted[f"reasoning in `{name}`, passed to the chat template as `{known}`"] += 1
                turn = {known if field == name else field: value for field, value in turn.items()}
        fitted.append(turn)
    return tuple(fitted)


def _is_rendered(prompt: str, completion: str, tokenizer: Tokenizer) -> bool:
    template = layout(tokenizer)
    return any(tag in words for tag in template.tags for words in (prompt, completion)) or (
        len(template.header) > 3 and prompt.rstrip().endswith(template.header)
    )


def _as_rendered(row: Row, prompt: str, completion: str, tokenizer: Tokenizer) -> Row:
    """Return the row with the template's start and end tokens added if they are missing."""
    template = layout(tokenizer)
    if template.header not in prompt + completion:
        found = next(tag for tag in sorted(template.tags) if tag in prompt + completion)
        raise UserError(
            f"contains `{found}` of the model's chat template, but not `{template.header}`, which starts an "
            "answer; give the plain text, or the whole rendered prompt."
        )
    if template.bos and not prompt.lstrip().startswith(template.bos):
        prompt = template.bos + prompt
    if prompt.endswith(template.tail) and not completion[:1].isspace():
        completion = template.lead + completion
    if _end_token(completion, tokenizer):
        completion = completion.rstrip()  # the model stops at the end token and never generates what follows
    elif completion.strip():
        completion += template.end_of_turn or tokenizer.eos_token or ""
    return replace(row, prompt=prompt, completion=completion, is_rendered=True)
