import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from base.errors import UserError
from runtime.config import REQUIRED, key, load, to_toml


@dataclass
class Common:
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
    lr: float = key(5e-4, "peak learning rate")

    def check(self):
        if self.lr < -100:
            raise UserError("lr is too low")


def toml(tmp_path, text, name="c.toml"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def refused(*argv, cls=Common):
    with pytest.raises(UserError) as error:
        load(cls, list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_and_inheritance():
    assert load(Common, []) == Common()
    config = load(Config, ["--ref", "r"])
    assert (config.ref, config.lr, config.batch_size, config.optimizer) == ("r", 5e-4, 8, "adamw")


def test_command_line_over_file_over_defaults(tmp_path):
    path = toml(tmp_path, 'lr = 1\nbatch_size = 1e3\nwandb = "file"\ncompile = true\n')
    config = load(Common, ["--wandb", "line", "--config", path])
    assert config == Common(lr=1.0, batch_size=1000, compile=True, wandb="line")
    assert type(config.lr) is float and type(config.batch_size) is int


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--lr", "1e-5"], "lr", 1e-5),
        (["--lr", "-1"], "lr", -1.0),
        (["--lr=-2e-3"], "lr", -2e-3),
        (["--batch_size=8"], "batch_size", 8),
        (["--batch_size", "1e3"], "batch_size", 1000),
        (["--batch_size", "123456789012345678901"], "batch_size", 123456789012345678901),
        (["--compile"], "compile", True),
        (["--compile", "--lr", "1"], "compile", True),
        (["--compile", "false"], "compile", False),
        (["--compile=True"], "compile", True),
        (["--wandb", "a b=c"], "wandb", "a b=c"),
        (["--wandb=--x=1"], "wandb", "--x=1"),
        (["--wandb="], "wandb", ""),
        (["--wandb", ""], "wandb", ""),
        (["--wandb", "12"], "wandb", "12"),
    ],
)
def test_values_on_the_command_line(argv, name, value):
    config = load(Common, argv)
    assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


@pytest.mark.parametrize(
    "pair",
    ["lr=fast", "lr=", f"lr=1{'0' * 400}", "batch_size=1.5", "batch_size=inf", "lr=inf", "lr=nan", "compile=yes", "compile=1"],
)
def test_wrong_type_on_the_command_line(pair):
    message, (name, value) = refused(f"--{pair}"), pair.split("=")
    kind = {"lr": "float", "batch_size": "int", "compile": "bool"}[name]
    assert "command line" in message and f"{name} = {value!r} is not a" in message and kind in message


@pytest.mark.parametrize(
    "line, kind",
    [
        ('lr = "1e-5"', "float"),
        ("lr = true", "float"),
        ("lr = 1979-05-27", "float"),
        (f"lr = 1{'0' * 400}", "float"),
        ("batch_size = 1.5", "int"),
        ("batch_size = true", "int"),
        ("compile = 1", "bool"),
        ('compile = "true"', "bool"),
        ("wandb = 3", "str"),
    ],
)
def test_wrong_type_in_the_file(tmp_path, line, kind):
    message = refused("--config", toml(tmp_path, "\n" + line), "--lr=1", "--batch_size=1", "--compile", "--wandb=x")
    assert f"c.toml:2: {line.split()[0]} = " in message and f" {kind}" in message.partition(" is not a")[2]


def test_undecodable_bytes_in_a_string_are_refused():
    assert "wandb = '\\udcff'" in refused("--wandb", os.fsdecode(b"\xff"))


def test_unknown_key_names_the_nearest(tmp_path):
    message = refused("--bacth_size", "8")
    assert "command line" in message and "'bacth_size'" in message and "'batch_size'" in message
    message = refused("--config", toml(tmp_path, "lr = 1\noptimiser = 'sgd'\n"))
    assert "c.toml:2" in message and "'optimiser'" in message and "'optimizer'" in message
    assert "'config'" in refused("--confg=x")
    assert "nearest known key" in refused("--zzzzzzzzz")  # however far


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--lr", "1", "--lr=2"], "--lr is given twice"),
        (["--config", "a", "--config", "b"], "--config is given twice"),
        (["run"], "stray argument 'run'"),
        (["--lr", "1", "2"], "stray argument '2'"),
        (["-lr", "1"], "stray argument '-lr'"),
        (["--lr"], "--lr has no value"),
        (["--lr", "--compile"], "--lr has no value"),
        (["--"], "unknown key ''"),
        (["--optimizer", "adam"], "optimizer = 'adam' is not one of adamw, sgd"),
    ],
)
def test_mistakes_on_the_command_line(argv, words):
    assert words in refused(*argv)


