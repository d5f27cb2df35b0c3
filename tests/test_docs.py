"""The pages' commands name scripts and keys that exist, and the pages' Python does what they say."""

import contextlib
import gzip
import importlib
import io
import re
import shlex
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

import pytest
import torch

import data
import dpo
import losses
from base.errors import UserError
from runtime import config
from tests import test_losses
from tests.data import test_recipes
from tests.size import is_core, sizes

ROOT = Path(__file__).parents[1]
READING = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/reference.md", "docs/lora.md", "docs/scaling.md")


def blocks(page: str, *kinds: str) -> list[str]:
    """The code blocks of a page that are marked as one of these languages."""
    found = re.findall(r"(?ms)^```(\w*)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"))
    return [code for kind, code in found if kind in kinds]


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_and_keys_that_exist(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # keys that name a file to write are checked
    for line in "\n".join(blocks(page, "", "sh")).replace("\\\n", " ").splitlines():
        found = re.match(r"(?:python|torchrun .*?) +(?:-m ([\w.]+)|(\w+)\.py) (.*)", line)
        if not found or "…" in line:  # not one of our scripts, or not the whole command
            continue
        name = found[1] or found[2]
        if find_spec(name).submodule_search_locations:
            name += ".__main__"
        words = [str(ROOT / word) if word.startswith("configs/") else word for word in shlex.split(found[3], comments=True)]
        if words[0].startswith("--"):  # report's scripts take paths first
            config.load(importlib.import_module(name).Config, words)


def test_the_walk_through_a_step_prints_what_the_page_says():
    number, names = r"-?\d+\.\d+", {}
    try:
        for code, says in re.findall(r"(?ms)^```python\n(.*?)^```\n\n```text\n(.*?)^```", READING):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, names)
            both = (printed.getvalue(), says)
            ours, theirs = ([float(n) for n in re.findall(number, text)] for text in both)
            assert ours == pytest.approx(theirs, abs=2e-4)
            ours, theirs = (re.sub(number, "#", text).split() for text in both)
            assert ours == theirs
    finally:
        torch.set_printoptions(profile="default")
    assert "pairs" in names, "the page's last piece was not run"


def test_the_reading_page_names_functions_that_exist():
    named = re.findall(r"`((?:\w+/)*\w+)\.py:([\w.]+)`", READING)
    for file, name in named:
        attrgetter(name)(importlib.import_module(file.replace("/", ".")))
    assert len(named) > 30


def test_the_reading_list_names_every_file_of_the_core():
    core = [f for f, lines in sizes().items() if lines and is_core(f) and not f.startswith("base/")]
    assert not [f for f in core if f"`{f}`" not in READING.partition("\n## The core")[2]]


def test_the_example_of_a_loss(monkeypatch):
    """Each piece where the page puts it: the function and the refusal in losses.py, the line in test_losses.py."""
    function, *_ = blocks("CONTRIBUTING.md", "python")
    exec(function, names := vars(losses).copy())
    monkeypatch.setitem(losses.LOSSES, "slic", names["slic"])
    monkeypatch.setattr(losses, "REFERENCE_FREE", {*losses.REFERENCE_FREE, "slic"})
    refusal, pair = (code for code in blocks("CONTRIBUTING.md", "") if "slic" in code)
    monkeypatch.setattr(dpo, "NEEDS", (*losses.NEEDS, *eval(f"[\n{refusal}]")))
    (case,) = eval(f"[\n{pair}]")
    test_losses.test_by_hand(*case)
    for test in (
        "halves_of_a_batch",
        "reference_free",
        "rounding_at_the_start_decides_nothing",
        "far_from_the_reference_stays_finite",
    ):
        getattr(test_losses, f"test_{test}")("slic")

    def check(loss, sft_weight):
        dpo.Config(init_from="a", data="b", out_dir="c", ref="d", loss=loss, sft_weight=sft_weight).check()

    check("slic", 0.5)
    check("sigmoid", 0.0)
    with pytest.raises(UserError, match=r"key sft_weight: 0\.0 must be above 0 for loss slic"):
        check("slic", 0.0)


def test_the_example_of_a_recipe(tmp_path, monkeypatch):
    """The page's recipe by the page's own test, run among those of tests/data/test_recipes.py."""
    _, shops, test, *_ = blocks("CONTRIBUTING.md", "python")
    exec(shops, recipe := {})
    monkeypatch.setitem(data.RECIPES, "shops", recipe["load"])
    exec(test, names := vars(test_recipes).copy())
    names["test_shops"](tmp_path)
    (tmp_path / "shops.csv").unlink()
    (tmp_path / "shops.csv.gz").write_bytes(gzip.compress(b"prompt,chosen,rejected\n" * 9)[:-9])
    with pytest.raises(UserError, match=r"shops\.csv\.gz: damaged"):
        data.load("shops", "train", "sft", data_dir=str(tmp_path))
