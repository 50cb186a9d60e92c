"""The text that the bundled demo model learns: haiku and talk about haiku, written by a grammar.

The model of `ggufkit demo` must be tiny and yet show real skill, so its world is small and exact: a grammar
of a few hundred words whose sampler counts syllables (every line of a regular haiku has five, seven, five),
and a handful of conversations that can only be answered by attention: name the topic, use the very words the
user quoted, remember the topic two turns later. Times of day and topics that `held_out` names never occur in
the training text, so that accuracy on them measures copying, not memory.

    python examples/demo_corpus.py            # print a few documents of each kind
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

T = TypeVar("T")

SYSTEM = "You are a small model that writes haiku."
SEASONS = ("spring", "summer", "autumn", "winter")

# ------------------------------------------------------------------------------------------------ the lexicon

#: what a class of things does; a verb is written in its plural form
VERBS = {
    "fall": "drift, fall, settle, float, tumble, gather, whirl, sink, scatter, land",
    "sing": "sing, call, answer, cry, listen, wait, wake",
    "fly": "circle, glide, return, vanish, rise, wander, fly, pass, rest",
    "water": "flow, shine, murmur, glitter, rise, whisper, move, darken, turn",
    "light": "shine, glow, fade, linger, tremble, wait, burn, wake, hang",
    "air": "drift, move, wander, pass, curl, rise, vanish, linger, turn",
    "plant": "sway, bend, bow, tremble, shiver, whisper, lean, stand, wait",
    "land": "wait, sleep, listen, darken, fade, vanish, lie, rest",
    "person": "wait, walk, sleep, listen, smile, wander, return, rest, laugh, sing",
    "animal": "wait, sleep, listen, wander, rest, hide, vanish, return, dream",
    "thing": "wait, rest, stand, remain, lie, listen, fade",
    "time": "come, pass, linger, end, begin, deepen, return, fade",
}

#: adjectives that suit a class
ADJECTIVES = {
    "fall": "slow, pale, golden, silent, last, soft, scattered",
    "sing": "hidden, distant, lonely, tired, small, patient, last",
    "fly": "white, lonely, distant, small, tired, pale, silent",
    "water": "dark, slow, cold, quiet, gray, deep, restless, silver",
    "light": "pale, thin, distant, golden, cold, lonely, trembling",
    "air": "cold, slow, thin, soft, pale, wandering, restless",
    "plant": "bare, tall, green, bent, old, patient, silent",
    "land": "old, quiet, distant, empty, sleeping, misty, lonely",
    "person": "old, tired, quiet, lonely, wandering, smiling",
    "animal": "gray, old, small, quiet, sleepy, hungry, patient",
    "thing": "old, broken, forgotten, empty, small, faded, silent",
    "time": "long, slow, quiet, cold, lonely, pale, gentle",
}

#: class and number -> nouns; ":spring" ties a noun to a season. Mass nouns ("rain") take no "a".
NOUNS = {
    "fall pl": "leaves:autumn, petals:spring, snowflakes:winter, raindrops, feathers, acorns:autumn, seeds",
    "fall mass": "rain, snow:winter, drizzle, dew, sleet:winter",
    "sing pl": "crickets:autumn, frogs:spring, cicadas:summer, larks:spring, bells, nightingales:summer, birds",
    "sing sg": "bell, cricket:autumn, frog:spring, nightingale:summer",
    "fly pl": "swallows:spring, geese:autumn, herons, cranes, moths, butterflies:summer, fireflies:summer, "
    "dragonflies:summer, sparrows, crows, owls, gulls, bees:summer, bats, kites",
    "fly sg": "heron, crow, owl, sparrow, hawk, butterfly:summer, moth, firefly:summer, gull",
    "water sg": "river, stream, sea, pond, lake, brook, harbor, ocean, waterfall, well",
    "water pl": "waves, ripples, puddles, rivers, tides",
    "light sg": "moon, sun, lantern, candle, lamp, campfire",
    "light pl": "stars, lanterns, candles, lamps, embers",
    "light mass": "moonlight, sunlight, starlight, lamplight",
    "air pl": "clouds, shadows",
    "air mass": "wind, mist, fog, smoke, thunder:summer, frost:winter",
    "plant pl": "trees, pines, reeds, willows, blossoms:spring, flowers, lilies:summer, roses:summer, maples:autumn, "
    "poppies:summer, weeds, sunflowers:summer",
    "plant sg": "willow, pine, maple:autumn, rose:summer, plum tree:spring",
    "plant mass": "bamboo, grass, moss, ivy, barley:summer",
    "land sg": "mountain, valley, village, temple, garden, bridge, road, field, forest, orchard, meadow, island",
    "land pl": "mountains, hills, fields, rooftops, roads, stones, footprints",
    "person sg": "monk, fisherman, child, stranger, poet, gardener, grandmother, traveler, sailor",
    "person pl": "children, travelers, farmers, monks, sailors, friends",
    "animal sg": "cat, dog, fox, horse, rabbit, turtle, snail, spider",
    "animal pl": "cats, dogs, horses, rabbits, turtles, snails, spiders, foxes",
    "thing sg": "teacup, kettle, window, door, mirror, clock, letter, umbrella, blanket, bicycle, scarecrow:autumn",
    "thing pl": "books, letters, windows, mirrors, umbrellas, shoes, chairs",
    "time mass": "twilight, midnight, silence, solitude, evening, morning, winter:winter, spring:spring, "
    "summer:summer, autumn:autumn",
}

#: everyday nouns that no class fits: they are answered with frames that suit anything
ANYTHING = (
    "coffee, tea, bread, rice, soup, honey, apples, oranges, lemons, peaches, music, a piano, a violin, a train, "
    "trains, a bus, a boat, a ship, an airplane, a computer, computers, a robot, robots, a keyboard, a telephone, "
    "software, a program, code, a bug, a compiler, a kernel, numbers, mathematics, a library, a school, a teacher, "
    "homework, a hospital, a market, money, a king, a queen, a castle, a dragon, a wizard, a clown, a circus, "
    "football, chess, a pencil, paper, ink, a poem, poetry, language, words, a question, an answer, a mistake, "
    "friendship, love, hope, anger, fear, joy, sorrow, patience, courage, freedom, peace, truth, a secret, a promise, "
    "a birthday, a holiday, a journey, a map, a compass, a rocket, a planet, space, a comet, gravity, time, "
    "tomorrow, yesterday, childhood, old age, a dream, dreams, a nightmare, laughter, a song, a dance, a painting, "
    "a camera, a photograph, a hat, a coat, gloves, a ring, glass, iron, gold, salt, sugar, pepper, a kitchen, "
    "a spoon, a knife, breakfast, dinner, a potato, an onion, cheese, butter, chocolate, a cake, an elephant, "
    "a tiger, a whale, a penguin, a giraffe, a mouse, a lion, a bear, a wolf, a camel, ants, a neighbor, a doctor, "
    "a farmer, a soldier, a baker, a thief, a window seat, a traffic light, an elevator, a suitcase, a taxi, "
    "the weather, the internet, the news, the weekend, Monday, Sunday, January, October, Paris, Tokyo, Berlin, "
    "electricity, a battery, a bicycle bell, a garden hose, a graphics card, a neural network, a language model"
)

#: words that make random phrases, together with those above
EXTRA_WORDS = (
    "red blue yellow purple orange black silver happy sad clever lazy brave gentle wild strange tiny huge seven "
    "eleven forty hundred first second third never always maybe almost under over between quickly ladder hammer "
    "basket button marble pocket copper velvet thunder pepper rocket tunnel carpet donkey monkey zebra parrot "
    "walnut cherry mango olive ginger harvest signal mirror planet magnet engine turbine cotton wool linen anchor"
)

SYLLABLE_EXCEPTIONS = {
    "being": 2, "poem": 2, "poet": 2, "poetry": 3, "quiet": 2, "violin": 3, "piano": 3, "lion": 2, "science": 2,
    "evening": 2, "every": 2, "fire": 1, "fireflies": 3, "firefly": 3, "campfire": 2, "hour": 1, "hours": 1,
    "software": 2, "something": 2, "someone": 2, "sometimes": 2, "homework": 2, "forgotten": 3, "snowflakes": 2,
    "scarecrow": 2, "nightingale": 3, "nightingales": 3, "idea": 3, "ocean": 2, "january": 4, "giant": 2, "lonely": 2,
    "hidden": 2, "leaves": 1, "waves": 1, "cicadas": 3, "graveside": 2, "o'clock": 2, "nowhere": 2, "anyone": 3,
    "weathered": 2, "darkened": 2, "scattered": 2, "leaving": 2, "i": 1, "eaves": 1, "alone": 2, "neural": 2,
    "lamplight": 2, "homeward": 2, "fisherman": 3, "lifetime": 2, "moonrise": 2, "sunrise": 2, "hillside": 2,
    "riverside": 3, "wake": 1, "pines": 1, "elevator": 4, "gardener": 3, "doorstep": 2, "traveler": 3, "travelers": 3,
    "unfinished": 3, "listening": 3, "fields": 1, "bamboo": 2, "cherry": 2, "courtyard": 2, "freedom": 2,
    "battery": 3, "chocolate": 3, "camera": 3, "wandering": 3, "flowers": 2, "gravity": 3, "silently": 3,
    "teahouse": 2, "darkening": 3, "whispering": 3, "firelight": 2, "woodsmoke": 2, "solitude": 3, "lilies": 2,
    "poppies": 2, "loved": 1, "once": 1, "footprints": 2, "tree": 1, "trees": 1, "everyone": 3,
    "beyond": 2, "crooked": 2, "hundred": 2, "maybe": 2, "nineteen": 2, "smiles": 1, "somewhere": 2, "tired": 2,
}  # fmt: skip


@cache
def word_syllables(word: str) -> int:
    """Syllables of one English word: vowel groups, less silent endings, with exceptions for what that misses."""
    word = word.lower()
    if word in SYLLABLE_EXCEPTIONS:
        return SYLLABLE_EXCEPTIONS[word]
    count = len(re.findall(r"[aeiouy]+", word))
    if re.search(r"([^aeiouy]e|[aeiouy][^aeiouylr]?[^aeiouychsxzgl]es|[^aeioutd]ed)$", word) and not re.search(
        r"[^aeiouyrlw]le$", word
    ):
        count -= 1
    return max(count, 1)


@cache
def syllables(text: str) -> int:
    """Syllables of a text; hyphenated words count part by part, punctuation counts nothing."""
    return sum(map(word_syllables, re.findall(r"[A-Za-z']+", text)))


def third_person(verb: str) -> str:
    """The singular of a plural verb: drift -> drifts, pass -> passes, cry -> cries."""
    if re.search(r"(s|sh|ch|x)$", verb):
        return verb + "es"
    return verb[:-1] + "ies" if re.search(r"[^aeiou]y$", verb) else verb + "s"


# ------------------------------------------------------------------------------------------------ the grammar

#: NAME[@season] = alternatives. A name that is a rule expands, every other word stands for itself.
RULES = """
SURFACE = bridge | roof | path | steps | bench | porch | gate | wall | fence | stones | railing | doorstep
WORN = old | cold | wet | worn | wooden | mossy | broken | empty | narrow | silent | crooked | forgotten
SHORE = river | pond | stream | lake | harbor | bay | water | sea
GROUND = field | valley | meadow | garden | orchard | forest | hillside | village | temple | courtyard
GROUND = marsh
WIDE = quiet | empty | distant | sleeping | silent | misty | wide | darkening
PLACE = on the SURFACE | on the WORN SURFACE | by the SHORE | beside the WIDE SHORE | across the GROUND
PLACE = over the WIDE GROUND | beyond the GROUND | beyond the WIDE SHORE | in the WIDE GROUND
PLACE = along the SHORE | behind the GROUND | near the WORN SURFACE | under the eaves | under the pines
PLACE = at the edge of the GROUND | in the tall grass | down the narrow lane
PLACE = above the rooftops | through the open door | outside my window
FAR = beyond the GROUND | beyond the WIDE GROUND | beyond the SHORE | behind the GROUND | under the stars
FAR = under the moon | outside my window | at the edge of the GROUND | far from here | below the hills
HOW = in peace | softly | in the wind | in the dark | at ease | in the cold | in silence | without a sound
HOW = without a word | alone | in the pale light | as if in a dream
WHEN = again | once more | at last | tonight | all night | all night long | until dawn | before the storm
WHEN = for an hour | after the rain | as the day ends | while the village sleeps | until morning comes
WHEN = at the end of the day
CLOSER = and nobody comes | then silence again | as the night comes on | with nowhere to go
CLOSER = as if listening | and the world is still | and the rain begins | and no one answers
CLOSER = until the rain stops | while I drink my tea | while my tea grows cold | waiting for the rain
CLOSER = waiting for the moon | and I walk home alone | and then nothing more | and I have nothing to say
CLOSER = as if no one ever left | the way they did long ago | and the village falls asleep
CLOSER = while the kettle starts to sing | and somewhere a dog answers | like a song I used to know
CLOSER = and I forget my own name | WHEN | and the WIDE GROUND sleeps | and the WIDE SHORE listens
CLOSER = and the WIDE GROUND falls silent | while the SHORE grows dark
THING = a lantern | a footprint | one lamp | a shadow | a teacup | an old song | a voice | birdsong
THING = moonlight | lamplight | woodsmoke | a paper boat | my shadow | a single light | a letter | a whisper
THING = an old man | a straw hat | lost keys
FRAGMENT = THING PLACE | the WIDE GROUND | the WORN SURFACE | the WIDE SHORE | SEASON DAYTIME
FRAGMENT = a WIDE SEASON DAYTIME | the sound of water | a bell far away | no one at the gate
FRAGMENT = moonlight on the stones | steam above the tea | an unfinished letter | one lamp still burning
FRAGMENT = the long road home | a door left open | rain on the rooftop | the smell of wet earth
FRAGMENT = an empty teahouse | my father's old coat | a stranger's footprints | the first star appears
DAYTIME = morning | evening | night | dusk | dawn | twilight | midnight | sunlight | moonlight | silence
DAYTIME = rain | wind
FRAGMENT@spring = melting snow PLACE | new grass PLACE | the first blossoms | scent of plum blossom
FRAGMENT@spring = the smell of new grass
FRAGMENT@summer = the heat of the day | cool water PLACE | distant thunder | a straw hat PLACE
FRAGMENT@summer = the scent of mown hay
FRAGMENT@autumn = the last warm day | cold smoke PLACE | apples in the grass | the harvest moon
FRAGMENT@autumn = a red leaf PLACE
FRAGMENT@winter = first snow PLACE | ice PLACE | the year's first snow | footprints in the snow
FRAGMENT@winter = bare branches | a red scarf
WHEN@spring = all through spring | in the first warm rain
WHEN@summer = all through summer | in the summer heat
WHEN@autumn = all through autumn | in the autumn wind
WHEN@winter = all through winter | in the falling snow
AFTER = PLACE | HOW | again | once more | at dawn | at dusk | at last | tonight
GAZE = only | nothing but | thinking of | dreaming of | I dream of | waiting for | I wait for | I remember
GAZE = I sing of | alone with | I think about | and again | still no end of
"""

#: lines for any phrase at all, and for a time of day
FRAMES = (
    "{}", "{}", "only {}", "nothing but {}", "thinking of {}", "I whisper {}", "{}, I whisper", "{}, says the wind",
    "the wind says {}", "a voice says {}", "{}, once more", "I write down {}", "again {}", "dreaming of {}",
    "the sound of {}", "{} in the margin", "I have not forgotten {}", "and in the end only {}", "somebody whispers {}",
    "{} on my mind", "in the margin, {}", "the old poet writes {}", "nobody talks of {}",
)  # fmt: skip
TIME_FRAMES = (
    "{}", "{}", "at {}", "it is {}", "the clock says {}", "{} again", "just {}", "{} by the clock", "now {}",
    "the station clock says {}", "already {}", "the old clock says {}", "{}, and no train", "{}, says the clock",
)  # fmt: skip


def split(table: str) -> list[str]:
    return [word.strip() for word in table.split(",")]


def parse_noun(entry: str) -> tuple[str, str | None]:
    """`leaves:autumn` -> (leaves, autumn)."""
    word, _, season = entry.partition(":")
    return word, season or None


def class_rules(season: str | None) -> Iterator[tuple[str, str]]:
    """NP, VP and SCENE rules of every class and number; out-of-season nouns are left out."""
    for key, nouns in NOUNS.items():
        kind, number = key.split()
        name = f"{kind}_{number}".upper()
        for noun, when in map(parse_noun, split(nouns)):
            if not (season and when and when != season):
                yield f"N_{name}", noun
        for verb in split(VERBS[kind]):
            yield f"V_{name}", verb if number == "pl" else third_person(verb)
        for adjective in split(ADJECTIVES[kind]):
            yield f"A_{kind.upper()}", adjective
        for subject in (f"the N_{name}", f"the A_{kind.upper()} N_{name}"):
            yield f"NP_{name}", subject
        place = "FAR" if kind in ("land", "water", "time") else "PLACE"
        for predicate in ("", "HOW", place, f"HOW {place}"):
            yield f"VP_{name}", f"V_{name} {predicate}".strip()
        yield "SCENE", f"NP_{name} VP_{name}"


class Grammar:
    """The rules of one season, sampled to an exact number of syllables.

    `plans` tells for a symbol and a length which alternatives can reach it and how their parts share the
    syllables, so that sampling never has to try again.
    """

    def __init__(self, season: str | None) -> None:
        self.rules: dict[str, list[tuple[str, ...]]] = {}
        for line in RULES.strip().splitlines():
            name, _, alternatives = line.partition(" = ")
            name, _, only = name.partition("@")
            if not only or only == season:
                for alternative in alternatives.split("|"):
                    self.add(name, alternative)
        for name, alternative in class_rules(season):
            self.add(name, alternative)
        for name in [season] if season else SEASONS:
            self.add("SEASON", name)
        self.plans = cache(self._plans)

    def add(self, name: str, alternative: str) -> None:
        self.rules.setdefault(name, [])
        parts = tuple(alternative.split())
        if parts not in self.rules[name]:
            self.rules[name].append(parts)

    def _plans(self, symbols: tuple[str, ...], n: int) -> list[tuple[tuple[str, int], ...]]:
        """All ways in which `symbols` share `n` syllables: [((symbol, syllables), ...), ...]."""
        if not symbols:
            return [()] if n == 0 else []
        head, rest = symbols[0], symbols[1:]
        shares = range(1, n + 1) if head in self.rules else [word_syllables(head)]
        return [
            ((head, share), *tail)
            for share in shares
            if share <= n and self.reachable(head, share)
            for tail in self.plans(rest, n - share)
        ]

    def reachable(self, symbol: str, n: int) -> bool:
        return symbol not in self.rules or any(self.plans(parts, n) for parts in self.rules[symbol])

    @cache  # noqa: B019  (the five grammars live as long as the program)
    def feasible(self, symbol: str, n: int) -> list[list[tuple[tuple[str, int], ...]]]:
        return [plans for parts in self.rules[symbol] if (plans := self.plans(parts, n))]

    def sample(self, rng: random.Random, symbol: str, n: int) -> str | None:
        """A random expansion of `symbol` with exactly `n` syllables, or None if it has none."""
        choices = self.feasible(symbol, n)
        if not choices:
            return None
        plan = rng.choice(rng.choice(choices))
        words = (self.sample(rng, part, share) if part in self.rules else part for part, share in plan)
        return " ".join(word for word in words if word)


@cache
def grammar(season: str | None) -> Grammar:
    return Grammar(season)


# --------------------------------------------------------------------------------------------------- the haiku


@dataclass(frozen=True)
class Topic:
    """What a haiku is about. `name` is the class and number of its verbs (`FALL_PL`), None for anything else."""

    text: str
    name: str | None
    season: str | None


def held_out(text: str) -> bool:
    """Whether a topic or a time of day is kept out of the training text: one in ten, by checksum."""
    return text != "autumn leaves" and zlib.crc32(text.encode()) % 10 == 0


@cache
def topics() -> list[Topic]:
    """Every topic of the classes: bare, with an article, with a season or an adjective before it."""
    found = []
    for key, nouns in NOUNS.items():
        kind, number = key.split()
        for noun, season in map(parse_noun, split(nouns)):
            name = f"{kind}_{number}".upper()
            singular = number == "sg"
            modifiers = [m for m in (*SEASONS, "evening", "morning") if m != noun] if kind != "time" else []
            modifiers = [m for m in modifiers if m not in SEASONS or season in (None, m)]
            for modifier in ["", *modifiers, *split(ADJECTIVES[kind])]:
                phrase = f"{modifier} {noun}".strip()
                articles = ["the", "an" if phrase[0] in "aeiou" else "a"] if singular else [""]
                when = modifier if modifier in SEASONS else season
                found += [Topic(f"{article} {phrase}".strip(), name, when) for article in articles]
    return found


@cache
def training_topics() -> list[Topic]:
    return [topic for topic in topics() if not held_out(topic.text)]


def clock_words(minute: int) -> str:
    """The time of day in words on a 12-hour clock: 0 -> twelve o'clock, 425 -> seven oh five."""
    ones = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    ones += " seventeen eighteen nineteen"
    small, tens = ones.split(), ["twenty", "thirty", "forty", "fifty"]
    hour, minute = divmod(minute, 60)
    hour_word = small[hour % 12 or 12]
    if minute == 0:
        return f"{hour_word} o'clock"
    if minute < 10:
        return f"{hour_word} oh {small[minute]}"
    if minute < 20:
        return f"{hour_word} {small[minute]}"
    return f"{hour_word} {tens[minute // 10 - 2]}" + (f"-{small[minute % 10]}" if minute % 10 else "")


