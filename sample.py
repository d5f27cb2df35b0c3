"""Prompts in, completions out: a JSONL file of them, or a conversation with the terminal.

    python sample.py --model runs/dpo/model --prompts prompts.jsonl --out samples.jsonl --n 4 --temperature 0.7
    python sample.py --model gpt2
    python sample.py --model runs/dpo/model --chat
    python sample.py --server http://host:8000/v1 --server_model NAME --prompts prompts.jsonl --out samples.jsonl --n 4
    torchrun --nproc_per_node 2 -- sample.py --model runs/dpo/model --prompts prompts.jsonl --out samples.jsonl --n 4

torchrun needs its -- here: it would take --n for a short form of its own options, and refuse it as an ambiguous one.

A line of the prompts file is {"prompt": …}, or {"messages": […]} where the model has a chat template, with whatever else; the
same line with "completions": […] comes out. What is drawn for a prompt follows from the seed, its place in the file, and which
of its n completions it is, not from the batch or the number of processes. (Logits of another batch size, dtype or machine
differ by rounding, and where two tokens are closer than that, another may win: about once in 100,000 tokens in float32, once in
100 in bfloat16.) An empty prompt stands for the start of a text, <|endoftext|>. A prompt that leaves no room for max_new_tokens
loses its start.

Finished prompts are kept in FILE.part0, FILE.part1, … (one a process) until FILE is written: the same command goes on where it
was killed. Without --prompts, a line typed or piped in is a prompt (\n in it a new line), answered as it is drawn;
Ctrl-C stops the text, Ctrl-D leaves. With --chat it is a turn of a conversation, which the model remembers.

With --server the completions come from a server with OpenAI's protocol (runtime/served.py), and no model is loaded here.
"""

from base.script import run

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import weights
from base.errors import UserError, fail
from base.files import write_whole
from base.progress import Progress, count
from data import jsonl, messages
from data.encode import shorten
from generate import lay_out, stream
from runtime import config, distributed, served
from runtime.build import build_model, build_tokenizer
from runtime.config import key
from runtime.keys import ChatKeys, DeviceKeys, ModelKeys, ServerKeys
from runtime.unfinished import Unfinished


@dataclass
class Config(ServerKeys, ChatKeys, DeviceKeys):
    """Complete the prompts of a file, or those typed in."""

    model: str = key("", "a folder of a model, adapter or run; gpt2 (-medium, …); owner/name on the hub", model=True)
    server: str = key("", "instead: address of a server with OpenAI's protocol (vLLM, SGLang, llama.cpp): http://HOST:8000/v1")
    server_model: str = key("", "name of the model at that server; empty = model")
    timeout: float = key(600.0, "seconds to wait for a whole answer of the server", above=0)
    prompts: str = key(
        "", 'a .jsonl / .jsonl.gz file with a "prompt" or "messages" per line; empty = read them from the terminal'
    )
    out: str = key("", "the JSONL file to write; one that is there is replaced when the new one is whole", writes="")
    chat: bool = key(False, "hold a conversation in the terminal, by the chat template")
    n: int = key(1, "completions per prompt", least=1)
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
        if self.chat and self.prompts:
            raise UserError("key chat: it is for the terminal: leave out prompts and out (lines with messages need no --chat)")
        served.check(self)
        if self.out.endswith(".gz"):
            raise UserError(f"key out: {self.out}: what is written is not compressed: leave out .gz")

    @property
    def how(self) -> dict:
        """What `generate.stream` is told about drawing."""
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
        return next(text[: len(text) - k] for k in range(len(self.stop), -1, -1) if text.endswith(self.stop[:k]))


def fit(tokens: list[list[int]], model, tokenizer, max_new_tokens: int) -> int:
    """Make prompts, in place, ones that the model can continue by `max_new_tokens`; returns how many lost their start."""
    room = model.config.block_size + 1 - max_new_tokens  # a completion's last token is not fed
    if room < 1:
        raise UserError(f"key max_new_tokens: {max_new_tokens}: the model has a context of {model.config.block_size} tokens")
    cut = sum(len(ids) > room for ids in tokens)
    tokens[:] = [shorten(ids, max(0, len(ids) - room), tokenizer) or [tokenizer.eot] for ids in tokens]
    return cut