@pytest.mark.parametrize(
    "text, words",
    [
        ("lr = 1\n[train]\nlr = 1\n", "c.toml:2: 'train' is a table"),
        ("lr.x = 1\n", "c.toml:1: 'lr' is a table"),
        ("[[a]]\n", "c.toml:1: 'a' is a list"),
        ("\nlr = [1, 2]\n", "c.toml:2: 'lr' is a list"),
        ("lr = 1\nlr 2\n", "c.toml:2: not valid TOML"),
        ("lr = 1\nlr = 2\n", "c.toml:2: not valid TOML"),
        ('wandb = "', "c.toml: not valid TOML"),
        (b'wandb = "\xff"', "c.toml: not UTF-8"),
        ("\n\noptimizer = 'adam'", "c.toml:3: optimizer = 'adam' is not one of adamw, sgd"),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, words):
    assert words in refused("--config", toml(tmp_path, text))


def test_file_that_is_not_there(tmp_path):
    assert "none.toml: No such file" in refused("--config", str(tmp_path / "none.toml"))
    assert "Is a directory" in refused("--config", str(tmp_path))


def test_byte_order_mark_and_crlf(tmp_path):
    path = toml(tmp_path, b"\xef\xbb\xbflr = 1\r\nbatch_size = 2\r\n")
    assert load(Common, ["--config", path]) == Common(lr=1.0, batch_size=2)


def test_missing_required_key(tmp_path):
    path = toml(tmp_path, "lr = 1")
    assert "missing key ref (the reference file)" in refused(cls=Config)
    assert "c.toml" in refused("--config", path, cls=Config)
    assert load(Config, ["--config", toml(tmp_path, "ref = 'r'")]).ref == "r"


def test_check_runs_last():
    assert refused("--ref=r", "--lr=-101", cls=Config) == "lr is too low"


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as leave:
        load(Config, ["--lr", "fast", "--help"], prog="train.py")
    assert leave.value.code == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("usage: python train.py") and lines[2] == "Train something." and "second" not in out
    rows = {line.split()[0]: line for line in lines if line.startswith("--")}
    assert list(rows) == ["--config", "--lr", "--batch_size", "--compile", "--optimizer", "--wandb", "--ref"]
    assert rows["--lr"].split(maxsplit=3)[1:] == ["float", "0.0005", "peak learning rate"]
    assert rows["--ref"].split(maxsplit=3)[1:] == ["str", "required", "the reference file"]
    assert rows["--optimizer"].endswith("which optimizer [adamw | sgd]")
    assert rows["--lr"].index("peak") == rows["--ref"].index("the ref") == rows["--compile"].index("torch")


def test_help_without_a_docstring(capsys):
    with pytest.raises(SystemExit):
        load(Common, ["-h"])
    assert "Common(" not in capsys.readouterr().out


STRINGS = [
    "", 'a "b" \\ c', "two\nlines\tand \r\n", "\x00\x1f\x7f\x85\u2028", "\\u00e9", "naïve 日本 🙂", "'''\"\"\"", "# no",
]  # fmt: skip


@pytest.mark.parametrize("text", STRINGS)
def test_strings_round_trip(tmp_path, text):
    config = Common(wandb=text)
    assert load(Common, ["--config", toml(tmp_path, to_toml(config))]) == config


@pytest.mark.parametrize(
    "number", [0.1 + 0.2, 1e-5, 5e-324, 1.7976931348623157e308, 1e16, 1e22, -0.0, 3, math.inf, -math.inf, math.nan]
)
def test_floats_round_trip(tmp_path, number):
    config = Common(lr=number, batch_size=-(10**20), compile=True)
    back = load(Common, ["--config", toml(tmp_path, to_toml(config))])
    assert repr(back.lr) == repr(float(number)) and (back.batch_size, back.compile) == (-(10**20), True)


def test_to_toml_writes_all_keys_flat_and_only_what_toml_has():
    assert to_toml(Config(ref="r")).splitlines() == [
        "lr = 0.0005", "batch_size = 8", "compile = false", 'optimizer = "adamw"', 'wandb = ""', 'ref = "r"',
    ]  # fmt: skip
    with pytest.raises(TypeError):
        to_toml(Common(lr=None))


def test_as_a_script_one_line_and_status_2(tmp_path):
    (tmp_path / "s.py").write_text(
        "from dataclasses import dataclass\nfrom runtime.config import key, load\nfrom runtime.errors import run\n"
        "@dataclass\nclass C:\n    lr: float = key(1.0, 'rate')\n\nrun(lambda: print(load(C).lr))\n"
    )

    def script(*argv):
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.run([sys.executable, tmp_path / "s.py", *argv], capture_output=True, text=True, env=env)

    assert script("--lr", "-3").stdout == "-3.0\n"
    bad = script("--lr", "x")
    assert (bad.returncode, bad.stdout) == (2, "") and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
    assert "usage: python s.py" in script("--help").stdout