TIMES = [clock_words(minute) for minute in range(720)]
TRAINING_TIMES = [time for time in TIMES if not held_out(time)]


#: share of the haiku that follow chance alone; the others follow what the words bring to mind
FREE = 0.3

#: changes all that words bring to mind
SALT = 5


class Poet:
    """Makes the choices of one haiku about a phrase: by chance, or by what its words always bring to mind.

    Were every line a free choice, the likeliest haiku about anything would be the same one. So most haiku take
    their images from the phrase: its last word decides the scene, its first word the mood. A word outside the
    lexicon counts by its first letter. `take` tells the second haiku of a conversation from the first.
    """

    def __init__(self, rng: random.Random, phrase: str, season: str | None, take: int = 1) -> None:
        self.rng, self.take = rng, take
        self.free = rng.random() < FREE
        words = [word for word in re.findall(r"[a-z0-9]+", phrase.lower()) if word not in ("a", "an", "the")] or ["?"]
        self.mood, self.image = (word if word in known_words() else word[0] for word in (words[0], words[-1]))
        self.season = season or self.pick("season", SEASONS)

    def pick(self, what: str, options: Sequence[T]) -> T:
        if self.free:
            return self.rng.choice(options)
        return options[zlib.crc32(f"{SALT} {self.image} {self.take} {what}".encode()) % len(options)]

    def say(self, symbol: str, n: int, line: int = 0) -> str | None:
        """An expansion of `symbol` with `n` syllables, or None where it has none."""
        if n <= 0:
            return None
        if self.free:
            return grammar(self.season).sample(self.rng, symbol, n)
        word = self.mood if symbol in ("FRAGMENT", "CLOSER", "GAZE", "AFTER") else self.image
        return brought_to_mind(f"{word} {self.take} {line}", self.season, symbol, n)

    def lines(self, *shape: str) -> list[str]:
        """Three lines from symbols or ready text; each symbol takes its line's share of 5, 7, 5."""
        known = grammar(self.season).rules
        return [
            self.say(part, n, line) or "" if part in known else part
            for line, (part, n) in enumerate(zip(shape, (5, 7, 5), strict=True))
        ]


