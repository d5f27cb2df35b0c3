"""Adapters in and out, in peft's format: a folder with adapter_config.json and adapter_model.safetensors.

What training writes, `PeftModel.from_pretrained` puts on transformers' GPT-2, and what peft writes for that can be used, or
trained further, here. Our adapters for q, k and v apart become one of three times the rank on the fused c_attn: A stacked, B
with a block each on its diagonal.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import weights
from base.errors import UserError
from base.files import safetensors_bytes
from model import GPT, LINEAR, SIZES, GPTConfig, Linear, LoRAConfig, lora_delta
from runtime.distributed import whole

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
THEIRS = dict(zip(LINEAR, ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "lm_head"), strict=True))
NAME = re.compile(r"base_model\.model\.(?:transformer\.h\.(\d+)\.)?(.+)\.lora_([AB])\.weight")
COPY = re.compile(r"base_model\.model\.(?:lm_head|transformer\.wte)(?:\.base_layer)?\.weight")
# what peft can add to LoRA and we do not compute: a config that sets one of these is refused
BEYOND = (
    "use_dora lora_bias modules_to_save trainable_token_indices layer_replication target_parameters use_qalora use_bdlora "
    "alora_invocation_tokens arrow_config kasa_config monteclora_config velora_config"
)


@dataclass(frozen=True)
class Origin:
    """Where a model in LoRA training, or one with an adapter merged into it, comes from: its base, by name and fingerprint, and
    the fingerprint of what was read, which is another where that was an adapter too."""

    base: str
    base_sha256: str
    start_sha256: str


@dataclass(frozen=True)
class Part:
    """One layer's adapter, see model.LoRA: a (parts * rank, n_in), b (n_out, rank)."""

    a: Tensor
    b: Tensor
    scale: float
    parts: int


@dataclass
class Adapter:
    """An adapter's folder, read. `parts`: by our layer names ("blocks.0.attn.qkv", "head")."""

    folder: Path
    base: str  # an `init_from`
    base_sha256: str  # of the weights it was trained on; "" where it does not say
    config: LoRAConfig | None  # None where layers differ in rank, scale or targets
    parts: dict[str, Part] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)  # of the base's own weights: peft adds those of a targeted head

    def check(self, model: GPT) -> None:
        """UserError if the layers it sits on are not those of `model` (which may be without memory)."""
        for name, part in self.parts.items():
            try:
                layer = model.get_submodule(name)
            except AttributeError:
                raise UserError(
                    f"{self.folder}: an adapter for another model: {name} is none of the layers of {self.base}"
                ) from None
            found, wanted = (part.b.shape[0], part.a.shape[1]), (layer.out_features, layer.in_features)
            if found != wanted:
                raise UserError(
                    f"{self.folder}: an adapter for another model: that of {name} fits weights of shape {found}, {self.base} "
                    f"has {wanted}"
                )
        targets = self.config.targets if self.config else ()
        layers = {name for name, layer in model.named_modules() if isinstance(layer, Linear) and name.endswith(targets)}
        if layers != self.parts.keys():  # on some blocks only
            self.config = None

    def merge(self, name: str, tensor: Tensor, tied: bool) -> Iterator[tuple[str, Tensor]]:
        """A base weight with the adapter's share. Under an adapter a tied head gets weights of its own, `head.weight`."""
        if tied and name == "wte.weight":
            yield name, tensor
            name = "head.weight"
        part = self.parts.get(name.removesuffix(".weight"))
        if part is not None:
            tensor = tensor + lora_delta(part.a, part.b, part.scale, part.parts)
        if part is not None or name != "head.weight" or not tied:
            yield name, tensor

    def watched(
        self, tensors: Iterator[tuple[str, Tensor]], tied: bool, digests: dict[str, str]
    ) -> Iterator[tuple[str, Tensor]]:
        """The base's tensors, their digests noted; UserError at their end if they are not those it was trained on."""
        copies = {"wte.weight" if tied else where: copy for where, copy in self.copies.items()}
        for name, tensor in tensors:
            digests[name] = weights.digest(tensor)
            if name in copies and not torch.equal(copies[name], tensor.to(copies[name].dtype)):
                raise UserError(f"{self.folder}: an adapter for another model: it has another {name} than {self.base}")
            yield name, tensor
        if self.base_sha256 and self.base_sha256 != (found := weights.combine(digests)):
            raise UserError(
                f"{self.folder}: an adapter for other weights (SHA-256 {self.base_sha256[:12]}…) than {self.base} has now "
                f"({found[:12]}…): restore those, or name them in its {CONFIG} as base_model_name_or_path"
            )

    def merged(
        self, tensors: Iterator[tuple[str, Tensor]], config: GPTConfig
    ) -> tuple[GPTConfig, Iterator[tuple[str, Tensor]]]:
        """The base's tensors and config -> those of the model with the adapter in it."""
        pairs = (pair for name, tensor in tensors for pair in self.merge(name, tensor, config.tied))
        return replace(config, tied=config.tied and "head" not in self.parts), pairs

    def fingerprint(self, base_digests: dict[str, str]) -> str:
        """SHA-256 of the base and of A, B and scale, as they were read. Not of the weights that they make: a product's last
        bits differ between processors."""
        own = {
            f"{name}.lora": f"{weights.digest(part.a)} {weights.digest(part.b)} {part.scale!r}"
            for name, part in self.parts.items()
        }
        return weights.combine(base_digests | own)

    def initial(self, keep_start: bool) -> Iterator[tuple[str, Tensor]]:
        """Its values as model parameters, instead of `GPT.initial_lora`."""
        for name, part in self.parts.items():
            for letter, tensor in (("a", part.a), ("b", part.b)):
                yield f"{name}.lora.{letter}", tensor
                if keep_start:
                    yield f"{name}.lora.start_{letter}", tensor.clone()


