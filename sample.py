"""Prompts in, completions out: a JSONL file of them, or a conversation with the terminal.

    python sample.py --model runs/dpo/model --prompts prompts.jsonl --out samples.jsonl --n 4 --temperature 0.7
    python sample.py --model gpt2
    torchrun --nproc_per_node 2 -- sample.py --model runs/dpo/model --prompts prompts.jsonl --out samples.jsonl --n 4

torchrun needs its -- here: it would take --n for a short form of its own options, and refuse it as an ambiguous one.

A line of the prompts file is {"prompt": …} with whatever else it has; the same line with "completions": […] comes out. What is
drawn for a prompt follows from the seed, its place in the file, and which of its n completions it is, not from the batch or
the number of processes. (Logits of another batch size, dtype or machine differ by rounding, and where two tokens are closer
than that, another may win: about once in 100,000 tokens in float32, once in 100 in bfloat16.) An empty prompt stands for the
start of a text, <|endoftext|>. A prompt that leaves no room for max_new_tokens loses its start.

Finished prompts are kept in FILE.part0, FILE.part1, … (one a process) until FILE is written, so that the same command goes on
where it was killed. Without --prompts, a line typed or piped in is a prompt (\n in it a new line), answered as it is drawn;
Ctrl-C stops the text, Ctrl-D leaves.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import weights
from base.errors import UserError, fail, run
from base.files import lock, write_whole
from data import jsonl
from data.tokenizer import choose
from runtime import config, distributed
from runtime.config import REQUIRED, key
from runtime.keys import DeviceKeys, ModelKeys
from runtime.log import Progress
from runtime.run import build_model, restarted


@dataclass
class Config(DeviceKeys):
    """Complete the prompts of a file, or those typed in."""

    model: str = key(REQUIRED, "a model or adapter folder, or gpt2, gpt2-medium, gpt2-large, gpt2-xl")
    prompts: str = key("", 'a .jsonl / .jsonl.gz file with a "prompt" a line; empty = read them from the terminal')
    out: str = key("", "the JSONL file to write; one that is there is replaced when the new one is whole", writes="")
    n: int = key(1, "completions a prompt", least=1)
    temperature: float = key(1.0, "divides the logits; 0 (any below 1e-6) = always the likeliest token", least=0)
    top_k: int = key(0, "draw from the so many likeliest tokens, 0 = all", least=0)
    top_p: float = key(1.0, "draw from the fewest likeliest tokens that have this much of the probability", above=0, most=1)
    max_new_tokens: int = key(128, "most tokens of a completion", least=1)
    stop: str = key("", "a text that ends a completion, beside <|endoftext|>; not part of it; \\n in it is a new line")
    limit: int = key(0, "use only the first so many prompts, 0 = all", least=0)
    batch_size: int = key(32, "completions written at once", least=1)
    overwrite: bool = key(False, "throw away what a stopped run for the same out has finished")
    tokenizer: str = key("auto", "gpt2, toy, a folder, or auto = the model's own")

    def check(self) -> None:
        self.stop = self.stop.replace("\\n", "\n")
        if bool(self.prompts) != bool(self.out):
            given, missing = ("prompts", "out") if self.prompts else ("out", "prompts")
            raise UserError(f"key {missing}: --{given} needs --{missing} too; without both, prompts are typed in")
        if self.out.endswith(".gz"):
            raise UserError(f"key out: {self.out}: what is written is not compressed: leave out .gz")
        if self.out and Path(self.out).resolve() == Path(self.prompts).resolve():
            raise UserError(f"key out: {self.out} is the prompts file: name another")

    @property
    def how(self) -> dict:
        """What `GPT.stream` is told about drawing."""
        return {name: getattr(self, name) for name in ("n", "temperature", "top_k", "top_p", "seed")}


class Text:
    """Tokens as text, without the stop text and what comes after it."""

    def __init__(self, tokenizer, stop: str):
        self.tokenizer, self.stop, self.tail = tokenizer, stop, len(stop.encode())

    def ended(self, tokens: list[int]) -> bool:
        """Whether the last token completed the stop text: each of the tokens that spell it has a byte of it at least."""
        return bool(self.stop) and self.stop in self.tokenizer.decode(tokens[-self.tail :])

    def final(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens)
        return text.partition(self.stop)[0] if self.stop else text

    def certain(self, tokens: list[int]) -> str:
        """As much as no later token can change: no half character at the end, no beginning of the stop text."""
        text = self.final(tokens).rstrip("\ufffd")
        held = (k for k in range(len(self.stop), 0, -1) if text.endswith(self.stop[:k]))
        return text[: len(text) - next(held, 0)]


def fit(tokens: list[list[int]], model, tokenizer, max_new_tokens: int) -> int:
    """Make prompts, in place, ones that the model can continue by `max_new_tokens`; returns how many lost their start."""
    room = model.config.block_size + 1 - max_new_tokens  # a completion's last token is not fed
    if room < 1:
        raise UserError(f"key max_new_tokens: {max_new_tokens}: the model has a context of {model.config.block_size} tokens")
    cut = sum(len(ids) > room for ids in tokens)
    tokens[:] = [ids[-room:] or [tokenizer.eot] for ids in tokens]
    return cut


# --- what is finished, kept until all is -----------------------------------------------------------------------------

FIRST = b'{"weights_sha256": "'  # how a part file begins


def kept(path: Path) -> tuple[dict | None, dict[int, list[str]], int]:
    """A part file's settings, completions by prompt number, and its bytes up to where a kill or a power cut tore it."""
    settings, found, size = None, {}, 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            value = json.loads(line if line.endswith(b"\n") else b"")
        except ValueError:
            break
        if settings is None:
            settings = value
        else:
            found[value[0]] = value[1]
        size += len(line)
    return settings, found, size


