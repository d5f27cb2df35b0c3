"""Your own files: what is read from them in each view, and what is said of files that are not as they should be."""

import gzip
import json
from collections import Counter

import pytest

import data
from base.errors import UserError
from data.encode import load_encoded
from data.plan import epoch_order
from data.tokenizer import get
from tests.conftest import SHARED, flags
from tests.data.published import hh_folder, labels_folder, write

REAL = SHARED / "data"


def texts(examples: list[data.Example]) -> list[tuple]:
    return [(e.prompt, *e.completions) for e in examples]


def test_your_own_files_in_every_view(tmp_path):
    sft = write(tmp_path / "a.jsonl", {"prompt": "P", "completion": " C"}, "", {"prompt": "", "completion": "D"})
    found = data.load(str(sft), "train", "sft")
    assert texts(found) == [("P", " C"), ("", "D")] and found[1].source.endswith("a.jsonl:3")
    pairs = str(write(tmp_path / "b.jsonl", {"prompt": "P", "chosen": " C", "rejected": " R", "more": 1}))
    assert texts(data.load(pairs, "train", "preference")) == [("P", " C", " R")]
    assert texts(data.load(pairs, "train", "sft")) == [("P", " C")]
    options = {"prompt": "P ", "choices": ["A", "B"], "label": 1}
    mcq = str(write(tmp_path / "c.jsonl.gz", options, options))
    assert data.load(mcq, "val", "mcq")[0] == data.Example("P ", ("A", "B"), 1, source=f"{mcq}:1")
    assert texts(data.load(mcq, "val", "loglik", limit=1)) == [("P", " A", " B")], "the prompt's last space goes to the options"
    as_list = tmp_path / "d.json.gz"
    as_list.write_bytes(
        gzip.compress(b'\xef\xbb\xbf \n[ {"prompt": "P", "completion": " C"} ,\n{"prompt": "Q", "completion": "D"}] ')
    )
    found = data.load(str(as_list), "train", "sft")
    assert texts(found) == [("P", " C"), ("Q", "D")] and found[1].source == f"{as_list} entry 2"
    assert found[:1] == data.load(str(as_list), "train", "sft", limit=1)


