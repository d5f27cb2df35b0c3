"""This project and its peers, side by side: the same work in one run, every measurement in a process of its own.

    python bench.py --suite dpo --pairs 32 --out dpo.json        dpo.py against TRL's DPOTrainer; --suite sft likewise
    python bench.py --suite mcq --pairs 100 --out mcq.json       eval_mcq.py against lm-evaluation-harness
    python bench.py --suite sample --out sample.json             GPT.stream against transformers' generate, batch 1 and 16
    python bench.py --suite gpu --out gpu.json                   correct and fast on a GPU: needs nothing but torch

Weights are random (their values do not change the time), data real where a file is given or found. Both sides get the same
tokens in the same order; losses or log-likelihoods stand side by side as proof that the work was the same. Timed is the
steady state: after loading, the reference pass and a warm-up, to the end of the last step, nothing saved. The floor is what
the useful tokens cost (each once: a prompt is not counted again for each of its completions) at the rate of a large matrix
product measured in the same run.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

import weights
from base.errors import UserError, run
from data import Example, load, tokenizer
from data.encode import Encoded, encode
from data.plan import epoch_order
from model import SIZES
from runtime import config, distributed
from runtime.config import key
from runtime.log import peak_flops
from tests import peers

SHAPES = SIZES | {"tiny": (2, 2, 64)}
VOCAB, CONTEXT = 50257, 1024
SHARED = Path(__file__).resolve().parent.parent / "shared" / "data"
FILES = {"hh": "hh_harmless_base_test.jsonl.gz", "hellaswag": "hellaswag_val.jsonl.gz", "mcq": "hellaswag_val.jsonl.gz"}
# mean and standard deviation of log token counts, prompt then completion, fitted to those files with GPT-2's tokenizer
LENGTHS = {"hh": (4.37, 1.00, 3.47, 0.90), "hellaswag": (5.03, 0.45, 3.19, 0.59), "mcq": (3.77, 0.45, 3.15, 0.62)}
# What a peer can be told that does not change the work: all of it is tried on a few examples, the fastest is compared with.
# KEEP has glibc keep freed memory: on a CPU the peers spend much of their time in page faults on gigabytes of fresh logits.
# (With whole batches in a forward it makes TRL's memory grow past 14 GB for GPT-2 124M, so it is not tried there.)
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
TRL_SETTINGS = {
    "TRL as it comes": {"gradient_checkpointing": True},
    "TRL, no checkpointing": {"gradient_checkpointing": False},
    "TRL, one example a forward": {"gradient_checkpointing": False, "per_device_train_batch_size": 1},
    "TRL, one a forward, memory kept": {"gradient_checkpointing": False, "per_device_train_batch_size": 1, "env": KEEP},
}
HARNESS_SETTINGS = {f"lm_eval, batch {n}": {"batch_size": n} for n in (1, 4, 16)}
HARNESS_SETTINGS |= {f"{name}, memory kept": s | {"env": KEEP} for name, s in HARNESS_SETTINGS.items()}
TRANSFORMERS_SETTINGS = {
    "transformers as it comes": {},
    "transformers, longest prompts first": {"by_length": True},
    "transformers, eager attention": {"attn_implementation": "eager", "by_length": True},
    "transformers, memory kept": {"by_length": True, "env": KEEP},
}
NEW_TOKENS = 64  # of a completion, in the suite sample
GPU_SETTINGS = {  # of this project's scripts
    "plain": {},
    "compiled": {"compile": "true"},
    "packed": {"row_len": 4096},
    "activation checkpointing": {"activation_checkpointing": "true"},
}


@dataclass
class Config:
    """This project and its peers, side by side."""

    suite: str = key("dpo", "what to compare", ["dpo", "sft", "mcq", "sample", "gpu"])
    peer: str = key(
        "auto",
        "with whom; auto = trl (mcq: lm_eval, sample: transformers) if it is installed",
        ["auto", "trl", "lm_eval", "transformers", "none"],
    )
    init: str = key("gpt2", "a GPT-2 size (or tiny) to fill with random weights, or a model folder")
    data: str = key("", "preference pairs (mcq: problems); empty = the known file if it is there, else generated ones")
    pairs: int = key(0, "pairs (sft: examples, mcq: problems, sample: prompts) to time after a warm-up, 0 = 8 steps (mcq: 100)")
    batch_size: int = key(0, "pairs or examples an optimizer step, 0 = 4, on CUDA 64; sample: prompts at once, 0 = 1, then 16")
    micro_tokens: int = key(0, "most tokens in one forward of ours, 0 = the script's own default")
    peer_setting: str = key("", "try only the peer's settings whose name holds this, empty = all of them")
    repeats: int = key(3, "measurements of each side, taken in turns")
    threads: int = key(0, "CPU threads, 0 = one a core")
    device: str = key("auto", "auto, cpu or cuda")
    dtype: str = key("auto", "dtype of matrix products on both sides: bfloat16 on CUDA that has it, else float32")
    lr: float = key(1e-5, "learning rate, constant")
    seed: int = key(0, "seed of weights, generated data and order")
    models: str = key("gpt2,gpt2-medium,gpt2-large,gpt2-xl", "gpu: sizes, with commas between")
    minutes: float = key(9.0, "gpu: no measurement is begun later than this")
    out: str = key("", "JSON file for everything measured")

    def check(self) -> None:
        for name, least in {"pairs": 0, "batch_size": 0, "repeats": 1, "threads": 0, "micro_tokens": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"key {name}: {getattr(self, name)} is too small, the least is {least}")
        self.device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.threads = self.threads or os.cpu_count() or 1
        wrong = {
            "lm_eval": ("dpo", "sft", "sample", "gpu"),
            "trl": ("mcq", "sample"),
            "transformers": ("dpo", "sft", "mcq", "gpu"),
        }
        if self.suite in wrong.get(self.peer, ()):
            raise UserError(f"key peer: {self.peer} cannot do {self.suite}: leave it auto")
        if self.suite == "sample":
            return
        self.batch_size = self.batch_size or (4 if self.device == "cpu" else 64)
        self.pairs = self.pairs or (100 if self.suite == "mcq" else 8 * self.batch_size)
        if self.suite != "mcq" and self.pairs % self.batch_size:
            raise UserError(f"key pairs: {self.pairs} is no multiple of batch_size {self.batch_size}")
        if self.batch_size > 8 and self.batch_size % 8:
            raise UserError(f"key batch_size: {self.batch_size} must be a multiple of 8, TRL's examples a forward, if above 8")
        for name in self.models.split(","):
            if name not in SHAPES:
                raise UserError(f"key models: {name!r} is not one of {', '.join(SHAPES)}")


# --- the work: data, weights, and what they cost --------------------------------------------------------------------------


@dataclass
class Work:
    """What both sides get: a folder with weights and tokenizer, the examples as texts, and what is known about them."""

    folder: Path
    tokenizer: str
    ours: Path  # our order is drawn from the seed, so this file is in the data's order …
    theirs: Path  # … and this one in the order of training
    items: list[Encoded]  # in the order of training
    shape: tuple[int, int, int]
    said: str


def generated(kind: str, n: int, seed: int, tokenizer) -> list[dict]:
    """`n` examples of random tokens whose counts are log-normal, as in the real data."""
    rng = random.Random(seed)
    p_mean, p_sd, c_mean, c_sd = LENGTHS[kind]

    def text(mean: float, sd: float, most: int) -> str:
        length = min(most, max(2, round(rng.lognormvariate(mean, sd))))
        return tokenizer.decode([rng.randrange(tokenizer.eot) for _ in range(length)])

    def completions(k: int) -> list[str]:
        return [text(c_mean, c_sd, 200) for _ in range(k)]

    prompts = [text(p_mean, p_sd, 800) for _ in range(n)]
    if kind == "mcq":
        return [{"prompt": p, "choices": completions(4), "label": rng.randrange(4)} for p in prompts]
    return [pair(p, *completions(2)) for p in prompts]


def pair(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "completion": chosen}  # the last one for SFT


def real(path: str, kind: str, n: int, seed: int, tokenizer) -> list[dict]:
    """`n` examples of a file, drawn by the seed, that fit the context and tokenize alike in one piece and in two."""
    examples = load(path, "val", "loglik" if kind == "mcq" else "preference")
    random.Random(seed).shuffle(examples)
    rows = []
    for e in examples:
        prompt = tokenizer.encode(e.prompt)
        ends = [tokenizer.encode(c) for c in e.completions]
        whole = [tokenizer.encode(e.prompt + c) for c in e.completions]
        if prompt and whole == [prompt + c for c in ends] and len(prompt) + max(map(len, ends)) < CONTEXT:
            if kind == "mcq":
                rows.append({"prompt": e.prompt, "choices": list(e.completions), "label": e.label})
            else:
                rows.append(pair(e.prompt, *e.completions))
        if len(rows) == n:
            return rows
    raise UserError(f"key pairs: {path} has only {len(rows)} usable examples of {n} needed, warm-up included: ask for fewer")


def texts(cfg: Config, kind: str, n: int) -> tuple[list[dict], tokenizer.Tokenizer | peers.Ids, str]:
    """`n` examples as texts, the tokenizer for them, and where they come from. Real ones need GPT-2's vocabulary."""
    path = Path(cfg.data) if cfg.data else SHARED / FILES[kind]
    gpt2 = None
    if cfg.data or path.is_file():
        try:
            gpt2 = tokenizer.get("gpt2")
        except UserError:
            if cfg.data:
                raise
    if gpt2:
        return real(str(path), kind, n, cfg.seed, gpt2), gpt2, f"{path.name}, drawn at random"
    ids = peers.Ids(VOCAB)
    return generated(kind, n, cfg.seed, ids), ids, f"generated tokens, lengths log-normal as fitted to {FILES[kind]}"


