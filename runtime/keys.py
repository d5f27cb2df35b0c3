"""The keys that several scripts share, by subject. A script's Config inherits the groups that it needs."""

from dataclasses import dataclass

from base.errors import UserError
from base.files import check_there
from data import check_data
from runtime.config import REQUIRED, key
from runtime.optim import OPTIMIZERS
from weights import check_model

# what a run leaves in its folder, beside config.toml
OURS = ("checkpoints", "model", "adapter", "metrics.jsonl", "wandb_id", "tensorboard")
SCRATCH = ("n_layer", "n_head", "n_embd", "block_size")
DTYPES = ("auto", "float32", "bfloat16")
MOST_SEED = 2**63 - 1


@dataclass
class ModelKeys:
    """Model"""

    init_from: str = key(
        "gpt2",
        "gpt2 (-medium, …), owner/name on the hub, a folder (model, adapter, run), or scratch",
        model=True,
        reads=check_model,
    )
    tokenizer: str = key("auto", "gpt2, toy, toy_math, a folder, owner/name, or auto = the one of init_from (gpt2 for scratch)")
    n_layer: int = key(0, "scratch: number of blocks", least=0)
    n_head: int = key(0, "scratch: attention heads per block", least=0)
    n_embd: int = key(0, "scratch: width", least=0)
    block_size: int = key(0, "scratch: positions, the most tokens of prompt + completion", least=0)


@dataclass
class ChatKeys:
    """Conversations"""

    chat_template: str = key("", "a Jinja file, to use instead of the model's own chat template", reads=check_there)
    chat_template_kwargs: str = key("", "more variables for the chat template, a JSON object")
    date: str = key(
        "", "the day that a chat template may write, YYYY-MM-DD; empty = that of out_dir's run or of ref, else today"
    )


@dataclass
class FileKeys:
    """Data files"""

    columns: str = key("", "columns of a file by your names for them: prompt=question,chosen=a,rejected=b; empty = as they are")
    min_gap: float = key(0.0, "of completions with scores: how far two scores must be apart to be a pair", least=0)
    data_dir: str = key("", "folder that holds a recipe's files, instead of downloading them", reads=check_there)


@dataclass
class DataKeys(ChatKeys, FileKeys):
    """Data"""

    data: str = key(
        REQUIRED,
        "a recipe (toy, hh, alpaca, …), files (.jsonl, .json, .csv, .parquet; a.jsonl,b.jsonl or part-*.jsonl), or "
        "hub:owner/name[:config]",
        reads=check_data,
    )
    val_data: str = key("", "the same for validation; empty = the recipe's own, none for a file", reads=check_data)
    val_share: float = key(0.0, "in place of val_data: a share of data's prompts, drawn by their hash", least=0, below=1)
    split: str = key("train", "the split of data to train on")
    val_split: str = key("", "the split for validation: of val_data, else of data; empty = val")
    limit: int = key(0, "use only the first so many training problems, 0 = all", least=0)
    val_limit: int = key(1000, "use only the first so many validation problems, 0 = all", least=0)
    max_len: int = key(0, "most tokens of prompt + completion, 0 = the model's context", least=0)
    truncation: str = key("drop", "what to do with longer ones: drop them, or cut the prompt's start", ["drop", "left"])
    add_eos: bool = key(True, "put end-of-text behind each completion; false where texts were cut off at some length")
    on_mismatch: str = key(
        "error", "what to do with a conversation that does not begin with what asks for its answer", ["error", "drop"]
    )


@dataclass
class RunKeys:
    """Run"""

    out_dir: str = key(REQUIRED, "the run folder; a run that is there is resumed", replaces=OURS, free=True)
    overwrite: bool = key(False, "delete the run that out_dir holds and start anew", free=True)
    epochs: float = key(1.0, "passes over the data", least=0)
    max_steps: int = key(0, "optimizer steps; above 0 it counts instead of epochs", least=0)
    batch_size: int = key(64, "examples or pairs per optimizer step, over all ranks", least=1)
    shuffle: bool = key(True, "train in an order drawn by seed, anew each epoch; false = in the data's order")
    row_len: int = key(0, "tokens of a packed row, 0 = one example a row; on CUDA micro_tokens", least=0, free=True)
    dropout: float = key(0.0, "dropout in training (GPT-2 was trained with 0.1)", least=0, below=1)
    eval_every: int = key(100, "steps between validations (and one at the end), 0 = only at the end", least=0)
    save_every: int = key(500, "steps between checkpoints (and one at the end), 0 = only at the end", least=0, free=True)
    keep: int = key(2, "newest checkpoints to keep, beside the best one; 0 = none at the end", least=0, free=True)
    samples: int = key(2, "validation prompts to complete and print at each validation", least=0, free=True)
    wandb: str = key("", "wandb project to log to, empty = none", free=True)
    tensorboard: bool = key(False, "write the metrics for TensorBoard too, in out_dir/tensorboard", free=True)


