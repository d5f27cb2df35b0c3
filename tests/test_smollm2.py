"""A real pretrained model, SmolLM2-135M-Instruct, against transformers. NANOPREF_SMOLLM2 names its folder."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

import weights
from data.encode import Encoded
from runtime.distributed import setup
from runtime.score import score
from tests import peers
from tests.conftest import SHARED, flags, metrics

FOLDER = os.environ.get("NANOPREF_SMOLLM2", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER, reason="NANOPREF_SMOLLM2 names no folder of SmolLM2")]


def lines(name: str, n: int) -> list[dict]:
    path = SHARED / "data" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(n), file, strict=False)]


def common(a: str, b: str) -> str:
    """Two dialogues' beginning, up to the last turn that both have."""
    return os.path.commonprefix([a, b]).rpartition("\n\nAssistant:")[0] + "\n\nAssistant:"  # noqa: RUF071 (texts, not paths)


def texts(kind: str) -> list[tuple[str, list[str]]]:
    """(prompt, completions) of 60 HellaSwag problems or 40 HH pairs."""
    if kind == "hellaswag":
        return [(line["ctx"], [f" {ending}" for ending in line["endings"]]) for line in lines("hellaswag_val.jsonl.gz", 60)]
    pairs = [(line["chosen"], line["rejected"]) for line in lines("hh_harmless_base_test.jsonl.gz", 40)]
    return [(p := common(*pair), [text.removeprefix(p) for text in pair]) for pair in pairs]


@pytest.mark.parametrize("kind", ["hellaswag", "hh"])
@torch.no_grad()
def test_log_probs_equal_transformers(kind):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    hf = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    items = []
    for n, (prompt, completions) in enumerate(texts(kind)):
        ids = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, *completions)]
        items.append(Encoded(ids[0].int().numpy(), [c.int().numpy() for c in ids[1:]], n, n))
    compute = setup("cpu", "float32")
    sums = score(weights.load(Path(FOLDER)), items, compute, micro_tokens=2048)
    for item, found in zip(items, sums, strict=True):
        for completion, ours in zip(item.completions, found, strict=True):
            ids = torch.tensor([*item.prompt, *completion])[None]
            logits = hf(ids[:, :-1]).logits.double()  # torch's float32 log_softmax adds 8e-6 a token here, always upwards
            logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
            assert ours == pytest.approx(logps[len(item.prompt) - 1 :].sum().item(), abs=2e-3)


def conversations(n: int) -> list[dict]:
    """The shortest answers of the instruction pairs, as conversations."""
    rows = [row for row in lines("instruction_preference.jsonl.gz", 900) if row["chosen"] != row["rejected"]]
    rows = sorted(rows, key=lambda row: len(row["instruction"] + row["input"] + row["chosen"] + row["rejected"]))[:n]
    return [
        {
            "prompt": [{"role": "user", "content": f"{row['instruction']} {row['input']}".strip()}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in rows
    ]


def test_ten_dpo_steps_on_conversations_equal_trls(call, tmp_path):
    pytest.importorskip("trl")
    rows = conversations(8)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"init_from": FOLDER, "data": tmp_path / "pairs.jsonl", "device": "cpu"}
    assert call("precompute_ref", *flags(**keys, out=tmp_path / "ref.safetensors"))[0] == 0
    training = {"epochs": 5, "batch_size": 4, "lr": 1e-5, "schedule": "constant", "grad_clip": 1.0, "shuffle": "false"}
    run = {"ref": tmp_path / "ref.safetensors", "out_dir": tmp_path / "run", "samples": 0, "save_every": 0}
    status, _, err = call("dpo", *flags(**keys, **training, **run))
    assert status == 0, err
    ours = [record for record in metrics(tmp_path / "run") if record["split"] == "train"]

    size = {"per_device_train_batch_size": 4, "num_train_epochs": 5, "learning_rate": 1e-5, "max_grad_norm": 1.0}
    trainer, watch = peers.dpo_trainer(FOLDER, rows, tmp_path / "trl", max_length=None, **size)
    with peers.quiet():
        trainer.train()
    assert len(ours) == len(watch.logs) == 10
    assert ours[0]["loss"] == pytest.approx(watch.logs[0]["loss"], abs=1e-3)
    assert ours[0]["grad_norm"] == pytest.approx(watch.logs[0]["grad_norm"], rel=1e-3)
    for record, log in zip(ours, watch.logs, strict=True):
        assert record["loss"] == pytest.approx(log["loss"], abs=2e-2)
