"""The adapter layer and its sums; runs with adapters: references without a file, precision, kills, processes."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import adapters
import sft
import weights
from data.batch import collate
from data.tokenizer import get
from generate import greedy
from lora import LoRA, LoRAConfig, add_lora, as_started, is_target
from model import GPT, SIZES, GPTConfig
from runtime import config, distributed
from runtime.build import build_model
from tests import tiny
from tests.conftest import close, dpo_args, flags, good, metrics, ref_args, script, sft_args
from tests.tiny import example, plain_logps, with_lora

LORA = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "lr": 1e-2}


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rank", "count"),
    [("gpt2-medium", 16, 7_898_384), ("gpt2-medium", 32, 15_796_768), ("gpt2-large", 16, 14_095_632)],
)
def test_parameter_counts(name, rank, count):
    """Every linear layer, head included, q, k and v apart: what the source of recipe E prints."""
    model = weights.empty(GPTConfig(*SIZES[name]))
    whole = sum(p.numel() for p in model.parameters())
    add_lora(model, LoRAConfig(rank, rank, GPT.LINEAR))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert sum(p.numel() for p in model.parameters()) == whole + count


def test_an_adapter_by_hand():
    """W x + alpha / rank * B A x, q, k and v each with an A and B of their own; alpha / sqrt(rank) when stabilised."""
    model = with_lora(tiny.gpt(), alpha=6.0, targets=("attn.qkv",))
    layer, x = model.blocks[1].attn.qkv, torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    wanted = F.linear(x, layer.weight, layer.bias)
    for i in range(3):
        a, b = layer.lora.a[4 * i : 4 * i + 4], layer.lora.b[32 * i : 32 * i + 32]
        wanted[:, 32 * i : 32 * i + 32] += 1.5 * x @ a.T @ b.T
    torch.testing.assert_close(layer(x), wanted)
    assert LoRAConfig(4, 6.0, (), stabilised=True).scale == 3.0
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"blocks.{i}.attn.qkv.lora.{letter}" for i in range(3) for letter in "ab"
    ]


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_rows_logits_and_generation_agree(tied):
    """Rows, whole logits and cached generation compute one model; without its adapters it is the base to the bit."""
    plain, model = tiny.gpt(tied=tied), with_lora(tiny.gpt(tied=tied), rank=3)
    rng = np.random.default_rng(0)
    items = [example(rng, 7, 3, 5), example(rng, 4, 6)]
    batch = collate([items])
    assert (model(batch) - plain_logps(model, items)).abs().max() < 1e-4
    assert (model(batch) - plain(batch)).abs().max() > 0.1
    with as_started(model):
        assert torch.equal(model(batch), plain(batch))
    prompt = items[0].prompt.tolist()
    (written,) = greedy(model, [prompt], 6, -1)
    for n, token in enumerate(written):
        assert model.logits(torch.tensor([prompt + written[:n]]))[0, -1].argmax() == token


def test_nothing_to_predict_gives_zero_gradients():
    """A rank of a sharded model without work must have every gradient that the others have."""
    model = with_lora(tiny.gpt())
    model(collate([])).sum().backward()
    assert all(not p.requires_grad or (p.grad is not None and not p.grad.any()) for p in model.parameters())


def test_dropout_acts_in_training_only():
    model = with_lora(tiny.gpt(), dropout=0.5)
    batch = collate([[example(np.random.default_rng(0), 5, 4)]])
    with torch.no_grad():
        assert torch.equal(model(batch), model(batch))
        model.train()
        assert not torch.equal(model(batch), model(batch))


# --- runs ------------------------------------------------------------------------------------------------------------


def lora_args(files, sft_run, out, **keys) -> list[str]:
    scratch = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "tokenizer"))
    return sft_args(files, out, **{"init_from": sft_run / "model", **scratch, **LORA, **keys})


def lora_dpo(files, sft_run, out, **keys) -> list[str]:
    return dpo_args(files, sft_run, None, out, **{**LORA, "max_steps": 6, **keys})


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in metrics(folder) if r["split"] == "train"]


@pytest.fixture(scope="module")
def lora_sft(files, sft_run, tmp_path_factory) -> Path:
    """A finished SFT run with adapters on every layer of sft_run's model."""
    folder = tmp_path_factory.mktemp("lora_sft") / "run"
    with contextlib.redirect_stdout(None):
        assert script("sft", *lora_args(files, sft_run, folder)) == 0
    return folder


