"""GPT-2's weights in and out: the hub's, OpenAI's or a folder's -> GPT, and GPT -> a folder that transformers loads as it is.

A tensor at a time goes through memory, so loading and saving take about one copy of the model.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from base.download import cache_dir, fetch, hub_endpoint, hub_find, openai_endpoint
from base.errors import UserError
from model import GPT, SIZES, GPTConfig
from runtime.distributed import whole
from tools.tf_checkpoint import read_index, read_tensor

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
Find = Callable[[Sequence[str]], Path | None]  # file names -> the first of them that is there

PARTS = {"blocks": "h", "ln1": "ln_1", "ln2": "ln_2", "qkv": "c_attn", "proj": "c_proj", "fc": "c_fc"}
IGNORED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which old checkpoints carry as a buffer

# What GPT-2 is, in config.json's words: key -> the values that model.py computes. The first is written, and is what a
# config without the key means.
FIXED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True, False),
}
DIMENSIONS = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_positions": "block_size"}

# What OpenAI released: TensorFlow checkpoints, https://github.com/openai/gpt-2 (download_model.py)
OPENAI = ("124M", "355M", "774M", "1558M")
HPARAMS = "hparams.json"
HPARAM_KEYS = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "n_ctx": "block_size", "n_vocab": "vocab_size"}
INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"


def load(init_from: str | Path, **options) -> GPT:
    """The model that `init_from` names, float32, on the CPU. Options and errors are those of `source`."""
    config, tensors = source(init_from, **options)
    model = empty(config)
    model.load_state_dict(dict(tensors), assign=True)
    return model


def source(
    init_from: str | Path,
    *,
    dropout: float = 0.0,
    n_layer: int = 0,
    n_head: int = 0,
    n_embd: int = 0,
    block_size: int = 0,
    vocab_size: int = 50257,
    tied: bool = True,
    seed: int = 0,
) -> tuple[GPTConfig, Iterator[tuple[str, Tensor]]]:
    """The config of the model that `init_from` names, and its weights: (name, float32 tensor), one read at a time.

    init_from: "scratch" (n_layer, n_head, n_embd, block_size, vocab_size, tied and seed say which), a name on the hub (gpt2,
    gpt2-medium, gpt2-large, gpt2-xl), openai:124M (355M, 774M, 1558M) for OpenAI's own files, or a folder: in Hugging Face's
    layout (config.json with model.safetensors or pytorch_model.bin, in one file or in shards) or in OpenAI's (hparams.json
    with model.ckpt.index and .data-00000-of-00001). A folder of a model's name is written ./gpt2.

    Raises UserError for what is missing, damaged, or not the GPT-2 of model.py (in part only while the weights are read, to
    their end); and for sizes (0 = not given) that are not those of the weights.
    """
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
    name = str(init_from)
    if name == "scratch":
        for key, size in sizes.items():
            if size <= 0:
                raise UserError(f"init_from is scratch, but {key} is {size}: set it to a positive number")
        config = GPTConfig(**sizes, vocab_size=vocab_size, dropout=dropout, tied=tied)
        _check_heads(config, "the command line or config")
        return config, empty(config).initial_weights(seed)

    if name.startswith("openai:"):
        find, said = _openai(name), HPARAMS
    elif name in SIZES:
        find, said = _hub(name), CONFIG
    else:
        find = _folder(name)
        said = CONFIG if find([CONFIG]) else HPARAMS
    path = find([said])
    if path is None:
        raise UserError(f"no {CONFIG} for {name} at {hub_endpoint()}: is HF_ENDPOINT a hub?")
    config = read_hparams(path, dropout) if said == HPARAMS else read_config(path, dropout)
    for key, size in sizes.items():
        if size and size != getattr(config, key):
            raise UserError(f"{key} is {size}, but {path} has {getattr(config, key)}: leave it out or use scratch")
    return config, _read(_tf_tensors(find, name) if said == HPARAMS else _tensors(find, name), said, empty(config))


class _NoInit(TorchFunctionMode):
    """Modules made under it keep their parameters as allocated.

    Filling them twice costs a second, and random numbers on the meta device make torch import its compiler: another.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def empty(config: GPTConfig) -> GPT:
    """A GPT on the meta device: shapes without memory."""
    with torch.device("meta"), _NoInit():
        return GPT(config)


