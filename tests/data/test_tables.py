"""Parquet and CSV files, and columns by other names: what is read from them, and what is said of bad ones."""

import builtins
import csv
import gzip
import json
from pathlib import Path

import pytest

import data
from base.errors import UserError
from tests.conftest import SCRATCH, flags
from tests.data.published import write

PAIRS = [{"question": f'Q{n}, or\n"{n}"?', "a": f" good {n} é", "b": f" bad {n}", "score": n} for n in range(600)]
COLUMNS = "prompt=question,chosen=a, rejected = b"
OURS = [('Q0, or\n"0"?', (" good 0 é", " bad 0")), ('Q1, or\n"1"?', (" good 1 é", " bad 1"))]


def parquet(path, rows, **how):
    pyarrow, files = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    files.write_table(pyarrow.Table.from_pylist(rows), path, **how)
    return path


def csv_file(path, rows):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", newline="", encoding="utf-8-sig") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.csv.gz", "x.json", "x.jsonl"])
def test_each_kind_of_file_gives_the_same_pairs(tmp_path, capsys, name):
    make = {"parquet": lambda p, rows: parquet(p, rows, row_group_size=100), "csv": csv_file, "gz": csv_file}
    as_json = {"json": lambda p, rows: p.write_text(json.dumps(rows)), "jsonl": lambda p, rows: write(p, *rows)}
    (make | as_json)[name.rpartition(".")[2]](tmp_path / name, PAIRS)
    found = data.load(str(tmp_path / name), "train", "preference", columns=COLUMNS)
    assert [(e.prompt, e.completions) for e in found[:2]] == OURS and len(found) == 600
    assert "fields prompt, chosen, rejected (by columns prompt=question" in capsys.readouterr().out
    place = {"x.parquet": "row 2", "x.json": "entry 2", "x.jsonl": ":2"}.get(name, ":5")  # in a CSV file the row's last line
    assert found[1].source.endswith(place)
    assert data.load(str(tmp_path / name), "train", "preference", columns=COLUMNS, limit=7) == found[:7]


def test_lists_and_published_forms_in_parquet(tmp_path):
    options = parquet(tmp_path / "mcq.parquet", [{"prompt": "P", "choices": ["A", "B"], "label": 1}])
    assert data.load(str(options), "val", "mcq") == [data.Example("P", ("A", "B"), 1, source=f"{options} row 1")]
    alpaca = {"instruction": "Say", "input": "", "output": "So."}
    made = [
        data.load(str(make(tmp_path / n, [alpaca])), "train", "sft")
        for make, n in ((parquet, "a.parquet"), (csv_file, "a.csv"))
    ]
    assert made[0][0].prompt == made[1][0].prompt and "### Instruction:\nSay" in made[0][0].prompt


def test_columns_that_are_not_named_are_not_read(tmp_path):
    """A string `prompt` beside the named columns does not count, nor does what Alpaca's form is known by."""
    row = {"prompt": "not this", "instruction": "nor this", "q": "Q", "good": " G", "bad": " B"}
    for file in (parquet(tmp_path / "x.parquet", [row]), write(tmp_path / "x.jsonl", row)):
        (found,) = data.load(str(file), "train", "preference", columns="prompt=q,chosen=good,rejected=bad")
        assert (found.prompt, found.completions) == ("Q", (" G", " B"))


ROW = {"prompt": "P", "completion": " C"}


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [ROW],
            "prompt=query,completion=completion",
            "no column 'query' for 'prompt' of --columns: use prompt, completion",
        ),
        ([ROW, {**ROW, "completion": None}], "", "row 2: the field 'completion' must be text, not None"),
        ([{**ROW, "completion": 5}], "", "row 1: the field 'completion' must be text, not 5"),
        ([{**ROW, "prompt": b"P"}], "", "row 1: the field 'prompt' must be text, not b'P'"),
        ([{**ROW, "prompt": ["P"]}], "", "row 1: message 1 of 'prompt' must be"),
        ([{"text": "P"}], "", "row 1: the field 'prompt' is missing (fields there: text)"),
        ([ROW], "prompt", "key columns: 'prompt' is not of the form"),
        ([ROW], "prompt=a,prompt=b", "key columns: 'prompt=a,prompt=b' is not of the form"),
        ([ROW], "prompt=", "key columns: 'prompt=' is not of the form"),
    ],
)
def test_bad_columns_name_file_and_row(tmp_path, rows, columns, message):
    path = parquet(tmp_path / "x.parquet", rows)
    with pytest.raises(UserError) as error:
        data.load(str(path), "train", "sft", columns=columns)
    assert message in str(error.value)
    assert "key columns" in message or str(error.value).startswith(str(path))


