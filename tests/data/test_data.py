"""Recipes and the user's own files: what comes out, and what is said of files that are not what they should be."""

import gzip
import json
from pathlib import Path

import pytest

import data
from base.errors import UserError
from data import hellaswag, hh

SHARED = Path(__file__).parents[3] / "shared" / "data"


def lines(path: Path, *records) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def test_user_files_in_every_view(tmp_path):
    sft = lines(tmp_path / "a.jsonl", {"prompt": "P", "completion": " C"}, "", {"prompt": "", "completion": "D"})
    assert [(e.prompt, e.completions) for e in data.load(sft, "train", "sft")] == [("P", (" C",)), ("", ("D",))]
    assert data.load(sft, "train", "sft")[1].source.endswith("a.jsonl:3")
    pairs = lines(tmp_path / "b.jsonl", {"prompt": "P", "chosen": " C", "rejected": " R", "more": 1})
    assert data.load(pairs, "train", "preference")[0].completions == (" C", " R")
    assert data.load(pairs, "train", "sft")[0].completions == (" C",)
    options = {"prompt": "P ", "choices": ["A", "B"], "label": 1}
    mcq = lines(tmp_path / "c.jsonl", options, options)
    assert data.load(mcq, "val", "mcq")[0] == data.Example("P ", ("A", "B"), 1, source=f"{mcq}:1")
    assert data.load(mcq, "val", "loglik")[0].completions == (" A", " B"), "the prompt's last space goes to the options"
    assert len(data.load(mcq, "val", "mcq", limit=1)) == 1
    zipped = tmp_path / "d.jsonl.gz"
    zipped.write_bytes(gzip.compress(Path(sft).read_bytes()))
    assert [e.prompt for e in data.load(str(zipped), "train", "sft")] == ["P", ""]


