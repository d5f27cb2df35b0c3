"""Text in, examples out: `load` takes a recipe's name or a file and gives a list of `Example`.

Every stage trains on or scores the same thing, a prompt with k completions:

    view         completions                            who asks
    sft          the right answer                       sft.py
    preference   chosen, rejected                       precompute_ref.py, dpo.py
    mcq          the options, after recipe A's question eval_mcq.py --mode generate
    loglik       the options, after the plain context   eval_mcq.py --mode loglik
"""

import difflib
import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from base.errors import UserError

PARTS = ("sentiment", "descriptiveness", "tldr", "cnndm")
RECIPES = {  # name -> its module, and which of the module's data sets it is
    "toy": ("data.toy", ""),
    "hellaswag": ("data.hellaswag", ""),
    "hh": ("data.hh", ""),
    "alpaca": ("data.alpaca", ""),
    **{f"human_labels:{part}": ("data.human_labels", part) for part in PARTS},
    **{name: ("data.math_problems", name) for name in ("gsm8k", "math", "toy_math")},
}
VIEWS = ("sft", "preference", "mcq", "loglik")


@dataclass(frozen=True)
class Example:
    """A prompt and its completions, as text, or as ids of GPT-2's vocabulary, which then are tokens as they are: nothing is
    added at a completion's end. `label` is the right option's number where the completions are options;
    `group` joins examples of which an epoch draws some; `source` says where it stands, for messages ("file:line")."""

    prompt: str | tuple[int, ...]
    completions: tuple[str | tuple[int, ...], ...]
    label: int | None = None
    group: int | None = None
    source: str = ""


@dataclass(frozen=True)
class Problem:
    """Multiple choice in HellaSwag's shape: which of the endings continues the context?"""

    context: str
    endings: tuple[str, ...]
    label: int


def question(context: str, endings: tuple[str, ...]) -> str:
    """Recipe A's prompt: the context, the options, `Answer:`; the completion is " " + the full text of the right option."""
    options = "".join(f"{letter}) {ending}\n" for letter, ending in zip("ABCDEFGHIJ", endings, strict=False))
    return f"{context}\n{options}Answer:"


def view_problem(problem: Problem, view: str, group: int, source: str) -> list[Example]:
    """A problem as the examples of a view. `preference` gives a pair for every wrong option, all of one group."""
    asked, endings = question(problem.context, problem.endings), tuple(" " + e for e in problem.endings)
    right = endings[problem.label]
    if view == "sft":
        return [Example(asked, (right,), source=source)]
    if view == "preference":
        wrong = [e for i, e in enumerate(endings) if i != problem.label]
        return [Example(asked, (right, e), group=group, source=source) for e in wrong]
    if view == "mcq":
        return [Example(asked, endings, problem.label, source=source)]
    return [move_space(Example(problem.context, endings, problem.label, source=source))]


def move_space(example: Example) -> Example:
    """White space at a prompt's end goes to its completions, as lm-evaluation-harness scores them: in GPT-2's vocabulary a
    space belongs to the word behind it."""
    prompt = example.prompt.rstrip()
    space = example.prompt[len(prompt) :]
    return replace(example, prompt=prompt, completions=tuple(space + c for c in example.completions))


def split_of(text: bytes, val: float, test: float) -> str:
    """Which split a text belongs to, by its SHA-256: the same in every file and order, so that no copy of it is in another."""
    at = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    return "val" if at < val else "test" if at < val + test else "train"


def only_text_views(recipe: str, view: str) -> None:
    """Raise UserError for a recipe without options that is asked for multiple choice."""
    if view not in ("sft", "preference"):
        raise UserError(f"recipe {recipe} has no multiple-choice questions: eval_mcq.py takes hellaswag, toy or a file of them")


def local(data_dir: str, names: Sequence[str]) -> list[Path]:
    """Those of the files `names` that the folder `data_dir` holds, plain or with .gz added or taken away."""
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"data_dir {data_dir}: {'not a folder' if folder.exists() else 'no such folder'}")
    spellings = ((n, n + ".gz", n.removesuffix(".gz")) for n in names)
    found = [next((folder / s for s in each if (folder / s).is_file()), None) for each in spellings]
    if not any(found):
        raise UserError(f"data_dir {data_dir}: none of {', '.join(names)} is there (plain or .gz)")
    return [path for path in found if path]


def report(what: str, kept: int, dropped: dict[str, int]) -> None:
    """Say how much of a data set stays, and what was dropped and why."""
    lost = "".join(f"; {n:,} dropped: {why}" for why, n in dropped.items() if n)
    print(f"{what}: {kept:,} kept{lost}", flush=True)


def load(source: str, split: str, view: str, *, data_dir: str = "", limit: int = 0) -> list[Example]:
    """Examples of a recipe's split, or of a .jsonl / .jsonl.gz file (its one split), in a view's form.

    `data_dir` holds a recipe's files under their published names (plain or .gz), instead of the download; `limit` > 0 keeps
    the first so many problems. Raises UserError, naming file and line, for whatever is wrong with the data.
    """
    assert view in VIEWS, view
    if source in RECIPES:
        module, part = RECIPES[source]
        which = {"part": part} if part else {}
        return importlib.import_module(module).load(split, view, data_dir=data_dir, limit=limit, **which)
    if not source.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")) and not Path(source).exists():
        near = difflib.get_close_matches(source, RECIPES, n=1)
        raise UserError(
            f"data {source!r} is neither a recipe ({', '.join(sorted(RECIPES))}) nor a .jsonl or .jsonl.gz file"
            + (f": did you mean {near[0]}?" if near else "")
        )
    from data import jsonl

    return jsonl.load(source, view, limit=limit)