@pytest.mark.parametrize(
    ("view", "content", "message"),
    [
        ("sft", "", "x.json: an empty file or list"),
        ("sft", "[]", "x.json: an empty file or list"),
        ("sft", "[", "x.json entry 1: not JSON"),
        ("sft", '{"prompt": "a", "completion": "b"}\n{"prompt": \n', "x.json:2: not JSON: Expecting value at character 12"),
        (
            "sft",
            '[{"prompt": "a", "completion": "b"}, {"prompt": ]',
            "x.json entry 2: not JSON: Expecting value at character 48",
        ),
        ("sft", '[{"prompt": "a", "completion": "b"}', "x.json entry 1: neither a comma nor the list's end behind it"),
        ("sft", "[[1]]", "x.json entry 1: a list where a JSON object"),
        ("sft", '"a"\n', "x.json:1: a str where a JSON object"),
        ("sft", b'{"prompt": "\xff"}\n', "x.json:1: not UTF-8"),
        ("sft", b'[{"prompt": "\xff"}]', "x.json: not UTF-8"),
        ("sft", '{"prompt": "a"}\n', "x.json:1: the field 'completion' is missing (fields there: prompt)"),
        ("sft", '{"prompt": 3, "completion": "b"}\n', ":1: the field 'prompt' must be text, not 3"),
        ("sft", '{"prompt": "a", "completion": "\\ud800"}\n', ":1: the field 'completion' holds half a surrogate pair"),
        ("preference", '{"prompt": "a", "chosen": "b", "rejected": ""}\n', ":1: 'rejected' is empty"),
        ("preference", '{"chosen": "b", "rejected": "c"}\n', ":1: no '\\n\\nAssistant:' turn in 'chosen'"),
        ("mcq", '{"chosen": "b", "rejected": "c"}\n', ":1 has no multiple-choice questions"),
        ("mcq", '{"prompt": "a", "choices": ["b", "c"], "label": 2}\n', ":1: label 2 is out of range: there are 2"),
        ("mcq", '{"prompt": "a", "choices": ["b", "c"], "label": -1}\n', ":1: label -1 is out of range"),
        ("mcq", '{"prompt": "a", "choices": ["b", "c"], "label": true}\n', ":1: the field 'label' must be a whole number"),
        (
            "mcq",
            '{"prompt": "a", "choices": ["b", ""], "label": 0}\n',
            ":1: 'choices' must be a list of at least two texts, none",
        ),
        ("loglik", '{"prompt": "a", "choices": "bc", "label": 0}\n', ":1: the field 'choices' must be a list"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, view, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        data.load(str(path), "train", view)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_and_damaged_files(tmp_path):
    assert data.load(str(write(tmp_path / "lines.json", {"prompt": "P", "completion": "C"})), "train", "sft"), "no list: lines"
    listed = write(tmp_path / "listed.jsonl", '["prompt"]')
    cut, plain = tmp_path / "cut.jsonl.gz", tmp_path / "plain.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 1000)[:-20])
    plain.write_text("{}")
    for path, message in [
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path, "not a file"),
        (cut, "gzip"),
        (plain, "gzip"),
        (listed, ":1: a list where"),
    ]:
        with pytest.raises(UserError, match=message):
            data.load(str(path), "train", "sft")


def test_groups_of_lines_in_several_forms_stay_apart(tmp_path):
    """A HellaSwag line is three pairs of one group, a plain line a pair of its own: an epoch draws one of each."""
    swag = {
        "ctx": "Today Mia washes the old rose. Then Mia",
        "endings": [f"{v} the old rose." for v in ("dries", "cuts", "hides", "buys")],
    }
    pair = {"prompt": " Tom", "chosen": " cuts", "rejected": " dries"}
    lines = [{**swag, "label": 0}, pair, pair, {**swag, "label": 2}, *[pair] * 6, {**swag, "label": 1}, *[pair] * 9]
    items = load_encoded(str(write(tmp_path / "mixed.jsonl", *lines)), "train", "preference", get("toy"), 128, "drop")
    groups = [item.group for item in items]
    assert len(items) == 26 and sorted(Counter(groups).values()) == [1] * 17 + [3] * 3
    assert len(epoch_order(groups, 0, 0, per_group=1)) == len(lines) == 20


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data")
def test_real_files_of_published_data_are_known_by_their_fields():
    assert len(data.load(str(REAL / "hellaswag_val.jsonl.gz"), "val", "mcq")) == 8042
    pairs = data.load(str(REAL / "hh_harmless_base_test.jsonl.gz"), "train", "preference")
    assert len(pairs) > 1700 and all(p.prompt.endswith("\n\nAssistant:") for p in pairs)
    assert len(data.load(str(REAL / "instruction_data.jsonl.gz"), "train", "sft")) == 900
    pairs = data.load(str(REAL / "instruction_preference.jsonl.gz"), "train", "preference")
    assert len(pairs) == 900 and "### Instruction:" in pairs[0].prompt and pairs[0].completions[0] != pairs[0].completions[1]


def test_a_recipe_is_written_as_a_file_of_your_own(tmp_path, call, refused):
    folder, out = hh_folder(tmp_path / "hh"), tmp_path / "p.jsonl"
    common = flags(data="hh", data_dir=folder, split="test", out=out)
    status, said, err = call("data.__main__", *common, "--limit", 7)
    assert status == 0 and said.endswith(f"wrote {out}: 7 lines\n"), err
    wanted = data.load("hh", "test", "preference", data_dir=str(folder))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [{"prompt": e.prompt, "chosen": e.completions[0]} for e in wanted[:7]]
    assert call("data.__main__", *common, "--view", "preference")[0] == 0
    assert texts(data.load(str(out), "train", "preference")) == texts(wanted)
    ids = flags(data="human_labels:sentiment", data_dir=labels_folder(tmp_path / "labels"), split="train", limit=1, out=out)
    status, said, err = call("data.__main__", *ids)
    assert status == 0 and json.loads(out.read_text())["prompt"].startswith("The dog"), err
    assert "endoftext" not in out.read_text()
    refused("data.__main__", *flags(data="hh", out=tmp_path / "x.txt"), says="must end in .jsonl")
