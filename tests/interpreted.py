"""Run with TRITON_INTERPRET=1: the kernels on a CPU, against the same in torch. (In a process of its own: Triton asks for that
variable when it is imported.)"""

import itertools

import torch

import head_kernels
import logprobs

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def check(device: str = "cpu") -> None:
    """Vocabularies below, at and past the size of a block, logits near -100 as GPT-2's are; a gradient that is one number."""
    g = torch.Generator().manual_seed(0)
    for n, vocab in ((3, 50), (2, head_kernels.BLOCK), (4, 2 * head_kernels.BLOCK + 1)):
        logits, target = torch.randn(n, vocab, generator=g) * 5 - 100, torch.randint(0, vocab, (n,), generator=g)
        target[0] = vocab - 1
        there = logits.to(device), target.to(device)
        lse, at = logprobs.normaliser(logits, target)
        ours = [t.cpu() for t in head_kernels.normaliser(*there)]
        torch.testing.assert_close(ours, [lse, at], rtol=0, atol=2e-5)
        for grad, dtype in itertools.product((torch.randn(n, generator=g), torch.ones(1).expand(n)), TOLERANCE):
            got = head_kernels.derivative(there[0], lse.to(device), there[1], grad.to(device), dtype)
            want = logprobs.derivative(logits.clone(), lse, target, grad, dtype)
            torch.testing.assert_close(got.cpu(), want, rtol=TOLERANCE[dtype], atol=1e-6)


if __name__ == "__main__":
    check()
