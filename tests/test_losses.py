"""Every preference loss against an independent computation: TRL's code where TRL has it, else the paper's formula."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import losses
from losses import LOSSES, Pairs

TRL_LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
              "aot_unpaired", "apo_zero", "apo_down", "discopop", "sigmoid_norm"]  # fmt: skip
SMOOTHED = {"exo_pair", "robust", "aot", "aot_unpaired"}  # where TRL reads label_smoothing


def settings(**changed):
    o = {"beta": 0.1, "label_smoothing": 0.0, "simpo_gamma": 0.5, "dpop_lambda": 50.0, "discopop_tau": 0.05,
         "desirable_weight": 1.0, "undesirable_weight": 0.8}  # fmt: skip
    return SimpleNamespace(**o | changed)


def random_pairs(n=7, seed=0, spread=3.0) -> Pairs:
    """Log-probs of a policy some nats away from its reference, in float64; `chosen` and `rejected` want gradients. Every
    second label is false."""
    g = torch.Generator().manual_seed(seed)
    chosen_len, rejected_len = (torch.randint(1, 40, (n,), generator=g).double() for _ in range(2))
    ref_chosen, ref_rejected = -2.5 * chosen_len, -2.4 * rejected_len
    chosen, rejected = (r + spread * torch.randn(n, generator=g) for r in (ref_chosen, ref_rejected))
    wanted = (chosen.requires_grad_(), rejected.requires_grad_(), ref_chosen, ref_rejected, chosen_len, rejected_len)
    return Pairs(*wanted, torch.arange(n) % 2 == 0)


def value_and_grads(loss: torch.Tensor, p: Pairs) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [p.chosen, p.rejected], materialize_grads=True)]


def trl_loss(p: Pairs, o, loss_types: list[str], weights: list[float] | None = None) -> torch.Tensor:
    """What TRL's own DPOTrainer._compute_loss makes of these log-probs, differentiable in p.chosen and p.rejected.

    A stub stands in for the model: it spreads a completion's log-prob evenly over its tokens; TRL adds them up again.
    """
    trl = pytest.importorskip("trl")
    n, longest = len(p.chosen), int(max(p.chosen_len.max(), p.rejected_len.max()))
    length = torch.cat([p.chosen_len, p.rejected_len])
    completion_mask = torch.zeros(2 * n, 1 + longest, dtype=torch.long)  # a prompt of one token
    completion_mask[:, 1:] = torch.arange(longest) < length[:, None]
    per_token = (torch.cat([p.chosen, p.rejected]) / length)[:, None] * completion_mask[:, 1:]
    out = SimpleNamespace(log_probs=per_token, **{
        name: torch.zeros_like(per_token).detach() for name in ("entropy", "mean_logits")
    }, is_top1=torch.zeros_like(per_token).bool())  # fmt: skip

    trainer = object.__new__(trl.DPOTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer.args = SimpleNamespace(discopop_tau=o.discopop_tau)
    trainer.loss_types, trainer.loss_weights = loss_types, weights or [1.0] * len(loss_types)
    trainer.beta, trainer.label_smoothing = o.beta, o.label_smoothing
    trainer.ld_alpha, trainer.f_divergence_type, trainer.use_weighting = None, "reverse_kl", False
    trainer.precompute_ref_logps, trainer.aux_loss_enabled = True, False
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = defaultdict(lambda: defaultdict(list)), 0, 1
    inputs = {"input_ids": torch.zeros_like(completion_mask), "attention_mask": torch.ones_like(completion_mask),
              "completion_mask": completion_mask, "ref_chosen_logps": p.ref_chosen,
              "ref_rejected_logps": p.ref_rejected}  # fmt: skip
    return trainer._compute_loss(lambda **_: out, inputs, return_outputs=False)


def test_names():
    assert set(LOSSES) == {*TRL_LOSSES, "simpo", "cpo", "orpo", "dpop", "kto"}


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("name", TRL_LOSSES)
def test_equals_trl(name, beta):
    """Value and gradient of the mean over pairs, near and far from the reference."""
    smoothing = [0.1] if name == "exo_pair" else [0.0, 0.1] if name in SMOOTHED else [0.0]  # exo_pair needs some
    for (seed, spread), e in itertools.product(enumerate((0.0, 1.0, 3.0, 30.0)), smoothing):
        p, o = random_pairs(seed=seed, spread=spread), settings(beta=beta, label_smoothing=e)
        ours = value_and_grads(LOSSES[name](p, o).mean(), p)
        theirs = value_and_grads(trl_loss(p, o, [name]), p)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_added_sft_term_equals_trl():
    """loss_type ["sigmoid", "sft"]: the SFT term is the mean over the batch's chosen tokens, not over its pairs."""
    p, o = random_pairs(), settings()
    n_tokens = int(p.chosen_len.sum())
    token_logps = torch.cat([(c / n).expand(int(n)) for c, n in zip(p.chosen, p.chosen_len, strict=True)])
    ours = LOSSES["sigmoid"](p, o).mean() + 0.3 * losses.sft(token_logps, n_tokens)
    theirs = trl_loss(p, o, ["sigmoid", "sft"], [1.0, 0.3])
    for a, b in zip(value_and_grads(ours, p), value_and_grads(theirs, p), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def agree(ours: torch.Tensor, theirs: torch.Tensor, p: Pairs, rtol=1e-9, atol=1e-12) -> None:
    for a, b in zip(value_and_grads(ours, p), value_and_grads(theirs, p), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("name", "trl_name", "smoothing"), [("simpo", "simpo", 0.0), ("cpo", "sigmoid", 0.0), ("cpo", "sigmoid", 0.1)]
)
def test_equals_trl_cpo(name, trl_name, smoothing):
    cpo = pytest.importorskip("trl.experimental.cpo")
    p, o = random_pairs(), settings(beta=2.0 if name == "simpo" else 0.2, simpo_gamma=0.7, label_smoothing=smoothing)
    trainer = object.__new__(cpo.CPOTrainer)
    trainer.accelerator = SimpleNamespace(device="cpu")
    trainer.loss_type, trainer.beta, trainer.simpo_gamma = trl_name, o.beta, o.simpo_gamma
    trainer.label_smoothing, trainer.alpha = smoothing, 0.0
    per = (p.chosen_len, p.rejected_len) if name == "simpo" else (1, 1)
    theirs, *_ = trainer.cpo_loss(p.chosen / per[0], p.rejected / per[1])
    agree(LOSSES[name](p, o).mean(), theirs.mean(), p)


def test_orpo_equals_trl():
    orpo = pytest.importorskip("trl.experimental.orpo")
    p, o = random_pairs(spread=0.5), settings(beta=0.3)
    sure = random_pairs(n=3)  # tokens of probability 0.99 and more
    p = Pairs(*(torch.cat([a.detach(), b.detach()]) for a, b in zip(p, sure, strict=True)))
    p.chosen[7:] = -0.01 * p.chosen_len[7:] * torch.tensor([1.0, 0.1, 1e-3])
    p.chosen.requires_grad_(), p.rejected.requires_grad_()
    trainer = object.__new__(orpo.ORPOTrainer)
    trainer.accelerator, trainer.beta = SimpleNamespace(device="cpu"), o.beta
    theirs, *_ = trainer.odds_ratio_loss(p.chosen / p.chosen_len, p.rejected / p.rejected_len)
    agree(LOSSES["orpo"](p, o).mean(), -theirs.mean().double(), p, rtol=2e-6, atol=1e-7)  # TRL's is in float32


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("above", [1, -1])
def test_kto_equals_trl(above, spread):
    """With a KL estimate above 0, and with one that is cut to 0."""
    trl = pytest.importorskip("trl")
    p, o = random_pairs(spread=spread), settings(beta=0.2, desirable_weight=1.3, undesirable_weight=0.7)
    p = p._replace(rejected=(p.ref_rejected + above * (p.ratio_rejected.abs() + 1)).detach().requires_grad_())

    def model(input_ids, **_):  # each sequence's log-prob stands on its first token
        sums = p.chosen if input_ids[0, 0] == 0 else p.rejected
        zeros = torch.zeros(len(sums), 1)
        return SimpleNamespace(log_probs=sums[:, None], entropy=zeros, mean_logits=zeros)

    trainer = object.__new__(trl.KTOTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer.calculate_KL, trainer.precompute_ref_logps, trainer.aux_loss_enabled = True, True, False
    trainer.loss_type, trainer.beta = "kto", o.beta
    trainer.desirable_weight, trainer.undesirable_weight = o.desirable_weight, o.undesirable_weight
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = defaultdict(lambda: defaultdict(list)), 0, 1
    ids = {"KL_input_ids": torch.ones(len(p.chosen), 2, dtype=torch.long)}
    ids["input_ids"] = torch.zeros_like(ids["KL_input_ids"])
    ids |= {
        f"{kind}{what}_mask": torch.ones_like(ids["input_ids"]) for kind in ("", "KL_") for what in ("attention", "completion")
    }
    inputs = {**ids, "label": p.desirable, "ref_logps": p.ref_chosen, "ref_KL_logps": p.ref_rejected}
    agree(LOSSES["kto"](p, o).mean(), trainer._compute_loss(model, inputs, return_outputs=False), p)
    o.loss, o.sft_weight = "kto", 0.0
    told = {name: found[-1] for name, found in trainer._metrics["train"].items()}
    assert (told["kl"] > 0) == (above > 0)
    for name, value in losses.metrics(p, o).items():
        assert value == pytest.approx(told[name], rel=1e-9), name
    assert told.keys() - losses.metrics(p, o).keys() == {"entropy", "num_tokens", "logits/chosen", "logits/rejected"}


def test_metrics_of_one_label_only():
    p, o = random_pairs(), settings(loss="kto", sft_weight=0.0)
    found = losses.metrics(p._replace(desirable=torch.zeros(7, dtype=torch.bool)), o)
    assert set(found) == {"rewards/rejected", "logps/rejected", "kl"}
    assert found["logps/rejected"] == pytest.approx(p.chosen.mean().item())


def test_metrics_of_the_added_likelihood():
    p, o = random_pairs(), settings(loss="orpo", sft_weight=0.3)
    assert losses.metrics(p, o)["nll_loss"] == pytest.approx((-p.chosen.sum() / p.chosen_len.sum()).item(), rel=1e-6)


# --- by hand: one pair with beta 0.5 --------------------------------------------------------------------------------
# chosen -10 over 4 tokens (reference -12), rejected -9 over 3 (reference -8): r_w = 2, r_l = -1, h = 3, beta h = 1.5


def one_pair(chosen=-10.0, rejected=-9.0, ref_chosen=-12.0, ref_rejected=-8.0, desirable=True) -> Pairs:
    numbers = (torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, ref_chosen, ref_rejected, 4, 3))
    return Pairs(*numbers, torch.tensor([desirable]))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    "name, changed, pair, expected",
    [
        ("sigmoid", {}, {}, 0.2014132779827524),  # -log sigmoid(1.5) = log(1 + e^-1.5)
        # cDPO: -(1 - e) log sigmoid(1.5) - e log sigmoid(-1.5); log sigmoid(-1.5) = -1.7014132779827524
        ("sigmoid", {"label_smoothing": 0.2}, {}, 0.8 * 0.2014132779827524 + 0.2 * 1.7014132779827524),
        # SimPO: beta (-10/4 + 9/3) - gamma = 0.5 * 0.5 - 0.5 = -0.25: log(1 + e^0.25)
        ("simpo", {}, {}, 0.8259394198788435),
        # CPO: beta (-10 + 9) = -0.5: log(1 + e^0.5)
        ("cpo", {}, {}, 0.9740769841801067),
        # ORPO: p_w = e^(-10/4), p_l = e^(-9/3); log odds -2.41435 and -2.94893, so 0.5 log(1 + e^-0.53458)
        ("orpo", {}, {}, 0.23058062506119303),
        # KTO, KL estimate max(0, -1) = 0: 1 - sigmoid(0.5 * 2)
        ("kto", {}, {}, 0.2689414213699951),
        # the other completion's reference is -10, so the KL estimate is 1: 1 - sigmoid(0.5 (2 - 1)), times its weight
        ("kto", {"desirable_weight": 2.0}, {"ref_rejected": -10.0}, 2 * 0.3775406687981454),
        # the same, undesirable: 1 - sigmoid(0.5 (1 - 2))
        ("kto", {"undesirable_weight": 0.5}, {"ref_rejected": -10.0, "desirable": False}, 0.5 * 0.6224593312018546),
        # DPOP, chosen above its reference: no penalty, so plain DPO
        ("dpop", {}, {}, 0.2014132779827524),
        # chosen -13 falls 1 below its reference: r_w = r_l = -1, h = 0: beta (0 - lambda * 1) = -2.5: log(1 + e^2.5)
        ("dpop", {"dpop_lambda": 5.0}, {"chosen": -13.0}, 2.5788897342925496),
    ],
)
def test_by_hand(name, changed, pair, expected):
    got = LOSSES[name](one_pair(**pair), settings(beta=0.5, **changed))
    assert got.shape == (1,)
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_rounding_at_the_start_decides_nothing(name):
    """Policy and reference are the same, but for what float32 makes of their sums under two layouts: rounding of 1e-6 nats
    may not move a loss or its gradient by more than it moves beta times a log-ratio."""
    length, o = torch.tensor([1.0, 6.0, 30.0, 200.0]), settings(label_smoothing=0.1)
    sums, found = -3 * length, []
    for sign in (0.0, 1.0, -1.0):
        noise = sign * 2**-22 * (sums.abs() + 30) * torch.tensor([1.0, -1.0, 1.0, -1.0])
        p = Pairs((sums + noise).requires_grad_(), (sums - noise).requires_grad_(), sums, sums, length, length)
        found.append(torch.cat([x.reshape(-1) for x in value_and_grads(LOSSES[name](p, o).mean(), p)]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spread", [1e-2, 1.0, 30.0])
def test_dpop_beyond_rounding_is_the_papers(spread):
    p, o = random_pairs(n=50, spread=spread), settings()
    penalty = torch.clamp(p.ref_chosen - p.chosen, min=0)
    paper = -torch.log(torch.sigmoid(o.beta * (p.chosen - p.ref_chosen - p.rejected + p.ref_rejected - 50 * penalty)))
    told = (p.ratio_chosen.abs() > 2e-3) & paper.isfinite()
    assert told.sum() > 15 and (penalty[told] > 0).any()
    torch.testing.assert_close(LOSSES["dpop"](p, o)[told], paper[told], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_halves_of_a_batch(name):
    """What lets micro-batches be added up holds for every loss but those that dpo.py must see whole."""
    p, o = random_pairs(n=8, spread=30.0), settings(label_smoothing=0.1)
    halves = [LOSSES[name](Pairs(*(x[part] for x in p)), o) for part in (slice(0, 4), slice(4, 8))]
    same = torch.allclose(torch.cat(halves).mean(), LOSSES[name](p, o).mean(), rtol=1e-9, atol=0)
    assert same == (name not in losses.WHOLE_BATCH)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_reference_free(name):
    p, o = random_pairs(), settings(label_smoothing=0.1)
    moved = p._replace(ref_chosen=p.ref_chosen - 1.0, ref_rejected=p.ref_rejected + torch.arange(7.0))
    same = torch.allclose(LOSSES[name](p, o), LOSSES[name](moved, o))
    assert same == (name in losses.REFERENCE_FREE)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_far_from_the_reference_stays_finite(name):
    """Hundreds of nats either way in float32, as in a diverging run: no inf - inf, no 0 * inf, forward or backward."""
    far = torch.tensor([-2000.0, -700.0, -90.0, 90.0, 700.0, 2000.0])
    zero, length = torch.zeros(6), torch.full((6,), 20.0)
    p = Pairs(far.clone().requires_grad_(), (-far).clone().requires_grad_(), zero, zero, length, length)
    loss = LOSSES[name](p, settings(label_smoothing=0.1))
    for x in value_and_grads(loss.sum(), p):
        assert torch.isfinite(x).all()


def test_sft_shares_add_up_to_the_mean_over_all_tokens():
    logps = -torch.rand(11, dtype=torch.float64)
    shares = [losses.sft(part, 11) for part in logps.split([1, 7, 3])]
    torch.testing.assert_close(sum(shares), -logps.mean(), rtol=1e-12, atol=0)


def test_completion_sums():
    got = losses.completion_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0]), 4)
    assert got.tolist() == [10.0, 0.0, 5.0, 0.0]
