"""What the suites share: the settings, the work, a measurement in a process of its own, both sides in turns, the table.

Weights are random (their values do not change the time). Texts are real where a file is given or found; else random words,
as many as the real ones have tokens. Both sides get the same texts in the same order. Timed is the steady state: after
loading, the reference pass and a warm-up, to the end of the last step, nothing saved. The floor is what the useful tokens cost
(each once: a prompt is not counted again for each of its completions) at the rate of a large matrix product measured in the
same run.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import weights
from base.errors import UserError
from base.files import write_whole
from data import Example, load, tokenizer
from data.encode import Encoded, encode
from model import SIZES, GPTConfig
from runtime import distributed
from runtime.config import key
from runtime.keys import DTYPES
from runtime.log import peak_flops

CONTEXT = 1024
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = {"hh": "hh_harmless_base_test.jsonl.gz", "hellaswag": "hellaswag_val.jsonl.gz", "mcq": "hellaswag_val.jsonl.gz"}
# mean and standard deviation of log token counts, prompt then completion, fitted to those files with GPT-2's tokenizer
LENGTHS = {"hh": (4.37, 1.00, 3.47, 0.90), "hellaswag": (5.03, 0.45, 3.19, 0.59), "mcq": (3.77, 0.45, 3.15, 0.62)}
LENGTHS["rows"] = LENGTHS["counts"] = LENGTHS["hh"]
ALL_PAIRS = tuple(itertools.combinations(range(4), 2))  # of the suite rows: the six pairs of four completions
SHAPES = SIZES | {"tiny": (2, 2, 64)}
PEERS = {"dpo": "trl", "sft": "trl", "rows": "trl", "mcq": "lm_eval", "sample": "transformers", "gpu": "trl",
         "counts": "none"}  # of each suite  # fmt: skip
# An environment that has glibc keep freed memory. On a CPU the peers spend much of their time in page faults on gigabytes of
# fresh logits. (With whole batches in a forward it makes TRL's memory grow past 14 GB for GPT-2 124M: there it is not tried.)
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

Job = tuple[Callable[[dict], dict], dict]  # a function of a suite, and what it is told


@dataclass
class Config:
    """This project and its peers, side by side."""

    suite: str = key("dpo", "what to compare", PEERS)
    peer: str = key("auto", "auto = with trl, lm_eval or transformers, if it is installed; none = alone", ["auto", "none"])
    init: str = key("gpt2", "a GPT-2 size (or tiny) to fill with random weights, or a model folder")
    data: str = key("", "preference pairs (mcq: problems); empty = the known file if it is there, else generated ones")
    pairs: int = key(0, "pairs, examples, problems or prompts to time after a warm-up, 0 = 8 steps (mcq: 100)", least=0)
    batch_size: int = key(0, "pairs a step, 0 = 4, on CUDA 64; sample: prompts at once, 0 = 1, then 16", least=0)
    peer_setting: str = key("", "try only the peer's settings whose name holds this, empty = all of them")
    repeats: int = key(3, "measurements of each side, taken in turns", least=1)
    threads: int = key(0, "CPU threads, 0 = one a core", least=0)
    device: str = key("auto", "auto, cpu or cuda")
    dtype: str = key("auto", "dtype of matrix products on both sides; auto = bfloat16 on CUDA that has it", DTYPES)
    lr: float = key(1e-5, "learning rate, constant")
    seed: int = key(0, "seed of weights, generated data and order")
    models: str = key("gpt2,gpt2-xl,gpt2-medium,gpt2-large", "gpu: sizes with commas between, the two that matter most first")
    minutes: float = key(8.0, "gpu: no measurement is begun later than this")
    out: str = key("", "JSON file for everything measured", writes="")

    def check(self) -> None:
        """Refuse what does not go together, and fill in the defaults that depend on other keys."""
        if unknown := set(self.models.split(",")) - SHAPES.keys():
            raise UserError(f"key models: {', '.join(unknown)} is not one of {', '.join(SHAPES)}")
        self.device = self.device if self.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.threads = self.threads or os.cpu_count() or 1
        if self.suite == "mcq":
            self.pairs = self.pairs or 100
        elif self.suite != "sample":
            small, large, multiple = (6, 96, 6) if self.suite == "rows" else (4, 64, 1)  # rows: whole prompts
            self.batch_size = self.batch_size or (small if self.device == "cpu" else large)
            self.pairs = self.pairs or (4 if self.suite == "counts" else 8) * self.batch_size
            if self.pairs % self.batch_size:
                raise UserError(f"key pairs: {self.pairs} is no multiple of batch_size {self.batch_size}")
            if self.suite == "rows" and self.data:
                raise UserError("key data: the suite rows makes its own, with six pairs a prompt: leave it out")
            if self.batch_size % multiple:
                raise UserError(f"key batch_size: {self.batch_size}: the suite rows has {multiple} pairs a prompt: a multiple")
            if self.batch_size > 8 and self.batch_size % 8:
                raise UserError(f"key batch_size: {self.batch_size} is above 8, TRL's examples a forward: give a multiple of 8")


# --- the work: weights and texts --------------------------------------------------------------------------------------


@dataclass
class Work:
    """A folder with weights and tokenizer, the examples as a file and as tokens, and what is known about them."""

    folder: Path
    data: Path
    items: list[Encoded]
    model: GPTConfig
    source: str  # where the texts come from, in words


def generated(kind: str, n: int, seed: int, tok) -> list[Example]:
    """`n` examples of random words, each of them one token of GPT-2's, whose counts are log-normal as in the real data."""
    rng = random.Random(seed)
    words = [word for i in range(tok.eot) if re.fullmatch(" [a-z]+", word := tok.decode([i]))]
    p_mean, p_sd, c_mean, c_sd = LENGTHS[kind]

    def text(mean: float, sd: float, most: int) -> str:
        return "".join(rng.choices(words, k=min(most, max(2, round(rng.lognormvariate(mean, sd))))))

    def example(options: int) -> Example:
        completions = tuple(text(c_mean, c_sd, 200) for _ in range(options))
        prompt = text(p_mean, p_sd, 800)
        if kind == "rows":
            return Example(prompt, completions, pairs=ALL_PAIRS)
        return Example(prompt, completions, rng.randrange(4) if options == 4 else None)

    return [example(4 if kind in ("mcq", "rows") else 2) for _ in range(n)]


