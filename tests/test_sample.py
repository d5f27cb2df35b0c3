"""sample.py: a line a prompt, runs that go on after a kill, files of others left alone, and the terminal."""

import errno
import io
import json
import os
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import adapters
import generate
import sample
import weights
from base.errors import UserError
from base.files import held
from data.tokenizer import get
from generate import greedy, stream
from runtime import config
from runtime.distributed import Compute
from runtime.unfinished import Unfinished
from tests import tiny
from tests.conftest import flags, good, script

CPU = Compute(torch.device("cpu"), torch.float32)
SIZES = {"n_layer": 2, "block_size": 64, "vocab_size": get("toy").size}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model of the toy vocabulary."""
    path = tmp_path_factory.mktemp("sample") / "model"
    weights.save(tiny.gpt(**SIZES), get("toy"), path)
    return path


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    """24 prompts of 0 to 60 words with fields of their own."""
    rng, words = np.random.default_rng(1), [t for t in get("toy").tokens if t.startswith(" ")]
    path = tmp_path_factory.mktemp("asked") / "prompts.jsonl"
    records = [{"id": i, "prompt": "".join(rng.choice(words, 60 * i // 23)), "answer": [i, "é"]} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def args(folder, asked, out, /, **keys) -> list[str]:
    return flags(**{"model": folder, "prompts": asked, "out": out, "n": 2, "max_new_tokens": 12, "seed": 5, **keys})


def lines(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.splitlines()]


def drawn(model, asked: Path) -> list[list[str]]:
    """What a model draws for these prompts with the settings of `args`."""
    toy = get("toy")
    given = {i: toy.encode(r["prompt"])[-53:] or [toy.eot] for i, r in enumerate(lines(asked.read_bytes()))}
    found = {(i, j): toy.decode(ids) for i, j, ids in stream(model, given, 12, toy.eot, n=2, temperature=1.0, seed=5)}
    return [[found[i, 0], found[i, 1]] for i in given]


@pytest.fixture(scope="module")
def whole(folder, asked, tmp_path_factory) -> bytes:
    """What an unbroken run writes."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert script("sample", *args(folder, asked, out)) == 0
    return out.read_bytes()


def test_a_line_a_prompt_with_its_own_fields(folder, asked, whole, call, tmp_path):
    """An empty prompt is the start of a text; one that leaves no room loses its start; `limit` takes the first ones."""
    out = tmp_path / "new" / "out.jsonl"
    status, printed, _ = call("sample", *args(folder, asked, out, batch_size=1))
    assert status == 0 and out.read_bytes() == whole and [p.name for p in out.parent.iterdir()] == ["out.jsonl"]
    assert "3 of 24 prompts lost their start" in printed  # room for 53 of at most 60 tokens
    want = drawn(weights.load(folder), asked)
    records = zip(lines(asked.read_bytes()), want, strict=True)
    assert lines(whole) == [record | {"completions": texts} for record, texts in records]
    assert len({text for texts in want for text in texts}) > 40
    assert call("sample", *args(folder, asked, out, limit=3))[0] == 0
    assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])


def test_a_stop_text_ends_a_completion(folder, asked, whole, call, tmp_path):
    texts = [c for line in lines(whole) for c in line["completions"]]
    long = max(texts, key=lambda t: len(t.split())).split()
    middle = len(long) // 2
    over_two = f"{long[middle][-1]} {long[middle + 1]}"  # the end of a token, and the next one
    for stop in (long[middle], over_two):
        assert call("sample", *args(folder, asked, tmp_path / "out", stop=stop))[0] == 0
        cut = [c for line in lines((tmp_path / "out").read_bytes()) for c in line["completions"]]
        assert cut == [t.partition(stop)[0] for t in texts] and cut != texts


