"""Settings: where they come from, what is refused, what `--help` and the stored config.toml say."""

import os
import sys
from dataclasses import dataclass, fields

import pytest

from base.errors import UserError, run
from runtime.config import REQUIRED, key, load, rules, to_toml


@dataclass
class Common:
    """What both share"""

    lr: float = key(1e-5, "peak learning rate")
    batch_size: int = key(8, "examples per optimizer step")
    compile: bool = key(False, "torch.compile the model")
    optimizer: str = key("adamw", "which optimizer", choices=("adamw", "sgd"))
    wandb: str = key("", "wandb project")


@dataclass
class Config(Common):
    """Train something.

    A second paragraph.
    """

    ref: str = key(REQUIRED, "the reference file")
    lr: float = key(5e-4, "peak learning rate, 100% of it")

    def check(self):
        if self.lr < -100:
            raise UserError("lr is too low")


@dataclass
class Bounded:
    least: int = key(3, "from 3", least=3)
    most: int = key(3, "up to 5", most=5)
    above: float = key(0.5, "above 0", above=0)
    below: float = key(0.5, "below 1", below=1)
    out: str = key("", "a file to write", writes=".json", free=True)
    any_out: str = key("", "a file of any ending", writes="")


def toml(tmp_path, text, name="c.toml"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def refused(*argv, cls=Common):
    with pytest.raises(UserError) as error:
        load(cls, list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_command_line_over_file_over_defaults(tmp_path):
    path = toml(tmp_path, 'lr = 1\nbatch_size = 1e3\nwandb = "file"\ncompile = true\n')
    config = load(Common, ["--wandb", "line", "--config", path])
    assert config == Common(lr=1.0, batch_size=1000, compile=True, wandb="line")
    assert type(config.lr) is float and type(config.batch_size) is int
    assert load(Config, ["--ref=r"]) == Config(ref="r", lr=5e-4, batch_size=8)


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--lr", "1e-5"], "lr", 1e-5),
        (["--lr", "-1"], "lr", -1.0),
        (["--lr", "1", "--lr=2"], "lr", 2.0),
        (["--lr=-2e-3"], "lr", -2e-3),
        (["--batch_size", "1e3"], "batch_size", 1000),
        (["--batch_size", "123456789012345678901"], "batch_size", 123456789012345678901),
        (["--compile", "--lr", "1"], "compile", True),
        (["--compile", "false"], "compile", False),
        (["--compile=True"], "compile", True),
        (["--wandb", "a b=c"], "wandb", "a b=c"),
        (["--wandb=--x=1"], "wandb", "--x=1"),
        (["--wandb", ""], "wandb", ""),
    ],
)
def test_values_on_the_command_line(argv, name, value):
    config = load(Common, argv)
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lr=fast"], "command line: lr = 'fast' is not a float"),
        (["--lr="], "lr = '' is not a float"),
        ([f"--lr=1{'0' * 400}"], "0' is not a float"),
        (["--batch_size=1.5"], "batch_size = '1.5' is not an int"),
        (["--batch_size=inf"], "batch_size = 'inf' is not an int"),
        (["--compile=1"], "compile = '1' is not a bool (true or false)"),
        (["run"], "stray argument 'run'"),
        (["-lr", "1"], "stray argument '-lr'"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--optimizer", "adam"], "optimizer = 'adam' is not one of adamw, sgd"),
        (["--bacth_size", "8"], "unknown key 'bacth_size': the nearest known key is 'batch_size'"),
        (["--batch", "8"], "unknown key 'batch'"),
        (["--zzzzzzzzz"], "unknown key 'zzzzzzzzz': --help lists all"),
        (["--wandb", os.fsdecode(b"\xff")], "wandb = '\\udcff'"),
        (["--lr=inf"], "key lr: inf is not a usable value: give a finite number"),
        (["--lr", "nan"], "key lr: nan is not a usable value: give a finite number"),
    ],
)
def test_mistakes_on_the_command_line(argv, words):
    assert words in refused(*argv)