def real(path: str, kind: str, n: int, seed: int, tok) -> list[Example]:
    """`n` examples of a file, drawn by the seed, that fit the context and tokenize alike in one piece and in two."""
    examples = load(path, "val", "loglik" if kind == "mcq" else "preference")
    random.Random(seed).shuffle(examples)

    def usable(e: Example) -> bool:
        prompt, ends = tok.encode(e.prompt), [tok.encode(c) for c in e.completions]
        alike = [tok.encode(e.prompt + c) for c in e.completions] == [prompt + end for end in ends]
        return bool(prompt) and alike and len(prompt) + max(map(len, ends)) < CONTEXT

    found = list(itertools.islice(filter(usable, examples), n))
    if len(found) < n:
        raise UserError(f"key pairs: {path} has only {len(found)} usable examples of {n} needed, with warm-up: ask for fewer")
    return found


def record(e: Example) -> dict:
    """An example as a line of a file that our scripts and the peers read; `completion` is for SFT."""
    if e.label is not None:
        return {"prompt": e.prompt, "choices": e.completions, "label": e.label}
    if len(e.completions) > 2:
        return {"prompt": e.prompt, "completions": e.completions, "pairs": e.pairs}
    chosen, rejected = e.completions
    return {"prompt": e.prompt, "chosen": chosen, "rejected": rejected, "completion": chosen}


