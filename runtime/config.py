"""Settings: a flat TOML file and the command line -> a dataclass instance. Nothing in a config is ever executed.

@dataclass
class Config:
    "What the script does, in one line."
    lr: float = key(1e-5, "peak learning rate", least=0)
    ref: str = key(REQUIRED, "reference log-probabilities, a .safetensors file")

config = load(Config)   # python script.py --config FILE.toml --lr 2e-5 --ref=ref.safetensors
"""

import argparse
import difflib
import glob
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from base.errors import UserError, note
from base.files import check_file, lies_in, parse_toml, read_json, read_plain
from runtime import checkpoint
from weights import TOKENIZER_FILES

T = TypeVar("T")
REQUIRED: Any = MISSING  # as a key's default: the user must give it
COMMAND_LINE = "command line"
NAMES = Path(__file__).with_name("names.txt")
# in a folder of a model, of an adapter, or of a recipe
READ = re.compile(
    rf"(adapter_)?model[\w.-]*|\w*config\.json|{'|'.join(map(re.escape, TOKENIZER_FILES))}"
    r"|rank_\d+\.safetensors|alpaca_data\.json|\w+/o\w+line_\w+\.json"
    r"|(h\w+-[\w-]+/|hellaswag_|gsm8k_|math_)?(train|val|test)\.jsonl|(train|test)/\w+/\d+\.json"
)
EXPECTED = {int: "an int", float: "a float", bool: "a bool (true or false)", str: "a str (in a file: in quotes)"}


@dataclass(frozen=True)
class Rules:
    """What a key's value must keep to, and what the key is for. See `key`."""

    help: str
    choices: tuple = ()
    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    writes: str | None = None
    replaces: tuple[str, ...] = ()
    reads: Callable[[str], Any] | None = None
    free: bool = False
    model: bool = False

    def check(self, name: str, value: Any, required: bool) -> None:
        """Raise UserError, naming the key, for a value outside the bounds or a path that cannot become a file."""
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"key {name}: {value} is not a usable value: give a finite number")
        if required and value == "":
            raise UserError(f"key {name}: empty: give {self.help}")
        if self.least is not None and value < self.least:
            raise UserError(f"key {name}: {value} is too small, the least is {self.least}")
        if self.most is not None and value > self.most:
            raise UserError(f"key {name}: {value} is too large, the most is {self.most}")
        if self.above is not None and value <= self.above:
            raise UserError(f"key {name}: {value} must be above {self.above}")
        if self.below is not None and value >= self.below:
            raise UserError(f"key {name}: {value} must be below {self.below}")
        if self.writes is not None and value:
            if not value.endswith(tuple(self.writes.split()) or ""):
                raise UserError(f"key {name}: {value} must end in {' or '.join(self.writes.split())}")
            check_file(name, value)


def key(default: Any, help: str, choices: Iterable = (), **rules: Any) -> Any:
    """A dataclass field for one int, float, bool or str setting; keyword-only, so a subclass may add REQUIRED ones.

    help: a line for `--help`. choices: the values allowed, all where empty. least, most, above, below: bounds of a number;
    floats are always finite, and a REQUIRED text is never empty. writes: the key names a file that the script will write,
    with one of these endings (".png .pdf"; "" = any); a place that cannot be written is refused before the work begins.
    replaces: the key names a folder in which the script replaces or deletes what has these names ("" = the folder itself). No
    other text of the settings may name what is written, see `keep_apart`. reads: raises UserError where what the key names is
    not there; a script asks it before anything else. free: a resumed run may change it. model: the key names a model; of a
    run's folder it becomes that of the weights, see `checkpoint.weights_of`.
    """
    return field(default=default, kw_only=True, metadata={"rules": Rules(help, tuple(choices), **rules)})


def rules(f: Field) -> Rules:
    return f.metadata["rules"]


