"""What a stage starts from: its model, its data, and the plan of which examples each step takes."""

from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

import torch

import adapters
import weights
from base.errors import UserError, warn
from data import RECIPES, is_local
from data.encode import Encoded, column, load_encoded
from data.plan import BatchPlan
from data.tokenizer import Tokenizer, choose
from generate import free_memory
from logprobs import LanguageModel, has_triton
from lora import add_lora, initial_lora
from losses import UNPAIRED
from runtime import config, distributed, optim, reference
from runtime.keys import SCRATCH, ChatKeys, DataKeys, ModelKeys, TrainKeys

MICRO_TOKENS = (1024, 2048, 4096, 8192, 16384)  # what `micro_tokens 0` chooses from


def written(cfg) -> dict:
    """The settings of the run that is in `out_dir`, if there is one."""
    return config.written(cfg) if hasattr(cfg, "out_dir") else {}


def build_tokenizer(cfg: ChatKeys, init_from: str, compute) -> Tokenizer:
    """The tokenizer of `init_from`, or the key's, with the chat template that the keys ask for. Where that writes the day's
    date, `cfg.date` is set: a resumed run goes on with its own day, and a reference is used with the day that it was made."""
    tokenizer, text = choose(cfg.tokenizer, init_from), None
    if cfg.chat_template:
        try:
            text = Path(cfg.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"key chat_template: {cfg.chat_template} cannot be read as text ({error}): name another") from None
    if not cfg.date and "strftime_now" in (text or (tokenizer.chat.text if tokenizer.chat else "")):
        cfg.date = compute.once(lambda: _date(cfg))
    settings = {"kwargs": cfg.chat_template_kwargs, "date": cfg.date, "on_mismatch": getattr(cfg, "on_mismatch", "error")}
    return tokenizer.with_chat(text, **settings)


def _date(cfg: ChatKeys) -> str:
    before = written(cfg).get("date", "")
    if not before and getattr(cfg, "ref", "") not in ("", reference.AUTO):
        before = reference.read(cfg.ref)[1].get("date", "")
    return before or date.today().isoformat()


def source_options(cfg: ModelKeys, tokenizer) -> dict:
    """What `weights.source` wants to know beside `init_from`."""
    given = {name: getattr(cfg, name, 0) for name in ("dropout", "seed")}
    return {name: getattr(cfg, name) for name in SCRATCH} | given | {"vocab_size": tokenizer.size}


def build_model(cfg: ModelKeys, tokenizer, compute, keep_start: bool = False) -> LanguageModel:
    """The model that `init_from` names, in float32 on this process's device: for training (TrainKeys) sharded over all
    processes, else whole on each. Rank 0 reads the weights. UserError if the tokenizer has more ids than the model.

    With `lora_rank` the weights are frozen, in the compute dtype, with adapters beside them: new ones, or, where `init_from` is
    an adapter, that one; `keep_start` then keeps a copy of it as it starts, for `lora.as_started`. Without `lora_rank` an
    adapter is merged into its base.
    """
    training = isinstance(cfg, TrainKeys)
    with_lora = training and cfg.lora_rank > 0

    def find() -> tuple[weights.Source, adapters.LoRAConfig | None]:
        found = adapters.source(cfg.init_from, merge=not with_lora, **source_options(cfg, tokenizer))
        if tokenizer.size > found.config.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer.name} has {tokenizer.size} ids, the model of {cfg.init_from} only "
                f"{found.config.vocab_size}: give the --tokenizer that it was trained with"
            )
        return found, adapters.lora_config(cfg, found) if with_lora else None

    found, lora = compute.once(find)
    model = weights.empty(found.config)
    tensors = [found.tensors]
    if lora:
        add_lora(model, lora, compute.dtype, keep_start and found.adapter is not None)
        tensors.append(found.adapter.initial(keep_start) if found.adapter else initial_lora(model, cfg.seed))
    if training:
        model.recompute = cfg.activation_checkpointing
        if cfg.compile == "true" or (cfg.compile == "auto" and compute.device.type == "cuda" and has_triton()):
            compile_blocks(model)
        distributed.shard(model, compute, cfg.replicate, optim.memory(model, cfg.optimizer))
    check_memory(cfg, model, compute)
    # on other ranks than 0 there are no tensors: `fill` sends them
    distributed.fill(model, (pair for part in tensors for pair in part), compute)
    model.origin = compute.once(found.origin)  # only now: the fingerprint was made while the weights were read
    if getattr(cfg, "micro_tokens", 1) == 0:
        before = {} if getattr(cfg, "overwrite", False) else compute.once(lambda: written(cfg))
        cfg.micro_tokens = before.get("micro_tokens") or fitting_tokens(cfg, model, compute)
        print(f"micro_tokens: {cfg.micro_tokens}")
    return model


def compile_blocks(model: LanguageModel, backend: str = "inductor") -> None:
    """Compile each block in one piece, for rows of any length: one compilation serves all blocks, checkpointed or not.

    Call it before the model is sharded, so that gathering stays outside. What a block is compiled for includes the mode,
    whether gradients are wanted and of what, and the kind of attention: more combinations than the 8 that torch allows.
    """
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=True, fullgraph=True, backend=backend)