# --- the two modes ---------------------------------------------------------------------------------------------------


def encode(prompts: list, tokenizer, wheres: list[str]) -> list[list[int]]:
    """Token ids of prompts, texts or messages."""
    texts = iter(tokenizer.encode_batch([prompt for prompt in prompts if isinstance(prompt, str)]))
    return [
        [*tokenizer.start, *next(texts)]
        if isinstance(prompt, str)
        else tokenizer.encode_rendered(tokenizer.need_chat(where).render(prompt, where, asks=True)[0])[0]
        for prompt, where in zip(prompts, wheres, strict=True)
    ]


def sample_file(cfg: Config, records: list[dict], prompts: dict[str, str | tuple], model, tokenizer, compute) -> None:
    """Complete the prompt {"file:line": text or messages} of every record by a model."""
    tokens = encode(list(prompts.values()), tokenizer, list(prompts))
    asked = [prompt if isinstance(prompt, str) else ids for prompt, ids in zip(prompts.values(), tokens, strict=True)]
    cut = fit(tokens, model, tokenizer, cfg.max_new_tokens)
    if cut:
        print(f"{cut:,} of {len(prompts):,} prompts lost their start: the model's context is {model.config.block_size} tokens")
    source = {
        "weights_sha256": weights.fingerprint(model),
        "tokenizer_sha256": tokenizer.fingerprint(),
        "dtype": str(compute.dtype).removeprefix("torch."),
    }
    text = Text(tokenizer, cfg.stop)

    def draw(todo: list[int]) -> Iterator[tuple[int, int, str, int]]:
        todo = {i: tokens[i] for i in sorted(todo, key=lambda i: -len(tokens[i]))}
        for i, j, ids in completions(cfg, todo, cfg.batch_size, text.ended, model, tokenizer, compute):
            yield i, j, text.final(ids), len(ids)

    complete(cfg, records, asked, source, draw, compute)


def complete(cfg: Config, records: list[dict], asked: list, source: dict, draw: Callable, compute) -> None:
    """Write the records with their completions to cfg.out.

    asked, source: what they follow from beside the keys; unfinished.FIRST knows the first of `source`. draw: numbers of
    prompts -> (prompt number, sample, text, tokens) as completions are finished.
    """
    prompts = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    own = {"prompts_sha256": prompts, "max_new_tokens": cfg.max_new_tokens, "stop": cfg.stop}
    settings = source | own | cfg.how
    with Unfinished(cfg.out, settings, cfg.overwrite, compute) as unfinished:
        done = unfinished.done
        todo = [i for i in range(len(records)) if i not in done][compute.rank :: compute.world]
        print(f"{count(len(records), 'prompts')}, {cfg.n} completions each, {len(done):,} finished before", flush=True)
        progress = Progress("sampling", cfg.n * len(todo), "completions", compute.rank)
        found, written = {i: {} for i in todo}, 0
        with contextlib.closing(draw(todo)) as drawn:
            for i, j, text, n_tokens in drawn:
                found[i][j] = text
                if len(found[i]) == cfg.n:
                    found[i] = [found[i][j] for j in range(cfg.n)]
                    unfinished.add(i, found[i])
                written += n_tokens
                progress.add(1)
        seconds = progress.close()
        print(f"{written:,} tokens, {written / max(seconds, 1e-9):,.1f} tokens/s" + (" on rank 0" if compute.world > 1 else ""))

        for share in compute.gather(found):
            done |= share
        lines = (json.dumps(r | {"completions": done[i]}) + "\n" for i, r in enumerate(records))
        compute.once(lambda: write_whole(cfg.out, "".join(lines)))
        unfinished.remove()
    print(f"wrote {cfg.out}")


