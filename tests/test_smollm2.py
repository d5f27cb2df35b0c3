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
from tests.conftest import SHARED

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
