"""Every stage on a pretended GPU, start to end, in bfloat16: what is on two devices or in two dtypes shows there."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import logprobs
import losses
import weights
from bench import pretended
from data.batch import Batch
from data.tokenizer import get
from generate import Decode
from llama import LlamaConfig
from model import GPTConfig
from runtime.run import Run
from tests.conftest import flags

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here: pytest -m gpu")]
TOKENS = get("toy").size
CONFIGS = {
    "gpt2": GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=TOKENS),
    "llama": LlamaConfig(
        n_layer=2, n_head=4, n_kv_head=2, head_dim=8, n_embd=32, n_inner=40, block_size=128, vocab_size=TOKENS
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory) -> Path:
    """A random model of each family."""
    out = tmp_path_factory.mktemp("pretended") / request.param
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in weights.empty(CONFIGS[request.param]).named_parameters()}
    drawn = ((n, 0.1 * torch.randn(s, generator=generator) if len(s) > 1 else torch.ones(s)) for n, s in shapes.items())
    weights.save_tensors(CONFIGS[request.param], drawn, get("toy"), out)
    return out


@pytest.fixture
def stage(folder, files, tmp_path, monkeypatch):
    """stage("sft", key=…) runs a script's main on the pretended GPU -> (what was seen there, the training losses)."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(Path(files["val_sft"]).read_text().splitlines(keepends=True)[:3]))
    train = {"init_from": folder, "val_limit": 4, "batch_size": 6, "max_steps": 2, "samples": 0, "lr": 1e-3}
    scripts = {
        "sft": {**train, "data": files["sft"], "val_data": files["val_sft"], "out_dir": tmp_path / "sft"},
        "dpo": {**train, "data": files["pairs"], "val_data": files["val_pairs"], "out_dir": tmp_path / "dpo", "ref": "auto"},
        "precompute_ref": {"init_from": folder, "data": files["pairs"], "out": tmp_path / "ref.safetensors"},
        "eval_mcq": {"model": folder, "data": files["mcq"], "limit": 6},
        "sample": {"model": folder, "prompts": prompts, "out": tmp_path / "samples.jsonl", "max_new_tokens": 6, "n": 2},
    }

    def run(name: str, **keys) -> tuple[pretended.Seen, list[float]]:
        found = []
        log_step = Run.log_step

        def watched(self, step, record, *rest):
            log_step(self, step, record, *rest)
            found.append(record["loss"])

        monkeypatch.setattr(Run, "log_step", watched)
        words = flags(**{"device": "cuda:0", "dtype": "bfloat16", **scripts[name], **keys})
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        with pretended.gpu() as seen:
            assert not importlib.import_module(name).main()
        monkeypatch.setattr(Run, "log_step", log_step)
        return seen, found

    return run


STAGES = {
    "sft": {},
    "sft, packed and compiled": {"row_len": 64, "compile": "true", "activation_checkpointing": "true"},
    "dpo": {},
    "dpo, LoRA": {"lora_rank": 2, "ref": "", "samples": 1},
    "dpo, a loss that couples the batch": {"loss": "aot"},
    "precompute_ref": {},
    "eval_mcq": {},
    "eval_mcq, writing": {"mode": "generate"},
    "sample": {},
}


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_runs_on_a_gpu(stage, name, tmp_path):
    seen, found = stage(name.split(",")[0], **STAGES[name])
    assert seen.kernels.total() > 80 and seen.kernels["addmm"] + seen.kernels["mm"] > 8
    if found:  # the same losses as on the CPU in float32, as far as bfloat16 knows them
        for lock in tmp_path.glob("*/.lock"):
            lock.unlink()
        out = {"out_dir": tmp_path / "cpu", "device": "cpu", "dtype": "float32", "samples": 0}
        _, wanted = stage(name.split(",")[0], **{**STAGES[name], **out})
        assert found == pytest.approx(wanted, rel=1e-2)


def index_on_the_cpu(patch) -> None:
    to = Batch.to
    patch.setattr(Batch, "to", lambda self, device: replace(to(self, device), source=self.source))


def sums_on_the_cpu(patch) -> None:
    real = losses.completion_sums
    for module in (losses, importlib.import_module("runtime.score")):
        patch.setattr(module, "completion_sums", lambda logps, completion, n: real(logps, completion.cpu(), n))


def float32_states_at_the_head(patch) -> None:
    product = logprobs._float32_product
    patch.setattr(logprobs, "_float32_product", lambda a, b: product(a.float(), b))


def positions_on_the_cpu(patch) -> None:
    init = Decode.__init__

    def planted(self, *arguments):
        init(self, *arguments)
        self.position = self.position.cpu()

    patch.setattr(Decode, "__init__", planted)


