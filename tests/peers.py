"""Tiny random GPT-2 folders as transformers saves them, adapters as peft does, and the peers of bench/peers.py."""

import importlib
from pathlib import Path
from unittest import mock

from bench.peers import _trainer, dpo_trainer, generate, generator, harness, harness_logps, now, quiet, sft_trainer

__all__ = ["dpo_trainer", "free_trainer", "generate", "generator", "gpt2_folder", "harness", "harness_logps", "kto_trainer",
           "now", "peft_adapter", "peft_model", "quiet", "sft_trainer"]  # fmt: skip


def free_trainer(name: str, folder: str | Path, pairs: list[dict], out: str | Path, **settings):
    """TRL's CPOTrainer or ORPOTrainer ("cpo", "orpo") on texts {"prompt","chosen","rejected"}, with no token before a prompt
    that is not empty. -> (trainer, watch)."""
    package = f"trl.experimental.{name}"
    module, add = importlib.import_module(package), importlib.import_module("trl.experimental.utils").add_bos_token_if_needed

    def only_if_empty(bos, n, prompt, n_chosen, chosen, n_rejected, rejected):
        return (prompt, chosen, rejected) if n else add(bos, n, prompt, n_chosen, chosen, n_rejected, rejected)

    classes = (getattr(module, f"{name.upper()}{kind}") for kind in ("Trainer", "Config"))
    with mock.patch(f"{package}.{name}_trainer.add_bos_token_if_needed", only_if_empty):
        trainer, watch = _trainer(*classes, ("prompt", "chosen", "rejected"), folder, pairs, out, None, settings)
    pad = trainer.processing_class.eos_token_id
    trainer.pad_token_id = trainer.padding_value = trainer.data_collator.pad_token_id = pad
    return trainer, watch


def kto_trainer(folder: str | Path, rows: list[dict], out: str | Path, *, ref_model, **settings):
    """TRL's KTOTrainer on {"prompt","completion","label"}, texts or messages. -> (trainer, watch)."""
    from trl import KTOConfig, KTOTrainer

    columns = ("prompt", "completion", "label")
    return _trainer(KTOTrainer, KTOConfig, columns, folder, rows, out, None, settings, ref_model=ref_model)


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
