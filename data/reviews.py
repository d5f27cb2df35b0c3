"""The task of `make demo`: reviews of films, made by code, each of which has a mood that nobody writes down.

    the cast was rather dull but the music was bold and the ending was clever .

The mood, good or bad, colours every adjective: each has a weight w, and a good mood takes it exp(w) times as often as a bad
one. The reward of a review is how sure its reader can be of a good mood: the posterior, 1 / (1 + exp(-sum of weights)). So it
is known exactly, it lies between 0 and 1, and it is 1/2 on average over all reviews.
"""

import math
import random
import re

from data.examples import Example, only_text_views

NOUNS = "cast music plot script ending pace dialogue camera story humour acting set sound opening hero villain".split()
ADVERBS = "rather very quite really truly almost".split()
GOOD = {"fine": 0.4, "solid": 0.6, "fresh": 0.8, "clever": 1.0, "bold": 1.2, "moving": 1.4, "superb": 1.8, "perfect": 2.4}
BAD = {"plain": 0.4, "slow": 0.6, "stale": 0.8, "clumsy": 1.0, "dull": 1.2, "empty": 1.4, "awful": 1.8, "terrible": 2.4}
WEIGHTS = GOOD | {word: -weight for word, weight in BAD.items()}  # log P(word | good mood) - log P(word | bad mood)

VOCAB = [f" {word}" for word in ["the", "was", "and", "but", ".", *NOUNS, *ADVERBS, *WEIGHTS]]
PATTERN = r" [a-z]+| \."  # each word with the space before it, so that any tokens spell a text that reads back as they are
SIZES = {"train": 20_000, "val": 1_000, "test": 1_000}
SPLITS = {"train": 0, "val": 1, "test": 2}


def reward(prompt: str, completion: str) -> float:
    """How likely a good mood is, given the adjectives of a review: 0 to 1."""
    evidence = sum(WEIGHTS.get(word, 0.0) for word in re.findall(r"[a-z]+", f"{prompt} {completion}"))
    return 1 / (1 + math.exp(-max(-700.0, evidence)))


def _review(rng: random.Random) -> tuple[str, str]:
    """(prompt, completion): the first three words, and the rest."""
    mood = rng.choice((0.5, -0.5))
    words, odds = list(WEIGHTS), [math.exp(mood * weight) for weight in WEIGHTS.values()]
    nouns = rng.sample(NOUNS, rng.choice((2, 2, 3)))
    clauses = [(noun, rng.choice(["", *ADVERBS[:3], *ADVERBS]), rng.choices(words, odds)[0]) for noun in nouns]
    text, before = "", 0.0
    for noun, adverb, adjective in clauses:
        weight = WEIGHTS[adjective]
        join = "" if not before else " and" if before * weight > 0 else " but"
        text += f"{join} the {noun} was {adverb}{' ' if adverb else ''}{adjective}"
        before = weight
    head = f" the {nouns[0]} was"
    return head, f"{text.removeprefix(head)} ."


def reviews(split: str, n: int) -> list[tuple[str, str]]:
    """`n` reviews of a split as (prompt, completion), the same ones every time."""
    rng = random.Random(f"reviews {split}")
    return [_review(rng) for _ in range(n)]


def load(split: str, view: str, data_dir: str = "", limit: int = 0) -> list[Example]:
    """A split of reviews of both moods, for SFT. There are no pairs: the demo makes them from a model's own reviews."""
    only_text_views("recipe reviews", view)
    n = min(limit or SIZES[split], SIZES[split])
    return [Example(p, (c,), source=f"reviews {split} {i}") for i, (p, c) in enumerate(reviews(split, n))]
