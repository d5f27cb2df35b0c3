"""Adapters on disk: ours in peft, peft's here, merged for transformers, and what is refused."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapters
import sft
import weights
from base.errors import UserError
from lora import add_lora
from model import GPT
from runtime import config
from tests import peers, tiny
from tests.conftest import flags

pytest.importorskip("peft")
TOKENS = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return peers.gpt2_folder(tmp_path_factory.mktemp("adapters") / "tied")


@pytest.fixture(scope="module")
def untied(base) -> Path:
    return peers.gpt2_folder(base.with_name("untied"), tied=False)


@pytest.fixture(scope="module")
def ours(base) -> Path:
    """An adapter on every layer of `base`."""
    return tiny.save_adapter(tiny.with_lora(weights.load(base)), base, base.with_name("ours"))


@pytest.fixture
def copied(ours, tmp_path) -> Path:
    """A copy of `ours` that a test may spoil."""
    return shutil.copytree(ours, tmp_path / "adapter")


def edit(folder: Path, **changes) -> None:
    path = folder / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def opened(folder: Path, **options) -> tuple[weights.Source, dict[str, torch.Tensor]]:
    found = adapters.source(str(folder), **options)
    return found, dict(found.tensors)


def close(logits: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(logits, want, atol=1e-4, rtol=0)


SETS = {
    "all": {},
    "blocks": {"targets": GPT.LINEAR[:4]},
    "qkv": {"targets": ("attn.qkv",)},
    "head": {"targets": ("head",)},
    "stabilised": {"stabilised": True},
    "fused qkv": {"split": False},
}


@pytest.mark.parametrize("kind, tie", [*((kind, "base") for kind in SETS), ("all", "untied"), ("head", "untied")])
@torch.no_grad()
def test_an_adapter_of_ours(kind, tie, request, tmp_path):
    """Equal logits in PeftModel, merged here, and merged and saved for transformers without peft; and read as it was."""
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(tie)
    model = tiny.with_lora(weights.load(folder), alpha=10.5, **SETS[kind])
    adapter = tiny.save_adapter(model, folder, tmp_path / "adapter")
    want = model.logits(TOKENS)
    assert (want - weights.load(folder).logits(TOKENS)).abs().max() > 0.1
    close(peers.peft_model(folder, adapter)(TOKENS).logits, want)

    merged = adapters.load(str(adapter))
    close(merged.logits(TOKENS), want)
    weights.save(merged, tiny.NoTokenizer(), tmp_path / "model")
    assert weights.fingerprint(weights.load(tmp_path / "model")) == weights.fingerprint(merged)
    with peers.quiet():
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    close(plain(TOKENS).logits, want)

    read = adapters.source(str(adapter), merge=False).adapter
    parameters, values = dict(model.named_parameters()), dict(read.initial(False))
    assert read.config == model.lora and values.keys() == {n for n, p in parameters.items() if p.requires_grad}
    assert all(torch.equal(values[n], parameters[n]) for n in values)


PEFT = {
    "fused": {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 5, "lora_alpha": 7},
    "head": {"target_modules": ["c_attn", "lm_head"], "r": 6, "lora_alpha": 3, "use_rslora": True},
    "only the head": {"target_modules": ["lm_head"], "r": 2, "lora_alpha": 2},
    "ranks": {"target_modules": ["c_attn", "mlp.c_proj"], "r": 3, "lora_alpha": 3, "rank_pattern": {"c_attn": 6},
              "alpha_pattern": {"h.1.attn.c_attn": 2.5}},
    "one block": {"target_modules": ["c_fc"], "r": 2, "layers_to_transform": [0]},
}  # fmt: skip


@pytest.mark.parametrize("kind", PEFT)
@torch.no_grad()
def test_an_adapter_of_peft(kind, base, tmp_path):
    """Its logits: merged, and, where all layers are alike, as adapters to train on. A copy of the head, which peft puts
    beside an adapter on it, is passed over."""
    folder = peers.peft_adapter(base, tmp_path / "adapter", **PEFT[kind])
    want = peers.peft_model(base, folder)(TOKENS).logits
    close(adapters.load(str(folder)).logits(TOKENS), want)
    found, tensors = opened(folder, merge=False)
    assert (found.adapter.config is None) == (kind in ("ranks", "one block"))
    if found.adapter.config:
        model = weights.empty(found.config)
        add_lora(model, found.adapter.config)
        model.load_state_dict(tensors | dict(found.adapter.initial(False)), assign=True)
        close(model.logits(TOKENS), want)


def test_origin_follows_from_what_was_read(base, copied, monkeypatch):
    """Not from the last bits of base + B A, which differ between processors. Another scale is another start."""
    plain = weights.fingerprint(weights.load(base))
    merged, _ = opened(copied)
    want = merged.origin()
    assert want.base == str(base) and want.base_sha256 == plain != want.start_sha256
    exact = adapters.lora_delta
    monkeypatch.setattr(adapters, "lora_delta", lambda *args: exact(*args) * (1 + 1e-6))
    for merge in (True, False):
        assert opened(copied, merge=merge)[0].origin() == want
    edit(copied, lora_alpha=12, alpha_pattern={"attn.c_attn": 36})
    other = opened(copied)[0].origin()
    assert replace(other, start_sha256=want.start_sha256) == want != other


def test_merging_holds_a_tensor_at_a_time(ours, tmp_path):
    found, seen, alive = adapters.source(str(ours)), [], []

    def watched():
        for name, tensor in found.tensors:
            seen.append(weakref.ref(tensor))
            alive.append(sum(ref() is not None for ref in seen))
            yield name, tensor

    weights.save_tensors(found.config, watched(), tiny.NoTokenizer(), tmp_path / "model")
    assert len(seen) > 20 and max(alive) <= 4, "this one, the one before, and the two that the files tie"


# --- mistakes ----------------------------------------------------------------------------------------------------------

CONFIGS = {  # changes in adapter_config.json, and what is said
    "another kind": ({"peft_type": "IA3"}, "peft_type must be LORA"),
    "dora": ({"use_dora": True}, "use_dora is set"),
    "bias": ({"bias": "all"}, "bias is 'all'"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "another rank": ({"r": 3}, "has rank 4, adapter_config.json says 3"),
    "no rank": ({"r": None}, "r is None, not a number above 0"),
    "alpha beyond a float": ({"lora_alpha": 10**299}, "lora_alpha is 1000.*, not a number above 0 and up to"),
    "rank": ({"r": 10**9}, "r is 1000000000, not a number above 0 and up to"),
    "nan": ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number"),
    "bomb": ({"alpha_pattern": {"(a+)+b": 3}}, "rank_pattern and alpha_pattern must map names"),
    "a list": ({"rank_pattern": ["c_attn"]}, "rank_pattern and alpha_pattern must map names"),
    "many patterns": ({"alpha_pattern": {f"c{n}": 1 for n in range(10_000)}}, "rank_pattern and alpha_pattern must map"),
    "home of nobody": ({"base_model_name_or_path": "~no_such_user/base"}, "~no_such_user/base is no folder"),
    "half a letter": ({"base_model_name_or_path": "\ud800"}, "is no folder"),
    "pattern": ({"rank_pattern": {"(": 3}}, "rank_pattern and alpha_pattern must map names"),
    "no base": ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
    "base gone": ({"base_model_name_or_path": "/none/here"}, "base_model_name_or_path: /none/here is no folder"),
    "from scratch": ({"base_model_name_or_path": "scratch"}, "trained on weights that no file holds: use the run's model/"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs_that_are_refused(kind, copied):
    changes, says = CONFIGS[kind]
    edit(copied, **changes)
    with pytest.raises(UserError, match=rf"{copied}.*{says}"):
        adapters.load(str(copied))


NAME = "base_model.model.transformer.h.1.attn.c_proj.lora_"
TENSORS = {  # tensors that take another's place (None: it is gone), and what is said
    "half": ({NAME + "A.weight": None}, "A and B of transformer.h.1.attn.c_proj do not belong together"),
    "another shape": ({NAME + "B.weight": torch.zeros(33, 4)}, r"h.1.attn.c_proj fits \(33, 32\), .* has \(32, 32\)"),
    "another layer": ({NAME.replace("h.1", "h.9") + "A.weight": torch.zeros(4, 32)}, "h.9.* is no LoRA of a linear layer"),
    "embedding": ({"base_model.model.transformer.wte.lora_embedding_A": torch.zeros(4, 97)}, "wte.* is no LoRA of a linear"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_refused(kind, copied):
    changes, says = TENSORS[kind]
    path = copied / adapters.WEIGHTS
    save_file({n: t for n, t in (load_file(path) | changes).items() if t is not None}, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"{path}.*{says}"):
        adapters.load(str(copied))


def test_files_that_are_refused(base, ours, copied):
    def refused(says: str) -> None:
        with pytest.raises(UserError, match=says):
            adapters.load(str(copied))

    path = copied / adapters.WEIGHTS
    save_file({}, path)
    refused("no LoRA tensors in it")
    path.write_bytes((ours / adapters.WEIGHTS).read_bytes()[:-100])
    refused("is damaged or no .safetensors file")
    path.unlink()
    refused("no adapter_model.safetensors in")
    edit(copied, base_model_name_or_path=str(copied))
    refused("is an adapter too")
    (copied / adapters.CONFIG).write_text("{")
    refused("adapter_config.json is not valid JSON")


def test_other_weights_than_the_adapter_was_trained_on(base, copied, tmp_path):
    other = peers.gpt2_folder(tmp_path / "other", seed=1)
    edit(copied, base_model_name_or_path=str(other))
    with pytest.raises(UserError, match=f"an adapter for other weights .* than {other} has now"):
        adapters.load(str(copied))


def test_keys_must_agree_with_the_adapter(base, ours, tmp_path):
    """Where a run goes on from one; what is not given is taken from it."""
    one_block = peers.peft_adapter(base, tmp_path / "one block", **PEFT["one block"])

    def chosen(folder: Path, **keys):
        cfg = config.load(sft.Config, flags(init_from=folder, data="toy", out_dir="run", **{"lora_rank": 4, **keys}))
        return adapters.lora_config(cfg, adapters.source(str(folder), merge=False))

    assert chosen(ours, lora_dropout=0.1) == replace(adapters.source(str(ours)).adapter.config, dropout=0.1)
    some = chosen(base, lora_targets="head, mlp.fc", lora_rslora="true")
    assert (some.targets, some.alpha, some.scale) == (("mlp.fc", "head"), 4.0, 2.0)
    for folder, keys, says in (
        (ours, {"lora_rank": 8}, "key lora_rank: 8, but init_from .* is an adapter with 4"),
        (ours, {"lora_alpha": 4.0}, "key lora_alpha: 4.0, but init_from .* is an adapter with 8"),
        (ours, {"lora_targets": "head"}, "key lora_targets: head, but init_from .* is an adapter with attn.qkv attn.proj mlp"),
        (ours, {"lora_rslora": "true"}, "key lora_rslora: True, but init_from"),
        (one_block, {"lora_rank": 2}, "its layers differ in rank, scale or targets: .* train without lora_rank"),
        (base, {"lora_rank": 33}, "key lora_rank: 33 is more than the model's width 32"),
        (base, {"lora_targets": "attn.qvk head"}, "no layer 'attn.qvk': known are .*did you mean attn.qkv"),
    ):
        with pytest.raises(UserError, match=says):
            chosen(folder, **keys)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_head_of_another_model_is_refused(tied, tmp_path):
    """peft saves the base's own head or embedding beside it: they must be those of the base that is named."""
    base = peers.gpt2_folder(tmp_path / "base", tied=tied)
    folder = peers.peft_adapter(base, tmp_path / "adapter", **PEFT["only the head"])
    path = folder / adapters.WEIGHTS
    tensors = load_file(path)
    copies = [name for name in tensors if "lora" not in name]
    assert copies
    opened(folder)
    for name in copies:
        save_file(tensors | {name: tensors[name] + 1}, path, {"format": "pt"})
        with pytest.raises(UserError, match="an adapter for another model: it has another"):
            opened(folder)
