"""The skills of the embedded model: one function per skill, which draws a question and its only correct answer.

A question has several phrasings and one `key`, which identifies it whatever the phrasing. The key decides whether
a lesson is for training or held out, so a held-out sum is held out in every phrasing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from fettle.tiny import words

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Lesson:
    """A conversation whose last message is the answer to score, and its key."""

    key: str
    messages: list[Message]


def ask(rng: Random, key: object, prompts: tuple[str, ...], answer: str) -> Lesson:
    """A question in one of its phrasings, with its answer."""
    return Lesson(str(key), turns(rng.choice(prompts), answer))


def turns(*contents: str) -> list[Message]:
    """Alternating messages of user and assistant, starting with the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def copy(rng: Random) -> Lesson:
    """Repeat a text exactly."""
    few = rng.randint(1, 6)
    text = rng.choice((words.sentence(rng), " ".join(words.some_words(rng, few)), str(rng.randint(0, 9999))))
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:] + rng.choice(".!?")
    return ask(rng, text, (f"Repeat: {text}", f"Copy this: {text}", f"Say this again: {text}"), text)


def spell(rng: Random) -> Lesson:
    """ "Spell cat." gives "c-a-t"."""
    chosen = words.some_words(rng, rng.randint(1, 2))
    text = " and ".join(chosen)
    prompts = (f"Spell {text}.", f"How do you spell {text}?", f"Give the letters of {text}.")
    return ask(rng, text, prompts, ", ".join("-".join(word) for word in chosen))


def capitals(rng: Random) -> Lesson:
    """ "cat" gives "CAT"; sometimes a system turn asks for it."""
    text = " ".join(words.some_words(rng, rng.randint(1, 3)))
    prompts = (f"Write in capitals: {text}", f"Put this in capital letters: {text}")
    if rng.random() < 0.2:
        system = {"role": "system", "content": "Answer in capital letters."}
        return Lesson(text, [system, *turns(f"Repeat: {text}", text.upper())])
    return ask(rng, text, prompts, text.upper())


def reverse(rng: Random) -> Lesson:
    """ "red, dog, tree" gives "tree, dog, red"."""
    chosen = words.some_words(rng, rng.randint(2, 5))
    text = ", ".join(chosen)
    prompts = (f"Reverse this list: {text}", f"Write this list backwards: {text}")
    return ask(rng, text, prompts, ", ".join(reversed(chosen)))


def pick(rng: Random) -> Lesson:
    """One of several words, identified by its position or its neighbour."""
    chosen = words.some_words(rng, rng.randint(3, 6))
    at = rng.randrange(len(chosen) - 1)
    place, position = rng.choice(
        (
            ("first word", 0),
            ("second word", 1),
            ("third word", 2),
            ("last word", -1),
            (f"word before {chosen[at + 1]}", at),
            (f"word after {chosen[at]}", at + 1),
        )
    )
    text = " ".join(chosen)
    prompts = (f"What is the {place} in: {text}", f"Give the {place}: {text}")
    return ask(rng, (place, text), prompts, chosen[position])


def count(rng: Random) -> Lesson:
    """The number of words, or how often one occurs in a list."""
    chosen = words.some_words(rng, rng.randint(1, 7))
    if rng.random() < 0.5:
        text = " ".join(chosen)
        return ask(
            rng, text, (f"How many words are there: {text}", f"Count the words: {text}"), str(len(chosen))
        )
    wanted, times = chosen[0], rng.randint(1, 4)
    listed = [wanted] * times + chosen[1:4]
    rng.shuffle(listed)
    text = ", ".join(listed)
    prompts = (f"How often is {wanted} in this list: {text}", f"Count {wanted} in: {text}")
    return ask(rng, (wanted, text), prompts, str(times))