def prepare(cfg: Config, temp: Path, init: str, kind: str, stage: str, n: int) -> Work:
    """Weights, tokenizer and the data files of `n` examples, as `kind` of data and for a `stage`, made once in `temp`."""
    rows, tok, said = texts(cfg, kind, n)
    folder = temp / Path(init).name
    if not folder.exists():
        if init in SHAPES:
            sizes = dict(zip(("n_layer", "n_head", "n_embd"), SHAPES[init], strict=True))
            weights.save(weights.load("scratch", seed=cfg.seed, block_size=CONTEXT, vocab_size=VOCAB, **sizes), tok, folder)
        else:
            weights.save(weights.load(init), tok, folder)
    shape = weights.read_config(folder / "config.json")

    order = list(range(n)) if kind == "mcq" else epoch_order(list(range(n)), cfg.seed, 0)
    files = temp / f"{stage}_{kind}.jsonl", temp / f"{stage}_{kind}_in_order.jsonl"
    for file, places in zip(files, (range(n), order), strict=True):
        file.write_text("".join(json.dumps(rows[i]) + "\n" for i in places))
    fields = {"dpo": ("chosen", "rejected"), "sft": ("completion",)}
    examples = [
        Example(r["prompt"], tuple(r["choices"]) if kind == "mcq" else tuple(r[f] for f in fields[stage]), r.get("label"))
        for r in (rows[i] for i in order)
    ]
    items, _ = encode(examples, tok, CONTEXT, "drop", end=kind != "mcq")
    assert len(items) == n, "an example was dropped"
    return Work(folder, tok.name, *files, items, (shape.n_layer, shape.n_head, shape.n_embd), said)