def drawn(model: GPTConfig, device: str, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Random parameters, drawn on a GPU: for xl that takes seconds where a CPU takes a minute."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in weights.empty(model).named_parameters():
        value = torch.empty(p.shape, device=device).normal_(0.0, 0.02, generator=generator)
        yield name, (value + (p.dim() == 1 and name.endswith("weight"))).cpu()


def prepare(cfg: Config, temp: Path, init: str, kind: str, stage: str, n: int) -> Work:
    """Weights, tokenizer and the data file of `n` examples of a `kind` of data for a `stage`, made once in `temp`."""
    path, tok = Path(cfg.data or SHARED / FILES.get(kind, "none")), tokenizer.choose("auto", init)
    if cfg.data or path.is_file():
        examples, source = real(str(path), kind, n, cfg.seed, tok), f"{path.name}, drawn at random"
    else:
        examples = generated(kind, n, cfg.seed, tok)
        source = f"generated words, lengths log-normal as fitted to {FILES.get(kind, FILES['hh'])}"
    folder = temp / Path(init).name
    if not folder.exists():
        sizes = dict(zip(("n_layer", "n_head", "n_embd"), SHAPES.get(init, ()), strict=False))
        scratch = {"seed": cfg.seed, "block_size": CONTEXT, "vocab_size": tok.size}
        if sizes and cfg.device != "cpu":
            model = GPTConfig(block_size=CONTEXT, vocab_size=tok.size, **sizes)
            weights.save_tensors(model, drawn(model, cfg.device, cfg.seed), tok, folder)
        else:
            weights.save(weights.load("scratch", **scratch, **sizes) if sizes else weights.load(init), tok, folder)
    if kind != "mcq":  # the order that the figures of docs/results.md were measured in
        examples = [examples[i] for i in np.random.default_rng([cfg.seed, 0]).permutation(n)]
    file = temp / f"{stage}_{kind}.jsonl"
    file.write_text("".join(json.dumps(record(e)) + "\n" for e in examples))
    if stage == "sft":
        examples = [dataclasses.replace(e, completions=e.completions[:1]) for e in examples]
    items, _ = encode(examples, tok, CONTEXT, "drop", end=kind != "mcq")
    assert len(items) == n, "an example was dropped"
    return Work(folder, file, items, weights.read_config(folder / "config.json"), source)


def matrices(model: GPTConfig) -> tuple[int, int]:
    """Weights of the blocks' matrices, and of the vocabulary projection."""
    blocks = weights.empty(model).blocks
    return sum(p.numel() for p in blocks.parameters() if p.dim() == 2), model.n_embd * model.vocab_size


def flops(items: list[Encoded], model: GPTConfig, *, train: bool) -> float:
    """Operations that the useful tokens cost: 2 a weight and token, 4 n_embd a layer for every key that a token attends to,
    2 a weight of the vocabulary projection at positions that predict; three times that with the backward pass.

    A prompt counts once whatever the number of its completions; a completion's last token is never fed.
    """
    fed = keys = 0
    for item in items:
        p, lengths = len(item.prompt), [len(c) - 1 for c in item.completions]
        fed += p + sum(lengths)
        keys += p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in lengths)
    blocks, head = matrices(model)
    total = 2 * blocks * fed + 4 * model.n_embd * model.n_layer * keys + 2 * head * sum(i.completion_tokens for i in items)
    return total * (3 if train else 1)


# --- one measurement --------------------------------------------------------------------------------------------------


