"""What every recipe makes: examples, a prompt with k completions each. And the small tools that recipes share.

view         completions                              who asks
sft          the right answer                         sft.py
preference   chosen, rejected; or several, and pairs  precompute_ref.py, dpo.py
             of unpaired data: one, and another line's
mcq          the options, after recipe A's question   eval_mcq.py --mode generate
loglik       the options, after the plain context     eval_mcq.py --mode loglik
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from base.errors import UserError

VIEWS = ("sft", "preference", "mcq", "loglik")
PLAIN = ((0, 1),)  # the pairs of an example of chosen and rejected
Messages = tuple[dict, ...]  # a conversation, or a part of one: {"role", "content"} each


@dataclass(frozen=True)
class Example:
    """A prompt and its completions, as text, as token ids of GPT-2, or as messages. Ids are used unchanged: no end-of-text is
    added. Messages without a prompt are a whole conversation, in which every turn of the assistant is to be learnt.

    label: the right option's index, where the completions are options; of unpaired data whether the first completion is
    desirable (1 or 0). group: examples of one group are alternatives, of
    which an epoch may draw some. source: where the example stands ("file:line"), for messages. pairs: in the preference view,
    which completion is preferred to which, (chosen, rejected) each; the others do not read it.
    """

    prompt: str | tuple[int, ...] | Messages
    completions: tuple[str | tuple[int, ...] | Messages, ...]
    label: int | None = None
    group: int | None = None
    source: str = ""
    pairs: tuple[tuple[int, int], ...] = PLAIN

    @property
    def is_chat(self) -> bool:
        """Whether it is made of messages."""
        return any(isinstance(part[0], dict) for part in self.completions[:1] if part)


@dataclass(frozen=True)
class Problem:
    """Multiple choice in HellaSwag's shape: which of the endings continues the context? `label` is its index."""

    context: str
    endings: tuple[str, ...]
    label: int


def question(context: str, endings: tuple[str, ...]) -> str:
    """Recipe A's prompt: the context, the options, `Answer:`. The completion is " " + the full text of the right option."""
    options = "".join(f"{letter}) {ending}\n" for letter, ending in zip("ABCDEFGHIJ", endings, strict=False))
    return f"{context}\n{options}Answer:"


def view_problem(problem: Problem, view: str, group: int, source: str) -> list[Example]:
    """A problem as the examples of a view. `preference` gives a pair for every wrong option, all in one group."""
    asked, endings = question(problem.context, problem.endings), tuple(" " + e for e in problem.endings)
    right, wrong = endings[problem.label], [e for i, e in enumerate(endings) if i != problem.label]
    if view == "sft":
        return [Example(asked, (right,), source=source)]
    if view == "preference":
        return [Example(asked, (right, e), group=group, source=source) for e in wrong]
    if view == "mcq":
        return [Example(asked, endings, problem.label, source=source)]
    return [move_space(Example(problem.context, endings, problem.label, source=source))]


def move_space(example: Example) -> Example:
    """Move white space from the prompt's end to the completions' beginnings, as lm-evaluation-harness does for scoring: in
    GPT-2's vocabulary a space belongs to the word behind it."""
    prompt = example.prompt.rstrip()
    space = example.prompt[len(prompt) :]
    return replace(example, prompt=prompt, completions=tuple(space + c for c in example.completions))


def only_text_views(what: str, view: str) -> None:
    """Raise UserError if multiple choice is asked of data without options."""
    if view not in ("sft", "preference"):
        raise UserError(f"{what} has no multiple-choice questions: eval_mcq.py takes hellaswag, toy or a file of them")


def split_of(text: bytes, val: float, test: float) -> str:
    """The split of a text, by its SHA-256; `val` and `test` are shares of all texts. The same text is in the same split in
    every file and order, so no copy of a validation text is in the training data."""
    at = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    return "val" if at < val else "test" if at < val + test else "train"


def half_of(example: Example, val_share: float) -> str:
    """Whether a prompt is of that share of all ("val") or of the others ("train"), by its hash. Of a conversation what comes
    before its first answer is hashed, and without a prompt the completion."""
    asked = example.prompt or example.completions[0]
    if example.is_chat:
        asked = [(m["role"], m["content"]) for m in itertools.takewhile(lambda m: m["role"] != "assistant", asked)]
    return split_of((asked if isinstance(asked, str) else repr(asked)).encode(), val_share, 0)


def local(data_dir: str, names: Sequence[str]) -> list[Path]:
    """Those of the files `names` that are in the folder `data_dir`, each as named or with .gz added or removed. UserError if
    none of them is there."""
    folder = Path(data_dir)
    if not data_dir:
        raise UserError(f"key data_dir: empty: name the folder that holds {', '.join(names)}")
    if not folder.is_dir():
        raise UserError(f"data_dir {data_dir}: {'not a folder' if folder.exists() else 'no such folder'}")
    spellings = ((n, n + ".gz", n.removesuffix(".gz")) for n in names)
    found = [next((folder / s for s in each if (folder / s).is_file()), None) for each in spellings]
    if not any(found):
        raise UserError(f"data_dir {data_dir}: none of {', '.join(names)} is there (plain or .gz)")
    return [path for path in found if path]


def report(what: str, kept: int, dropped: dict[str, int]) -> None:
    """Print how many examples are kept, and how many were dropped for which reason. UserError if none is kept."""
    lost = "".join(f"; {n:,} dropped: {why}" for why, n in dropped.items() if n)
    if not kept:
        raise UserError(f"{what}: no example is left{lost}: give more data, or another split")
    print(f"{what}: {kept:,} kept{lost}", flush=True)