def flops(items: list[Encoded], shape: tuple[int, int, int], *, train: bool) -> float:
    """Operations that the useful tokens cost: 2 a weight and token, 4 n_embd a layer for every key that a token attends to,
    2 a weight of the vocabulary projection at positions that predict; three times that with the backward pass.

    A prompt counts once whatever the number of its completions; a completion's last token is never fed.
    """
    n_layer, _, width = shape
    total = 0.0
    for item in items:
        p, fed = len(item.prompt), [len(c) - 1 for c in item.completions]
        keys = p * (p + 1) / 2 + sum(f * p + f * (f + 1) / 2 for f in fed)
        total += n_layer * (24 * width**2 * (p + sum(fed)) + 4 * width * keys) + 2 * width * VOCAB * item.completion_tokens
    return total * (3 if train else 1)


# --- the measurements: each runs in a fresh process and returns a dict ---------------------------------------------------


def peak_mb(device: str) -> float:
    """Most memory this process ever had: allocated on the GPU, else resident (not ru_maxrss, which a child inherits)."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    except (OSError, IndexError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (2**20 if platform.system() == "Darwin" else 2**10)


def script(name: str, arguments: dict) -> None:
    """Run one of our scripts in this process."""
    sys.argv = [name + ".py", *(f"--{k}={v}" for k, v in arguments.items())]
    status = importlib.import_module(name).main()
    if status:
        raise RuntimeError(f"{name}.py ended with {status}")


def ours_train(job: dict) -> dict:
    """sft.py or dpo.py as they are, but for saving, watched at the end of every step."""
    from runtime.run import Run

    ends, records = [], []
    log_step = Run.log_step

    def watched(self, step, record, *rest):
        log_step(self, step, record, *rest)
        ends.append(peers.now())
        records.append(record)

    Run.log_step = watched
    Run.save = Run.finish = lambda *_: None
    script(job["stage"], job["arguments"])
    return {"ends": ends, "records": records}


def ours_reference(job: dict) -> dict:
    script("precompute_ref", job["arguments"])
    return {}


def trl_train(job: dict) -> dict:
    """TRL's trainer on the same texts; nothing is saved, and its reference pass is over (or cached) before the clock runs."""
    sync = torch.cuda.synchronize if job["device"] != "cpu" else None
    make = {"dpo": peers.dpo_trainer, "sft": peers.sft_trainer}[job["stage"]]
    settings = {name: value for name, value in job["settings"].items() if name != "env"}
    trainer, watch = make(job["folder"], Path(job["data"]), job["temp"], sync=sync, **settings)
    with peers.quiet():
        trainer.train()
    return {"ends": watch.ends, "records": watch.logs}


def ours_mcq(job: dict) -> dict:
    """eval_mcq.evaluate, the function behind the script, after a warm-up on the first documents."""
    import eval_mcq

    compute = distributed.setup(job["device"], job["dtype"])
    tok = tokenizer.get(job["tokenizer"])
    model = weights.load(job["folder"]).to(compute.device)
    examples = load(job["data"], "val", "loglik")
    settings = {"micro_tokens": job["micro_tokens"] or eval_mcq.Config(model="", data="").micro_tokens}
    warm = job["warmup"]
    eval_mcq.evaluate(model, tok, examples[:warm], "loglik", compute, **settings)
    start = peers.now()
    _, details, _ = eval_mcq.evaluate(model, tok, examples[warm:], "loglik", compute, **settings)
    return {"ends": [start, peers.now()], "logps": [d["logps"] for d in details]}


