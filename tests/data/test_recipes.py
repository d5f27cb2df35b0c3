"""The recipes: what they make of the published formats, what they refuse, and every TOML file run for every size."""

import glob
import gzip
import importlib
import itertools
import json
import re
import shlex
import shutil
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import data
import sft
import weights
from base.errors import UserError
from data import alpaca, hellaswag, hh, human_labels
from data.encode import encode, load_encoded
from data.tokenizer import get
from model import GPT, SIZES, GPTConfig
from runtime import config
from tests.conftest import flags, metrics
from tests.hub import serving
from tests.judge.test_winrate import Handler
from tests.tools.test_openai import gpt2_files

ROOT = Path(__file__).parents[2]
RECIPES_PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
SHARED = ROOT.parent / "shared" / "data"
PREFERENCE = {"split": "train", "view": "preference"}


# --- the published formats, small ------------------------------------------------------------------------------------------


def dialogue(n: int, answer: str) -> str:
    return f"\n\nHuman: What is {n} and {n}?\n\nAssistant: Why do you ask?\n\nHuman: I count.\n\nAssistant:{answer}"


def hh_folder(folder: Path, per_file: int = 12) -> Path:
    """The repository's layout. In every file one line too long, and one whose dialogues differ before the last answer."""
    for p, part in enumerate(hh.PARTS):
        for s, split in enumerate(("train", "test")):
            rows = [
                {"chosen": dialogue(n, f" It is {2 * n}."), "rejected": dialogue(n, " Who knows.")}
                for n in range(1000 * p + 100 * s, 1000 * p + 100 * s + per_file)
            ]
            rows.insert(3, {**rows[0], "rejected": dialogue(7777, " No.")})
            rows.insert(5, {"chosen": dialogue(1, " a" * 700), "rejected": dialogue(1, " b")})
            path = folder / part / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return folder


def labelled(n: int, **change) -> dict:
    """An entry as OpenAI's: a query with padding before it, samples of four ids of which two ended early."""
    pad = human_labels.PAD
    samples = {f"sample{i}": [1000 + n, 11, 262, 400 + i] if i % 2 else [2000 + n, 300 + i, pad, pad] for i in range(4)}
    return {"query": [pad, 464, 3290, 500 + n], **samples, "best": n % 4, **change}


def labels_folder(folder: Path, n: int = 120) -> Path:
    for names in human_labels.FILES.values():
        for k, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps([labelled(i) for i in range(k * n, k * n + n)]))
    return folder


def instruction(n: int, **change) -> dict:
    return {"instruction": f"Add one to {n}.", "input": f"{n}" if n % 2 else "", "output": f"It is {n + 1}.", **change}


def alpaca_file(folder: Path, n: int = 150) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entries = [instruction(i, **({"output": ""} if i == 4 else {})) for i in range(n)]
    (folder / alpaca.FILE).write_text(json.dumps(entries, indent=4))
    return folder


# --- hh --------------------------------------------------------------------------------------------------------------------


def test_hh_holds_out_whole_prompts_and_tells_what_it_drops(tmp_path, capsys):
    where = {"data_dir": str(hh_folder(tmp_path))}
    train, val, test = (data.load("hh", split, "preference", **where) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (44, 4, 48)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == (
        "hh train of helpful-base, helpful-online, helpful-rejection-sampled, harmless-base (4 of 48 pairs held out for "
        "validation): 44 kept; 4 dropped: their dialogues differ before the last answer, or one answer is empty; 4 dropped: a "
        "dialogue of over 1,280 characters"
    )
    prompts = [{e.prompt for e in split} for split in (train, val, test)]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2]
    assert {e.source.split("/")[-2] for e in train[:20]} == set(hh.PARTS), "the four files are mixed"
    sft = data.load("hh", "train", "sft", limit=5, **where)
    assert [(e.prompt, e.completions) for e in sft] == [(e.prompt, e.completions[:1]) for e in train[:5]]
    for e in train:
        n = int(re.search(r"What is (\d+)", e.prompt)[1])
        assert e.prompt + e.completions[0] == dialogue(n, f" It is {2 * n}.") and e.completions[1] == " Who knows."


