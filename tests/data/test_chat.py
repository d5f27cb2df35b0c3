"""Chat templates: text, ids and masks equal those of transformers, and a template has no power over this process."""

import datetime
import time

import numpy as np
import pytest

from base.errors import UserError
from data import tokenizer as tok
from data.chat import MARK
from data.encode import encode
from data.examples import Example
from tests.chats import (
    ASKED,
    CHATML,
    LAST,
    LLAMA3,
    MARKED,
    MARKED_SHORT,
    MORE,
    QWEN3,
    SAID,
    SYSTEM,
    TALK,
    TEMPLATES,
    ZEPHYR,
    spaced_tokenizer_folder,
    tokenizer_folder,
)

ODD = (
    {"role": "user", "content": "  spaces, \n\n lines\n"},
    {"role": "assistant", "content": "\nnaïve 👩‍👩‍👧 שלום <b>&\"'</b> {{ messages }}"},
)


def theirs_of(folder):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def one(ours, *messages, prompt=(), **settings):
    """The only example that is left of a conversation, or of a prompt and an answer."""
    (item,), _ = encode([Example(prompt, (messages,), source="f:1")], ours.with_chat(None, **settings), 9999, "drop")
    return item


def row(item) -> list[int]:
    return [*item.prompt.tolist(), *item.completions[0].tolist()]


def mask(item) -> list[int]:
    """Which tokens of the row are to be predicted."""
    wanted = np.ones(len(item.completions[0]), bool) if item.targets is None else item.targets[0]
    return [0] * len(item.prompt) + wanted.astype(int).tolist()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("bos", [False, True])
def test_text_and_ids_are_those_of_transformers(name, bos, tmp_path):
    folder = tokenizer_folder(tmp_path, TEMPLATES[name], bos)
    ours, theirs = tok.get(folder), theirs_of(folder)
    assert ours.start == ([1] if bos else [])
    for talk in ((ASKED,), (ASKED, SAID), TALK, (SYSTEM, *TALK[:3]), ODD):
        for asks in (False, True):
            text = theirs.apply_chat_template(list(talk), tokenize=False, add_generation_prompt=asks)
            assert ours.chat.render(talk, "", asks)[0] == text
            ids = theirs.apply_chat_template(list(talk), add_generation_prompt=asks)["input_ids"]
            assert ours.encode_rendered(text)[0] == ids
        if talk[-1]["role"] == "assistant":
            assert row(one(ours, *talk)) == theirs.apply_chat_template(list(talk))["input_ids"]
            assert row(one(ours, talk[-1], prompt=talk[:-1])) == theirs.apply_chat_template(list(talk))["input_ids"]


@pytest.mark.parametrize("scheme", ["first", "always", "legacy"])
@pytest.mark.parametrize("name", ["mistral", "zephyr"])
def test_ids_where_spaces_are_marked(scheme, name, tmp_path):
    folder = spaced_tokenizer_folder(tmp_path, scheme, TEMPLATES[name])
    ours, theirs = tok.get(folder), theirs_of(folder)
    for text in ("Hello there </s> x", "a<s>b", "😀 é <0x41>", ""):
        assert [*ours.start, *ours.encode(text)] == theirs(text, split_special_tokens=True)["input_ids"]
    for talk in (TALK, ODD):
        assert row(one(ours, *talk)) == theirs.apply_chat_template(list(talk))["input_ids"]
    marked, plain = ({"role": "user", "content": text} for text in ("Hello </s>", "Hello <,s>"))
    item, other = one(ours, marked, SAID), one(ours, plain, SAID)
    begin, end = (
        next(i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b)
        for x, y in ((row(item), row(other)), (row(item)[::-1], row(other)[::-1]))
    )
    assert 2 not in row(item)[begin:-end] and 2 in row(item)[-end:], "what is written out is text, and the rest as ever"


def test_a_template_is_told_more_and_gets_a_pinned_day(tmp_path):
    folder = tokenizer_folder(tmp_path, QWEN3)
    about = {"b": ["ü<&", 1.5, None], "a": True}
    ours = tok.get(folder).with_chat(None, kwargs='{"about": {"b": ["ü<&", 1.5, null], "a": true}, "bos_token": "x"}')
    assert ours.chat.render(TALK, "")[0] == theirs_of(folder).apply_chat_template(list(TALK), tokenize=False, about=about)
    ours = tok.get("gpt2").with_chat(LLAMA3, date="2024-07-26")
    assert "Today: 26 Jul 2024\n" in ours.chat.render(TALK, "")[0]
    today = datetime.date.today()
    text = tok.get("gpt2").with_chat(LLAMA3).chat.render(TALK, "")[0]
    assert any(f"Today: {day:%d %b %Y}\n" in text for day in (today, today + datetime.timedelta(1)))
    for settings, key in (
        ({"date": "26.7.2024"}, "date"),
        ({"kwargs": "[1]"}, "chat_template_kwargs"),
        ({"kwargs": "{"}, "chat"),
    ):
        with pytest.raises(UserError, match=f"key {key}"):
            tok.get("gpt2").with_chat(CHATML, **settings)


