"""The demo's little world: a grammar of about 230 words, and what may be asked about a sentence of it.

    martha found seven rusty lanterns near dublin on monday

Every word belongs to one slot only, so each task follows from the text alone: repeat it, translate it word
for word into an invented language, say who, how many, what, where or when, continue the story. A sentence is
a test sentence, or not, by the checksum of its text: none can stray into any training set.
"""

import random
import zlib

SLOTS = {
    "name": (
        "anna martha oliver henry sophie victor julia thomas rachel edward monica patrick olga samuel "
        "gloria hector nadia felix ursula walter bruno clara dominic esther frank grace ivan jasper kevin "
        "laura marcus nora oscar paula quentin rosa simon teresa vincent zoe"
    ),
    "verb": (
        "bought sold found lost painted carried wanted borrowed counted dropped fixed gathered buried "
        "ignored kicked loved measured noticed ordered packed polished rescued saved smashed tested washed "
        "wrapped stole chose drew"
    ),
    "number": ("two three four five six seven eight nine ten eleven twelve twenty thirty forty sixty ninety"),
    "adjective": (
        "red green yellow purple silver golden wooden plastic heavy tiny huge ancient modern broken clean "
        "dirty cheap expensive fresh frozen hidden loud quiet round square rusty sharp smooth soft strange "
        "warm invisible"
    ),
    "object": (
        "lanterns bottles tables chairs apples lemons cookies carpets candles baskets bicycles buttons "
        "cameras drums engines feathers flowers guitars hammers helmets jackets kettles ladders letters "
        "magnets mirrors needles notebooks pencils pillows puppets radios ribbons shovels spoons statues "
        "suitcases tickets trumpets umbrellas violins wallets windows zebras"
    ),
    "preposition": "in near behind beyond outside around towards above",
    "place": (
        "paris berlin madrid london dublin oslo cairo tokyo boston denver chicago toronto sydney vienna "
        "lisbon athens moscow havana lima geneva venice naples kyoto bombay glasgow cardiff oxford memphis "
        "orlando jakarta"
    ),
    "when": "on last at",
    "time": (
        "yesterday today tonight monday tuesday wednesday thursday friday saturday sunday january february "
        "march april may june july august september october november december dawn noon dusk midnight"
    ),
}
SLOTS = {slot: words.split() for slot, words in SLOTS.items()}
SLOT_OF = {word: slot for slot, words in SLOTS.items() for word in words}
QUESTIONS = {
    "Who is it about?": "name",
    "How many are there?": "number",
    "What is it about?": "object",
    "Where does it happen?": "place",
    "When does it happen?": "time",
}
TRANSCRIBE, TRANSLATE = "Transcribe the speech.", "Translate the speech."
CONTINUE = "Continue the following text in a coherent and engaging style with less than 40 words."
INSTRUCTIONS = [TRANSCRIBE, TRANSLATE, CONTINUE, *QUESTIONS]

_syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_pairs = [first + second for first in _syllables for second in _syllables]
DICTIONARY = dict(zip(SLOT_OF, random.Random(1).sample(_pairs, len(SLOT_OF)), strict=True))


def when(time: str) -> str:
    """The time with the word it takes: "on monday", "last april", "at noon", "today"."""
    days, months = SLOTS["time"][3:10], SLOTS["time"][10:22]
    before = {**dict.fromkeys(days, "on "), **dict.fromkeys(months, "last ")}.get(time, "at ")
    return time if time in SLOTS["time"][:3] else before + time


def sentence(rng: random.Random, test: bool = False) -> str:
    """Draw a sentence, of the test sentences (one in 20) or of the others."""
    while True:
        word = {slot: rng.choice(words) for slot, words in SLOTS.items()}
        adjective = [word["adjective"]] if rng.random() < 0.8 else []
        event = " ".join([word["name"], word["verb"], word["number"], *adjective, word["object"]])
        around = [f"{word['preposition']} {word['place']}"] * (rng.random() < 0.8)
        around += [when(word["time"])] * (rng.random() < 0.8)
        before, after = [], []
        for part in rng.sample(around, len(around)):
            (before if rng.random() < 0.4 else after).append(part)
        text = " ".join([*before, event, *after])
        if (zlib.crc32(text.encode()) % 20 == 0) == test:
            return text


def translate(text: str) -> str:
    """Word for word into the invented language."""
    return " ".join(DICTIONARY[word] for word in text.split())


def continuation(text: str) -> str:
    """What happens next: every word moves on by one in its slot, in one fixed order of slots."""
    found = {SLOT_OF[word]: word for word in text.split()}
    moved = {}
    for slot, word in found.items():
        words = SLOTS[slot]
        moved[slot] = words[(words.index(word) + 1) % len(words)]
    if "time" in moved:
        moved["time"] = when(moved["time"])
    order = ["name", "verb", "number", "adjective", "object", "preposition", "place", "time"]
    return " ".join(["then", *(moved[slot] for slot in order if slot in moved)])


def tasks(text: str) -> dict[str, str]:
    """All that may be asked about a text: {instruction: target}; if it is no sentence, to repeat it."""
    found = {SLOT_OF.get(word): word for word in text.split()}
    if None in found or not {"name", "verb", "number", "object"} <= found.keys():
        return {TRANSCRIBE: text}
    answers = {question: found[slot] for question, slot in QUESTIONS.items() if slot in found}
    return {TRANSCRIBE: text, TRANSLATE: translate(text), CONTINUE: continuation(text), **answers}
