"""Conversations in files: what each view makes of them, what is refused, and what becomes of them in a batch."""

import json

import numpy as np
import pytest

import data
from base.errors import UserError
from data import messages
from data import tokenizer as tok
from data.batch import collate
from data.encode import data_hash, encode, load_encoded
from tests.chats import ASKED, LAST, MORE, SAID, SYSTEM, TALK, tokenizer_folder
from tests.conftest import flags
from tests.data.published import write

OTHER = {"role": "assistant", "content": "No."}


def load(path, view, *records):
    return data.load(str(write(path / "x.jsonl", *records)), "train", view)


def test_messages_in_the_views(tmp_path):
    (e,) = load(tmp_path, "sft", {"messages": [SYSTEM, *TALK], "source": "x"})
    assert e.prompt == () and e.completions == ((SYSTEM, *TALK),) and e.is_chat and e.source.endswith("x.jsonl:1")
    (e,) = load(tmp_path, "sft", {"prompt": [ASKED], "completion": [SAID]})
    assert (e.prompt, e.completions) == ((ASKED,), ((SAID,),))
    answers = {"prompt": [*TALK[:3]], "chosen": [LAST], "rejected": [OTHER]}
    (e,) = load(tmp_path, "preference", answers)
    assert (e.prompt, e.completions) == (TALK[:3], ((LAST,), (OTHER,)))
    assert load(tmp_path, "sft", answers)[0].completions == ((LAST,),)
    (e,) = load(tmp_path, "sft", {"prompt": "P", "completion": " C"})
    assert not e.is_chat