def fitting_tokens(cfg: ModelKeys, model: LanguageModel, compute) -> int:
    """The largest of `MICRO_TOKENS` with which a micro-batch, all of it predicted, takes at most 9/10 of the memory that is
    free on each process's GPU. On a CPU 4096: more is no faster there."""
    if compute.device.type == "cpu":
        return 4096
    optimizer = getattr(cfg, "optimizer", "")
    free = 0.9 * min(compute.gather(free_memory(compute.device))) - (optim.memory(model, optimizer) - optim.memory(model))
    how = {"bfloat16": compute.dtype == torch.bfloat16, "processes": compute.world, "card": compute.memory}
    needed = {n: sum(optim.forward_memory(model, n, n, **how).values()) for n in MICRO_TOKENS}
    return max((n for n in MICRO_TOKENS if needed[n] <= free), default=min(MICRO_TOKENS))


def check_memory(cfg: ModelKeys, model: LanguageModel, compute) -> None:
    """UserError if this process's part of a model, with its gradients and optimizer, cannot fit into the device's memory."""
    needed = optim.memory(model, getattr(cfg, "optimizer", ""))
    if needed > compute.memory:
        raise UserError(
            f"init_from {cfg.init_from}: the model and what training keeps of it take {needed / 1e9:,.1f} GB on each process, "
            f"{compute.device} has {compute.memory / 1e9:,.1f} GB: take a smaller model, or more processes"
        )


def load_data(cfg: DataKeys, view: str, tokenizer, model, compute) -> tuple[Sequence[Encoded], Sequence[Encoded], int]:
    """The training and the validation examples (none where a file has none), and the most tokens that one may have."""
    block_size = model.config.block_size
    if cfg.max_len > block_size:
        raise UserError(f"key max_len: {cfg.max_len} is more than the model's context of {block_size} tokens")
    max_len = cfg.max_len or block_size

    def load(source: str, split: str, limit: int, half: tuple[str, float] | None = None) -> Sequence[Encoded]:
        how = {"data_dir": cfg.data_dir, "columns": cfg.columns, "limit": limit, "min_gap": cfg.min_gap, "half": half}
        how |= {"unpaired": view == "preference", "end": cfg.add_eos}
        return share(lambda: load_encoded(source, split, view, tokenizer, max_len, cfg.truncation, **how), compute)

    if cfg.val_share:
        if other := "val_data" if cfg.val_data else "val_split" if cfg.val_split else "":
            raise UserError(f"key val_share: {cfg.val_share}, but {other} names validation data already: give one of the two")
        limits = {"train": cfg.limit, "val": cfg.val_limit}
        return *(load(cfg.data, cfg.split, limit, (half, cfg.val_share)) for half, limit in limits.items()), max_len
    val_source = cfg.val_data or (cfg.data if cfg.data in RECIPES or cfg.val_split else "")
    if val_source == cfg.data and is_local(cfg.data) and not cfg.val_data:
        raise UserError(
            f"key val_split: the file {cfg.data} has no splits: name validation data with --val_data, or --val_share"
        )
    train = load(cfg.data, cfg.split, cfg.limit)
    return train, load(val_source, cfg.val_split or "val", cfg.val_limit) if val_source else [], max_len


def check_labels(cfg: TrainKeys, train: Sequence[Encoded], val: Sequence[Encoded]) -> None:
    """UserError unless loss and data are both for pairs or both unpaired, with labels of either kind. Warns where one of the
    two outweighs the other."""
    unpaired = cfg.loss in UNPAIRED
    for name, items in (("data", train), ("val_data", val)):
        if items and (column(items, "label")[0] in (None, -1)) == unpaired:
            kind, takes = ("pairs", "unpaired lines, each with a label") if unpaired else ("unpaired lines", "pairs")
            raise UserError(f"key {name}: it holds {kind}, and loss {cfg.loss} takes {takes}: give others, or another loss")
    if not unpaired:
        return
    yes = int(sum(column(train, "label")))
    no = len(train) - yes
    if not yes or not no:
        raise UserError(
            f"key data: all {len(train):,} labels are {'true' if yes else 'false'}: loss {cfg.loss} needs both kinds"
        )
    true, false = cfg.desirable_weight * yes, cfg.undesirable_weight * no
    said = f"labels: {yes:,} true, {no:,} false; times their weights {true:,.6g} to {false:,.6g}"
    if 0.9 * false <= true <= 1.5 * false:
        print(said)
    else:
        warn(f"{said}: KTO's paper advises 1 to 1.33 times as much of true: --desirable_weight {false / yes:.3g}, for example")


def share(load: Callable[[], Sequence[Encoded]], compute) -> Sequence[Encoded]:
    """What `load` gives on rank 0, on every rank. Tokens in the cache are not sent, each rank maps their file; unless a machine
    does not see the file."""
    items = compute.once(load)
    seen = all(compute.gather(items is not None))
    return items if seen else compute.once(lambda: list(items))


def batch_plan(cfg: TrainKeys, items: list[Encoded], compute, per_group: int = 0) -> BatchPlan:
    multiple = compute.row_multiple(cfg.micro_tokens)
    return BatchPlan(
        items,
        cfg.batch_size,
        cfg.seed,
        row_len=multiple if multiple > 1 else cfg.row_len,
        micro_tokens=cfg.micro_tokens,
        row_multiple=multiple,
        world=compute.world,
        per_group=per_group,
        shuffle=cfg.shuffle,
    )
