"""GPT.stream and sample.py: greedy against transformers, draws that follow from seed and place, files that survive a kill."""

import copy
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
import sample
import weights
from data.tokenizer import get
from model import GPT, LoRAConfig, draw, exponential_noise
from runtime import config
from tests import peers
from tests.conftest import flags, script
from tests.runtime.test_distributed import good

DRAWS = [{}, {"top_k": 7}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.7, "temperature": 1.7}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model of the toy vocabulary, its weights so large that tokens differ in likelihood and change."""
    toy = get("toy")
    model = weights.load("scratch", seed=3, n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=toy.size)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(0)
        for p in model.parameters():
            p.mul_(10) if p.dim() > 1 else p.add_(0.1 * torch.randn(p.shape, generator=noise))  # biases were 0
    path = tmp_path_factory.mktemp("sample") / "model"
    weights.save(model, toy, path)
    return path


@pytest.fixture(scope="module")
def gpt(folder) -> GPT:
    return weights.load(folder)


def prompts(n: int, most: int, size: int) -> dict[int, list[int]]:
    rng = np.random.default_rng(0)
    return {i: rng.integers(0, size, rng.integers(1, most + 1)).tolist() for i in range(n)}


def collect(model: GPT, given: dict, new: int = 20, stop: int = -1, **how) -> dict[tuple[int, int], list[int]]:
    return {(i, j): ids for i, j, ids in model.stream(given, new, stop, **how)}


# --- GPT.stream --------------------------------------------------------------------------------------------------------


def test_greedy_equals_transformers_for_100_prompts(tmp_path):
    pytest.importorskip("transformers")
    peers.gpt2_folder(tmp_path, n_layer=3, n_head=4)
    ours, theirs = weights.load(tmp_path), peers.generator(tmp_path)
    given = prompts(100, 100, 97)
    want = peers.generate(theirs, list(given.values()), 20, 8)
    for size in (0, 1, 7):
        found = collect(ours, given, batch_size=size)
        assert [found[i, 0] for i in given] == want
    assert len({tuple(ids) for ids in want}) > 50


@pytest.mark.parametrize("how", DRAWS)
def test_the_same_samples_whatever_is_in_the_batch(gpt, how):
    """Batch 1 and 16 (rows that stop leave, others come), a part of the prompts, and n = 3 against n = 5."""
    given, stop = prompts(25, 30, gpt.config.vocab_size), 5
    how = {"temperature": 1.0, "seed": 11, **how}
    want = collect(gpt, given, stop=stop, n=3, batch_size=1, **how)
    assert len(want) == 75 and len({len(ids) for ids in want.values()}) > 3
    assert collect(gpt, given, stop=stop, n=3, batch_size=16, **how) == want
    few = {i: given[i] for i in (21, 4, 17)}
    five = collect(gpt, few, stop=stop, n=5, batch_size=3, **how)
    assert {place: ids for place, ids in five.items() if place[1] < 3} == {p: ids for p, ids in want.items() if p[0] in few}
    assert collect(gpt, given, stop=stop, n=3, **how | {"seed": 12}) != want
    assert want[0, 0] != want[0, 1]


def test_a_prompt_is_read_once_and_a_finished_row_makes_room(gpt, monkeypatch):
    read, steps = [], []
    real_read, real_step = GPT._read, GPT._step

    def watch_read(self, given):
        read.extend(map(tuple, given))
        longest = max(map(len, given))
        assert 8 * sum(map(len, given)) >= 7 * longest * len(given), "more than 1/8 of what is read is padding"
        return real_read(self, given)

    def watch_step(self, tokens, lengths, cache):
        x = real_step(self, tokens, lengths, cache)
        assert len(lengths) <= 8
        steps.append(len(lengths))
        return x

    monkeypatch.setattr(GPT, "_read", watch_read)
    monkeypatch.setattr(GPT, "_step", watch_step)
    given = prompts(20, 30, gpt.config.vocab_size)
    found = collect(gpt, given, stop=5, n=3, temperature=1.0, batch_size=8)
    assert sorted(read) == sorted(map(tuple, given.values()))
    assert len(found) == 60 and sum(steps) <= sum(map(len, found.values()))
    full = steps[: len(steps) // 2]
    assert sum(full) / len(full) > 7, "the batch is kept full"
    read.clear()
    collect(gpt, {0: given[0]}, n=30, temperature=1.0, batch_size=8)  # more samples than rows
    assert len(read) == 1


def test_the_last_prompts_wait_for_nobody(gpt, monkeypatch):
    """15 long ones and a short one, which would be too much padding beside them: all 16 are written side by side."""
    rows, real_step = [], GPT._step
    monkeypatch.setattr(GPT, "_step", lambda self, tokens, *rest: (rows.append(len(tokens)), real_step(self, tokens, *rest))[1])
    given = {0: [5] * 30, **{i: [1 + i] * 27 for i in range(1, 15)}, 15: [3, 1]}
    found = collect(gpt, given, new=12, batch_size=20)
    assert rows == [16] * 11
    assert {i: ids for (i, _), ids in found.items()} == dict(enumerate(gpt.generate([*given.values()], 12, -1)))
    rows.clear()
    collect(gpt, given, new=12, n=3, batch_size=50)  # 48 in all
    assert rows == [48] * 11


def test_ends(gpt):
    """At the token `stop`, at max_new_tokens, at the context's end, and where `ended` says so; train mode is given back."""
    free = collect(gpt, {0: [1, 2, 3], 1: [4] * 60, 2: [4] * 64}, new=30)
    assert [len(free[i, 0]) for i in range(3)] == [30, 5, 1]
    stop = free[0, 0][3]
    assert collect(gpt, {0: [1, 2, 3]}, stop=stop)[0, 0] == free[0, 0][: free[0, 0].index(stop)]
    assert collect(gpt, {0: [1, 2, 3]}, ended=lambda ids: len(ids) == 4)[0, 0] == free[0, 0][:4]
    assert collect(gpt, {0: [1, 2, 3]}, new=1)[0, 0] == free[0, 0][:1]
    assert collect(gpt, {}) == {}
    gpt.train()
    next(gpt.stream({0: [1]}, 3, -1)), collect(gpt, {0: [1]})
    assert gpt.training
    gpt.eval()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("kind", ["tied", "untied", "lora"])
