"""The other side of comparisons: transformers' models, peft's adapters, TRL's trainers and lm-evaluation-harness.

The tests and the benches share it. The libraries are imported where they are used: this file imports without them.
"""

import contextlib
import os
import time
from pathlib import Path

EOT = "<|endoftext|>"


class Ids:
    """A tokenizer whose text is the ids themselves: " 3 17 5" <-> [3, 17, 5]; the last id of `size` is end of text.

    It makes texts of exact token counts without a vocabulary file; `save` writes the same tokenizer for transformers.
    """

    name = "ids"

    def __init__(self, size: int):
        self.size, self.eot = size, size - 1

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {i}" for i in ids)

    def fingerprint(self) -> str:
        return f"ids {self.size}"

    def save(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocab = {str(i): i for i in range(self.size - 1)} | {EOT: self.eot}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=EOT))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOT, pad_token=EOT).save_pretrained(str(folder))


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


@contextlib.contextmanager
def quiet():
    """Inside, transformers, trl and datasets print no progress bars and no advice."""
    import datasets
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    old, os.environ["TQDM_DISABLE"] = os.environ.get("TQDM_DISABLE"), "1"
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        os.environ.pop("TQDM_DISABLE") if old is None else os.environ.update(TQDM_DISABLE=old)


def now() -> tuple[float, float]:
    """Seconds on the wall clock and of CPU time of this process (all its threads): the latter is what others cannot disturb."""
    return time.perf_counter(), time.process_time()


def _watch(sync):
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """What every step logged, and when it ended."""

        def __init__(self):
            self.logs: list[dict] = []
            self.ends: list[tuple[float, float]] = []

        def on_step_end(self, args, state, control, **kwargs):
            if sync:
                sync()
            self.ends.append(now())

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs and "loss" in logs:
                self.logs.append(dict(logs))

    return Watch()


def _args(out_dir: str | Path, settings: dict) -> dict:
    """Settings that both trainers share: float32, constant rate, the data's own order, nothing saved or reported."""
    import torch

    defaults = {
        "output_dir": str(out_dir), "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "use_cpu": not torch.cuda.is_available(), "bf16": False, "gradient_checkpointing": False,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "num_train_epochs": 1,
    }  # fmt: skip
    return defaults | settings


def _dataset(rows: list[dict] | Path, columns: tuple[str, ...], cache: str | Path):
    """Texts as a Dataset. From a .jsonl file TRL keeps what it computes from it (tokens, reference log-probs) in `cache`,
    so that another process with the same file and model need not compute them again."""
    from datasets import Dataset

    if isinstance(rows, Path):
        return Dataset.from_json(str(rows), cache_dir=str(cache)).select_columns(list(columns))
    return Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def _trainer(trainer_class, config_class, folder, model, rows, columns, out, sync, settings: dict, **more):
    from transformers import AutoTokenizer, PrinterCallback

    watch = _watch(sync)
    with quiet():
        trainer = trainer_class(
            model=model or str(folder),
            args=config_class(**_args(out, settings)),
            train_dataset=_dataset(rows, columns, Path(out) / "cache"),
            processing_class=AutoTokenizer.from_pretrained(folder),
            callbacks=[watch],
            **more,
        )
        trainer.remove_callback(PrinterCallback)
    return trainer, watch


def dpo_trainer(
    folder: str | Path, pairs: list[dict] | Path, out: str | Path, *, model=None, ref_model=None, sync=None, **settings
):
    """TRL's DPOTrainer on texts {"prompt","chosen","rejected"}; `folder` has the tokenizer and, where `model` is not given,
    the model. -> (trainer, watch).

    `settings` are DPOConfig's own names. `watch.logs` has a dict a step once `trainer.train()` has run, `watch.ends` each
    step's end (`now()`, after `sync()`). The reference is `ref_model`, or the model itself, and precomputed.
    """
    from trl import DPOConfig, DPOTrainer

    columns, settings = ("prompt", "chosen", "rejected"), {"precompute_ref_log_probs": True} | settings
    return _trainer(DPOTrainer, DPOConfig, folder, model, pairs, columns, out, sync, settings, ref_model=ref_model)


def sft_trainer(folder: str | Path, rows: list[dict] | Path, out: str | Path, *, sync=None, **settings):
    """TRL's SFTTrainer on texts {"prompt","completion"}, loss on the completion only. -> (trainer, watch) as above."""
    from trl import SFTConfig, SFTTrainer

    columns, settings = ("prompt", "completion"), {"completion_only_loss": True} | settings
    return _trainer(SFTTrainer, SFTConfig, folder, None, rows, columns, out, sync, settings)


def generator(folder: str | Path, device: str = "cpu", dtype: str = "float32", attn_implementation: str = "sdpa"):
    """transformers' GPT2LMHeadModel, told not to stop at end of text: every completion has its full length."""
    import torch
    from transformers import GPT2LMHeadModel

    with quiet():
        model = GPT2LMHeadModel.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), attn_implementation=attn_implementation
        )
    model.generation_config.eos_token_id = None
    return model.eval().to(device)


def generate(model, prompts: list[list[int]], new: int, batch_size: int, by_length: bool = False) -> list[list[int]]:
    """Its greedy `generate`, padded on the left, in the order given or longest first; the new tokens of each prompt."""
    import torch

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if by_length else range(len(prompts))
    out: dict[int, list[int]] = {}
    for at in range(0, len(prompts), batch_size):
        group = order[at : at + batch_size]
        longest = max(len(prompts[i]) for i in group)
        ids = torch.tensor([[0] * (longest - len(prompts[i])) + prompts[i] for i in group], device=model.device)
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in group], device=model.device)
        with torch.no_grad():
            found = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        out |= dict(zip(group, found[:, longest:].tolist(), strict=True))
    return [out[i] for i in range(len(prompts))]


def harness(folder: str | Path, batch_size: int = 8, device: str = "cpu", dtype: str = "float32"):
    """lm-evaluation-harness's own model class on a folder with model and tokenizer."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(pretrained=str(folder), tokenizer=str(folder), batch_size=batch_size, device=device, dtype=dtype)


def harness_logps(lm, docs: list[tuple[str, list[str]]]) -> list[list[float]]:
    """Its log-likelihood of every option of (prompt, options) documents, options with their leading space."""
    from lm_eval.api.instance import Instance

    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(prompt, option), idx=i)
        for prompt, options in docs
        for i, option in enumerate(options)
    ]
    flat = iter(lm.loglikelihood(requests, disable_tqdm=True))
    return [[next(flat)[0] for _ in options] for _, options in docs]
