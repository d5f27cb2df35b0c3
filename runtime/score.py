"""The question that every stage asks: the log-probability of completions after their prompts, without gradients.

And completions that the model writes itself, to ask it about them."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from base.progress import Progress
from data.batch import Batch, batches
from data.encode import Encoded
from data.plan import plan_once
from generate import stream
from losses import completion_sums
from runtime.step import ahead


def score(model, items: list[Encoded], compute, micro_tokens: int, name: str = "") -> list[Tensor]:
    """log p(completion | prompt) in nats of every item's completions: a float32 CPU tensor (k,) an item, in the items' order.

    The work is shared by all ranks, each prompt goes through the model once, and every rank gets all results.
    name: what a line of progress calls the work; "" = no progress.
    """
    found = measured(model, items, compute, micro_tokens, name)
    return list(found.cpu().split([len(item.completions) for item in items]))


def measured(model, items: list[Encoded], compute, micro_tokens: int, name: str = "") -> Tensor:
    """What `score` gives as one tensor on the device, (completions,). On CUDA it may still be under way."""
    was_training, multiple = model.training, compute.row_multiple(micro_tokens)
    model.eval()
    micros = plan_once(items, micro_tokens, multiple, compute.world)[compute.rank]
    tokens = sum(items[i].row_tokens for rows in micros for row in rows for i in row)
    progress = Progress(name, tokens if name else 0, "tok", compute.rank)
    found = completion_logps(model, ahead(batches(items, micros, multiple), compute), items, compute, progress)
    progress.close()
    model.train(was_training)
    return found


@torch.no_grad()
def completion_logps(model, given: Iterable[Batch], items: list[Encoded], compute, progress: Progress | None = None) -> Tensor:
    """The same, of batches that are made already. given: this rank's share of the items, by `data.batch.batches`. The model
    keeps its mode, dropout included."""
    out = torch.zeros(sum(len(item.completions) for item in items), device=compute.device)
    with compute.autocast(False):
        for batch in given:
            batch = batch.to(compute.device)
            with compute.autocast():
                logps = model(batch)
            out[batch.at] = completion_sums(logps, batch.completion, batch.n_completions)
            if progress:
                progress.add(sum(item.row_tokens for item in batch.items))
    return compute.total(out)


def written(
    model,
    prompts: list[list[int]],
    tokenizer,
    compute,
    *,
    n: int,
    max_new_tokens: int,
    end: int,
    seed: int,
    batch_size=64,
    shared=True,
) -> list[Encoded]:
    """n completions of every prompt by the model at temperature 1, up to the token `end`, which stands behind each that ended.
    Every rank gets all of them. shared: each rank writes a part; where a model is sharded all must write all, in step, and
    those of rank 0 count."""
    mine = {i: ids for i, ids in enumerate(prompts) if not shared or i % compute.world == compute.rank}
    found: dict[int, list] = {i: [None] * n for i in mine}
    how = {"n": n, "n_ids": tokenizer.size, "batch_size": batch_size, "temperature": 1.0, "seed": seed}
    with compute.autocast(), torch.inference_mode():
        for i, j, ids in stream(model, mine, max_new_tokens, end, **how):
            ended = [end] if len(ids) < max_new_tokens else []
            found[i][j] = np.array(ids + ended, np.int32)
    if shared:
        found = {i: texts for part in compute.gather(found) for i, texts in part.items()}
    else:
        found = compute.once(lambda: found)
    return [Encoded(np.array(prompt, np.int32), found[i], i, i) for i, prompt in enumerate(prompts)]


def texts_of(item: Encoded, tokenizer, end: int) -> list[str]:
    """An item's completions as text, without the token that ends them."""
    return [tokenizer.decode(ids[ids != end].tolist()) for ids in item.completions]