@cache
def brought_to_mind(by: str, season: str, symbol: str, n: int) -> str | None:
    return grammar(season).sample(random.Random(f"{SALT} {by} {symbol}"), symbol, n)


@cache
def known_words() -> frozenset[str]:
    """Words that have images of their own: the lexicon, and the words of the clock."""
    clock = {word for time in TIMES for word in re.findall(r"[a-z]+", time)}
    return frozenset(map(str.lower, all_words())) | clock


def topic_lines(poet: Poet, topic: Topic, attempt: int) -> list[str] | None:
    """A haiku that names its topic as title, subject of a sentence or object of a thought; None: does not fit."""
    k = syllables(topic.text)
    place = poet.pick(f"place {attempt}", range(5))
    if place == 0 and (k == 5 or (rest := poet.say("AFTER", 5 - k))):
        title = topic.text if k == 5 else f"{topic.text} {rest}"
        return poet.lines(title + " —", "SCENE", "CLOSER")
    if place == 1 and (verb := poet.say(f"VP_{topic.name}", 5 - k)):
        first, second, third = poet.lines(f"{topic.text} {verb}", "CLOSER", "FRAGMENT")
        return [first, second + " —", third]
    if place in (2, 3) and (verb := poet.say(f"VP_{topic.name}", 7 - k)):
        first, second, third = poet.lines("FRAGMENT", f"{topic.text} {verb}", "CLOSER")
        return [first + " —", second, third]
    if place == 4 and (gaze := poet.say("GAZE", 5 - k)):
        first, second, third = poet.lines("FRAGMENT", "SCENE", f"{gaze} {topic.text}")
        return [first + " —", second + ",", third]
    return None