def harness_mcq(job: dict) -> dict:
    """lm-evaluation-harness's HFLM.loglikelihood, its tokenization within the clock as ours is within our own."""
    lm = peers.harness(job["folder"], job["settings"]["batch_size"], job["device"], job["dtype"])
    rows = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()][: job.get("limit")]
    docs = [(r["prompt"], r["choices"]) for r in rows]
    peers.harness_logps(lm, docs[: job["warmup"]])
    start = peers.now()
    logps = peers.harness_logps(lm, docs[job["warmup"] :])
    return {"ends": [start, peers.now()], "logps": logps}


def ours_sample(job: dict) -> dict:
    """GPT.stream, what sample.py runs, greedy, after a prompt and a few tokens to warm up."""
    import sample

    compute = distributed.setup(job["device"], job["dtype"])
    model = weights.load(job["folder"]).to(compute.device)
    prompts = dict(enumerate(job["prompts"]))
    sample.lay_out(model, job["batch_size"], compute)
    with compute.autocast(), torch.inference_mode():
        list(model.stream({0: prompts[0]}, 4, -1))
        start = peers.now()
        found = {i: ids for i, _, ids in model.stream(prompts, job["new"], -1, batch_size=job["batch_size"])}
    return {"ends": [start, peers.now()], "tokens": [found[i] for i in prompts]}


def transformers_sample(job: dict) -> dict:
    """transformers' generate on the same prompts, greedy, with as many new tokens."""
    settings = {name: value for name, value in job["settings"].items() if name not in ("env", "by_length")}
    model = peers.generator(job["folder"], job["device"], job["dtype"], **settings)
    with peers.quiet():
        peers.generate(model, job["prompts"][:1], 4, 1)
        start = peers.now()
        found = peers.generate(model, job["prompts"], job["new"], job["batch_size"], job["settings"].get("by_length", False))
    return {"ends": [start, peers.now()], "tokens": found}


def reading(job: dict) -> dict:
    """The rate at which memory is read: by the sum of a large matrix."""
    compute = distributed.setup(job["device"], job["dtype"])
    w = torch.ones(VOCAB, 768, device=compute.device, dtype=compute.dtype)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        w.sum().item()  # waits for it
        seconds.append(time.perf_counter() - start)
    return {"bytes_per_s": w.numel() * w.element_size() / min(seconds)}