def test_stop_texts_over_several_tokens():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    text = sample.Text(Bytes(), "é\n\n")
    tokens = list("caf\u00e9\n\n\nx".encode())
    ends = [n for n in range(1, len(tokens) + 1) if text.ended(tokens[:n])]
    assert ends == [7] and text.final(tokens) == "caf"
    held = [text.certain(tokens[:n]) for n in (3, 4, 5, 6, 7)]
    assert held == ["caf"] * 5, "half a character or the beginning of the stop text was printed"
    assert text.certain(list("caf\u00e9\nx".encode())) == "caf\u00e9\nx"


def test_what_is_printed_is_the_text_up_to_the_first_stop(monkeypatch, capsys):
    """Random texts, cut into tokens anywhere, also inside a character, and stop texts that overlap with themselves."""

    class Pieces:
        def decode(self, ids):
            return b"".join(pieces[i] for i in ids).decode(errors="replace")

        start = ()

        def encode_batch(self, texts):
            return [[] for _ in texts]

    def drawn(cfg, prompts, batch_size, ended, *_):
        """What `sample.completions` yields: the tokens up to the one that ends the completion."""
        n = next((n for n in range(1, len(pieces) + 1) if ended(list(range(n)))), len(pieces))
        yield 0, 0, list(range(n))

    monkeypatch.setattr(sample, "fit", lambda *_: 0)
    monkeypatch.setattr(sample, "completions", drawn)
    terminal = config.load(sample.Config, flags(model="gpt2"))
    cases = [(b"hi\n\n\nQ", "\n\nQ"), (b"hi\n\n\nQ more", "\n\nQ"), (b"aabaaab", "aaab"), (b"ab\xf0\x9f", "b")]
    rng = np.random.default_rng(0)
    for case in range(3000):
        letters = ["a", "b", "\n", "\u00e9", "\U0001f600"]
        raw = "".join(rng.choice(letters, rng.integers(12))).encode()
        raw += bytes(rng.integers(128, 256, rng.integers(3), dtype=np.uint8)) if case % 2 else b""
        raw, stop = cases[case] if case < len(cases) else (raw, "".join(rng.choice(letters, rng.integers(5))))
        cuts = np.flatnonzero(rng.random(max(0, len(raw) - 1)) < rng.random()) + 1
        pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        sample.answer(terminal, "", 0, sample.Text(Pieces(), stop), None, Pieces(), None)
        text = raw.decode(errors="replace")
        assert capsys.readouterr().out == (text.partition(stop)[0] if stop else text) + "\n", (pieces, stop)


def test_adapters_and_untied_models(folder, asked, whole, call, tmp_path):
    """An adapter's folder is sampled from as the model that it makes of its base, whose head is no longer tied."""
    model = tiny.with_lora(weights.load(folder))
    tiny.save_adapter(model, folder, tmp_path / "adapter", get("toy"))
    weights.save(weights.load(adapters.source(str(tmp_path / "adapter"))), get("toy"), tmp_path / "merged")
    for name in ("adapter", "merged"):
        assert call("sample", *args(tmp_path / name, asked, tmp_path / f"{name}.jsonl"))[0] == 0
    found = (tmp_path / "adapter.jsonl").read_bytes()
    assert found == (tmp_path / "merged.jsonl").read_bytes() != whole
    assert [line["completions"] for line in lines(found)] == drawn(model, asked)  # the adapters beside the weights


# --- killed, and many --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def part(folder, asked, spawn, tmp_path_factory) -> bytes:
    """The part file of a run that was killed (-9) when it had finished 9 of its 48 completions."""
    out = tmp_path_factory.mktemp("killed") / "out.jsonl"
    process = spawn("tests.test_sample", args(folder, asked, out, batch_size=4), out.with_name("err"))
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and not out.exists()
    return Path(f"{out}.part0").read_bytes()


def main() -> None:
    """sample.py, killed in the middle: what the fixture above starts."""

    def killed(*rest, **how):
        for n, found in enumerate(stream(*rest, **how)):
            if n == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            yield found

    sample.stream = killed
    sample.main()


