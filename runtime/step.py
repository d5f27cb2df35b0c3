"""One optimizer step, on a device for which the host does not wait.

A GPU works through what the host has asked for while the host goes on. So on CUDA the next step's batches are made in a thread,
and what a step found is read while the next one is under way. On a CPU it is read at once, before the weights are touched.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from base.errors import UserError
from data.batch import Batch, batches
from data.encode import Encoded
from data.plan import BatchPlan
from runtime import distributed

T = TypeVar("T")
Part = tuple[Tensor, list[Encoded]]  # a micro-batch's loss and its examples


class Step(NamedTuple):
    """The numbers of a step's examples, over all ranks; the examples; and this rank's micro-batches, on the host."""

    numbers: list[int]
    items: list[Encoded]
    batches: list[Batch]


def step_batches(plan: BatchPlan, items: list[Encoded], compute, begin: int, end: int) -> Iterator[Step]:
    """The steps `begin` to `end`."""

    def make(step: int) -> Step:
        numbers = plan.examples(step)
        place = {i: n for n, i in enumerate(numbers)}
        chosen = [items[i] for i in numbers]
        micros = [[[place[i] for i in row] for row in rows] for rows in plan[step][compute.rank]]
        return Step(numbers, chosen, list(batches(chosen, micros, plan.row_multiple)))

    return ahead(map(make, range(begin, end)), compute)


def ahead(values: Iterator[T], compute) -> Iterator[T]:
    """The same values; on CUDA each is made in a thread while the one before is in use."""
    if not compute.late:
        yield from values
        return
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, values, None)
        while (value := coming.result()) is not None:
            coming = thread.submit(next, values, None)
            yield value


def seed_dropout(seed: int, step: int, compute) -> None:
    """Make dropout's random numbers follow from seed, step and rank: a resumed run draws those of one never killed."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, compute.rank]).generate_state(1, np.uint64)[0] >> 1))


def forwards(model, given: list[Batch], compute) -> Iterator[tuple[Batch, Tensor]]:
    """This rank's micro-batches of a step, on the device, each with the log-probs of its completion tokens. The caller runs the
    backward pass before it asks for the next one; in that of the last one the gradients of all ranks are added up."""
    with compute.autocast(False):
        for n, batch in enumerate(given, start=1):
            batch = batch.to(compute.device)
            distributed.sync_gradients(model, n == len(given))
            with compute.autocast():
                logps = model(batch)
            yield batch, logps


def to_host(values: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the host. The function that comes back waits for it."""
    if values.device.type == "cpu":
        return lambda: values
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    ready = torch.cuda.current_stream(values.device).record_event()
    return lambda: (ready.synchronize(), copy)[1]


class Outcome:
    """What a step found, on its way to the host: after one exchange between the ranks, and before the weights are touched."""

    def __init__(self, parts: list[Part], grad_norm: Tensor, step: int, compute, stop: int = 0, sums: Tensor | None = None):
        """parts: of this rank's micro-batches. grad_norm: the global one, before clipping. stop: the number of the signal that
        this rank got. sums: (n,) float32, of which each rank has some and zeros for the rest."""
        self.parts, self.step, self.compute = parts, step, compute
        losses = torch.stack([loss.detach().double() for loss, _ in parts])
        told = [losses.sum().view(1), losses.new_zeros(compute.world), *([] if sums is None else [sums.double()])]
        told[1][compute.rank].fill_(stop)
        found = compute.total(torch.cat(told))
        self.found_inf = 1 - (found[0] + grad_norm).isfinite().float()
        self.values = to_host(torch.cat([grad_norm.double().view(1), found]))

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep a step that is not finite from the weights. On a CPU: UserError. On CUDA the optimizer does nothing
        (`optim.make`), and the error comes when the step is read."""
        if self.compute.late:
            optimizer.found_inf = self.found_inf
        else:
            self.read()

    def read(self) -> tuple[float, float, int, Tensor]:
        """Wait for it: the global loss and gradient norm, the largest signal that a rank got, and the global sums (n,).

        UserError, on every rank, naming the step and the examples, if loss or norm is not finite.
        """
        values = self.values()
        norm, loss, *stops = values[: 2 + self.compute.world].tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return loss, norm, int(max(stops)), values[2 + self.compute.world :].float()
        whole = math.isfinite(loss)  # the norm alone: it may be any of the step's examples
        guilty = [items for part, items in self.parts if whole or not math.isfinite(part.item())]
        found = sorted({item.number for rank in self.compute.gather(guilty) for items in rank for item in items})
        numbers = ", ".join(map(str, found[:20])) + (", …" if len(found) > 20 else "")
        what = f"gradient norm is {norm}" if whole else f"loss is {loss}"
        raise UserError(
            f"the {what} at step {self.step + 1}, in the micro-batch with examples {numbers} (numbered from 0 in the "
            "data): the weights were not touched; look at those examples, lower lr, or set grad_clip"
        )