def test_hh_takes_the_files_that_a_folder_has(tmp_path, capsys):
    folder = hh_folder(tmp_path)
    for part in hh.PARTS[1:]:
        shutil.rmtree(folder / part)
    path = folder / "helpful-base" / "train.jsonl"
    path.write_bytes(gzip.decompress(path.with_suffix(".jsonl.gz").read_bytes()))
    path.with_suffix(".jsonl.gz").unlink()
    assert len(data.load("hh", data_dir=str(folder), **PREFERENCE)) == 11
    assert capsys.readouterr().out.startswith("hh train of helpful-base (1 of 12")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], '{"chosen": "\\n\\nAssistant: a"}', *lines[7:]]))
    with pytest.raises(UserError, match=r"train\.jsonl:7: the field 'rejected' is missing"):
        data.load("hh", data_dir=str(folder), **PREFERENCE)
    with pytest.raises(UserError, match=r"data_dir .*none of helpful-base/train\.jsonl\.gz"):
        data.load("hh", data_dir=str(tmp_path / "helpful-base"), **PREFERENCE)
    with pytest.raises(UserError, match="no such folder"):
        data.load("hh", data_dir=str(tmp_path / "nowhere"), **PREFERENCE)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_hh(tmp_path):
    (tmp_path / "harmless-base").mkdir()
    for split in ("train", "test"):
        shutil.copy(SHARED / "hh_harmless_base_test.jsonl.gz", tmp_path / "harmless-base" / f"{split}.jsonl.gz")
    train, val, test = (data.load("hh", s, "preference", data_dir=str(tmp_path)) for s in ("train", "val", "test"))
    assert len(train) + len(val) == len(test) > 1500 and len(val) >= len(test) // 10
    assert not {e.prompt for e in train} & {e.prompt for e in val}
    assert all(len(e.prompt + c) <= 1280 for e in test for c in e.completions)


# --- human labels ----------------------------------------------------------------------------------------------------------


def test_human_labels_are_the_ids_that_they_are(tmp_path):
    where = {"data_dir": str(labels_folder(tmp_path))}
    gpt2 = get("gpt2")
    splits = {
        s: load_encoded("human_labels:sentiment", s, "preference", gpt2, 64, "drop", **where) for s in ("train", "val", "test")
    }
    assert sum(map(len, splits.values())) == 3 * 120 and all(splits.values())
    assert len(splits["train"]) > 3 * 90
    queries = [{item.prompt.tobytes() for item in items} for items in splits.values()]
    assert not queries[0] & queries[1] and not queries[0] & queries[2]
    eot = human_labels.EOT
    for items in splits.values():
        for three in (items[i : i + 3] for i in range(0, len(items), 3)):
            assert len({item.group for item in three}) == 1
            n = int(three[0].prompt[2]) - 500
            samples = [[1000 + n, 11, 262, 400 + i] if i % 2 else [2000 + n, 300 + i, eot] for i in range(4)]
            best = samples.pop(n % 4)
            for item, other in zip(three, samples, strict=True):
                assert item.prompt.tolist() == [464, 3290, 500 + n]
                assert [c.tolist() for c in item.completions] == [best, other]
    sft = data.load("human_labels:sentiment", "train", "sft", limit=2, **where)
    assert len(sft) == 2 and all(len(e.completions) == 1 for e in sft)
    assert len(data.load("human_labels:tldr", limit=2, **where, **PREFERENCE)) == 6
    (tmp_path / "tldr" / "online_45k.json").unlink()
    tldr = [e for s in ("train", "val", "test") for e in data.load("human_labels:tldr", s, "sft", **where)]
    assert len(tldr) == 120, "of two files the one that is there"


