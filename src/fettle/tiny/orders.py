"""The skill that the quickstart teaches: turn an order, written as one sentence, into JSON.

The lessons of `fettle.tiny.skills` contain its parts (finding a name or a colour in a sentence, copying words,
quotes and brackets) but no orders and no JSON, so the embedded model scores 0% on it at first.
"""

import json
from random import Random

from fettle.tiny import words
from fettle.tiny.skills import Lesson, turns

PAYMENTS = {"card": "by card", "cash": "in cash", "transfer": "by transfer", "coins": "in coins"}
ITEMS = sorted({*words.NOUNS} - {"child", "lion", "bear", "fox"})


def order(rng: Random) -> Lesson:
    """An order in one of several phrasings; its key is the buyer, the items and the payment."""
    who, colour, count = words.name(rng), rng.choice(words.COLOURS), rng.randint(2, 40)
    item, payment = words.plural(rng.choice(ITEMS)), rng.choice(list(PAYMENTS))
    things, pays = f"{count} {colour} {item}", PAYMENTS[payment]
    text = rng.choice(
        (
            f"{who} wants {things} and will pay {pays}.",
            f"{who} would like {things} and pays {pays}.",
            f"{things} for {who}, to be paid {pays}.",
            f"Please send {things} to {who}, who pays {pays}.",
            f"Paid {pays}: {things} for {who}.",
        )
    )
    answer = {"name": who, "item": item, "colour": colour, "count": count, "payment": payment}
    key = f"{who} {things} {payment}"
    return Lesson(key, turns(f"Order: {text}", json.dumps(answer)))
