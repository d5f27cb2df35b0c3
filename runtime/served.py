"""Completions from a server that speaks OpenAI's protocol (vLLM, SGLang, llama.cpp, `transformers serve`), for sample.py.

A text goes to /completions, a conversation to /chat/completions. The same seeds are sent each time, but whether the same texts
come back is up to the server: its batches, its version and its hardware decide too.
"""

import random
from collections.abc import Iterator
from typing import Any

from base.errors import UserError, warn
from base.openai import NoAnswer, Server
from base.progress import count


def check(cfg: Any) -> None:
    """Raise UserError for keys of sample.py that do not go together with a server, or that name no model."""
    if not cfg.model and not (cfg.server and cfg.server_model):
        raise UserError("missing key model: give --model, or --server and --server_model")
    if cfg.server_model and not cfg.server:
        raise UserError("key server_model: it names a model at a server: give --server too")
    if cfg.server and not cfg.prompts:
        raise UserError("key server: it completes the prompts of a file: give --prompts and --out")
    if cfg.server and (cfg.chat_template or cfg.chat_template_kwargs or cfg.date):
        raise UserError("key chat_template, chat_template_kwargs or date: the server has its own: set them there")


class Sampler(Server):
    """A model at a server, completing the prompts {"file:line": text or messages} as sample.py's keys `cfg` say."""

    hint = "; leave out --top_k where it knows none"

    def __init__(self, cfg: Any, prompts: dict[str, str | tuple]):
        super().__init__(cfg, "server", f"start the same command again, finished prompts are kept in {cfg.out}.part0, …")
        self.prompts = list(prompts.items())
        self.model = cfg.server_model or cfg.model
        self.source = {"server": self.url, "server_model": self.model}  # see unfinished.FIRST
        self.draws = 1 if cfg.temperature < 1e-6 else cfg.n  # some servers refuse n where nothing is drawn

    def draw(self, todo: list[int]) -> Iterator[tuple[int, int, str, int]]:
        """(prompt number, sample, text, tokens) as prompts are finished. Raises UserError at the end if one got no answer."""
        failed, varied = [], self.draws == 1 or not todo
        for i, (texts, n_tokens) in self.each(self._complete, list(todo)):
            if isinstance(texts, NoAnswer):
                failed.append(f"{self.prompts[i][0]}: {texts}")
                continue
            varied |= len(set(texts)) > 1
            for j in range(self.cfg.n):
                yield i, j, texts[j % self.draws], 0 if j else n_tokens
        if failed:
            raise UserError(f"{count(len(failed), 'prompts')} got no answer; {failed[0]}: {self.again}", here=True)
        if not varied:
            warn(f"all texts of a prompt are equal, at temperature {self.cfg.temperature}: does the server draw?")

    def _complete(self, i: int) -> tuple[list[str] | NoAnswer, int]:
        """(texts, their tokens) of one prompt. A server that knows no `n` gives one text; it is asked again for the rest."""
        cfg, (where, prompt) = self.cfg, self.prompts[i]
        path, asked = ("completions", "prompt") if isinstance(prompt, str) else ("chat/completions", "messages")
        body = {"model": self.model, asked: prompt, "max_tokens": cfg.max_new_tokens, "temperature": cfg.temperature}
        body |= {"stop": [cfg.stop]} if cfg.stop else {}
        body |= {"top_k": cfg.top_k} if cfg.top_k else {}
        body |= {"top_p": cfg.top_p} if cfg.top_p < 1 else {}
        texts, n_tokens = [], 0
        try:
            while missing := self.draws - len(texts):
                body["seed"] = random.Random(f"{cfg.seed} {i} {len(texts)}").getrandbits(31)
                found, used = self.ask(path, body | ({"n": missing} if missing > 1 else {}), self._read)
                texts, n_tokens = texts + found[:missing], n_tokens + used
        except NoAnswer as error:
            return error, 0
        except UserError as error:
            raise UserError(f"{where}: {error}", here=True) from None
        return texts, n_tokens

    def _read(self, said: Any) -> tuple[list[str], int]:
        """An answer's texts, without the stop text and what comes after it, and their tokens as the server counts."""
        texts = [self.text_of(choice) for choice in said["choices"]]
        if not texts:
            raise ValueError("no choices")
        return [text.partition(self.cfg.stop)[0] if self.cfg.stop else text for text in texts], self.tokens_of(said)[1]