def matmul(job: dict) -> dict:
    """The rate of a large matrix product, and what it ran on."""
    compute = distributed.setup(job["device"], job["dtype"])
    return {
        "flops_per_s": peak_flops(compute.device, compute.dtype),
        "dtype": str(compute.dtype).removeprefix("torch."),
        "said": f"{compute}; {_cpu()}",
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    try:
        return Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip("\t: ")
    except OSError:
        return platform.processor()


def worker(path: str) -> None:
    """The other end of `measure`: run the job in a file, print its result as the last line."""
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    tokenizer.KNOWN["ids"] = lambda: peers.Ids(VOCAB)
    result = globals()[job["do"]](job)
    print("RESULT " + json.dumps(result | {"peak_mb": peak_mb(job["device"])}))


def measure(temp: Path, do: str, job: dict) -> dict:
    """A job in a fresh process. {"error": last line of stderr} where it fails."""
    path = temp / "job.json"
    path.write_text(json.dumps(job | {"do": do}, default=str))
    env = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    env |= job.get("settings", {}).get("env", {})
    done = subprocess.run([sys.executable, __file__, "--job", str(path)], capture_output=True, text=True, env=env)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode or not last.startswith("RESULT "):
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": said[-1].strip() if said else f"exit status {done.returncode}"}
    return timed(json.loads(last.removeprefix("RESULT ")), job["warmup"])


def timed(result: dict, warmup: int) -> dict:
    """A result with its seconds, by the clock and of the CPU; a training job's count from the end of its warm-up."""
    if "ends" in result:
        ends = result.pop("ends")
        ends = ends[warmup - 1 :] if "records" in result else ends
        (start, start_cpu), (end, end_cpu) = ends[0], ends[-1]
        result |= {"seconds": end - start, "cpu_seconds": end_cpu - start_cpu, "steps": len(ends) - 1}
    return result


# --- the suites ----------------------------------------------------------------------------------------------------------


def installed(cfg: Config) -> str:
    """The peer to compare with, or "none"."""
    name = cfg.peer if cfg.peer != "auto" else {"mcq": "lm_eval", "sample": "transformers"}.get(cfg.suite, "trl")
    if name == "none" or find_spec(name):
        return name
    if cfg.peer != "auto":
        raise UserError(f"key peer: {name} is not installed: pip install {name}, or leave it auto")
    print(f"{name} is not installed: measuring this project alone")
    return "none"


def train_job(cfg: Config, work: Work, temp: Path, stage: str, base: dict, more: dict | None = None) -> dict:
    """What dpo.py or sft.py is asked for; for dpo.py the reference pass is run first, once."""
    arguments = {
        "init_from": work.folder, "data": work.ours, "tokenizer": work.tokenizer, "out_dir": temp / "run",
        "overwrite": "true", "batch_size": cfg.batch_size, "lr": cfg.lr, "schedule": "constant", "seed": cfg.seed,
        "samples": 0, "device": base["device"], "dtype": base["dtype"],
    }  # fmt: skip
    if cfg.micro_tokens:
        arguments["micro_tokens"] = cfg.micro_tokens
    if stage == "dpo":
        ref = work.folder / f"{work.ours.stem}.safetensors"
        if not ref.exists():
            shared = {k: arguments[k] for k in ("init_from", "data", "tokenizer", "device", "dtype")}
            needed(measure(temp, "ours_reference", base | {"arguments": shared | {"out": ref}}))
        arguments["ref"] = ref
    return base | {"stage": stage, "arguments": arguments | (more or {})}


def trl_job(cfg: Config, work: Work, temp: Path, stage: str, base: dict, settings: dict) -> dict:
    per_forward = settings.get("per_device_train_batch_size", min(cfg.batch_size, 8))  # transformers' default is 8
    settings = settings | {
        "per_device_train_batch_size": per_forward, "gradient_accumulation_steps": cfg.batch_size // per_forward,
        "learning_rate": cfg.lr, "use_cpu": base["device"] == "cpu", "bf16": base["dtype"] == "bfloat16", "seed": cfg.seed,
    }  # fmt: skip
    return base | {"stage": stage, "folder": work.folder, "data": work.theirs, "temp": temp / "trl", "settings": settings}


def needed(result: dict) -> dict:
    """A result of ours: a failure is a failure of the whole bench."""
    if "error" in result:
        raise RuntimeError(result["error"])
    return result


def base_job(cfg: Config, temp: Path, warmup: int) -> tuple[dict, dict]:
    """What every job shares, dtype resolved, and the measured rate of a matrix product."""
    job = {"threads": cfg.threads, "device": cfg.device, "dtype": cfg.dtype, "warmup": warmup}
    if cfg.device == "cpu" and os.getloadavg()[0] > 0.5:
        print(f"warning: this machine is busy (load {os.getloadavg()[0]:.1f}): expect figures that are off")
    rate = needed(measure(temp, "matmul", job))
    return job | {"dtype": rate["dtype"]}, rate


def chosen(cfg: Config, settings: dict[str, tuple[str, dict]]) -> dict[str, tuple[str, dict]]:
    """The settings of the peer that `peer_setting` is part of the name of."""
    found = {name: job for name, job in settings.items() if cfg.peer_setting in name}
    if not found:
        raise UserError(f"key peer_setting: no setting of the peer has {cfg.peer_setting!r} in its name")
    return found


def fastest(temp: Path, settings: dict[str, tuple[str, dict]], few: dict) -> tuple[str, dict[str, dict]]:
    """Try every setting of the peer on a few examples: (name of the fastest, result of each)."""
    tried = {}
    for name, (do, job) in settings.items():
        short = job | {"settings": job["settings"] | few["settings"]} | {k: v for k, v in few.items() if k != "settings"}
        tried[name] = measure(temp, do, short)
        print(f"trying {name}: {show(tried[name])}", flush=True)
    working = [name for name, result in tried.items() if "error" not in result]
    if not working:
        raise RuntimeError(f"the peer fails in every setting: {next(iter(tried.values()))['error']}")
    return min(working, key=lambda name: tried[name]["seconds"]), tried


def show(result: dict) -> str:
    return result.get("error") or f"{result['seconds']:.2f} s, CPU {result['cpu_seconds']:.2f} s, {result['peak_mb']:.0f} MB"


def compare(cfg: Config, temp: Path) -> dict:
    """The suites dpo, sft and mcq: ours against the peer, a table, and everything as a dict."""
    peer = installed(cfg)
    warmup = 8 if cfg.suite == "mcq" else 1
    n = cfg.pairs + warmup * (1 if cfg.suite == "mcq" else cfg.batch_size)
    work = prepare(cfg, temp, cfg.init, "mcq" if cfg.suite == "mcq" else "hh", cfg.suite, n)
    base, rate = base_job(cfg, temp, warmup)
    if cfg.suite == "mcq":
        job = base | {"folder": work.folder, "data": work.theirs, "tokenizer": work.tokenizer, "micro_tokens": cfg.micro_tokens}
        ours, few = ("ours_mcq", job), {"limit": warmup + 16, "settings": {}}
        theirs = {name: ("harness_mcq", job | {"settings": s}) for name, s in HARNESS_SETTINGS.items()}
    else:
        ours, few = ("ours_train", train_job(cfg, work, temp, cfg.suite, base)), {"settings": {"max_steps": warmup + 2}}
        theirs = {n: ("trl_train", trl_job(cfg, work, temp, cfg.suite, base, s)) for n, s in TRL_SETTINGS.items()}
    theirs = chosen(cfg, theirs)

    # ours and the peer's fastest setting in turns, the peer as it comes once
    results, tried, jobs = {"ours": []}, {}, {"ours": ours}
    if peer != "none":
        best, tried = fastest(temp, theirs, few)
        first = next(iter(theirs))
        jobs |= {name: theirs[name] for name in (best, first)}
    for i in range(cfg.repeats):
        for name, (do, job) in jobs.items():
            if i == 0 or name == "ours" or name == best:
                results.setdefault(name, []).append(measure(temp, do, job))
                print(f"round {i + 1}, {name}: {show(results[name][-1])}", flush=True)
    for name, found in results.items():
        results[name] = [r for r in found if "error" not in r] or found[:1]
    needed(results["ours"][0])
    rate["flops_per_s"] = max(rate["flops_per_s"], needed(measure(temp, "matmul", base))["flops_per_s"])

    items = work.items[n - cfg.pairs :]
    cost = flops(items, work.shape, train=cfg.suite != "mcq")
    floor = cost / rate["flops_per_s"]
    tokens = sum(i.row_tokens for i in items)
    rows = [
        {
            "name": name,
            "seconds": (s := statistics.median(r["seconds"] for r in found)),
            "per_s": cfg.pairs / s,
            "tokens_per_s": tokens / s,
            "cpu_seconds": statistics.median(r["cpu_seconds"] for r in found),
            "peak_mb": statistics.median(r["peak_mb"] for r in found),
            "floors": s / floor,
            "runs": len(found),
        }
        for name, found in results.items()
        if found and "error" not in found[0]
    ]
    unit = {"dpo": "pairs", "sft": "examples", "mcq": "problems"}[cfg.suite]
    layers, heads, width = work.shape
    print(
        f"\n{cfg.suite}: {cfg.init} ({layers} layers, {heads} heads, width {width}, "
        f"{'random weights' if cfg.init in SHAPES else 'its weights'}), {cfg.pairs} {unit} "
        f"after a warm-up of {n - cfg.pairs}, {'' if cfg.suite == 'mcq' else f'batch {cfg.batch_size}, '}{rate['said']}\n"
        f"data: {work.said}; {tokens:,} useful tokens, {sum(i.completion_tokens for i in items):,} of them to predict"
    )
    print(f"\n{'':44}{unit + '/s':>10}{'seconds':>10}{'CPU s':>9}{'tokens/s':>10}{'peak MB':>10}{'x floor':>9}{'runs':>6}")
    for r in rows:
        print(
            f"{r['name']:44}{r['per_s']:10.3f}{r['seconds']:10.2f}{r['cpu_seconds']:9.2f}{r['tokens_per_s']:10.0f}{r['peak_mb']:10.0f}"
            f"{r['floors']:9.2f}{r['runs']:6}"
        )
    for name, found in results.items():
        if found and "error" in found[0]:
            print(f"{name:44}failed: {found[0]['error']}")
    print(f"floor: {cost / 1e12:.2f} TFLOP at {rate['flops_per_s'] / 1e9:.0f} GFLOP/s (matrix product) = {floor:.2f} s")
    report = {"rows": rows, "floor_s": floor, "flops": cost, "matmul": rate, "data": work.said}
    report |= {"results": results, "tried": tried}
    if len(rows) > 1:
        mine, theirs = rows[0], min(rows[1:], key=lambda r: r["seconds"])
        leanest = min(r["peak_mb"] for r in [*rows[1:], *tried.values()] if "error" not in r)
        report["speed_ratio"], report["memory_ratio"] = mine["per_s"] / theirs["per_s"], mine["peak_mb"] / theirs["peak_mb"]
        report["cpu_ratio"] = theirs["cpu_seconds"] / mine["cpu_seconds"]
        report["memory_ratio_to_leanest"] = mine["peak_mb"] / leanest
        print(
            f"\nours is {report['speed_ratio']:.2f}x as fast as {theirs['name']} ({report['cpu_ratio']:.2f}x by CPU time), "
            f"with {report['memory_ratio']:.2f}x its peak memory "
            f"({report['memory_ratio_to_leanest']:.2f}x that of the peer's leanest setting)"
        )
        a, b = results["ours"][0], results[theirs["name"]][0]
        report["same_work"] = same_options(work.items[warmup:], a, b) if cfg.suite == "mcq" else same_steps(a, b)
    return report


def same_steps(ours: dict, theirs: dict) -> dict:
    """Losses (and what else both logged) side by side, a line a step; the largest differences."""
    names = [k for k in ("loss", "grad_norm", "logps/chosen", "logps/rejected") if k in ours["records"][0]]
    print("\nstep" + "".join(f"{'ours ' + k:>22}{'theirs':>14}" for k in names))
    gap = dict.fromkeys(names, 0.0)
    for i, (a, b) in enumerate(zip(ours["records"], theirs["records"], strict=True), start=1):
        print(f"{i:4}" + "".join(f"{a[k]:22.6f}{b[k]:14.6f}" for k in names))
        gap = {k: max(gap[k], abs(a[k] - b[k])) for k in names}
    first = {k: abs(ours["records"][0][k] - theirs["records"][0][k]) for k in names}
    print("largest difference: " + ", ".join(f"{k} {v:.1e}" for k, v in gap.items()))
    return {"largest": gap, "first_step": first}


def same_options(items: list[Encoded], ours: dict, theirs: dict) -> dict:
    """Accuracy on both sides, and the largest difference between their log-likelihoods of an option."""
    gap = max(abs(x - y) for a, b in zip(ours["logps"], theirs["logps"], strict=True) for x, y in zip(a, b, strict=True))
    right = {
        side: sum(s.index(max(s)) == i.label for s, i in zip(r["logps"], items, strict=True)) / len(items)
        for side, r in (("ours", ours), ("theirs", theirs))
    }
    print(f"accuracy {right['ours']:.4f} and {right['theirs']:.4f}; log-likelihoods differ by at most {gap:.1e}")
    return {"largest": gap, "accuracy": right}


# --- the sampling suite --------------------------------------------------------------------------------------------------


def sampling(cfg: Config, temp: Path) -> dict:
    """Tokens a second of ours and of transformers' generate, greedy, the same prompts and as many new tokens."""
    peer = installed(cfg)
    sizes = (cfg.batch_size,) if cfg.batch_size else (1, 16)
    work = prepare(cfg, temp, cfg.init, "hh", "sft", cfg.pairs or max(4, 2 * max(sizes)))
    base, rate = base_job(cfg, temp, warmup=1)
    read = needed(measure(temp, "reading", base))
    layers, _, width = work.shape
    weight_bytes = (12 * layers * width**2 + VOCAB * width) * (2 if base["dtype"] == "bfloat16" else 4)
    print(f"sample: {cfg.init}, {NEW_TOKENS} new tokens a prompt, greedy; {rate['said']}; {work.said}")
    report = {"matmul": rate, "reading": read, "data": work.said, "sizes": {}}
    for size in sizes:
        prompts = [i.prompt.tolist()[-(CONTEXT - NEW_TOKENS) :] for i in work.items[: cfg.pairs or max(4, 2 * size)]]
        job = base | {"folder": work.folder, "prompts": prompts, "batch_size": size, "new": NEW_TOKENS}
        jobs = {"ours": ("ours_sample", job)}
        theirs = {name: ("transformers_sample", job | {"settings": s}) for name, s in TRANSFORMERS_SETTINGS.items()}
        theirs = chosen(cfg, theirs)
        if peer != "none":
            best, _ = fastest(temp, theirs, {"settings": {}, "prompts": prompts[:size], "new": 8})
            jobs |= {name: theirs[name] for name in (best, next(iter(theirs)))}  # the peer as it comes: once
        results: dict[str, list[dict]] = {name: [] for name in jobs}
        for i in range(cfg.repeats):
            for name, (do, j) in jobs.items():
                if i == 0 or name == "ours" or name == best:
                    results[name].append(needed(measure(temp, do, j)))
                    print(f"round {i + 1}, {name}: {show(results[name][-1])}", flush=True)
        written = len(prompts) * NEW_TOKENS
        whole = [Encoded(np.array(p), [np.zeros(NEW_TOKENS)], 0, 0) for p in prompts]
        by_sums = flops(whole, work.shape, train=False) / rate["flops_per_s"]
        by_reading = -(-len(prompts) // size) * NEW_TOKENS * weight_bytes / read["bytes_per_s"]
        floor = max(by_sums, by_reading)
        rows = [
            {
                "name": name,
                "seconds": (s := statistics.median(r["seconds"] for r in found)),
                "tokens_per_s": written / s,
                "cpu_seconds": statistics.median(r["cpu_seconds"] for r in found),
                "peak_mb": statistics.median(r["peak_mb"] for r in found),
                "floors": s / floor,
            }
            for name, found in results.items()
        ]
        lengths = sorted(map(len, prompts))
        print(f"\nbatch {size}: {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {written:,} new tokens")
        print(f"{'':44}{'tokens/s':>10}{'seconds':>10}{'CPU s':>9}{'peak MB':>10}{'x floor':>9}")
        for r in rows:
            print(
                f"{r['name']:44}{r['tokens_per_s']:10.1f}{r['seconds']:10.2f}{r['cpu_seconds']:9.2f}{r['peak_mb']:10.0f}"
                f"{r['floors']:9.2f}"
            )
        print(
            f"floor: {written / floor:.0f} tokens/s, the lower of what reading the weights once a step allows "
            f"({written / by_reading:.0f}, at {read['bytes_per_s'] / 1e9:.1f} GB/s) and what the sums allow "
            f"({written / by_sums:.0f}, at {rate['flops_per_s'] / 1e9:.0f} GFLOP/s)"
        )
        report["sizes"][size] = {"rows": rows, "floor_s": floor, "results": results, "against": {}}
        mine = rows[0]
        for other in rows[1:]:
            pairs = zip(results["ours"][0]["tokens"], results[other["name"]][0]["tokens"], strict=True)
            same = sum(a == b for a, b in pairs) / len(prompts)
            ratios = {
                "speed_ratio": mine["tokens_per_s"] / other["tokens_per_s"],
                "cpu_ratio": other["cpu_seconds"] / mine["cpu_seconds"],
                "memory_ratio": mine["peak_mb"] / other["peak_mb"],
                "same_completions": same,
            }
            report["sizes"][size]["against"][other["name"]] = ratios
            print(
                f"ours is {ratios['speed_ratio']:.2f}x as fast as {other['name']} ({ratios['cpu_ratio']:.2f}x by CPU time), "
                f"with {ratios['memory_ratio']:.2f}x its peak memory; {same:.0%} of the completions are equal"
            )
        print()
    return report


# --- the GPU suite -------------------------------------------------------------------------------------------------------


def gpu(cfg: Config, temp: Path) -> dict:
    """Correct, then fast: every size, kind of data and setting until the time is up. Runs on a CPU too, to prove the path."""
    end = time.monotonic() + 60 * cfg.minutes
    peer = installed(cfg)
    base, rate = base_job(cfg, temp, warmup=3)  # compiled forwards settle after a few shapes
    on_cuda = base["device"] != "cpu"
    print(f"{rate['said']}: matrix product {rate['flops_per_s'] / 1e12:.2f} TFLOP/s in {rate['dtype']}")
    report = {"matmul": rate, "correct": correct() if on_cuda else "tests marked gpu: not run, no CUDA", "rows": []}
    print(report["correct"], flush=True)
    if not on_cuda:
        report["note"] = "on a CPU: proves that the suite runs, says nothing about a GPU"
        print(report["note"])
    n = cfg.pairs + base["warmup"] * cfg.batch_size
    cases = [  # the most telling first: plain for every size, then the peer, then the settings
        (kind, model, stage, name)
        for kind in ("hh", "hellaswag")
        for names in (["plain"], list(TRL_SETTINGS)[:2] if peer == "trl" else [], list(GPU_SETTINGS)[1:])
        for model in cfg.models.split(",")
        for stage in ("dpo", "sft")
        for name in names
    ]
    print(f"\n{'':46}{'step s':>9}{'pairs/s':>10}{'tokens/s':>11}{'MFU':>7}{'peak MB':>10}")
    left, said = [], "none"
    for kind, model, stage, name in cases:
        if time.monotonic() > end:
            left.append(f"{stage} {kind} {model} {name}")
            continue
        more = GPU_SETTINGS.get(name, {})
        if unknown := more.keys() - {f.name for f in dataclasses.fields(importlib.import_module(stage).Config)}:
            left.append(f"{stage} {kind} {model} {name}: {stage}.py has no key {', '.join(unknown)}")
            continue
        work = prepare(cfg, temp, model, kind, stage, n)
        said = work.said
        if name in TRL_SETTINGS:
            result = measure(temp, "trl_train", trl_job(cfg, work, temp, stage, base, TRL_SETTINGS[name]))
        else:
            result = measure(temp, "ours_train", train_job(cfg, work, temp, stage, base, more))
        label = f"{stage} {kind} {model} {name}"
        if "error" in result:
            print(f"{label:46}failed: {result['error'][:100]}", flush=True)
            report["rows"].append({"case": label, "error": result["error"]})
            continue
        items = work.items[base["warmup"] * cfg.batch_size :]
        seconds, tokens = result["seconds"], sum(i.row_tokens for i in items)
        row = {
            "case": label, "step_s": seconds / result["steps"], "pairs_per_s": len(items) / seconds,
            "tokens_per_s": tokens / seconds, "mfu": flops(items, work.shape, train=True) / seconds / rate["flops_per_s"],
            "peak_mb": result["peak_mb"], "losses": [r["loss"] for r in result["records"]],
        }  # fmt: skip
        report["rows"].append(row)
        print(
            f"{label:46}{row['step_s']:9.3f}{row['pairs_per_s']:10.2f}{row['tokens_per_s']:11.0f}{row['mfu']:7.1%}"
            f"{row['peak_mb']:10.0f}",
            flush=True,
        )
    report["left_out"] = left
    for line in left:
        print(f"left out: {line}" + ("" if "no key" in line else f": the {cfg.minutes:g} minutes were up"))
    print(f"MFU: useful operations (a prompt once, however many completions) over the matrix product's rate; data: {said}")
    print("sampling has a suite of its own: --suite sample")
    return report


def correct() -> str:
    """pytest's own last line on the tests marked gpu."""
    if not find_spec("pytest"):
        return "tests marked gpu: not run, pytest is not installed"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], capture_output=True, text=True)
    return "tests marked gpu: " + (done.stdout.strip().splitlines() or ["no output"])[-1]


def main() -> None:
    if sys.argv[1:2] == ["--job"]:
        return worker(sys.argv[2])
    cfg = config.load(Config, prog="bench.py")
    with tempfile.TemporaryDirectory(prefix="nanopref_bench_") as temp:
        report = {"gpu": gpu, "sample": sampling}.get(cfg.suite, compare)(cfg, Path(temp))
    report |= {"config": dataclasses.asdict(cfg), "commit": commit(), "versions": versions()}
    if cfg.out:
        Path(cfg.out).write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {cfg.out}")


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "lm_eval"):
        found[name] = importlib.metadata.version(name) if find_spec(name) else "not installed"
    return found


if __name__ == "__main__":
    run(main)
