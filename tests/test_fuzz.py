"""Random runs of sft.py and dpo.py against a plain reference in float64 that shares no code with the project.

    .venv/bin/python -m pytest -q -s tests/test_fuzz.py --fuzz 1000

A case is data, settings and a number of processes. The stage's own `main` runs it. The reference (Run, below) has its own
GPT-2, one plain sequence a completion, the losses as their papers write them, LoRA, the optimizers, clipping and schedules.
Loss, rewards, log-probs, gradient norm of every step and the weights at the end must agree.

How far they may differ is worked out for every number, in roundings of float32 (2^-24):

    a completion's log-prob     SUM of its size, and of 4 times the root of its length
    a loss, a reward            what that makes of it
    a tensor's gradient         GRAD of its largest entry in each completion's gradient, times the loss's derivative; and 1 of
                                the largest of all tensors, for what is 0 but for rounding (the bias of the keys)
    a weight                    what the gradient's tolerance makes of every update. adamw and rmsprop divide by the gradient's
                                own size: an entry that is smaller than its rounding takes a step of either sign
    all of these                and CARRIED times what becomes, beyond that, of a second reference whose weights are off by one
                                rounding, and whose updates by the tolerance above

Where rounding decides what comes next (a kink or a tie within it, or a run that blows up), a case is compared up to there, and
counted. docs/results.md has what came of 1,000 cases.
"""

import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import sys
import tempfile
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import logprobs
from data.toy import VOCAB
from tests.conftest import flags, free_port, metrics, script

hypothesis = pytest.importorskip("hypothesis")

CASES = 68  # in `make test`, the same every time; --fuzz N draws N others
SUM, GRAD, CARRIED = 16, 16, 4
EPS = 2.0**-24
EOT, WORDS = len(VOCAB), range(10, len(VOCAB))  # ids; WORDS begin with a space
BLOCK = 64
SIZES = [(1, 1, 8, True), (2, 2, 16, True), (2, 2, 12, False)]  # layers, heads, width, tied
LAYERS = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
LOSSES = """sigmoid robust ipo hinge simpo dpop sigmoid_norm exo_pair nca_pair bco_pair sppo_hard apo_zero apo_down discopop aot
            aot_unpaired cpo orpo""".split()
REFERENCE_FREE = ("simpo", "cpo", "orpo")
STAGES = ["sft", *LOSSES]


class Undecided(Exception):
    """Rounding decides what comes next: a kink or a tie lies within it, or the run blows up."""


# --- the reference: a model -------------------------------------------------------------------------------------------


def random_weights(size: int, seed: int) -> dict[str, torch.Tensor]:
    """A GPT-2 of SIZES[size] under transformers' names, float32. No value is 0 or 1: those would hide mistakes."""
    layers, _, d, tied = SIZES[size]
    shapes = {"wte.weight": (EOT + 1, d), "wpe.weight": (BLOCK, d), "ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(layers):
        for name, (n_in, n_out) in {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, 4 * d),
                                    "mlp.c_proj": (4 * d, d)}.items():  # fmt: skip
            shapes |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
        shapes |= {f"h.{i}.ln_{n}.{what}": (d,) for n in (1, 2) for what in ("weight", "bias")}
    g = torch.Generator().manual_seed(seed)
    w = {f"transformer.{n}": 0.2 * torch.randn(s, generator=g) + ("ln" in n and "weight" in n) for n, s in shapes.items()}
    return w if tied else w | {"lm_head.weight": 0.2 * torch.randn((EOT + 1, d), generator=g)}


def write_base(folder: Path, size: int, seed: int) -> dict[str, torch.Tensor]:
    layers, heads, d, tied = SIZES[size]
    config = {"model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": d, "n_positions": BLOCK,
              "vocab_size": EOT + 1, "tie_word_embeddings": tied}  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(w := random_weights(size, seed), folder / "model.safetensors")
    return w


def norm(x, w, b):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w + b