def test_damaged_and_empty_files(tmp_path, monkeypatch):
    whole = parquet(tmp_path / "whole.parquet", PAIRS, row_group_size=100).read_bytes()
    middle = bytearray(whole)
    middle[len(whole) // 3 : len(whole) // 3 + 400] = bytes(400)
    pyarrow = pytest.importorskip("pyarrow")
    no_rows = tmp_path / "no_rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], "string")}), no_rows)
    for name, content, message in [
        ("cut.parquet", whole[:-100], "damaged or no parquet file, read up to row 0"),
        ("cut.parquet", whole[: len(whole) // 2], "damaged or no parquet file, read up to row 0"),
        ("middle.parquet", bytes(middle), "damaged or no parquet file, read up to row "),
        ("text.parquet", b"hello", "damaged or no parquet file"),
        ("nothing.parquet", b"", "damaged or no parquet file"),
        ("no_rows.parquet", no_rows.read_bytes(), "an empty file or list"),
        ("x.csv", b"", "an empty file or list"),
        ("x.csv", b"prompt,completion\n", "an empty file or list"),
        ("x.csv", b"prompt,completion,prompt\nP,C,Q\n", ":1: two columns of one name"),
        ("x.csv", b"prompt,completion\nP,C,Q\n", ":2: more fields than columns"),
        ("x.csv", b"prompt,completion\nP\n", ":2: the field 'completion' must be text, not None"),
        ("x.csv", b"prompt,completion\nP,\xff\n", "damaged, or not what its name says"),
        ("x.csv.gz", gzip.compress(b"prompt,completion\nP,C\n")[:-9], "damaged, or not what its name says"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            data.load(str(tmp_path / name), "train", "sft", columns="prompt=question,completion=a" if "middle" in name else "")
        assert str(error.value).startswith(str(tmp_path / name)) and message in str(error.value), error.value
    for name in ("none.parquet", "none.csv"):
        with pytest.raises(UserError, match="no such file"):
            data.load(str(tmp_path / name), "train", "sft")

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a: real("no_such_package" if name == "pyarrow" else name, *a))
    with pytest.raises(UserError, match="need the package pyarrow, which is not here: pip install pyarrow"):
        data.load(str(tmp_path / "whole.parquet"), "train", "sft")


def test_a_conversation_as_text_in_csv_is_refused(tmp_path):
    """It would be learnt as it is written, brackets and all."""
    talk = json.dumps([{"role": "user", "content": "Hi, you"}])
    path = csv_file(tmp_path / "x.csv", [{"prompt": "p", "completion": "c"}, {"prompt": talk, "completion": "c"}])
    with pytest.raises(UserError, match=r"x.csv:3: JSON messages in CSV"):
        data.load(str(path), "train", "sft")


def test_a_huge_row_is_dropped_and_the_others_stay(tmp_path):
    """A text of 5 MB, far above the limit that Python's csv sets for a field."""
    from data.encode import load_encoded
    from data.tokenizer import get

    rows = [ROW, {**ROW, "prompt": "word " * 1_000_000}, ROW]
    for path in (parquet(tmp_path / "x.parquet", rows), csv_file(tmp_path / "x.csv", rows)):
        items = load_encoded(str(path), "train", "sft", get("gpt2"), 100, "drop")
        assert [item.number for item in items] == [0, 2]


def test_stages_take_parquet(tmp_path, call, refused, files, sft_run):
    rows = [json.loads(line) for line in Path(files["sft"]).read_text().splitlines()]
    file = parquet(tmp_path / "x.parquet", [{"q": r["prompt"], "a": r["completion"]} for r in rows])
    args = flags(**SCRATCH, data=file, columns="prompt=q,completion=a", max_steps=1, batch_size=4, out_dir=tmp_path / "run")
    status, out, err = call("sft", *args)
    assert status == 0, err
    assert "fields prompt, completion (by columns prompt=q,completion=a), read in the project's own form" in out
    first = f"the first: prompt {rows[0]['prompt']!r:.100}, completion {rows[0]['completion'] + '<|endoftext|>'!r:.100}"
    assert first in out
    file.write_bytes(file.read_bytes()[:-50])
    args[args.index(tmp_path / "run" if tmp_path / "run" in args else str(tmp_path / "run"))] = str(tmp_path / "other")
    refused("sft", *args, says=f"error: {file}: damaged or no parquet file")
    refused(
        "sft",
        *flags(**SCRATCH, data="toy", columns="prompt=q", out_dir=tmp_path / "toy"),
        says="key columns: 'prompt=q': the recipe toy",
    )
    refused(
        "sft", *flags(**SCRATCH, data="toy", split="tset", out_dir=tmp_path / "toy"), says="key split: 'tset': the recipe toy"
    )
    refused("sft", *flags(**SCRATCH, data=files["sft"], split="tset", out_dir=tmp_path / "toy"), says="has no splits")
    refused(
        "sft", *flags(**SCRATCH, data=files["sft"], val_split="val", out_dir=tmp_path / "c"), says="key val_split: the file"
    )
    model = sft_run / "model"
    refused("eval_mcq", *flags(model=model, data="toy", columns="prompt=q"), says="key columns: 'prompt=q': the recipe toy")
    out = tmp_path / "reward.json"
    both = flags(model=model, ref_model=model, data="toy", columns="prompt=q", out=out)
    refused("eval_reward", *both, says="key columns: 'prompt=q': the recipe toy")
