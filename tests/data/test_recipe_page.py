"""docs/recipes.md and configs/: every TOML file loads, every command of the page runs, from the first to the last picture.

The runs are small: a few steps of tiny random weights, served under GPT-2's names, on small files in the published formats.
"""

import contextlib
import glob
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import sft
import weights
from data import alpaca, hellaswag, hh
from data.tokenizer import get
from llama import LlamaConfig
from runtime import config
from tests.conftest import flags, script
from tests.data.published import alpaca_folder, hellaswag_folder, hh_folder, labels_folder
from tests.hub import answering, serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))

SMALL = {"limit": 12, "val_limit": 4, "device": "cpu"}
FEW = {**SMALL, "max_steps": 2, "batch_size": 4, "samples": 0, "eval_every": 1, "save_every": 0}
INSTEAD = {  # module -> keys that replace those of the page, so that a command does little
    "sft": FEW,
    "dpo": FEW,
    "precompute_ref": SMALL,
    "sample": {"limit": 3, "max_new_tokens": 3},
    "eval_mcq": {"limit": 8},
    "eval_reward": {"limit": 3},
}


def command(line: str) -> tuple[str, list[str]]:
    """(module, arguments) of `python X.py …`, `python -m a.b …` or `torchrun … X.py …`."""
    words = shlex.split(line)
    at = words.index("-m") + 1 if "-m" in words else next(i for i, word in enumerate(words) if word.endswith(".py"))
    name = words[at].removesuffix(".py")
    folder = ROOT / name.replace(".", "/")
    return (f"{name}.__main__" if (folder / "__main__.py").exists() else name), words[at + 1 :]