def framed_lines(poet: Poet, phrase: str, frames: tuple[str, ...]) -> list[str]:
    """A haiku around a phrase of any length, which stands in one line word for word."""
    k = syllables(phrase)
    place = poet.pick("place", range(3))
    target = (5, 7, 5)[place]
    fitting = [f for f in frames if k + syllables(f.replace("{}", "")) == target] or list(frames[:1])
    line = poet.pick("frame", fitting).format(phrase)
    shape = [("", "SCENE", "CLOSER"), ("FRAGMENT", "", "FRAGMENT"), ("FRAGMENT", "SCENE", "")][place]
    ends = [(" —", "", ""), (" —", " —", ""), (" —", ",", "")][place]
    return [text + end for text, end in zip(poet.lines(*(part or line for part in shape)), ends, strict=True)]


def haiku_about(rng: random.Random, topic: Topic, take: int = 1) -> str:
    """A haiku in which the topic's text stands verbatim."""
    if topic.name is None:
        return haiku_with(rng, topic.text, take=take)
    poet = Poet(rng, topic.text, topic.season, take)
    attempts = (topic_lines(poet, topic, attempt) for attempt in range(20))
    return "\n".join(next(filter(None, attempts), None) or framed_lines(poet, topic.text, FRAMES[:1]))


