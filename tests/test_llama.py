"""The Llama family against transformers, and through every stage."""

import json
from dataclasses import replace

import pytest
import torch

import adapters
import generate
import weights
from base.errors import UserError
from data.batch import collate
from data.encode import Encoded
from data.tokenizer import get
from llama import Llama, LlamaConfig
from lora import LoRAConfig, add_lora
from losses import completion_sums
from tests.conftest import dpo_args, flags, metrics, ref_args, sft_args
from tests.tiny import NoTokenizer, with_lora

SCRATCH = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"))
CONFIG = LlamaConfig(
    n_layer=2, n_head=6, n_kv_head=2, head_dim=8, n_embd=24, n_inner=40, block_size=128, vocab_size=get("toy").size
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {  # what transformers can be told: model_type, and settings beside the sizes
    "llama": ("llama", {}),
    "llama with biases, wide heads, Llama 3's positions": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "rope_parameters": LLAMA3},
    ),
    "llama, tied, linear scaling": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e3}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3 with biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3, tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


def theirs(kind: str, settings: dict):
    """A tiny random model of transformers, with no parameter at a value that could hide a mistake (0 or 1)."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 101}
    config = transformers.AutoConfig.for_model(kind, **sizes, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + ("norm" in name))
    return model


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """transformers' model of a kind, and ours from the folder that it saved."""
    model = theirs(*KINDS[request.param])
    folder = tmp_path_factory.mktemp("pair") / "model"
    model.save_pretrained(folder)
    return model, weights.load(folder)


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 101, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_logits_equal_transformers(pair, tmp_path):
    hf, ours = pair
    ids = tokens(2, 100)
    torch.testing.assert_close(ours.logits(ids), hf(ids).logits, rtol=0, atol=1e-4)
    weights.save(ours, NoTokenizer(), tmp_path / "back")
    back = type(hf).from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(back(ids).logits, hf(ids).logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_packed_rows_equal_transformers_plain_sequences(pair):
    hf, ours = pair
    lengths = [(4, (3, 5)), (7, (1, 2, 6)), (1, (9,))]
    items = [
        Encoded(tokens(p, seed=p).numpy(), [tokens(c, seed=10 + c).numpy() for c in completions], n, n)
        for n, (p, completions) in enumerate(lengths)
    ]
    batch = collate([items])
    sums = iter(completion_sums(ours(batch), batch.completion, batch.n_completions))
    for item in items:
        for completion in item.completions:
            ids = torch.tensor([*item.prompt, *completion])[None]
            logps = hf(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
            torch.testing.assert_close(next(sums), logps[len(item.prompt) - 1 :].sum(), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.slow
def test_greedy_samples_equal_transformers(pair):
    hf, ours = pair
    hf.generation_config.eos_token_id = None
    prompts = [tokens(1 + n % 23, seed=n).tolist() for n in range(100)]
    for prompt, written in zip(prompts, generate.greedy(ours, prompts, 8, stop=-1), strict=True):
        ids = torch.tensor([prompt])
        out = hf.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert out[0, len(prompt) :].tolist() == written


@pytest.mark.parametrize("source", ["ours", "peft"])
@torch.no_grad()
def test_adapters_are_pefts(pair, source, tmp_path):
    peft = pytest.importorskip("peft")
    hf, ours = pair
    base, ids = tmp_path / "base", tokens(2, 30)
    weights.save(ours, NoTokenizer(), base)
    adapter = tmp_path / "adapter"
    if source == "ours":
        model = with_lora(weights.load(base), 3, 6.0, Llama.LINEAR)
        sha256 = weights.fingerprint(weights.load(base))
        model.origin = weights.Origin(str(base), sha256, sha256)
        adapters.save(model, NoTokenizer(), adapter)
        expected = model.logits(ids)
    else:
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        config.base_model_name_or_path = str(base)
        made = peft.get_peft_model(type(hf).from_pretrained(base), config).eval()
        made.save_pretrained(adapter)
        expected = made(ids).logits
    there = peft.PeftModel.from_pretrained(type(hf).from_pretrained(base), adapter).eval()
    torch.testing.assert_close(there(ids).logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(weights.load(adapters.source(str(adapter))).logits(ids), expected, rtol=0, atol=1e-4)


def test_lora_sits_on_all_linear_layers():
    model = weights.empty(replace(CONFIG, model_type="qwen3"))
    add_lora(model, LoRAConfig(2, 2.0, Llama.LINEAR))
    adapted = {name for name, module in model.named_modules() if getattr(module, "lora", None) and "." in name}
    assert len(adapted) == 7 * CONFIG.n_layer and model.head.lora


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gemma"}, "model_type is 'gemma', known here: gpt2, llama"),
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', computed here is 'silu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn', computed here are default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None, not a number above 0"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor is 4.0, not below high_freq_factor 4.0"),
        ({"rope_scaling": 4}, "rope_scaling is 4, not an object"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is no multiple of num_key_value_heads 4"),
        ({"head_dim": 7}, "head_dim is 7, rotary positions need an even number"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"head_dim": None, "hidden_size": 25}, "head_dim is None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"auto_map": {"AutoModel": "x.py"}}, "auto_map"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window is 64"),
        ({"model_type": "mistral", "sliding_window": ..., "max_position_embeddings": 8192}, "sliding_window is 4096"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "layer_types is"),
        ({"attention_bias": 1.5}, "attention_bias is 1.5"),
    ],
)
def test_refused(change, message, tmp_path):
    path = tmp_path / "config.json"
    raw = {"model_type": "llama", **CONFIG.to_hf()} | change
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    with pytest.raises(UserError) as error:
        weights.read_config(path)
    assert str(path) in str(error.value) and message in str(error.value)


# --- through the stages ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a random model."""
    folder = tmp_path_factory.mktemp("llama") / "base"
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in weights.empty(CONFIG).named_parameters()}
    drawn = {
        name: torch.empty(shape).normal_(0.0, 0.1, generator=generator) if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    weights.save_tensors(CONFIG, drawn.items(), get("toy"), folder)
    return folder


@pytest.fixture(scope="module")
def sft(base, files, world, tmp_path_factory):
    """Its run of SFT in one process."""
    out = tmp_path_factory.mktemp("llama") / "sft"
    codes, err = world(1, "sft", sft_args(files, out, **SCRATCH, init_from=base, tokenizer=None))
    assert codes == [0], err
    return out


def close(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-4) and x["step"] == y["step"]


@pytest.mark.slow
def test_sft_learns_and_two_processes_give_the_same_curve(base, sft, files, world, tmp_path):
    curve = metrics(sft)
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
    model = weights.load(sft / "model")
    saved = weights.load(sft / "checkpoints/step_10")
    torch.testing.assert_close(saved.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert isinstance(model, Llama) and not torch.equal(model.head.weight, weights.load(base).head.weight)
    args = sft_args(files, tmp_path / "two", **SCRATCH, init_from=base, tokenizer=None, replicate=1, dropout=0)
    codes, err = world(2, "sft", args)
    assert codes == [0, 0], err
    codes, err = world(1, "sft", sft_args(files, tmp_path / "one", **SCRATCH, init_from=base, tokenizer=None, dropout=0))
    assert codes == [0], err
    close(metrics(tmp_path / "one"), metrics(tmp_path / "two"))


def test_a_resumed_run_equals_an_unbroken_one(base, sft, files, world, tmp_path):
    args = sft_args(files, tmp_path / "run", **SCRATCH, init_from=base, tokenizer=None)
    codes, err = world(1, "sft", args, limits={0: 30_000})  # too little room for a second checkpoint, as on a full disk
    assert codes == [2], err
    codes, err = world(1, "sft", args)
    assert codes == [0], err
    assert metrics(tmp_path / "run") == metrics(sft)


def test_reference_dpo_lora_and_sampling(sft, files, call, tmp_path):
    status, _, err = call("precompute_ref", *ref_args(files, sft, tmp_path / "ref.safetensors"))
    assert status == 0, err
    status, _, err = call("dpo", *dpo_args(files, sft, tmp_path / "ref.safetensors", tmp_path / "dpo"))
    assert status == 0, err
    curve = metrics(tmp_path / "dpo")
    assert curve[0]["loss"] == pytest.approx(0.6931, abs=1e-3) and curve[-1]["loss"] < curve[0]["loss"]

    status, _, err = call("dpo", *dpo_args(files, sft, None, tmp_path / "lora", lora_rank=2, lr=1e-2))
    assert status == 0, err
    adapter = json.loads((tmp_path / "lora" / "adapter" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == [*Llama.LINEAR[:-1], "lm_head"] and not adapter["fan_in_fan_out"]
    merged, adapted = (
        weights.load(tmp_path / "lora" / "model"),
        weights.load(adapters.source(str(tmp_path / "lora" / "adapter"))),
    )
    torch.testing.assert_close(merged.state_dict(), adapted.state_dict())
    assert metrics(tmp_path / "lora")[-1]["loss"] < 0.69

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Today Tom"}\n')
    keys = {"model": tmp_path / "lora" / "adapter", "prompts": tmp_path / "prompts.jsonl", "out": tmp_path / "out.jsonl"}
    status, _, err = call("sample", *flags(**keys, n=3, max_new_tokens=5))
    assert status == 0, err
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["completions"]) == 3
    status, out, err = call("eval_mcq", "--model", tmp_path / "dpo" / "model", "--data", files["mcq"])
    assert status == 0 and json.loads(out.splitlines()[-1])["n"] == 48, err