def measure(function: Callable[[dict], dict], job: dict) -> dict:
    """`function(job)` in a fresh process, with its peak memory and, from what it returns as "ends", its times. A job that takes
    longer than its "limit_s" is ended: RuntimeError."""
    env = {"OMP_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with mock.patch.dict(os.environ, env | job.get("env", {})), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        future = pool.submit(in_process, function, job)
        try:
            return future.result(job.get("limit_s"))
        except TimeoutError:
            for process in pool._processes.values():
                process.kill()
            raise RuntimeError(f"ended after {job['limit_s']:.0f} s") from None


def in_process(function: Callable[[dict], dict], job: dict) -> dict:
    """The other end of `measure`. What the job prints goes nowhere."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    torch.set_num_threads(job["threads"])
    return timed(function(job)) | {"peak_mb": peak_mb(job["device"])}


def timed(result: dict) -> dict:
    """A result with the seconds between the first and the last of its "ends", by the clock and of the CPU."""
    if "ends" not in result:
        return result
    ends = result.pop("ends")
    seconds, cpu_seconds = (last - first for first, last in zip(ends[0], ends[-1], strict=True))
    return result | {"seconds": seconds, "cpu_seconds": cpu_seconds, "steps": len(ends) - 1}


def attempt(function: Callable[[dict], dict], job: dict) -> dict:
    """`measure`, or {"error": a line} where the job fails: a peer may run out of memory."""
    try:
        return measure(function, job)
    except Exception as error:
        return {"error": last_line(error)}


def last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def peak_mb(device: str) -> float:
    """Most memory this process ever had: allocated on the GPU, else resident."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # better than ru_maxrss, which on Linux a child inherits from its parent
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of macOS, in bytes


def matmul(job: dict) -> dict:
    """The rate of a large matrix product, and what it ran on."""
    compute, info = distributed.setup(job["device"], job["dtype"]), Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    rate, dtype = peak_flops(compute.device, compute.dtype), str(compute.dtype).removeprefix("torch.")
    return {
        "flops_per_s": rate,
        "dtype": dtype,
        "said": f"{compute}; {cpu[1] if cpu else platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def base_job(cfg: Config, warmup: int) -> dict:
    """What every job is told: "matmul" is the measured rate of a matrix product, and "dtype" the one it ran in."""
    job = {"threads": cfg.threads, "device": cfg.device, "dtype": cfg.dtype, "warmup": warmup}
    if cfg.device == "cpu" and os.getloadavg()[0] > 0.5:
        print(f"warning: this machine is busy (load {os.getloadavg()[0]:.1f}): expect figures that are off")
    rate = measure(matmul, job)
    return job | {"dtype": rate["dtype"], "matmul": rate}


def write(cfg: Config, report: dict) -> None:
    """Write `report` to `cfg.out`, whole: whoever stops the bench finds what has been measured."""
    report |= {"config": dataclasses.asdict(cfg), "commit": commit(), "versions": versions()}
    if cfg.out:
        write_whole(cfg.out, json.dumps(report, indent=1) + "\n")


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    peers = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "lm_eval") if find_spec(name)}
    return {"python": platform.python_version(), **peers}


# --- both sides in turns ----------------------------------------------------------------------------------------------


def peer_jobs(cfg: Config, function: Callable[[dict], dict], job: dict, settings: dict[str, dict]) -> dict[str, Job]:
    """The peer's jobs by the names of their settings, its defaults first; none where there is no peer to compare with.

    settings: what the peer can be told that does not change the work. All are tried on a few examples, and the fastest is
    compared with.
    """
    if cfg.peer == "none" or not find_spec(PEERS[cfg.suite]):
        print("no peer: measuring this project alone")
        return {}
    jobs = {}
    for name, more in settings.items():
        if cfg.peer_setting in name:
            jobs[name] = function, job | {"settings": {k: v for k, v in more.items() if k != "env"}, "env": more.get("env", {})}
    if not jobs:
        raise UserError(f"key peer_setting: no setting of the peer has {cfg.peer_setting!r} in its name")
    return jobs


def show(result: dict) -> str:
    return result.get("error") or f"{result['seconds']:.2f} s, CPU {result['cpu_seconds']:.2f} s, {result['peak_mb']:.0f} MB"


def race(cfg: Config, ours: Job, theirs: dict[str, Job], few: dict, also: dict[str, Job] | None = None) -> tuple[dict, dict]:
    """Ours and the peer's fastest setting in turns, the peer's defaults once: ({name: results}, {setting: its trial}).

    few: what makes a job a short one, to find the fastest setting with. also: more jobs of ours, measured in each turn.
    """
    tried, jobs, best = {}, {"ours": ours, **(also or {})}, "ours"
    each_turn = set(jobs)
    for name, (function, job) in theirs.items():
        tried[name] = attempt(function, job | few)
        print(f"trying {name}: {show(tried[name])}", flush=True)
    if theirs:
        best = min(theirs, key=lambda name: tried[name].get("seconds", float("inf")))
        jobs |= {name: theirs[name] for name in (best, next(iter(theirs)))}
    results: dict[str, list[dict]] = {name: [] for name in jobs}
    for i in range(cfg.repeats):
        for name, job in jobs.items():
            if i == 0 or name in each_turn | {best}:
                result = measure(*job) if name == "ours" else attempt(*job)
                print(f"round {i + 1}, {name}: {show(result)}", flush=True)
                results[name] += [] if "error" in result else [result]
    return {name: found for name, found in results.items() if found}, tried