class Start:
    """What LoRA training starts from, or a merged model is made of: fingerprints, taken on rank 0 as the base's weights go by.

    `old`: the adapter that it goes on from, or that is merged, if any.
    """

    def __init__(self, init_from: str, tied: bool, old: Adapter | None):
        self.tied, self.old = tied, old
        self.base = old.base if old else init_from
        self.digests: dict[str, str] = {}

    def watched(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        if self.old:
            yield from self.old.watched(tensors, self.tied, self.digests)
            return
        for name, tensor in tensors:
            self.digests[name] = weights.digest(tensor)
            yield name, tensor

    def origin(self) -> Origin:
        folder = Path(self.base).expanduser()
        base = str(folder.resolve()) if self.base not in SIZES and folder.is_dir() else self.base
        found = weights.combine(self.digests)
        return Origin(base, found, self.old.fingerprint(self.digests) if self.old else found)


def is_folder(init_from: str) -> bool:
    folder = Path(init_from).expanduser()
    return init_from not in SIZES and (folder / CONFIG).is_file() and not (folder / weights.CONFIG).is_file()


def source(init_from: str, **options) -> tuple[GPTConfig, Iterator[tuple[str, Tensor]]]:
    """`weights.source`, which also takes a folder with an adapter: it is merged into the weights that it belongs to."""
    if not is_folder(init_from):
        return weights.source(init_from, **options)
    adapter = read(init_from)
    config, tensors = base(adapter, **options)
    return adapter.merged(adapter.watched(tensors, config.tied, {}), config)


def load(init_from: str, **options) -> GPT:
    """`weights.load`, which also takes a folder with an adapter. All of it float32, on the CPU."""
    config, tensors = source(init_from, **options)
    model = weights.empty(config)
    model.load_state_dict(dict(tensors), assign=True)
    return model


def base(adapter: Adapter, **options) -> tuple[GPTConfig, Iterator[tuple[str, Tensor]]]:
    """Config and weights of the model that an adapter belongs to."""
    if adapter.base == "scratch" and not all(options.get(size) for size in ("n_layer", "n_head", "n_embd", "block_size")):
        raise UserError(f"{adapter.folder}: trained on weights that no file holds: use the run's model/")
    if is_folder(adapter.base):
        raise UserError(f"{adapter.folder / CONFIG}: base_model_name_or_path {adapter.base} is an adapter too: name a model")
    try:
        config, tensors = weights.source(adapter.base, **options)
    except UserError as error:
        raise UserError(f"{adapter.folder / CONFIG}: base_model_name_or_path: {error}") from None
    adapter.check(weights.empty(config))
    return config, tensors


def chosen(cfg, adapter: Adapter | None, width: int) -> LoRAConfig:
    """What the keys `lora_…` say; where the run goes on from an adapter they must not say otherwise (UserError).

    width: the model's n_embd, which a rank may not pass: the adapters would be larger than what they sit on.
    """
    if cfg.lora_rank > width:
        raise UserError(f"key lora_rank: {cfg.lora_rank} is more than the model's width {width}: give less")
    targets = targets_of(cfg.lora_targets)
    if adapter is None:
        alpha = cfg.lora_alpha or float(cfg.lora_rank)
        return LoRAConfig(cfg.lora_rank, alpha, cfg.lora_dropout, targets or LINEAR, cfg.lora_rslora)
    there = adapter.config
    if there is None:
        raise UserError(
            f"{adapter.folder}: its layers differ in rank, scale or targets: it can be used, but not trained further; train "
            "without lora_rank (it is merged then), or from a merged model"
        )
    for name, here, old in (
        ("lora_rank", cfg.lora_rank, there.rank),
        ("lora_alpha", cfg.lora_alpha or there.alpha, there.alpha),
        ("lora_targets", targets or there.targets, there.targets),
        ("lora_rslora", cfg.lora_rslora or there.stabilised, there.stabilised),
    ):
        if here != old:
            said = " ".join(old) if isinstance(old, tuple) else old
            raise UserError(
                f"key {name}: {' '.join(here) if isinstance(here, tuple) else here}, but init_from {cfg.init_from} is an "
                f"adapter with {said}: give that, or start a new adapter from a merged model (the run's model/)"
            )
    return replace(there, dropout=cfg.lora_dropout)


def targets_of(text: str) -> tuple[str, ...]:
    """A text like "attn.qkv, head" -> ("attn.qkv", "head"), in the model's order. UserError for what is no such layer."""
    names = re.split(r"[\s,]+", text.strip()) if text.strip() else []
    for name in names:
        if name not in LINEAR:
            near = difflib.get_close_matches(name, LINEAR, 1, cutoff=0.0)[0]
            raise UserError(f"key lora_targets: no layer {name!r}: known are {' '.join(LINEAR)}; did you mean {near}?")
    return tuple(name for name in LINEAR if name in names)


# --- out ------------------------------------------------------------------------------------------------------------


def save(model: GPT, tokenizer, folder: Path, rank: int = 0) -> None:
    """Write the model's adapters (and the tokenizer) as a folder that peft takes, whole or not at all. float32.

    Of a sharded model every rank must call this. Raises what `weights.write_folder` does.
    """
    lora, tensors = model.lora, {}
    for name, p in model.named_parameters():
        layer, _, letter = name.rpartition(".lora.")
        if letter not in ("a", "b"):
            continue
        tensor = whole(p).detach().to("cpu", torch.float32)
        if layer.endswith("qkv") and letter == "b":
            tensor = torch.block_diag(*tensor.chunk(lora.qkv_parts))
        tensors[f"{_their_layer(layer)}.lora_{letter.upper()}.weight"] = tensor.contiguous()
    if rank:
        return
    # peft scales c_attn by its own rank: alpha grows with it, so that the scale stays
    parts = lora.qkv_parts if "attn.qkv" in lora.targets else 1
    grown = lora.alpha * (math.sqrt(parts) if lora.stabilised else parts)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.origin.base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _short(lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.stabilised,
        "target_modules": [THEIRS[name] for name in lora.targets],
        "rank_pattern": {"attn.c_attn": parts * lora.rank} if parts > 1 else {},
        "alpha_pattern": {"attn.c_attn": _short(grown)} if parts > 1 else {},
        "fan_in_fan_out": lora.targets != ("head",),  # transformers' Conv1D keeps its weights as (in, out)
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    metadata = {"format": "pt", "base_sha256": model.origin.base_sha256, "qkv_parts": str(parts)}

    def write(new: Path) -> None:
        (new / WEIGHTS).write_bytes(safetensors_bytes(tensors, metadata))  # what the library writes itself hides a full disk
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tokenizer.save(new)

    weights.write_folder(folder, CONFIG, "an adapter", write)


def _their_layer(name: str) -> str:
    """Our layer's name -> peft's for transformers' GPT-2."""
    *block, kind = ("", "head") if name == "head" else name.split(".", 2)
    return "base_model.model." + (f"transformer.h.{block[1]}." if block[0] else "") + THEIRS[kind]


def _short(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


# --- in -------------------------------------------------------------------------------------------------------------


def read(folder: str | Path) -> Adapter:
    """An adapter of ours or peft's for transformers' GPT-2. Raises UserError for what is missing, damaged, or no plain LoRA."""
    folder = Path(folder).expanduser()
    raw = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"no {WEIGHTS} in {folder}: save the adapter as safetensors")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no .safetensors file ({error}): copy it again") from None
    name = str(raw["base_model_name_or_path"])
    short = name.removeprefix("openai-community/")
    adapter = Adapter(folder, short if short in SIZES else name, metadata.get("base_sha256", ""), None)
    ours = {theirs: name for name, theirs in THEIRS.items()}
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = NAME.fullmatch(name)
        layer = ours.get(found[2]) if found else None
        if COPY.fullmatch(name):
            adapter.copies["wte.weight" if "wte" in name else "head.weight"] = tensor
        elif layer is None or (layer == "head") != (found[1] is None) or tensor.dim() != 2:
            raise UserError(f"{path}: tensor {name} is no LoRA of a linear layer of transformers' GPT-2")
        else:
            name = layer if layer == "head" else f"blocks.{found[1]}.{layer}"
            pairs.setdefault(name, {})[found[3]] = tensor.to(torch.float32, copy=True)
    if not pairs:
        raise UserError(f"{path}: no LoRA tensors in it")
    for layer, both in sorted(pairs.items()):
        if both.keys() != {"A", "B"} or len(both["A"]) != both["B"].shape[1]:
            raise UserError(f"{path}: A and B of {layer} do not belong together: copy it again")
        adapter.parts[layer] = _part(layer, both["A"], both["B"], raw, metadata, path)
    adapter.config = _uniform(adapter.parts, raw)
    return adapter


def _read_config(path: Path) -> dict:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type must be LORA: other adapters are not known here")
    if not isinstance(raw.get("base_model_name_or_path"), str) or not raw["base_model_name_or_path"]:
        raise UserError(f"{path}: base_model_name_or_path is missing: name the model that the adapter belongs to")
    if set_ := [name for name in BEYOND.split() if raw.get(name)]:
        raise UserError(f"{path}: {set_[0]} is set: only plain LoRA is computed here; merge it with peft and load the model")
    if raw.get("bias", "none") != "none":
        raise UserError(f"{path}: bias is {raw['bias']!r}: trained biases are not read; merge it with peft and load the model")
    # these begin with the base's own weights changed, and the adapter means those
    if (start := raw.get("init_lora_weights", True)) not in (True, False, "gaussian", "eva", "orthogonal"):
        raise UserError(f"{path}: init_lora_weights is {start!r}: save it converted to plain LoRA, or merge it with peft")
    for name, kind in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(raw.get(name), kind) or not 0 < raw[name] < math.inf:
            raise UserError(f"{path}: {name} is {raw.get(name)!r}, not a number above 0")
    for name in ("rank_pattern", "alpha_pattern"):
        try:
            good = all(value > 0 and re.compile(pattern) for pattern, value in (raw.get(name) or {}).items())
        except (AttributeError, TypeError, re.error):
            good = False
        if not good:
            raise UserError(f"{path}: {name} is {raw[name]!r}, not layers with a number above 0 each")
    return raw


def _part(layer: str, a: Tensor, b: Tensor, raw: dict, metadata: dict, path: Path) -> Part:
    """A layer's tensors with the scale that the config gives them; and q, k, v apart where the file says they were."""
    theirs = _their_layer(layer).removeprefix("base_model.model.")
    rank, alpha = (
        next((value for key, value in (raw.get(pattern) or {}).items() if re.match(rf"(.*\.)?({key})$", theirs)), raw[name])
        for pattern, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    if len(a) != rank:
        raise UserError(f"{path}: the adapter of {theirs} has rank {len(a)}, {CONFIG} says {rank}")
    scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
    parts = 3 if layer.endswith("qkv") and metadata.get("qkv_parts") == "3" and rank % 3 == 0 else 1
    if parts == 3:
        rows = [piece.chunk(3, 1) for piece in b.chunk(3)]
        blocks = torch.cat([row[i] for i, row in enumerate(rows)])
        if torch.equal(torch.block_diag(*blocks.chunk(3)), b):
            return Part(a, blocks, scale, 3)
    return Part(a, b, scale, 1)


def _uniform(parts: dict[str, Part], raw: dict) -> LoRAConfig | None:
    """The config that makes adapters of these shapes and scales, if there is one; `Adapter.check` asks for all blocks."""
    kinds = {kind: [p for name, p in parts.items() if name.endswith(kind)] for kind in LINEAR}
    targets = tuple(kind for kind in LINEAR if kinds[kind])
    config = LoRAConfig(
        rank=raw["r"],
        alpha=float(raw["lora_alpha"]),
        targets=targets,
        stabilised=bool(raw.get("use_rslora")),
        qkv_parts=max((p.parts for p in kinds["attn.qkv"]), default=3),
    )
    same = all(
        p.b.shape[1] == config.rank and math.isclose(p.scale, config.scale) and p.parts == (config.qkv_parts if q else 1)
        for name, p in parts.items()
        for q in [name.endswith("qkv")]
    )
    return config if same else None