def haiku_with(rng: random.Random, phrase: str, frames: tuple[str, ...] = FRAMES, take: int = 1) -> str:
    """A haiku in which `phrase` stands verbatim in one line."""
    return "\n".join(framed_lines(Poet(rng, phrase, None, take), phrase, frames))


# ----------------------------------------------------------------------------------------------- conversations

Turns = list[tuple[str, str]]

ASK_ABOUT = (
    "Write a haiku about {}.", "Write a haiku about {}.", "Write a haiku about {}.", "Write a haiku about {}",
    "A haiku about {}, please.", "haiku about {}", "Can you write a haiku about {}?", "Please write a haiku about {}.",
    "Write me a haiku about {}.", "Write a short poem about {}.",
)  # fmt: skip
ASK_WITH = (
    'Write a haiku that contains the words "{}".', 'Write a haiku that contains the words "{}".',
    'Write a haiku that contains the words "{}".', 'Write a haiku with the words "{}" in it.',
    'Write a haiku. It must contain the words "{}".', 'Write a haiku that includes the phrase "{}".',
    "Write a haiku that contains the words '{}'.", "Write a haiku that contains: {}",
    'Write a haiku containing "{}".', 'Use the words "{}" in a haiku.', 'A haiku with "{}", please.',
)  # fmt: skip
ASK_BOTH = 'Write a haiku about {} that contains the words "{}".'