def test_ids_need_gpt2s_tokenizer():
    with pytest.raises(UserError, match="token ids of gpt2, and the tokenizer is toy"):
        encode([data.Example((464,), ((11,),), source="f entry 1")], get("toy"), 10, "drop")
    (item,), _ = encode([data.Example((), ((11, 12),), source="f entry 1")], get("gpt2"), 10, "drop")
    assert item.prompt.tolist() == [50256] and item.completions[0].tolist() == [11, 12]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"best": 4}, "best is 4, out of range: there are 4 samples, numbered from 0"),
        ({"best": -1}, "best is -1, out of range"),
        ({"best": None}, "the field 'best' must be a whole number, not None"),
        ({"query": [464, 50257]}, "'query' has 50257 at place 1, which is no token id of GPT-2"),
        ({"query": [464, 50259, 464]}, "'query' has 50259 at place 1, .* only as padding before or behind"),
        ({"sample2": [-1]}, "'sample2' has -1 at place 0"),
        ({"sample1": [3, 4.5]}, r"'sample1' has 4\.5 at place 1"),
        ({"sample1": [True]}, "'sample1' has True at place 0"),
        ({"sample1": []}, "'sample1' is empty"),
        ({"sample3": "text"}, "the field 'sample3' must be a list"),
    ],
)
def test_bad_human_labels_name_file_and_entry(tmp_path, change, message):
    path = tmp_path / "sentiment" / "offline_5k.json"
    path.parent.mkdir()
    path.write_text(json.dumps([labelled(0), labelled(1, **change), labelled(2)]))
    with pytest.raises(UserError, match=rf"offline_5k\.json entry 2: .*{message}"):
        data.load("human_labels:sentiment", data_dir=str(tmp_path), **PREFERENCE)
    path.write_text(json.dumps([labelled(0), {k: v for k, v in labelled(1).items() if k != "sample0"}]))
    with pytest.raises(UserError, match=r"offline_5k\.json entry 2: the field 'sample0' is missing"):
        data.load("human_labels:sentiment", data_dir=str(tmp_path), **PREFERENCE)


# --- alpaca ----------------------------------------------------------------------------------------------------------------


def test_alpaca_splits_by_hash_and_uses_its_prompt(tmp_path, capsys):
    where = {"data_dir": str(alpaca_file(tmp_path))}
    splits = [data.load("alpaca", s, "sft", **where) for s in ("train", "val", "test")]
    assert sum(map(len, splits)) == 149 and len(splits[0]) > 110 and splits[1] and splits[2]
    assert "1 dropped: their output is empty" in capsys.readouterr().out
    found = {e.source.rpartition(" ")[2]: e for split in splits for e in split}
    with_input, without = found["2"], found["3"]
    assert with_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd one to 1.\n\n### Input:\n1\n\n### Response:\n"
    )
    assert without.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd one to 2.\n\n### Response:\n"
    )
    assert with_input.completions == ("It is 2.",)
    # in another order and form, an entry stays in its split
    lines = [instruction(i) for i in reversed(range(150)) if i != 4]
    path = tmp_path / "turned.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    turned = data.load("alpaca", "val", "sft", data_dir=str(path))
    assert {e.prompt for e in turned} == {e.prompt for e in splits[1]}
    assert len(data.load(str(path), "train", "sft")) == 149, "named as a file it is taken whole"


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_instructions():
    where = {"data_dir": str(SHARED / "instruction_data.jsonl.gz")}
    counts = [len(data.load("alpaca", s, "sft", **where)) for s in ("train", "val", "test")]
    assert sum(counts) == 900 and counts[0] > 700 and counts[1] > 20 and counts[2] > 60
    pairs = data.load(str(SHARED / "instruction_preference.jsonl.gz"), "train", "preference")
    assert len(pairs) == 900 and "### Instruction:" in pairs[0].prompt and pairs[0].completions[0] != pairs[0].completions[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([instruction(0), {"instruction": "a", "output": "b"}], "entry 2: the field 'input' is missing"),
        ([instruction(0), instruction(1), {"input": "a", "output": "b"}], "entry 3: the field 'instruction' is missing"),
        ([instruction(0), instruction(1, output=3)], "entry 2: the field 'output' must be text, not 3"),
        ([instruction(0, instruction=" ")], "entry 1: the field 'instruction' is empty"),
        ([instruction(0), ["a"]], "entry 2: a list where a JSON object"),
        ([], "an empty list"),
        ('[{"instruction": "a", "input": "", "output": "b"}, {"instruction": ]', "entry 2: not JSON: .* at character 67"),
        ('[{"instruction": "a", "input": "", "output": "b"}', "entry 1: neither a comma nor the list's end"),
        ('[{"instruction": "a", "input": "", "output": "b"},', "entry 2: not JSON"),
        ('[{"instruction": "a" "', "entry 1: not JSON"),
        ("[", "entry 1: not JSON|an empty list"),
        ("", "an empty file"),
        (b'[{"instruction": "\xff"}]', "not UTF-8"),
    ],
)
def test_bad_instructions_name_file_and_entry(tmp_path, content, message):
    path = tmp_path / alpaca.FILE
    content = json.dumps(content) if isinstance(content, list) else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for where in (path, tmp_path):
        with pytest.raises(UserError, match=rf"alpaca_data\.json:? ?({message})"):
            data.load("alpaca", "train", "sft", data_dir=str(where))