def test_matrices_laid_out_for_speed_say_the_same(gpt, kind, rows):
    given, how = prompts(20, 30, gpt.config.vocab_size), {"temperature": 1.0, "n": 2, "n_ids": 60}
    plain = copy.deepcopy(gpt)
    if kind == "untied":
        plain.head.weight = torch.nn.Parameter(plain.wte.weight.flip(0))
    if kind == "lora":
        plain.add_lora(LoRAConfig(4, 8.0))
        with torch.no_grad():
            for name, value in plain.initial_lora(0):
                plain.get_parameter(name).copy_(value if name.endswith("a") else torch.full_like(value, 0.02))
    fast = copy.deepcopy(plain)
    fast.lay_out(rows)
    for layer in (fast.head, fast.blocks[1].attn.qkv):
        assert (layer.shares is not None, layer.weight.is_mkldnn) == (rows == 1, rows > 1)
    for size in {1, 5, rows}:
        assert collect(fast, given, batch_size=size, **how) == collect(plain, given, batch_size=size, **how)
    x = torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))
    for n_ids in (60, None):  # all of them: 65, two shares and a rest
        torch.testing.assert_close(fast.project(x, n_ids), plain.project(x, n_ids))


def test_bfloat16(gpt):
    """Under autocast the same samples on every call and the first tokens mostly those of float32; logits stay float32."""
    given, how = prompts(40, 30, gpt.config.vocab_size), {"temperature": 1.0, "batch_size": 8}
    with torch.autocast("cpu", torch.bfloat16):
        found = collect(gpt, given, **how)
        assert collect(gpt, given, **how) == found
        assert gpt.project(torch.randn(3, 32)).dtype == torch.float32
    want = collect(gpt, given, **how)
    assert found != want, "autocast did nothing"
    assert sum(found[place][0] == want[place][0] for place in want) >= 32  # of 40


def test_n_ids_leaves_padded_vocabulary_out(gpt):
    found = collect(gpt, prompts(20, 9, 30), n_ids=30, temperature=5.0)
    assert max(max(ids) for ids in found.values()) == 29