def test_a_run_with_lora(files, sft_run, lora_sft, call):
    """Adapters learn, the base stays; adapter/ is peft's, model/ transformers' with the base's other weights to the bit; a
    checkpoint holds adapters only; both folders evaluate alike."""
    assert losses(lora_sft)[-1] < losses(lora_sft)[0]
    _, printed, _ = call("sft", *lora_args(files, sft_run, lora_sft))  # finished: writes the same again
    assert "model and adapter" in printed.splitlines()[-2]
    # a token: 4 operations a frozen weight (12 width^2 + 13 width a block), 6 one of an adapter (rank * 18 width a block)
    assert f"{2 * (4 * (12 * 32 * 32 + 13 * 32) + 6 * 4 * 18 * 32) / 1e6:,.1f} MFLOP a token" in printed
    saved = load_file(lora_sft / "checkpoints/step_10/rank_0.safetensors")
    assert saved and all(".lora." in name for name in saved)

    merged, start = (load_file(f / "model/model.safetensors") for f in (lora_sft, sft_run))
    assert merged.keys() - start.keys() == {"lm_head.weight"}
    for name, tensor in start.items():
        adapted = name.endswith(".weight") and ("attn.c_" in name or "mlp.c_" in name)
        assert torch.equal(merged[name], tensor) != adapted, name
    a, b = (weights.fingerprint(weights.load(adapters.source(str(lora_sft / name)))) for name in ("model", "adapter"))
    assert a == b
    results = []
    for name in ("model", "adapter"):
        status, printed, err = call("eval_mcq", *flags(model=lora_sft / name, data=files["mcq"]))
        assert status == 0, err
        results.append(json.loads(printed.splitlines()[-1]))
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_reference_without_a_file_equals_one_with(dtype, files, sft_run, call, tmp_path):
    """Adapters off is the model that the file was made from: the same run, loss for loss."""
    reference = tmp_path / "ref.safetensors"
    assert call("precompute_ref", *ref_args(files, sft_run, reference, dtype=dtype))[0] == 0
    for name, ref in (("off", None), ("file", reference)):
        args = lora_dpo(files, sft_run, tmp_path / name, ref=ref, loss="aot", micro_tokens=300, dtype=dtype)
        status, printed, err = call("dpo", *args)
        assert status == 0, err
        assert ("the model as this run began" in printed) == (name == "off")
    gap = float(re.search(r"differ by at most (\S+) nats per token", printed)[1])
    assert gap < 1e-5, "the model trained is not the one that the file was made from"
    off, file = metrics(tmp_path / "off"), metrics(tmp_path / "file")
    close(off, file, 1e-5)
    assert abs([r for r in off if r["split"] == "train"][-1]["rewards/margins"]) > 0.001


def test_going_on_from_an_adapter(files, sft_run, lora_sft, call, monkeypatch, tmp_path):
    """DPO goes on from SFT's adapter: the reference is that start, not the bare base; what is written sits on the base. The
    start is kept only for a run that measures its reference itself."""
    kept, keep = [], LoRA.keep_start
    monkeypatch.setattr(LoRA, "keep_start", lambda lora: kept.append(lora) or keep(lora))
    begin, ref = lora_sft / "adapter", tmp_path / "ref.safetensors"
    assert call("precompute_ref", *ref_args(files, sft_run, ref, init_from=begin))[0] == 0
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
    raw = json.loads((tmp_path / "own/adapter/adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str(sft_run / "model")
    a, b = (weights.load(adapters.source(str(tmp_path / "own" / name))) for name in ("adapter", "model"))
    assert weights.fingerprint(a) == weights.fingerprint(b)


def test_activation_checkpointing_changes_no_loss(files, sft_run, lora_sft, call, tmp_path):
    assert call("sft", *lora_args(files, sft_run, tmp_path / "run", activation_checkpointing="true"))[0] == 0
    close(metrics(tmp_path / "run"), metrics(lora_sft), 1e-5)


def test_bfloat16_holds_the_frozen_matrices_in_it(files, sft_run, call, tmp_path):
    """Adapters, embeddings and norms stay float32, and what is written has the base's own values."""
    args = lora_args(files, sft_run, tmp_path / "run", dtype="bfloat16")
    assert call("sft", *args)[0] == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    model = build_model(config.load(sft.Config, args), get("toy"), distributed.setup("cpu", "bfloat16"))
    half = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert half == {n for n, p in model.named_parameters() if n.endswith(tuple(f"{name}.weight" for name in GPT.LINEAR))}
    whole = weights.load(sft_run / "model")
    assert torch.equal(model.wte.weight, whole.wte.weight) and torch.equal(model.wpe.weight, whole.wpe.weight)
    written = weights.load(tmp_path / "run/model")
    assert torch.equal(written.ln_f.weight, whole.ln_f.weight) and torch.equal(written.wte.weight, whole.wte.weight)


def test_the_keys_make_the_adapters(files, sft_run, tmp_path):
    """lora_alpha 0 is the rank, which counts sqrt(rank) times when stabilised."""
    keys = {"lora_rslora": "true", "lora_dropout": 0.2, "lora_alpha": 0, "lora_targets": "head, mlp.fc"}
    cfg = config.load(sft.Config, lora_args(files, sft_run, tmp_path / "run", **keys))
    model = build_model(cfg, get("toy"), distributed.setup("cpu"))
    assert model.lora == LoRAConfig(4, 4.0, ("mlp.fc", "head"), 0.2, True)
    layers = [m for m in model.modules() if isinstance(m, LoRA)]
    assert {(m.dropout, m.scale, len(m.a)) for m in layers} == {(0.2, 2.0, 4)} and len(layers) == 3
    assert all(m.a.any() and not m.b.any() for m in layers), "a run does not start as its base"


def test_from_scratch(files, call, refused, tmp_path):
    """A base that no folder holds is made again from its seed."""
    assert call("sft", *sft_args(files, tmp_path / "run", **LORA, seed=7))[0] == 0
    plain = weights.load("scratch", seed=7, n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=get("toy").size)
    assert torch.equal(weights.load(tmp_path / "run/model").wte.weight, plain.wte.weight)
    says = "trained on weights that no file holds: use the run's model/"
    refused("eval_mcq", *flags(model=tmp_path / "run/adapter", data=files["mcq"]), says=says)


# --- resumed, and many -----------------------------------------------------------------------------------------------


def test_another_base_is_not_resumed(files, sft_run, lora_sft, call, refused, tmp_path):
    """The checkpoints hold adapters only: weights that changed under the run are noticed, at the end too."""
    folder = shutil.copytree(sft_run / "model", tmp_path / "base")
    args = lora_args(files, sft_run, tmp_path / "run", init_from=folder, max_steps=2)
    assert call("sft", *args)[0] == 0
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(lora_sft / "model" / name, folder / name)
    refused("sft", *args, says="the base differs from when its run was begun")
    refused("eval_mcq", *flags(model=tmp_path / "run/adapter", data=files["mcq"]), says="an adapter for other weights")


def test_a_run_from_before_lora_is_resumed_without_it(files, call, refused, tmp_path):
    """Its config.toml lacks the keys."""
    args, path = sft_args(files, tmp_path / "run", max_steps=1), tmp_path / "run/config.toml"
    assert call("sft", *args)[0] == 0
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("lora_")))
    refused("sft", *args, "--lora_rank", 4, says="holds a run with lora_rank = 0, not 4")
    assert call("sft", *args)[0] == 0


