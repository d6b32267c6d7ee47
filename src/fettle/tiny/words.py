"""The vocabulary of the lessons: word lists, and sentences and invented words made from them.

Everything in a lesson is drawn from here with a `random.Random`, so the same seed gives the same text on every
machine. Invented words ("brillo", "tane") teach the model to copy letter by letter instead of memorizing words.
"""

from random import Random

NAMES = """Ada Adam Alex Amir Ana Anna Ben Carla Chen Clara Dan Dina Elena Emma Eva Felix Finn Grace Hana Hugo
Ida Iris Ivan Jack Jane Jonas Jose Kai Kate Lara Leo Lena Lily Lucas Maria Mary Max Maya Mia Milo Nina Noah
Nora Olga Omar Oscar Paul Pedro Petra Rosa Ruth Sam Sara Sofia Theo Tom Uma Vera Yara Zoe""".split()

COLOURS = "red blue green yellow black white brown grey pink purple orange golden".split()

THINGS = {
    "animal": "dog cat bird horse cow fox mouse sheep goose bear lion rabbit".split(),
    "fruit": "apple pear plum lemon cherry peach melon berry fig grape".split(),
    "tool": "hammer brush knife saw spade rake ladder needle key pen".split(),
    "piece of clothing": "shirt hat scarf coat dress glove sock shoe belt jacket".split(),
    "piece of furniture": "chair table bed shelf desk sofa lamp bench".split(),
    "vehicle": "car bus train boat bike truck plane ship".split(),
}
EXTRAS = "cup ball book box toy kite stone bag plate spoon bottle candle basket coin child leaf".split()
NOUNS = [noun for nouns in THINGS.values() for noun in nouns] + EXTRAS

IRREGULAR = {"mouse": "mice", "goose": "geese", "sheep": "sheep", "child": "children"}
IRREGULAR |= {"knife": "knives", "shelf": "shelves", "scarf": "scarves", "leaf": "leaves"}

OPPOSITES = dict(
    pair.split("/")
    for pair in """hot/cold big/small fast/slow old/new up/down in/out day/night open/closed full/empty
    hard/soft high/low long/short wet/dry light/dark happy/sad early/late rich/poor clean/dirty strong/weak
    near/far loud/quiet thick/thin young/aged sweet/sour left/right first/last good/bad true/false heavy/weightless
    wide/narrow deep/shallow sharp/blunt""".split()
)
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
PLACES = "park school shop garden kitchen library station beach farm market museum forest".split()
VERBS = "sees finds likes takes brings wants holds carries paints washes".split()
BUYING = "bought sold found lost packed needs wants ordered carried counted".split()
WORDS = sorted({*NOUNS, *COLOURS, *OPPOSITES, *PLACES, *VERBS})


def plural(noun: str) -> str:
    """The plural of a noun of this vocabulary: "box" gives "boxes"."""
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def invented_word(rng: Random, most_syllables: int = 3) -> str:
    """An invented word."""
    onsets = "b bl br c ch d dr f fl g gr h j k l m n p pl qu r s sh sk st t th tr v w y z".split()
    codas = ["", "", "", "n", "r", "s", "l", "m", "t", "k", "x", "nd", "st", "p"]
    return "".join(
        rng.choice(onsets) + rng.choice("aeiou") + rng.choice(codas)
        for _ in range(rng.randint(1, most_syllables))
    )


def name(rng: Random) -> str:
    """A first name, one in four invented."""
    return invented_word(rng, most_syllables=2).capitalize() if rng.random() < 0.25 else rng.choice(NAMES)


def names(rng: Random, count: int) -> list[str]:
    """Distinct first names."""
    found: list[str] = []
    while len(found) < count:
        candidate = name(rng)
        if candidate not in found:
            found.append(candidate)
    return found


def some_words(rng: Random, count: int) -> list[str]:
    """Distinct words, one in five invented."""
    found: list[str] = []
    while len(found) < count:
        candidate = invented_word(rng) if rng.random() < 0.2 else rng.choice(WORDS)
        if candidate not in found:
            found.append(candidate)
    return found


def sentence(rng: Random) -> str:
    """A short sentence such as "the small dog sees a red cup"."""
    adjective, colour = rng.choice(list(OPPOSITES)), rng.choice(COLOURS)
    first, second = rng.sample(NOUNS, 2)
    subject = rng.choice((f"the {adjective} {first}", f"the {first}", name(rng)))
    ending = rng.choice(
        ("", f" in the {rng.choice(PLACES)}", f" on {rng.choice(DAYS)}", f" with {name(rng)}")
    )
    return f"{subject} {rng.choice(VERBS)} {article(f'{colour} {second}')}{ending}"
