"""A Modelfile for Ollama, its template derived from the model's own chat template.

Chat templates are Jinja, Ollama's are Go. Conversations with sentinels for contents are rendered by the model's
own template, and what stands around the sentinels becomes the Go template; it is then checked on a longer conversation.
Where a template is not of that kind (a turn looks different by its place), none is written: Ollama then falls back on
the one inside the GGUF file.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fettle.data.template import render_template
from fettle.errors import ModelFault, UserError

SYSTEM, USER, ANSWER, SECOND = (
    "\u2402SYSTEM\u2403",
    "\u2402USER\u2403",
    "\u2402ANSWER\u2403",
    "\u2402SECOND\u2403",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """What stands before and after each content. system: None where the template has no place for one of its own."""

    system: tuple[str, str] | None
    user: tuple[str, str]
    answer: tuple[str, str]

    def render(self, messages: list[tuple[str, str]]) -> str:
        """The prompt for an answer to come."""
        sides = {"system": self.system or ("", ""), "user": self.user, "assistant": self.answer}
        text = "".join(sides[role][0] + content + sides[role][1] for role, content in messages)
        return text + self.answer[0]


def modelfile(file_name: str, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> str:
    """The Modelfile for a GGUF file beside it: FROM, TEMPLATE where it can be said in Go, and the stops."""
    lines = [f"FROM ./{file_name}"]
    if (turns := turns_of(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{go_template(turns)}"""')
    else:
        lines.append("# The chat template has no Go equivalent: Ollama uses the one in the GGUF file.")
    stops = [tokenizer.convert_ids_to_tokens(index) for index in stop_ids]
    # a token with a quote or a line break in it could add directives of its own
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop and _is_quotable(stop)]
    return "\n".join(lines) + "\n"


def _is_quotable(token: str) -> bool:
    return token.isprintable() and not set('"\\') & set(token)


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """Read the turns off the chat template; None where they do not say all of it. Raises ModelFault."""
    if not tokenizer.chat_template:
        return None
    try:
        return _turns_of(tokenizer)
    except ModelFault:
        raise
    except UserError:  # the template refuses one of the conversations
        return None


def _turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    question = _render(tokenizer, [("user", USER)], asks=False)
    asked = _render(tokenizer, [("user", USER)])
    answered = _render(tokenizer, [("user", USER), ("assistant", ANSWER), ("user", SECOND)])
    if not asked.startswith(question):  # some templates end a talk, but not a question, with the end of text
        question = question.removesuffix(tokenizer.eos_token or "")
    if not asked.startswith(question) or any(answered.count(each) != 1 for each in (USER, ANSWER, SECOND)):
        return None
    user = question.split(USER)[0], question.split(USER)[1]
    opening = asked[len(question) :]
    between = answered.split(ANSWER)[1].split(SECOND)[0]
    if not between.endswith(user[0]):
        return None
    turns = Turns(
        system=_system(tokenizer, user[0]), user=user, answer=(opening, between.removesuffix(user[0]))
    )
    return turns if _is_whole(tokenizer, turns) else None


def _system(tokenizer: PreTrainedTokenizerBase, user_opening: str) -> tuple[str, str] | None:
    try:
        text = _render(tokenizer, [("system", SYSTEM), ("user", USER)])
    except ModelFault:
        raise
    except UserError:  # the template refuses a system turn
        return None
    before, _, rest = text.partition(SYSTEM)
    after = rest.split(USER)[0]
    if SYSTEM not in text or not after.endswith(user_opening):
        return None
    return before, after.removesuffix(user_opening)


def _is_whole(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> bool:
    """Whether the turns render a conversation as the template does, and can stand in a Modelfile."""
    talk = [
        ("user", "Hi there"),
        ("assistant", "Hello."),
        ("user", "Why?"),
        ("assistant", "So."),
        ("user", "Ah"),
    ]
    talks = [talk] + ([[("system", "Be brief."), *talk]] if turns.system else [])
    sides = (*turns.user, *turns.answer, *(turns.system or ()))
    return not any(map(_is_syntax, sides)) and all(turns.render(t) == _render(tokenizer, t) for t in talks)


def _is_syntax(text: str) -> bool:
    """Whether Go's templates or the Modelfile's quotes would read the text, or its end and theirs, as their own."""
    return any(mark in text for mark in ('"""', "{{", "}}")) or text.endswith(("{", '"'))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]], asks: bool = True) -> str:
    """Without the beginning-of-text token, which Ollama adds itself."""
    turns = [{"role": role, "content": content} for role, content in messages]
    text = render_template(tokenizer, turns, for_generation=asks)
    return text.removeprefix(tokenizer.bos_token or "")


def go_template(turns: Turns) -> str:
    """The turns as Go's text/template over Ollama's `.Messages`."""
    branches = [("user", turns.user), ("assistant", turns.answer)]
    branches = [*([("system", turns.system)] if turns.system else []), *branches]
    text = "{{- range .Messages }}"
    for number, (role, (before, after)) in enumerate(branches):
        condition = f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}'
        text += condition + before + "{{ .Content }}" + after
    return text + "{{ end }}{{ end }}" + turns.answer[0]
