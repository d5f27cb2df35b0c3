"""Rewards: how good is a completion of a prompt, by a rule instead of a judge?

reviews         how sure a reader can be of a good mood, 0 to 1 (data/reviews.py)
sentiment       how positive a completion sounds, -1 to 1: compound score of the package vaderSentiment (Hutto & Gilbert 2014)
FILE.py:NAME    a function of your own, NAME(prompt, completion) -> a number
"""

import contextlib
import importlib.util
import math
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from base.errors import UserError
from data import reviews

SECONDS = 60  # for one completion
Reward = Callable[[str, str], float]


def check(name: str) -> None:
    """UserError for a name that is no reward's. Reads nothing."""
    path, _, _ = name.rpartition(":")
    if name not in ("reviews", "sentiment") and not (path.endswith(".py") and Path(path).is_file()):
        raise UserError(f"key reward: {name!r} is not reviews, sentiment, or a file and a function in it, as in FILE.py:NAME")


def get(name: str) -> Reward:
    """The reward of that name. What it returns is checked: UserError where it raises, takes too long, or gives no number."""
    check(name)
    reward = {"reviews": lambda: reviews.reward, "sentiment": _sentiment}.get(name, lambda: _from_file(name))()

    def checked(prompt: str, completion: str) -> float:
        where = f"key reward: {name}, of the completion {completion[:60]!r}"
        try:
            with _deadline():
                value = reward(prompt, completion)
            number = math.nan if isinstance(value, bool | str) or value is None else float(value)
        except (Exception, SystemExit) as error:  # whatever a user's function may raise
            raise UserError(f"{where}: {type(error).__name__}: {error}: mend that function") from None
        if not math.isfinite(number):
            raise UserError(f"{where}: {value!r} is not a finite number: mend that function")
        return number

    return checked


def _sentiment() -> Reward:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("key reward: sentiment needs the package vaderSentiment: pip install vaderSentiment") from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda prompt, completion: analyzer.polarity_scores(completion)["compound"]


def _from_file(name: str) -> Reward:
    path, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    try:
        with _deadline():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        raise UserError(f"key reward: {path} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(getattr(module, function, None)):
        raise UserError(f"key reward: {path} has no function {function!r}")
    return getattr(module, function)


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """Raise TimeoutError after SECONDS."""

    def stop(*_):
        raise TimeoutError(f"it takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