def part_files(out: str) -> list[Path]:
    """OUT.part0, OUT.part1, …, whatever the number of processes that wrote them. Raises UserError for what is not ours."""
    name = re.compile(re.escape(Path(out).name) + r"\.part[0-9]+")
    paths = sorted(p for p in Path(out).parent.iterdir() if name.fullmatch(p.name))
    for path in paths:
        with open(path, "rb") as file:
            start = file.read(len(FIRST))
        if not FIRST.startswith(start):  # shorter: a kill tore it
            raise UserError(f"{path} was not written by sample.py and would be in its way: rename it, or name another --out")
    return paths


def open_part(cfg: Config, compute):
    """This rank's part file, to be appended to, and its own as long as it is open."""
    path = Path(f"{cfg.out}.part{compute.rank}")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "ab", buffering=0)  # noqa: SIM115
    busy = "" if lock(file) else f"key out: another process is writing {path}: wait, or name another file"
    if busy := max(compute.gather(busy)):
        raise UserError(busy)
    return file


def resume(cfg: Config, settings: dict) -> dict[int, list[str]]:
    """What an earlier run of the same settings has finished; refuses what one of others left behind."""
    done = {}
    for path in part_files(cfg.out):  # all of them ours, before one is emptied
        if cfg.overwrite and not restarted():
            path.write_bytes(b"")
        theirs, found, _ = kept(path)
        if theirs not in (None, settings):
            name = next((k for k in settings if theirs.get(k) != settings[k]), "key")
            was, now = theirs.get(name), settings.get(name)
            raise UserError(
                f"{path} holds unfinished samples with another {name} ({was!r:.40}, here {now!r:.40}): "
                "finish those, name another --out, or throw them away with --overwrite"
            )
        done |= found
    return done


def lay_out(model, rows: int, compute) -> None:
    """Make the model fast for so many completions at once; from here on it is good for nothing else."""
    if compute.device.type == "cpu" and compute.dtype == torch.float32:
        model.lay_out(rows)


# --- the two modes ---------------------------------------------------------------------------------------------------


