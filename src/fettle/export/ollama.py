"""Write a Modelfile for Ollama, with a template derived from the model's own chat template.

Chat templates are Jinja, Ollama's are Go. Conversations with sentinels as contents are rendered by the model's own
template, and the text around the sentinels becomes the Go template, which is then checked on a longer conversation.
If a template cannot be expressed in this way (a turn's layout depends on its position), none is written, and Ollama
uses the one inside the GGUF file.
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
    """The text before and after each content. system: None if the template has no separate system turn."""

    system: tuple[str, str] | None
    user: tuple[str, str]
    answer: tuple[str, str]

    def render(self, messages: list[tuple[str, str]]) -> str:
        """Return the prompt for the next answer."""
        sides = {"system": self.system or ("", ""), "user": self.user, "assistant": self.answer}
        text = "".join(sides[role][0] + content + sides[role][1] for role, content in messages)
        return text + self.answer[0]


def modelfile(file_name: str, tokenizer: PreTrainedTokenizerBase, stop_ids: list[int]) -> str:
    """Return the Modelfile for a GGUF file in the same folder: FROM, TEMPLATE if Go can express it, and the stops."""
    lines = [f"FROM ./{file_name}"]
    if (turns := turns_of(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{go_template(turns)}"""')
    else:
        lines.append("# The chat template has no Go equivalent: Ollama uses the one in the GGUF file.")
    stops = [tokenizer.convert_ids_to_tokens(index) for index in stop_ids]
    # a token with a quote or a line break could inject directives
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop and _is_quotable(stop)]
    return "\n".join(lines) + "\n"


def _is_quotable(token: str) -> bool:
    return token.isprintable() and not set('"\\') & set(token)


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """Derive the turns from the chat template; None if they cannot express it. Raises ModelFault."""
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
    if not asked.startswith(question):  # some templates add the end of text unless an answer is to follow
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
    """Whether the turns render a conversation exactly as the template does, and are safe in a Modelfile."""
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
    """Whether the text, or its end together with what follows, has a meaning in Go templates or Modelfile quotes."""
    return any(mark in text for mark in ('"""', "{{", "}}")) or text.endswith(("{", '"'))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]], asks: bool = True) -> str:
    """Render without the beginning-of-text token, which Ollama adds itself."""
    turns = [{"role": role, "content": content} for role, content in messages]
    text = render_template(tokenizer, turns, for_generation=asks)
    return text.removeprefix(tokenizer.bos_token or "")


def go_template(turns: Turns) -> str:
    """Return the turns as a Go text/template over Ollama's `.Messages`."""
    branches = [("user", turns.user), ("assistant", turns.answer)]
    branches = [*([("system", turns.system)] if turns.system else []), *branches]
    text = "{{- range .Messages }}"
    for number, (role, (before, after)) in enumerate(branches):
        condition = f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}'
        text += condition + before + "{{ .Content }}" + after
    return text + "{{ end }}{{ end }}" + turns.answer[0]
