"""Losses: pure functions of log-probabilities. There is one copy of each, used by training, validation and tests.

A preference loss is `fn(p, o) -> (pairs,)`: `p` is a `Pairs` of summed log-probs, `o` any object with the settings it
reads (`beta`, `label_smoothing`, …; dpo.py hands over its config). The mean over the global batch is the caller's.

Notation: for a pair, w is the chosen and l the rejected completion, r = log pi(y|x) - log pi_ref(y|x) is a
completion's log-ratio, and h = r_w - r_l. The DPO paper's implicit reward is beta * r.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """What a preference loss sees. Every field is a float tensor of shape (pairs,).

    `chosen`, `rejected`: log pi(y|x), the sum of the token log-probs of the completion, end of text included, in nats.
    `ref_*`: the same under the frozen reference. `*_len`: tokens in the completion, end of text included.

    Unpaired data have one completion a prompt, and beside it one that another prompt was answered with. They stand here as
    `chosen` and `rejected`, whatever the label; `desirable` is the label, (pairs,) bool. Of pairs it is True.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_len: Tensor
    rejected_len: Tensor
    desirable: Tensor = torch.tensor(True)

    @property
    def ratio_chosen(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def ratio_rejected(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def h(self) -> Tensor:
        return self.ratio_chosen - self.ratio_rejected


def completion_sums(logps: Tensor, completion: Tensor, n_completions: int) -> Tensor:
    """Token log-probs (n_tokens,) and the number of the completion each belongs to (n_tokens,) -> sums (n_completions,)."""
    return logps.new_zeros(n_completions).index_add(0, completion, logps)


def sft(logps: Tensor, n_tokens: int) -> Tensor:
    """This micro-batch's share of the mean negative log-likelihood over the *global* batch's `n_tokens` tokens.

    Summed over all micro-batches and ranks it is the exact mean, however unequal they are. logps: those of tokens, or sums of
    them, (n,) -> scalar.
    """
    return -logps.sum() / n_tokens


# --- preference losses ---------------------------------------------------------------------------------------------


def _smoothed(z: Tensor, o) -> Tensor:
    """-log sigmoid(z), where labels are believed to be flipped with probability `label_smoothing`."""
    return -(1 - o.label_smoothing) * F.logsigmoid(z) - o.label_smoothing * F.logsigmoid(-z)


def sigmoid(p: Pairs, o) -> Tensor:
    """DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. With `label_smoothing` e > 0 the conservative DPO of
    Mitchell 2023 (https://ericmitchell.ai/cdpo.pdf), eq. 3: labels are believed to be flipped with probability e."""
    return _smoothed(o.beta * p.h, o)


def robust(p: Pairs, o) -> Tensor:
    """Robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409), eq. 9: unbiased under labels flipped with probability
    `label_smoothing` e < 0.5."""
    z, e = o.beta * p.h, o.label_smoothing
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


def ipo(p: Pairs, o) -> Tensor:
    """IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17, beta being the paper's tau. Log-ratios are taken per token, the
    form that the authors confirmed to TRL, so that the target 1/(2 beta) does not depend on length."""
    return (p.ratio_chosen / p.chosen_len - p.ratio_rejected / p.rejected_len - 1 / (2 * o.beta)).square()


def hinge(p: Pairs, o) -> Tensor:
    """Hinge on the margin: SLiC-HF, Zhao et al. 2023 (arXiv 2305.10425), with DPO's log-ratios, as in RSO, Liu et al.
    2023 (arXiv 2309.06657), eq. 11."""
    return F.relu(1 - o.beta * p.h)


def simpo(p: Pairs, o) -> Tensor:
    """SimPO, Meng et al. 2024 (arXiv 2405.14734), eq. 6: no reference, log-probs per token, target margin `simpo_gamma`."""
    return -F.logsigmoid(o.beta * (p.chosen / p.chosen_len - p.rejected / p.rejected_len) - o.simpo_gamma)


def cpo(p: Pairs, o) -> Tensor:
    """The preference term of CPO, Xu et al. 2024 (arXiv 2401.08417), eq. 3: DPO with a uniform reference, which cancels. The
    paper adds the chosen completions' likelihood with weight 1: that is `sft_weight`."""
    return _smoothed(o.beta * (p.chosen - p.rejected), o)


def orpo(p: Pairs, o) -> Tensor:
    """The odds-ratio term of ORPO, Hong et al. 2024 (arXiv 2403.07691), eq. 7: no reference, p is a completion's probability
    per token, and its odds are p / (1 - p). The paper's lambda is `beta`; its likelihood term has `sft_weight` 1."""
    logps = torch.stack([p.chosen / p.chosen_len, p.rejected / p.rejected_len])
    odds = logps - torch.log(-torch.expm1(logps.clamp(max=-1e-6)))  # their logarithm; for p = 1 it would be infinite
    return -o.beta * F.logsigmoid(odds[0] - odds[1])


def dpop(p: Pairs, o) -> Tensor:
    """DPO-Positive (Smaug), Pal et al. 2024 (arXiv 2402.13228), eq. 3: DPO, but the chosen completion may not fall
    below its reference; the penalty's weight is `dpop_lambda`.

    At the start of a run every log-ratio is 0 but for rounding, and `dpop_lambda` would magnify what rounding makes of it. So
    a fall counts only where float32 can tell it from 0: above 2^-20, or 16 roundings, of the completion's sum and, added up
    like a random walk, of its tokens' logits, which in GPT-2 lie near -100.
    """
    fall, noise = -p.ratio_chosen, 2**-20 * (p.ref_chosen.abs() + 100 * p.chosen_len.sqrt())
    return -F.logsigmoid(o.beta * (p.h - o.dpop_lambda * torch.where(fall > noise, fall, 0)))


def sigmoid_norm(p: Pairs, o) -> Tensor:
    """Length-normalised DPO, Tülu 3, Lambert et al. 2024 (arXiv 2411.15124), eq. 6: log-ratios per token."""
    return -F.logsigmoid(o.beta * (p.ratio_chosen / p.chosen_len - p.ratio_rejected / p.rejected_len))


def exo_pair(p: Pairs, o) -> Tensor:
    """EXO-pref, Ji et al. 2024 (arXiv 2402.00856), eq. 16 for two completions: reverse KL from softmax(beta r) to
    (1 - e, e) with e = `label_smoothing` > 0."""
    z, e = o.beta * p.h, torch.tensor(o.label_smoothing)
    return torch.sigmoid(z) * (F.logsigmoid(z) - torch.log1p(-e)) + torch.sigmoid(-z) * (F.logsigmoid(-z) - torch.log(e))


def nca_pair(p: Pairs, o) -> Tensor:
    """NCA for pairs, Chen et al. 2024 (arXiv 2402.05369), eq. 10: raises the chosen reward itself, not the gap alone."""
    w, l = o.beta * p.ratio_chosen, o.beta * p.ratio_rejected
    return -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-l)


def bco_pair(p: Pairs, o) -> Tensor:
    """Binary classifier on each completion's reward, Jung et al. 2024 (arXiv 2404.04656), without the reward shift."""
    return -F.logsigmoid(o.beta * p.ratio_chosen) - F.logsigmoid(-o.beta * p.ratio_rejected)


def sppo_hard(p: Pairs, o) -> Tensor:
    """SPPO, Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with win probabilities 1 and 0; its eta is 1 / beta."""
    return (p.ratio_chosen - 0.5 / o.beta).square() + (p.ratio_rejected + 0.5 / o.beta).square()


def apo_zero(p: Pairs, o) -> Tensor:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7: chosen up, rejected down; for chosen completions
    better than the model's own."""
    return 1 - torch.sigmoid(o.beta * p.ratio_chosen) + torch.sigmoid(o.beta * p.ratio_rejected)


def apo_down(p: Pairs, o) -> Tensor:
    """APO-down, same paper, eq. 8: both down, the rejected one more; for chosen completions worse than the model's own."""
    return torch.sigmoid(o.beta * p.ratio_chosen) + 1 - torch.sigmoid(o.beta * p.h)


def discopop(p: Pairs, o) -> Tensor:
    """DiscoPOP (log-ratio modulated loss), Lu et al. 2024 (arXiv 2406.08414), eq. 5, temperature `discopop_tau`."""
    z = o.beta * p.h
    blend = z / o.discopop_tau
    # exp(-z) sigmoid(blend) in one exponent: apart they are inf times 0 far from the reference
    return -F.logsigmoid(z) * torch.sigmoid(-blend) + torch.exp(F.logsigmoid(blend) - z)


def aot(p: Pairs, o) -> Tensor:
    """AOT, Melnyk et al. 2024 (arXiv 2406.05882), paired: the *distribution* of the policy's margins over the batch
    must dominate the reference's, so both are sorted. Depends on the whole global batch."""
    return _sorted_gap((p.chosen - p.rejected), (p.ref_chosen - p.ref_rejected), o)


def aot_unpaired(p: Pairs, o) -> Tensor:
    """AOT, unpaired: the chosen completions' log-ratios must dominate the rejected ones'. Depends on the whole global batch."""
    return _sorted_gap(p.ratio_chosen, p.ratio_rejected, o)


def _sorted_gap(above: Tensor, below: Tensor, o) -> Tensor:
    return _smoothed(o.beta * (above.sort().values - below.sort().values), o)


def kl_estimate(p: Pairs) -> Tensor:
    """KTO's z_0: the mean log-ratio, 0 or more, of completions of other prompts. A scalar in nats, without
    a gradient."""
    return p.ratio_rejected.detach().mean().clamp(min=0)


def kto(p: Pairs, o) -> Tensor:
    """KTO, Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7, for unpaired data: a desirable completion's log-ratio is to be
    above the KL estimate, an undesirable one's below. Depends on the whole global batch."""
    z = o.beta * (p.ratio_chosen - kl_estimate(p))
    return torch.where(p.desirable, o.desirable_weight * torch.sigmoid(-z), o.undesirable_weight * torch.sigmoid(z))


LOSSES = {
    fn.__name__: fn
    for fn in (sigmoid, robust, ipo, hinge, simpo, cpo, orpo, dpop, sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard,
               apo_zero, apo_down, discopop, aot, aot_unpaired, kto)
}  # fmt: skip
REFERENCE_FREE = {"simpo", "cpo", "orpo"}
WHOLE_BATCH = {"aot", "aot_unpaired", "kto"}  # not a sum over pairs: they need every pair of the step at once
UNPAIRED = {"kto"}
NEEDS = (  # what a loss asks of another key's value: (loss, key, in words, test)
    ("robust", "label_smoothing", "below 0.5", lambda value: value < 0.5),
    ("exo_pair", "label_smoothing", "above 0", lambda value: value > 0),
    ("cpo", "sft_weight", "above 0 (1 in its paper)", lambda value: value > 0),
    ("orpo", "sft_weight", "above 0 (1 in its paper)", lambda value: value > 0),
    ("kto", "sft_weight", "0", lambda value: value == 0),
    ("kto", "batch_size", "above 1, better 8 or more (its KL estimate is a mean over the batch),", lambda value: value > 1),
)


def metrics(p: Pairs, o) -> dict[str, float]:
    """What is reported, under TRL's names: means over pairs. Rewards are beta * log-ratio, in nats. Of unpaired data they are
    means over the desirable completions ("chosen") and over the others ("rejected"), each only where there are some."""
    rewards = o.beta * p.ratio_chosen.detach(), o.beta * p.ratio_rejected.detach()
    logps = p.chosen.detach(), p.rejected.detach()
    if unpaired := o.loss in UNPAIRED:
        rewards, logps = ((own[p.desirable], own[~p.desirable]) for own, _ in (rewards, logps))
    values = {"rewards/chosen": rewards[0], "rewards/rejected": rewards[1]}
    if unpaired:
        values["kl"] = kl_estimate(p)
    else:
        values |= {"rewards/accuracies": (rewards[0] > rewards[1]).float(), "rewards/margins": rewards[0] - rewards[1]}
    values |= {"logps/chosen": logps[0], "logps/rejected": logps[1]}
    if o.sft_weight:
        values["nll_loss"] = sft(logps[0], p.chosen_len.sum())
    values = {name: value for name, value in values.items() if value.numel()}
    means = torch.stack([value.double().mean() for value in values.values()]).tolist()
    found = dict(zip(values, means, strict=True))
    if unpaired and {"rewards/chosen", "rewards/rejected"} <= found.keys():
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found
