"""bench.py: that both sides get the same work, that the floor counts what it says, that every suite runs to its table."""

import json
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import weights
from bench import __main__ as bench
from data import tokenizer
from data.batch import collate
from data.encode import Encoded, encode
from data.plan import epoch_order
from runtime.run import Run
from tests import peers

HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_harmless_base_test.jsonl.gz"


@pytest.fixture
def small(monkeypatch):
    """Short generated data, and measurements in this process instead of fresh ones."""
    monkeypatch.setattr(bench, "SHARED", Path("nowhere"))
    monkeypatch.setattr(bench, "LENGTHS", {kind: (2.5, 0.5, 2.0, 0.5) for kind in bench.LENGTHS})
    monkeypatch.setattr(bench, "CONTEXT", 128)
    monkeypatch.setitem(tokenizer.KNOWN, "ids", lambda: peers.Ids(bench.VOCAB))
    for name in ("log_step", "save", "finish"):  # ours_train changes them for its process
        monkeypatch.setattr(Run, name, getattr(Run, name))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def measure(temp, do, job):
        saved, job = Run.log_step, json.loads(json.dumps(job, default=str))
        if do == "ours_train":  # a process holds its run folder's lock until it ends
            job["arguments"]["out_dir"] = tempfile.mkdtemp(dir=temp)
        result = getattr(bench, do)(job)
        Run.log_step = saved
        return bench.timed(result | {"peak_mb": bench.peak_mb("cpu")}, job["warmup"])

    monkeypatch.setattr(bench, "measure", measure)


def config(**settings):
    base = {"init": "tiny", "pairs": 4, "batch_size": 2, "repeats": 1, "threads": 1, "device": "cpu", "dtype": "float32"}
    made = bench.Config(**base | settings)
    made.check()
    return made


def item(p, *completions):
    return Encoded(np.arange(p, dtype=np.int32), [np.arange(c, dtype=np.int32) for c in completions], 0, 0)


def test_flops_are_what_torch_counts():
    """Against torch's own count of a forward's matrix products; attention apart, where torch counts every key of a row."""
    shape, one = (3, 2, 32), item(17, 9)
    sizes = dict(zip(("n_layer", "n_head", "n_embd"), shape, strict=True))
    model = weights.load("scratch", block_size=64, vocab_size=bench.VOCAB, **sizes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(collate([[one]]))
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in counts.items() if "attention" in op)
    fed = 17 + 8
    keys = fed * (fed + 1) / 2
    by_hand = 3 * 4 * 32 * keys  # layers, 2 for q k and 2 for p v, width
    assert bench.flops([one], shape, train=False) - by_hand == counter.get_total_flops() - attention
    assert bench.flops([one], shape, train=True) == 3 * bench.flops([one], shape, train=False)


def test_flops_count_a_shared_prompt_once():
    shape = (3, 2, 32)
    apart = bench.flops([item(17, 9), item(17, 5)], shape, train=False)
    prompt = 3 * (24 * 32**2 * 17 + 4 * 32 * 17 * 18 / 2)
    assert bench.flops([item(17, 9, 5)], shape, train=False) == pytest.approx(apart - prompt, rel=1e-12)


def test_generated_lengths_follow_the_data():
    ids = peers.Ids(bench.VOCAB)
    rows = bench.generated("hh", 2000, 0, ids)
    for fields, (mean, sd) in ((["prompt"], bench.LENGTHS["hh"][:2]), (["chosen", "rejected"], bench.LENGTHS["hh"][2:])):
        logs = np.log([len(ids.encode(r[f])) for r in rows for f in fields])
        assert abs(logs.mean() - mean) < 0.1 and abs(logs.std() - sd) < 0.1
    assert rows == bench.generated("hh", 2000, 0, ids) != bench.generated("hh", 2000, 1, ids)


def test_both_sides_get_the_same_examples_in_one_order(small, tmp_path):
    work = bench.prepare(config(seed=3), tmp_path, "tiny", "hh", "dpo", 6)
    ours, theirs = ([json.loads(line) for line in f.read_text().splitlines()] for f in (work.ours, work.theirs))
    assert [ours[i] for i in epoch_order(list(range(6)), 3, 0)] == theirs != ours
    ids = peers.Ids(bench.VOCAB)
    assert [i.prompt.tolist() for i in work.items] == [ids.encode(r["prompt"]) for r in theirs]
    assert work.items[0].completions[1].tolist() == [*ids.encode(theirs[0]["rejected"]), ids.eot]


