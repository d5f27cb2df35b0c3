"""Weights in and out, against transformers' GPT-2 on tiny random weights: every source gives its logits."""

import errno
import hashlib
import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import weights
from base.errors import UserError
from base.files import safetensors_bytes
from data.tokenizer import get
from model import GPT, SIZES, GPTConfig
from tests.hub import serving

TINY = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 40}
TOKENS = torch.randint(0, 40, (3, 16), generator=torch.Generator().manual_seed(0))


class Tokenizer:
    """What `save` needs of one."""

    name, eot, size = "tiny", 39, 40

    def save(self, folder):
        (folder / "tokenizer_config.json").write_text("{}")


@pytest.fixture(scope="session")
def theirs():
    """A tiny GPT-2 of transformers, its weights large enough that nothing hides below the tolerance."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPT2Config(**TINY, initializer_range=0.3, bos_token_id=39, eos_token_id=39)
    model = transformers.GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # biases and layer norms too
    return model


@pytest.fixture(scope="session")
def logits(theirs):
    with torch.no_grad():
        return theirs(TOKENS).logits


@pytest.fixture(scope="session")
def saved(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of transformers' folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


def ours(source, **options):
    model = weights.load(source, **options)
    assert all(p.dtype == torch.float32 and p.requires_grad and not p.is_meta for p in model.parameters())
    with torch.no_grad():
        return model.eval().logits(TOKENS)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def replace(folder, state, name="model.safetensors"):
    for old in folder.glob("*.safetensors"):
        old.unlink()
    if name.endswith(".bin"):
        torch.save(state, folder / name)
    else:
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name, {"format": "pt"})


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def fails(source, pattern, **options):
    with pytest.raises(UserError, match=pattern) as error:
        weights.load(source, **options)
    assert "\n" not in str(error.value)


# sources


def test_folder(folder, logits):
    torch.testing.assert_close(ours(folder), logits, rtol=0, atol=1e-5)
    assert weights.load(str(folder), dropout=0.25).config == GPTConfig(2, 2, 8, 16, 40, 0.25)


def test_every_parameter_matters(folder, logits):
    """The comparison above would notice any one tensor being left out or mixed up."""
    for name, tensor in tensors(folder).items():
        replace(folder, tensors(folder) | {name: tensor.flip(0)})
        assert (ours(folder) - logits).abs().max() > 1e-4, name
        replace(folder, tensors(folder) | {name: tensor})


def test_names_without_prefix_and_with_buffers_and_head(folder, logits):
    state = {key.removeprefix("transformer."): tensor for key, tensor in tensors(folder).items()}
    for i in range(2):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    state["lm_head.weight"] = state["wte.weight"].clone()
    replace(folder, state)
    torch.testing.assert_close(ours(folder), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_bin(folder, logits, legacy):
    state = tensors(folder)
    replace(folder, state | {"lm_head.weight": state["transformer.wte.weight"]}, "pytorch_model.bin")
    if legacy:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(ours(folder), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_half_precision(folder, dtype, name):
    state = {key: tensor.to(dtype) for key, tensor in tensors(folder).items()}
    expected = {key: tensor.float() for key, tensor in state.items()}
    replace(folder, state, name)
    model = weights.load(folder)
    assert torch.equal(model.wte.weight, expected["transformer.wte.weight"])
    assert torch.equal(model.blocks[1].attn.qkv.weight, expected["transformer.h.1.attn.c_attn.weight"].T)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def shard(folder, ending):
    """Split the weights over two files and an index, as transformers does with large models."""
    state = tensors(folder)
    (folder / "model.safetensors").unlink()
    stem = "model" if ending == "safetensors" else "pytorch_model"
    index = {}
    for part, keys in enumerate([sorted(state)[:15], sorted(state)[15:]], start=1):
        file = f"{stem}-0000{part}-of-00002.{ending}"
        piece = {key: state[key] for key in keys}
        if ending == "safetensors":
            save_file(piece, folder / file)
        else:
            torch.save(piece, folder / file)
        index |= dict.fromkeys(keys, file)
    path = folder / f"{stem}.{ending}.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards(folder, logits, ending):
    shard(folder, ending)
    torch.testing.assert_close(ours(folder), logits, rtol=0, atol=1e-5)


def test_shards_that_transformers_wrote(theirs, logits, tmp_path):
    theirs.save_pretrained(tmp_path, max_shard_size="3KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    torch.testing.assert_close(ours(tmp_path), logits, rtol=0, atol=1e-5)


def test_scratch():
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 40}
    model = weights.load("scratch", **sizes, dropout=0.1, seed=3)
    assert model.config == GPTConfig(2, 2, 8, 16, 40, 0.1)
    same, other = weights.load("scratch", **sizes, seed=3), weights.load("scratch", **sizes, seed=4)
    assert weights.fingerprint(model) == weights.fingerprint(same) != weights.fingerprint(other)
    fails("scratch", "n_embd is 0", n_layer=2, n_head=2, block_size=16)
    fails("scratch", "n_embd 9 is no multiple of n_head 2", **sizes | {"n_embd": 9})


def test_sizes_must_be_those_of_the_weights(folder):
    weights.load(folder, n_layer=2, block_size=16)
    fails(folder, "n_layer is 3, but .*config.json has 2", n_layer=3)
    fails(folder, "block_size is 8, but .*config.json has 16", block_size=8)


def test_result_does_not_change_with_the_file(folder):
    model = weights.load(folder)
    before = weights.fingerprint(model)
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert weights.fingerprint(model) == before


# the hub


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    with serving({"gpt2": folder}, monkeypatch) as hub:
        yield hub


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin", "safetensors shards", "bin shards"])
def test_hub(hub, folder, logits, form, monkeypatch):
    if form.endswith("shards"):
        shard(folder, form.split()[0])
    else:
        replace(folder, tensors(folder), form)
    torch.testing.assert_close(ours("gpt2"), logits, rtol=0, atol=1e-5)
    asked = len(hub.requests)
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    torch.testing.assert_close(ours("gpt2"), logits, rtol=0, atol=1e-5)  # out of the cache
    assert len(hub.requests) == asked


def test_hub_without(hub, folder):
    shard(folder, "safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()
    fails("gpt2", "model-00002-of-00002.safetensors is missing")
    for path in folder.glob("model*"):
        path.unlink()
    shutil.rmtree(os.environ["NANOPREF_CACHE"])
    fails("gpt2", "no weights for gpt2: none of model.safetensors, ")
    fails("gpt2-xl", "gpt2-xl/resolve/main/config.json: access refused .401.")


# what is wrong with a source


def test_names(tmp_path):
    fails("gpt2-lage", "did you mean gpt2-large")
    fails("zzz", "known are " + ", ".join(SIZES))
    fails(tmp_path / "none", "no such folder: .*none")
    fails("./gpt2", "no such folder: ./gpt2")
    fails(tmp_path, "no config.json in .*saved model")


def test_run_folder(folder):
    shutil.copytree(folder, folder / "model")
    (folder / "config.json").unlink()
    fails(folder, f"did you mean {folder}/model")
    fails(folder / "model/model.safetensors", "is a file .init_from.: name the folder")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    fails(folder, "no weights for .*: none of model.safetensors, .*pytorch_model.bin")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_malformed_config(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    fails(folder, "config.json (is not valid JSON|does not hold a JSON object)")


@pytest.mark.parametrize(
    "key, value",
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("n_inner", 31),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("reorder_and_upcast_attn", True),
        ("layer_norm_epsilon", 1e-6),
        ("tie_word_embeddings", False),
        ("add_cross_attention", True),
        ("n_layer", 0),
        ("n_positions", None),
        ("vocab_size", "40"),
        ("n_head", 3),
    ],
)
def test_config_of_another_model(folder, key, value):
    edit_config(folder, **{key: value})
    fails(folder, rf"config.json.*{key} is|n_head 3, in .*config.json")


def test_config_that_means_the_same(folder, logits):
    edit_config(folder, n_inner=32, activation_function="gelu_pytorch_tanh")
    torch.testing.assert_close(ours(folder), logits, rtol=0, atol=1e-5)
    path = folder / "config.json"
    old = {"model_type": "gpt2", **TINY}
    path.write_text(json.dumps(old))
    torch.testing.assert_close(ours(folder), logits, rtol=0, atol=1e-5)
    path.write_text(json.dumps(TINY))
    fails(folder, "model_type is None")


def test_tensor_missing_or_foreign(folder):
    state = tensors(folder)
    gone = "transformer.h.1.mlp.c_fc.bias"
    replace(folder, {key: tensor for key, tensor in state.items() if key != gone})
    fails(folder, rf"model.safetensors: tensor {gone} missing")
    replace(folder, state | {"score.weight": torch.zeros(1, 8)})
    fails(folder, "tensor score.weight is none of a 2-layer GPT-2's")
    replace(folder, state)
    edit_config(folder, n_layer=1)
    fails(folder, r"tensor transformer.h.1\..* is none of a 1-layer GPT-2's")
    edit_config(folder, n_layer=3)
    fails(folder, "tensor transformer.h.2.ln_1.weight and 11 more missing")


def test_wrong_shape_and_type(folder):
    state = tensors(folder)
    name = "transformer.h.0.attn.c_attn.weight"
    replace(folder, state | {name: state[name].T})
    fails(folder, rf"model.safetensors: tensor {name} has shape \(24, 8\), not \(8, 24\)")
    replace(folder, state | {name: state[name].double()})
    fails(folder, rf"tensor {name} is torch.float64")
    replace(folder, state)
    edit_config(folder, vocab_size=50)
    fails(folder, r"transformer.wte.weight has shape \(40, 8\), not \(50, 8\)")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_untied_head(folder, name):
    state = tensors(folder)
    head = state["transformer.wte.weight"] * 2
    replace(folder, state | {"lm_head.weight": head}, name)
    fails(folder, "lm_head.weight differs from wte.weight")
    replace(folder, state | {"lm_head.weight": head[:-1]}, name)
    fails(folder, "lm_head.weight has shape")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(folder, name, keep):
    replace(folder, tensors(folder), name)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:keep])
    fails(folder, f"{name} .* is damaged, incomplete")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_legacy_bin(folder, keep):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save(dict(GPT(GPTConfig(2, 2, 8, 16, 40)).named_parameters()), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:keep])
    fails(folder, "pytorch_model.bin .* is damaged, incomplete")


def test_lfs_pointer_and_garbage(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    fails(folder, "model.safetensors .* is damaged, incomplete")
    (folder / "model.safetensors").unlink()
    for content in (b"PK\x03\x04garbage", np.random.default_rng(0).bytes(999), b"<html>"):
        (folder / "pytorch_model.bin").write_bytes(content)
        fails(folder, "pytorch_model.bin .* is damaged, incomplete")
    torch.save([1, 2], folder / "pytorch_model.bin")
    fails(folder, "holds more than tensors")


def test_no_code_is_run(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    (folder / "model.safetensors").unlink()
    for new in (True, False):
        torch.save({"wte.weight": Evil()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        fails(folder, "holds more than tensors")
    assert not (tmp_path / "evil").exists()


def test_bad_index(folder):
    path = shard(folder, "safetensors")
    good = path.read_text()
    (folder / "model-00001-of-00002.safetensors").rename(folder.parent / "out.safetensors")
    fails(folder, "model-00001-of-00002.safetensors is missing, model.safetensors.index.json lists it")
    path.write_text(good.replace("model-00001-of-00002", "../out"))
    fails(folder, "is not the name of a file beside it")
    for text in ("{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        path.write_text(text)
        fails(folder, "index.json(: no weight_map| is not valid JSON)")


# saving


@pytest.fixture
def model(folder):
    return weights.load(folder)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_save_for_transformers(model, logits, tmp_path):
    transformers = pytest.importorskip("transformers")
    weights.save(model, Tokenizer(), tmp_path / "out")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, logits, rtol=0, atol=0)
    assert loaded.dtype == torch.float32 and loaded.config.eos_token_id == loaded.generation_config.eos_token_id == 39
    assert loaded.config.resid_pdrop == loaded.config.attn_pdrop == loaded.config.embd_pdrop == 0.0
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_save_and_load(model, tmp_path, saved):
    weights.save(model, Tokenizer(), tmp_path / "out")
    again = weights.load(tmp_path / "out")
    assert again.config == model.config and weights.fingerprint(again) == weights.fingerprint(model)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as ours, safe_open(saved / "model.safetensors", "pt") as x:
        assert sorted(ours.keys()) == sorted(x.keys()) and ours.metadata() == {"format": "pt"}
        assert all(torch.equal(ours.get_tensor(key), x.get_tensor(key)) for key in x.keys())  # noqa: SIM118
    wide = GPT(GPTConfig(1, 2, 8, 16, 40, 0.3)).to(torch.bfloat16)
    weights.save(wide, Tokenizer(), tmp_path / "out")
    assert weights.load(tmp_path / "out").wte.weight.equal(wide.wte.weight.float())
    assert json.loads((tmp_path / "out/config.json").read_text())["resid_pdrop"] == 0.3
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]


def test_save_with_a_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = get("toy")
    model = weights.load("scratch", n_layer=1, n_head=1, n_embd=4, block_size=8, vocab_size=tokenizer.size)
    weights.save(model, tokenizer, tmp_path / "out")
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == tokenizer.size
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == tokenizer.eot


def test_save_keeps_the_old_one_until_the_new_one_is_whole(model, tmp_path):
    weights.save(model, Tokenizer(), tmp_path / "out")
    before = contents(tmp_path / "out")

    class Broken(Tokenizer):
        def save(self, folder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights.save(model, Broken(), tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]


@pytest.mark.parametrize("limit", [100, 3000])
def test_full_disk(model, tmp_path, limit):
    weights.save(model, Tokenizer(), tmp_path / "out")
    before = contents(tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # the nearest to a full disk that needs no rights
    try:
        with pytest.raises(OSError) as error:
            weights.save(model, Tokenizer(), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]


def test_save_after_a_kill(model, tmp_path):
    weights.save(model, Tokenizer(), tmp_path / "out")
    (tmp_path / "out.saving").mkdir()
    (tmp_path / "out.saving/model.safetensors").write_text("half")
    shutil.copytree(tmp_path / "out", tmp_path / "out.old")
    weights.save(model, Tokenizer(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == ["out"]
    # killed between the two renames: a failure now must leave the old one in its place
    (tmp_path / "out").rename(tmp_path / "out.old")

    class Broken(Tokenizer):
        def save(self, folder):
            raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        weights.save(model, Broken(), tmp_path / "out")
    weights.load(tmp_path / "out")


def test_save_spares_other_folders(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="out is there and not a model's folder"):
        weights.save(model, Tokenizer(), tmp_path / "out")
    assert (tmp_path / "out/thesis.tex").read_text() == "dear"
    (tmp_path / "out/thesis.tex").unlink()
    weights.save(model, Tokenizer(), tmp_path / "out")


def test_save_wants_a_plain_model(model, tmp_path):
    model.blocks[0].attn.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="not a plain GPT"):
        weights.save(model, Tokenizer(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fingerprint(model):
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters(), key=lambda item: item[0]):
        values = hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        digest.update(f"{name} {tuple(p.shape)} {values}\n".encode())
    assert weights.fingerprint(model) == digest.hexdigest()
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight[3, 4] += 1e-3
    assert weights.fingerprint(model) != digest.hexdigest()
    transposed = torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
    transposed[1].weight.data = transposed[0].weight.data.reshape(2, 3)
    assert weights.fingerprint(transposed[0]) != weights.fingerprint(transposed[1])


def test_a_file_of_tensors_has_the_same_bytes_each_time(tmp_path):
    metadata = {name: name * 3 for name in "fedcba"}
    tensors = {"b": torch.randn(3, 2), "a": torch.arange(5)}
    content = {safetensors_bytes(tensors, metadata) for _ in range(20)}
    (tmp_path / "x.safetensors").write_bytes(content.pop())
    assert not content
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata and all(torch.equal(file.get_tensor(k), t) for k, t in tensors.items())