def commands(section: str) -> list[tuple[str, list[str]]]:
    """The commands in the code blocks of a section of the page, in order, with the value of `S=…` in place of $S."""
    part = re.search(rf"(?ms)^## {section}\. .*?(?=^## |\Z)", PAGE)[0]
    lines = "".join(re.findall(r"(?ms)^```\n(.*?)^```", part)).replace("\\\n", " ").splitlines()
    size = next((line[2:] for line in lines if line.startswith("S=")), "")
    return [command(line.replace("${S}", size).replace("$S", size)) for line in lines if not line.startswith("S=")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_one_that_its_script_takes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some outputs are checked to be writable
    module, words = command(re.findall(rf"(?:python|torchrun) [^&\n]*--config configs/{path.name}.*", path.read_text())[-1])
    assert words[:2] == ["--config", f"configs/{path.name}"]
    config.load(importlib.import_module(module).Config, ["--config", str(path)])
    assert f"configs/{path.name}" in PAGE or re.match("reviews|toy|math", path.stem), "no recipe tells of it"


def test_the_flags_of_every_run_of_recipe_e():
    rows = re.findall(r"(?m)^\| (\d+) \| (`.*`)? ?\|", PAGE)
    assert [int(number) for number, _ in rows] == [*range(1, 7), *range(10, 20)]
    for number, row in rows:
        given = ["--config", str(ROOT / "configs" / "alpaca_sft.toml"), "--out_dir", f"e{number}", *row.strip("`").split()]
        assert config.load(sft.Config, given).data == "alpaca"


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Path:
    """What the servers hand out: a tiny GPT-2 and a tiny Llama of random weights, and the data."""
    folder = tmp_path_factory.mktemp("served")
    hellaswag_folder(folder / "hellaswag"), hh_folder(folder / "hh"), labels_folder(folder / "labels")
    alpaca_folder(folder / "alpaca")
    tiny = {"init_from": "scratch", "tokenizer": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 1024}
    keys = {**FEW, **tiny, "max_steps": 1, "lr": 0, "eval_every": 0}
    data = {"data": "alpaca", "data_dir": folder / "alpaca", "out_dir": folder / "gpt2"}
    with contextlib.redirect_stdout(None):
        assert script("sft", *flags(**keys, **data)) == 0
    tokenizer, sizes = get("gpt2"), {"n_layer": 1, "n_head": 2, "n_kv_head": 1, "head_dim": 8, "n_embd": 16, "n_inner": 24}
    llama = LlamaConfig(**sizes, block_size=1024, vocab_size=tokenizer.size)
    drawn = ((name, torch.randn(p.shape) / 10) for name, p in weights.empty(llama).named_parameters())
    weights.save_tensors(llama, drawn, tokenizer, folder / "llama")
    return folder


@pytest.fixture
def server(served, monkeypatch, tmp_path):
    """The hub and the hosts of the data sets, in one local server; the working folder, for runs/, is an empty one."""
    models = dict.fromkeys(("gpt2", "gpt2-medium", "gpt2-large"), served / "gpt2" / "model")
    models["HuggingFaceTB/SmolLM2-135M"] = served / "llama"
    labels = {"lm-human-preferences/labels": served / "labels"}
    files = {hh.REPO: served / "hh", "alpaca": served / "alpaca", "hellaswag": served / "hellaswag"}
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with serving({**models, **labels, **files}, monkeypatch) as hub:
        monkeypatch.setenv("OPENAIPUBLIC_ENDPOINT", hub.url + "/files")
        monkeypatch.setattr(alpaca, "URL", hub.url + "/files/alpaca/")
        monkeypatch.setattr(hellaswag, "URL", hub.url + "/files/hellaswag/")
        monkeypatch.setattr(hellaswag, "FILES", {split: (name, 24) for split, (name, _) in hellaswag.FILES.items()})
        yield hub


@pytest.fixture
def judge(monkeypatch):
    """The address of a judge that always prefers side A, and scores everything 40."""
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    def reply(asked: dict) -> dict:
        said = "Score: 40" if "<reference-" in str(asked) else "One is as good as the other.\nVerdict: A"
        return {"choices": [{"message": {"role": "assistant", "content": said}}], "usage": {}}

    with answering(reply) as url:
        yield f"{url}/v1"


def shrunk(module: str, words: list[str], judge: str) -> list[str]:
    """The arguments of a command that does little, with full paths of the TOML files."""
    asks = module == "eval_winrate" and "reward" not in words
    instead = (
        {"judge": judge, "judge_model": "wise"} if asks else INSTEAD.get("eval_reward" if "reward" in words else module, {})
    )
    for name in instead:
        if f"--{name}" in words:
            at = words.index(f"--{name}")
            words = words[:at] + words[at + 2 :]
    words = [w for word in words for w in (sorted(glob.glob(word)) if "*" in word else [word])]
    return [str(ROOT / w) if w.startswith("configs/") else w for w in words] + flags(**instead)


@pytest.mark.parametrize("section", "ABDE")
def test_every_command_of_the_page_runs(server, judge, call, section):
    pytest.importorskip("matplotlib")
    pictures, said = [], {}
    for module, words in commands(section):
        words = shrunk(module, words, judge)
        status, out, err = call(module, *words)
        assert status == 0, (module, words, err)
        said[" ".join(words)] = out
        made = [words[words.index(f"--{name}") + 1] for name in ("out", "png") if f"--{name}" in words]
        assert all(Path(name).is_file() for name in made), made
        pictures += [name for name in made if name.endswith(".png")]
        assert module != "dpo" or "policy and reference differ by at most" in out
    assert pictures and all(Path(name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
    if section == "B":
        drawn = next(out for words, out in said.items() if "hh_winrate.png" in words)
        assert sorted(re.findall(r"(?m)^\| (\w+) \| ", drawn)) == ["DPO", "DPO", "SFT", "SFT", "base", "base"]
        won = json.loads(Path("runs/hh_dpo/winrate.json").read_text())
        assert won["n"] == won["wins"] + won["losses"] == 9 and won["trials"] == 3
    if section == "D":
        assert Path("runs/sentiment.md").read_text().startswith("| prompt | before | after |\n")
    if section == "E":
        lines = [line.strip("| ").split(" | ") for line in Path("runs/alpaca.md").read_text().splitlines()]
        full, lora = (dict(zip(lines[0], line, strict=True)) for line in lines[2:])
        same = {"model": "gpt2-medium", "batch_size": "4", "lr": "5e-05", "steps": "2", "score (0 to 100)": "40.00"}
        assert {"run": "run 5", "lora_rank": "0", **same}.items() <= full.items()
        assert {"run": "run 10", "lora_rank": "16", **same}.items() <= lora.items()
