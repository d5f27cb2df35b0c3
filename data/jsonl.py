"""The user's own files: one JSON object a line (a .json file: or one list of them), plain or gzipped.

Which fields a view needs stands in `FIELDS`.

Files in a published format that we know by its fields (HellaSwag, Anthropic HH, Alpaca) are read as what they are.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from base.errors import UserError
from data import Example, move_space, view_problem

FIELDS = {
    "sft": '{"prompt", "completion"} (or a preference file, of which "chosen" is taken)',
    "preference": '{"prompt", "chosen", "rejected"}',
    "mcq": '{"prompt", "choices": […], "label": int}',
    "loglik": '{"prompt", "choices": […], "label": int}',
}


def read(path: str | Path, limit: int = 0) -> Iterator[tuple[str, dict]]:
    """("file:line", object) for every non-empty line, or ("file entry N", object) where a .json file is one list.

    Raises UserError for what is not there, not JSON, or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    opener = gzip.open if path.suffix == ".gz" else open
    number = count = 0
    try:
        if not path.name.endswith((".jsonl", ".jsonl.gz")):
            with opener(path, "rb") as file:
                is_list = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
            if is_list:
                with opener(path, "rb") as file:
                    yield from _listed(path, file.read().decode("utf-8-sig"), limit)
                return
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError:
                    raise UserError(f"{path}:{number}: not UTF-8 text") from None
                except (ValueError, RecursionError) as error:
                    what = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                    raise UserError(f"{path}:{number}: not JSON: {what}") from None
                if not isinstance(record, dict):
                    raise UserError(f"{path}:{number}: a {type(record).__name__} where a JSON object {{…}} was expected")
                yield f"{path}:{number}", record
                count += 1
                if count == limit:
                    return
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: damaged or cut-off gzip file ({error})") from None
    if not count:
        raise UserError(f"{path}: an empty file: it needs at least one line")


def _listed(path: Path, text: str, limit: int) -> Iterator[tuple[str, dict]]:
    """("file entry N", object) for every entry of a JSON list, N from 1. An entry at a time: a list may have 60,000 of them."""
    decoder, blank, number = json.JSONDecoder(), re.compile(r"\s*"), 0
    at = blank.match(text, text.index("[") + 1).end()
    while text[at : at + 1] != "]" or number:
        number += 1
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at character {error.pos:,}" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{path} entry {number}: not JSON: {what}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path} entry {number}: a {type(record).__name__} where a JSON object {{…}} was expected")
        yield f"{path} entry {number}", record
        at = blank.match(text, at).end()
        if text[at : at + 1] == "]" or number == limit:
            return
        if text[at : at + 1] != ",":
            raise UserError(f"{path} entry {number}: neither a comma nor the list's end behind it: damaged or cut off")
        at = blank.match(text, at + 1).end()
    raise UserError(f"{path}: an empty list: it needs at least one entry")


def get(record: dict, field: str, kind: type, where: str):
    """A field of the given type, or a UserError that says what stands there instead."""
    if field not in record:
        near = ", ".join(sorted(record)) or "none"
        raise UserError(f"{where}: the field {field!r} is missing (fields there: {near})")
    value = record[field]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "text", int: "a whole number", list: "a list"}
        raise UserError(f"{where}: the field {field!r} must be {names[kind]}, not {value!r:.60}")
    for text in value if kind is list else [value]:
        if isinstance(text, str) and not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise UserError(f"{where}: the field {field!r} holds half a surrogate pair (\\ud800…): no Unicode text")
    return value


def completion(text: str, field: str, where: str) -> str:
    if not text:
        raise UserError(f"{where}: {field!r} is empty: a completion needs at least one token")
    return text


def load(path: str, view: str, limit: int = 0) -> list[Example]:
    """Every line as the examples of a view; see `FIELDS`."""
    from data import alpaca, hellaswag, hh

    examples: list[Example] = []
    unlike = empty = 0
    for number, (where, record) in enumerate(read(path, limit)):
        if hellaswag.is_record(record):
            examples += view_problem(hellaswag.problem(record, where, plain=view == "loglik"), view, number, where)
            continue
        if alpaca.is_record(record):
            example = alpaca.example(record, view, where)
            empty += example is None
            examples += [example] if example else []
            continue
        if hh.is_record(record):
            example = hh.pair(record, where)
            if example is None:
                unlike += 1
                continue
            record = {"prompt": example.prompt, "chosen": example.completions[0], "rejected": example.completions[1]}
        prompt = get(record, "prompt", str, where)
        if view == "sft":
            field = "completion" if "completion" in record or "chosen" not in record else "chosen"
            completions = (completion(get(record, field, str, where), field, where),)
            examples.append(Example(prompt, completions, source=where))
        elif view == "preference":
            both = tuple(completion(get(record, f, str, where), f, where) for f in ("chosen", "rejected"))
            examples.append(Example(prompt, both, source=where))
        else:
            example = _options(record, prompt, where)
            examples.append(move_space(example) if view == "loglik" else example)
    if unlike:
        print(f"{path}: {unlike:,} lines left out: their dialogues differ before the last answer, or one answer is empty")
    if empty:
        print(f"{path}: {empty:,} entries left out: their output is empty")
    if not examples:
        raise UserError(f"{path}: no usable example: {view} needs {FIELDS[view]}")
    return examples


def _options(record: dict, prompt: str, where: str) -> Example:
    choices, label = get(record, "choices", list, where), get(record, "label", int, where)
    if len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise UserError(f"{where}: 'choices' must be a list of at least two texts")
    if not 0 <= label < len(choices):
        raise UserError(f"{where}: label {label} is out of range: there are {len(choices)} choices, numbered from 0")
    return Example(prompt, tuple(completion(c, "choices", where) for c in choices), label=label, source=where)