def load(cls: type[T], argv: list[str] | None = None, prog: str | None = None, paths: list[str] | None = None) -> T:
    """The settings `cls`: command line over `--config` file over defaults. Each key's own rules are checked, then the
    method `check` of `cls`, if there is one: it is for what two keys say together; then `keep_apart`.

    argv: by default sys.argv[1:]; holds `--key value`, `--key=value`, or for a bool that is to be true a bare `--key`; of a key
    that is given twice the last counts.
    prog: the script's name in `--help`, which prints every key and exits 0. paths: takes the words that belong to no key, where
    the script reads the files or folders that they name; elsewhere such a word is a mistake.
    Raises UserError for anything the user wrote that does not fit.
    """
    keys = {f.name: f for f in fields(cls)}
    texts, words = _read_argv(cls, prog, sys.argv[1:] if argv is None else list(argv), keys)
    if words and paths is None:
        raise UserError(f"{COMMAND_LINE}: stray argument {words[0]!r}: write --key value or --key=value")
    if words:
        paths += words
    path = texts.pop("config", None)
    values = {} if path is None else _read_file(path, keys)
    values |= {name: _checked(keys[name], text, COMMAND_LINE) for name, text in texts.items()}
    for name, f in keys.items():
        if f.default is REQUIRED and name not in values:
            place = path or "the --config file"
            raise UserError(f"missing key {name} ({rules(f).help}): give --{name} or `{name} = …` in {place}")
    config = cls(**values)
    for name, f in keys.items():
        rules(f).check(name, value := getattr(config, name), f.default is REQUIRED)
        if rules(f).model and (found := checkpoint.weights_of(name, value)) != value:
            note(f"key {name}: of {value} the weights in {found}")
            setattr(config, name, found)
    if hasattr(config, "check"):
        config.check()
    keep_apart(config, [path, *words] if path else words)
    if argv is None and os.environ.get("GROUP_RANK", "0") == "0":  # other machines than rank 0's need not see its files
        for name, f in keys.items():
            if rules(f).reads and getattr(config, name):
                try:
                    rules(f).reads(getattr(config, name))
                except UserError as error:
                    raise UserError(f"key {name}: {str(error).removeprefix(f'key {name}: ')}") from None
    return config


def keep_apart(config: Any, paths: Iterable[str] = ()) -> None:
    """Raise UserError where the script would write over what it reads, or write two files to one place.

    Any text of the settings is taken for a path that is read (where files are read, for several, or a pattern), and so are
    `paths` and the base of an adapter. In a folder that is read the names in `READ` are.
    """
    read, written = [(f"PATH {n}", path) for n, path in enumerate(paths, 1)], {}
    for f in fields(config):
        value, rule = getattr(config, f.name), rules(f)
        if value and (rule.writes is not None or rule.replaces):
            written[f.name] = [Path(value, name) for name in rule.replaces or [""]]
        elif f.type is str and not rule.choices and "\0" not in value:
            several = [path for part in value.split(",") for path in glob.glob(part)] if rule.reads else []
            code = value.rpartition(":")[0]  # of FILE.py:NAME
            several += [code] if code.endswith(".py") else []
            read += [(f.name, os.path.expanduser(path)) for path in (value, *several) if path]
    configs = [(name, read_json(Path(path, "adapter_config.json"))) for name, path in read if os.path.isdir(path)]
    bases = [(f"{name} (its base)", str(found.get("base_model_name_or_path", ""))) for name, found in configs]
    read += [(name, base) for name, base in bases if base]
    for name, places in written.items():
        for place, (other, path) in itertools.product(places, read):
            inside = place.is_file() and lies_in(place, path) and READ.fullmatch(os.path.relpath(place, path))
            if inside or lies_in(path, place):
                raise UserError(f"key {name}: the run would write over {path}, which key {other} names: name another {name}")
        read.append((name, str(places[0])))


def to_toml(config: Any) -> str:
    """All fields of a config as flat TOML that `load` reads back equal. Raises TypeError for a value TOML lacks."""
    return "".join(f"{f.name} = {_toml(getattr(config, f.name))}\n" for f in fields(config))


# --- a run folder's config.toml ----------------------------------------------------------------------------------------


def written(config: Any, names: Iterable[str] = ()) -> dict[str, Any]:
    """The settings that an earlier run wrote into out_dir/config.toml; {} where there are none.

    UserError where that file, or one of `names` beside it, is there and no run wrote it. A run writes every key (some may be
    younger than it), a user only a few.
    """
    folder = Path(config.out_dir)
    path, known = folder / "config.toml", {f.name for f in fields(config)}
    there = [name for name in ("config.toml", *names) if os.path.lexists(folder / name)]
    away = f"move it away{' (--overwrite does not delete it)' if 'overwrite' in known else ''}, or name another out_dir"
    try:
        table = parse_toml(read_plain(path).decode() if path.exists() else "")
    except ValueError:
        raise UserError(f"{path}: not valid TOML, so no run wrote it: {away}") from None
    if there and len(known & table.keys()) <= len(known) / 2:
        raise UserError(f"{folder / there[0]} is there, and no run wrote it: {away}")
    return table


def check_same(config: Any, before: dict[str, Any], what: str, but: Iterable[str] = ()) -> None:
    """UserError where the settings `before` of the run in out_dir are not those of now. `free` keys and `but` may differ."""
    for f in fields(config):
        now = getattr(config, f.name)
        was = before.get(f.name, now if f.default is REQUIRED else f.default)  # a key may be younger than the run
        if not rules(f).free and f.name not in but and was != now:
            raise UserError(
                f"out_dir {config.out_dir} holds {what} with {f.name} = {was!r}, not {now!r}: go on with the same settings, "
                f"name another out_dir{', or start anew with --overwrite' if hasattr(config, 'overwrite') else ''}"
            )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{COMMAND_LINE}: {message}: write --key value or --key=value")