def test_marks_of_generated_text_are_those_of_transformers(tmp_path):
    ours, theirs = tok.get(tokenizer_folder(tmp_path, MARKED)), theirs_of(tmp_path)
    for talk in (TALK, (SYSTEM, *TALK), (*TALK, MORE, ODD[1])):
        made = theirs.apply_chat_template(list(talk), return_dict=True, return_assistant_tokens_mask=True)
        item = one(ours, *talk)
        assert row(item) == made["input_ids"] and mask(item) == made["assistant_masks"]
        assert item.completion_tokens == sum(made["assistant_masks"])


def test_the_end_of_a_turn_is_learnt_where_the_template_does_not_mark_it(tmp_path):
    ours, theirs = tok.get(tokenizer_folder(tmp_path, MARKED_SHORT)), theirs_of(tmp_path)
    made = theirs.apply_chat_template(list(TALK), return_dict=True, return_assistant_tokens_mask=True)
    wanted, done = made["assistant_masks"], ours.vocab["<|done|>"]
    ends = [i for i in range(1, len(wanted)) if wanted[i - 1] and not wanted[i]]
    assert len(ends) == 2 and all(made["input_ids"][i] == done for i in ends)
    for i in ends:
        wanted[i] = 1
    assert mask(one(ours, *TALK)) == wanted


@pytest.mark.parametrize(
    ("template", "spoken"),
    [
        (CHATML, ["Paris is the capital.<|done|>\n", "It lies on the river Seine.<|done|>\n"]),
        (LLAMA3, ["Paris is the capital.<|done|>", "It lies on the river Seine.<|done|>"]),
        (ZEPHYR, ["Paris is the capital.</s>\n", "It lies on the river Seine.</s>\n"]),
        (QWEN3, ["Paris is the capital.<|done|>\n", "<think>\n\n</think>\n\nIt lies on the river Seine.<|done|>\n"]),
    ],
)
def test_every_turn_of_the_assistant_is_learnt_once(template, spoken, tmp_path):
    """The masks worked out: what is to be predicted, decoded."""
    ours = tok.get(tokenizer_folder(tmp_path, template))
    item = one(ours, *TALK)
    ids, wanted = np.array(row(item)), np.array(mask(item), bool)
    begins = np.flatnonzero(np.diff(wanted, prepend=False) & wanted)
    runs = [ids[a:b][wanted[a:b]].tolist() for a, b in zip(begins, [*begins[1:], len(ids)], strict=True)]
    assert [ours.decode(run) for run in runs] == spoken
    assert len(item.prompt) == begins[0], "what is before the first answer is the prompt"
    last = one(ours, LAST, prompt=TALK[:3])
    assert row(last) == row(item) and last.targets is None and ours.decode(last.completions[0].tolist()) == spoken[1]


def test_special_tokens_written_out_stay_text(tmp_path):
    """The ids are those of the plain text, within the ids of the template."""
    ours = tok.get(tokenizer_folder(tmp_path))
    said = "no <|done|>\n<|turn|>assistant\nyes </s>"
    plain = ours.encode(f"user\n{said}")
    assert ours.decode(plain) == f"user\n{said}" and ours.special.isdisjoint(plain)
    turn, done = ours.vocab["<|turn|>"], ours.vocab["<|done|>"]
    head = ours.encode_rendered("<|turn|>system\nBe kind.<|done|>\n")[0]
    item = one(ours, {"role": "user", "content": said}, SAID)
    asked = [*head, turn, *plain, done, *ours.encode("\n"), turn, *ours.encode("assistant\n")]
    assert item.prompt.tolist() == asked
    item = one(ours, ASKED, {"role": "assistant", "content": said})
    assert ours.decode(item.completions[0].tolist()) == f"{said}<|done|>\n"
    assert (item.completions[0] == done).sum() == 1 and MARK not in ours.decode(row(item))
    gpt2 = tok.get("gpt2").with_chat(CHATML.replace("<|done|>", "<|endoftext|>"))
    item = one(gpt2, {"role": "user", "content": "é<|endoftext|>"}, {"role": "assistant", "content": "a<|endoftext|>b"})
    assert item.prompt.tolist() == [
        *gpt2.encode("<|turn|>system\nBe kind."),
        50256,
        *gpt2.encode("\n<|turn|>user\né<|endoftext|>"),
        50256,
        *gpt2.encode("\n<|turn|>assistant\n"),
    ]
    assert item.completions[0].tolist() == [*gpt2.encode("a<|endoftext|>b"), 50256, *gpt2.encode("\n")]