@pytest.mark.parametrize("suite", ["dpo", "sft"])
def test_training_suites_do_the_same_work(suite, small, monkeypatch, tmp_path, capsys):
    pytest.importorskip("trl")
    monkeypatch.setattr(bench, "TRL_SETTINGS", dict(list(bench.TRL_SETTINGS.items())[2:]))
    report = bench.compare(config(suite=suite, lr=1e-3), tmp_path)
    same = report["same_work"]
    assert same["largest"]["loss"] < 1e-4 and same["first_step"]["grad_norm"] < 1e-3
    assert suite == "sft" or same["largest"]["logps/chosen"] < 1e-2
    ours, *theirs = report["rows"]
    assert len(report["results"]["ours"][0]["records"]) == 3  # one step to warm up, two that count
    assert ours["per_s"] > 0 and theirs[0]["floors"] > 0 and report["speed_ratio"] > 0
    out = capsys.readouterr().out
    assert "x floor" in out and "generated tokens" in out and "largest difference: loss" in out


def test_mcq_suite_does_the_same_work(small, monkeypatch, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(bench, "HARNESS_SETTINGS", {"lm_eval, batch 4": {"batch_size": 4}})
    report = bench.compare(config(suite="mcq", pairs=12), tmp_path)
    assert report["same_work"]["largest"] < 1e-3
    assert report["same_work"]["accuracy"]["ours"] == report["same_work"]["accuracy"]["theirs"]
    assert len(report["results"]["ours"][0]["logps"]) == 12


@pytest.mark.parametrize("batch_size", [1, 3])
def test_sample_suite_writes_the_same(batch_size, small, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "NEW_TOKENS", 9)
    report = bench.sampling(config(suite="sample", batch_size=batch_size), tmp_path)
    (found,) = report["sizes"].values()
    against = found["against"]
    assert "transformers as it comes" in against and len(against) <= 2 and found["floor_s"] > 0
    assert all(ratios["same_completions"] == 1 and ratios["speed_ratio"] > 0 for ratios in against.values())
    assert [len(ids) for ids in found["results"]["ours"][0]["tokens"]] == [9] * 4
    out = capsys.readouterr().out
    assert f"batch {batch_size}: 4 prompts" in out and "trying transformers as it comes" in out and "floor: " in out


def test_gpu_suite_runs_on_a_cpu(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "GPU_SETTINGS", {"plain": {}, "packed": {"row_len": 256}, "unheard of": {"no_such": 1}})
    report = bench.gpu(config(suite="gpu", models="tiny", peer="none", pairs=2), tmp_path)
    cases = [row["case"] for row in report["rows"]]
    assert cases[:2] == ["dpo hh tiny plain", "sft hh tiny plain"] and "sft hellaswag tiny packed" in cases
    assert all(0 < row["mfu"] < 1 and row["tokens_per_s"] > 0 for row in report["rows"])
    assert len(cases) == 8 and len(report["left_out"]) == 4 and "no key no_such" in report["left_out"][0]
    assert "sampling" in capsys.readouterr().out
    late = bench.gpu(config(suite="gpu", models="tiny", peer="none", pairs=2, minutes=0.0), tmp_path)
    assert not late["rows"] and len(late["left_out"]) == 12


def test_a_measurement_is_a_process_of_its_own(tmp_path):
    """Its memory is its own, not what this process has grown to; a failure comes back as its last line."""
    job = {"threads": 1, "device": "cpu", "dtype": "float32", "warmup": 1}
    result = bench.measure(tmp_path, "matmul", job)
    assert result["flops_per_s"] > 1e9 and result["threads"] == 1 and 50 < result["peak_mb"] < 1000
    assert "no_such_dtype" in bench.measure(tmp_path, "matmul", job | {"dtype": "no_such_dtype"})["error"]


def test_real_texts_have_the_same_tokens_in_trl(monkeypatch, tmp_path):
    """HH dialogues through TRL's own tokenization, with the tokenizer that we write for it."""
    pytest.importorskip("trl")
    if not HH.exists():
        pytest.skip("the HH file is not there")
    gpt2 = tokenizer.get("gpt2")
    rows = bench.real(str(HH), "hh", 40, 0, gpt2)
    peers.gpt2_folder(tmp_path, n_layer=1, n_embd=4, vocab_size=gpt2.size)
    gpt2.save(tmp_path)
    trainer, _ = peers.dpo_trainer(tmp_path, rows, tmp_path / "out", precompute_ref_log_probs=False)
    examples = [bench_example(r) for r in rows]
    items, _ = encode(examples, gpt2, bench.CONTEXT, "drop")
    for one, row in zip(items, trainer.train_dataset, strict=True):
        ids = [one.prompt.tolist(), *(c.tolist() for c in one.completions)]
        assert ids == [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]


def bench_example(row):
    from data import Example

    return Example(row["prompt"], (row["chosen"], row["rejected"]))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--suite", "dpo", "--peer", "lm_eval"], "key peer"),
        (["--models", "gpt2,gpt3"], "key models"),
        (["--pairs", "7", "--peer", "none"], "no multiple"),
        (["--batch_size", "12", "--pairs", "24"], "key batch_size"),
        (["--init", "gpt7", "--peer", "none"], "did you mean gpt2"),
    ],
)
def test_mistakes_are_one_line(arguments, said, monkeypatch, small):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(bench.UserError, match=said):
        bench.main()