def sequence_logps(w: dict, heads: int, adapters: dict, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log p of each token of a completion. adapters: layer -> (A, B, scale, parts)."""
    ids = torch.tensor(prompt + completion[:-1])

    def linear(x, layer, y):
        if layer in adapters:
            a, b, scale, parts = adapters[layer]
            pieces = zip(a.chunk(parts), b.chunk(parts), strict=True)
            y = y + scale * torch.cat([x @ part_a.T @ part_b.T for part_a, part_b in pieces], -1)
        return y

    def conv(x, name):
        return linear(x, name, x @ w[f"{name}.weight"] + w[f"{name}.bias"])

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    hidden = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    for i in range(len([name for name in w if name.endswith("ln_1.bias")])):
        h = f"transformer.h.{i}"
        q, k, v = conv(norm(x, w[f"{h}.ln_1.weight"], w[f"{h}.ln_1.bias"]), f"{h}.attn.c_attn").chunk(3, -1)
        mixed = []
        for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
            scores = (qh @ kh.T / math.sqrt(qh.shape[-1])).masked_fill(hidden, -math.inf)
            mixed.append(scores.softmax(-1) @ vh)
        x = x + conv(torch.cat(mixed, -1), f"{h}.attn.c_proj")
        u = conv(norm(x, w[f"{h}.ln_2.weight"], w[f"{h}.ln_2.bias"]), f"{h}.mlp.c_fc")
        gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x = x + conv(gelu, f"{h}.mlp.c_proj")
    x = norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"])[len(prompt) - 1 :]
    logits = linear(x, "lm_head", x @ w.get("lm_head.weight", w["transformer.wte.weight"]).T)
    return logits.log_softmax(-1)[range(len(completion)), completion]


# --- the reference: losses, as the papers write them --------------------------------------------------------------------


def pair_losses(kind: str, c, r, ref_c, ref_r, n_c, n_r, o) -> torch.Tensor:
    """c, r: log pi of the chosen and the rejected completions; n_c, n_r: their lengths. -> (pairs,)"""
    beta, e = o["beta"], o.get("label_smoothing", 0.0)
    a, b = c - ref_c, r - ref_r
    z = beta * (a - b)

    def bad(x):  # -log sigmoid(x)
        return torch.logaddexp(-x, torch.zeros_like(x))

    def smooth(x):
        return (1 - e) * bad(x) + e * bad(-x)

    def log_odds(logp):  # of the probability per token
        return logp - torch.log(1 - torch.exp(logp))

    p, m = torch.sigmoid(z), torch.sigmoid(z / o.get("discopop_tau", 0.05))
    return {
        "sigmoid": lambda: smooth(z),
        "robust": lambda: ((1 - e) * bad(z) - e * bad(-z)) / (1 - 2 * e),
        "ipo": lambda: (a / n_c - b / n_r - 1 / (2 * beta)) ** 2,
        "hinge": lambda: torch.where(z < 1, 1 - z, 0.0),
        "simpo": lambda: bad(beta * c / n_c - beta * r / n_r - o.get("simpo_gamma", 0.5)),
        "dpop": lambda: bad(beta * (a - b - o.get("dpop_lambda", 50.0) * torch.where(a < 0, -a, 0.0))),
        "sigmoid_norm": lambda: bad(beta * a / n_c - beta * b / n_r),
        "exo_pair": lambda: p * (-bad(z) - math.log(1 - e)) + (1 - p) * (-bad(-z) - math.log(e)),
        "nca_pair": lambda: bad(beta * a) + (bad(-beta * a) + bad(-beta * b)) / 2,
        "bco_pair": lambda: bad(beta * a) + bad(-beta * b),
        "sppo_hard": lambda: (a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - torch.sigmoid(beta * a) + torch.sigmoid(beta * b),
        "apo_down": lambda: torch.sigmoid(beta * a) + 1 - torch.sigmoid(z),
        "discopop": lambda: (1 - m) * bad(z) + m * torch.exp(-z),
        "cpo": lambda: smooth(beta * (c - r)),
        "orpo": lambda: beta * bad(log_odds(c / n_c) - log_odds(r / n_r)),
        "aot": lambda: smooth(beta * (torch.sort(c - r)[0] - torch.sort(ref_c - ref_r)[0])),
        "aot_unpaired": lambda: smooth(beta * (torch.sort(a)[0] - torch.sort(b)[0])),
    }[kind]()


# --- the reference: data ------------------------------------------------------------------------------------------------


def text(ids: list[int]) -> str:
    return "".join(VOCAB[i] for i in ids)


def line_of(record: tuple) -> dict:
    """A record, ("pair", prompt, chosen, rejected) or ("swag", context, endings, label) in ids, as a line of the file."""
    if record[0] == "pair":
        return dict(zip(("prompt", "chosen", "rejected"), map(text, record[1:]), strict=True))
    _, context, endings, label = record
    return {"ctx": "Today" + text(context), "endings": [text(e).strip() for e in endings], "label": label}


def examples_of(records: list[tuple], case: dict) -> list[tuple]:
    """(prompt, completions, group) in ids, in the file's order, after what max_len leaves of them."""
    found, ids = [], {word: i for i, word in enumerate(VOCAB)}
    max_len, sft = case["settings"].get("max_len") or BLOCK, case["stage"] == "sft"
    for n, record in enumerate(records):
        if record[0] == "pair":
            prompt, *pairs = record[1], (record[2], record[3])
        else:
            _, context, endings, label = record
            prompt = [ids["Today"], *context, ids["\n"]]
            for letter, ending in zip("ABCD", endings, strict=True):
                prompt += [ids[letter], ids[")"], *ending, ids["\n"]]
            prompt += [ids["Answer"], ids[":"]]
            pairs = [(endings[label], e) for i, e in enumerate(endings) if i != label]
        for pair in pairs[:1] if sft else pairs:
            completions = [[*c, EOT] for c in (pair[:1] if sft else pair)]
            if not sft and completions[0] == completions[1]:
                continue
            over = max(0, len(prompt or [EOT]) + max(map(len, completions)) - max_len)
            if not over or case["settings"]["truncation"] == "left":
                found.append(((prompt or [EOT])[over:], completions, n))
    return found


def steps_of(examples: list[tuple], case: dict) -> list[list[int]]:
    """Which examples each step takes."""
    s, per_group = case["settings"], case["settings"].get("pairs_per_example", 0)

    def epoch(number: int) -> list[int]:
        order = list(range(len(examples)))
        if s["shuffle"]:
            order = np.random.default_rng([s["seed"], number]).permutation(len(examples)).tolist()
        drawn = [i for n, i in enumerate(order) if [examples[j][2] for j in order[:n]].count(examples[i][2]) < per_group]
        return drawn if per_group else order

    size = s["batch_size"]
    an_epoch = math.ceil(len(epoch(0)) / size)
    steps = s.get("max_steps") or math.ceil(Fraction(str(s["epochs"])) * an_epoch)
    return [epoch(n // an_epoch)[n % an_epoch * size :][:size] for n in range(steps)]


# --- the reference: training --------------------------------------------------------------------------------------------


class Run:
    """A case's training in float64. `trained`: name -> tensor; `slack`: how far float32 may end up from it, entry by entry."""

    def __init__(self, case: dict, weights: dict, adapters: dict, reference: dict | None, jitter: bool = False):
        """jitter: the weights are off by a rounding, and every update by what rounding may do to it. What comes of that shows
        how far it can carry."""
        self.signs = torch.Generator().manual_seed(0) if jitter else None
        self.case, self.s, self.heads = case, case["settings"], SIZES[case["size"]][1]

        def exact(t):
            return t.double() * (1 + EPS * self.sign_of(t)) if jitter else t.double()

        self.w = {name: exact(t) for name, t in weights.items()}
        self.adapters = {layer: (exact(a), exact(b), *how) for layer, (a, b, *how) in adapters.items()}
        self.trained = {f"{layer}.{x}": t for layer, (a, b, *_) in self.adapters.items() for x, t in (("A", a), ("B", b))}
        self.trained = self.trained or self.w
        for t in self.trained.values():
            t.requires_grad_()
        self.slack = {name: torch.zeros_like(t) for name, t in self.trained.items()}
        self.state = {name: [torch.zeros_like(t), torch.zeros_like(t)] for name, t in self.trained.items()}
        other = {name: t.double() for name, t in (reference or {}).items()}
        start = {layer: (a.detach().clone(), b.detach().clone(), *how) for layer, (a, b, *how) in self.adapters.items()}
        self.reference = (other, {}) if other else ({name: t.detach().clone() for name, t in self.w.items()}, start)
        self.worst = dict.fromkeys(self.trained, 0.0)  # the largest rounding of a gradient so far

    def sign_of(self, t: torch.Tensor) -> torch.Tensor:
        """1 or -1 for every entry."""
        return 2.0 * torch.randint(2, t.shape, generator=self.signs) - 1

    def logp(self, prompt, completion, weights=None, adapters=None):
        pair = (self.w, self.adapters) if weights is None else (weights, adapters)
        return sequence_logps(pair[0], self.heads, pair[1], prompt, completion).sum()

    def objective(self, sums, ref, lengths):
        if self.case["stage"] == "sft":
            return -sums.sum() / lengths.sum()
        columns = (*sums.view(-1, 2).T, *ref.view(-1, 2).T, *lengths.view(-1, 2).T)
        loss = pair_losses(self.case["stage"], *columns, self.s).mean()
        return loss - self.s.get("sft_weight", 0.0) * columns[0].sum() / columns[4].sum()

    def by_sums(self, sums, ref, lengths) -> tuple[float, torch.Tensor]:
        """The loss, and its derivative by every log-prob."""
        sums = sums.detach().requires_grad_()
        loss = self.objective(sums, ref, lengths)
        return loss.item(), torch.autograd.grad(loss, sums)[0]

    def step(self, number: int, steps: int, examples: list[tuple]) -> dict[str, tuple[float, float]]:
        """One update; what is reported of it, each number with its tolerance."""
        flat = [(prompt, c) for prompt, completions, _ in examples for c in completions]
        lengths = torch.tensor([float(len(c)) for _, c in flat], dtype=torch.double)
        logps = [self.logp(*one) for one in flat]
        sums, ref = torch.stack(logps).detach(), torch.zeros(len(flat), dtype=torch.double)
        if self.case["stage"] not in ("sft", *REFERENCE_FREE):
            with torch.no_grad():
                ref = torch.stack([self.logp(*one, *self.reference) for one in flat])
        known = SUM * EPS * (sums.abs() + ref.abs() + 4 * lengths.sqrt())  # what float32 knows of a log-prob or log-ratio
        loss, by_sum = self.by_sums(sums, ref, lengths)

        # how much the derivative changes where every log-prob is off by as much as float32 may be
        off, unsure = known * torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.double).repeat(len(flat))[: len(flat)], 0.0
        for way in (off, -off):
            if self.case["stage"] == "dpop":  # at its start, on the side of 0 that exact numbers and losses.dpop are on
                way = torch.where(sums == ref, way.abs(), way)
            unsure += (self.by_sums(sums + way, ref, lengths)[1] - by_sum).abs()
        self.refuse_kinks(sums, ref, lengths, unsure, by_sum)

        gradients = [torch.autograd.grad(one, list(self.trained.values()), allow_unused=True) for one in logps]
        gradient, noise = {}, {}
        for n, (name, p) in enumerate(self.trained.items()):
            parts = [torch.zeros_like(p) if g[n] is None else g[n] for g in gradients]
            gradient[name] = sum(x * g for x, g in zip(by_sum, parts, strict=True))
            largest = torch.stack([g.abs().max() for g in parts])
            noise[name] = (largest * (GRAD * EPS * by_sum.abs() + unsure)).sum().item()
        floor = max(noise.values()) / GRAD  # what comes out as 0 is made of numbers of that size
        size = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
        off_by = math.sqrt(sum(g.numel() * (noise[name] + floor) ** 2 for name, g in gradient.items()))
        clip = self.s["grad_clip"]
        scale = min(1.0, clip / (size + 1e-6)) if clip else 1.0
        lr = rate(self.s, number, steps)
        for name in self.trained:
            self.update(name, gradient[name] * scale, (noise[name] + floor) * scale, lr, number + 1)

        told = {"loss": (loss, (by_sum.abs() * known).sum().item() + 8 * EPS * abs(loss)), "lr": (lr, 1e-12 + 1e-9 * lr),
                "grad_norm": (size, off_by + 16 * EPS * size)}  # fmt: skip
        if self.case["stage"] != "sft":
            beta, known = self.s["beta"], known.view(-1, 2).mean(0)
            rewards, means = (beta * (sums - ref)).view(-1, 2), sums.view(-1, 2).mean(0).tolist()
            for side, name in enumerate(("chosen", "rejected")):
                told[f"rewards/{name}"] = rewards[:, side].mean().item(), beta * known[side].item()
                told[f"logps/{name}"] = means[side], known[side].item()
            margins = rewards[:, 0] - rewards[:, 1]
            told["rewards/margins"] = margins.mean().item(), beta * known.sum().item()
            tie = (margins.abs() <= 2 * beta * known.max()).double().mean().item()
            told["rewards/accuracies"] = (margins > 0).double().mean().item(), tie + 1e-6
        return told

    def refuse_kinks(self, sums, ref, lengths, unsure, by_sum) -> None:
        if not (torch.isfinite(sums).all() and sums.abs().max() < 1e4):
            raise Undecided("the run blows up")
        if unsure.max() > 0.01 * by_sum.abs().max():
            raise Undecided("a kink or a tie within rounding")
        if self.case["stage"] == "dpop":  # what float32 cannot tell from 0 counts as 0 there, see losses.dpop
            fall, noise = (ref - sums)[::2], 2**-20 * (ref.abs() + 100 * lengths.sqrt())[::2]
            if ((fall > 0) & (fall < 1.1 * noise)).any():
                raise Undecided("a fall within rounding")

    def update(self, name: str, g: torch.Tensor, noise: float, lr: float, t: int) -> None:
        p, slack, (m, v) = self.trained[name], self.slack[name], self.state[name]
        if p.dim() > 1:
            p.data.mul_(1 - lr * self.s["weight_decay"])
        if self.s["optimizer"] == "sgd":
            direction, unsure = g, torch.full_like(g, noise)
        else:
            if self.s["optimizer"] == "adamw":
                one, two = self.s["adam_beta1"], self.s["adam_beta2"]
                m.mul_(one).add_((1 - one) * g)
                v.mul_(two).add_((1 - two) * g**2)
                size, direction, most = (v / (1 - two**t)).sqrt() + 1e-8, m / (1 - one**t), 2 * math.sqrt(t)
            else:
                v.mul_(0.99).add_(0.01 * g**2)
                size, direction, most = v.sqrt() + 1e-8, g, 20.0
            direction = direction / size
            self.worst[name] = max(self.worst[name], noise)
            unsure = (4 * self.worst[name] / size).clamp(max=most)
        p.data.sub_(lr * direction)
        if self.signs:
            p.data.add_((lr * unsure + EPS * p.data.abs()) * self.sign_of(p))
        slack.add_(lr * unsure + 4 * EPS * p.detach().abs())
        if not torch.isfinite(p).all() or (lr * direction).abs().max() > 0.5:
            raise Undecided("the run blows up")


def rate(s: dict, step: int, steps: int) -> float:
    warmup = math.ceil(Fraction(str(s["warmup"])) * steps) if s["warmup"] < 1 else int(s["warmup"])
    if step < warmup:
        return s["lr"] * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    left = {"constant": None, "linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}[s["schedule"]]
    return s["lr"] if left is None else s["min_lr"] + (s["lr"] - s["min_lr"]) * left


# --- cases --------------------------------------------------------------------------------------------------------------


def case_of(stage: str, number: int) -> dict:
    """hypothesis draws the number: drawing every choice itself it would often change one of them only."""
    rng = random.Random(f"{stage} {number}")

    def pick(*options):
        return rng.choice(options)

    def often(value, *others):
        return pick(value, value, value, *others)

    def words(least, most):
        return rng.choices(WORDS, k=rng.randint(least, most))

    records = []
    for _ in range(rng.randint(1, 8)):
        if pick("pair", "pair", "swag") == "pair":
            prompt = words(0, pick(3, 20, 40))
            chosen = words(1, 16)
            near = [*chosen[:-1], *words(1, 1)]  # a pair that differs in one word
            records.append(("pair", prompt, chosen, often(words(1, 16), near)))
        else:
            records.append(("swag", words(1, 8), [words(1, 3) for _ in range(4)], rng.randrange(4)))
    optimizer = pick("adamw", "rmsprop", "sgd")
    clip = pick(1.0, 0.1, 0.0, 50.0)
    rates = {"adamw": (1e-4, 1e-3, 1e-2), "rmsprop": (1e-4, 1e-3), "sgd": (1e-2, 0.1) if 0 < clip <= 1 else (1e-4, 1e-3)}[
        optimizer
    ]
    lr = pick(*rates)
    s = {
        "batch_size": pick(1, 2, 3, 8, 24), "seed": rng.randrange(100), "shuffle": often(True, False),
        "row_len": pick(0, 0, 32, 100, 256), "micro_tokens": pick(1, 40, 100, 300, 4096), "max_len": pick(0, 0, 24, 40),
        "truncation": pick("drop", "left"), "lr": lr, "min_lr": pick(0.0, lr / 10), "warmup": pick(0.0, 0.0, 2.0, 0.07, 0.5),
        "schedule": pick("cosine", "linear", "constant"), "optimizer": optimizer, "grad_clip": clip,
        "adam_beta1": often(0.9, 0.0), "adam_beta2": often(0.999, 0.5), "weight_decay": pick(0.0, 0.1, 1.0, 1e-6),
        "activation_checkpointing": often(False, True),
    }  # fmt: skip
    s |= pick({"epochs": 0.55}, {"epochs": 1.0}, {"epochs": 1.5}, {"max_steps": 1}, {"max_steps": 3}, {"max_steps": 4})
    if stage != "sft":
        s |= {"beta": pick(0.1, 0.05, 0.5, 2.0 if stage == "simpo" else 0.3), "pairs_per_example": often(1, 0, 2)}
        s |= {"sft_weight": often(0.0, 0.3, 1.0)}
        if stage in ("cpo", "orpo"):
            s["sft_weight"] = s["sft_weight"] or 1.0
        smoothing = {"exo_pair": (0.01, 0.1), "robust": (0.0, 0.1, 0.4)}.get(stage, (0.0, 0.1))
        s |= {"label_smoothing": pick(*smoothing), "simpo_gamma": pick(0.5, 0.0, 1.4), "dpop_lambda": pick(50.0, 5.0, 0.0),
              "discopop_tau": pick(0.05, 0.5)}  # fmt: skip
    case = {
        "stage": stage,
        "number": number,
        "size": rng.randrange(len(SIZES)),
        "records": records,
        "settings": s,
        "lora": None,
    }
    if pick(False, True):
        some = rng.sample([*LAYERS, "head"], rng.randint(0, 5))
        case["lora"] = {"rank": pick(1, 2, 4), "alpha": pick(0, 1, 6.5), "targets": [t for t in [*LAYERS, "head"] if t in some],
                        "rslora": often(False, True), "start": pick("new", "adapter")}  # fmt: skip
    # the model as it starts, from a file of precompute_ref.py or (LoRA) from itself; or another model
    case["reference"] = pick("start", "file", "other") if case["lora"] else pick("file", "file", "other")
    case["processes"] = pick(1, 1, 1, 1, 1, 2)
    case["replicate"] = pick(0, 1, 2)
    case["chunk"] = often(None, 1000)  # bytes of logits at once
    return case


def new_adapters(case: dict, folder: Path, weights: dict, base: Path) -> tuple[dict, dict]:
    """(layer -> (A, B, scale, parts), settings): drawn as a new adapter is, or written as peft does."""
    lora, layers = case["lora"], SIZES[case["size"]][0]
    if lora is None:
        return {}, {}
    rank, fresh = lora["rank"], lora["start"] == "new"
    g = torch.Generator().manual_seed(case["settings"]["seed"])
    targets, alpha, made = lora["targets"] or [*LAYERS, "head"], lora["alpha"] or rank, {}
    scale = alpha / (math.sqrt(rank) if lora["rslora"] else rank)
    where = [f"transformer.h.{i}.{theirs}" for i in range(layers) for ours, theirs in LAYERS.items() if ours in targets]
    for layer in where + ["lm_head"] * ("head" in targets):
        n_in, n_out = weights["transformer.wte.weight"].shape[::-1] if layer == "lm_head" else weights[f"{layer}.weight"].shape
        parts = 3 if fresh and "c_attn" in layer else 1
        if fresh:  # A uniform within 1 / sqrt(n_in), B zero
            a = torch.empty(parts * rank, n_in).uniform_(-1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=g)
            b = torch.zeros(n_out, rank)
        else:
            a, b = 0.3 * torch.randn(rank, n_in, generator=g), 0.3 * torch.randn(n_out, rank, generator=g)
        made[layer] = a, b, scale, parts
    keys = {"init_from": base, "lora_rank": rank}
    if fresh:
        keys |= {"lora_alpha": lora["alpha"], "lora_targets": " ".join(lora["targets"]), "lora_rslora": lora["rslora"]}
    else:
        theirs = [{**LAYERS, "head": "lm_head"}[target] for target in targets]
        config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": rank, "lora_alpha": alpha,
                  "use_rslora": lora["rslora"], "target_modules": theirs, "fan_in_fan_out": True, "bias": "none"}  # fmt: skip
        (folder / "start").mkdir()
        (folder / "start/adapter_config.json").write_text(json.dumps(config))
        tensors = {f"base_model.model.{layer}.lora_{x}.weight": t for layer, ab in made.items() for x, t in zip("AB", ab)}  # noqa: B905
        save_file(tensors, folder / "start/adapter_model.safetensors", {"format": "pt"})
        keys["init_from"] = folder / "start"
    return made, keys


# --- the project's side -------------------------------------------------------------------------------------------------


def run_here(jobs: list[tuple[str, list[str]]], chunk: int | None) -> tuple[int, str]:
    """Run scripts in this process, one after another; (exit status, what the last one said on stderr)."""
    status, err = 0, io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch("os._exit", sys.exit))  # of several processes each would end with its script
        if chunk:
            stack.enter_context(mock.patch.multiple(logprobs, LOGITS_BUDGET=0, LOGITS_CHUNK=chunk))
        for job in jobs:
            status = status or script(*[job[0], *job[1]])
    return status, err.getvalue()


def serve(rank: int, port: int, pipe) -> None:
    """One of two processes that run scripts together until they are told None."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    while (job := pipe.recv()) is not None:
        try:
            pipe.send(run_here(*job))
        except BaseException as error:
            pipe.send((1, repr(error)))
            raise


class Two:
    """Two processes that stay: starting them anew for each case would take most of the time."""

    def __init__(self):
        self.ends = []

    def start(self):
        context, port = multiprocessing.get_context("forkserver"), free_port()
        for rank in (0, 1):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(rank, port, there), daemon=True)
            process.start()
            self.ends.append((process, here))

    def run(self, *job) -> tuple[int, str]:
        if not self.ends:
            self.start()
        try:
            for _, pipe in self.ends:
                pipe.send(job)
            found = [pipe.recv() if pipe.poll(60) else (1, "it hangs") for _, pipe in self.ends]
        except (OSError, EOFError) as error:
            found = [(1, f"a process has ended: {error!r}")]
        if any(status for status, _ in found):
            self.stop()
        return max(found)

    def stop(self):
        for process, _ in self.ends:
            process.kill()
            process.join()
        self.ends = []


@pytest.fixture(scope="module")
def two():
    pair = Two()
    yield pair
    pair.stop()


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict:
    """(size, seed) -> (folder, weights). Seed 1 is where runs start, 2 the reference model `other`."""
    root = tmp_path_factory.mktemp("bases")
    return {
        (size, seed): (root / f"{size}{seed}", write_base(root / f"{size}{seed}", size, seed))
        for size in range(len(SIZES))
        for seed in (1, 2)
    }


def compare(case: dict, bases: dict, two: Two, folder: Path) -> tuple[str, float]:
    """Run both sides. AssertionError where they differ. Else ("", or why they were not compared to the end; and the largest
    difference as a share of its tolerance)."""
    examples = examples_of(case["records"], case)
    hypothesis.assume(examples)
    plan = steps_of(examples, case)
    hypothesis.assume(len(plan) <= 8)
    stage, settings = case["stage"], dict(case["settings"])
    base, weights = bases[case["size"], 1]
    other, other_weights = bases[case["size"], 2]
    adapters, lora_keys = new_adapters(case, folder, weights, base)
    (folder / "data.jsonl").write_text("".join(json.dumps(line_of(r)) + "\n" for r in case["records"]))
    common = {"data": folder / "data.jsonl", "tokenizer": "toy", "device": "cpu", "init_from": base} | lora_keys
    if stage != "sft":
        settings |= {"loss": stage}
    uses_file = stage not in ("sft", "simpo") and case["reference"] != "start"
    if uses_file:
        start = other if case["reference"] == "other" else common["init_from"]
        lengths = {name: settings[name] for name in ("max_len", "truncation")}
        made = flags(
            **{"data": common["data"], "tokenizer": "toy", "device": "cpu", "init_from": start},
            **lengths,
            out=folder / "r.safetensors",
        )
        status, err = run_here([("precompute_ref", made)], None)
        assert status == 0, err
        settings |= {"ref": folder / "r.safetensors", "allow_ref_mismatch": case["reference"] == "other"}
    args = flags(
        **common, **settings, samples=0, out_dir=folder / "run", replicate=case["replicate"] if case["processes"] > 1 else 0
    )
    job = ([("sft" if stage == "sft" else "dpo", args)], case["chunk"])
    status, err = two.run(*job) if case["processes"] == 2 else run_here(*job)
    assert status == 0, err

    reference = other_weights if uses_file and case["reference"] == "other" else None
    run, twin = (Run(case, weights, adapters, reference, jitter) for jitter in (False, True))
    largest = 0.0
    records = [r for r in metrics(folder / "run") if r["split"] == "train"]
    assert len(records) == len(plan), f"{len(records)} steps, not {len(plan)}"
    for n, (record, numbers) in enumerate(zip(records, plan, strict=True)):
        try:
            told, shaken = (r.step(n, len(plan), [examples[i] for i in numbers]) for r in (run, twin))
        except Undecided as reason:
            return str(reason), largest
        for name, (value, tolerance) in told.items():
            tolerance += CARRIED * abs(shaken[name][0] - value)
            largest = max(largest, abs(record[name] - value) / max(tolerance, 1e-99)) if "accuracies" not in name else largest
            assert abs(record[name] - value) <= tolerance, (
                f"step {n + 1}: {name} {record[name]!r}, not {value!r} ± {tolerance:.1e}"
            )
    for (name, tensor, wanted, slack), (*_, shaken, _) in zip(*(ended(folder / "run", r) for r in (run, twin)), strict=True):
        slack = slack + CARRIED * ((shaken - wanted).abs() - slack).clamp(min=0).max() + 1e-99
        share = ((tensor.double() - wanted).abs() / slack).max().item()
        assert share <= 1, f"{name}: {share:.2f} times its tolerance, which is {slack.max().item():.1e} or less"
        largest = max(largest, share)
    return "", largest


def ended(folder: Path, run: Run):
    """(name, the project's tensor, the reference's, the tolerance) of all that was trained."""
    if not run.adapters:
        found = load_file(folder / "model/model.safetensors")
        assert found.keys() == run.trained.keys()
        yield from ((name, found[name], p.detach(), run.slack[name]) for name, p in run.trained.items())
        return
    found = load_file(folder / "adapter/adapter_model.safetensors")
    assert len(found) == len(run.trained)
    for layer, (_, _, _, parts) in run.adapters.items():
        for x in "AB":
            both = [run.trained[f"{layer}.{x}"].detach(), run.slack[f"{layer}.{x}"]]
            if x == "B":  # peft has one adapter on the whole fused layer: B has a block a part on its diagonal
                both = [torch.block_diag(*t.chunk(parts)) for t in both]
            yield layer + x, found[f"base_model.model.{layer}.lora_{x}.weight"], *both


@pytest.mark.slow
def test_random_runs_equal_the_reference(request, bases, two):
    asked = request.config.getoption("fuzz")
    ran, differ, undecided, shares = [], [], Counter(), []

    def one(case):
        with tempfile.TemporaryDirectory() as folder:
            try:
                reason, share = compare(case, bases, two, Path(folder))
            except AssertionError as error:
                differ.append(f"{error}\n    {case}")
                reason, share = "", 0.0
        ran.append(case)
        shares.append(share)
        undecided[reason] += 1

    for stage in STAGES:
        settings = hypothesis.settings(
            max_examples=math.ceil((asked or CASES) / len(STAGES)), derandomize=not asked, database=None, deadline=None,
            phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        numbers = hypothesis.strategies.integers(0, 2**64 - 1)
        settings(hypothesis.given(numbers.map(partial(case_of, stage)))(one))()
        print(f"{stage}: {len(ran)} cases so far, {len(differ)} differ", flush=True)
    both = sum(case["processes"] == 2 for case in ran)
    print(f"\n{len(ran)} cases, {both} of them in two processes: {len(differ)} differ")
    print(f"largest difference as a share of its tolerance, median, 99% and most: {np.quantile(shares, [0.5, 0.99, 1])}")
    del undecided[""]
    print(f"compared up to a step that rounding decides: {undecided.total()} {dict(undecided)}")
    assert not differ, f"{len(differ)} of {len(ran)} cases differ:\n" + "\n".join(differ)
    assert len(ran) >= (asked or CASES) and undecided.total() < len(ran) / 10
