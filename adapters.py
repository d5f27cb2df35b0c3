"""Adapters in and out, in peft's format: a folder with adapter_config.json and adapter_model.safetensors.

What training writes, `PeftModel.from_pretrained` puts on transformers' model, and what peft writes can be used, or trained
further, here. Where a fused layer has an adapter a part (GPT-2's q, k and v), peft gets one of so many times the rank on the
whole layer: A stacked, B with a block a part on its diagonal.
"""

import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import weights
from base.errors import UserError
from base.files import expand, read_json, read_safetensors, write_json
from logprobs import LanguageModel, computed
from lora import Linear, LoRAConfig, add_lora, is_target, lora_delta
from weights import Source, on_hub, whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT = "base_model.model."  # in front of every name in a file of peft's
# What peft's plain LoRA is: key -> the values computed here, see logprobs.computed. Other beginnings than these of
# init_lora_weights change the base's own weights, and the adapter means those.
BEYOND = (
    "use_dora lora_bias modules_to_save trainable_token_indices layer_replication target_parameters use_qalora use_bdlora "
    "alora_invocation_tokens arrow_config kasa_config monteclora_config velora_config"
)
FIXED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(BEYOND.split(), (None, False, [], {})),
}


@dataclass(frozen=True)
class Part:
    """One layer's adapter, see lora.LoRA: a (parts * rank, n_in), b (n_out, rank)."""

    a: Tensor
    b: Tensor
    scale: float
    parts: int