SMALL_TALK = (
    ("Who are you?", "I am a very small model. I write haiku."),
    ("What are you?", "I am a very small model. I write haiku."),
    ("What can you do?", "I can write a haiku about anything you name."),
    ("What is a haiku?", "A haiku is a poem of three short lines."),
    ("How many lines does a haiku have?", "Three."),
    ("How many syllables does a haiku have?", "Five, then seven, then five."),
    ("What season is it?", "I cannot tell from here. Look out of the window."),
    ("What time is it?", "I have no clock. Tell me and I will put it in a haiku."),
    ("Name the four seasons.", "Spring, summer, autumn and winter."),
    ("Which season comes after winter?", "Spring comes after winter."),
    ("Which season comes after spring?", "Summer comes after spring."),
    ("Which season comes after summer?", "Autumn comes after summer."),
    ("Which season comes after autumn?", "Winter comes after autumn."),
    ("What falls in autumn?", "Leaves fall in autumn."),
    ("What falls in winter?", "Snow falls in winter."),
    ("What sings in summer?", "Cicadas sing in summer."),
    ("What opens in spring?", "Blossoms open in spring."),
    ("Hello.", "Hello. Shall I write a haiku?"),
    ("Hello!", "Hello. Shall I write a haiku?"),
    ("Hi", "Hello. Shall I write a haiku?"),
    ("Thank you.", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Good night.", "Good night. The moon will keep watch."),
)


def random_word(rng: random.Random) -> str:
    """A word of the lexicon, an invented one, or a number: what cannot be guessed must be copied."""
    kind = rng.random()
    if kind < 0.55:
        return rng.choice(all_words())
    if kind < 0.9:
        made = "".join(rng.choice("bcdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
        made += rng.choice(["", "n", "r", "s", "t", "x", "lk", "mp"])
        return made.capitalize() if rng.random() < 0.15 else made
    return str(rng.randrange(10 ** rng.randint(1, 4)))


@cache
def all_words() -> list[str]:
    tables = [*VERBS.values(), *ADJECTIVES.values(), *NOUNS.values(), ANYTHING, EXTRA_WORDS]
    return sorted({word for table in tables for word in re.findall(r"[A-Za-z]{2,}", table)})


def random_phrase(rng: random.Random) -> str:
    words = [random_word(rng) for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 5)))]
    return rng.choice((" ", " ", " ", "-", ", ")).join(words)