def test_a_run_does_not_write_over_its_own_base(files, sft_run, refused, tmp_path):
    """With --overwrite it would delete it first."""
    shutil.copytree(sft_run / "model", tmp_path / "run/model")
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    for overwrite in ("true", None):
        args = lora_args(files, sft_run, tmp_path / "run", init_from=tmp_path / "run/model", overwrite=overwrite)
        refused(
            "sft",
            *args,
            says="would write over {}, which key init_from names: name another out_dir".format(tmp_path / "run/model"),
        )
        assert (tmp_path / "run/model/model.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [({"replicate": 1}, 1e-4), ({"replicate": 0}, 1e-4),
     # SGD: AdamW's first steps are as large for a gradient that is only rounding
     ({"replicate": 1, "dtype": "bfloat16", "optimizer": "sgd", "lr": 1.0}, 1e-3)],
    ids=["sharded", "replicated", "sharded bfloat16"],
)  # fmt: skip
def test_two_processes_give_the_losses_of_one(more, tolerance, files, lora_sft, sft_run, world, tmp_path):
    """Frozen and trained parameters in one group; from an adapter, so with its start kept."""
    keys = {"init_from": lora_sft / "adapter", "max_steps": 4, "lora_dropout": 0, "micro_tokens": 300, **more}
    for n in (1, 2):
        good(world(n, "dpo", lora_dpo(files, sft_run, tmp_path / str(n), **keys)))
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    if "dtype" in more:
        for record in [*one, *two]:
            record.pop("rewards/accuracies")  # of 12 pairs, some nearly ties
    else:
        a, b = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("1", "2"))
        assert a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=tolerance) for name in a)
    close(two, one, tolerance)


def test_mistakes_end_in_one_line(files, sft_run, lora_sft, refused, tmp_path):
    out, folder = tmp_path / "run", shutil.copytree(lora_sft / "adapter", tmp_path / "adapter")
    refused("sft", *lora_args(files, sft_run, out, lora_rank=0), says="key lora_alpha: given, but lora_rank is 0")
    refused("sft", *lora_args(files, sft_run, out, lora_targets="attn.qvk"), says="did you mean attn.qkv?")
    (folder / adapters.WEIGHTS).write_bytes(b"")
    refused("sft", *lora_args(files, sft_run, out, init_from=folder), says="is damaged or no .safetensors file")
    assert not out.exists()


def test_a_target_is_a_whole_name():
    """Not any name that ends in the same letters: v is not qkv."""
    assert (
        is_target("blocks.0.attn.proj", ("mlp.fc", "attn.proj"))
        and is_target("blocks.0.v", ("v",))
        and is_target("head", ("head",))
    )
    assert not is_target("blocks.0.attn.qkv", ("v",)) and not is_target("blocks.0.mlp.proj", ("attn.proj",))