def completions(cfg: Config, prompts: dict[int, list[int]], batch_size: int, ended, model, tokenizer, compute):
    """`generate.stream` with the keys' settings: (prompt number, sample, tokens) as each is finished."""
    with compute.autocast(), torch.inference_mode():
        yield from stream(
            model,
            prompts,
            cfg.max_new_tokens,
            tokenizer.stops,
            n_ids=tokenizer.size,
            batch_size=batch_size,
            ended=ended,
            **cfg.how,
        )


def converse(cfg: Config, model, tokenizer, compute) -> None:
    """Answer line after line of standard input, until it ends. Ctrl-C stops an answer."""
    text = Text(tokenizer, cfg.stop)
    number, said = 0, ()
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip():
                prompt = line.replace("\\n", "\n")
                asked = (*said, {"role": "user", "content": prompt}) if cfg.chat else prompt
                written = answer(cfg, asked, number, text, model, tokenizer, compute)
                said = (*asked, {"role": "assistant", "content": written}) if cfg.chat else ()
                number += 1
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
        except UnicodeDecodeError:
            raise UserError("standard input: not UTF-8 text") from None
        except UserError as error:  # a word that the tokenizer does not have
            fail(error)


def answer(cfg: Config, prompt: str | tuple, number: int, text: Text, model, tokenizer, compute) -> str:
    """Print the completion of one prompt while it is drawn, and return it."""
    tokens = encode([prompt], tokenizer, ["standard input"])
    while cfg.chat and len(prompt) > 1 and len(tokens[0]) + cfg.max_new_tokens > model.config.block_size + 1:
        prompt = prompt[2:]  # the oldest question and its answer
        tokens = encode([prompt], tokenizer, ["standard input"])
    if fit(tokens, model, tokenizer, cfg.max_new_tokens):
        print(f"the prompt lost its start: it has room for {len(tokens[0])} tokens", file=sys.stderr)
    printed = 0

    def show(ids: list[int]) -> bool:
        nonlocal printed
        certain = text.certain(ids)
        print(certain[printed:], end="", flush=True)
        printed = max(printed, len(certain))
        return text.ended(ids)

    for _, _, ids in completions(cfg, {number: tokens[0]}, 1, show, model, tokenizer, compute):
        print(text.final(ids)[printed:], flush=True)
        printed = 0
    return text.final(ids)


def main() -> None:
    cfg = config.load(Config, prog="sample.py")
    compute = distributed.setup(cfg.device, cfg.dtype)
    if not cfg.prompts and compute.world > 1:
        raise UserError("key prompts: several processes cannot share a terminal: give --prompts and --out, or start one")
    print(compute, file=sys.stdout if cfg.prompts else sys.stderr)
    found = compute.once(lambda: list(jsonl.read(cfg.prompts, cfg.limit))) if cfg.prompts else []
    records, prompts = [r for _, r in found], {where: messages.prompt_of(record, where) for where, record in found}
    if cfg.server:
        server = served.Sampler(cfg, prompts)
        return complete(cfg, records, list(prompts.values()), server.source, server.draw, compute)
    tokenizer = build_tokenizer(cfg, cfg.model, compute)
    model = build_model(ModelKeys(init_from=cfg.model), tokenizer, compute)
    if cfg.chat or not all(isinstance(prompt, str) for prompt in prompts.values()):
        tokenizer.need_chat("key chat" if cfg.chat else f"key prompts: {cfg.prompts}")
        tokenizer.stops |= {tokenizer.turn_end()}
    if compute.device.type == "cpu" and compute.dtype == torch.float32:
        lay_out(model, min(cfg.batch_size, cfg.n * len(records)) if cfg.prompts else 1)
    try:
        if cfg.prompts:
            sample_file(cfg, records, prompts, model, tokenizer, compute)
        else:
            converse(cfg, model, tokenizer, compute)
    except FloatingPointError as error:
        raise UserError(f"key model: {cfg.model}: {error}: its weights are damaged", here=True) from None


if __name__ == "__main__":
    run(main)