@pytest.mark.parametrize("torn", [0, 7, 10**6])
def test_killed_runs_go_on(folder, asked, whole, part, call, tmp_path, monkeypatch, torn):
    """Also with the last line torn, or all of the file gone: only what was not finished is written, the file is the same."""
    out, file, numbers = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part0", []
    file.write_bytes(part[: max(0, len(part) - torn)])
    finished = max(0, file.read_bytes().count(b"\n") - 1)
    assert finished == 0 if torn > len(part) else 1 <= finished <= 4
    watched = lambda *rest, **how: (numbers.append(found[0]) or found for found in stream(*rest, **how))  # noqa: E731
    monkeypatch.setattr(sample, "stream", watched)
    status, printed, _ = call("sample", *args(folder, asked, out, batch_size=16))
    assert status == 0 and f"{finished} finished before" in printed
    assert len(numbers) == 2 * (24 - finished) and out.read_bytes() == whole and not file.exists()


def test_a_damaged_line_costs_only_what_stands_behind_it(folder, asked, whole, part, call, tmp_path):
    lines = part.splitlines(keepends=True)
    (tmp_path / "out.jsonl.part0").write_bytes(b"".join(lines[:2]) + lines[2][:9] + b"".join(lines[2:]))
    status, printed, _ = call("sample", *args(folder, asked, tmp_path / "out.jsonl"))
    assert status == 0 and "1 finished before" in printed and (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize("rest", [b"", b'[0, ["a"', b"null\n", b"{}\n"])
def test_a_part_file_without_a_finished_prompt_blocks_nobody(folder, asked, part, call, tmp_path, rest):
    """There is nothing in it to be lost by other settings."""
    (tmp_path / "out.jsonl.part0").write_bytes(part.splitlines(keepends=True)[0] + rest)
    assert call("sample", *args(folder, asked, tmp_path / "out.jsonl", seed=6))[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.slow
def test_a_line_that_no_run_wrote_ends_a_part_file(folder, asked, whole, part, call, tmp_path):
    """Of the right number of texts for one prompt, and nothing else."""
    first, second, *_ = part.splitlines(keepends=True)
    lines = (
        "null",
        "{}",
        "[]",
        "7",
        "[0]",
        "[0, null]",
        "[0, []]",
        '[0, ["a"]]',
        '[0, ["a", 1]]',
        '["0", ["a", "b"]]',
        "[" * 9999,
    )
    for line in (*lines, '[true, ["a", "b"]]', '[0.5, ["a", "b"]]', '{"0": ["a", "b"]}', '[0, ["a", "b"], 1]', first.decode()):
        (tmp_path / "out.jsonl.part0").write_bytes(first + second + line.encode() + b"\n")
        status, printed, err = call("sample", *args(folder, asked, tmp_path / "out.jsonl"))
        assert status == 0 and "1 finished before" in printed, (line, err)
        assert (tmp_path / "out.jsonl").read_bytes() == whole, line


def test_a_refused_run_leaves_no_lock(folder, asked, part, refused, tmp_path):
    """Nor one that fails while it samples; a lock of that name that a user has is not touched."""
    (tmp_path / "out.lock").write_text("mine")
    (tmp_path / "out.part3").write_bytes(part)
    refused("sample", *args(folder, asked, tmp_path / "out", seed=6), says="unfinished samples with another seed")
    assert {p.name for p in tmp_path.iterdir()} == {"out.lock", "out.part3"}
    model = weights.load(folder)
    with torch.no_grad():
        model.blocks[1].mlp.proj.bias.fill_(float("nan"))
    weights.save(model, get("toy"), tmp_path / "model")
    refused("sample", *args(tmp_path / "model", asked, tmp_path / "nan"), says="its weights are damaged")
    assert {p.name for p in tmp_path.iterdir()} == {"out.lock", "out.part3", "model", "nan.part0"}
    assert (tmp_path / "out.lock").read_text() == "mine"


def test_a_finished_run_that_was_not_written_is_written(folder, asked, whole, call, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as disk:
        disk.setattr(sample, "write_whole", full)
        assert call("sample", *args(folder, asked, tmp_path / "out"))[0] == 2
    assert [path.name for path in tmp_path.glob("out*") if path.stat().st_size] == ["out.part0"]
    status, printed, _ = call("sample", *args(folder, asked, tmp_path / "out"))
    assert status == 0 and "24 finished before" in printed and (tmp_path / "out").read_bytes() == whole


@pytest.mark.parametrize("before", [None, 0, 5])
@pytest.mark.slow
def test_two_processes_write_the_same(folder, asked, whole, part, world, tmp_path, before):
    """They also take up what one process, or one of more, had finished."""
    out = tmp_path / "out.jsonl"
    if before is not None:
        Path(f"{out}.part{before}").write_bytes(part)
    good(world(2, "sample", args(folder, asked, out)))
    assert out.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_unfinished_samples_of_other_settings_are_refused(folder, asked, whole, part, call, refused, tmp_path):
    """Every setting that completions follow from; --overwrite throws such samples away."""
    settings = json.loads(part.splitlines()[0])
    draws = {"n", "temperature", "top_k", "top_p", "seed", "stop", "max_new_tokens", "dtype"}
    assert settings.keys() == draws | {"weights_sha256", "prompts_sha256", "tokenizer_sha256"}
    for name in settings:
        file = tmp_path / f"{name}.part3"
        file.write_bytes(part)
        with pytest.raises(UserError, match=f"{name}.part3 holds unfinished samples with another {name} .*--overwrite"):
            Unfinished(str(tmp_path / name), settings | {name: "other"}, False, CPU)
        assert file.read_bytes() == part
    (tmp_path / "out.part3").write_bytes(part)
    refused("sample", *args(folder, asked, tmp_path / "out", seed=6), says="unfinished samples with another seed (5, here 6)")
    status, printed, _ = call("sample", *args(folder, asked, tmp_path / "out", overwrite="true", seed=6))
    assert status == 0 and "0 finished before" in printed and not list(tmp_path.glob("out.part*"))
    assert (tmp_path / "out").read_bytes() != whole


def test_files_of_others_are_left_alone(folder, asked, whole, part, call, refused, tmp_path):
    """Also by --overwrite: names like those of part files are passed over, one that has such a name is in the way."""
    out, others = tmp_path / "out.jsonl", ["out.jsonl.part1.gz", "out.jsonl.partaa", "out.jsonl.part", "xout.jsonl.part1"]
    for name in others:
        (tmp_path / name).write_bytes(b"theirs\n")
    (tmp_path / "out.jsonl.part3").write_bytes(part)
    for rank, theirs in ((0, b"theirs\n"), (7, b"[1, 2]\n"), (7, b'{"prompt": 1}\n')):
        foreign = tmp_path / f"out.jsonl.part{rank}"
        foreign.write_bytes(theirs)
        refused("sample", *args(folder, asked, out, overwrite="true"), says=f"{foreign} was not written by sample.py")
        assert foreign.read_bytes() == theirs and (tmp_path / "out.jsonl.part3").read_bytes() == part
        foreign.unlink()
    (tmp_path / "out.jsonl.part12").write_bytes(part[:9])  # ours, torn
    assert call("sample", *args(folder, asked, out))[0] == 0 and out.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "out.jsonl"])
    assert all((tmp_path / name).read_bytes() == b"theirs\n" for name in others)


def test_two_runs_never_share_a_file(folder, asked, refused, tmp_path):
    with held(tmp_path / "out"):
        refused("sample", *args(folder, asked, tmp_path / "out"), says="another process is writing")


# --- mistakes ----------------------------------------------------------------------------------------------------------


def test_wrong_keys(folder, asked, tmp_path):
    (tmp_path / "file").write_text("")
    for keys, says in (
        ({"out": None}, "key out: --prompts needs --out"),
        ({"prompts": None}, "key prompts: --out needs --prompts"),
        ({"out": asked}, "which key prompts names: name another out"),
        ({"out": tmp_path / "out.jsonl.gz"}, "leave out .gz"),
        ({"out": tmp_path / "file" / "out"}, "cannot be written"),
        ({"out": tmp_path}, "is a folder"),
        ({"top_p": 0}, "key top_p: 0.0 must be above 0"),
    ):
        with pytest.raises(UserError, match=says):
            config.load(sample.Config, args(folder, asked, tmp_path / "out", **keys))
    typed = config.load(sample.Config, flags(model="gpt2", stop="a\\n\\nb"))
    assert typed.stop == "a\n\nb", "a shell has no short way of writing a new line"


def test_mistakes_end_in_one_line(folder, asked, refused, tmp_path):
    path, out = tmp_path / "x.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"prompt": " the"}\n\n{"question": " the"}\n')
    refused("sample", *args(folder, path, out), says="x.jsonl:3: the field 'prompt' is missing")
    path.write_text('{"prompt": " the quux"}\n')
    refused("sample", *args(folder, path, out), says="quux")
    refused("sample", *args(folder, asked, out, max_new_tokens=65), says="a context of 64 tokens")
    assert list(tmp_path.iterdir()) == [path]
    model = weights.load(folder)
    with torch.no_grad():
        model.blocks[1].mlp.proj.bias.fill_(float("nan"))
    weights.save(model, get("toy"), tmp_path / "model")
    refused("sample", *args(tmp_path / "model", asked, out), says="its weights are damaged")


@pytest.mark.slow
def test_damage_that_only_another_rank_meets_is_told(world, tmp_path):
    """An embedding that is nan, of a word in the prompt of rank 1; the output projection has weights of its own."""
    toy, path = get("toy"), tmp_path / "prompts.jsonl"
    words = [t for t in toy.tokens if t.startswith(" ")][:2]
    path.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    model = tiny.gpt(**SIZES, tied=False)
    with torch.no_grad():
        model.wte.weight[toy.encode(words[1])] = float("nan")
    weights.save(model, toy, tmp_path / "model")
    statuses, err = world(2, "sample", args(tmp_path / "model", path, tmp_path / "out", n=1, max_new_tokens=1))
    assert statuses[1] == 2 and statuses[0] != 0 and not (tmp_path / "out").exists()
    assert err.count("error: ") == 1 and "its weights are damaged" in err, err


def test_torchrun_takes_the_command_in_the_docs():
    """Without the -- it refuses --n as a short form of several options of its own."""
    from torch.distributed.run import get_args_parser

    for text in (sample.__doc__, (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()):
        command = next(line for line in text.splitlines() if line.strip().startswith("torchrun") and "sample.py" in line)
        told = get_args_parser().parse_args(shlex.split(command, comments=True)[1:])
        assert told.training_script == "sample.py" and "--n" in told.training_script_args


# --- the terminal ------------------------------------------------------------------------------------------------------


def test_lines_piped_in_are_answered(folder, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" the red\n\n quux\n Mia\n"))
    status, printed, err = call("sample", *flags(model=folder, max_new_tokens=9, temperature=0))
    toy = get("toy")
    want = greedy(weights.load(folder), [toy.encode(p) for p in (" the red", " Mia")], 9, toy.eot)
    assert status == 0 and printed == "".join(toy.decode(ids) + "\n" for ids in want)
    assert "error: ' quux' is not in the toy vocabulary" in err and err.count("error: ") == 1


def test_ctrl_c_stops_the_text_and_not_the_conversation(folder, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" the red\n Mia\n"))
    decode, steps = generate.decode, []

    def interrupted(*rest):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return decode(*rest)

    monkeypatch.setattr(generate, "decode", interrupted)
    status, printed, _ = call("sample", *flags(model=folder, max_new_tokens=9, temperature=0, stop="nothing"))
    assert status == 0 and len(printed.splitlines()) == 2 and len(steps) == 3 + 8


def test_several_processes_cannot_share_a_terminal(folder, refused, monkeypatch):
    monkeypatch.setattr(sample.distributed, "setup", lambda *_: Compute(torch.device("cpu"), torch.float32, 0, 2))
    refused("sample", *flags(model=folder), says="give --prompts and --out")