def test_lists_in_json_files(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(
        gzip.compress(b'\xef\xbb\xbf \n[ {"prompt": "P", "completion": " C"} ,\n{"prompt": "Q", "completion": " D"}\n] ')
    )
    found = data.load(str(path), "train", "sft")
    assert [(e.prompt, e.completions, e.source) for e in found] == [
        ("P", (" C",), f"{path} entry 1"),
        ("Q", (" D",), f"{path} entry 2"),
    ]
    assert len(data.load(str(path), "train", "sft", limit=1)) == 1


def test_unknown_recipes_name_the_known_ones():
    with pytest.raises(
        UserError, match=r"alpaca, gsm8k, hellaswag, hh, human_labels:cnndm, .*: did you mean human_labels:sentiment\?"
    ):
        data.load("human_labels:sentimet", **PREFERENCE)
    for name in ("hh", "alpaca", "human_labels:tldr"):
        with pytest.raises(UserError, match=f"recipe {name} has no multiple-choice"):
            data.load(name, "val", "mcq", data_dir=str(SHARED / "instruction_data.jsonl.gz"))


# --- python -m data --------------------------------------------------------------------------------------------------------


def test_prompts_are_written_for_sampling(tmp_path, call, refused):
    folder, out = hh_folder(tmp_path / "hh"), tmp_path / "p.jsonl"
    common = flags(data="hh", data_dir=folder, split="test", out=out)
    status, said, err = call("data.__main__", *common, "--limit", 7)
    assert status == 0 and said.endswith(f"wrote {out}: 7 lines\n"), err
    wanted = [{"prompt": e.prompt, "chosen": e.completions[0]} for e in data.load("hh", "test", "sft", data_dir=str(folder))]
    assert [json.loads(line) for line in out.read_text().splitlines()] == wanted[:7]
    assert call("data.__main__", *common, "--view", "preference")[0] == 0
    read_again = data.load(str(out), "train", "preference")
    assert [(e.prompt, e.completions) for e in read_again] == [
        (e.prompt, e.completions) for e in data.load("hh", "test", "preference", data_dir=str(folder))
    ]
    ids = flags(data="human_labels:sentiment", data_dir=labels_folder(tmp_path / "labels"), split="train", limit=1, out=out)
    assert call("data.__main__", *ids)[0] == 0
    line = json.loads(out.read_text())
    example = data.load("human_labels:sentiment", "train", "sft", data_dir=str(tmp_path / "labels"))[0]
    assert get("gpt2").decode(list(example.prompt)) == line["prompt"] and "endoftext" not in line["chosen"]
    refused("data.__main__", *flags(data="hh", out=tmp_path / "x.txt"), says="must end in .jsonl")


# --- every TOML file -------------------------------------------------------------------------------------------------------


def script_of(path: Path) -> str:
    return re.findall(r"(\w+)\.py --config configs/" + re.escape(path.name), path.read_text())[-1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_config_is_one_that_its_script_takes(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some outputs are checked to be writable
    config.load(importlib.import_module(script_of(path)).Config, ["--config", str(path)])
    known = re.match("hellaswag|hh|sentiment|tldr|alpaca", path.stem)
    assert not known or f"configs/{path.name}" in RECIPES_PAGE, "no recipe tells of it"


def test_the_flags_of_every_run_of_recipe_e():
    rows = re.findall(r"(?m)^\| (\d+) \| (`.*`)? ?\|", RECIPES_PAGE)
    assert [int(number) for number, _ in rows] == [*range(1, 7), *range(10, 20)]
    for number, row in rows:
        given = ["--config", str(ROOT / "configs" / "alpaca_sft.toml"), "--out_dir", f"e{number}", *row.strip("`").split()]
        assert config.load(sft.Config, given).data == "alpaca"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """What the four servers hand out: GPT-2 in every size (the same tiny random weights), and the data."""
    folder = tmp_path_factory.mktemp("served")
    gpt2 = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16))  # no narrower than the widest adapter
    torch.manual_seed(0)
    gpt2.load_state_dict(dict(gpt2.initial_weights(0)))
    weights.save(gpt2, get("gpt2"), folder / "gpt2")
    record = {
        "activity_label": "Counting",
        "ctx_a": "She counts",
        "ctx_b": "then",
        "endings": ["one.", "two.", "three.", "four."],
    }
    (folder / "hellaswag").mkdir()
    for name, _ in hellaswag.FILES.values():
        rows = [{**record, "ctx_b": f"then {n}", "label": n % 4} for n in range(24)]
        (folder / "hellaswag" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    hh_folder(folder / "hh"), labels_folder(folder / "labels"), alpaca_file(folder / "alpaca"), gpt2_files(folder / "openai")
    return folder


@pytest.fixture
def server(served, monkeypatch, tmp_path):
    repos = {
        **dict.fromkeys(SIZES, served / "gpt2"),
        hh.REPO: served / "hh",
        "lm-human-preferences/labels": served / "labels",
        "alpaca": served / "alpaca",
        "hellaswag": served / "hellaswag",
        **{f"gpt-2/models/{size}": served / "openai" for size in weights.OPENAI},
    }
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # so that the configs' runs/ is here
    with serving(repos, monkeypatch) as hub:
        monkeypatch.setenv("OPENAIPUBLIC_ENDPOINT", hub.url + "/files")
        monkeypatch.setattr(alpaca, "URL", hub.url + "/files/alpaca/")
        monkeypatch.setattr(hellaswag, "URL", hub.url + "/files/hellaswag/")
        monkeypatch.setattr(hellaswag, "FILES", {split: (name, 24) for split, (name, _) in hellaswag.FILES.items()})
        yield hub


SMALL = {"limit": 12, "val_limit": 4, "device": "cpu"}
FEW = {**SMALL, "max_steps": 2, "batch_size": 4, "samples": 0, "eval_every": 1, "save_every": 0}


@pytest.mark.parametrize(
    ("size", "recipe"),
    [*itertools.product(list(SIZES)[1:], ("hh", "sentiment", "alpaca")), ("gpt2-xl", "tldr"), ("openai:1558M", "sentiment")],
)
def test_a_recipe_trains_in_every_size(server, call, recipe, size):
    stages = {"hh": "sft ref dpo", "alpaca": "sft"}.get(recipe, "ref dpo").split()
    for stage in stages:
        name = {"ref": "precompute_ref"}.get(stage, stage)
        first = flags(init_from=size) if stage == stages[0] or recipe in ("sentiment", "tldr") else []
        few = flags(**(SMALL if stage == "ref" else FEW), dtype="float32")
        status, said, err = call(name, "--config", ROOT / "configs" / f"{recipe}_{stage}.toml", *first, *few)
        assert status == 0, err
        if stage == "dpo":
            assert "policy and reference differ by at most" in said
            assert metrics(f"runs/{recipe}_dpo")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    asked = "models/1558M/model.ckpt.data" if "openai" in size else f"{size}/resolve/main/model.safetensors"
    assert any(asked in request.path for request in server.requests)


# --- docs/recipes.md, word for word: from the first command to the last picture ---------------------------------------------


class Judge(Handler):
    """A judge that is for side A, and finds everything middling."""

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        reply = "Score: 40" if "<reference-" in asked else "One is as good as the other.\nVerdict: A"
        said = {"choices": [{"message": {"role": "assistant", "content": reply}}], "usage": {}}
        self.send(200, json.dumps(said).encode())


@pytest.fixture
def judge(monkeypatch):
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def commands(section: str) -> list[list[str]]:
    """The commands of a section of docs/recipes.md, each as [script, word, …]; `S=…` stands for what it says."""
    part = re.search(rf"(?ms)^## {section}\. .*?(?=^## |\Z)", RECIPES_PAGE)[0]
    lines = "".join(re.findall(r"(?ms)^```\n(.*?)^```", part)).replace("\\\n", " ").splitlines()
    found, size = [], ""
    for line in lines:
        words = shlex.split(line.replace("$S", size))
        if words[0].startswith("S="):
            size = words[0][2:]
            continue
        assert words[0] == "python", line
        script = ("data.__main__", 3) if words[1:3] == ["-m", "data"] else (words[1].removesuffix(".py"), 2)
        found.append([script[0], *words[script[1] :]])
    return found


def shrunk(script: str, words: list[str], judge: str) -> list[str]:
    """A command that does little: these keys instead of its own."""
    few = {
        "sft": FEW,
        "dpo": FEW,
        "precompute_ref": SMALL,
        "sample": {"limit": 3, "max_new_tokens": 3},
        "eval_mcq": {"limit": 8},
        "eval_winrate": {"limit": 3} if "reward" in words else {"judge": judge, "judge_model": "wise"},
    }.get(script, {})
    for name in few:
        if f"--{name}" in words:
            at = words.index(f"--{name}")
            del words[at : at + 2]
    words = [w for word in words for w in (sorted(glob.glob(word)) if "*" in word else [word])]
    return [str(ROOT / w) if w.startswith("configs/") else w for w in words] + flags(**few)


@pytest.mark.parametrize("section", "ABDE")
def test_the_page_of_recipes_is_true(server, judge, call, section):
    pytest.importorskip("matplotlib")
    pictures, said = [], {}
    for script, *words in commands(section):
        status, out, err = call(script, *shrunk(script, words, judge))
        assert status == 0, (script, words, err)
        said[" ".join(words)] = out
        made = [words[words.index(f"--{name}") + 1] for name in ("out", "png") if f"--{name}" in words]
        assert all(Path(name).is_file() for name in made), made
        pictures += [name for name in made if name.endswith(".png")]
        if script == "dpo":
            assert "policy and reference differ by at most" in out
    assert pictures and all(Path(name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
    if section == "B":
        drawn = next(out for words, out in said.items() if "hh_winrate.png" in words)
        assert sorted(re.findall(r"(?m)^\| (\w+) \| ", drawn)) == ["DPO", "DPO", "SFT", "SFT", "base", "base"]
        won = json.loads(Path("runs/hh_dpo/winrate.json").read_text())
        assert won["n"] == won["wins"] + won["losses"] == 9 and won["trials"] == 3
    if section == "D":
        assert Path("runs/sentiment.md").read_text().startswith("| prompt | before | after |\n")
    if section == "E":
        _, _, full, lora = Path("runs/alpaca.md").read_text().splitlines()
        assert full.startswith("| run 5 | gpt2-medium | 4 | 5e-05 | 1e-05 | 0.2 | full | 2 |") and " | 40.00 | " in full
        assert lora.startswith("| run 10 | gpt2-medium | 4 | 5e-05 | 1e-05 | 0.2 | 16/16 | 2 |") and " | 40.00 | " in lora