def test_draws_follow_the_distribution():
    """Frequencies of 60,000 draws against softmax: chi-square of 5 degrees of freedom below its 99.9th percentile, 20.5."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0, 1.5])
    places = [(i, j, k) for i in range(100) for j in range(6) for k in range(100)]
    for how, p in (
        ({"temperature": 1.0}, logits.softmax(0)),
        ({"temperature": 0.5}, (2 * logits).softmax(0)),
        ({"temperature": 1.0, "top_k": 3}, torch.tensor([1.0, 1, 0, 0, 0, 1]) * logits.exp()),
        ({"temperature": 1.0, "top_p": 0.7}, torch.tensor([1.0, 0, 0, 0, 0, 1]) * logits.exp()),  # 0.46 + 0.28
    ):
        p = p / p.sum()
        counts = torch.bincount(torch.tensor(draw(logits.repeat(len(places), 1), places, **how)), minlength=6)
        assert not counts[p == 0].any()
        want = p[p > 0] * len(places)
        assert ((counts[p > 0] - want) ** 2 / want).sum() < 20.5, how


@pytest.mark.parametrize("size", [6, 1000, 9000])
@pytest.mark.parametrize(
    "how", [{}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}, {"top_k": 10**6, "top_p": 0.99}]
)
def test_a_draw_written_out_plainly(size, how):
    """Sort, keep the top_k, then as many as have top_p, and take the largest p / noise; past the widths sorted in parts."""
    logits = 3 * torch.randn(20, size, generator=torch.Generator().manual_seed(size))
    places = [(i, i % 3, 7 * i) for i in range(20)]
    noise = exponential_noise(torch.arange(size), places, 4).tolist()
    want = []
    for row, e in zip(logits, noise, strict=True):
        p = (row.double() / 0.7).softmax(0).tolist()
        order = sorted(range(size), key=lambda i: -p[i])[: how.get("top_k", size)]
        total, kept, sum_kept = sum(p[i] for i in order), [], 0.0
        for i in order:
            if sum_kept < how.get("top_p", 1.0) * total:
                kept.append(i)
                sum_kept += p[i]
        want.append(max(kept, key=lambda i: p[i] / e[i]))
    assert draw(logits, places, temperature=0.7, seed=4, **how) == want
    for cold in (0, 1e-50, 1e-40, 1e-7):
        assert draw(logits, places, temperature=cold, **how) == logits.argmax(-1).tolist()
    if size > 6:
        assert len(set(want)) > 5 and draw(logits, places, temperature=0.7, seed=5, **how) != want


@pytest.mark.parametrize("how", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 20, "top_p": 0.9}, {"top_k": 1}, {"top_p": 1e-9}])
def test_what_is_kept_is_what_transformers_keeps(how):
    """Over a vocabulary with a long tail, past the widths at which it is sorted in parts."""
    transformers = pytest.importorskip("transformers")
    g = torch.Generator().manual_seed(0)
    logits = torch.cat([4 * torch.randn(1, 300, generator=g), torch.randn(1, 9000, generator=g)], 1) / 2
    kept = logits
    if "top_k" in how:
        kept = transformers.TopKLogitsWarper(how["top_k"])(None, kept)
    if "top_p" in how:
        kept = transformers.TopPLogitsWarper(how["top_p"])(None, kept)
    allowed = set(kept[0].isfinite().nonzero()[:, 0].tolist())
    places = [(0, 0, k) for k in range(500)]
    drawn = set(draw(logits.expand(500, -1), places, temperature=1.0, **how))
    assert drawn <= allowed and len(drawn) > min(len(allowed), 150) / 2


def test_noise_is_exponential_and_unlike_from_place_to_place():
    places = [(i, j, k) for i in range(4) for j in range(2) for k in range(4)]
    e = exponential_noise(torch.arange(20000), places, 0)
    assert e.shape == (32, 20000) and e.min() > 0 and e.isfinite().all()
    u, n = (-e).exp(), e.numel()
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 149  # 99 degrees of freedom: the 99.9th percentile
    by_place, by_id = torch.corrcoef(e), torch.corrcoef(e[:, :200].T)
    assert (by_place - torch.eye(32)).abs().max() < 6 / 20000**0.5
    assert (by_id - torch.eye(200)).abs().mean() < 1 / 32**0.5
    few = exponential_noise(torch.tensor([[7, 3], [3, 19999]]), places[:2], 0)
    assert torch.equal(few, torch.stack([e[0, [7, 3]], e[1, [3, 19999]]])), "a function of the id, not of where it stands"
    assert not torch.equal(exponential_noise(torch.arange(9), places, 1), e[:, :9])


@pytest.mark.parametrize("how", [{}, *({"temperature": 1.0, **how} for how in DRAWS)])
@pytest.mark.parametrize("name", ["blocks.0.mlp.fc.bias", "ln_f.bias", "wte.weight 50", "wpe.weight 3"])
def test_a_model_of_nan_says_so(folder, name, how):
    """Whichever weights it is: all of them, those of a token that no prompt has, those of a place behind the prompt."""
    model = weights.load(folder)
    name, _, row = name.partition(" ")
    with torch.no_grad():
        damaged = model.get_parameter(name)
        (damaged[int(row)] if row else damaged).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        list(model.stream({0: [1], 1: [2, 4]}, 5, -1, **how))


@pytest.mark.gpu
def test_gpu_draws_are_those_of_the_cpu(gpt):
    given = prompts(30, 30, gpt.config.vocab_size)
    how = {"temperature": 1.0, "n": 2, "batch_size": 16}
    want = collect(gpt, given, **how)
    found = collect(copy.deepcopy(gpt).cuda(), given, **how)
    assert sum(found[place] == want[place] for place in want) >= 58  # of 60: rounding may turn a draw


# --- sample.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    """24 prompts of 0 to 60 words with fields of their own."""
    toy, rng = get("toy"), np.random.default_rng(1)
    words = [t for t in toy.tokens if t.startswith(" ")]
    path = tmp_path_factory.mktemp("asked") / "prompts.jsonl"
    records = [{"id": i, "prompt": "".join(rng.choice(words, 60 * i // 23)), "answer": [i, "é"]} for i in range(24)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def args(folder, asked, out, /, **keys) -> list[str]:
    return flags(**{"model": folder, "prompts": asked, "out": out, "n": 2, "max_new_tokens": 12, "seed": 5, **keys})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder, asked, tmp_path_factory) -> bytes:
    """What an unbroken run writes."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert script("sample", *args(folder, asked, out)) == 0
    return out.read_bytes()


