"""The recipes: what they make of the published formats, which entry belongs to which split, and what they refuse."""

import csv
import re
import shutil

import pytest

import data
from base.errors import UserError
from data import alpaca, hellaswag, hh
from data.encode import encode, load_encoded
from data.examples import Example, local, only_text_views, report
from data.tokenizer import get
from tests.data.published import (
    ENDINGS,
    EOT,
    alpaca_folder,
    dialogue,
    hh_folder,
    instruction,
    labelled,
    labels_folder,
    write,
)

SPLITS = ("train", "val", "test")


def every_split(recipe: str, view: str, folder) -> list[list[data.Example]]:
    return [data.load(recipe, split, view, data_dir=str(folder)) for split in SPLITS]


def no_prompt_twice(splits: list[list[data.Example]]) -> bool:
    train, val, test = ({e.prompt for e in split} for split in splits)
    return not train & val and not train & test and not val & test


def test_a_recipe_is_one_function(tmp_path, monkeypatch):
    def load(split, view, data_dir="", limit=0):  # the whole of a recipe for a CSV file
        only_text_views("recipe quiz", view)
        (path,) = local(data_dir, [f"{split}.csv"])
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))[: limit or None]
        found = [Example(row["question"], (" " + row["answer"],), source=f"{path}:{n}") for n, row in enumerate(rows, start=2)]
        report(f"quiz {split}", len(found), {})
        return found

    monkeypatch.setitem(data.RECIPES, "quiz", load)
    write(tmp_path / "train.csv", "question,answer", 'Who?,"Mia, I think"', "Where?,Here")
    assert [e.completions for e in data.load("quiz", "train", "sft", data_dir=str(tmp_path))] == [
        (" Mia, I think",),
        (" Here",),
    ]
    items = load_encoded("quiz", "train", "sft", get("gpt2"), 20, "drop", data_dir=str(tmp_path), limit=1)
    assert items[0].completions[0].tolist() == [*get("gpt2").encode(" Mia, I think"), EOT]


def test_unknown_recipes_and_views():
    known = rf"{', '.join(sorted(data.RECIPES))}.*: did you mean human_labels:sentiment\?"
    with pytest.raises(UserError, match=known):
        data.load("human_labels:sentimet", "train", "sft")
    for name in ("hh", "alpaca", "human_labels:tldr"):
        with pytest.raises(UserError, match=f"recipe {name} has no multiple-choice"):
            data.load(name, "val", "mcq")


# --- hellaswag -------------------------------------------------------------------------------------------------------------


def test_hellaswag_views(tmp_path):
    path = write(tmp_path / "hellaswag_val.jsonl", ENDINGS, {**ENDINGS, "label": "0"})
    sft, preference, mcq, loglik = (data.load("hellaswag", "val", view, data_dir=str(tmp_path)) for view in data.VIEWS)
    context = "Then, the man writes over the snow He"
    assert mcq[0].prompt == f"{context}\nA) goes.\nB) a. b\nC) c d\nD) e\nAnswer:"
    assert mcq[0].completions == (" goes.", " a. b", " c d", " e") and [e.label for e in mcq] == [3, 0]
    assert loglik[0].prompt == f"Removing ice: {context}" and sft[0].completions == (" e",)
    assert [p.completions for p in preference[:3]] == [(" e", " goes."), (" e", " a. b"), (" e", " c d")]
    assert [p.group for p in preference] == [0, 0, 0, 1, 1, 1]
    assert data.load(str(path), "train", "mcq") == mcq, "the same file, named as a file"


def test_hellaswag_is_cleaned_as_the_harness_does():
    utils = pytest.importorskip("lm_eval.tasks.hellaswag.utils")
    texts = [" [header] How to [title] Find a [step] x", "a  b   c", "plain", "[substeps] One. [title]Two.", "x [a] [b] y "]
    assert [hellaswag.clean(t) for t in texts] == [utils.preprocess(t) for t in texts]