@pytest.mark.parametrize(
    ("view", "content", "message"),
    [
        ("sft", "", "empty file"),
        ("sft", "\n\n", "empty file"),
        ("sft", '{"prompt": "a", "completion": "b"}\n{"prompt": \n', r"x\.jsonl:2: not JSON"),
        ("sft", "[1]\n", r"x\.jsonl:1: a list where a JSON object"),
        ("sft", '{"prompt": "a"}\n', r"x\.jsonl:1: the field 'completion' is missing \(fields there: prompt\)"),
        ("sft", '{"completion": "a"}\n', r":1: the field 'prompt' is missing"),
        ("sft", '{"prompt": "a", "completion": ""}\n', r":1: 'completion' is empty"),
        ("sft", '{"prompt": 3, "completion": "b"}\n', r":1: the field 'prompt' must be text, not 3"),
        ("preference", '{"prompt": "a", "chosen": "b"}\n', r":1: the field 'rejected' is missing"),
        ("preference", '{"prompt": "a", "chosen": "b", "rejected": ""}\n', r":1: 'rejected' is empty"),
        ("mcq", '{"prompt": "a", "choices": ["b", "c"], "label": 2}\n', r":1: label 2 is out of range: there are 2"),
        ("mcq", '{"prompt": "a", "choices": ["b", "c"], "label": -1}\n', r":1: label -1 is out of range"),
        ("mcq", '{"prompt": "a", "choices": ["b", "c"], "label": true}\n', r":1: the field 'label' must be a whole number"),
        ("mcq", '{"prompt": "a", "choices": ["b", ""], "label": 0}\n', r":1: 'choices' is empty"),
        ("mcq", '{"prompt": "a", "choices": ["b"], "label": 0}\n', r":1: 'choices' must be a list of at least two"),
        ("loglik", '{"prompt": "a", "choices": "bc", "label": 0}\n', r":1: the field 'choices' must be a list"),
        ("sft", b'{"prompt": "\xff"}\n', "not UTF-8"),
        ("preference", '{"chosen": "b", "rejected": "c"}\n', r":1: no '\\n\\nAssistant:' turn in 'chosen'"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, view, content, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        data.load(str(path), "train", view)
    assert "\n" not in str(error.value).replace("\\n", "")


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        data.load(str(tmp_path / "nothing.jsonl"), "train", "sft")
    with pytest.raises(UserError, match=r"neither a recipe .*did you mean hellaswag"):
        data.load("helaswag", "train", "sft")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"prompt": "a", "completion": "b"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="damaged or cut-off gzip"):
        data.load(str(cut), "train", "sft")
    not_gzip = tmp_path / "plain.jsonl.gz"
    not_gzip.write_text("{}")
    with pytest.raises(UserError, match="damaged or cut-off gzip"):
        data.load(str(not_gzip), "train", "sft")


RECORD = {
    "ind": 4,
    "activity_label": "Removing ice",
    "ctx_a": "Then, the man writes over the snow",
    "ctx_b": "he",
    "ctx": "unused where ctx_a is",
    "endings": ["goes.", "a [title] b", " c [step] d", "e"],
    "label": 3,
}


def test_hellaswag_views(tmp_path):
    (tmp_path / "hellaswag_val.jsonl").write_text(json.dumps(RECORD) + "\n" + json.dumps({**RECORD, "label": "0"}) + "\n")
    where = {"data_dir": str(tmp_path)}
    context = "Then, the man writes over the snow He"
    mcq = data.load("hellaswag", "val", "mcq", **where)
    assert mcq[0].prompt == f"{context}\nA) goes.\nB) a. b\nC) c d\nD) e\nAnswer:"
    assert mcq[0].completions == (" goes.", " a. b", " c d", " e") and [e.label for e in mcq] == [3, 0]
    assert data.load("hellaswag", "val", "loglik", **where)[0].prompt == f"Removing ice: {context}"
    assert data.load("hellaswag", "val", "sft", **where)[0].completions == (" e",)
    pairs = data.load("hellaswag", "val", "preference", **where)
    assert [p.completions for p in pairs[:3]] == [(" e", " goes."), (" e", " a. b"), (" e", " c d")]
    assert [p.group for p in pairs] == [0, 0, 0, 1, 1, 1]
    # the same file, named as a file
    assert data.load(str(tmp_path / "hellaswag_val.jsonl"), "train", "mcq") == mcq
    with pytest.raises(UserError, match=r"neither hellaswag_train\.jsonl nor hellaswag_train\.jsonl\.gz"):
        data.load("hellaswag", "train", "sft", **where)


def test_cleaning_is_the_harness_s():
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    texts = [" [header] How to [title] Find a [step] x", "a  b   c", "plain", "[substeps] One. [title]Two.", "x [a] [b] y "]
    assert [hellaswag.clean(t) for t in texts] == [utils.preprocess(t) for t in texts]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 4}, "label 4 is out of range"),
        ({"label": ""}, "'label' must be a number from 0 to 3, not ''"),
        ({"endings": ["a", "b", "c"]}, "'endings' must be a list of four texts"),
        ({"endings": ["a", "b", "c", " "]}, "'endings' must be a list of four texts"),
        ({"ctx_b": None}, "'ctx_b' must be text"),
    ],
)
def test_bad_hellaswag_lines(change, message):
    with pytest.raises(UserError, match=f"f:7: .*{message}"):
        hellaswag.problem({**RECORD, **change}, "f:7")


def test_hellaswag_download_is_checked_for_its_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path))
    monkeypatch.setattr(hellaswag, "fetch", lambda url, dest: (dest.parent.mkdir(), dest.write_text("{}\n")))
    with pytest.raises(UserError, match="1 lines where 10042 were published"):
        hellaswag.path("val")
    assert not (tmp_path / "hellaswag" / "hellaswag_val.jsonl").exists()


def test_hh_pairs():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    pair = hh.pair({"chosen": start + " yes", "rejected": start + " no"}, "f:1")
    assert pair.prompt == start and pair.completions == (" yes", " no")
    assert hh.pair({"chosen": start + " yes", "rejected": "\n\nHuman: a\n\nAssistant: no"}, "f:1") is None
    assert hh.pair({"chosen": start + " yes", "rejected": start + " "}, "f:1") is None


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_files():
    assert len(data.load(str(SHARED / "hellaswag_val.jsonl.gz"), "val", "mcq")) == 8042
    pairs = data.load(str(SHARED / "hh_harmless_base_test.jsonl.gz"), "train", "preference")
    assert len(pairs) > 1700 and all(p.prompt.endswith("\n\nAssistant:") for p in pairs)
