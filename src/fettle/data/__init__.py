"""Data: files in any common format -> rows -> tokens with labels -> packs.

rows = read_rows("chats.jsonl")
train, held_out = split_held_out(rows, fraction=0.1, seed=0)
tokenized = tokenize_rows(train, tokenizer, max_length=2048)
tokenized.summary.lines()  # how the data was read, for a person to check
batch = collator(tokenizer)([pack(tokenized.examples, max_length=2048)[0]])
"""

from fettle.data.chat import (
    DEFAULT_CHAT_TEMPLATE,
    Segment,
    end_of_turn,
    ensure_chat_template,
    generation_prompt,
    has_own_chat_template,
    render,
)
from fettle.data.pack import collator, pack, unpacked
from fettle.data.preference_formats import labelled_of, read_labelled, read_preferences
from fettle.data.preference_summary import LabelledSummary, PairSummary
from fettle.data.preferences import (
    LabelledExample,
    PreferenceExample,
    tokenize_labelled,
    tokenize_preferences,
)
from fettle.data.prompts import PromptRow, read_prompts
from fettle.data.read import fingerprint, read_rows
from fettle.data.rows import SKIP_HINT, BadRows, LabelledRow, PreferenceRow, Reading, Row, RowList, Rows
from fettle.data.split import split_held_out
from fettle.data.summary import Summary
from fettle.data.tokenize import Example, NothingToTrainOn, Tokenized, tokenize_rows
from fettle.data.turns import Message

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "SKIP_HINT",
    "BadRows",
    "Example",
    "LabelledExample",
    "LabelledRow",
    "LabelledSummary",
    "Message",
    "NothingToTrainOn",
    "PairSummary",
    "PreferenceExample",
    "PreferenceRow",
    "PromptRow",
    "Reading",
    "Row",
    "RowList",
    "Rows",
    "Segment",
    "Summary",
    "Tokenized",
    "collator",
    "end_of_turn",
    "ensure_chat_template",
    "fingerprint",
    "generation_prompt",
    "has_own_chat_template",
    "labelled_of",
    "pack",
    "read_labelled",
    "read_preferences",
    "read_prompts",
    "read_rows",
    "render",
    "split_held_out",
    "tokenize_labelled",
    "tokenize_preferences",
    "tokenize_rows",
    "unpacked",
]