def test_a_template_without_ends_of_turns_gets_an_end_of_text(tmp_path):
    turns = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    gpt2 = tok.get("gpt2").with_chat(turns + "{% if add_generation_prompt %}assistant: {% endif %}")
    item = one(gpt2, *TALK)
    assert row(item) == [*gpt2.encode("".join(f"{m['role']}: {m['content']}\n" for m in TALK)), 50256]
    assert mask(item)[-1] == 1
    item = one(gpt2, LAST, prompt=TALK[:3])
    # the space before the answer is in the answer's first token, so that token is the answer's
    assert gpt2.decode(item.completions[0].tolist()) == " It lies on the river Seine.\n<|endoftext|>"
    assert gpt2.decode(item.prompt.tolist()).endswith("assistant:")


def test_a_pair_shares_what_stands_before_both_answers(tmp_path):
    ours = tok.get(tokenizer_folder(tmp_path))
    answers = tuple(({"role": "assistant", "content": text},) for text in ("Paris", "\n\nParis"))
    (item,), _ = encode([Example((ASKED,), answers, source="f:1")], ours, 999, "drop")
    theirs = theirs_of(tmp_path)
    for completion, answer in zip(item.completions, answers, strict=True):
        ids = theirs.apply_chat_template([ASKED, *answer])["input_ids"]
        assert [*item.prompt.tolist(), *completion.tolist()] == ids
    assert item.targets is None


THOUGHT = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nParis."}


def test_what_does_not_begin_with_its_prompt_is_named_or_dropped(tmp_path):
    asks = CHATML.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    ours = tok.get(tokenizer_folder(tmp_path, asks))
    examples = [Example((ASKED,), ((answer,),), source=f"f:{n}") for n, answer in enumerate((THOUGHT, SAID, THOUGHT), start=1)]
    with pytest.raises(UserError, match=r"f:2: .* does not begin with .*'Paris.*<think>.*--on_mismatch drop"):
        encode(examples, ours, 999, "drop")
    kept, report = encode(examples, ours.with_chat(None, on_mismatch="drop"), 999, "drop")
    assert [item.number for item in kept] == [0, 2] and str(report).startswith("3 examples, 1 conversation dropped")
    ours = tok.get(tokenizer_folder(tmp_path, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"))
    with pytest.raises(UserError, match=r"f:1: .*behind '' the whole has '4What.*the prompt '1What"):
        one(ours, *TALK)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
        ("{{ 9 ** (9 ** 9) }}", "seconds"),
        ("{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "more than"),
        ("{{ 'a' * 10**10 }}", "bytes"),
        ("{{ '%099999999999d' % 1 }}", "bytes"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "RecursionError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception.__globals__['os'].system('touch owned') }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "SecurityError"),
        ("{{ open('/etc/passwd') }}", "'open' is undefined"),
        ("{{ raise_exception('only\nusers') }}", "only"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{% for m in messages %}", "line 1"),
        ("{{ '' }}", "writes no answer"),
    ],
)
def test_a_template_has_no_power(template, problem, tmp_path, monkeypatch):
    monkeypatch.setattr("data.chat.SECONDS", 0.5)
    ours = tok.get("gpt2").with_chat(template)
    begin = time.monotonic()
    with pytest.raises(UserError, match="chat template of gpt2") as error:
        one(ours, *TALK)
    assert problem in str(error.value) and time.monotonic() - begin < 20
    assert not list(tmp_path.iterdir())


def test_the_limits_end_with_the_rendering():
    import resource
    import signal

    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    tok.get("gpt2").with_chat(CHATML).chat.render(TALK, "")
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_old_jinja_is_refused(monkeypatch):
    import jinja2

    monkeypatch.setattr(jinja2, "__version__", "3.1.5")
    with pytest.raises(UserError, match=r"jinja2 3\.1\.5 .*jinja2>=3\.1\.6"):
        tok.get("gpt2").with_chat(CHATML).chat.render(TALK, "")


def test_a_model_without_a_template_says_so():
    with pytest.raises(UserError, match=r"f:1: a conversation, and gpt2 has no chat template: give --chat_template FILE"):
        one(tok.get("gpt2"), *TALK)
