"""LoRA: the layer and its sums, peft's adapters out and in, runs whose reference needs no file, resuming, processes."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapters
import model as model_file
import weights
from data.encode import collate
from data.tokenizer import get
from model import LINEAR, SIZES, GPTConfig, LoRAConfig, as_started, target_logps
from tests import peers
from tests.conftest import dpo_args, flags, metrics, ref_args, script, sft_args
from tests.runtime.test_runs import close
from tests.test_model import CONFIG, example, plain_logps
from tests.test_step import METRICS, in_our_order, run_script

ROOT = Path(__file__).parents[1]
LORA = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lr": 1e-2}
MATRICES = tuple(f"{name}.weight" for name in LINEAR)  # what is cast to bfloat16
TOKENS = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(0))


def with_lora(model, config: LoRAConfig, seed: int = 0):
    """Adapters on a model, none of them zero."""
    model.add_lora(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random GPT-2 folder of transformers, with a tokenizer of the toy's size."""
    folder = tmp_path_factory.mktemp("lora") / "base"
    peers.gpt2_folder(folder)
    return folder


@pytest.fixture(scope="module")
def untied(base) -> Path:
    """The same with an output projection of its own."""
    folder = base.with_name("untied")
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    head = tensors["transformer.wte.weight"] + 0.1 * torch.randn(97, 32, generator=torch.Generator().manual_seed(5))
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    return folder


class NoTokenizer:
    eot = 96

    def save(self, folder):
        pass


def saved(model, base: Path, folder: Path) -> Path:
    """The model's adapters as `finish` writes them."""
    sha = weights.fingerprint(weights.load(base))
    model.origin = adapters.Origin(str(base), sha, sha)
    adapters.save(model, NoTokenizer(), folder)
    return folder


def peft_logits(base: Path, adapter: Path, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    with peers.quiet(), torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
        return peft.PeftModel.from_pretrained(theirs, adapter).eval()(tokens).logits


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rank", "count"),
    [("gpt2-medium", 16, 7_898_384), ("gpt2-medium", 32, 15_796_768), ("gpt2-medium", 64, 31_593_536),
     ("gpt2-large", 16, 14_095_632)],
)  # fmt: skip
def test_parameter_counts(name, rank, count):
    """Every linear layer, head included, q, k and v apart: what the source of recipe E prints."""
    model = weights.empty(GPTConfig(*SIZES[name]))
    whole = sum(p.numel() for p in model.parameters())
    model.add_lora(LoRAConfig(rank, rank))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert sum(p.numel() for p in model.parameters()) == whole + count


def test_an_adapter_by_hand():
    """W x + alpha / rank * B A x, q, k and v each with an A and B of their own; alpha / sqrt(rank) when stabilised."""
    model = weights.load("scratch", seed=1, **asdict(CONFIG))
    with_lora(model, LoRAConfig(4, 6.0, targets=("attn.qkv",)))
    layer, x = model.blocks[1].attn.qkv, torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    wanted = F.linear(x, layer.weight, layer.bias)
    for i in range(3):
        a, b = layer.lora.a[4 * i : 4 * i + 4], layer.lora.b[32 * i : 32 * i + 32]
        wanted[:, 32 * i : 32 * i + 32] += 1.5 * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), wanted)
    assert LoRAConfig(4, 6.0, stabilised=True).scale == 3.0
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"blocks.{i}.attn.qkv.lora.{letter}" for i in range(3) for letter in "ab"
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_rows_logits_and_generation_agree(tied):
    """The chunked projection of `forward`, `logits` and the cached `generate` compute one model, adapter on the head included;
    without its adapters it is the base to the bit."""
    options = asdict(CONFIG) | {"tied": tied}
    plain, model = (weights.load("scratch", seed=1, **options).eval() for _ in range(2))
    with_lora(model, LoRAConfig(3, 3))
    rng = np.random.default_rng(0)
    items = [example(rng, 7, 3, 5), example(rng, 4, 6)]
    batch = collate([items])
    with torch.no_grad():
        assert (model(batch) - torch.cat([plain_logps(model, i) for i in items])).abs().max() < 1e-4
        assert (model(batch) - plain(batch)).abs().max() > 0.1
        with as_started(model):
            assert torch.equal(model(batch), plain(batch))
    prompt = items[0].prompt.tolist()
    (written,) = model.generate([prompt], 6, -1)
    for n, token in enumerate(written):
        with torch.no_grad():
            assert model.logits(torch.tensor([prompt + written[:n]]))[0, -1].argmax() == token


