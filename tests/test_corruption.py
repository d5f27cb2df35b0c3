"""Damaged copies of every file that a script reads: an error of one line or a sound result, in bounded time and memory.

    python -m pytest tests/test_corruption.py --copies 100        # copies of each kind of file; 12 by default

Each copy is damaged by a seeded rule and read in a process of its own by the function or script that reads such files. That
process may end with status 0 or 2, no traceback, within 10 seconds of the processor and with at most twice the memory of the
sound files; and every file beside the damaged one is byte for byte what it was.
"""

import gzip
import hashlib
import itertools
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest

import adapters
import data
import dpo
import sft
import weights
from base import errors, openai
from data import jsonl, math_problems
from data.tokenizer import choose, get
from judge.cache import Cache, Reply
from report import formats, tables
from report.results import read_result, result_table
from report.runs import read_run, run_table
from runtime import config
from runtime.distributed import setup
from runtime.unfinished import Unfinished
from selftrain import loop, pairs, samples
from tests import peers, tiny
from tests.conftest import dpo_args, flags, metrics, script, sft_args
from tests.data import published
from tests.judge.server import Server, args, responses

pytestmark = pytest.mark.slow
SECONDS, WAITING = 10, 60  # of the processor; until it has ended, on a machine that does much else
MEMORY, ROOM = 2, 32 << 20  # ROOM: bytes that two readings of one file may differ by
SAMPLE = {"weights_sha256": "00", "n": 2, "seed": 0}  # stands for the settings of sample.py


# --- damage ----------------------------------------------------------------------------------------------------------

DEEP = "\0deep\0"  # stands for 100,000 nested lists, which json.dumps cannot write
NUMBERS = [True, -1, 0, 1, 1.5, -2.5e-3, 10**9, 10**18, 10**400, 1e308, float("nan"), float("inf")]
TEXTS = ["", "a", "1", "\ud800", "\0", "x" * 100_000, "../../etc/passwd", "~no_such_user/x", "/dev/zero"]
VALUES = [None, *NUMBERS, *TEXTS, [], {}, [None], {"a": {"b": [1, "c"]}}, [[1, 2], [3]], DEEP]