@dataclass
class OptimizerKeys:
    """Optimizer and schedule"""

    lr: float = key(1e-5, "peak learning rate", least=0)
    min_lr: float = key(0.0, "learning rate at the schedule's end", least=0)
    warmup: float = key(0.0, "steps of linear warmup, or a share of the run if below 1", least=0)
    schedule: str = key("cosine", "shape of the learning rate after warmup", ["cosine", "linear", "constant"])
    optimizer: str = key("adamw", "update rule", OPTIMIZERS)
    adam_beta1: float = key(0.9, "decay of AdamW's mean of gradients", least=0, below=1)
    adam_beta2: float = key(0.999, "decay of AdamW's mean of squares", least=0, below=1)
    weight_decay: float = key(0.0, "decoupled weight decay of matrices and embeddings", least=0)
    grad_clip: float = key(1.0, "largest global gradient norm, 0 = no clipping", least=0)


@dataclass
class LoRAKeys:
    """Low-rank adapters (LoRA)"""

    lora_rank: int = key(0, "train adapters of this rank beside frozen weights, 0 = train the weights", least=0)
    lora_alpha: float = key(0.0, "an adapter's output is scaled by alpha / rank; 0 = the rank, so scaled by 1", least=0)
    lora_dropout: float = key(0.0, "dropout on what goes into an adapter", least=0, below=1)
    lora_targets: str = key(
        "",
        "names of the layers with an adapter (GPT-2: attn.qkv attn.proj mlp.fc mlp.proj head; Llama: q_proj k_proj v_proj "
        "o_proj gate_proj up_proj down_proj head); empty = all",
    )
    lora_rslora: bool = key(False, "scale by alpha / sqrt(rank) instead (rank-stabilised)")


@dataclass
class ServerKeys:
    """Server"""

    api_key_env: str = key("", "environment variable with the API key; empty = OPENAI_API_KEY (for gemini GEMINI_API_KEY)")
    tries: int = key(6, "times that a request is sent until it is answered", least=1)
    timeout: float = key(60.0, "seconds to wait for a whole answer", above=0)
    workers: int = key(8, "requests at a time", least=1)
    max_calls: int = key(0, "most answers to pay for, 0 = no limit", least=0)


@dataclass
class DeviceKeys:
    """Machine"""

    seed: int = key(0, "seed of all that is drawn: data order, scratch weights, dropout, samples", least=0, most=MOST_SEED)
    device: str = key("auto", "auto, cpu, cuda, cuda:1, …", free=True)
    dtype: str = key("auto", "dtype of matrix products; auto = bfloat16 on CUDA that has it, else float32", DTYPES)
    micro_tokens: int = key(
        4096,
        "most tokens in one forward, padding included; 0 = what fits: 1024 to 16384 on CUDA, else 4096",
        least=0,
        free=True,
    )


@dataclass
class SpeedKeys:
    """Speed and memory"""

    compile: str = key(
        "auto", "torch.compile each block; auto = on CUDA, where Triton is installed", ("auto", "true", "false"), free=True
    )
    activation_checkpointing: bool = key(
        False, "keep only each block's input for the backward pass: less memory, 1/3 more time", free=True
    )
    replicate: int = key(
        0,
        "copies of the sharded model (say, the number of nodes), 0 = 1, or one a process if it fits",
        least=0,
        free=True,
    )


@dataclass
class TrainKeys(ModelKeys, DataKeys, RunKeys, OptimizerKeys, LoRAKeys, DeviceKeys, SpeedKeys):
    """What every training stage can be told."""

    def check(self) -> None:
        if self.max_steps == 0 and self.epochs == 0:
            raise UserError("key epochs: 0.0 must be above 0 (or give max_steps)")
        if self.min_lr > self.lr:
            raise UserError(f"key min_lr: {self.min_lr} is above lr {self.lr}")
        for name in ("lora_targets", "lora_alpha", "lora_dropout", "lora_rslora"):
            if getattr(self, name) and not self.lora_rank:
                raise UserError(f"key {name}: given, but lora_rank is 0: give a rank above 0, or leave {name} out")
