"""The bench: both sides get the same work, the floor counts what it says, every suite runs to its table."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import weights
from base.errors import UserError
from bench import common, gpu, mcq, peers, rows, sample, training
from data import tokenizer
from data.batch import collate
from data.encode import Encoded, encode
from model import GPTConfig
from runtime.run import Run
from tests.conftest import SHARED
from tests.peers import gpt2_folder

pytestmark = pytest.mark.slow


@pytest.fixture
def small(monkeypatch):
    """Short generated texts, and measurements in this process instead of fresh ones."""
    monkeypatch.setattr(common, "SHARED", Path("nowhere"))
    monkeypatch.setattr(common, "LENGTHS", {kind: (2.5, 0.5, 2.0, 0.5) for kind in common.LENGTHS})
    monkeypatch.setattr(common, "CONTEXT", 128)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def measure(function, job):
        if "out_dir" in job.get("arguments", {}):  # a process holds its run folder's lock until it ends
            job["arguments"]["out_dir"] = tempfile.mkdtemp(dir=job["arguments"]["out_dir"].parent)
        with monkeypatch.context() as patch:
            for name in ("log_step", "save", "finish"):  # ours_train changes them for its process
                patch.setattr(Run, name, getattr(Run, name))
            return common.timed(function(job)) | {"peak_mb": common.peak_mb("cpu")}

    monkeypatch.setattr(common, "measure", measure)


def config(**settings):
    base = {"init": "tiny", "pairs": 4, "batch_size": 2, "repeats": 1, "threads": 1, "device": "cpu", "dtype": "float32"}
    made = common.Config(**base | settings)
    made.check()
    return made


def item(p, *completions):
    return Encoded(np.arange(p, dtype=np.int32), [np.arange(c, dtype=np.int32) for c in completions], 0, 0)


def test_flops():
    """Against torch's own count of a forward's matrix products; attention apart, where torch counts every key of a row."""
    shape, one = GPTConfig(n_layer=3, n_head=2, n_embd=32, block_size=64, vocab_size=101), item(17, 9)
    model = weights.load("scratch", n_layer=3, n_head=2, n_embd=32, block_size=64, vocab_size=101)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(collate([[one]]))
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in counts.items() if "attention" in op)
    by_hand = 3 * 4 * 32 * 25 * 26 / 2  # layers, 2 for q k and 2 for p v, width, keys of 17 + 8 tokens
    assert common.flops([one], shape, train=False) - by_hand == counter.get_total_flops() - attention
    assert common.flops([one], shape, train=True) == 3 * common.flops([one], shape, train=False)
    apart = common.flops([one, item(17, 5)], shape, train=False)
    prompt = 3 * (24 * 32**2 * 17 + 4 * 32 * 17 * 18 / 2)
    assert common.flops([item(17, 9, 5)], shape, train=False) == pytest.approx(apart - prompt, rel=1e-12), (
        "a prompt counts once"
    )


def test_generated_lengths_follow_the_data():
    gpt2 = tokenizer.get("gpt2")
    examples = common.generated("hh", 2000, 0, gpt2)
    p_mean, p_sd, c_mean, c_sd = common.LENGTHS["hh"]
    for texts, mean, sd in (
        ([e.prompt for e in examples], p_mean, p_sd),
        ([c for e in examples for c in e.completions], c_mean, c_sd),
    ):
        logs = np.log([len(ids) for ids in gpt2.encode_batch(texts)])
        assert abs(logs.mean() - mean) < 0.1 and abs(logs.std() - sd) < 0.1
    assert examples[:9] == common.generated("hh", 9, 0, gpt2) != common.generated("hh", 9, 1, gpt2)


@pytest.mark.parametrize("source", ["file", "generated"])
def test_trl_makes_the_same_tokens(source, tmp_path):
    """Through TRL's own tokenization, with the tokenizer that we write for it."""
    pytest.importorskip("trl")
    gpt2, path = tokenizer.get("gpt2"), SHARED / "data" / common.FILES["hh"]
    if source == "file" and not path.exists():
        pytest.skip(f"{path} is not there")
    examples = common.generated("hh", 40, 0, gpt2) if source == "generated" else common.real(str(path), "hh", 40, 0, gpt2)
    gpt2_folder(tmp_path, n_layer=1, n_embd=4, vocab_size=gpt2.size)
    gpt2.save(tmp_path)
    rows = [common.record(e) for e in examples]
    trainer, _ = peers.dpo_trainer(tmp_path, rows, tmp_path / "out", precompute_ref_log_probs=False)
    items, _ = encode(examples, gpt2, common.CONTEXT, "drop")
    for one, row in zip(items, trainer.train_dataset, strict=True):
        ids = [one.prompt.tolist(), *(c.tolist() for c in one.completions)]
        assert ids == [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]