@pytest.mark.parametrize("budget", [2**28, 0], ids=["kept", "computed again"])
@pytest.mark.parametrize("frozen", [True, False])
def test_projection_with_adapter_and_gradient(monkeypatch, budget, frozen):
    """In chunks of three rows: values and gradients of plain log-softmax, for x, A, B and (not frozen) the weights."""
    monkeypatch.setattr(model_file, "LOGITS_BUDGET", budget)
    monkeypatch.setattr(model_file, "LOGITS_CHUNK", 3 * 4 * 50)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(10, 16, generator=g, requires_grad=True)
    w = torch.randn(50, 16, generator=g).requires_grad_(not frozen)
    lora = model_file.LoRA(16, 50, LoRAConfig(4, 2.0), 1)
    with torch.no_grad():
        lora.a.normal_(generator=g), lora.b.normal_(generator=g)
    target, weight = torch.randint(0, 50, (10,), generator=g), torch.randn(10, generator=g)
    got = target_logps(x, w, target, lora)
    want = F.log_softmax(x @ w.T + 0.5 * x @ lora.a.T @ lora.b.T, -1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    wanted = (x, lora.a, lora.b, *(() if frozen else (w,)))
    ours, theirs = (torch.autograd.grad(value, wanted, weight) for value in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_nothing_to_predict_gives_zero_gradients():
    """A rank of a sharded model without work must have every gradient that the others have."""
    model = weights.load("scratch", seed=1, **asdict(CONFIG))
    with_lora(model, LoRAConfig(3, 3))
    model(collate([])).sum().backward()
    assert all(not p.requires_grad or (p.grad is not None and not p.grad.any()) for p in model.parameters())


def test_head_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(model_file, "LOGITS_BUDGET", 0)
    monkeypatch.setattr(model_file, "LOGITS_CHUNK", 4 * 4 * CONFIG.vocab_size)
    from torch.utils._python_dispatch import TorchDispatchMode

    model = with_lora(weights.load("scratch", seed=1, **asdict(CONFIG)), LoRAConfig(3, 3))
    rows = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() >= 2 and out.shape[-1] == CONFIG.vocab_size:
                rows.append(out.numel() // CONFIG.vocab_size)
            return out

    batch = collate([[example(np.random.default_rng(0), 5, 12, 12)]])
    with Watch():
        model(batch).sum().backward()
    sizes = [n for n in rows if n not in (CONFIG.n_embd, 3)]  # transposed: the weight, and B
    assert len(sizes) > 12 and max(sizes) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_merge_and_unmerge(tied):
    """Merged, the logits are the same; unmerged, the weights are to the bit what they were."""
    model = weights.load("scratch", seed=1, **asdict(CONFIG) | {"tied": tied})
    with_lora(model, LoRAConfig(3, 3))
    tokens, before = TOKENS % CONFIG.vocab_size, {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        want = model.logits(tokens)
        model.merge()
        assert not torch.equal(model.blocks[0].mlp.fc.weight, before["blocks.0.mlp.fc.weight"])
        assert (model.logits(tokens) - want).abs().max() < 1e-4
        model.unmerge()
        assert torch.equal(model.logits(tokens), want)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_dropout_acts_in_training_only():
    model = with_lora(weights.load("scratch", seed=1, **asdict(CONFIG)), LoRAConfig(3, 3, dropout=0.5))
    batch = collate([[example(np.random.default_rng(0), 5, 4)]])
    with torch.no_grad():
        assert torch.equal(model(batch), model(batch))
        model.train()
        assert not torch.equal(model(batch), model(batch))


# --- peft ------------------------------------------------------------------------------------------------------------

SETS = {
    "all": {},
    "blocks": {"targets": LINEAR[:4]},
    "qkv": {"targets": ("attn.qkv",)},
    "head": {"targets": ("head",)},
    "stabilised": {"stabilised": True},
    "fused qkv": {"qkv_parts": 1},
}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("tie", ["base", "untied"])
def test_peft_loads_our_adapter(kind, tie, request, tmp_path):
    """Equal logits in PeftModel, merged here, and merged and saved for transformers without peft."""
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(tie)
    model = with_lora(weights.load(folder), LoRAConfig(4, 10, **SETS[kind]))
    adapter = saved(model, folder, tmp_path / "adapter")
    with torch.no_grad():
        want = model.logits(TOKENS)
    assert (want - weights.load(folder).logits(TOKENS)).abs().max() > 0.1
    torch.testing.assert_close(peft_logits(folder, adapter), want, atol=1e-4, rtol=0)
    merged = adapters.load(str(adapter))
    torch.testing.assert_close(merged.logits(TOKENS), want, atol=1e-4, rtol=0)
    weights.save(merged, NoTokenizer(), tmp_path / "model")
    assert weights.fingerprint(weights.load(tmp_path / "model")) == weights.fingerprint(merged)
    with peers.quiet(), torch.no_grad():
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        torch.testing.assert_close(plain(TOKENS).logits, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", SETS)
def test_our_adapter_comes_back_as_it_was(kind, base, tmp_path):
    config = LoRAConfig(4, 10.5, **SETS[kind])
    model = with_lora(weights.load(base), config)
    read = adapters.read(saved(model, base, tmp_path / "adapter"))
    assert replace(read.config, qkv_parts=config.qkv_parts) == config and (
        read.config.qkv_parts == config.qkv_parts or "attn.qkv" not in config.targets
    )
    parameters = dict(model.named_parameters())
    values = dict(read.initial(False))
    assert values.keys() == {n for n, p in parameters.items() if p.requires_grad}
    assert all(torch.equal(values[n], parameters[n]) for n in values)


PEFT = {
    "fused": {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 5, "lora_alpha": 7},
    "head": {"target_modules": ["c_attn", "lm_head"], "r": 6, "lora_alpha": 3, "use_rslora": True},
    "only the head": {"target_modules": ["lm_head"], "r": 2, "lora_alpha": 2},
    "ranks": {"target_modules": ["c_attn", "mlp.c_proj"], "r": 3, "lora_alpha": 3, "rank_pattern": {"c_attn": 6},
              "alpha_pattern": {"h.1.attn.c_attn": 2.5}},
    "one block": {"target_modules": ["c_fc"], "r": 2, "layers_to_transform": [0]},
}  # fmt: skip


def peft_adapter(base: Path, folder: Path, **settings) -> Path:
    """An adapter made, given values, and saved by peft."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(3)
    with peers.quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model = peft.get_peft_model(model, peft.LoraConfig(fan_in_fan_out=True, task_type="CAUSAL_LM", **settings))
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, 0, 0.1)
        model.save_pretrained(folder)
    return folder


def test_a_bfloat16_copy_of_the_head_is_no_other_head(base, tmp_path):
    """peft adds a targeted head's own weights, in the precision that the adapter is saved in."""
    folder = peft_adapter(base, tmp_path / "adapter", **PEFT["head"])
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / adapters.WEIGHTS).items()}
    assert [name for name in tensors if adapters.COPY.fullmatch(name)]
    save_file(tensors, folder / adapters.WEIGHTS, {"format": "pt"})
    adapters.load(str(folder))


@pytest.mark.parametrize("kind", PEFT)
def test_an_adapter_of_peft(kind, base, tmp_path):
    """Merged, and, where all layers are alike, as adapters to train on: its logits."""
    folder = peft_adapter(base, tmp_path / "adapter", **PEFT[kind])
    want = peft_logits(base, folder)
    adapter = adapters.read(folder)
    with torch.no_grad():
        torch.testing.assert_close(adapters.load(str(folder)).logits(TOKENS), want, atol=1e-4, rtol=0)
        adapters.base(adapter)
        assert (adapter.config is None) == (kind in ("ranks", "one block"))
        if adapter.config:
            model = weights.load(base).eval()
            model.add_lora(adapter.config)
            model.load_state_dict(dict(adapter.initial(False)), strict=False)
            torch.testing.assert_close(model.logits(TOKENS), want, atol=1e-4, rtol=0)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_sft(files, sft_run, tmp_path_factory) -> Path:
    """A finished SFT run with adapters on every layer of sft_run's model."""
    folder = tmp_path_factory.mktemp("lora_sft") / "run"
    with contextlib.redirect_stdout(None):
        assert script("sft", *lora_args(files, sft_run, folder)) == 0
    return folder


def lora_args(files, sft_run, out, **keys) -> list[str]:
    scratch = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "tokenizer"))
    return sft_args(files, out, **{"init_from": sft_run / "model", **scratch, **LORA, **keys})


def lora_dpo(files, sft_run, out, **keys) -> list[str]:
    return dpo_args(files, sft_run, None, out, **{**LORA, "max_steps": 6, **keys})


def test_a_run_with_lora(files, sft_run, lora_sft, call, tmp_path):
    """Adapters learn, the base stays; adapter/ is peft's, model/ transformers' with the base's other weights to the bit; a
    checkpoint holds adapters only; both folders evaluate alike."""
    train = [r["loss"] for r in metrics(lora_sft) if r["split"] == "train"]
    assert train[-1] < train[0]
    _, printed, _ = call("sft", *lora_args(files, sft_run, lora_sft))  # finished: writes the same again
    assert "adapter" in printed.splitlines()[-1] and "qkv_parts=3" in printed
    # a token: 4 operations a frozen weight (12 width^2 + 13 width a block), 6 one of an adapter (rank * 18 width a block)
    assert f"{2 * (4 * (12 * 32 * 32 + 13 * 32) + 6 * 4 * 18 * 32) / 1e6:,.1f} MFLOP a token" in printed
    state = torch.distributed.checkpoint.FileSystemReader(lora_sft / "checkpoints/step_10").read_metadata()
    names = [".".join(map(str, keys)) for keys in state.planner_data.values()]
    assert not [name for name in names if ".lora." not in name and not name.startswith("optimizer.param_groups")], names

    merged, start = (load_file(f / "model/model.safetensors") for f in (lora_sft, sft_run))
    assert merged.keys() - start.keys() == {"lm_head.weight"}
    for name, tensor in start.items():
        adapted = name.endswith(".weight") and ("attn.c_" in name or "mlp.c_" in name)
        assert torch.equal(merged[name], tensor) != adapted, name
    a, b = (weights.fingerprint(adapters.load(str(lora_sft / name))) for name in ("model", "adapter"))
    assert a == b
    results = []
    for name in ("model", "adapter"):
        status, printed, err = call("eval_mcq", *flags(model=lora_sft / name, data=files["mcq"]))
        assert status == 0, err
        results.append(json.loads(printed.splitlines()[-1]))
    assert results[0] == results[1]
    config = (lora_sft / "config.toml").read_text()
    assert "lora_rank = 4" in config and 'lora_targets = ""' in config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reference_without_a_file_equals_one_with(dtype, files, sft_run, call, tmp_path):
    """Adapters off is the model that the file was made from: the same run, loss for loss."""
    reference = tmp_path / "ref.safetensors"
    assert call("precompute_ref", *ref_args(files, sft_run, reference, dtype=dtype))[0] == 0
    for name, ref in (("off", None), ("file", reference)):
        args = lora_dpo(files, sft_run, tmp_path / name, ref=ref, loss="aot", micro_tokens=300, dtype=dtype)
        status, printed, err = call("dpo", *args)
        assert status == 0, err
        assert ("without the run's adapters" in printed) == (name == "off")
    gap = float(re.search(r"differ by at most (\S+) nats a token", printed)[1])
    assert gap < 1e-5, "the model trained is not the one that the file was made from"
    off, file = metrics(tmp_path / "off"), metrics(tmp_path / "file")
    close(off, file, 1e-5)
    assert abs([r for r in off if r["split"] == "train"][-1]["rewards/margins"]) > 0.001


def test_going_on_from_an_adapter(files, sft_run, lora_sft, call, refused, monkeypatch, tmp_path):
    """DPO goes on from SFT's adapter: the reference is that start, not the bare base; what is written sits on the base. The
    start is kept only for a run that measures its reference itself."""
    kept, keep = [], model_file.LoRA.keep_start
    monkeypatch.setattr(model_file.LoRA, "keep_start", lambda lora: kept.append(lora) or keep(lora))
    begin, ref = lora_sft / "adapter", tmp_path / "ref.safetensors"
    data = {"init_from": begin, "data": files["pairs"], "val_data": files["val_pairs"], "out": ref}
    status, _, err = call("precompute_ref", *flags(**data))
    assert status == 0, err
    for name, file in (("own", None), ("file", ref)):
        status, printed, err = call("dpo", *lora_dpo(files, sft_run, tmp_path / name, ref=file, init_from=begin))
        assert status == 0 and "warning" not in err, err
        assert "loss 0.6931" in printed and bool(kept) == (name == "own")
        kept.clear()
    own = metrics(tmp_path / "own")
    close(own, metrics(tmp_path / "file"), 1e-5)
    status, _, err = call("dpo", *dpo_args(files, sft_run, ref, tmp_path / "full", init_from=begin, max_steps=1))
    assert status == 0, err  # merged, without adapters of its own
    assert metrics(tmp_path / "full")[0]["loss"] == pytest.approx(own[0]["loss"], abs=1e-6)
    config = json.loads((tmp_path / "own/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(sft_run / "model")
    a, b = (adapters.load(str(tmp_path / "own" / name)) for name in ("adapter", "model"))
    assert weights.fingerprint(a) == weights.fingerprint(b)
    args = {"init_from": begin, "lora_rank": 8}
    refused("dpo", *lora_dpo(files, sft_run, tmp_path / "x", **args), says="key lora_rank: 8, but init_from")
    args = {"init_from": begin, "lora_targets": "head"}
    refused("dpo", *lora_dpo(files, sft_run, tmp_path / "x", **args), says="key lora_targets: head, but init_from")


def test_peft_loads_a_run_and_we_go_on_from_peft(files, sft_run, lora_sft, call, tmp_path):
    """out_dir/adapter in PeftModel equals out_dir/model; and a run from an adapter that peft made."""
    tokens = TOKENS % get("toy").size
    got = peft_logits(sft_run / "model", lora_sft / "adapter", tokens)
    with torch.no_grad():
        torch.testing.assert_close(got, weights.load(lora_sft / "model").logits(tokens), atol=1e-4, rtol=0)
    begin = peft_adapter(sft_run / "model", tmp_path / "peft", r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"])
    status, printed, err = call("sft", *lora_args(files, sft_run, tmp_path / "run", init_from=begin, max_steps=2))
    assert status == 0 and "qkv_parts=1" in printed, err
    got = peft_logits(sft_run / "model", tmp_path / "run/adapter", tokens)
    with torch.no_grad():
        torch.testing.assert_close(got, weights.load(tmp_path / "run/model").logits(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "more", [{"dtype": "bfloat16"}, {"activation_checkpointing": "true"}, {"lora_targets": "attn.proj, head"}]
)
def test_ways_to_run(more, files, sft_run, lora_sft, call, tmp_path):
    """bfloat16 weights, recomputed blocks, some layers only: adapters learn."""
    from runtime.run import build_model

    args = lora_args(files, sft_run, tmp_path / "run", **more)
    status, _, err = call("sft", *args)
    assert status == 0, err
    train = [r["loss"] for r in metrics(tmp_path / "run") if r["split"] == "train"]
    assert train[-1] < train[0]
    if "activation_checkpointing" in more:
        close(metrics(tmp_path / "run"), metrics(lora_sft), 1e-5)
    if "dtype" in more:
        import sft
        from runtime import config, distributed

        cfg = config.load(sft.Config, args)
        model = build_model(cfg, get("toy"), distributed.setup("cpu", "bfloat16"))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        assert {n for n, p in frozen.items() if p.dtype == torch.bfloat16} == {n for n in frozen if n.endswith(MATRICES)}
        whole = weights.load(sft_run / "model")
        assert torch.equal(model.wte.weight, whole.wte.weight) and torch.equal(model.wpe.weight, whole.wpe.weight)
        merged, start = (load_file(f / "model/model.safetensors") for f in (tmp_path / "run", sft_run))
        assert torch.equal(merged["transformer.ln_f.weight"], start["transformer.ln_f.weight"])


def test_the_keys_make_the_adapters(files, sft_run, call, tmp_path):
    """lora_alpha 0 is the rank, which counts sqrt(rank) times when stabilised."""
    import sft
    from runtime import config, distributed
    from runtime.run import build_model

    keys = {"lora_rslora": "true", "lora_dropout": 0.2, "lora_alpha": 0, "lora_targets": "head, mlp.fc", "max_steps": 1}
    args = lora_args(files, sft_run, tmp_path / "run", **keys)
    want = LoRAConfig(4, 4.0, 0.2, ("mlp.fc", "head"), True)
    model = build_model(config.load(sft.Config, args), get("toy"), distributed.setup("cpu"))
    assert model.lora == want and {m.dropout for m in model.modules() if isinstance(m, model_file.LoRA)} == {0.2}
    assert {m.scale for m in model.modules() if isinstance(m, model_file.LoRA)} == {2.0}
    assert call("sft", *args)[0] == 0
    raw = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["lora_dropout"], raw["use_rslora"]) == (4, 4, 0.2, True)
    assert replace(adapters.read(tmp_path / "run/adapter").config, dropout=0.2) == want


def test_a_run_from_before_lora_is_not_gone_on_with(files, call, refused, tmp_path):
    """A key that an old config.toml does not have is said by its name."""
    args = sft_args(files, tmp_path / "run", max_steps=1)
    assert call("sft", *args)[0] == 0
    path = tmp_path / "run/config.toml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("lora_")))
    refused("sft", *args, "--lora_rank", 4, says="holds a run with lora_rank = 0, not 4")
    assert call("sft", *args)[0] == 0


def test_from_scratch(files, call, refused, tmp_path):
    """A base that no folder holds is made again from its seed."""
    assert call("sft", *sft_args(files, tmp_path / "run", **LORA, seed=7))[0] == 0
    plain = weights.load("scratch", seed=7, n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=get("toy").size)
    assert torch.equal(weights.load(tmp_path / "run/model").wte.weight, plain.wte.weight)
    says = "trained on weights that no file holds: use the run's model/"
    refused("eval_mcq", *flags(model=tmp_path / "run/adapter", data=files["mcq"]), says=says)


# --- TRL and peft ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["peft's", "ours"])
def test_dpo_steps_equal_trl_and_peft(start, monkeypatch, tmp_path):
    """Three steps from the same adapters: loss, rewards, log-probs, gradient norm of each, and the model in the end."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    import dpo
    from data.toy import VOCAB

    toy, rng = get("toy"), random.Random(0)
    folder = peers.gpt2_folder(tmp_path / "base", vocab_size=toy.size)
    toy.save(folder)
    words = [word for word in VOCAB if word.startswith(" ")]
    text = lambda most: "".join(rng.choices(words, k=rng.randint(1, most)))  # noqa: E731
    pairs = [{"prompt": text(20), "chosen": text(40), "rejected": text(40)} for _ in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    if start == "ours":  # q, k and v apart have more freedom fused: without them both train the same numbers
        config = LoRAConfig(4, 8, targets=LINEAR[1:4])
        adapter = saved(with_lora(weights.load(folder), config), folder, tmp_path / "adapter")
    else:
        adapter = peft_adapter(folder, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"])

    settings = {"init_from": adapter, "data": tmp_path / "pairs.jsonl", "batch_size": 4, "device": "cpu", "dtype": "float32",
                "schedule": "constant", "lr": 1e-3, "samples": 0, "lora_rank": 4, "micro_tokens": 200,
                "tokenizer": "toy"}  # fmt: skip
    records = run_script(monkeypatch, dpo, tmp_path / "run", **settings)

    class Peft:  # TRL takes a model instead of a folder; peers has only the latter
        def __str__(self):
            return str(folder)

    made = trl.DPOTrainer.__init__
    with peers.quiet():
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter, is_trainable=True)

    def with_model(self, *args, **kwargs):
        from transformers import AutoTokenizer

        made(self, *args, **kwargs | {"model": model, "processing_class": AutoTokenizer.from_pretrained(folder)})

    monkeypatch.setattr(trl.DPOTrainer, "__init__", with_model)
    trainer, watch = peers.dpo_trainer(
        Peft(), in_our_order(pairs), tmp_path / "o", per_device_train_batch_size=4, learning_rate=1e-3,
    )  # fmt: skip
    with peers.quiet():
        trainer.train()
    assert len(records) == len(watch.logs) == 3
    for record, log in zip(records, watch.logs, strict=True):
        for name in METRICS:
            wide = name.startswith("rewards")
            assert record[name] == pytest.approx(log[name], rel=2e-5, abs=5e-5 if wide else 1e-5), (name, record["step"])
    assert max(abs(log["rewards/margins"]) for log in watch.logs) > 0.01
    with torch.no_grad():
        got = weights.load(tmp_path / "run/model").logits(TOKENS % toy.size)
        torch.testing.assert_close(got, trainer.model.eval()(TOKENS % toy.size).logits, atol=1e-3, rtol=0)


# --- killed, and many ------------------------------------------------------------------------------------------------


def test_killed_lora_runs_resume_to_the_bit(files, lora_sft, sft_run, tmp_path, spawn):
    """kill -9 at random moments of a DPO run that goes on from an adapter: all is as in the unbroken run."""

    def args(folder):
        more = {"init_from": lora_sft / "adapter", "dropout": 0.1, "max_steps": 24, "save_every": 2, "eval_every": 3}
        return lora_dpo(files, sft_run, folder, **more)

    import time

    err, run = tmp_path / "err", tmp_path / "broken"
    for name in ("warm", "whole"):
        begin = time.monotonic()
        process = spawn("dpo", args(tmp_path / name), err)
        process.join()
        seconds = time.monotonic() - begin
        assert process.exitcode == 0, err.read_text()
    rng = random.Random(0)
    kills = resumed = 0
    while kills < 5:
        process = spawn("dpo", args(run), err)
        process.join(rng.uniform(0.1, 0.7) * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            resumed += any((run / "checkpoints").glob("step_*"))
        else:
            assert process.exitcode == 0, err.read_text()
            shutil.rmtree(run)
    last = spawn("dpo", args(run), err)
    last.join()
    assert last.exitcode == 0, err.read_text()
    assert resumed >= 1, "no kill came after a checkpoint: make the run longer"
    assert metrics(run) == metrics(tmp_path / "whole")
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_base_is_not_resumed(files, sft_run, lora_sft, call, refused, tmp_path):
    """The checkpoints hold adapters only: weights that changed under the run are noticed, at the end too."""
    folder = tmp_path / "base"
    shutil.copytree(sft_run / "model", folder)
    args = lora_args(files, sft_run, tmp_path / "run", init_from=folder)
    assert call("sft", *args)[0] == 0
    shutil.copyfile(lora_sft / "model/config.json", folder / "config.json")
    shutil.copyfile(lora_sft / "model/model.safetensors", folder / "model.safetensors")
    refused("sft", *args, says="the base differs from when its run was begun")
    refused("eval_mcq", *flags(model=tmp_path / "run/adapter", data=files["mcq"]), says="an adapter for other weights")


def test_the_merged_model_is_written_a_tensor_at_a_time(files, sft_run, call, monkeypatch, tmp_path):
    """Beside the model in training the base is never whole in memory again."""
    source, seen, alive = adapters.source, [], []

    def watched(*args, **options):
        config, tensors = source(*args, **options)

        def each():
            for name, tensor in tensors:
                seen.append(weakref.ref(tensor))
                alive.append(sum(ref() is not None for ref in seen))
                yield name, tensor

        return config, each()

    monkeypatch.setattr(adapters, "source", watched)
    assert call("sft", *lora_args(files, sft_run, tmp_path / "run", max_steps=1))[0] == 0
    assert len(seen) > 20 and max(alive) <= 4, "this one, the one before, and the two that the files tie"


def test_a_start_is_known_by_what_was_read(files, sft_run, lora_sft, call, refused, monkeypatch, tmp_path):
    """Another CPU makes other last bits of base + B A: the run goes on there, and reference files fit. Not so another scale."""
    begin, ref = tmp_path / "adapter", tmp_path / "ref.safetensors"
    shutil.copytree(lora_sft / "adapter", begin)
    made = ref_args(files, sft_run, ref, init_from=begin)
    args = lora_dpo(files, sft_run, tmp_path / "run", ref=ref, init_from=begin, max_steps=2, lora_alpha=None)
    full = dpo_args(files, sft_run, ref, tmp_path / "full", init_from=begin, max_steps=1)
    assert call("precompute_ref", *made)[0] == 0
    assert call("dpo", *args)[0] == 0
    exact = adapters.lora_delta
    monkeypatch.setattr(adapters, "lora_delta", lambda *args: exact(*args) * (1 + 1e-6))
    for again in (args, full):
        status, printed, err = call("dpo", *again)
        assert status == 0 and "warning" not in err and ("resuming" in printed) == (again is args), err
    config = begin / adapters.CONFIG
    raw = json.loads(config.read_text())
    raw["lora_alpha"], raw["alpha_pattern"] = 12, {"attn.c_attn": 36}
    config.write_text(json.dumps(raw))
    for again in (args, full):
        refused("dpo", *again, says="holds the log-probs of other weights")
    own = lora_dpo(files, sft_run, tmp_path / "own", init_from=begin, max_steps=1, lora_alpha=None)
    assert call("dpo", *own)[0] == 0
    raw["lora_alpha"], raw["alpha_pattern"] = 8, {"attn.c_attn": 24}
    config.write_text(json.dumps(raw))
    refused("dpo", *own, says="the base differs from when its run was begun")


@pytest.mark.parametrize("config", [True, False])
def test_a_run_does_not_write_over_its_own_base(config, files, sft_run, refused, tmp_path):
    """With --overwrite it would delete it first; where no config.toml says that it is a run's, it would be written over."""
    shutil.copytree(sft_run / "model", tmp_path / "run/model")
    if config:
        shutil.copy(sft_run / "config.toml", tmp_path / "run")
    whole = (tmp_path / "run/model/model.safetensors").read_bytes()
    args = lora_args(files, sft_run, tmp_path / "run", init_from=tmp_path / "run/model", overwrite="true" if config else None)
    refused("sft", *args, says="lies in it, and the run would write over it: name another out_dir")
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("replicate", [1, 0])
def test_two_processes_give_the_losses_of_one(replicate, files, lora_sft, sft_run, call, tmp_path):
    """Sharded (frozen and trained parameters in one group), and replicated; going on from an adapter, so with a start kept."""

    def args(name):
        more = {"init_from": lora_sft / "adapter", "max_steps": 4, "lora_dropout": 0, "micro_tokens": 300, "device": "cpu"}
        return lora_dpo(files, sft_run, tmp_path / name, **more)

    assert call("dpo", *args("one"))[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "dpo.py", *args("two")]
    command += flags(replicate=replicate)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    close(metrics(tmp_path / "two"), metrics(tmp_path / "one"), 1e-4)
    a, b = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


def test_two_processes_in_bfloat16(files, lora_sft, sft_run, world, tmp_path):
    """Sharded, frozen bfloat16 matrices beside float32 adapters; the reference is the adapter at the start. SGD: AdamW's first
    steps are as large for a gradient that is only rounding."""
    for n in (1, 2):
        more = {"init_from": lora_sft / "adapter", "max_steps": 4, "lora_dropout": 0, "dtype": "bfloat16", "replicate": 1}
        more |= {"optimizer": "sgd", "lr": 1.0}
        statuses, err = world(n, "dpo", lora_dpo(files, sft_run, tmp_path / str(n), **more, device="cpu"))
        assert not any(statuses), err
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for record in [*one, *two]:
        record.pop("rewards/accuracies")  # of 12 pairs, some nearly ties
    close(two, one, 1e-3)


# --- bad input -------------------------------------------------------------------------------------------------------

KEYS = {
    "rank 0": (
        {"lora_rank": 0, "lora_alpha": None, "lora_dropout": None, "lora_targets": "head"},
        "key lora_targets: given, but",
    ),
    "rank 0, alpha": ({"lora_rank": 0}, "key lora_alpha: given, but lora_rank is 0"),
    "negative": ({"lora_rank": -1}, "key lora_rank: -1 is too small"),
    "too large": ({"lora_rank": 33}, "key lora_rank: 33 is more than the model's width 32"),
    "unknown": ({"lora_targets": "attn.qvk head"}, "no layer 'attn.qvk': known are attn.qkv attn.proj"),
    "dropout": ({"lora_dropout": 1}, "key lora_dropout: 1.0 must be below 1"),
    "alpha": ({"lora_alpha": "inf"}, "key lora_alpha: inf is not a usable value"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_wrong_keys(kind, files, sft_run, refused, tmp_path):
    keys, says = KEYS[kind]
    refused("sft", *lora_args(files, sft_run, tmp_path / "run", **keys), says=says)
    assert not (tmp_path / "run").exists()


def broken(kind: str, folder: Path) -> str:
    """Spoil an adapter's folder; returns what must be said of it."""
    path, config = folder / adapters.WEIGHTS, json.loads((folder / adapters.CONFIG).read_text())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = "base_model.model.transformer.h.1.attn.c_proj.lora_"
    change, says = {
        "kind": ({"peft_type": "IA3"}, "peft_type must be LORA"),
        "dora": ({"use_dora": True}, "use_dora is set"),
        "bias": ({"bias": "all"}, "bias is 'all'"),
        "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        "rank": ({"r": 3}, "has rank 4, adapter_config.json says 3"),
        "no_rank": ({"r": None}, "r is None, not a number above 0"),
        "pattern": ({"rank_pattern": {"(": 3}}, "rank_pattern is {'(': 3}"),
        "no_base": ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
        "base_gone": ({"base_model_name_or_path": "/none/here"}, "base_model_name_or_path: no such folder: /none/here"),
        "itself": ({"base_model_name_or_path": str(folder)}, "is an adapter too"),
    }.get(kind, ({}, ""))
    (folder / adapters.CONFIG).write_text(json.dumps(config | change))
    if kind == "json":
        (folder / adapters.CONFIG).write_text("{")
        return "adapter_config.json"
    if kind == "no_file":
        path.unlink()
        return "no adapter_model.safetensors in"
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
        return "is damaged or no .safetensors file"
    if kind == "half":
        del tensors[name + "A.weight"]
        says = "A and B of blocks.1.attn.proj do not belong together"
    if kind == "foreign":
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
        says = "is no LoRA of a linear layer of transformers' GPT-2"
    if kind == "layers":
        tensors |= {
            re.sub(r"h\.1\.attn\.c_proj", "h.9.attn.c_proj", n): t.clone() for n, t in tensors.items() if n.startswith(name)
        }
        says = "an adapter for another model: blocks.9.attn.proj is none of the layers of"
    if kind == "shape":
        tensors[name + "B.weight"] = torch.zeros(33, 4)
        says = "an adapter for another model: that of blocks.1.attn.proj fits weights of shape (33, 32)"
    if kind == "head":
        tensors["base_model.model.lm_head.base_layer.weight"] = torch.zeros(get("toy").size, 32)
        says = "an adapter for another model: it has another wte.weight"
    if kind == "none":
        tensors = {"x": torch.zeros(1)}
        says = "tensor x is no LoRA"
    if kind not in ("json", "no_file", "cut"):
        save_file(tensors, path, metadata)
    return says


BROKEN = (
    "kind dora bias pissa rank no_rank pattern no_base base_gone itself json no_file cut half foreign layers shape head none"
)


@pytest.mark.parametrize("kind", BROKEN.split())
def test_broken_adapters(kind, files, lora_sft, refused, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(lora_sft / "adapter", folder)
    says = broken(kind, folder)
    refused("eval_mcq", *flags(model=folder, data=files["mcq"], out=tmp_path / "out.json"), says=says)
    assert not (tmp_path / "out.json").exists()
    run = {"init_from": folder, "tokenizer": "toy", "data": files["sft"], "out_dir": tmp_path / "run", "lora_rank": 4}
    refused("sft", *flags(**run), says=says)