def head(unit: str) -> None:
    print(f"\n{'':46}{unit + '/s':>10}{'seconds':>10}{'CPU s':>9}{'tokens/s':>10}{'peak MB':>10}{'x floor':>9}{'runs':>6}")


def row(name: str, found: list[dict], n: int, tokens: int, floor: float) -> dict:
    """Print and return a row of the table: medians over a side's measurements of `n` units and so many tokens."""
    s, cpu, peak = (statistics.median(r[k] for r in found) for k in ("seconds", "cpu_seconds", "peak_mb"))
    print(f"{name:46}{n / s:10.3f}{s:10.2f}{cpu:9.2f}{tokens / s:10.1f}{peak:10.0f}{s / floor:9.2f}{len(found):6}", flush=True)
    numbers = {"seconds": s, "per_s": n / s, "tokens_per_s": tokens / s, "cpu_seconds": cpu, "peak_mb": peak}
    return {"name": name, **numbers, "floors": s / floor, "runs": len(found)}


def ratios(mine: dict, other: dict) -> dict[str, float]:
    """Print and return how two rows compare: above 1 ours is the faster, but needs the more memory."""
    speed, cpu = (other[k] / mine[k] for k in ("seconds", "cpu_seconds"))
    memory = mine["peak_mb"] / other["peak_mb"]
    print(f"ours is {speed:.2f}x as fast as {other['name']} ({cpu:.2f}x by CPU time), with {memory:.2f}x its peak memory")
    return {"speed_ratio": speed, "cpu_ratio": cpu, "memory_ratio": memory}


def compare(cfg: Config, work, base: dict, unit: str, cost: float, ours: Job, theirs: dict[str, Job], few: dict) -> dict:
    """The suites dpo, sft and mcq: the race, its table and floor, and everything as a dict.

    work: a Work whose last `pairs` examples are timed. cost: their floating-point operations.
    """
    results, tried = race(cfg, ours, theirs, few)
    rate, items, model = base["matmul"], work.items[-cfg.pairs :], work.model
    rate["flops_per_s"] = max(rate["flops_per_s"], measure(matmul, base)["flops_per_s"])
    floor, tokens = cost / rate["flops_per_s"], sum(i.row_tokens for i in items)
    print(
        f"\n{cfg.suite}: {cfg.init} ({model.n_layer} layers, {model.n_head} heads, width {model.n_embd}), {cfg.pairs} {unit} "
        f"after a warm-up of {len(work.items) - cfg.pairs}, batch {cfg.batch_size or 'none'}, {rate['said']}\n"
        f"data: {work.source}; {tokens:,} useful tokens, {sum(i.completion_tokens for i in items):,} of them to predict"
    )
    head(unit)
    rows = [row(name, found, cfg.pairs, tokens, floor) for name, found in results.items()]
    print(f"floor: {cost / 1e12:.2f} TFLOP at {rate['flops_per_s'] / 1e9:.0f} GFLOP/s (matrix product) = {floor:.2f} s\n")
    report = {"rows": rows, "floor_s": floor, "flops": cost, "matmul": rate, "data": work.source}
    report |= {"results": results, "tried": tried}
    if len(rows) > 1:
        fastest = min(rows[1:], key=lambda r: r["seconds"])
        leanest = min(r["peak_mb"] for r in [*rows[1:], *tried.values()] if "error" not in r)
        report |= {**ratios(rows[0], fastest), "memory_ratio_to_leanest": rows[0]["peak_mb"] / leanest}
        print(f"ours needs {report['memory_ratio_to_leanest']:.2f}x the peak memory of the peer's leanest setting")
        report["compared"] = fastest["name"]
    return report