def random_topic(rng: random.Random) -> Topic:
    kind = rng.random()
    if kind < 0.75:
        return rng.choice(training_topics())
    anything = [word for word in split(ANYTHING) if not held_out(word)]
    return Topic(rng.choice(anything) if kind < 0.9 else random_phrase(rng), None, None)


def chat_about(rng: random.Random) -> Turns:
    topic = random_topic(rng)
    return [(rng.choice(ASK_ABOUT).format(topic.text), haiku_about(rng, topic))]


def chat_with(rng: random.Random) -> Turns:
    if rng.random() < 0.55:
        phrase, frames = rng.choice(TRAINING_TIMES), TIME_FRAMES
    else:
        phrase, frames = random_phrase(rng), FRAMES
    topic = random_topic(rng)
    if rng.random() < 0.15 and topic.name:
        return [(ASK_BOTH.format(topic.text, phrase), haiku_with_both(rng, topic, phrase))]
    return [(rng.choice(ASK_WITH).format(phrase), haiku_with(rng, phrase, frames))]


def haiku_with_both(rng: random.Random, topic: Topic, phrase: str) -> str:
    """The phrase in the first line, the topic as subject of the second."""
    poet = Poet(rng, topic.text, topic.season)
    verb = poet.say(f"VP_{topic.name}", max(7 - syllables(topic.text), 1))
    return "\n".join(poet.lines(phrase + " —", f"{topic.text} {verb}", "CLOSER"))


def chat_small(rng: random.Random) -> Turns:
    kind = rng.randrange(5)
    if kind == 0:
        season = rng.choice(SEASONS)
        return [(f"{seasonal_sentence(rng, season)} What season is it?", f"It is {season}.")]
    if kind == 1:
        time = rng.choice(TRAINING_TIMES)
        return [(f"It is {time}. What time is it?", f"It is {time}.")]
    if kind == 2:
        phrase = random_phrase(rng)
        return [(f"Repeat these words: {phrase}", phrase)]
    return [rng.choice(SMALL_TALK) for _ in range(rng.choice((1, 1, 2)))]