def _read_argv(cls: type, prog: str | None, argv: list[str], keys: dict[str, Field]) -> tuple[dict[str, str], list[str]]:
    """`--key value …` -> ({key: text}, words that belong to no key). `--help` lists the keys in groups, one for each class that
    declares some."""
    usage = f"python {prog or Path(sys.argv[0]).name} [--config FILE.toml] [--key value …]"
    width = partial(argparse.HelpFormatter, width=100, max_help_position=30)
    parser = _Parser(usage=usage, description=cls.__doc__.partition("\n")[0], allow_abbrev=False, formatter_class=width)
    parser.add_argument("--config", metavar="FILE", help="a flat TOML file of the keys below")
    left = dict(keys)
    for owner in cls.__mro__:
        group = parser.add_argument_group("Most used" if owner is cls else owner.__doc__.partition("\n")[0])
        for f in [left.pop(name) for name in vars(owner).get("__annotations__", {}) if name in left]:
            default = "required" if f.default is REQUIRED else f"default {_toml(f.default)}"
            choices = f" [{' | '.join(map(str, rules(f).choices))}]" if rules(f).choices else ""
            meaning = f"{rules(f).help}{choices} ({default})".replace("%", "%%")
            bare = {"nargs": "?", "const": "true"} if f.type is bool or "true" in rules(f).choices else {}
            group.add_argument(f"--{f.name}", metavar=f.type.__name__, help=meaning, **bare)
    found, strays = parser.parse_known_args(argv)
    if unknown := [word for word in strays if word.startswith("--")]:
        raise _unknown(unknown[0][2:].partition("=")[0], COMMAND_LINE, keys)
    return {name: text for name, text in vars(found).items() if text is not None}, strays


def _read_file(path: str, keys: dict[str, Field]) -> dict[str, Any]:
    """A flat TOML file -> {key: checked value}."""
    try:
        source = read_plain(Path(path)).decode("utf-8-sig")  # some editors put a byte-order mark first
        table = parse_toml(source)
    except (OSError, ValueError) as error:  # tomllib's message ends in the line
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"config file {path}: {why}: correct it, or name another --config") from None
    values = {}
    for name, value in table.items():
        found = re.search(rf"""(?m)^[ \t]*\[*[ \t]*["']?{re.escape(name)}["']?[ \t]*[].=]""", source)
        where = f"{path}:{source[: found.end()].count(chr(10)) + 1}" if found else path
        if name not in keys:
            raise _unknown(name, where, keys)
        values[name] = _checked(keys[name], value, where)
    return values


def _unknown(name: str, where: str, keys: dict[str, Field]) -> UserError:
    """Names the key that another trainer's name stands for (names.txt), or one that is spelled almost so."""
    pairs = [line.split(":") for line in NAMES.read_text().splitlines() if line[0] != "#"]
    ours = {other: mine.split() for mine, others in pairs for other in others.split()}
    theirs = difflib.get_close_matches(name.replace("-", "_"), ours, n=1, cutoff=0.9)
    meant = [key for near in theirs for key in ours[near] if key in keys]
    about = f" ({rules(keys[meant[0]]).help})" if meant else ""
    meant = meant or difflib.get_close_matches(name.replace("-", "_"), [*keys, "config"], n=1, cutoff=0.7)
    hint = f"the nearest known key is {meant[0]!r}{about}, " if meant else ""
    return UserError(f"{where}: unknown key {name!r}: {hint}--help lists all")


def _checked(f: Field, given: Any, where: str) -> Any:
    """`given` as the type of key `f`. A whole number may stand for a float and a whole float (1e3) for an int; true and
    false for their words, where these are choices of a text."""
    kind, value, choices = f.type, given, rules(f).choices
    try:
        if where == COMMAND_LINE and kind is bool:
            value = {"true": True, "false": False}[given.lower()]
        elif where == COMMAND_LINE and kind is not str:
            value = int(given) if re.fullmatch(r"\s*[+-]?[\d_]+\s*", given) else float(given)
        if kind is float and type(value) is int:
            value = float(value)  # OverflowError beyond 1e308
        if kind is int and type(value) is float and value.is_integer():
            value = int(value)
        if kind is str and "true" in choices:
            value = str(value).lower()
        if type(value) is not kind:
            raise TypeError
        if kind is str:
            value.encode()  # UnicodeError: bytes of the shell that are no UTF-8, which no TOML file could hold
    except (TypeError, ValueError, KeyError, OverflowError):
        raise UserError(f"{where}: {f.name} = {given!r} is not {EXPECTED[kind]}") from None
    if choices and value not in choices:
        raise UserError(f"{where}: {f.name} = {given!r} is not one of {', '.join(map(str, choices))}")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, str):  # a JSON string is a TOML one, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value).lower()
    raise TypeError(f"{value!r} is not an int, float, bool or str")