def sample_file(cfg: Config, records: list[dict], model, tokenizer, compute) -> None:
    """Complete every record's prompt and write them all to cfg.out."""
    prompts = [r["prompt"] for r in records]
    tokens = tokenizer.encode_batch(prompts)
    cut = fit(tokens, model, tokenizer, cfg.max_new_tokens)
    if cut:
        print(f"{cut:,} of {len(prompts):,} prompts lost their start: the model's context is {model.config.block_size} tokens")
    settings = {
        "weights_sha256": compute.once(lambda: weights.fingerprint(model)),  # the first: see FIRST
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "tokenizer_sha256": tokenizer.fingerprint(),
        "dtype": str(compute.dtype).removeprefix("torch."),
        "max_new_tokens": cfg.max_new_tokens,
        "stop": cfg.stop,
        **cfg.how,
    }
    part = open_part(cfg, compute)
    done = compute.once(lambda: resume(cfg, settings))
    earlier = part_files(cfg.out)
    before, _, size = kept(Path(part.name))
    part.truncate(size)
    if before is None:
        part.write(json.dumps(settings).encode() + b"\n")

    todo = sorted((i for i in range(len(prompts)) if i not in done), key=lambda i: -len(tokens[i]))
    todo = todo[compute.rank :: compute.world]
    print(f"{len(prompts):,} prompts, {cfg.n} completions each, {len(done):,} finished before", flush=True)
    progress = Progress("sampling", cfg.n * len(todo), "completions", compute.rank)
    lay_out(model, min(cfg.batch_size, max(1, cfg.n * len(todo))), compute)
    text, found, finished, written = Text(tokenizer, cfg.stop), {i: {} for i in todo}, {}, 0
    with compute.autocast(), torch.inference_mode():
        stream = model.stream(
            {i: tokens[i] for i in todo},
            cfg.max_new_tokens,
            tokenizer.eot,
            n_ids=tokenizer.size,
            batch_size=cfg.batch_size,
            ended=text.ended,
            **cfg.how,
        )
        for i, j, ids in stream:
            found[i][j] = text.final(ids)
            if len(found[i]) == cfg.n:
                finished[i] = [found[i][j] for j in range(cfg.n)]
                part.write(json.dumps([i, finished[i]]).encode() + b"\n")
            written += len(ids)
            progress.add(1)
    seconds = progress.close()
    print(f"{written:,} tokens, {written / max(seconds, 1e-9):,.1f} tokens/s" + (" on rank 0" if compute.world > 1 else ""))

    for share in compute.gather(finished):
        done |= share
    lines = (json.dumps(r | {"completions": done[i]}) + "\n" for i, r in enumerate(records))
    compute.once(lambda: write_whole(cfg.out, "".join(lines)))
    part.close()
    Path(part.name).unlink(missing_ok=True)
    if compute.rank == 0:  # also those of an earlier run with more processes
        for path in earlier:
            path.unlink(missing_ok=True)
    print(f"wrote {cfg.out}")


def converse(cfg: Config, model, tokenizer, compute) -> None:
    """Answer line after line of standard input, until it ends."""
    ask = "> " if sys.stdin.isatty() else ""
    lay_out(model, 1, compute)
    text = Text(tokenizer, cfg.stop)
    number = 0
    while True:
        try:
            line = input(ask)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        except UnicodeDecodeError:
            raise UserError("standard input: not UTF-8 text") from None
        if not line.strip():
            continue
        shown = ""

        def show(tokens: list[int]) -> bool:
            nonlocal shown
            now = text.certain(tokens)
            print(now[len(shown) :], end="", flush=True)
            shown = now
            return text.ended(tokens)

        try:
            tokens = [tokenizer.encode(line.replace("\\n", "\n"))]
            if fit(tokens, model, tokenizer, cfg.max_new_tokens):
                print(f"the prompt lost its start: it has room for {len(tokens[0])} tokens", file=sys.stderr)
            with compute.autocast(), torch.inference_mode():
                stream = model.stream(
                    {number: tokens[0]},
                    cfg.max_new_tokens,
                    tokenizer.eot,
                    n_ids=tokenizer.size,
                    batch_size=1,
                    ended=show,
                    **cfg.how,
                )
                for _, _, ids in stream:
                    print(text.final(ids)[len(shown) :], flush=True)
                    shown = ""
        except KeyboardInterrupt:
            print()
        except UserError as error:  # a word that the tokenizer does not have
            fail(error)
        number += 1


def main() -> None:
    cfg = config.load(Config, prog="sample.py")
    compute = distributed.setup(cfg.device, cfg.dtype)
    if not cfg.prompts and compute.world > 1:
        raise UserError("key prompts: several processes cannot share a terminal: give --prompts and --out, or start one")
    print(compute, file=sys.stdout if cfg.prompts else sys.stderr)
    records = []
    if cfg.prompts:
        found = compute.once(lambda: list(jsonl.read(cfg.prompts, cfg.limit)))
        for where, record in found:
            jsonl.get(record, "prompt", str, where)
            records.append(record)
    tokenizer = choose(cfg.tokenizer, cfg.model)
    model = build_model(ModelKeys(init_from=cfg.model), tokenizer, compute)
    try:
        if cfg.prompts:
            sample_file(cfg, records, model, tokenizer, compute)
        else:
            converse(cfg, model, tokenizer, compute)
    except FloatingPointError as error:
        raise UserError(f"key model: {cfg.model}: {error}: its weights are damaged", here=True) from None


if __name__ == "__main__":
    run(main)