def test_a_line_a_prompt_with_its_own_fields(folder, asked, whole, call, tmp_path):
    out = tmp_path / "new" / "out.jsonl"
    status, printed, _ = call("sample", *args(folder, asked, out, batch_size=1))
    assert status == 0 and out.read_bytes() == whole and [p.name for p in out.parent.iterdir()] == ["out.jsonl"]
    assert "3 of 24 prompts lost their start" in printed  # room for 53 of at most 60 tokens
    found = lines(out)
    for record, was in zip(found, lines(asked), strict=True):
        completions = record.pop("completions")
        assert record == was and len(completions) == 2 and all(isinstance(c, str) for c in completions)
    assert call("sample", *args(folder, asked, out, limit=3))[0] == 0
    assert out.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])


def test_an_empty_prompt_is_the_start_of_a_text(gpt, whole):
    toy = get("toy")
    found = collect(gpt, {0: [toy.eot]}, 12, toy.eot, n=2, temperature=1.0, seed=5)
    assert json.loads(whole.splitlines()[0])["completions"] == [toy.decode(found[0, j]) for j in range(2)]


def test_a_stop_text_ends_a_completion(folder, asked, whole, call, tmp_path):
    texts = [c for line in whole.splitlines() for c in json.loads(line)["completions"]]
    assert len(texts) == 48 and len(set(texts)) > 40
    long = max(texts, key=lambda t: len(t.split())).split()
    middle = len(long) // 2
    over_two = f"{long[middle][-1]} {long[middle + 1]}"  # the end of a token, and the next one
    for stop in (long[middle], over_two):
        assert call("sample", *args(folder, asked, tmp_path / "out", stop=stop))[0] == 0
        cut = [c for line in lines(tmp_path / "out") for c in line["completions"]]
        assert cut == [t.partition(stop)[0] for t in texts] and cut != texts


def test_a_backslash_n_in_the_stop_text_is_a_new_line():
    """As in a prompt that is typed: a shell has no short way of writing one."""
    for given, want in (("a\\n\\nb", "a\n\nb"), ("a\nb", "a\nb"), ("", "")):
        cfg = config.load(sample.Config, flags(model="gpt2", stop=given), prog="sample.py")
        assert cfg.stop == want


