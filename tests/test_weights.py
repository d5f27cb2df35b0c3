"""Weights in and out, against transformers' GPT-2 on tiny random weights; what is damaged or no GPT-2 is refused."""

import errno
import hashlib
import json
import os
import resource
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import weights
from base.errors import UserError
from base.files import private
from data.tokenizer import get
from model import GPT, GPTConfig
from tests import peers, tiny
from tests.hub import serving
from tests.tiny import NoTokenizer

transformers = pytest.importorskip("transformers")
TOKENS = torch.randint(0, 97, (3, 16), generator=torch.Generator().manual_seed(0))
BLOCK = "transformer.h.0."


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return peers.gpt2_folder(tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def logits(saved):
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(saved).eval()(TOKENS).logits


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of transformers' folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture
def model(saved) -> GPT:
    return weights.load(saved)


def ours(source) -> torch.Tensor:
    model = weights.load(source)
    assert all(p.dtype == torch.float32 and p.requires_grad and not p.is_meta for p in model.parameters())
    with torch.no_grad():
        return model.eval().logits(TOKENS)


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def replace(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change, add or (None) drop tensors."""
    state = {key: tensor.contiguous() for key, tensor in (tensors(folder) | changes).items() if tensor is not None}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(folder: Path) -> Path:
    """Split the weights over two files and an index, as transformers does with large models."""
    state, index = tensors(folder), {}
    (folder / "model.safetensors").unlink()
    for part, keys in enumerate([sorted(state)[:15], sorted(state)[15:]], start=1):
        file = f"model-0000{part}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, folder / file)
        index |= dict.fromkeys(keys, file)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return path


def fails(source, pattern: str, **options) -> None:
    with pytest.raises(UserError, match=pattern) as error:
        weights.load(source, **options)
    assert "\n" not in str(error.value)


# --- in --------------------------------------------------------------------------------------------------------------


def test_every_parameter_is_read(folder, logits):
    """The comparison would notice any one tensor being left out or mixed up."""
    close(ours(folder), logits)
    assert weights.load(str(folder), dropout=0.25).config == GPTConfig(2, 2, 32, 128, 97, 0.25)
    for name, tensor in tensors(folder).items():
        replace(folder, **{name: tensor.flip(0)})
        assert (ours(folder) - logits).abs().max() > 1e-4, name
        replace(folder, **{name: tensor})


def test_names_without_prefix_and_with_buffers_and_head(folder, logits):
    state = {key.removeprefix("transformer."): tensor for key, tensor in tensors(folder).items()}
    buffers = {f"h.{i}.attn.{name}": torch.ones(1, 1, 16, 16) for i in range(2) for name in ("bias", "masked_bias")}
    save_file(state | buffers | {"lm_head.weight": state["wte.weight"].clone()}, folder / "model.safetensors")
    close(ours(folder), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(folder, dtype):
    state = {key: tensor.to(dtype) for key, tensor in tensors(folder).items()}
    replace(folder, **state)
    model = weights.load(folder)
    assert torch.equal(model.wte.weight, state["transformer.wte.weight"].float())
    assert torch.equal(model.blocks[1].attn.qkv.weight, state["transformer.h.1.attn.c_attn.weight"].float().T)


def test_shards(folder, saved, logits, tmp_path):
    """Ours, and those that transformers writes."""
    shard(folder)
    transformers.AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "large", max_shard_size="30KB")
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 2
    for source in (folder, tmp_path / "large"):
        close(ours(source), logits)


def test_configs_that_mean_the_same(folder, logits):
    edit_config(folder, n_inner=128, activation_function="gelu_pytorch_tanh")
    close(ours(folder), logits)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128, "vocab_size": 97}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    close(ours(folder), logits)


def test_scratch():
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 40}
    model = weights.load("scratch", **sizes, dropout=0.1, seed=3)
    assert model.config == GPTConfig(2, 2, 8, 16, 40, 0.1)
    same, other = weights.load("scratch", **sizes, seed=3), weights.load("scratch", **sizes, seed=4)
    assert weights.fingerprint(model) == weights.fingerprint(same) != weights.fingerprint(other)
    fails("scratch", "n_embd is 0", **sizes | {"n_embd": 0})
    fails("scratch", "n_embd 9 is no multiple of n_head 2", **sizes | {"n_embd": 9})


def test_a_model_does_not_change_with_its_file(folder):
    model = weights.load(folder)
    before = weights.fingerprint(model)
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert weights.fingerprint(model) == before


@pytest.mark.parametrize("sharded", [False, True])
def test_hub(sharded, folder, logits, tmp_path, monkeypatch):
    """Downloaded once, then read out of the cache; what the hub lacks is named."""
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    if sharded:
        shard(folder)
    with serving({"gpt2": folder, "gpt2-large": folder}, monkeypatch) as hub:
        close(ours("gpt2"), logits)
        asked = len(hub.requests)
        monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
        close(ours("gpt2"), logits)
        assert len(hub.requests) == asked
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        last = sorted(folder.glob("*.safetensors"))[-1]
        last.unlink()
        fails("gpt2-large", f"{last.name} is missing" if sharded else "no weights for gpt2-large: neither of model.safetensors")
        fails("gpt2-xl", "gpt2-xl/resolve/main/config.json: .*401")


# --- refused ---------------------------------------------------------------------------------------------------------


def test_names(folder, tmp_path):
    fails("gpt2-lage", "did you mean gpt2-large")
    fails("zzz", "known are " + ", ".join(weights.HUB_NAMES) + ", owner/name on the hub")
    fails("openai:124M", "python -m tools.convert_openai --size 124M --out FOLDER, and name that")
    fails("./gpt2", "./gpt2 is no folder")
    fails(tmp_path, "no config.json in .*saved model")
    fails(folder / "model.safetensors", "is a file .init_from.: name the folder")
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run/model")
    fails(tmp_path / "run", f"did you mean {tmp_path}/run/model")
    fails(tmp_path / "run/model", "n_layer is 3, but .*config.json has 2", n_layer=3)


@pytest.mark.parametrize(
    "key, value",
    [("model_type", "bert"), ("activation_function", "relu"), ("n_inner", 31), ("scale_attn_weights", False),
     ("scale_attn_by_inverse_layer_idx", True), ("reorder_and_upcast_attn", True), ("layer_norm_epsilon", 1e-6),
     ("add_cross_attention", True), ("n_layer", 0), ("n_positions", None), ("vocab_size", "40"), ("n_head", 3)],
)  # fmt: skip
def test_configs_of_other_models(folder, key, value):
    edit_config(folder, **{key: value})
    fails(folder, rf"config.json: {key} is|config.json: n_embd 32 is no multiple of n_head 3")


@pytest.mark.parametrize(
    "changes",
    [{"n_layer": 10**7}, {"n_embd": 4 * 10**12}, {"vocab_size": 10**18}, {"n_positions": 10**18}, {"n_layer": 10**300},
     {"n_head": 0}, {"n_head": -2}, {"n_head": 64}, {"n_head": 2.0}, {"n_head": True}, {"n_head": [2]}, {"n_embd": None},
     {"n_embd": -32}, {"n_layer": "2"}, {"n_layer": 999, "n_embd": 2**24}, {"layer_norm_epsilon": float("nan")},
     {"model_type": ["gpt2"]}, {"tie_word_embeddings": {}}],
)  # fmt: skip
def test_sizes_of_no_model_are_refused_at_once(changes, folder):
    """Before anything is allocated, and before a model of so many layers is laid out."""
    edit_config(folder, **changes)
    start = time.monotonic()
    fails(folder, "config.json")
    assert time.monotonic() - start < 5
    scratch = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 128, "vocab_size": 97}
    asked = {key.replace("n_positions", "block_size"): value for key, value in changes.items()}
    if asked.keys() <= scratch.keys() and all(type(v) is int and v > weights.MOST // 2 for v in asked.values()):
        fails("scratch", "init_from is scratch, but .* is above", **scratch | asked)


def test_nothing_is_read_of_weights_that_do_not_fit(folder, monkeypatch):
    """The headers tell: also of sizes that would fit no memory, and of a tensor that is missing in the last file."""
    shard(folder)
    edit_config(folder, n_embd=2**20)
    with pytest.raises(UserError, match="has shape"):
        weights.source(folder)
    edit_config(folder, n_embd=32, n_layer=3)
    with pytest.raises(UserError, match="missing"):
        weights.source(folder)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, link_to_itself])
def test_what_is_no_file_is_not_waited_for(make, folder, tmp_path):
    """A pipe, a folder or a circle of links in a file's place."""
    for name, read, says in (
        ("config.json", weights.load, "no config.json in"),
        ("model.safetensors", weights.load, "no weights for"),
        ("tokenizer_config.json", get, "tokenizer_config.json is no file|does not have the .* tokens"),
        ("vocab.json", get, "vocab.json is no file|does not have the .* tokens"),
        ("tokenizer.json", get, "tokenizer.json is no file|does not have the .* tokens"),
    ):
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / name).unlink(missing_ok=True)
        make(copy / name)
        with pytest.raises(UserError, match=says):
            read(copy)


def test_the_home_of_nobody():
    fails("~no_such_user/model", "~no_such_user/model is no folder")


CASES = {  # tensors to change, changes in config.json, what is said
    "missing": ({BLOCK + "mlp.c_fc.bias": None}, {}, f"model.safetensors: tensor {BLOCK}mlp.c_fc.bias missing"),
    "foreign": ({"score.weight": torch.zeros(1, 8)}, {}, "tensor score.weight is none of a 2-layer gpt2's"),
    "fewer layers": ({}, {"n_layer": 1}, r"tensor transformer.h.1\..* is none of a 1-layer gpt2's"),
    "more layers": ({}, {"n_layer": 3}, "tensor transformer.h.2.ln_1.weight and 11 more missing"),
    "shape": ({BLOCK + "attn.c_attn.weight": torch.zeros(96, 32)}, {}, r"has shape \(96, 32\), not \(32, 96\)"),
    "float64": ({BLOCK + "ln_1.bias": torch.zeros(32).double()}, {}, "ln_1.bias is F64, not F32, F16 or BF16"),
    "vocabulary": ({}, {"vocab_size": 99}, r"transformer.wte.weight has shape \(97, 32\), not \(99, 32\)"),
    "another head": ({"lm_head.weight": torch.zeros(97, 32)}, {}, "lm_head.weight differs from the embedding"),
    "head's shape": ({"lm_head.weight": torch.zeros(96, 32)}, {}, "lm_head.weight has shape"),
    "no head": ({}, {"tie_word_embeddings": False}, "lm_head.weight missing: set tie_word_embeddings to true"),
}


@pytest.mark.parametrize("case", CASES)
def test_tensors_that_do_not_fit(folder, case):
    changes, config, says = CASES[case]
    replace(folder, **changes)
    edit_config(folder, **config)
    fails(folder, says)


def test_damaged_files(folder):
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    whole = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    for content in (b"", whole[:5], whole[:1000], whole[:-1], pointer):
        path.write_bytes(content)
        fails(folder, "model.safetensors .* is damaged or incomplete")
    path.rename(folder / "pytorch_model.bin")
    fails(folder, "no weights for .*: neither of model.safetensors, .*pytorch_model.bin is a pickle and not read: save it anew")
    (folder / "pytorch_model.bin").with_name("model.safetensors").write_bytes(whole)
    good = shard(folder).read_text()
    (folder / "model-00001-of-00002.safetensors").rename(folder.parent / "out.safetensors")
    fails(folder, "model-00001-of-00002.safetensors is missing, model.safetensors.index.json lists it")
    index.write_text(good.replace("model-00001-of-00002", "../out"))
    fails(folder, "is not the name of a file beside it")
    for text in ("{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        fails(folder, "index.json(: no weight_map| is not valid JSON)")
    for text in ("", "{", "[]", "\xff"):
        (folder / "config.json").write_text(text, encoding="latin-1")
        fails(folder, "config.json (is not valid JSON|does not hold a JSON object)")


# --- out -------------------------------------------------------------------------------------------------------------


class Broken(NoTokenizer):
    """Fails after the weights are written."""

    def __init__(self, error: BaseException):
        self.error = error

    def save(self, folder):
        raise self.error


def contents(folder: Path) -> dict[str, bytes]:
    """A saved folder's files; nothing else may lie beside it."""
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saved_folders_load_in_transformers(model, saved, logits, tmp_path):
    out = tmp_path / "out"
    weights.save(model, NoTokenizer(), out)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, logits, rtol=0, atol=0)
    assert loaded.dtype == torch.float32 and loaded.config.eos_token_id == loaded.generation_config.eos_token_id == 96
    assert loaded.config.resid_pdrop == loaded.config.attn_pdrop == loaded.config.embd_pdrop == 0.0
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    again = weights.load(out)
    assert again.config == model.config and weights.fingerprint(again) == weights.fingerprint(model)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == tensors(saved).keys()


def test_saved_in_float32_with_dropout_and_tokenizer(tmp_path):
    toy, model = get("toy"), tiny.gpt(vocab_size=get("toy").size, dropout=0.3).to(torch.bfloat16)
    weights.save(model, toy, tmp_path / "out")
    assert weights.load(tmp_path / "out").wte.weight.equal(model.wte.weight.float())
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == toy.size
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.eos_token_id == toy.eot and config.resid_pdrop == 0.3


def test_the_old_folder_stays_until_the_new_one_is_whole(model, tmp_path):
    """After Ctrl-C, and on a full disk, which a limit on the size of files stands for."""
    out = tmp_path / "out"
    weights.save(model, NoTokenizer(), out)
    before = contents(out)
    with pytest.raises(KeyboardInterrupt):
        weights.save(model, Broken(KeyboardInterrupt()), out)
    assert contents(out) == before
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError) as error:
            weights.save(model, NoTokenizer(), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and error.value.filename == str(out) and contents(out) == before


def test_save_after_a_kill(model, tmp_path):
    out = tmp_path / "out"
    weights.save(model, NoTokenizer(), out)
    new, old = private(out, "new"), private(out, "old")
    new.mkdir()
    (new / "model.safetensors").write_text("half")
    shutil.copytree(out, old)
    weights.save(model, NoTokenizer(), out)
    assert contents(out)
    out.rename(old)  # killed between the two renames: a failure now must leave the old one in its place
    with pytest.raises(OSError, match="full"):
        weights.save(model, Broken(OSError(errno.ENOSPC, "full")), out)
    weights.load(out)


def test_backups_of_a_user_are_left_alone(model, tmp_path):
    """Names that a user may give are no names of ours: they are neither deleted nor renamed into place."""
    out = tmp_path / "out"
    for name in ("out.old", "out.saving", "out.tmp", "out.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    for _ in range(2):
        with pytest.raises(OSError, match="full"):
            weights.save(model, Broken(OSError(errno.ENOSPC, "full")), out)
        assert not out.exists()
    weights.save(model, NoTokenizer(), out)
    weights.save(model, NoTokenizer(), out)
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.old", "out.saving", "out.tmp", "out.new"}
    assert all(
        (tmp_path / name / "config.json").read_text() == name for name in ("out.old", "out.saving", "out.tmp", "out.new")
    )


def test_two_writers_to_one_folder_leave_one_model_whole(tmp_path):
    models = [tiny.gpt(vocab_size=97 + i) for i in range(2)]
    save = lambda i: [weights.save(models[i], NoTokenizer(), tmp_path / "out") for _ in range(5)]  # noqa: E731
    threads = [threading.Thread(target=save, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert weights.fingerprint(weights.load(tmp_path / "out")) in map(weights.fingerprint, models)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("tokenizer", ["toy", "toy_math", "gpt2"])
def test_every_tokenizer_writes_files_that_are_known_as_ours(tokenizer, tmp_path):
    get(tokenizer).save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} <= weights.FILES


def test_other_folders_and_other_models_are_not_written(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="out is there and not a model's folder"):
        weights.save(model, NoTokenizer(), out)
    assert contents(out) == {"thesis.tex": b"dear"}
    (out / "config.json").write_text("{}")  # a model's folder, and more
    with pytest.raises(UserError, match=r"out is there and not a model's folder: move it away \(thesis.tex\)"):
        weights.save(model, NoTokenizer(), out)
    shutil.rmtree(out)
    out.mkdir()
    (out / "vocab.json").write_text("{}")  # a tokenizer of somebody's
    with pytest.raises(UserError, match=r"out is there and not a model's folder"):
        weights.save(model, NoTokenizer(), out)
    (out / "vocab.json").unlink()
    model.blocks[0].attn.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="not a plain model's parameters"):
        weights.save(model, NoTokenizer(), out)
    assert contents(out) == {}


def test_fingerprint(model):
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters(), key=lambda item: item[0]):
        values = hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        digest.update(f"{name} {tuple(p.shape)} {values}\n".encode())
    assert weights.fingerprint(model) == digest.hexdigest()
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight[3, 4] += 1e-3
    assert weights.fingerprint(model) != digest.hexdigest()
    assert weights.digest(torch.zeros(2, 3)) != weights.digest(torch.zeros(3, 2))


def test_a_file_of_tensors_has_the_same_bytes_each_time(tmp_path):
    metadata = {name: name * 3 for name in "fedcba"}
    some = {"b": torch.randn(3, 2), "a": torch.arange(5.0)}
    (content,) = {weights.safetensors_bytes(some, metadata) for _ in range(20)}
    (tmp_path / "x.safetensors").write_bytes(content)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == metadata and all(torch.equal(file.get_tensor(name), t) for name, t in some.items())