def _hub(name: str) -> Find:
    return lambda names: hub_find(name, names)


def _openai(name: str) -> Find:
    size = name.removeprefix("openai:")
    if size not in OPENAI:
        known = ", ".join(f"openai:{known}" for known in OPENAI)
        raise UserError(f"{name} is not one of OpenAI's checkpoints (init_from): known are {known}")
    url, folder = f"{openai_endpoint()}/gpt-2/models/{size}", cache_dir() / "openai" / size
    return lambda names: fetch(f"{url}/{names[0]}", folder / names[0])


def _folder(name: str) -> Find:
    folder = Path(name).expanduser()
    if not folder.exists():
        if "/" in name or name.startswith((".", "~")):
            raise UserError(f"no such folder: {name} (init_from)")
        near = difflib.get_close_matches(name, [*SIZES, "scratch"], 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(SIZES)}, scratch"
        raise UserError(f"{name} is no folder and no known model (init_from): {hint}")
    if not folder.is_dir():
        raise UserError(f"{name} is a file (init_from): name the folder that holds it and its {CONFIG}")
    if not (folder / CONFIG).is_file() and not (folder / INDEX).is_file():
        hint = f"did you mean {folder / 'model'}?" if (folder / "model" / CONFIG).is_file() else "is it a saved model?"
        raise UserError(f"no {CONFIG} in {name} (init_from): {hint}")
    if not (folder / CONFIG).is_file() and not (folder / HPARAMS).is_file():
        raise UserError(f"no {HPARAMS} in {name}, beside {INDEX} (init_from): copy it there, it says what the tensors are for")
    return lambda names: next((folder / n for n in names if (folder / n).is_file()), None)


def read_config(path: Path, dropout: float = 0.0) -> GPTConfig:
    """config.json -> GPTConfig. Raises UserError, with the key, for any model that model.py does not compute."""
    raw = _read_json(path)
    for key, allowed in FIXED.items():
        if (value := raw.get(key, allowed[0] if key != "model_type" else None)) not in allowed:
            raise UserError(f"{path}: {key} is {value!r}, GPT-2 here has {' or '.join(map(repr, allowed))}")
    config = _dimensions(raw, DIMENSIONS | {"vocab_size": "vocab_size"}, path, dropout)
    if raw.get("n_inner") not in (None, 4 * config.n_embd):
        raise UserError(f"{path}: n_inner is {raw['n_inner']!r}, GPT-2 here has 4 * n_embd = {4 * config.n_embd}")
    return config


def read_hparams(path: Path, dropout: float = 0.0) -> GPTConfig:
    """OpenAI's hparams.json -> GPTConfig. Raises UserError, with the key, for what is missing or no size."""
    return _dimensions(_read_json(path), HPARAM_KEYS, path, dropout)


def _dimensions(raw: dict, keys: dict[str, str], path: Path, dropout: float) -> GPTConfig:
    values = {ours: raw.get(key) for key, ours in keys.items()}
    for key, ours in keys.items():
        if type(values[ours]) is not int or values[ours] <= 0:
            raise UserError(f"{path}: {key} is {values[ours]!r}, not a positive whole number")
    config = GPTConfig(**values, dropout=dropout, tied=raw.get("tie_word_embeddings", True))
    _check_heads(config, str(path))
    return config


def _check_heads(config: GPTConfig, where: str) -> None:
    if config.n_embd % config.n_head:
        raise UserError(f"n_embd {config.n_embd} is no multiple of n_head {config.n_head}, in {where}: change one")


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a JSON object: copy it again")
    return value


def hf_name(name: str) -> str:
    """Our parameter name -> transformers', without its leading "transformer."."""
    return "lm_head.weight" if name == "head.weight" else ".".join(PARTS.get(part, part) for part in name.split("."))


def full_name(short: str) -> str:
    return short if short == "lm_head.weight" else "transformer." + short


def transposed(name: str) -> bool:
    """Whether the parameter of ours is a matrix that transformers keeps as (in, out): its Conv1D."""
    return name.startswith("blocks.") and name.endswith(".weight") and ".ln" not in name