def test_stop_texts_over_several_tokens():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    text = sample.Text(Bytes(), "é\n\n")
    tokens = list("caf\u00e9\n\n\nx".encode())
    ends = [n for n in range(1, len(tokens) + 1) if text.ended(tokens[:n])]
    assert ends == [7] and text.final(tokens) == "caf"
    assert [text.certain(tokens[:n]) for n in (3, 4, 5, 6, 7)] == ["caf"] * 5, (
        "no half character, no beginning of the stop text"
    )
    assert text.certain(list("caf\u00e9\nx".encode())) == "caf\u00e9\nx"


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
    stream = GPT.stream

    def killed(self, *rest, **how):
        for n, found in enumerate(stream(self, *rest, **how)):
            if n == 9:
                os.kill(os.getpid(), signal.SIGKILL)
            yield found

    GPT.stream = killed
    sample.main()


@pytest.mark.parametrize("torn", [0, 7, 10**6])
def test_killed_runs_go_on(folder, asked, whole, part, call, tmp_path, monkeypatch, torn):
    """Also with the last line torn, or all of the file gone: only what was not finished is written, the file is the same."""
    out, file, drawn = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part0", []
    file.write_bytes(part[: max(0, len(part) - torn)])
    finished = max(0, file.read_bytes().count(b"\n") - 1)
    assert finished == 0 if torn > len(part) else 1 <= finished <= 4
    stream = GPT.stream
    monkeypatch.setattr(GPT, "stream", lambda *rest, **how: (drawn.append(f[0]) or f for f in stream(*rest, **how)))
    status, printed, _ = call("sample", *args(folder, asked, out, batch_size=16))
    assert status == 0 and f"{finished} finished before" in printed
    assert len(drawn) == 2 * (24 - finished) and out.read_bytes() == whole and not file.exists()


def test_a_finished_run_that_was_not_written_is_written(folder, asked, whole, call, tmp_path, monkeypatch):
    """On a terminal, where nothing is left to show the progress of."""
    out, tty = tmp_path / "out.jsonl", io.StringIO()
    with monkeypatch.context() as full:
        full.setattr(sample, "write_whole", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        assert call("sample", *args(folder, asked, out))[0] == 2 and not out.exists()
    monkeypatch.setattr(tty, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", tty)
    status, printed, _ = call("sample", *args(folder, asked, out))
    assert status == 0 and "24 finished before" in printed and out.read_bytes() == whole and "sampling" not in tty.getvalue()


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", 0.5), ("seed", 6), ("n", 3), ("top_p", 0.9), ("top_k", 9), ("stop", "x"), ("max_new_tokens", 11),
     ("dtype", "bfloat16"), ("limit", 20), ("model", "another")],
)  # fmt: skip
def test_unfinished_samples_of_other_settings_are_not_mixed(folder, asked, part, refused, tmp_path, key, value):
    out, file = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part3"
    file.write_bytes(part)
    if key == "model":
        model = weights.load(folder)
        with torch.no_grad():
            model.wpe.weight[0, 0] += 1
        weights.save(model, get("toy"), value := tmp_path / "model")
    line = refused("sample", *args(folder, asked, out, **{key: value}), says="out.jsonl.part3 holds unfinished samples with ")
    assert {"limit": "prompts", "model": "weights"}.get(key, key) in line and "--overwrite" in line
    assert file.read_bytes() == part and not out.exists()


def test_files_of_others_are_left_alone(folder, asked, whole, part, call, refused, tmp_path):
    """Also by --overwrite: names like those of part files are passed over, one that has such a name is in the way."""
    out, others = tmp_path / "out.jsonl", ["out.jsonl.part1.gz", "out.jsonl.partaa", "out.jsonl.part", "xout.jsonl.part1"]
    for name in others:
        (tmp_path / name).write_bytes(b"theirs\n")
    (tmp_path / "out.jsonl.part3").write_bytes(part)
    for theirs in (b"theirs\n", b"[1, 2]\n", b'{"prompt": 1}\n'):
        for rank in (0, 7):
            foreign = tmp_path / f"out.jsonl.part{rank}"
            foreign.write_bytes(theirs)
            refused("sample", *args(folder, asked, out, overwrite="true"), says=f"{foreign} was not written by sample.py")
            assert foreign.read_bytes() == theirs and (tmp_path / "out.jsonl.part3").read_bytes() == part
            foreign.unlink()
    (tmp_path / "out.jsonl.part12").write_bytes(part[:9])  # ours, torn
    assert call("sample", *args(folder, asked, out))[0] == 0 and out.read_bytes() == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "out.jsonl"])
    assert all((tmp_path / name).read_bytes() == b"theirs\n" for name in others)