def test_hellaswag_download_is_checked_for_its_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path))
    monkeypatch.setattr(hellaswag, "fetch", lambda url, dest: write(dest, {}))
    with pytest.raises(UserError, match="1 lines where 10042 were published"):
        hellaswag.path("val")
    assert not (tmp_path / "hellaswag" / "hellaswag_val.jsonl").exists()


# --- hh --------------------------------------------------------------------------------------------------------------------


def test_hh_holds_out_whole_prompts_and_says_what_it_drops(tmp_path, capsys):
    splits = train, val, test = every_split("hh", "preference", hh_folder(tmp_path))
    assert (len(train), len(val), len(test)) == (44, 4, 48) and no_prompt_twice(splits)
    assert capsys.readouterr().out.splitlines()[0] == (
        "hh train of helpful-base, helpful-online, helpful-rejection-sampled, harmless-base (4 of 48 pairs held out for "
        "validation): 44 kept; 4 dropped: their dialogues differ before the last answer, or one answer is empty; 4 dropped: a "
        "dialogue of over 1,280 characters"
    )
    assert {e.source.split("/")[-2] for e in train[:20]} == set(hh.PARTS), "the four files are mixed"
    sft = data.load("hh", "train", "sft", limit=5, data_dir=str(tmp_path))
    assert [(e.prompt, e.completions) for e in sft] == [(e.prompt, e.completions[:1]) for e in train[:5]]
    for e in train:
        n = int(re.search(r"What is (\d+)", e.prompt)[1])
        assert e.prompt + e.completions[0] == dialogue(n, f" It is {2 * n}.") and e.completions[1] == " Who knows."
    empty = {"chosen": dialogue(1, " yes"), "rejected": dialogue(1, " ")}
    assert hh.examples(empty, "preference", 0, "f:1") == []


def test_hh_takes_the_files_that_a_folder_has(tmp_path):
    folder = hh_folder(tmp_path)
    for part in hh.PARTS[1:]:
        shutil.rmtree(folder / part)
    (folder / "helpful-base" / "train.jsonl.gz").unlink()
    pair = {"chosen": dialogue(1, " a"), "rejected": dialogue(1, " b")}
    write(folder / "helpful-base" / "train.jsonl", pair, pair)
    assert len(data.load("hh", "train", "preference", data_dir=str(folder))) == 2
    with pytest.raises(UserError, match=r"hh val of helpful-base \(0 of 2 .*: no example is left"):
        data.load("hh", "val", "preference", data_dir=str(folder))
    for missing, message in [("helpful-base", r"none of helpful-base/train\.jsonl\.gz"), ("nowhere", "no such folder")]:
        with pytest.raises(UserError, match=f"data_dir .*{message}"):
            data.load("hh", "train", "preference", data_dir=str(folder / missing))


# --- human labels ----------------------------------------------------------------------------------------------------------


def test_human_labels_keep_their_ids(tmp_path):
    labels_folder(tmp_path)
    splits = every_split("human_labels:sentiment", "preference", tmp_path)
    assert sum(map(len, splits)) == 120 and len(splits[0]) > 90 and all(splits) and no_prompt_twice(splits)
    for e in (e for split in splits for e in split):
        n = e.prompt[2] - 500
        samples = [(1000 + n, 11, 262, 400 + i) if i % 2 else (2000 + n, 300 + i, EOT) for i in range(4)]
        best = samples.pop(n % 4)
        assert (e.prompt, *e.completions) == ((464, 3290, 500 + n), best, *samples) and e.pairs == ((0, 1), (0, 2), (0, 3))
    items = load_encoded("human_labels:sentiment", "train", "preference", get("gpt2"), 64, "drop", data_dir=str(tmp_path))
    assert [tuple(map(tuple, item.completions)) for item in items] == [e.completions for e in splits[0]], "nothing is added"
    assert all(item.n_pairs == 3 for item in items)
    assert len(data.load("human_labels:tldr", "train", "preference", data_dir=str(tmp_path), limit=2)) == 2
    (tmp_path / "tldr" / "online_45k.json").unlink()
    assert sum(map(len, every_split("human_labels:tldr", "sft", tmp_path))) == 120, "of two files the one that is there"


