"""Chat templates by name, for a model that has none, or one that shall answer in another format.

The files in templates/ are written from the published formats.  gemma, llama-3, mistral, phi-3 and zephyr render what
the models' own templates render (llama-3: without the dates of Llama 3.1).  alpaca, chatml and vicuna are formats of
plain text: they start with the beginning-of-text token if the tokenizer itself would put one there.

No tokens are added, as that would mean new rows in the embedding: role tags that the tokenizer lacks are plain text.
An end-of-turn token that it lacks is replaced by its end-of-text token, because generation stops only at a token.
"""

from pathlib import Path

from fettle.data.layout import added_tokens, adds_bos, layout
from fettle.data.template import note_source
from fettle.data.tokenizer import Tokenizer
from fettle.errors import UserError, option

NAMES = ("alpaca", "chatml", "gemma", "llama-3", "mistral", "phi-3", "vicuna", "zephyr")

_PLAIN = ("alpaca", "chatml", "vicuna")
_ENDS = {"chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama-3": "<|eot_id|>", "phi-3": "<|end|>"}
"""The token that ends an answer; in the other templates it is the tokenizer's end-of-text token."""


def template_text(name: str) -> str:
    """Return the chat template of that name, or in the .jinja file at that path."""
    path = Path(name).expanduser()
    if name in NAMES:
        path = Path(__file__).with_name("templates") / f"{name}.jinja"
    elif path.suffix != ".jinja":
        raise UserError(
            f"{option('chat_template')} {name!r} is not known; expected {', '.join(NAMES)}, or the path of a .jinja "
            "file."
        )
    try:
        text = path.read_text("utf-8").removesuffix("\n")
    except OSError as error:
        raise UserError(
            f"{option('chat_template')} {name}: cannot be read ({error.strerror}); check the path."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{option('chat_template')} {name}: is not UTF-8 text; save it as UTF-8.") from None
    if not text.strip():
        raise UserError(f"{option('chat_template')} {name}: the file is empty; expected a Jinja template.")
    return text


def set_chat_template(tokenizer: Tokenizer, name: str) -> list[str]:
    """Give the tokenizer the named template, which is then saved with it; return lines that say what this changes.

    Raises UserError for an unknown name and for a template that cannot be used.
    """
    text, lines = template_text(name), []
    tokens = set(added_tokens(tokenizer).values())
    if name in NAMES and tokenizer.eos_token is None:
        raise UserError(
            f"{option('chat_template')} {name}: the tokenizer has no end-of-text token to end an answer with; set "
            "`eos_token` in its tokenizer_config.json."
        )
    if name in _ENDS and _ENDS[name] not in tokens:
        text = text.replace(_ENDS[name], str(tokenizer.eos_token))
        lines.append(
            f"an answer ends in `{tokenizer.eos_token}`, as the tokenizer has no token `{_ENDS[name]}`"
        )
    if name in _PLAIN and adds_bos(tokenizer):
        text = "{{- bos_token -}}" + text
    instead = ", in place of the model's own" if tokenizer.chat_template else ""
    note_source(text, f"{option('chat_template')} {name}")
    tokenizer.chat_template = text
    if missing := sorted(layout(tokenizer).tags - tokens):
        tags = ", ".join(f"`{tag}`" for tag in missing)
        lines.append(f"{tags} of the chat template: plain text, as the tokenizer has no such tokens")
    return [f"chat template {name}{instead}", *lines]