@dataclass
class Adapter:
    """An adapter's folder, read. `parts`: by our layer names ("blocks.0.attn.qkv", "head")."""

    folder: Path
    base_sha256: str  # of the weights it was trained on; "" where it does not say
    parts: dict[str, Part]
    config: LoRAConfig | None  # None where layers differ in rank, scale or targets
    copies: dict[str, Tensor]  # of the base's own embedding and head, which peft saves beside an adapter on the head

    def checked(self, found: Source) -> Iterator[tuple[str, Tensor]]:
        """The base's weights; UserError if they are not those that the adapter was trained on, in part only at their end."""
        for name, tensor in found.tensors:
            copy = self.copies.get(name)
            if copy is not None and not (copy.shape == tensor.shape and torch.equal(copy, tensor.to(copy.dtype))):
                raise UserError(f"{self.folder}: an adapter for another model: it has another {name} than {found.base}")
            yield name, tensor
        if self.base_sha256 and self.base_sha256 != (sha256 := weights.combine(found.digests)):
            raise UserError(
                f"{self.folder}: an adapter for other weights (SHA-256 {self.base_sha256[:12]}…) than {found.base} has now "
                f"({sha256[:12]}…): restore those, or name them in its {CONFIG} as base_model_name_or_path"
            )

    def merged(self, tensors: Iterator[tuple[str, Tensor]], model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
        """The base's weights with the adapter added. Under an adapter a tied head gets weights of its own, `head.weight`."""
        untied = "head" in self.parts and model.config.tied
        for name, tensor in tensors:
            if untied and model.get_parameter(name) is model.embedding.weight:
                yield name, tensor
                name = "head.weight"
            part = self.parts.get(name.removesuffix(".weight"))
            yield name, tensor if part is None else tensor + lora_delta(part.a, part.b, part.scale, part.parts)

    def fingerprint(self, base_digests: dict[str, str]) -> str:
        """SHA-256 of the base and of A, B and scale, as they were read. Not of the weights that they make: the last bits of a
        product differ between processors."""
        own = {
            f"{name}.lora": f"{weights.digest(part.a)} {weights.digest(part.b)} {part.scale!r}"
            for name, part in self.parts.items()
        }
        return weights.combine(base_digests | own)

    def initial(self, keep_start: bool) -> Iterator[tuple[str, Tensor]]:
        """Its values as model parameters, in place of `lora.initial_lora`."""
        for name, part in self.parts.items():
            for letter, tensor in (("a", part.a), ("b", part.b)):
                yield f"{name}.lora.{letter}", tensor
                if keep_start:
                    yield f"{name}.lora.start_{letter}", tensor.clone()


def is_adapter(init_from: str) -> bool:
    folder = expand(init_from)
    return not on_hub(init_from) and (folder / CONFIG).is_file() and not (folder / weights.CONFIG).is_file()


def source(init_from: str, *, merge: bool = True, **options) -> Source:
    """`weights.source`, which also takes an adapter's folder: with `merge` its model has the adapter in its weights, without it
    is the base, and the `adapter` stands beside it."""
    if not is_adapter(init_from):
        return weights.source(init_from, **options)
    folder = expand(init_from)
    raw = _read_config(folder / CONFIG)
    name = raw["base_model_name_or_path"].removeprefix("openai-community/")
    if name == "scratch" and not all(options.get(size) for size in ("n_layer", "n_head", "n_embd", "block_size")):
        raise UserError(f"{folder}: trained on weights that no file holds: use the run's model/")
    if is_adapter(name):
        raise UserError(f"{folder / CONFIG}: base_model_name_or_path {name} is an adapter too: name a model")
    try:
        found = weights.source(name, **options)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: base_model_name_or_path: {error}") from None
    model = weights.empty(found.config)
    adapter = _read(folder, raw, model, name)
    tensors, config = adapter.checked(found), found.config
    if merge:
        tensors = adapter.merged(tensors, model)
        config = replace(config, tied=config.tied and "head" not in adapter.parts)
    return Source(config, tensors, name, found.digests, adapter)


def lora_config(cfg, found: Source) -> LoRAConfig:
    """What the keys `lora_…` ask for. Where the run goes on from an adapter they must agree with it (UserError)."""
    if cfg.lora_rank > found.config.n_embd:
        raise UserError(f"key lora_rank: {cfg.lora_rank} is more than the model's width {found.config.n_embd}: give less")
    targets = targets_of(cfg.lora_targets, weights.empty(found.config).LINEAR)
    if found.adapter is None:
        return LoRAConfig(cfg.lora_rank, cfg.lora_alpha or float(cfg.lora_rank), targets, cfg.lora_dropout, cfg.lora_rslora)
    there = found.adapter.config
    if there is None:
        raise UserError(
            f"{found.adapter.folder}: its layers differ in rank, scale or targets: it can be used, but not trained further; "
            "train without lora_rank (it is merged then), or from a merged model"
        )
    for name, asked, held in (
        ("lora_rank", cfg.lora_rank, there.rank),
        ("lora_alpha", cfg.lora_alpha, there.alpha),
        ("lora_targets", cfg.lora_targets and " ".join(targets), " ".join(there.targets)),
        ("lora_rslora", cfg.lora_rslora, there.stabilised),
    ):
        if asked and asked != held:  # what is not given is the adapter's
            raise UserError(
                f"key {name}: {asked}, but init_from {cfg.init_from} is an adapter with {held}: give that, or start a new "
                "adapter from a merged model (the run's model/)"
            )
    return replace(there, dropout=cfg.lora_dropout)


def targets_of(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """A text like "attn.qkv, head" -> ("attn.qkv", "head"), in the model's order; all where it is empty. UserError for what is
    no such layer."""
    names = re.split(r"[\s,]+", text.strip()) if text.strip() else known
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.0)[0]
            raise UserError(f"key lora_targets: no layer {name!r}: known are {' '.join(known)}; did you mean {near}?")
    return tuple(name for name in known if name in names)


# --- out ------------------------------------------------------------------------------------------------------------


def save(model: LanguageModel, tokenizer, folder: Path, rank: int = 0) -> None:
    """Write the model's adapters (and the tokenizer) as a folder that peft takes, whole or not at all. float32.

    Of a sharded model every rank must call this. Raises what `weights.write_folder` does.
    """
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    found = {name: whole(p).detach().to("cpu", torch.float32) for name, p in trained}
    if rank:
        return
    tensors, metadata = _as_peft(found, model, model.origin.base_sha256)

    def write(new: Path) -> None:
        (new / WEIGHTS).write_bytes(weights.safetensors_bytes(tensors, {"format": "pt", **metadata}))
        describe(model, tokenizer, new)

    weights.write_folder(folder, CONFIG, "an adapter", write)


def _as_peft(found: dict[str, Tensor], model: LanguageModel, base_sha256: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Adapters by our names of their parameters -> tensors by peft's, and what else the file says. See lora.LoRA for shapes."""
    tensors, most = {}, 1
    for name in [name.removesuffix(".lora.a") for name in found if name.endswith(".lora.a")]:
        a, b = found[f"{name}.lora.a"], found[f"{name}.lora.b"]
        parts = len(a) // b.shape[1]
        b = torch.block_diag(*b.chunk(parts)) if parts > 1 else b
        tensors |= {f"{PEFT}{model.hf_name(name)}.lora_{x}.weight": tensor for x, tensor in (("A", a), ("B", b))}
        most = max(most, parts)
    return tensors, {"base_sha256": base_sha256, "qkv_parts": str(most)}


def describe(model: LanguageModel, tokenizer, folder: Path) -> None:
    """Write what an adapter's folder has beside the adapter."""
    lora = model.lora
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear) and layer.lora}
    an_example = {target: next(name for name in layers if is_target(name, (target,))) for target in lora.targets}
    # peft scales a fused layer by its own rank: alpha grows with it, so that the scale stays
    parts = {_kind(model.hf_name(name), target): layers[name].lora.parts for target, name in an_example.items()}
    fused = {kind: n for kind, n in parts.items() if n > 1}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.origin.base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _short(lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.stabilised,
        "target_modules": list(parts),
        "rank_pattern": {name: n * lora.rank for name, n in fused.items()},
        "alpha_pattern": {name: _short(lora.alpha * (math.sqrt(n) if lora.stabilised else n)) for name, n in fused.items()},
        "fan_in_fan_out": any(model.transposed(f"{name}.weight") for name in layers),
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    write_json(folder / CONFIG, config)
    tokenizer.save(folder)


def _kind(name: str, target: str) -> str:
    """transformer.h.0.attn.c_attn, of our target attn.qkv -> attn.c_attn, by which peft finds that layer in every block."""
    return ".".join(name.split(".")[-len(target.split(".")) :])


def _short(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


# --- in -------------------------------------------------------------------------------------------------------------


def _read(folder: Path, raw: dict, model: LanguageModel, base: str) -> Adapter:
    """An adapter of ours or peft's for `model`, which is called `base`. Raises UserError for what is missing, damaged, or no
    plain LoRA of its layers."""
    path, parts = folder / WEIGHTS, {}
    if (folder / weights.STATE).is_file():
        tensors, metadata = _saved(folder, model)
    elif path.is_file():
        tensors, metadata = read_safetensors(path, "copy it again")
    else:
        raise UserError(f"no {WEIGHTS} in {folder}: save the adapter as safetensors")
    for name, layer in model.named_modules():
        theirs = model.hf_name(name) if isinstance(layer, Linear) else ""
        a, b = (tensors.pop(f"{PEFT}{theirs}.lora_{letter}.weight", None) for letter in "AB")
        if a is None and b is None:
            continue
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1]:
            raise UserError(f"{path}: A and B of {theirs} do not belong together: copy it again")
        found, wanted = (b.shape[0], a.shape[1]), (layer.out_features, layer.in_features)
        if found != wanted:
            raise UserError(f"{path}: an adapter for another model: that of {theirs} fits {found}, {base} has {wanted}")
        rank, alpha = _pattern(raw, "rank_pattern", theirs, raw["r"]), _pattern(raw, "alpha_pattern", theirs, raw["lora_alpha"])
        if len(a) != rank:
            raise UserError(f"{path}: the adapter of {theirs} has rank {len(a)}, {CONFIG} says {rank}")
        scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
        a, b = (t.to(torch.float32, copy=True) for t in (a, b))
        split = metadata.get("qkv_parts") == str(layer.parts) and rank % layer.parts == 0
        parts[name] = _split(a, b, scale, layer.parts) if split else Part(a, b, scale, 1)
    copies, embedding = {}, next(n for n, p in model.named_parameters() if p is model.embedding.weight)
    for name in (embedding, "head.weight"):
        for theirs in (model.hf_name(name), model.hf_name(name).replace(".weight", ".base_layer.weight")):
            if (copy := tensors.pop(PEFT + theirs, None)) is not None:
                copies[embedding if model.config.tied else name] = copy
    left = list(tensors)
    if left or not parts:
        what = f"tensor {left[0]} is no LoRA of a linear layer of {base}" if left else "no LoRA tensors in it"
        raise UserError(f"{path}: an adapter for another model: {what}")
    return Adapter(folder, metadata.get("base_sha256", ""), parts, _uniform(parts, raw, model), copies)


def _saved(folder: Path, model: LanguageModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The adapters in a run's checkpoint as `save` would have written them."""
    layers = [name for name, module in model.named_modules() if isinstance(module, Linear)]
    found = dict(weights.joined(folder, [f"{name}.lora.{letter}" for name in layers for letter in "ab"]))
    for name in found:
        a, b = (found.get(name[:-1] + letter) for letter in "ab")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or not 0 < b.shape[1] <= len(a):
            raise UserError(f"{folder}: A and B of {name[:-2]} do not belong together: name another checkpoint")
    return _as_peft(found, model, str(read_json(folder / weights.STATE).get("base_sha256", "")))


def _split(a: Tensor, b: Tensor, scale: float, parts: int) -> Part:
    """An adapter on a whole fused layer as one a part, if B is block-diagonal."""
    rows = [piece.chunk(parts, 1) for piece in b.chunk(parts)]
    blocks = torch.cat([row[i] for i, row in enumerate(rows)])
    return Part(a, blocks, scale, parts) if torch.equal(torch.block_diag(*blocks.chunk(parts)), b) else Part(a, b, scale, 1)


def _read_config(path: Path) -> dict:
    raw = read_json(path)
    try:
        computed(raw, FIXED)
    except ValueError as error:
        raise UserError(f"{path}: {error}: only plain LoRA is read; merge it with peft and load the model") from None
    if not isinstance(raw.get("base_model_name_or_path"), str) or not raw["base_model_name_or_path"]:
        raise UserError(f"{path}: base_model_name_or_path is missing: name the model that the adapter belongs to")
    patterns = [raw.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(p, dict) and len(p) < 10_000 and all(re.fullmatch(r"[\w.]+", k) for k in p) for p in patterns):
        raise UserError(f"{path}: rank_pattern and alpha_pattern must map names of layers to numbers")
    numbers = [("r", raw.get("r")), ("lora_alpha", raw.get("lora_alpha")), *(item for p in patterns for item in p.items())]
    for name, value in numbers:
        if type(value) not in ((int,) if name == "r" else (int, float)) or not 0 < value <= weights.MOST:
            raise UserError(f"{path}: {name} is {value!r}, not a number above 0 and up to {weights.MOST:,}")
    return raw


def _pattern(raw: dict, pattern: str, layer: str, default: float) -> float:
    """The value of the first key that names the layer or its end. (peft takes keys as regular expressions.)"""
    return next((v for key, v in (raw.get(pattern) or {}).items() if f".{layer}".endswith(f".{key}")), default)


def _uniform(parts: dict[str, Part], raw: dict, model: LanguageModel) -> LoRAConfig | None:
    """The config that makes adapters of these shapes and scales, if there is one. `model` gets them."""
    targets = tuple(kind for kind in model.LINEAR if any(is_target(name, (kind,)) for name in parts))
    split = all(part.parts == model.get_submodule(name).parts for name, part in parts.items())
    config = LoRAConfig(raw["r"], float(raw["lora_alpha"]), targets, stabilised=bool(raw.get("use_rslora")), split=split)
    add_lora(model, config)
    made = {name: layer.lora for name, layer in model.named_modules() if isinstance(layer, Linear) and layer.lora}
    same = made.keys() == parts.keys() and all(
        (made[name].b.shape, made[name].parts) == (part.b.shape, part.parts) and math.isclose(part.scale, config.scale)
        for name, part in parts.items()
    )
    return config if same else None