def test_ids_need_gpt2s_tokenizer():
    with pytest.raises(UserError, match="token ids of gpt2, and the tokenizer is toy"):
        encode([data.Example((464,), ((11,),), source="f entry 1")], get("toy"), 10, "drop")
    (item,), _ = encode([data.Example((), ((11, 12),), source="f entry 1")], get("gpt2"), 10, "drop")
    assert item.prompt.tolist() == [EOT] and item.completions[0].tolist() == [11, 12]


# --- alpaca ----------------------------------------------------------------------------------------------------------------


def test_alpaca_splits_by_hash_and_uses_its_prompt(tmp_path, capsys):
    splits = every_split("alpaca", "sft", alpaca_folder(tmp_path))
    assert sum(map(len, splits)) == 149 and len(splits[0]) > 110 and all(splits) and no_prompt_twice(splits)
    assert "1 dropped: their output is empty" in capsys.readouterr().out
    found = {e.source.rpartition(" ")[2]: e for split in splits for e in split}
    assert found["2"].completions == ("It is 2.",) and found["2"].prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd one to 1.\n\n### Input:\n1\n\n### Response:\n"
    )
    assert found["3"].prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd one to 2.\n\n### Response:\n"
    )
    path = write(tmp_path / "turned.jsonl", *(instruction(i) for i in reversed(range(150)) if i != 4))
    turned = data.load("alpaca", "val", "sft", data_dir=str(path))
    assert {e.prompt for e in turned} == {e.prompt for e in splits[1]}, "in any order and form, an entry stays in its split"
    assert len(data.load(str(path), "train", "sft")) == 149, "named as a file it is taken whole"


# --- what is wrong with an entry -------------------------------------------------------------------------------------------

ENTRIES = {  # recipe -> a file of it, and an entry that is right
    "hellaswag": ("hellaswag_train.jsonl", ENDINGS),
    "hh": ("harmless-base/train.jsonl", {"chosen": dialogue(1, " a"), "rejected": dialogue(1, " b")}),
    "human_labels:sentiment": ("sentiment/offline_5k.json", labelled(0)),
    "alpaca": (alpaca.FILE, instruction(0)),
}


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("hellaswag", {"label": 4}, "label 4 is out of range: there are 4"),
        ("hellaswag", {"label": ""}, "the field 'label' must be a whole number, not ''"),
        ("hellaswag", {"endings": ["a", "b", "c", " "]}, "'endings' must be a list of four texts"),
        ("hellaswag", {"ctx_b": None}, "'ctx_b' must be text"),
        ("hh", {"rejected": 1}, "the field 'rejected' must be text"),
        ("hh", {"chosen": "Assistant: a"}, "turn in 'chosen': not a dialogue"),
        ("human_labels:sentiment", {"best": 4}, "best 4 is out of range: there are 4"),
        ("human_labels:sentiment", {"query": [464, 50257]}, "'query' holds 50257, which is no token id"),
        ("human_labels:sentiment", {"query": [464, 50259, 464]}, "'query' holds 50259, which is no token id"),
        ("human_labels:sentiment", {"sample1": [True]}, "'sample1' holds True, which is no token id"),
        ("human_labels:sentiment", {"sample1": []}, "'sample1' is empty"),
        ("human_labels:sentiment", {"sample3": "text"}, "'sample3' must be a list"),
        ("alpaca", {"output": 3}, "the field 'output' must be text, not 3"),
        ("alpaca", {"instruction": " "}, "the field 'instruction' is empty"),
    ],
)
def test_bad_entries_name_file_and_line(tmp_path, recipe, change, message):
    name, right = ENTRIES[recipe]
    path = write(tmp_path / name, right, {**right, **change})
    with pytest.raises(UserError) as error:
        data.load(recipe, "train", "sft", data_dir=str(tmp_path))
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