def seasonal_sentence(rng: random.Random, season: str) -> str:
    """A sentence about something that belongs to one season."""
    pairs = [(key.split(), noun) for key, nouns in NOUNS.items() for noun in split(nouns) if f":{season}" in noun]
    (kind, number), noun = rng.choice([pair for pair in pairs if pair[0][0] != "time"])
    verb = grammar(season).sample(rng, f"VP_{kind}_{number}".upper(), rng.randint(2, 6))
    return f"The {parse_noun(noun)[0]} {verb}."


def chat_long(rng: random.Random) -> Turns:
    """Several turns about one topic: another haiku, what it was about, which season, which words."""
    topic = random_topic(rng)
    turns = [(rng.choice(ASK_ABOUT).format(topic.text), haiku_about(rng, topic))]
    return turns + [rng.choice(FOLLOW_UPS)(rng, topic, take) for take in range(2, rng.randint(3, 5))]


def another(rng: random.Random, topic: Topic, take: int) -> tuple[str, str]:
    return rng.choice(("Another one, please.", "Write another one.", "Again.")), haiku_about(rng, topic, take)


def recall_topic(rng: random.Random, topic: Topic, take: int) -> tuple[str, str]:
    return rng.choice(("What was it about?", "What was the topic?")), f"It was about {topic.text}."


def recall_season(rng: random.Random, topic: Topic, take: int) -> tuple[str, str]:
    if topic.season is None:
        return recall_topic(rng, topic, take)
    return "What season is it?", f"It is {topic.season}."


def new_words(rng: random.Random, topic: Topic, take: int) -> tuple[str, str]:
    return chat_with(rng)[0]


def small_talk(rng: random.Random, topic: Topic, take: int) -> tuple[str, str]:
    return rng.choice(SMALL_TALK[-4:])


FOLLOW_UPS: tuple[Callable[[random.Random, Topic, int], tuple[str, str]], ...] = (
    another, another, recall_topic, recall_season, new_words, small_talk,
)  # fmt: skip


def chat_text(turns: Turns, system: str | None = SYSTEM) -> str:
    """Turns in ChatML, as the model's chat template writes them."""
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return head + "".join(
        f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answered}<|im_end|>\n"
        for asked, answered in turns
    )


def prompt_text(asked: str, before: Turns | None = None, system: str | None = SYSTEM) -> str:
    """A conversation that waits for the model's answer."""
    return chat_text(before or [], system) + f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


# --------------------------------------------------------------------------------------------------- documents


def chat_document(rng: random.Random) -> str:
    make = rng.choices((chat_about, chat_with, chat_long, chat_small), (40, 32, 16, 12))[0]
    system = rng.choices((SYSTEM, None, "You are a helpful assistant.", "You are a poet."), (82, 10, 4, 4))[0]
    return chat_text(make(rng), system)


def prose_document(rng: random.Random) -> str:
    """A paragraph about one season."""
    season = rng.choice(SEASONS)
    g = grammar(season)
    sentences = [prose_sentence(rng, g, season) for _ in range(rng.choice((3, 4, 5, 6, 8, 10, 16)))]
    return " ".join(sentences)


def prose_sentence(rng: random.Random, g: Grammar, season: str) -> str:
    scene = g.sample(rng, "SCENE", rng.randint(5, 11)) or ""
    ending = g.sample(rng, "CLOSER", rng.randint(4, 7)) if rng.random() < 0.6 else None
    opening = rng.choice(("", "", "", f"in {season} ", "this evening ", "once more ", "before dawn "))
    text = f"{opening}{scene} {ending or ''}".strip()
    return text[0].upper() + text[1:] + "."


def haiku_document(rng: random.Random) -> str:
    """One to four haiku about one topic, without a chat around them."""
    topic = random_topic(rng)
    return "\n\n".join(haiku_about(rng, topic, take) for take in range(1, rng.randint(2, 5)))


def document(rng: random.Random) -> str:
    """One document of the training text."""
    return rng.choices((chat_document, prose_document, haiku_document), (82, 11, 7))[0](rng)


def main() -> None:
    rng = random.Random(1)
    for make in (chat_about, chat_with, chat_long, chat_small):
        for _ in range(4):
            print(chat_text(make(rng), None), end="---\n")
    print(prose_document(rng), haiku_document(rng), sep="\n---\n")
    print(f"{len(topics())} topics, {len(TIMES)} times of day, {len(all_words())} words")


if __name__ == "__main__":
    main()