@pytest.mark.parametrize("system", [(), (SYSTEM,)])
def test_whole_conversations_share_their_beginning(tmp_path, system):
    """As in UltraFeedback: a text in `prompt` and `messages` stand beside them."""
    whole = {"chosen": [*system, *TALK], "rejected": [*system, *TALK[:3], OTHER], "prompt": "not to be trusted"}
    (e,) = load(tmp_path, "preference", whole | {"messages": [*system, *TALK]})
    assert (e.prompt, e.completions) == ((*system, *TALK[:3]), ((LAST,), (OTHER,)))
    assert load(tmp_path, "sft", whole)[0] == data.Example(e.prompt, ((LAST,),), source=e.source)
    assert load(tmp_path, "sft", whole | {"messages": [*system, *TALK]})[0].completions == ((*system, *TALK),)
    (e,) = load(tmp_path, "preference", {"chosen": [ASKED, SAID, MORE, LAST], "rejected": [ASKED, OTHER, MORE, LAST]})
    assert (e.prompt, e.completions) == ((ASKED,), ((SAID, MORE, LAST), (OTHER, MORE, LAST)))
    (e,) = load(tmp_path, "preference", {"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]})
    assert e.completions == ((SAID,), (SAID,)), "such a pair is dropped with the others that are equal"


USER_TWICE = {"messages": [ASKED, MORE, SAID]}


@pytest.mark.parametrize(
    ("view", "record", "message"),
    [
        ("sft", {"messages": []}, "x.jsonl:1: the conversation in 'messages' is empty"),
        ("sft", {"messages": "hi"}, "x.jsonl:1: the field 'prompt' is missing"),
        ("sft", {"messages": ["hi"]}, "x.jsonl:1: message 1 of 'messages' must be {"),
        ("sft", {"messages": [ASKED]}, "x.jsonl:1: the conversation in 'messages' ends with the user"),
        ("sft", {"messages": [ASKED, SAID, MORE]}, "'messages' ends with the user: its last turn must be of the assistant"),
        ("sft", USER_TWICE, "x.jsonl:1: message 2 of 'messages': a turn of the user comes after the user's"),
        ("sft", {"messages": [SAID]}, "message 1 of 'messages': a turn of the assistant comes first"),
        ("sft", {"messages": [SYSTEM, SAID]}, "message 2 of 'messages': a turn of the assistant comes after the system's"),
        ("sft", {"messages": [ASKED, SAID, SYSTEM]}, "message 3 of 'messages': a turn of the system comes after"),
        ("sft", {"messages": [ASKED, {"role": "bot", "content": "x"}]}, "message 2 of 'messages': the role 'bot' is unknown"),
        ("sft", {"messages": [ASKED, {"role": "assistant"}]}, "message 2 of 'messages': the field 'content' is missing"),
        ("sft", {"messages": [ASKED, {"role": "assistant", "content": [1]}]}, "the field 'content' must be text, not [1]"),
        ("sft", {"messages": [ASKED, {"role": "assistant", "content": ""}]}, "message 2 of 'messages': the content is empty"),
        ("sft", {"messages": [ASKED, {"role": "assistant", "content": "\ud800"}]}, "half a surrogate pair"),
        ("sft", {"prompt": [ASKED, SAID], "completion": [SAID]}, "'prompt' ends with the assistant: its last turn must"),
        ("sft", {"prompt": "P", "completion": [SAID]}, "the field 'prompt' must be a list, not 'P'"),
        ("preference", {"chosen": [ASKED, SAID]}, "the field 'rejected' is missing"),
        ("preference", {"chosen": [ASKED, SAID], "rejected": "x"}, "the field 'rejected' must be a list"),
        ("preference", {"chosen": [ASKED, SAID], "rejected": [MORE, OTHER]}, "do not part at an answer"),
        ("preference", {"chosen": [*TALK], "rejected": [*TALK[:2], ASKED, LAST]}, "do not part at an answer"),
        ("preference", {"chosen": [SAID], "rejected": [OTHER]}, "the field 'prompt' is missing"),
        (
            "preference",
            {"prompt": [ASKED], "chosen": [SAID], "rejected": [MORE, SAID]},
            "message 1 of 'rejected': a turn of the user",
        ),
        ("mcq", {"messages": [*TALK]}, "has no multiple-choice questions"),
    ],
)
def test_bad_conversations_name_file_line_and_message(tmp_path, view, record, message):
    with pytest.raises(UserError) as error:
        load(tmp_path, view, record)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_prompts_to_sample_from():
    whole = {"chosen": [*TALK], "rejected": [*TALK[:3], OTHER], "prompt": "not to be trusted"}
    for record in ({"messages": [*TALK[:3]]}, {"messages": [*TALK]}, {"prompt": [*TALK[:3]]}, whole):
        assert messages.prompt_of(record, "f:1") == TALK[:3]
    assert messages.prompt_of({"prompt": "P"}, "f:1") == "P"
    assert messages.as_text("P") == "P" and messages.as_text((ASKED,)) == ASKED["content"]
    assert messages.as_text(TALK[:2]) == "User: What is the capital of France?\n\nAssistant: Paris is the capital."
    with pytest.raises(UserError, match="f:1: the conversation in 'messages' is empty"):
        messages.prompt_of({"messages": [SAID]}, "f:1")


def test_masked_tokens_are_read_but_not_predicted(tmp_path):
    """Each token of a conversation stands in its row once, and only the assistant's are targets."""
    ours = tok.get(tokenizer_folder(tmp_path))
    long, short = (data.Example((), (talk,), source="f:1") for talk in (TALK, TALK[:2]))
    items, report = encode([long, short], ours, 999, "drop")
    assert str(report) == "2 examples"
    batch = collate([[items[0], items[1]]])
    rows = [[*i.prompt, *i.completions[0]] for i in items]
    assert batch.tokens[0].tolist() == [*rows[0][:-1], *rows[1][:-1]]
    wanted = [np.flatnonzero(i.targets[0]) + len(i.prompt) for i in items]
    assert 0 < len(wanted[0]) < len(items[0].completions[0]), "the user's second turn is not to be predicted"
    assert batch.target.tolist() == [rows[n][at] for n in (0, 1) for at in wanted[n]]
    assert batch.source.tolist() == [*(wanted[0] - 1), *(wanted[1] - 1 + len(rows[0]) - 1)]
    assert batch.completion.tolist() == [0] * len(wanted[0]) + [1] * len(wanted[1])
    assert [i.completion_tokens for i in items] == [len(w) for w in wanted]
    before = data_hash(items)
    items[0].targets[0][-1] = False
    assert data_hash(items) != before, "the hash of the data knows what is to be predicted"


def test_long_conversations_keep_their_beginning_of_text(tmp_path):
    ours = tok.get(
        tokenizer_folder(tmp_path, "{{ bos_token }}" + "{% for m in messages %}{{ m.content }}</s>{% endfor %}", True)
    )
    example = data.Example((ASKED,), ((SAID,),), source="f:1")
    (whole,), _ = encode([example], ours, 999, "drop")
    (cut,), report = encode([example], ours, whole.longest - 3, "left")
    assert whole.prompt[0] == cut.prompt[0] == 1 and cut.prompt[1:].tolist() == whole.prompt[4:].tolist()
    assert str(report) == "1 example, 1 prompt cut from the left, 3 tokens cut off them"
    text = data.Example("What is it?", (" It",), source="f:1")
    (item,), _ = encode([text], ours, 999, "drop")
    assert item.prompt.tolist() == [1, *ours.encode("What is it?")] and item.completions[0].tolist() == [*ours.encode(" It"), 2]
    (item,), _ = encode([data.Example("", (" It",), source="f:1")], ours, 999, "drop")
    assert item.prompt.tolist() == [1]


def test_a_file_of_conversations_is_written_again(tmp_path, call):
    for view, record in (
        ("sft", {"messages": [*TALK]}),
        ("preference", {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]}),
    ):
        file, out = write(tmp_path / "x.jsonl", record), tmp_path / "out.jsonl"
        assert call("data.__main__", *flags(data=file, view=view, out=out))[0] == 0
        assert json.loads(out.read_text()) == record
    assert call("data.__main__", *flags(data=file, view="prompts", out=out))[0] == 0
    assert messages.prompt_of(json.loads(out.read_text()), "") == (ASKED,)


def test_mixed_files(tmp_path):
    """Lines of text and lines of messages in one file."""
    ours = tok.get(tokenizer_folder(tmp_path))
    file = write(
        tmp_path / "x.jsonl", {"prompt": "P", "completion": "C"}, {"messages": [*TALK]}, {"prompt": "Q", "completion": "D"}
    )
    items = load_encoded(str(file), "train", "sft", ours, 999, "drop")
    assert [i.targets is None for i in items] == [True, False, True]
    assert [ours.decode(i.completions[0].tolist()) for i in items[::2]] == ["C</s>", "D</s>"]
