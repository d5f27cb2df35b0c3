"""Conversations -> text: a model's own chat template, rendered by jinja2 in its sandbox, with what transformers gives it.

A conversation is a tuple of messages, dicts with `role` and `content`. A template is somebody else's program: it sees the
messages and a few plain values, and has a few seconds and a gigabyte for a conversation.
"""

import contextlib
import json
import re
import resource
import secrets
import signal
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property
from pathlib import Path

from base.errors import UserError
from data.examples import Example, Messages

SECONDS, MEMORY = 10, 2**30  # what one rendering may take, in seconds and bytes
MARK = f"{secrets.randbelow(10**18):018}"  # stands in every special token that a message writes out: no data can hold it
Span = tuple[int, int]  # characters of a text, from and to


class Mismatch(Exception):
    """What the template writes of a conversation does not begin with what it writes of its beginning."""


class TooLong(BaseException):
    """A template has had its time. No Exception: jinja2 passes over those while it compiles."""


class Chat:
    """A chat template, and what it is told beside the messages."""

    def __init__(self, text: str, tokenizer, kwargs: str = "", date: str = "", on_mismatch: str = "error"):
        """text: in Jinja. kwargs: a JSON object of more variables. date: the day that the template may write, YYYY-MM-DD; today
        where it is empty. on_mismatch: "drop" or "error", for an example whose rendering does not begin with its prompt's."""
        self.text, self.name, self.written = text, tokenizer.name, tokenizer.written
        self.on_mismatch = on_mismatch
        try:
            self.date = datetime.fromisoformat(date) if date else datetime.now()
        except ValueError:
            raise UserError(f"key date: {date!r} is no day: write YYYY-MM-DD") from None
        try:
            self.told = {"tools": None, "documents": None, **tokenizer.named, **json.loads(kwargs or "{}")}
        except (ValueError, TypeError):
            raise UserError(f'key chat_template_kwargs: {kwargs!r} is no JSON object: write {{"name": value}}') from None

    def decisive(self) -> list:
        """All that decides what it renders, as JSON values."""
        day = self.date.date().isoformat() if "strftime_now" in self.text else ""
        return [self.text, self.told, self.on_mismatch, day]

    def render(self, messages: Messages, where: str, asks: bool = False) -> tuple[str, list[Span]]:
        """The text of a conversation, and the spans that the template marks as generated (none in most templates).

        asks: with the beginning of an answer behind it. Special tokens that a message writes out have a MARK in them.
        UserError, which begins with `where`, for whatever the template does wrong, or does not accept.
        """
        given = [{name: self.mark(value) for name, value in m.items() if value is not None} for m in messages]
        template = self.template
        with _guarded(f"{where}: the chat template of {self.name} does not render it"):
            pieces, spans = template.environment.begin()
            for piece in template.generate(messages=given, add_generation_prompt=asks, **self.told):
                pieces.append(piece)
            return "".join(pieces), spans

    def mark(self, value):
        """A value without special tokens: each one written out in it gets a MARK behind its first character."""
        if isinstance(value, str):
            return self.written.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        return {name: self.mark(item) for name, item in value.items()} if isinstance(value, dict) else value

    def parts(self, example: Example) -> list[tuple[str, list[Span]]] | None:
        """For each completion of an example the text of the whole conversation, and the spans to learn or to score in it: all
        that follows the prompt; without a prompt, every turn of the assistant. None for an example that is to be dropped."""
        where = example.source
        try:
            if not example.prompt:
                text, spans = self.render(example.completions[0], where)
                return [(text, spans or list(self._turns(example.completions[0], text, where)))]
            prompt, _ = self.render(example.prompt, where, asks=True)
            texts = [self.render((*example.prompt, *answer), where)[0] for answer in example.completions]
            return [(text, [(len(_begins(text, prompt)), len(text))]) for text in texts]
        except Mismatch as error:
            if self.on_mismatch == "drop":
                return None
            raise UserError(f"{where}: {error}: give another --chat_template, or --on_mismatch drop") from None

    def _turns(self, messages: Messages, text: str, where: str) -> Iterator[Span]:
        """Where the assistant's turns stand in the text of a conversation: from what asks for an answer to what ends it."""
        end = 0
        for i in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            asked, _ = self.render(messages[:i], where, asks=True)
            so_far, _ = self.render(messages[: i + 1], where)
            begin = len(_begins(text, asked))
            if begin < end:
                raise Mismatch(f"its message {i + 1} begins within an earlier answer")
            end = len(so_far)
            if not text.startswith(so_far):  # the template writes a last turn in another way: Qwen3's gives it an empty thought
                answer = self.mark(messages[i]["content"]).strip()
                closed = answer + so_far.rpartition(answer or so_far)[2]
                end = text.find(closed, begin) + len(closed)
                if not answer or end < begin + len(closed):
                    _begins(text, so_far)
            yield begin, end

    @cached_property
    def template(self):
        """The compiled template. UserError for a jinja2 whose sandbox has known holes, and for a text that is no template."""
        try:
            import jinja2
            from jinja2.ext import Extension
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise UserError("chat templates need the package jinja2: pip install 'jinja2>=3.1.6'") from None
        if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
            raise UserError(f"jinja2 {jinja2.__version__} is no safe sandbox for chat templates: pip install 'jinja2>=3.1.6'")

        class Generation(Extension):
            """{% generation %} … {% endgeneration %}: what stands between them is the assistant's."""

            tags = frozenset(["generation"])

            def parse(self, parser):
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return jinja2.nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

            def _generated(self, caller) -> str:
                text, begin = caller(), sum(map(len, self.environment.pieces))
                self.environment.spans.append((begin, begin + len(text)))
                return text

        class Environment(ImmutableSandboxedEnvironment):
            """A sandbox that knows what has been rendered so far."""

            def begin(self) -> tuple[list[str], list[Span]]:
                self.pieces, self.spans = [], []
                return self.pieces, self.spans

        def raise_exception(message):
            raise jinja2.TemplateError(message)

        def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

        sandbox = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        sandbox.filters["tojson"] = tojson
        sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": self.date.strftime}
        with _guarded(f"the chat template of {self.name} cannot be read"):
            return sandbox.from_string(self.text)


def _begins(text: str, start: str) -> str:
    """`start`, with which `text` begins; Mismatch where it does not."""
    if text.startswith(start):
        return start
    at = next((i for i, (a, b) in enumerate(zip(text, start, strict=False)) if a != b), len(text))
    raise Mismatch(
        "what the chat template writes of the whole conversation does not begin with what it writes of its prompt: behind "
        f"{start[max(0, at - 30) : at]!r} the whole has {text[at : at + 30]!r}, the prompt {start[at : at + 30]!r}"
    )


@contextlib.contextmanager
def _guarded(what: str) -> Iterator[None]:
    """Raise a UserError, which begins with `what`, where the work raises anything, takes longer than SECONDS, or makes this
    process grow by MEMORY. For the main thread."""

    def stop(*_):
        raise TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(OSError):  # only Linux says how much there is
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
        return
    except TooLong:
        problem = f"it takes more than {SECONDS} seconds"
    except MemoryError:
        problem = f"it takes more than {MEMORY:,} bytes"
    except Exception as error:  # a template is a program, and may raise whatever it likes
        at = f" in line {error.lineno}" if hasattr(error, "lineno") else ""
        problem = f"{type(error).__name__}{at}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    raise UserError(f"{what} ({problem}): mend the line, or give another --chat_template FILE")
