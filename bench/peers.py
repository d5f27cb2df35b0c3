"""The other side of comparisons: TRL's trainers, lm-evaluation-harness and transformers' `generate`, on given data.

The bench and the tests share it. The peers are imported where they are used, so this file imports without them.
"""

import contextlib
import os
import time
from pathlib import Path
from unittest import mock


@contextlib.contextmanager
def quiet():
    """Inside, transformers, trl and datasets print no progress bars and no advice."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with mock.patch.dict(os.environ, TQDM_DISABLE="1"):
        yield


def now() -> tuple[float, float]:
    """Seconds on the wall clock, and of CPU time of this process (all threads), which other processes cannot disturb."""
    return time.perf_counter(), time.process_time()


def _watch(sync):
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """`logs`: what every step logged. `ends`: when it ended (`now()`, after `sync()`)."""

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


def _dataset(rows: list[dict] | Path, columns: tuple[str, ...], cache: Path):
    """Texts as a Dataset. What TRL computes from a .jsonl file (tokens, reference log-probs) it keeps in `cache`, so that
    another process with the same file and model need not compute it again."""
    from datasets import Dataset

    if isinstance(rows, Path):
        return Dataset.from_json(str(rows), cache_dir=str(cache)).select_columns(list(columns))
    return Dataset.from_list([{name: row[name] for name in columns} for row in rows])


def _trainer(trainer_class, config_class, columns: tuple[str, ...], folder, rows, out, sync, settings: dict, **more):
    """(trainer, watch) with what both trainers share: float32, constant rate, the data's order, nothing saved or reported."""
    import torch
    from transformers import AutoTokenizer, PrinterCallback

    defaults = {
        "output_dir": str(out), "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "use_cpu": not torch.cuda.is_available(), "bf16": False, "gradient_checkpointing": False,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "num_train_epochs": 1,
    }  # fmt: skip
    watch = _watch(sync)
    with quiet():
        data = _dataset(rows, columns, Path(out) / "cache")
        args = config_class(**defaults | settings)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        same = {"args": args, "train_dataset": data, "processing_class": tokenizer, "callbacks": [watch]}
        trainer = trainer_class(**{"model": str(folder)} | same | more)
        trainer.remove_callback(PrinterCallback)
    return trainer, watch


def dpo_trainer(
    folder: str | Path, pairs: list[dict] | Path, out: str | Path, *, model=None, ref_model=None, sync=None, **settings
):
    """TRL's DPOTrainer on texts {"prompt","chosen","rejected"}. -> (trainer, watch). `folder` has the tokenizer and, where
    `model` is not given, the model.

    `settings` are DPOConfig's own names. `watch` fills as `trainer.train()` runs, see `Watch`. The reference is `ref_model`,
    or the model itself, and its log-probs are computed beforehand.
    """
    from trl import DPOConfig, DPOTrainer

    settings = {"precompute_ref_log_probs": True} | settings
    columns = ("prompt", "chosen", "rejected")
    return _trainer(
        DPOTrainer, DPOConfig, columns, folder, pairs, out, sync, settings, ref_model=ref_model, model=model or str(folder)
    )


def sft_trainer(folder: str | Path, rows: list[dict] | Path, out: str | Path, *, sync=None, **settings):
    """TRL's SFTTrainer on texts {"prompt","completion"}, loss on the completion only. -> (trainer, watch) as above."""
    from trl import SFTConfig, SFTTrainer

    settings = {"completion_only_loss": True} | settings
    return _trainer(SFTTrainer, SFTConfig, ("prompt", "completion"), folder, rows, out, sync, settings)


def generator(folder: str | Path, device: str = "cpu", dtype: str = "float32", attn_implementation: str = "sdpa"):
    """transformers' GPT2LMHeadModel, told not to stop at end of text: every completion has its full length."""
    import torch
    from transformers import GPT2LMHeadModel

    how = {"dtype": getattr(torch, dtype), "attn_implementation": attn_implementation}
    with quiet():
        model = GPT2LMHeadModel.from_pretrained(str(folder), **how)
    model.generation_config.eos_token_id = None
    return model.eval().to(device)


def generate(model, prompts: list[list[int]], new: int, batch_size: int, by_length: bool = False) -> list[list[int]]:
    """Its greedy `generate`, padded on the left, in the order given or longest first; the new tokens of each prompt."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if by_length else range(len(prompts))
    out: dict[int, list[int]] = {}
    for at in range(0, len(prompts), batch_size):
        group = order[at : at + batch_size]
        rows = [torch.tensor(prompts[i], device=model.device) for i in group]
        ids, mask = (
            pad_sequence(parts, batch_first=True, padding_side="left")
            for parts in (rows, [torch.ones_like(row) for row in rows])
        )
        with torch.no_grad():
            found = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        out |= dict(zip(group, found[:, ids.size(1) :].tolist(), strict=True))
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