def _read(tensors: Iterator[tuple[Path, str, Tensor]], said: str, model: GPT) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of `model`, out of the (file, transformers' name, tensor) of its weights. `said`: the
    file that its sizes come from."""
    ours = {hf_name(key): key for key, _ in model.named_parameters()}
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters()}
    seen: set[str] = set()
    tied: dict[str, Tensor] = {}  # the embedding, and the output projection where the file has it too
    path = None
    for path, theirs, tensor in tensors:
        short = theirs.removeprefix("transformer.")
        if IGNORED.fullmatch(short):
            continue
        key = ours.get(short) or ("wte.weight" if short == "lm_head.weight" else None)
        if key is None:
            raise UserError(f"{path}: tensor {theirs} is none of a {len(model.blocks)}-layer GPT-2's; see its {said}")
        shape = shapes[key][::-1] if transposed(key) else shapes[key]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{path}: tensor {theirs} has shape {tuple(tensor.shape)}, not {shape} as {said} says")
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise UserError(f"{path}: tensor {theirs} is {tensor.dtype}, not float32, float16 or bfloat16")
        # A copy of our own in any case: what the file gives may be a view of the file.
        value = torch.empty(shapes[key]).copy_(tensor.t() if transposed(key) else tensor)
        if key == "wte.weight":
            tied[short] = value
        if key != "wte.weight" or short != "lm_head.weight":
            seen.add(key)
            yield key, value
    if missing := [theirs for theirs, key in ours.items() if key not in seen]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        if missing == ["lm_head.weight"]:
            raise UserError(f"{path}: no lm_head.weight, though in {CONFIG} tie_word_embeddings is false: set it to true")
        raise UserError(f"{path}: tensor {full_name(missing[0])}{more} missing; copy the weights again")
    if len(tied) == 2 and not torch.equal(*tied.values()):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight; GPT-2 here has the two tied")


def _tensors(find: Find, name: str) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, tensor) of every tensor in the weights, one at a time."""
    path = find(WEIGHTS)
    if path is None:
        raise UserError(f"no weights for {name}: none of {', '.join(WEIGHTS)}")
    files = [path]
    if path.suffix == ".json":
        index = _read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise UserError(f"{path}: no weight_map that says which file has which tensor; copy it again")
        files = []
        for file in sorted(set(index.values())):
            if Path(file).name != file:  # an index is somebody else's text: it must not lead out of its folder
                raise UserError(f"{path}: {file!r} is not the name of a file beside it")
            files.append(find([file]))
            if files[-1] is None:
                raise UserError(f"{path.parent / file} is missing, {path.name} lists it; copy it there")
    for file in files:
        try:
            for key, tensor in _read_safetensors(file) if file.suffix == ".safetensors" else _read_bin(file):
                yield file, key, tensor
        except (SafetensorError, _Damaged) as error:
            raise UserError(
                f"{file} ({file.stat().st_size:,} bytes) is damaged, incomplete, or holds more than tensors: "
                "delete it and get it again"
            ) from error


def _tf_tensors(find: Find, name: str) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, transformers' name, tensor) of every tensor in a TensorFlow checkpoint of OpenAI's, one at a time."""
    index = find([INDEX])
    entries = read_index(index)  # before the large file is downloaded
    data = find([DATA])
    if data is None:
        raise UserError(f"no weights for {name}: {DATA} is missing beside {INDEX}; copy it there")
    for entry in entries:
        # model/h0/attn/c_attn/w -> h.0.attn.c_attn.weight; its shape (1, in, out) is that of a convolution one token wide
        parts = re.sub(r"^model/(?:h(\d+)/)?", lambda m: f"h/{m[1]}/" if m[1] else "", entry.name).split("/")
        last = {"w": "weight", "g": "weight", "b": "bias", "wte": "wte.weight", "wpe": "wpe.weight"}.get(parts[-1], parts[-1])
        tensor = torch.from_numpy(read_tensor(entry, data))
        yield data, ".".join([*parts[:-1], last]), tensor.squeeze(0) if parts[-1] == "w" and tensor.dim() == 3 else tensor


class _Damaged(Exception):
    pass


def _read_safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
            yield key, tensors.get_tensor(key)


def _read_bin(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        # Only the zip format of torch >= 1.6 can be mapped; weights_only: tensors, no code.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # damaged bytes make the readers raise almost anything, EINVAL of a bad seek included
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        raise _Damaged from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise _Damaged
    for key in list(state):
        yield key, state.pop(key)


def save(model: GPT, tokenizer, folder: Path | str, rank: int = 0) -> None:
    """Write model and tokenizer as a folder that AutoModelForCausalLM, AutoTokenizer and `load` take. float32.

    Of a sharded model every rank must call this: a tensor at a time is gathered, rank 0 writes.
    Whole or absent: written beside `folder` and renamed into its place; an old model there is kept until then. Raises
    UserError where `folder` is something other than a model's, OSError where the disk is full (the old one stands).
    """
    if rank:
        for p in model.parameters():
            whole(p)
        return
    save_tensors(model.config, ((name, whole(p)) for name, p in model.named_parameters()), tokenizer, folder)


def save_tensors(config: GPTConfig, tensors: Iterator[tuple[str, Tensor]], tokenizer, folder: Path | str) -> None:
    """`save` of what `source` gives, (name, tensor) in any order: one of them in memory at a time."""

    def write(new: Path) -> None:
        _write_safetensors(config, tensors, new / "model.safetensors")
        _write_json(new / CONFIG, _config(config, tokenizer.eot))
        ids = {key: tokenizer.eot for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(new / "generation_config.json", ids)
        tokenizer.save(new)

    write_folder(folder, CONFIG, "a model", write)


def write_folder(folder: Path | str, mark: str, kind: str, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder`, and rename it into its place; what is there is kept until then.

    Raises UserError where `folder` has something other in it than `kind`: it must be empty or hold the file `mark`.
    """
    folder = Path(os.path.realpath(folder))
    new, old = (folder.with_name(folder.name + end) for end in (".saving", ".old"))
    if folder.exists() and not (folder / mark).is_file() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(f"{folder} is there and not {kind}'s folder: move it away, or write to another place")
    if old.exists() and not folder.exists():  # an earlier save was killed between its two renames
        os.rename(old, folder)
    for leftover in (new, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        new.mkdir(parents=True)
        write(new)
        for path in (*new.iterdir(), new):
            _fsync(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(new)
        if isinstance(error, OSError) and error.filename is None:  # a write does not tell which file it was
            error.filename = str(folder)
        raise
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 (hex) over the parameters as float32, by sorted name, name and shape included, device not. Of a model that
    `build_model` made with an adapter, beside the weights or merged: of what was read, see adapters.Adapter.fingerprint."""
    if getattr(model, "origin", None):
        return model.origin.start_sha256
    return combine({name: digest(whole(p)) for name, p in model.named_parameters()})


def digest(p: Tensor) -> str:
    """A parameter's shape, and SHA-256 over its float32 values."""
    return f"{tuple(p.shape)} {hashlib.sha256(_bytes(p)).hexdigest()}"


def combine(digests: dict[str, str]) -> str:
    """A model's fingerprint, from its parameters' names and digests."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def _bytes(p: Tensor) -> memoryview:
    """The float32 values in memory order; no copy of what is float32, contiguous and on the CPU."""
    return memoryview(p.detach().to("cpu", torch.float32).contiguous().numpy().reshape(-1)).cast("B")


def _config(config: GPTConfig, eot: int) -> dict:
    """config.json as transformers' GPT2Config reads it."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: allowed[0] for key, allowed in FIXED.items()},
        "tie_word_embeddings": config.tied,
        **{key: getattr(config, ours) for key, ours in DIMENSIONS.items()},
        "n_ctx": config.block_size,
        "n_inner": None,
        "vocab_size": config.vocab_size,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "initializer_range": 0.02,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_safetensors(config: GPTConfig, tensors: Iterator[tuple[str, Tensor]], path: Path) -> None:
    """The format is 8 bytes of header length, a JSON header, the tensors' bytes (github.com/huggingface/safetensors).

    Written here and not by the library, which wants all tensors at once and turns a full disk into an error of its own.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    places = {}
    for name, p in empty(config).named_parameters():
        shape = list(p.shape)[::-1] if transposed(name) else list(p.shape)
        begin, end = end, end + 4 * p.numel()
        places[name] = begin, p.shape
        header[full_name(hf_name(name))] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin on a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, p in tensors:
            begin, expected = places.pop(name, (0, None))
            if p.shape != expected:
                raise ValueError(f"not a plain GPT's parameters, merge or unwrap: {name} {tuple(p.shape)}")
            file.seek(8 + len(text) + begin)
            file.write(_bytes(p.t() if transposed(name) else p))
    if places:
        raise ValueError(f"not a plain GPT's parameters: without {sorted(places)[:3]}")


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