def test_overwrite_throws_unfinished_samples_away(folder, asked, whole, part, call, tmp_path):
    (tmp_path / "out.jsonl.part3").write_bytes(part)
    status, printed, _ = call("sample", *args(folder, asked, tmp_path / "out.jsonl", overwrite="true", seed=6))
    assert status == 0 and "0 finished before" in printed and [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    assert (tmp_path / "out.jsonl").read_bytes() != whole


@pytest.mark.parametrize("before", [None, 0, 5])
def test_two_processes_write_the_same(folder, asked, whole, part, world, tmp_path, before):
    """And take up what one process, or one of more, had finished."""
    out = tmp_path / "out.jsonl"
    if before is not None:
        Path(f"{out}.part{before}").write_bytes(part)
    good(world(2, "sample", args(folder, asked, out)))
    assert out.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_full_disk_loses_nothing_finished(folder, asked, whole, spawn, call, tmp_path):
    out, err = tmp_path / "out.jsonl", tmp_path / "err"
    full = spawn("sample", args(folder, asked, out), err, limit=1500)
    full.join(120)
    line = err.read_text().strip().splitlines()[-1]
    assert full.exitcode == 2 and line.startswith("error: no space left on the disk") and not out.exists()
    status, printed, _ = call("sample", *args(folder, asked, out))
    assert status == 0 and " 0 finished before" not in printed and out.read_bytes() == whole


def test_adapters_and_an_output_projection_of_its_own(folder, asked, whole, call, tmp_path):
    """An adapter's folder is sampled from as the model that it makes of its base; so is a model whose head is not tied."""
    toy, base = get("toy"), weights.load(folder)
    model = weights.load(folder)
    model.add_lora(LoRAConfig(4, 8.0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.3, generator=generator)
    sha = weights.fingerprint(base)
    model.origin = adapters.Origin(str(folder), sha, sha)
    adapters.save(model, toy, tmp_path / "adapter")
    merged = adapters.load(str(tmp_path / "adapter"))
    assert not merged.config.tied
    weights.save(merged, toy, tmp_path / "merged")
    for name in ("adapter", "merged"):
        assert call("sample", *args(tmp_path / name, asked, tmp_path / f"{name}.jsonl"))[0] == 0
    found = (tmp_path / "adapter.jsonl").read_bytes()
    assert found == (tmp_path / "merged.jsonl").read_bytes() != whole
    given = {i: toy.encode(r["prompt"])[-53:] or [toy.eot] for i, r in enumerate(lines(asked))}
    want = collect(model.eval(), given, 12, toy.eot, n=2, temperature=1.0, seed=5)  # the adapters beside the weights
    texts = [[toy.decode(want[i, j]) for j in range(2)] for i in given]
    assert texts == [json.loads(line)["completions"] for line in found.splitlines()]


def test_two_runs_never_share_a_file(folder, asked, refused, tmp_path):
    import fcntl

    with open(tmp_path / "out.part0", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("sample", *args(folder, asked, tmp_path / "out"), says="another process is writing")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"temperature": -0.1}, "key temperature: -0.1 is too small"),
        ({"temperature": "nan"}, "key temperature: nan"),
        ({"temperature": "inf"}, "key temperature: inf"),
        ({"top_p": 0}, "key top_p: 0.0 must be above 0"),
        ({"top_p": 1.01}, "key top_p: 1.01 must be"),
        ({"top_p": "nan"}, "key top_p: nan"),
        ({"top_k": -1}, "key top_k: -1"),
        ({"n": 0}, "key n: 0"),
        ({"max_new_tokens": 0}, "key max_new_tokens: 0"),
        ({"max_new_tokens": 65}, "a context of 64 tokens"),
        ({"batch_size": 0}, "key batch_size: 0"),
        ({"seed": 2**63}, "key seed: "),
        ({"model": "nowhere/model"}, "nowhere/model"),
        ({"out": None}, "key out: --prompts needs --out"),
        ({"prompts": None}, "key prompts: --out needs --prompts"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"temprature": 1}, "'temperature'"),
    ],
)
def test_settings(folder, asked, refused, tmp_path, keys, says):
    refused("sample", *args(folder, asked, tmp_path / "out.jsonl", **keys), says=says)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "x.jsonl: an empty file"),
        ('{"prompt": " the"}\n{"prompt"\n', "x.jsonl:2: not JSON"),
        ('{"prompt": " the"}\n\n{"question": " the"}\n', "x.jsonl:3: the field 'prompt' is missing"),
        ('{"prompt": 3}\n', "x.jsonl:1: the field 'prompt' must be text"),
        ('["prompt"]\n', "x.jsonl:1: a list where"),
        ('{"prompt": " the quux"}\n', "quux"),
    ],
)
def test_files(folder, refused, tmp_path, content, says):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    refused("sample", *args(folder, path, tmp_path / "out.jsonl"), says=says)
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written(folder, asked, refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused("sample", *args(folder, asked, tmp_path / "file" / "out"), says="cannot be written")
    refused("sample", *args(folder, asked, tmp_path), says="is a folder")
    refused("sample", *args(folder, asked, asked), says="is the prompts file")
    refused("sample", *args(folder, asked, tmp_path / "out.jsonl.gz"), says="leave out .gz")


def test_damaged_weights(folder, asked, refused, tmp_path):
    model = weights.load(folder)
    with torch.no_grad():
        model.wte.weight[3] = float("nan")
        model.blocks[1].mlp.proj.bias.fill_(float("nan"))
    weights.save(model, get("toy"), tmp_path / "model")
    refused("sample", *args(tmp_path / "model", asked, tmp_path / "out"), says="its weights are damaged")


def test_damage_that_only_another_rank_meets_is_told(world, tmp_path):
    """An embedding that is nan, of a word in the prompt of rank 1; the output projection has weights of its own."""
    toy, path = get("toy"), tmp_path / "prompts.jsonl"
    words = [t for t in toy.tokens if t.startswith(" ")][:2]
    path.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    model = weights.load("scratch", n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=toy.size, tied=False)
    with torch.no_grad():
        model.wte.weight[toy.encode(words[1])] = float("nan")
    weights.save(model, toy, tmp_path / "model")
    statuses, err = world(2, "sample", args(tmp_path / "model", path, tmp_path / "out", n=1, max_new_tokens=1))
    assert statuses[1] == 2 and statuses[0] != 0 and not (tmp_path / "out").exists()
    assert err.count("error: ") == 1 and "its weights are damaged" in err, err


def test_help_says_what_becomes_of_a_finished_file(call):
    status, printed, _ = call("sample", "--help")
    assert status == 0 and "one that is there is replaced when the new one is whole" in " ".join(printed.split())


def test_torchrun_takes_the_command_that_is_told():
    """Without the -- it refuses --n as a short form of several options of its own."""
    from torch.distributed.run import get_args_parser

    for text in (sample.__doc__, (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()):
        command = next(line for line in text.splitlines() if line.strip().startswith("torchrun") and "sample.py" in line)
        told = get_args_parser().parse_args(shlex.split(command, comments=True)[1:])
        assert told.training_script == "sample.py" and "--n" in told.training_script_args


# --- the terminal ------------------------------------------------------------------------------------------------------


def test_lines_piped_in_are_answered(folder, gpt, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" the red\n\n quux\n Mia\n"))
    status, printed, err = call("sample", *flags(model=folder, max_new_tokens=9, temperature=0))
    toy = get("toy")
    want = [toy.decode(gpt.generate([toy.encode(p)], 9, toy.eot)[0]) for p in (" the red", " Mia")]
    assert status == 0 and printed == "".join(w + "\n" for w in want)
    assert "error: ' quux' is not in the toy vocabulary" in err and err.count("error: ") == 1


def test_ctrl_c_stops_the_text_and_not_the_conversation(folder, call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" the red\n Mia\n"))
    step, steps = GPT._step, []

    def interrupted(self, *rest):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *rest)

    monkeypatch.setattr(GPT, "_step", interrupted)
    status, printed, _ = call("sample", *flags(model=folder, max_new_tokens=9, temperature=0, stop="nothing"))
    assert status == 0 and len(printed.splitlines()) == 2 and len(steps) == 3 + 8


def test_several_processes_cannot_share_a_terminal(folder, refused, monkeypatch):
    from runtime.distributed import Compute

    monkeypatch.setattr(sample.distributed, "setup", lambda *_: Compute(torch.device("cpu"), torch.float32, 0, 2))
    refused("sample", *flags(model=folder), says="give --prompts and --out")