@pytest.mark.parametrize("suite", ["dpo", "sft"])
def test_training_suites_do_the_same_work(suite, small, monkeypatch, tmp_path, capsys):
    pytest.importorskip("trl")
    monkeypatch.setattr(training, "TRL_SETTINGS", dict(list(training.TRL_SETTINGS.items())[2:]))
    report = training.suite(config(suite=suite, lr=1e-3), tmp_path)
    same = report["same_work"]
    assert same["largest"]["loss"] < 1e-4 and same["first_step"]["grad_norm"] < 1e-3
    assert suite == "sft" or same["largest"]["logps/chosen"] < 1e-2
    ours, *theirs = report["rows"]
    assert len(report["results"]["ours"][0]["records"]) == 3  # one step to warm up, two that count
    assert ours["per_s"] > 0 and theirs[0]["floors"] > 0 and report["speed_ratio"] > 0
    out = capsys.readouterr().out
    assert "x floor" in out and "generated words" in out and "largest difference: loss" in out


def test_the_rows_suite_does_the_same_work(small, monkeypatch, tmp_path, capsys):
    pytest.importorskip("trl")
    monkeypatch.setattr(training, "TRL_SETTINGS", dict(list(training.TRL_SETTINGS.items())[1:2]))
    report = rows.suite(config(suite="rows", pairs=12, batch_size=6, lr=1e-3), tmp_path)
    assert set(report["against"]) == {rows.APART, "TRL, no checkpointing"} and all(
        r["speed_ratio"] > 0 for r in report["against"].values()
    )
    assert all(
        same["largest"]["loss"] < 1e-4 and same["largest"]["logps/chosen"] < 1e-2 for same in report["same_work"].values()
    )
    assert "12 pairs of 2 prompts" in capsys.readouterr().out


def test_mcq_suite_does_the_same_work(small, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(mcq, "SETTINGS", {"lm_eval, batch 4": {"batch_size": 4}})
    report = mcq.suite(config(suite="mcq", pairs=12), tmp_path)
    assert report["same_work"]["largest"] < 1e-3
    assert report["same_work"]["accuracy"]["ours"] == report["same_work"]["accuracy"]["theirs"]
    assert len(report["results"]["ours"][0]["logps"]) == 12


def test_sample_suite_writes_the_same(small, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(sample, "NEW_TOKENS", 9)
    for batch_size in (1, 3):
        report = sample.suite(config(suite="sample", batch_size=batch_size), tmp_path)
        found = report["sizes"][batch_size]
        assert "transformers, defaults" in found["against"] and len(found["against"]) <= 2 and found["floor_s"] > 0
        assert all(r["same_completions"] == 1 and r["speed_ratio"] > 0 for r in found["against"].values())
        assert [len(ids) for ids in found["results"]["ours"][0]["tokens"]] == [9] * 4
        assert f"batch {batch_size}: 4 prompts" in capsys.readouterr().out


def test_gpu_suite_runs_on_a_cpu(small, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "SETTINGS", {"plain": {}, "packed": {"row_len": 256}, "refused": {"row_len": -1}})
    report = gpu.suite(config(suite="gpu", models="tiny", peer="none", pairs=2), tmp_path)
    names, failed = [row["name"] for row in report["rows"]], [row["name"] for row in report["rows"] if "error" in row]
    assert names[:2] == ["dpo hh tiny plain", "sft hh tiny plain"] and "sft hellaswag tiny packed" in names
    assert len(names) == 12 and failed == [name for name in names if "refused" in name]
    assert all(0 < row["mfu"] < 1 and row["tokens_per_s"] > 0 for row in report["rows"] if "error" not in row)
    late = gpu.suite(config(suite="gpu", models="tiny", peer="none", pairs=2, minutes=0.0), tmp_path)
    assert not late["rows"] and len(late["left_out"]) == 12


def settle(job):
    return {"ends": [(0.0, 0.0), (2.0, 1.0)], "pid": os.getpid(), "env": os.environ["MALLOC_TRIM_THRESHOLD_"]}


def test_a_measurement_is_a_process_of_its_own(capfd):
    """Its memory is its own, not what this process has grown to; a failure comes back as a line."""
    job = {"threads": 1, "device": "cpu", "dtype": "float32", "warmup": 1, "env": common.KEEP}
    result = common.measure(settle, job)
    assert result["pid"] != os.getpid() and 50 < result["peak_mb"] < 1000
    assert (result["seconds"], result["cpu_seconds"], result["env"]) == (2.0, 1.0, str(2**40))
    assert "no_such_dtype" in common.attempt(common.matmul, job | {"dtype": "no_such_dtype"})["error"]


def test_mistakes_are_one_line(refused, small):
    refused("bench.__main__", "--models", "gpt2,gpt3", says="key models")
    refused("bench.__main__", "--pairs", "7", says="no multiple")
    refused("bench.__main__", "--batch_size", "12", "--pairs", "24", says="key batch_size")
    refused("bench.__main__", "--suite", "rows", "--batch_size", "4", says="has 6 pairs a prompt")
    refused("bench.__main__", "--init", "gpt7", says="did you mean gpt2")
    with pytest.raises(UserError, match="key peer_setting"):
        common.peer_jobs(config(peer_setting="fast"), settle, {}, {"slow": {}})
