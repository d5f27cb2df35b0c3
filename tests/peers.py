"""Tiny random GPT-2 folders as transformers saves them, adapters as peft does, and the peers of bench/peers.py."""

from pathlib import Path

from bench.peers import dpo_trainer, generate, generator, harness, harness_logps, now, quiet, sft_trainer

__all__ = ["dpo_trainer", "generate", "generator", "gpt2_folder", "harness", "harness_logps", "now", "peft_adapter",
           "peft_model", "quiet", "sft_trainer"]  # fmt: skip


def gpt2_folder(folder: str | Path, *, n_layer=2, n_head=2, n_embd=32, block_size=128, vocab_size=97, seed=0,
                tied=True) -> Path:  # fmt: skip
    """A random GPT2LMHeadModel without dropout, as transformers saves it. Its weights are larger than GPT-2's
    initialisation, so that log-probs, and with them rewards, differ visibly between tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1,
                        tie_word_embeddings=tied,
                        bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1)  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, p in model.named_parameters():  # biases and layer-norm scales too: zeros and ones would hide mistakes
            if name.endswith("bias") or p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(str(folder))
    return Path(folder)


def peft_adapter(base: str | Path, folder: str | Path, **settings) -> Path:
    """An adapter for the model in `base`, none of its values zero, made and saved by peft. `settings` are LoraConfig's."""
    import peft
    import torch
    import transformers

    torch.manual_seed(3)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model = peft.get_peft_model(model, peft.LoraConfig(fan_in_fan_out=True, task_type="CAUSAL_LM", **settings))
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, 0, 0.1)
        model.save_pretrained(folder)
    return Path(folder)


def peft_model(base: str | Path, adapter: str | Path, trainable: bool = False):
    """transformers' model in `base` with an adapter that peft has loaded."""
    import peft
    import transformers

    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=trainable).train(trainable)
