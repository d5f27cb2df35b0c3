"""Tiny random GPT-2 folders as transformers saves them, and the peers that the tests compare with (bench/peers.py)."""

from pathlib import Path

from bench.peers import dpo_trainer, generate, generator, harness, harness_logps, now, quiet, sft_trainer

__all__ = ["dpo_trainer", "generate", "generator", "gpt2_folder", "harness", "harness_logps", "now", "quiet", "sft_trainer"]


def gpt2_folder(folder: str | Path, *, n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=97, seed=0) -> Path:
    """A random GPT2LMHeadModel without dropout, as transformers saves it. Its weights are larger than GPT-2's
    initialisation, so that log-probs, and with them rewards, differ visibly between tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1,
                        bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1)  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, p in model.named_parameters():  # biases and layer-norm scales too: zeros and ones would hide mistakes
            if name.endswith("bias") or p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(str(folder))
    return Path(folder)