TWO_DEVICES, TWO_DTYPES = "same device", "same dtype"


@pytest.mark.parametrize("folder", ["gpt2"], indirect=True)
@pytest.mark.parametrize(
    ("name", "plant", "says"),
    [
        ("sft", index_on_the_cpu, TWO_DEVICES),
        ("sft", float32_states_at_the_head, TWO_DTYPES),
        ("dpo", sums_on_the_cpu, TWO_DEVICES),
        ("precompute_ref", sums_on_the_cpu, TWO_DEVICES),
        ("eval_mcq", index_on_the_cpu, TWO_DEVICES),
        ("sample", positions_on_the_cpu, TWO_DEVICES),
    ],
)
def test_a_planted_mixup_is_found(stage, monkeypatch, name, plant, says):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=says):
        plant(patch)
        stage(name)


# --- the pretended GPU itself --------------------------------------------------------------------------------------------


@pytest.fixture
def seen():
    with pretended.gpu() as counted:
        yield counted


WAITS = {
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "bool": lambda x: bool(x[0] > 0),
    "nonzero": lambda x: x.nonzero(),
    "list index": lambda x: x[[0, 1]],
    "index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "boolean index": lambda x: x[x > 0],
    "written by a list": lambda x: x.__setitem__([0, 1], 1.0),
    "from the CPU": lambda x: torch.ones(3).to(x.device),
    "a list to the GPU": lambda x: torch.tensor([1, 2], device=x.device),
    "copied into a CPU tensor": lambda x: torch.zeros(3).copy_(x),
    "synchronize": lambda x: torch.cuda.synchronize(),
}
GOES_ON = {
    "product": lambda x: x * 2 + 1,
    "view": lambda x: x.view(1, 3).transpose(0, 1)[:2],
    "pinned copy": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "index on the GPU": lambda x: x[torch.zeros(2, dtype=torch.long, device=x.device)],
    "zeros": lambda x: torch.zeros(3, device=x.device),
    "another dtype": lambda x: x.to(torch.bfloat16),
    "where it is": lambda x: x.to(x.device),
}


@pytest.mark.parametrize("name", [*WAITS, *GOES_ON])
def test_what_waits_is_counted(seen, name):
    x = torch.arange(3.0).to("cuda:0", non_blocking=True)
    (WAITS | GOES_ON)[name](x)
    assert seen.syncs.total() == (name in WAITS), seen.syncs


def test_kernels_are_counted_and_views_are_not(seen):
    x = torch.zeros(2, 3, device="cuda:0")
    x.view(3, 2).t()[0].detach()
    assert +seen.kernels == {"zeros": 1}
    x.add_(1).mul_(2)
    assert +seen.kernels == {"zeros": 1, "add_": 1, "mul_": 1} and x.cpu().tolist() == [[2.0] * 3] * 2


def test_two_devices_are_refused(seen):
    x, index = torch.zeros(2, 3, device="cuda:0"), torch.zeros(1, dtype=torch.long)
    for work in (
        lambda: x.index_select(0, index),
        lambda: x + torch.zeros(3),
        lambda: F.embedding(index, x),
        lambda: x.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError), match=r"same device|can't convert"):
            work()
    assert (x + torch.tensor(1.0)).device.type == "cuda"  # a number of the CPU goes with everything


def test_varlen_attention_is_the_rule():
    """Of a prompt of 4 and a completion of 3 that sees it: as causal attention over all 7, gradients too."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    q, k, v = (torch.randn(7, 2, 8, requires_grad=True) for _ in range(3))
    wanted = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True).transpose(0, 1)
    wanted = torch.autograd.grad(wanted.square().sum(), (q, k, v)), wanted
    at = torch.tensor([0, 1, 2, 3, *range(7)])
    with pretended.gpu() as seen:
        there = [x.detach().to("cuda:0").requires_grad_() for x in (q, k, v)]
        ends = [torch.tensor(e, dtype=torch.int32, device="cuda:0") for e in ([0, 4, 7], [0, 4, 11])]
        keys = [x[at.to("cuda:0")] for x in there[1:]]
        out = varlen.varlen_attn(there[0], *keys, *ends, 4, 7, window_size=(-1, 0))
        out.square().sum().backward()
        got = [x.grad.cpu() for x in there], out.detach().cpu()
    assert seen.kernels["_varlen_attn"] == seen.kernels["_varlen_attn_backward"] == 1
    torch.testing.assert_close(got[1], wanted[1], atol=1e-5, rtol=1e-5)
    for a, b in zip(got[0], wanted[0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
