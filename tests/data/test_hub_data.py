"""Data sets of the hub: which files a name, a config and a split stand for, and what is said where there are none."""

import json
from pathlib import Path

import pytest

import data
from base.errors import UserError
from data import hub
from tests.conftest import SCRATCH, flags
from tests.data.published import write
from tests.data.test_tables import PAIRS, csv_file, parquet
from tests.hub import serving


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Of a/converted the hub has made parquet files in two configs; the others have only files of their own."""
    converted, plain, single = tmp_path / "converted", tmp_path / "plain", tmp_path / "single"
    for place in ("default/train/0000", "default/train/0001", "default/test_prefs/0000", "small/validation/0000"):
        path = converted / "refs/convert/parquet" / f"{place}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet(path, [{**PAIRS[0], "question": f"{place} {n}"} for n in range(3)])
    write(converted / "README.md", "# Data")
    write(plain / "data" / "train-00000-of-00002.jsonl", {"prompt": "one", "completion": " 1"})
    write(plain / "data" / "train-00001-of-00002.jsonl", {"prompt": "two", "completion": " 2"})
    write(plain / "data" / "train_prefs-00000-of-00001.jsonl", {"prompt": "prefs", "completion": " 3"})
    write(plain / "dev" / "x_1.jsonl", {"prompt": "val", "completion": " 4"})
    write(plain / "trainer.jsonl", {"prompt": "no split in its name", "completion": " 5"})
    write(plain / "train.csv", "another,format")
    write(single / "dataset_infos.json", "{}")
    csv_file(single.parent / "single" / "reviews.csv", [{"prompt": "P", "completion": " C"}])
    (tmp_path / "odd").mkdir()
    write(tmp_path / "odd" / "README.md", "# No data")
    monkeypatch.setenv("NANOPREF_CACHE", str(tmp_path / "cache"))
    names = ("converted", "plain", "single", "odd")
    with serving({f"datasets/a/{name}": tmp_path / name for name in names}, monkeypatch) as server:
        yield server


def prompts(source: str, split: str = "train", view: str = "sft", columns: str = "") -> list[str]:
    return [e.prompt for e in data.load(source, split, view, columns=columns)]


AB = "prompt=question,chosen=a,rejected=b"


def test_the_hubs_parquet_files_by_config_and_split(served):
    train = [f"default/train/{file} {n}" for file in ("0000", "0001") for n in range(3)]
    assert prompts("hub:a/converted", "train", "preference", AB) == train
    assert prompts("hub:a/converted:default", "test_prefs", "sft", AB)[0] == "default/test_prefs/0000 0"
    assert prompts("hub:a/converted:small", "val", "sft", AB)[0] == "small/validation/0000 0", "val is the hub's validation"
    before = len(served.requests)
    assert prompts("hub:a/converted", "train", "preference", AB) == train
    assert len(served.requests) == before, "what is there is not asked for again"
    assert all(request.host == served.url.removeprefix("http://") for request in served.asked("/api/")), "not the listed host"


def test_files_by_their_names_where_the_hub_made_none(served):
    assert prompts("hub:a/plain") == ["one", "two"]
    assert prompts("hub:a/plain", "train_prefs") == ["prefs"] and prompts("hub:a/plain", "val") == ["val"]
    assert prompts("hub:a/single") == ["P"]
    before = len(served.requests)
    assert prompts("hub:a/plain") == ["one", "two"] and len(served.requests) == before


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.csv", "train"),
        ("my_train_file_00001.csv", "train"),
        ("train1.csv", "train"),
        ("data/training.csv", "train"),
        ("data/valid.csv", "validation"),
        ("data/dev/more.csv", "validation"),
        ("eval.csv", "test"),
        ("data/random-00000-of-00003.csv", "random"),
        ("trainer.csv", ""),
        ("latest.csv", ""),
    ],
)
def test_splits_by_name_as_the_hubs_documentation_has_them(name, split):
    assert hub._split_of(name) == split


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("hub:a/converted", "tset", "no split 'tset' in config 'default': name one of test_prefs, train with --split"),
        ("hub:a/converted:large", "train", "no config 'large' there: name one of default, small, as hub:a/converted:CONFIG"),
        ("hub:a/converted", "val", "no split 'validation' in config 'default': name one of test_prefs, train"),
        ("hub:a/plain:other", "train", "no config 'other' there: name one of default"),
        ("hub:a/plain", "test", "no split 'test' in config 'default': name one of train, train_prefs, validation"),
        ("hub:a/odd", "train", "data hub:a/odd: no file there ends in .parquet"),
        ("hub:a/none", "train", "status 401; check the name, or, if the file is gated or private, set HF_TOKEN"),
        ("hub:none", "train", "no name of a data set on the hub: write hub:owner/name"),
        ("hub:../..", "train", "no name of a data set on the hub"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(served, source, split, message):
    with pytest.raises(UserError) as error:
        data.load(source, split, "sft")
    assert message in str(error.value)


def test_a_private_data_set_needs_a_token_that_stays_with_the_hub(served, monkeypatch):
    served.token = "secret"
    for source in ("hub:a/converted", "hub:a/plain"):
        with pytest.raises(UserError, match="gated or private, set HF_TOKEN"):
            data.load(source, "train", "sft")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert len(prompts("hub:a/converted", "train", "preference", AB)) == 6 and prompts("hub:a/plain") == ["one", "two"]
    stored = served.asked("/store/")
    assert stored and not any("Authorization" in request.headers for request in stored)


@pytest.mark.parametrize("what", [{"status": 403}, {"status": 400}])
def test_the_repositorys_files_are_taken_where_the_hub_refuses_to_list_its_own(served, what):
    served.fault("/api/datasets/a/plain/parquet", **what)
    assert prompts("hub:a/plain") == ["one", "two"]


def test_a_part_of_a_split_is_taken_only_when_asked_for(served, monkeypatch):
    """Whether the list calls it so, or only the addresses of its files do."""
    for name in ("train", "partial-train"):
        listing = {"default": {name: ["https://huggingface.co/datasets/a/b/resolve/x/default/partial-train/0000.parquet"]}}
        monkeypatch.setattr(hub, "read_json", lambda path, listing=listing: listing)
        with pytest.raises(UserError, match=r"no split 'train' in config 'default': name one of partial-train with --split"):
            hub.files("hub:a/converted", "train")


def test_a_cut_download_goes_on(served):
    served.fault("/store/", cut=700)
    assert len(prompts("hub:a/converted", "train", "preference", AB)) == 6


def test_a_stage_trains_and_validates_on_the_hubs_data(served, tmp_path, call, refused, files):
    for name, kind in (("train-00000-of-00001", "sft"), ("test-00000-of-00001", "val_sft")):
        (tmp_path / "toy" / "data").mkdir(parents=True, exist_ok=True)
        (tmp_path / "toy" / "data" / f"{name}.jsonl").write_bytes(Path(files[kind]).read_bytes())
    served.repos["datasets/a/toy"] = tmp_path / "toy"
    args = flags(**SCRATCH, data="hub:a/toy", val_split="test", max_steps=1, batch_size=4, out_dir=tmp_path / "run")
    status, out, err = call("sft", *args)
    assert status == 0, err
    assert "train data hub:a/toy: 48 examples" in out and "test data hub:a/toy: 16 examples" in out
    assert "hub:a/toy: config default, split train, 1 file(s)" in out and "fields prompt, completion, read in" in out
    refused(
        "sft",
        *flags(**SCRATCH, data="hub:a/toy", split="dev", out_dir=tmp_path / "b"),
        says="name one of test, train with --split",
    )
    out = tmp_path / "prompts.jsonl"
    status, _, err = call("data.__main__", *flags(data="hub:a/toy", split="test", limit=3, out=out))
    assert status == 0, err
    written, there = (
        [json.loads(line)["prompt"] for line in Path(file).read_text().splitlines()] for file in (out, files["val_sft"])
    )
    assert written == there[:3]
