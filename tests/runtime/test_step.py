"""A step for which the host does not wait: what it reads, and what it keeps from the weights."""

import itertools
import sys
from collections import Counter

import pytest
import torch

import dpo
import logprobs
import sft
from bench import pretended
from runtime import optim
from runtime.distributed import Compute
from runtime.keys import TrainKeys
from runtime.run import Run
from tests import tiny
from tests.conftest import contents, metrics

STAGES = {"sft": sft, "dpo": dpo}
LORA = {"lora_rank": 2, "ref": ""}
BARE = {"eval_every": 0, "samples": 0, "save_every": 0}


def mask(example, branch):
    """What `attention_mask` makes on a CPU; FlexAttention's is made by torch in a way that the pretended GPU miscounts."""
    at = torch.arange(example.shape[1], device=example.device)
    row = torch.arange(len(example), device=example.device).view(-1, 1, 1)
    allowed = logprobs.may_attend(example, branch, row, at[:, None], at[None, :]).unsqueeze(1)
    return torch.where(allowed, 0.0, -torch.inf)


@pytest.fixture
def waits(stage, tmp_path, monkeypatch):
    """waits("sft", key=…) trains on a pretended GPU -> what the host waited for in a step, and forwards in it."""

    def run(name: str, **keys) -> tuple[Counter, int]:
        found, step_done = [], Run.step_done

        def watched(self, *given):
            step_done(self, *given)
            found.append(seen.copy())

        monkeypatch.setattr(Run, "step_done", watched)
        monkeypatch.setattr(logprobs, "attention_mask", mask)
        more = {"max_steps": 4, "micro_tokens": 128, "device": "cuda:0", "dtype": "bfloat16", **BARE, **keys}
        script, args = stage(name, tmp_path / "run", **more)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *args])
        with pretended.gpu() as seen:
            assert not STAGES[script].main()
        steps = [later.since(before) for before, later in itertools.pairwise(found[:-1])]
        assert len(steps) == 2 and steps[0].syncs == steps[1].syncs
        return +steps[1].syncs, steps[1].kernels["embedding"]

    return run


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")
@pytest.mark.parametrize(
    ("name", "keys"),
    [("sft", {"optimizer": "rmsprop", "weight_decay": 0.1}), ("sigmoid", {}), ("aot", {"dropout": 0.1}), ("sigmoid", LORA)],
)
def test_a_step_waits_for_nothing_but_the_step_before(waits, name, keys):
    """`an event`: copies of the step before, which are there already: its loss, and of DPO the reference's log-probs."""
    found, embedded = waits(name, **keys)
    assert found == {"an event": 1 if name == "sft" else 2}
    assert embedded >= 4, "several micro-batches"


@pytest.mark.parametrize("name", [pytest.param("sft", marks=pytest.mark.slow), "aot"])
def test_a_late_reading_changes_nothing(name, stage, tmp_path, monkeypatch):
    """The same records and weights, to the bit, where batches are made in a thread and steps are read late."""
    found = []
    for late in (False, True):
        monkeypatch.setattr(Compute, "late", late)
        script, args = stage(name, tmp_path / str(late), max_steps=5, eval_every=4, samples=0, micro_tokens=300)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *args])
        assert not STAGES[script].main()
        found.append((metrics(tmp_path / str(late)), contents(tmp_path / str(late) / "model")))
    assert found[0] == found[1]


def test_a_step_that_is_not_finite_read_late(stage, tmp_path, monkeypatch, refused):
    """The error names the step that it was, the weights are those before it, and nothing is saved."""
    backward, models = sft.backward, []

    def spoiled(model, given, predicted, compute):
        parts = backward(model, given, predicted, compute)
        models.append([p.detach().clone() for p in model.parameters()])
        if len(models) == 2:
            model.wte.weight.grad[3] = float("nan")
        return parts

    monkeypatch.setattr(Compute, "late", True)
    monkeypatch.setattr(sft, "backward", spoiled)
    refused("sft", *stage("sft", tmp_path / "run", **BARE)[1], says="the gradient norm is nan at step 2, in the micro-batch")
    before, later = models[1], models[2]
    assert all(torch.equal(a, b) for a, b in zip(before, later, strict=True)), "the third step began where the second did"
    assert not list((tmp_path / "run").glob("checkpoints/*")) and len(metrics(tmp_path / "run")) == 1


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_found_inf_keeps_a_step_from_the_weights(name):
    """And where it is 0 the step is the same as without it, to the bit."""
    cfg = TrainKeys(data="x", out_dir="x", optimizer=name, weight_decay=0.1, lr=0.1)
    weights = []
    for found_inf, grad in ((None, 1.0), (0.0, 1.0), (1.0, float("nan"))):
        model = tiny.gpt()
        optimizer = optim.make(model, cfg)
        for last, value in ((False, 0.5), (True, grad)):
            for p in model.parameters():
                p.grad = torch.full_like(p, value)
            before = [p.detach().clone() for p in model.parameters()]
            if found_inf is not None:
                optimizer.found_inf = torch.tensor(found_inf if last else 0.0)
            optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    plain, finite, kept = weights
    assert all(map(torch.equal, plain, finite)) and all(map(torch.equal, before, kept))
    assert not any(map(torch.equal, plain, kept))