@pytest.mark.parametrize(
    "text, words",
    [
        ('\nlr = "1e-5"', "c.toml:2: lr = '1e-5' is not a float"),
        ("lr = true", "lr = True is not a float"),
        ("lr = 1979-05-27", "is not a float"),
        ("batch_size = 1.5", "batch_size = 1.5 is not an int"),
        ("batch_size = true", "batch_size = True is not an int"),
        ("compile = 1", "compile = 1 is not a bool"),
        ("wandb = 3", "wandb = 3 is not a str (in a file: in quotes)"),
        ("lr = 1\n[train]\nlr = 1\n", "c.toml:2: unknown key 'train'"),
        ("lr.x = 1\n", "c.toml:1: lr = {'x': 1} is not a float"),
        ("lr = 1\nlr 2\n", "c.toml: Expected '=' after a key in a key/value pair (at line 2"),
        ("lr = 1\nlr = 2\n", "c.toml: Cannot overwrite a value (at line 2"),
        ('wandb = "', "c.toml: Unterminated string (at end of document"),
        (b'wandb = "\xff"', "c.toml: 'utf-8' codec can't decode byte 0xff"),
        ("lr = 1\noptimiser = 'sgd'\n", "c.toml:2: unknown key 'optimiser': the nearest known key is 'optimizer'"),
        ("\n\noptimizer = 'adam'", "c.toml:3: optimizer = 'adam' is not one of adamw, sgd"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, words):
    """They count also where the command line gives the key anew."""
    assert words in refused("--config", toml(tmp_path, text), "--lr=1", "--batch_size=1", "--compile", "--wandb=x")


def test_file_that_is_not_there_or_of_another_system(tmp_path):
    assert "none.toml: No such file" in refused("--config", str(tmp_path / "none.toml"))
    assert "is no file" in refused("--config", str(tmp_path))
    path = toml(tmp_path, b"\xef\xbb\xbflr = 1\r\nbatch_size = 2\r\n")
    assert load(Common, ["--config", path]) == Common(lr=1.0, batch_size=2)


def test_missing_required_key(tmp_path):
    path = toml(tmp_path, "lr = 1")
    assert "missing key ref (the reference file)" in refused(cls=Config)
    assert "c.toml" in refused("--config", path, cls=Config)
    assert "key ref: empty: give the reference file" in refused("--ref=", cls=Config)
    assert load(Config, ["--config", toml(tmp_path, "ref = 'r'")]).ref == "r"
    assert refused("--ref=", "--lr=-101", cls=Config).startswith("key ref: empty"), "each key alone comes first"
    assert refused("--ref=r", "--lr=-101", cls=Config) == "lr is too low"


# --- the rules that stand with a key -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair, words",
    [
        ("least=2", "2 is too small, the least is 3"),
        ("most=6", "6 is too large, the most is 5"),
        ("above=0", "0.0 must be above 0"),
        ("below=1", "1.0 must be below 1"),
        ("out=x.txt", "x.txt must end in .json"),
        ("out=HERE/folder.json", "folder.json is a folder: name a file in it"),
        ("any_out=HERE/file/x", "file/x cannot be written"),
    ],
)
def test_bounds_and_files_to_write(pair, words, tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    message = refused(f"--{pair.replace('HERE', str(tmp_path))}", cls=Bounded)
    assert message.startswith(f"key {pair.split('=')[0]}: ") and words in message


def test_what_lies_within_the_rules_passes(tmp_path):
    keys = {"least": 3, "most": 5, "above": 1e-9, "below": -7.0, "out": str(tmp_path / "new/x.json"), "any_out": "x"}
    assert load(Bounded, [f"--{name}={value}" for name, value in keys.items()]) == Bounded(**keys)
    assert not (tmp_path / "new").exists(), "looking is not writing"
    assert [f.name for f in fields(Bounded) if rules(f).free] == ["out"]


# --- what is printed and stored ----------------------------------------------------------------------------------------


def test_help_lists_every_key_under_the_heading_of_its_class(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as leave:
        load(Config, ["--lr", "fast", "--help"], prog="train.py")
    assert leave.value.code == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].startswith("usage: python train.py") and lines[2] == "Train something." and "second" not in printed
    heading, found = "", {}
    for line in lines[3:]:
        heading = line if line and not line.startswith(" ") else heading
        if line.startswith("  --"):
            name, kind, meaning = line.split(maxsplit=2)
            found[name] = (heading, kind, meaning)
    shared = "What both share:"
    assert found == {
        "--config": ("options:", "FILE", "a flat TOML file of the keys below"),
        "--ref": ("Most used:", "str", "the reference file (required)"),
        "--lr": ("Most used:", "float", "peak learning rate, 100% of it (default 0.0005)"),
        "--batch_size": (shared, "int", "examples per optimizer step (default 8)"),
        "--compile": (shared, "[bool]", "torch.compile the model (default false)"),
        "--optimizer": (shared, "str", 'which optimizer [adamw | sgd] (default "adamw")'),
        "--wandb": (shared, "str", 'wandb project (default "")'),
    }


STRINGS = [
    "", 'a "b" \\ c', "two\nlines\tand \r\n", "\x00\x1f\x7f\x85\u2028", "\\u00e9", "naïve 日本 🙂", "'''\"\"\"", "# no",
]  # fmt: skip


def test_every_value_round_trips(tmp_path):
    numbers = [0.1 + 0.2, 1e-5, 5e-324, 1.7976931348623157e308, 1e16, 1e22, -0.0, 3]
    for text, number in zip(STRINGS, numbers, strict=True):
        config = Common(wandb=text, lr=number, batch_size=-(10**20), compile=True)
        back = load(Common, ["--config", toml(tmp_path, to_toml(config))])
        assert back == config and repr(back.lr) == repr(float(number))


def test_to_toml_writes_all_keys_flat_and_only_what_toml_has():
    assert to_toml(Config(ref="r")).splitlines() == [
        "lr = 0.0005", "batch_size = 8", "compile = false", 'optimizer = "adamw"', 'wandb = ""', 'ref = "r"',
    ]  # fmt: skip
    with pytest.raises(TypeError):
        to_toml(Common(lr=None))


def test_a_script_reads_its_own_command_line(monkeypatch, capsys):
    for argv, status, out, err in ((["--lr", "-3"], 0, "-3.0\n", ""), (["--lr", "x"], 2, "", "error: command line: lr = 'x'")):
        monkeypatch.setattr(sys, "argv", ["s.py", *argv])
        with pytest.raises(SystemExit) as leave:
            run(lambda: print(load(Common).lr))
        said = capsys.readouterr()
        assert leave.value.code == status and said.out == out
        assert said.err.startswith(err) and said.err.count("\n") == (status > 0)
