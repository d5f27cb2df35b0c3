"""The question that every stage asks: the log-probability of completions after their prompts, without gradients."""

import torch
from torch import Tensor

from base.progress import Progress
from data.batch import collate
from data.encode import Encoded
from data.plan import Rows, plan_once
from losses import completion_sums


@torch.no_grad()
def score(
    model, items: list[Encoded], compute, micro_tokens: int, name: str = "", micros: list[Rows] | None = None
) -> list[Tensor]:
    """log p(completion | prompt) in nats of every item's completions: a float32 CPU tensor (k,) an item, in the items' order.

    The work is shared by all ranks, each prompt goes through the model once, and every rank gets all results.
    name: what a line of progress calls the work; "" = no progress.
    micros: this rank's share, laid out already ([micro-batch][row][item]). Then the model keeps its mode, dropout included;
    only dpo.batch_gradient wants that.
    """
    was_training = model.training
    if micros is None:
        model.eval()
        micros = plan_once(items, micro_tokens, compute.spare_padding, compute.world)[compute.rank]
    counts = [len(item.completions) for item in items]
    out = torch.zeros(sum(counts))
    views = out.split(counts)  # what is written into them stands in `out`
    tokens = sum(items[i].row_tokens for rows in micros for row in rows for i in row)
    progress = Progress(name, tokens if name else 0, "tok", compute.rank)
    for rows in micros:
        numbers = [i for row in rows for i in row]
        batch = collate([[items[i] for i in row] for row in rows], compute.row_multiple).to(compute.device)
        with compute.autocast():
            logps = model(batch)
        sums = completion_sums(logps, batch.completion, batch.n_completions).cpu()
        for i, part in zip(numbers, sums.split([counts[i] for i in numbers]), strict=True):
            views[i].copy_(part)
        progress.add(sum(items[i].row_tokens for i in numbers))
    progress.close()
    model.train(was_training)
    return list(compute.total(out).split(counts))