def places(value, found=()) -> list[tuple]:
    """The ways to every part of a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found, *(way for key, part in itertools.islice(inner, 200) for way in places(part, (*found, key)))]


def edited(value, rng: random.Random):
    """A JSON value with one part replaced, left out, or doubled under another name."""
    *way, last = rng.choice(places(value)[1:] or [("",)])
    if not isinstance(value, dict | list) or not value or rng.random() < 0.05:
        return rng.choice(VALUES)
    value = json.loads(json.dumps(value))
    at = value
    for key in way:
        at = at[key]
    action = rng.random()
    if action < 0.15:
        del at[last]
    elif action < 0.25 and isinstance(at, dict):
        at[rng.choice(["x", "", "__class__", "\ud800"])] = rng.choice(VALUES)
    elif action < 0.35 and isinstance(at[last], int | float) and not isinstance(at[last], bool):
        at[last] = at[last] * rng.choice([-1, 2, 0.5, 10**6, 10**17])
    else:
        at[last] = rng.choice(VALUES)
    return value


def dumped(value) -> bytes:
    text = json.dumps(value).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    return text.encode()


def json_edit(content: bytes, rng: random.Random) -> bytes:
    """One part of a JSON file, or of a line of a JSON-lines file, is another value."""
    try:
        return dumped(edited(json.loads(content), rng))
    except ValueError:
        pass
    lines = content.splitlines()
    for n in rng.sample(range(len(lines)), len(lines)):
        try:
            lines[n] = dumped(edited(json.loads(lines[n]), rng))
            break
        except ValueError:
            continue
    return b"\n".join([*lines, b""])


TOML_VALUES = ["", "nan", "1e999", "-1", "true", '""', '"x', "1" * 4000, "1" * 5000, "1979-05-27", "{}", "'" * 3, '"\\u0000"']
TOML_VALUES += ["[" * 50_000, "[" * 5000 + "]" * 5000, "{a = " * 3000]


def toml_edit(content: bytes, rng: random.Random) -> bytes:
    """One line of a TOML file has another value, or is something else."""
    lines = content.decode().splitlines()
    n = rng.randrange(len(lines))
    name, other = lines[n].partition(" = ")[0], rng.choice(["a." * 3000 + "b = 1", "nothing = 1", lines[0]])
    lines[n] = f"{name} = {rng.choice(TOML_VALUES)}" if rng.random() < 0.7 else other
    return "\n".join(lines).encode()


def header_edit(content: bytes, rng: random.Random) -> bytes:
    """One part of a safetensors file's header is another value, or the header's length is."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.2:
        return rng.choice([2**63, 2**64 - 1, size - 1, size + 8, 0, len(content)]).to_bytes(8, "little") + content[8:]
    header = edited(json.loads(content[8 : 8 + size]), rng)
    tensors = [entry for entry in header.values() if isinstance(entry, dict)] if isinstance(header, dict) else []
    if tensors and rng.random() < 0.3:
        rng.choice(tensors)["dtype"] = rng.choice(["F64", "F8_E4M3", "I8", "BOOL", "U64", "C64", "F4", "F6_E2M3", "X"])
    text = dumped(header)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def bytes_edit(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, a range zeroed, cut, doubled, two parts exchanged, or something else altogether."""
    if not content:
        return b"\0"
    out, at = bytearray(content), sorted(rng.randrange(len(content)) for _ in range(2))
    match rng.randrange(8):
        case 0 | 1:
            for _ in range(rng.choice([1, 1, 3, 20])):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 2:
            out[at[0] : at[1]] = bytes(at[1] - at[0])
        case 3:
            del out[at[0] :]
        case 4:
            out += bytes(out)
        case 5:
            out[at[0] : at[1]] = bytes(out[: at[0]])
        case 6:
            out[at[0] : at[0]] = rng.randbytes(rng.choice([1, 100, 10_000]))
        case 7:
            return rng.choice([b"", b"\n", b"\0" * 1000, b"null\n", b"{}\n", b"[]\n", b"\xff\xfe", b"version https://git-lfs\n",
                               b"\x80\x04cposix\nsystem\n", b"[" * 10**6, b'{"a":' * 10**5, b"PK\x03\x04"])  # fmt: skip
    return bytes(out)


EDITS = {".json": json_edit, ".jsonl": json_edit, ".toml": toml_edit, ".safetensors": header_edit}


def damaged(name: str, content: bytes, rng: random.Random) -> bytes:
    """A damaged copy of a file's content; what is in a .gz file is damaged as often as the file itself."""
    if name.endswith(".gz") and rng.random() < 0.6:
        return gzip.compress(damaged(name.removesuffix(".gz"), gzip.decompress(content), rng))
    edit = EDITS.get(Path(re.sub(r"\.(part|cache).*", ".jsonl", name)).suffix)
    return (edit if edit and rng.random() < 0.6 else bytes_edit)(content, rng)


def spoil(path: Path, rng: random.Random) -> None:
    """Damage a file in its place; now and then a folder, a pipe or a circle of links stands there instead."""
    content, kind = path.read_bytes(), rng.random()
    path.unlink()
    if kind < 0.02:
        path.mkdir()
    elif kind < 0.04:
        os.mkfifo(path)
    elif kind < 0.06:
        path.symlink_to(path)
    elif kind < 0.08:
        return  # gone
    else:
        path.write_bytes(damaged(path.name, content, rng))


# --- a reader in a process of its own --------------------------------------------------------------------------------


@dataclass
class End:
    status: int | None  # None: it did not end
    said: str  # on stderr
    memory: int  # its peak in bytes


def ending(read: Callable[[], int | None]) -> End:
    """Run `read` as a script's main in a forked process."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            sys.stdout, sys.stderr = open(os.devnull, "w"), open(into, "w", errors="backslashreplace")  # noqa: SIM115
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + (3 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            errors.run(lambda: value if type(value := read()) is int else None)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(into)
    said, deadline = b"", time.monotonic() + WAITING
    while (left := deadline - time.monotonic()) > 0 and select.select([out], [], [], left)[0]:
        if not (chunk := os.read(out, 65536)):
            break
        said += chunk
    else:
        os.kill(child, signal.SIGKILL)
    os.close(out)
    _, status, used = os.wait4(child, 0)
    status = os.waitstatus_to_exitcode(status)
    return End(
        None if status in (-signal.SIGKILL, -signal.SIGXCPU) else status, said.decode(errors="replace"), used.ru_maxrss << 10
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# --- kinds of files --------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """read(folder) reads the files that are in it. spoiled: which of them are damaged. after(folder, name): what a stranger
    would do to hide the damage. check(folder, name): whether a reading that succeeded was sound."""

    read: Callable[[Path], object]
    spoiled: str = "*"
    after: Callable[[Path, str, random.Random], None] = lambda *_: None
    check: Callable[[Path, str], None] = lambda *_: None
    writes: tuple[str, ...] = field(default=())  # patterns of files that a success may change


KINDS: dict[str, Callable[[SimpleNamespace, Path], Kind]] = {}


def kind(make: Callable[[SimpleNamespace, Path], Kind]) -> Callable:
    """A kind: a function that fills a folder with sound files and says how they are read."""
    KINDS[make.__name__] = make
    return make


VIEWS = {"sft": "sft", "pairs": "preference", "mcq": "mcq"}


@kind
def own_data(given, folder):
    for name in VIEWS:
        content = Path(given.files[name]).read_bytes()
        (folder / f"{name}.jsonl").write_bytes(content)
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(content))
        (folder / f"{name}.json").write_text(json.dumps([json.loads(line) for line in content.splitlines()]))

    def read(at):
        for path in sorted(at.iterdir()):
            data.load(str(path), "train", VIEWS[path.name.partition(".")[0]])

    return Kind(read)


@kind
def recipes(given, folder):
    published.hh_folder(folder / "hh")
    published.labels_folder(folder / "labels", 20)
    published.alpaca_folder(folder / "alpaca", 60)
    published.hellaswag_folder(folder / "hellaswag")
    record = {"problem": "P?", "solution": r"so \boxed{\frac12}", "level": "Level 5", "type": "Algebra"}
    for n in range(520):
        published.write(folder / f"math/train/algebra/{n}.json", json.dumps(record)) if n < 8 else None
    published.write(folder / "math/test/algebra/1.json", json.dumps(record))
    published.write(folder / "gsm8k/test.jsonl", *({"question": f"Q{i}?", "answer": f"1\n#### 1,{i:03}"} for i in range(30)))

    def read(at):
        for split in ("train", "test"):
            data.load("hh", split, "preference", data_dir=str(at / "hh"))
        for part in ("sentiment", "descriptiveness", "tldr", "cnndm"):
            data.load(f"human_labels:{part}", "train", "sft", data_dir=str(at / "labels"))
        data.load("alpaca", "train", "sft", data_dir=str(at / "alpaca"))
        for split, view in (("train", "preference"), ("val", "loglik")):
            data.load("hellaswag", split, view, data_dir=str(at / "hellaswag"))
        for split in ("train", "test"):
            math_problems.problems("math", split, data_dir=str(at / "math"))
        math_problems.problems("gsm8k", "test", data_dir=str(at / "gsm8k"))

    return Kind(read, "**/*")


@kind
def published_lines(given, folder):
    """Files of the users with lines in published forms; and the same for the other scripts that read lines."""
    published.write(folder / "hellaswag.jsonl", *({**published.ENDINGS, "label": i % 4} for i in range(6)))
    published.write(folder / "alpaca.jsonl", *map(published.instruction, range(6)))
    turns = ({"chosen": published.dialogue(i, " a"), "rejected": published.dialogue(i, " b")} for i in range(6))
    published.write(folder / "hh.jsonl", *turns)

    def read(at):
        for path in sorted(at.iterdir()):
            data.load(str(path), "train", "sft")

    return Kind(read)


@kind
def answers(given, folder):
    """What sample.py, the tables and selftrain read."""
    lines = [{"prompt": f"Q{i}", "answer": str(i), "completions": [f" {i}", " 7"], "level": 3} for i in range(6)]
    published.write(folder / "samples.jsonl", *lines)
    published.write(folder / "graded.jsonl", *({**r, "grades": [True, False], "pred": ["1", None]} for r in lines))
    published.write(folder / "problems.jsonl", *({"problem": f"P{i}", "solution": f"#### {i}"} for i in range(6)))

    def read(at):
        for name in ("samples", "graded"):
            cfg = pairs.Config(samples=str(at / f"{name}.jsonl"), grader="plain", out="x")
            pairs.make_pairs(samples.load_graded(cfg)[0], cfg)
        math_problems.problems(str(at / "problems.jsonl"))
        for where, record in jsonl.read(at / "samples.jsonl"):
            jsonl.get(record, "prompt", str, where)
        texts = {name: tables.read_answers(str(at / f"{name}.jsonl"), 10) for name in ("samples", "graded")}
        formats.aligned(tables.cut(tables.answers(texts)), 3)

    return Kind(read)


@kind
def configs(given, folder):
    for name, keys in (("sft", sft.Config(data="toy", out_dir="x")), ("dpo", dpo.Config(data="toy", out_dir="x", ref="r"))):
        (folder / f"{name}.toml").write_text(config.to_toml(keys))

    def read(at):
        for name, cls in (("sft", sft.Config), ("dpo", dpo.Config)):
            config.to_toml(config.load(cls, ["--config", str(at / f"{name}.toml")]))

    return Kind(read)


def sharded(folder: Path) -> None:
    """Weights over two files and an index, as transformers writes large models."""
    from safetensors.torch import load_file, save_file

    tensors, index = load_file(folder / "model.safetensors"), {}
    (folder / "model.safetensors").unlink()
    for part, names in enumerate([sorted(tensors)[:9], sorted(tensors)[9:]]):
        file = f"model-{part}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def use(model) -> None:
    """A forward: what a folder holds must be a model, not only load as one."""
    import torch

    with torch.no_grad():
        model.logits(torch.tensor([[1, 2, 3]]))


@kind
def models(given, folder):
    """config.json, weights, tokenizer: ours, in one file; GPT-2's, and a Llama's, in shards."""
    shutil.copytree(given.sft_run / "model", folder / "ours")
    peers.gpt2_folder(folder / "theirs")
    sharded(folder / "theirs")
    given.llama(folder / "llama")

    def read(at):
        get(at / "ours")
        for path in sorted(at.iterdir()):
            use(weights.load(str(path)))

    return Kind(read, "**/*")


@kind
def adapter_folders(given, folder):
    base = peers.gpt2_folder(given.folder / "base")
    tiny.save_adapter(tiny.with_lora(weights.load(base)), base, folder / "ours")
    peft = {"target_modules": ["c_attn", "lm_head"], "r": 6, "lora_alpha": 3, "rank_pattern": {"c_attn": 3}}
    peers.peft_adapter(base, folder / "peft", **peft)

    def read(at):
        for path in sorted(at.iterdir()):
            choose("auto", str(path)) if path.name == "ours" and not (path / "tokenizer_config.json").exists() else None
            use(weights.load(adapters.source(str(path))))
            dict(adapters.source(str(path), merge=False).adapter.initial(True))

    return Kind(read, "**/adapter_*")


@kind
def references(given, folder):
    shutil.copy(given.reference, folder / "ref.safetensors")

    def read(at):
        keys = dpo_args(given.files, given.sft_run, at / "ref.safetensors", at.parent / "run", max_steps=1, samples=0)
        return script("dpo", *keys, "--overwrite")

    return Kind(read)


@kind
def run_folders(given, folder):
    """A run that goes on. After damage in a checkpoint that is not hidden it does what it did before."""
    keys = {"epochs": 1, "samples": 0, "keep": 9, "save_every": 2}
    assert script("sft", *sft_args(given.files, folder / "run", **keys)) == 0
    sound = metrics(folder / "run")
    shutil.rmtree(folder / "run/model")

    def rehash(at, name, rng):
        path = at / name
        state = path.with_name("state.json")
        if path.name.startswith("rank_") and path.is_file() and rng.random() < 0.6:
            known = json.loads(state.read_text())
            known["files"][path.name] = [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
            state.write_text(json.dumps(known))

    def check(at, name):
        state = at / Path(name).with_name("state.json")
        if "rank_" in name and state.is_file() and (at / name).is_file():
            hidden = hashlib.sha256((at / name).read_bytes()).hexdigest() in state.read_text()
            assert hidden or metrics(at / "run") == sound, "another curve"

    def read(at):
        return script("sft", *sft_args(given.files, at / "run", **keys))

    writes = ("run/model/*", "run/config.toml", "run/metrics.jsonl", "run/checkpoints/*")
    return Kind(read, "run/**/*", rehash, check, writes)


@kind
def part_files(given, folder):
    lines = [SAMPLE, *([i, [f" a {i}", " b"]] for i in range(6))]
    (folder / "out.jsonl.part0").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "out.jsonl.part1").write_text(json.dumps(SAMPLE) + "\n" + json.dumps([9, ["x", "y"]]) + "\n")

    def read(at):
        done = Unfinished(str(at / "out.jsonl"), dict(SAMPLE), False, setup("cpu")).done
        assert all(type(n) is int and type(c) is list and all(type(t) is str for t in c) for n, c in done.items()), done

    return Kind(read, writes=("out.jsonl*",))


@kind
def judge_caches(given, folder):
    for n in range(6):
        with open(folder / "out.cache.jsonl", "a") as file:
            file.write(json.dumps({"key": f"k{n}", "text": f"Verdict: {n}", "tokens_in": 3, "tokens_out": 4, "end": ""}) + "\n")

    def read(at):
        found = Cache(at / "out.cache.jsonl").found
        replies = list(found.values())
        assert all(isinstance(r, Reply) and type(r.text) is str and type(r.end) is str for r in replies), found
        assert all(type(n) is int for r in replies for n in (r.tokens_in, r.tokens_out)), found

    return Kind(read, writes=("out.cache.jsonl",))


@kind
def judge_replies(given, folder):
    """What a judge answers, and the file of responses that it is asked about."""
    said = {
        "id": "x",
        "choices": [{"message": {"role": "assistant", "content": "Verdict: A"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7},
    }
    (folder / "reply.json").write_text(json.dumps(said))
    responses(folder / "responses.jsonl", 2, 1)

    def read(at):
        reply = at / "reply.json"
        given.server.always = (200, {}, reply.read_bytes() if reply.is_file() else b"")
        keys = {"tries": 1, "asks": 1, "timeout": 2, "workers": 1, "out": at.parent / "out.json"}
        shutil.rmtree(at.parent / "cache", ignore_errors=True)
        return script("eval_winrate", *args(given.server, at / "responses.jsonl", **keys, cache=at.parent / "cache/c.jsonl"))

    return Kind(read)


@kind
def reports(given, folder):
    run = folder / "run"
    run.mkdir()
    records = [{"step": i, "split": "train", "loss": 2 / i, "lr": 1e-3, "tokens_per_s": 5.0, "step_s": 1} for i in range(1, 40)]
    records = [r | {"rewards/chosen": 0.1, "rewards/margins": 0.2, "rewards/accuracies": 0.5} for r in records]
    records += [{"step": 39, "split": "val", "loss": 1.0, "rewards/margins": 0.3}]
    published.write(run / "metrics.jsonl", *records)
    (run / "config.toml").write_text(config.to_toml(dpo.Config(data="toy", out_dir="run", ref="r", init_from="gpt2")))
    result = {"win_rate": 0.5, "ci95": [0.4, 0.6], "parameters": 124e6, "label": "a", "n": 10, "wins": 5, "losses": 5}
    (run / "win.json").write_text(json.dumps(result))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "score.json").write_text(json.dumps({"mean": 50.0, "ci95": [40.0, 60.0], "parameters": 3, "label": "", "n": 4}))

    def read(at):
        records = read_run(at / "run")
        formats.markdown(run_table({"a": records}, {"a": str(at / "run")}))
        for name in ("result", "score"):
            result_table(read_result(at / f"{name}.json"))

    return Kind(read, "**/*")


@kind
def loop_rounds(given, folder):
    """What the loop reads of its own rounds."""
    ci = [0.1, 0.9]
    result = {"k": 2, "pass_at_1": 0.5, "pass_at_1_ci95": ci, "maj": 0.5, "maj_ci95": ci, "pass": 0.5, "pass_ci95": ci, "n": 4}
    for r in range(2):
        for name, found in (("eval", result), ("train", result), ("pairs", {"all_right": 1, "all_wrong": 1, "pairs": 2})):
            published.write(folder / f"round_{r}/{name}.json", json.dumps(found))
        published.write(folder / f"round_{r}/eval_graded.jsonl", *({"grades": [True, False], "prompt": "Q"} for _ in range(4)))

    def read(at):
        cfg = SimpleNamespace(out_dir=str(at), marker="", reward="")
        rows = [loop.figures(cfg, r) for r in range(2)]
        loop.table(rows)
        loop.warn_of(rows[1], cfg)

    return Kind(read, "**/*")


@kind
def tensorflow_checkpoints(given, folder):
    fixture = Path(__file__).parent / "tools/fixture"
    for name in ("hparams.json", "model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        shutil.copy(fixture / name, folder / name)

    def read(at):
        return script("tools.convert_openai", *flags(folder=at, out=at.parent / "out"))

    return Kind(read)


# --- the sweep -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(files, sft_run, reference, tmp_path_factory):
    """What kinds are made of."""

    def llama(folder: Path) -> None:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 128}
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = 64
        made = transformers.LlamaConfig(**sizes, rope_scaling=scaling)
        transformers.LlamaForCausalLM(made).save_pretrained(folder)
        sharded(folder)

    with Server() as server:
        folder = tmp_path_factory.mktemp("given")
        yield SimpleNamespace(files=files, sft_run=sft_run, reference=reference, folder=folder, server=server, llama=llama)


@pytest.mark.parametrize("name", KINDS)
def test_damaged_copies(name, given, tmp_path, request, monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr(openai, "DELAY", 0.01)
    whole, at = tmp_path / "whole", tmp_path / "at"
    whole.mkdir()
    how = KINDS[name](given, whole)
    spoiled = sorted(str(p.relative_to(whole)) for p in whole.glob(how.spoiled) if p.is_file() and p.name != ".lock")
    assert spoiled
    shutil.copytree(whole, at)
    idle = ending(lambda: None)
    sound = ending(lambda: how.read(at))
    assert sound.status == 0, sound.said
    allowed = idle.memory + MEMORY * (sound.memory - idle.memory) + ROOM
    counts, broken = Counter(), []
    for n in range(request.config.getoption("--copies")):
        rng = random.Random(f"{name} {n}")
        for path in tmp_path.iterdir():
            if path != whole:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(whole, at)
        file = spoiled[n % len(spoiled)] if n < len(spoiled) else rng.choice(spoiled)
        spoil(at / file, rng)
        how.after(at, file, rng)
        before = contents(at)
        end = ending(lambda: how.read(at))
        wrong = fault(end, allowed)
        try:
            if not wrong and end.status == 0:
                how.check(at, file)
        except AssertionError as error:
            wrong = f"another result: {error}"[:300]
        after = contents(at)
        free = how.writes if end.status == 0 else ()
        lost = [f for f in before if after.get(f) != before[f] and not any(fnmatch(f, pattern) for pattern in free)]
        counts[wrong.partition(":")[0] if wrong else f"status {end.status}"] += 1
        if wrong or lost:
            broken.append(f"copy {n} of {file}: {wrong or f'lost {lost}'}")
    with capsys.disabled():
        print(f"\n{name}: {dict(sorted(counts.items()))}")
    assert not broken, "\n\n".join(broken)


def fault(end: End, allowed: int) -> str:
    """What is wrong with how a reading ended; "" if nothing is."""
    if end.status is None:
        return f"hang: no end after {SECONDS} s of the processor, or {WAITING} s\n{end.said[-2000:]}"
    if end.status not in (0, 2):
        return f"traceback: status {end.status}\n{end.said[-2500:]}"
    lines = [line for line in end.said.splitlines() if line.startswith("error: ")]
    if end.status == 2 and (len(lines) != 1 or "Traceback" in end.said):
        return f"message: {end.said[-2000:]}"
    if end.memory > allowed or "out of memory" in end.said:
        return f"memory: {end.memory / 1e6:.0f} MB, allowed {allowed / 1e6:.0f}\n{end.said[-500:]}"
    return ""