def arithmetic(rng: Random) -> Lesson:
    """Sums and differences of numbers up to 99."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    if rng.random() < 0.5:
        prompts = (f"What is {a} + {b}?", f"Add {a} and {b}.", f"{a} plus {b}")
        return ask(rng, (a, "+", b), prompts, str(a + b))
    a, b = max(a, b), min(a, b)
    prompts = (f"What is {a} - {b}?", f"Take {b} away from {a}.", f"{a} minus {b}")
    return ask(rng, (a, "-", b), prompts, str(a - b))


def sequence(rng: Random) -> Lesson:
    """Count up or down; name the days or months that follow."""
    if rng.random() < 0.4:
        names = rng.choice((words.DAYS, words.MONTHS))
        start, length = rng.randrange(len(names)), rng.randint(1, 5)
        follow = [names[(start + step) % len(names)] for step in range(1, length + 1)]
        unit = "day" if names is words.DAYS else "month"
        many = f"{length} {unit}s come" if length > 1 else f"{unit} comes"
        return ask(rng, (names[start], length), (f"Which {many} after {names[start]}?",), ", ".join(follow))
    start, length = rng.randint(0, 99), rng.randint(2, 9)
    numbers = list(range(start, start + length))
    if rng.random() < 0.5:
        numbers.reverse()
    first, last = numbers[0], numbers[-1]
    prompts = (f"Count from {first} to {last}.", f"Write the numbers from {first} to {last}.")
    return ask(rng, (first, last), prompts, ", ".join(map(str, numbers)))


def sort(rng: Random) -> Lesson:
    """Put numbers in order, or find the largest or smallest."""
    numbers = rng.sample(range(100), rng.randint(2, 5))
    text = ", ".join(map(str, numbers))
    if rng.random() < 0.5:
        prompts = (f"Sort these numbers: {text}", f"Put these numbers in order: {text}")
        return ask(rng, text, prompts, ", ".join(map(str, sorted(numbers))))
    word, best = rng.choice((("largest", max), ("smallest", min)))
    return ask(
        rng,
        (word, text),
        (f"Which number is the {word}: {text}", f"Find the {word}: {text}"),
        str(best(numbers)),
    )


def plural(rng: Random) -> Lesson:
    """ "dog, box" gives "dogs, boxes"."""
    nouns = rng.sample(words.NOUNS, rng.randint(2, 3))
    text = ", ".join(nouns)
    prompts = (f"Give the plural: {text}", f"Write the plural of each word: {text}")
    return ask(rng, text, prompts, ", ".join(map(words.plural, nouns)))


def opposite(rng: Random) -> Lesson:
    """ "hot, big" gives "cold, small"."""
    chosen = rng.sample(list(words.OPPOSITES), rng.randint(2, 3))
    text = ", ".join(chosen)
    prompts = (f"Give the opposite: {text}", f"Write the opposite of each word: {text}")
    return ask(rng, text, prompts, ", ".join(words.OPPOSITES[word] for word in chosen))


def category(rng: Random) -> Lesson:
    """ "Which of these is a fruit: cup, dog, plum" gives "plum"."""
    kinds = rng.sample(list(words.THINGS), rng.randint(3, 4))
    listed = [rng.choice(words.THINGS[kind]) for kind in kinds]
    asked = rng.randrange(len(kinds))
    text, kind = ", ".join(listed), words.article(kinds[asked])
    prompts = (f"Which of these is {kind}: {text}", f"Find {kind} in this list: {text}")
    return ask(rng, (kind, text), prompts, listed[asked])


def story(rng: Random) -> Lesson:
    """Who has what, or who is where, after two or three sentences that say so; one to three questions."""
    people = words.names(rng, rng.randint(2, 3))
    facts, questions = rng.choice((owned_things, visited_places))(people, rng)
    rng.shuffle(facts)
    text = " ".join(facts)
    asked = rng.sample(questions, rng.choice((1, 1, 2, 3)))
    contents = [content for question in asked for content in question]
    return Lesson(text, turns(f"{text} {contents[0]}", *contents[1:]))


def owned_things(people: list[str], rng: Random) -> tuple[list[str], list[tuple[str, str]]]:
    """Sentences about what people have, and questions with their answers."""
    colours, nouns = rng.sample(words.COLOURS, len(people)), rng.sample(words.NOUNS, len(people))
    things = [f"{words.article(colour)} {noun}" for colour, noun in zip(colours, nouns, strict=True)]
    facts = [f"{who} has {thing}." for who, thing in zip(people, things, strict=True)]
    questions = [(f"Who has the {noun}?", who) for who, noun in zip(people, nouns, strict=True)]
    questions += [
        (f"What does {people[0]} have?", things[0]),
        (f"What colour is the {nouns[-1]}?", colours[-1]),
    ]
    return facts, questions


def visited_places(people: list[str], rng: Random) -> tuple[list[str], list[tuple[str, str]]]:
    """Sentences about where people are, and questions with their answers."""
    places = rng.sample(words.PLACES, len(people))
    facts = [f"{who} is at the {place}." for who, place in zip(people, places, strict=True)]
    questions = [(f"Who is at the {place}?", who) for who, place in zip(people, places, strict=True)]
    questions += [(f"Where is {people[0]}?", f"at the {places[0]}")]
    return facts, questions


def extract(rng: Random) -> Lesson:
    """Extract the name, colour, number, thing or day from a sentence; sometimes two, in separate turns."""
    who, colour, noun = words.name(rng), rng.choice(words.COLOURS), rng.choice(words.NOUNS)
    number, verb, day = rng.randint(2, 40), rng.choice(words.BUYING), rng.choice(words.DAYS)
    things = f"{number} {colour} {words.plural(noun)}"
    text = rng.choice(
        (f"{who} {verb} {things}.", f"On {day} {who} {verb} {things}.", f"{who} {verb} {things} on {day}.")
    )
    parts = {"name": who, "colour": colour, "thing": words.plural(noun), "number": str(number)}
    if day in text:
        parts["day"] = day
    part, other = rng.sample(list(parts), 2)
    prompt = rng.choice((f"What is the {part} in: {text}", f"Find the {part}: {text}"))
    if rng.random() < 0.25:
        return Lesson(f"{text} {other}", turns(prompt, parts[part], f"And the {other}?", parts[other]))
    return Lesson(f"{text} {part}", turns(prompt, parts[part]))


WRAPS = {
    "quotes": ('"', '"'),
    "round brackets": ("(", ")"),
    "square brackets": ("[", "]"),
    "curly brackets": ("{", "}"),
}


def wrap(rng: Random) -> Lesson:
    """Put words in quotes or brackets, or join two with a punctuation mark."""
    chosen = words.some_words(rng, rng.randint(1, 3))
    if rng.random() < 0.2:
        first, second = words.some_words(rng, 2)
        mark, sign = rng.choice((("colon", ": "), ("comma", ", "), ("dash", "-")))
        prompts = (
            f"Join {first} and {second} with a {mark}.",
            f"Write {first} and {second} with a {mark} between.",
        )
        return ask(rng, (mark, first, second), prompts, first + sign + second)
    style, (left, right) = rng.choice(list(WRAPS.items()))
    text = ", ".join(chosen)
    prompts = (f"Put each word in {style}: {text}", f"Write each word in {style}: {text}")
    return ask(rng, (style, text), prompts, ", ".join(f"{left}{word}{right}" for word in chosen))


def replace(rng: Random) -> Lesson:
    """Repeat a sentence with one word replaced."""
    chosen = words.sentence(rng).split() if rng.random() < 0.5 else words.some_words(rng, rng.randint(2, 6))
    old, new = rng.choice(chosen), words.some_words(rng, 1)[0]
    text = " ".join(chosen)
    prompts = (f"Replace {old} with {new} in: {text}", f"Write {new} instead of {old}: {text}")
    return ask(rng, (old, new, text), prompts, " ".join(new if word == old else word for word in chosen))


def remember(rng: Random) -> Lesson:
    """Recall what the user said about themselves, in this turn or an earlier one."""
    who, noun = words.name(rng), rng.choice(words.NOUNS)
    colour, place = rng.choice(words.COLOURS), rng.choice(words.PLACES)
    facts = [
        (f"My name is {who}.", f"Hello, {who}!", "What is my name?", f"Your name is {who}."),
        (
            f"I have {words.article(colour)} {noun}.",
            f"{words.article(colour).capitalize()} {noun}, how nice!",
            "What do I have?",
            f"You have {words.article(colour)} {noun}.",
        ),
        (
            f"I live near the {place}.",
            "I will remember that.",
            "Where do I live?",
            f"You live near the {place}.",
        ),
    ]
    first, second = rng.sample(facts, 2)
    key = f"{first[0]} {second[0]}"
    if rng.random() < 0.5:
        return Lesson(key, turns(f"{first[0]} {second[0]} {first[2]}", first[3]))
    return Lesson(key, turns(*first[:2], *second[:2], *first[2:]))


def explain(rng: Random) -> Lesson:
    """A textbook-style explanation with words or numbers from the question."""
    return rng.choice((explain_plurals, explain_opposites, explain_sums, explain_kinds))(rng)


def explain_plurals(rng: Random) -> Lesson:
    one, two = rng.sample(words.NOUNS, 2)
    question = f"What is a plural? Use the words {one} and {two}."
    answer = (
        "A plural is the form of a word for more than one. "
        f"We say one {one} and two {words.plural(one)}, one {two} and two {words.plural(two)}."
    )
    return Lesson(question, turns(question, answer))


def explain_opposites(rng: Random) -> Lesson:
    word, noun = rng.choice(list(words.OPPOSITES)), rng.choice(words.NOUNS)
    other = words.OPPOSITES[word]
    question = f"What are opposites? Use the words {word} and {noun}."
    answer = (
        "Opposites are words that mean the reverse of each other. "
        f"The opposite of {word} is {other}. A {noun} is not {word} and {other} at once."
    )
    return Lesson(question, turns(question, answer))


def explain_sums(rng: Random) -> Lesson:
    a, b = rng.randint(1, 40), rng.randint(1, 40)
    question = f"What is a sum? Use the numbers {a} and {b}."
    answer = (
        f"A sum is what we get when we add numbers. If you have {a} coins and get {b} more, you have {a + b}."
    )
    return Lesson(question, turns(question, answer))


def explain_kinds(rng: Random) -> Lesson:
    kind = rng.choice(list(words.THINGS))
    one, two = map(words.article, rng.sample(words.THINGS[kind], 2))
    kind = words.article(kind)
    question = f"What do {one} and {two} have in common?"
    answer = f"They are of one kind. {one.capitalize()} is {kind}, and {two} is {kind} too."
    return Lesson(question, turns(question, answer))


SKILL_FUNCTIONS: dict[str, Callable[[Random], Lesson]] = {
    "copy": copy,
    "spell": spell,
    "capitals": capitals,
    "reverse": reverse,
    "pick": pick,
    "count": count,
    "arithmetic": arithmetic,
    "sequence": sequence,
    "sort": sort,
    "plural": plural,
    "opposite": opposite,
    "category": category,
    "story": story,
    "extract": extract,
    "wrap": wrap,
    "replace": replace,
    "remember": remember,
    "explain": explain,
}
