"""Weights in and out: the hub's, a folder's or fresh ones -> a model; a model -> a folder that transformers loads as it is.

A tensor at a time goes through memory, so loading and saving take about one copy of the model.
"""

import contextlib
import difflib
import hashlib
import importlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from base.download import hub_endpoint, hub_find
from base.errors import UserError
from base.files import expand, held, private, read_json, sync, write_json
from logprobs import LanguageModel

MOST_LAYERS, MOST = 1_000, 2**24  # of a model; and of any other size of one (width, positions, tokens)
# model_type in config.json -> the file with its Config and Model, see logprobs.LanguageModel
FAMILIES = {"gpt2": "model", "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama"}
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
STATE = "state.json"  # of a run's checkpoint, see runtime/checkpoint.py: its weights are in rank_0.safetensors, …
# What a model's folder may hold of its tokenizer. tokenizer.json is the last to be downloaded: where it is, all others are.
TOKENIZER_FILES = (
    *("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "tokenizer.json"),
)
# all that is written into a folder of a model or an adapter
FILES = {CONFIG, "model.safetensors", "adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES}
Find = Callable[[Sequence[str]], Path | None]  # file names -> the first of them that is there


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: its base by name (a folder by its absolute path), the base's fingerprint, and the fingerprint
    of the model as it starts, which differs from that where it starts with an adapter."""

    base: str
    base_sha256: str
    start_sha256: str


@dataclass
class Source:
    """A model that is about to be built: its config, and its weights as (name, float32 tensor), one read at a time.

    The weights can be read once, by the process that opened them. What it sends to others has none.
    """

    config: Any
    tensors: Iterator[tuple[str, Tensor]]
    base: str
    digests: dict[str, str]  # of the base's weights, see `digest`; all there when they have been read
    adapter: Any = None  # an adapters.Adapter, merged into the weights or beside them

    def __getstate__(self) -> dict:
        return self.__dict__ | {"tensors": iter(())}

    def origin(self) -> Origin:
        """Known when all weights have been read."""
        folder = expand(self.base)
        base = self.base if self.base == "scratch" or on_hub(self.base) else str(folder.resolve())
        found = combine(self.digests)
        return Origin(base, found, self.adapter.fingerprint(self.digests) if self.adapter else found)


def load(init_from: str | Path | Source, **options) -> LanguageModel:
    """The model that `init_from` names, or that of an opened source, float32, on the CPU. Options and errors: see `source`."""
    found = init_from if isinstance(init_from, Source) else source(init_from, **options)
    model = empty(found.config)
    model.load_state_dict(dict(found.tensors), assign=True)
    return model


def source(init_from: str | Path, *, dropout: float = 0.0, vocab_size: int = 50257, seed: int = 0, **sizes: int) -> Source:
    """Open the weights that `init_from` names.

    init_from: "scratch" (a GPT-2 of the sizes n_layer, n_head, n_embd, block_size and vocab_size, its weights drawn by seed),
    a name on the hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, or owner/name), or a folder in Hugging Face's layout: config.json
    with model.safetensors, in one file or in shards; or with the files of a run's checkpoint. A folder that has the name of one
    of these GPT-2s is written ./gpt2.

    Raises UserError for what is missing, damaged, or no model that is computed here (a tied head that differs from the
    embedding only while the weights are read), and for sizes that are given (not 0) and are not those of the weights.
    """
    name = str(init_from)
    if name == "scratch":
        for key, size in sizes.items():
            if size <= 0:
                raise UserError(f"init_from is scratch, but {key} is {size}: set it to a positive number")
        try:
            config = bounded(family("gpt2").Config(**sizes, vocab_size=vocab_size, dropout=dropout))
        except ValueError as error:
            raise UserError(f"init_from is scratch, but {error}: change one") from None
        return _opened(config, empty(config).initial_weights(seed), name)

    find = _hub(name) if on_hub(name) else _folder(name)
    path = find([CONFIG])
    if path is None:
        raise UserError(f"{name} is no folder here, and {hub_endpoint()} has no {CONFIG} of that name: check the name")
    config = read_config(path, dropout)
    for key, size in sizes.items():
        if size and size != getattr(config, key):
            raise UserError(f"{key} is {size}, but {path} has {getattr(config, key)}: leave it out or use scratch")
    saved = (path.parent / STATE).is_file()
    return _opened(config, _saved(path.parent, empty(config)) if saved else _ours(_headers(find, name), empty(config)), name)


def _opened(config, tensors: Iterator[tuple[str, Tensor]], base: str) -> Source:
    digests: dict[str, str] = {}

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            found = digest(tensor)
            if name not in digests:
                digests[name] = found
                yield name, tensor
            elif found != digests[name]:
                raise UserError(f"{base}: the head differs from the embedding, though {CONFIG} says that the two are tied")

    return Source(config, read(), base, digests)


def family(model_type: str):
    """The module of a model family, with its `Config` and `Model`."""
    return importlib.import_module(FAMILIES[model_type])


def empty(config) -> LanguageModel:
    """A model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return family(config.model_type).Model(config)


# --- in --------------------------------------------------------------------------------------------------------------


def on_hub(name: str) -> bool:
    """Whether a model is looked for on the hub: GPT-2's four names, and owner/name where there is no folder `owner` here."""
    named = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    return name in HUB_NAMES or bool(named and not Path(name).parent.exists())


def check_model(init_from: str) -> None:
    """UserError for a name that is no folder here and no model that is looked for elsewhere. Reads and downloads nothing."""
    if init_from != "scratch" and not on_hub(init_from) and not expand(init_from).exists():
        _folder(init_from)


def _hub(name: str) -> Find:
    return lambda names: hub_find(name, names)


def _folder(name: str) -> Find:
    folder = expand(name)
    if not folder.exists():
        near = difflib.get_close_matches(name, [*HUB_NAMES, "scratch"], 1)
        known = f"known are {', '.join(HUB_NAMES)}, owner/name on the hub, scratch, or a model's folder"
        hint = f"did you mean {near[0]}?" if near else known
        raise UserError(f"{name} is no folder and no known model (init_from): {hint}")
    if not (folder / CONFIG).is_file():
        hint = f"did you mean {folder / 'model'}?" if (folder / "model" / CONFIG).is_file() else "name a saved model's folder"
        raise UserError(f"no {CONFIG} in {name} (init_from): {hint}")
    return lambda names: next((folder / n for n in names if (folder / n).is_file()), None)


def read_config(path: Path, dropout: float = 0.0):
    """config.json -> a family's config. Raises UserError, with the key, for any model that no family here computes."""
    raw = read_json(path)
    if not isinstance(raw.get("model_type"), str) or raw["model_type"] not in FAMILIES:
        raise UserError(f"{path}: model_type is {raw.get('model_type')!r}, known here: {', '.join(FAMILIES)}")
    try:
        return bounded(family(raw["model_type"]).Config.from_hf(raw, dropout))
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def bounded(config):
    """A family's config. ValueError for a size that no model has: to lay such a one out would not end, or not fit a number."""
    for name, size in {**vars(config), "n_head * head_dim": config.n_head * config.head_dim}.items():
        most = MOST_LAYERS if name == "n_layer" else MOST
        if isinstance(size, int) and size > most:
            raise ValueError(f"{name} is above {most:,}: no model is so large")
    return config


def _layout(model: LanguageModel) -> dict[str, tuple[str, tuple]]:
    """transformers' name of each parameter -> (our name, its shape in their files)."""
    return {
        model.hf_name(name): (name, tuple(p.shape)[::-1] if model.transposed(name) else tuple(p.shape))
        for name, p in model.named_parameters()
    }


def _ours(headers: list[tuple[Path, str, tuple, str]], model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of `model`, read one at a time, out of weights with these `_headers`. They are checked
    first: nothing is allocated for a model that they are not the weights of. A tied head may be there as well: then the
    embedding comes twice."""
    prefix, layout, path = model.PREFIX, _layout(model), "the weights"
    head, embedding = model.hf_name("head.weight"), next(n for n, p in model.named_parameters() if p is model.embedding.weight)
    layout.setdefault(head, layout[model.hf_name(embedding)])
    files: dict[Path, dict[str, str]] = {}  # the name there of each tensor -> ours
    for path, there, shape, dtype in headers:
        if re.fullmatch(model.IGNORED, there.removeprefix(prefix)):
            continue
        name, wanted = layout.get(there if there == head else prefix + there.removeprefix(prefix), ("", ()))
        if not name:
            raise UserError(f"{path}: tensor {there} is none of a {len(model.blocks)}-layer {model.config.model_type}'s")
        if shape != wanted:
            raise UserError(f"{path}: tensor {there} has shape {shape}, not {wanted} as {CONFIG} says")
        if dtype not in ("F32", "F16", "BF16"):
            raise UserError(f"{path}: tensor {there} is {dtype}, not F32, F16 or BF16")
        files.setdefault(path, {})[there] = name
    found = {name for names in files.values() for name in names.values()}
    if missing := [theirs for theirs, (name, _) in layout.items() if name not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = f"set tie_word_embeddings to true in {CONFIG}" if missing == [head] else "copy the weights again"
        raise UserError(f"{path}: tensor {missing[0]}{more} missing: {hint}")

    def read() -> Iterator[tuple[str, Tensor]]:
        for path, names in files.items():
            with _opened_file(path) as file:
                for there, name in names.items():
                    tensor = file.get_tensor(there)
                    # A copy of our own in any case: what the file gives may be a view of the file.
                    shape = model.get_parameter(name).shape
                    yield name, torch.empty(shape).copy_(tensor.t() if model.transposed(name) else tensor)

    return read()


def pieces(folder: Path, opened: contextlib.ExitStack) -> dict[str, list]:
    """The tensors in a checkpoint by name, each in pieces: (number of the first row, slice of a file in `opened`)."""
    found: dict[str, list] = {}
    for path in filter(Path.is_file, sorted(folder.glob("rank_*.safetensors"))):
        file = opened.enter_context(safe_open(path, "pt"))
        for name, start in (file.metadata() or {}).items():
            found.setdefault(name, []).append((int(start), file.get_slice(name)))
    return found


def joined(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of those of `names` that are in a checkpoint, whole. UserError where it is damaged."""
    try:
        with contextlib.ExitStack() as opened:
            found = pieces(folder, opened)
            for name in filter(found.get, names):
                yield name, torch.cat([rows[:].float() for _, rows in sorted(found[name], key=itemgetter(0))])
    except (SafetensorError, OSError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"{folder} is a damaged checkpoint ({error}): name another one") from None


def _saved(folder: Path, model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter of `model`, out of a checkpoint."""
    left = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, tensor in joined(folder, list(left)):
        if (wanted := left.pop(name)) != tuple(tensor.shape):
            raise UserError(f"{folder}: tensor {name} has shape {tuple(tensor.shape)}, not {wanted} as {CONFIG} says")
        yield name, tensor
    if left:
        raise UserError(f"{folder}: tensor {min(left)} is missing: name another checkpoint, or the run's model/")


def _headers(find: Find, name: str) -> list[tuple[Path, str, tuple, str]]:
    """(file, name, shape, dtype) of every tensor in the weights."""
    path = find(WEIGHTS)
    if path is None:
        hint = "pytorch_model.bin is a pickle and not read: save it anew with transformers' save_pretrained"
        raise UserError(f"no weights for {name}: neither of {', '.join(WEIGHTS)}; {hint}")
    files = [path]
    if path.suffix == ".json":
        index = read_json(path).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise UserError(f"{path}: no weight_map that says which file has which tensor; copy it again")
        files = []
        for file in sorted(set(index.values())):
            if Path(file).name != file:  # an index is somebody else's text: it must not lead out of its folder
                raise UserError(f"{path}: {file!r} is not the name of a file beside it")
            files.append(find([file]))
            if files[-1] is None:
                raise UserError(f"{path.parent / file} is missing, {path.name} lists it; copy it there")
    found = []
    for path in files:
        with _opened_file(path) as file:
            slices = ((key, file.get_slice(key)) for key in file.keys())  # noqa: SIM118 (it is no mapping)
            found += [(path, key, tuple(part.get_shape()), part.get_dtype()) for key, part in slices]
    return found


@contextlib.contextmanager
def _opened_file(path: Path):
    """A safetensors file, open for reading. UserError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        size = path.stat().st_size
        raise UserError(f"{path} ({size:,} bytes) is damaged or incomplete: delete it and get it again") from error


# --- out -------------------------------------------------------------------------------------------------------------


def save(model: LanguageModel, tokenizer, folder: Path | str, rank: int = 0) -> None:
    """Write model and tokenizer as a folder that AutoModelForCausalLM, AutoTokenizer and `load` take. float32.

    Of a sharded model every rank must call this: a tensor at a time is gathered, rank 0 writes. Errors: see `write_folder`.
    """
    if rank:
        for p in model.parameters():
            whole(p)
        return
    save_tensors(model.config, ((name, whole(p)) for name, p in model.named_parameters()), tokenizer, folder)


def save_tensors(config, tensors: Iterator[tuple[str, Tensor]], tokenizer, folder: Path | str) -> None:
    """`save` of (name, tensor) pairs in any order: one of them is in memory at a time."""

    def write(new: Path) -> None:
        model = empty(config)
        shapes = {theirs: shape for theirs, (_, shape) in _layout(model).items()}
        theirs = ((model.hf_name(name), p.t() if model.transposed(name) else p) for name, p in tensors)
        with open(new / "model.safetensors", "wb") as file:
            write_safetensors(file, shapes, theirs, {"format": "pt"})
        describe(config, tokenizer, new)

    write_folder(folder, CONFIG, "a model", write)


def describe(config, tokenizer, folder: Path) -> None:
    """Write what a model's folder has beside its weights."""
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eot}
    common = {"model_type": config.model_type, "vocab_size": config.vocab_size, "torch_dtype": "float32", "use_cache": True}
    write_json(folder / CONFIG, config.to_hf() | common | ids)
    write_json(folder / "generation_config.json", ids | {"pad_token_id": tokenizer.eot})
    tokenizer.save(folder)


def strangers(folder: Path, mark: str) -> str:
    """The name of something in a folder that `write_folder` did not write: with it comes the file `mark`. "" if all is ours."""
    names = {*os.listdir(folder)} if folder.exists() else set()
    return min(names - FILES if mark in names else names, default="")


def write_folder(folder: Path | str, mark: str, kind: str, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `folder`, then rename it into place; what is there is kept until then.

    Raises UserError where `folder` holds something other than `kind` (see `strangers`), and OSError where the disk is full:
    then what was there stays.
    """
    folder = Path(os.path.realpath(folder))
    if strange := strangers(folder, mark):
        raise UserError(f"{folder} is there and not {kind}'s folder: move it away ({strange}), or write to another place")
    new, old = private(folder, "new"), private(folder, "old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(folder):
        if old.exists() and not folder.exists():  # an earlier save was killed between its two renames
            os.rename(old, folder)
        for leftover in (new, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        try:
            new.mkdir()
            write(new)
            for path in (*new.iterdir(), new):
                sync(path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                shutil.rmtree(new)
            if isinstance(error, OSError) and error.filename is None:  # a write does not tell which file it was
                error.filename = str(folder)
            raise
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def write_safetensors(file, shapes: dict[str, tuple], tensors: Iterator[tuple[str, Tensor]], metadata: dict[str, str]) -> None:
    """Write float32 tensors, in any order, to an open binary file: 8 bytes of header length, a JSON header, the tensors' bytes
    (the format of github.com/huggingface/safetensors). The same content always gives the same bytes.

    Written here and not by the library, which wants all tensors at once, orders the metadata at random, and turns a full disk
    into an error of its own.
    """
    header, end = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin on a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    left = dict(shapes)
    for name, tensor in tensors:
        if left.pop(name, None) != tuple(tensor.shape):
            raise ValueError(f"not a plain model's parameters, merge or unwrap: {name} {tuple(tensor.shape)}")
        file.seek(8 + len(text) + header[name]["data_offsets"][0])
        file.write(_bytes(tensor))
    if left:
        raise ValueError(f"not a plain model's parameters: without {sorted(left)[:3]}")


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A few float32 tensors as a safetensors file's bytes."""
    file = io.BytesIO()
    write_safetensors(file, {name: tuple(t.shape) for name, t in tensors.items()}, tensors.items(), metadata)
    return file.getvalue()


# --- fingerprints ----------------------------------------------------------------------------------------------------


def whole(p: Tensor) -> Tensor:
    """A parameter as one tensor on every rank that takes part, whether it is sharded or not."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def fingerprint(model: LanguageModel) -> str:
    """SHA-256 (hex) of the weights that the model started with, as `build_model` read them; of a model without an origin, of
    its parameters as float32: by sorted name, name and shape included, device not."""
    if model.origin:
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
