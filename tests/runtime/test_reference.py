"""The reference made easy: `--ref auto`, and the command that an error prints."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from runtime import reference
from runtime.reference import read
from tests.conftest import close, contents, dpo_args, flags, good, metrics


@pytest.fixture
def renamed(files, tmp_path) -> dict[str, Path]:
    """Pairs in files of other columns, in a folder with a space in its name."""
    folder = tmp_path / "my data"
    folder.mkdir()
    out = {}
    for name in ("pairs", "val_pairs"):
        rows = map(json.loads, Path(files[name]).read_text().splitlines())
        made = [{"q": row["prompt"], "good one": row["chosen"], "bad": row["rejected"]} for row in rows]
        out[name] = folder / f"{name}.jsonl"
        out[name].write_text("".join(json.dumps(row) + "\n" for row in made))
    return out


@pytest.mark.parametrize("case", ["empty", "missing", "no validation", "other data"])
def test_the_command_of_the_error_works(case, renamed, files, sft_run, reference, call, refused, tmp_path):
    """Copied and pasted, it makes the file that fits, whatever keys the run has."""
    ref = tmp_path / "new" / "ref.safetensors"
    keys = {"init_from": sft_run, "data": renamed["pairs"], "val_data": renamed["val_pairs"]}
    keys |= {"columns": "prompt=q,chosen=good one,rejected=bad", "limit": 40, "val_limit": 9, "max_len": 70}
    keys |= {"truncation": "left", "tokenizer": sft_run / "model", "seed": 3, "max_steps": 2, "samples": 0}
    if case == "missing":
        keys |= {"val_data": None, "val_limit": None, "val_share": 0.2, "dtype": "float32"}
    if case == "no validation":
        made = {name: value for name, value in keys.items() if name not in ("val_data", "val_limit", "max_steps", "samples")}
        assert call("precompute_ref", *flags(**made, out=ref))[0] == 0
    if case == "other data":
        ref = tmp_path / "ref.safetensors"
        shutil.copyfile(reference, ref)
    args = flags(**keys, out_dir=tmp_path / "run")
    says = {
        "empty": "make them with",
        "missing": "no such file",
        "no validation": "no validation pairs",
        "other data": "another",
    }
    error = refused("dpo", *args, *flags(ref=None if case == "empty" else ref), says=says[case])
    command = shlex.split(re.search(r"`python precompute_ref.py (.*)`", error)[1])
    if case == "empty":
        assert command[-2:] == ["--out", "ref.safetensors"] and error.endswith("give --ref ref.safetensors, or give --ref auto")
        command[-1] = ref
    assert call("precompute_ref", *command)[0] == 0
    status, _, err = call("dpo", *args, "--ref", ref)
    assert status == 0, err


@pytest.mark.slow
def test_ref_auto(files, sft_run, reference, call, tmp_path):
    """It takes the file beside the run that fits, whatever its name, and else makes one, which the next run finds."""
    runs, losses = tmp_path / "runs", {}

    def go(name: str, **keys) -> str:
        status, printed, err = call("dpo", *dpo_args(files, sft_run, "auto", runs / name, max_steps=3, samples=0, **keys))
        assert status == 0, err
        losses[name] = metrics(runs / name)
        return printed

    assert f"ref auto: no file in {runs} fits these weights and data: making one" in go("a")
    made = [*runs.glob("*.safetensors")]
    assert len(made) == 1 and made[0].name.startswith("ref_") and f'ref = "{made[0]}"' in (runs / "a/config.toml").read_text()
    assert f"ref auto: {made[0]} fits" in go("b") and losses["a"] == losses["b"]
    assert "resuming" in go("a"), "the same command goes on"
    shutil.copyfile(reference, runs / "a_file_of_a_name_before_it.safetensors")
    printed = go("a")
    assert f"ref auto: {made[0]} fits" in printed and "resuming" in printed, "with the file that it began with"
    (runs / "a_file_of_a_name_before_it.safetensors").unlink()
    shutil.copyfile(reference, runs / "mine.safetensors")
    made[0].unlink()
    (runs / "broken.safetensors").write_bytes(b"no")
    assert f"ref auto: {runs / 'mine.safetensors'} fits" in go("c") and losses["a"] == losses["c"]
    assert "making one" in go("d", limit=30) and "making one" in go("e", init_from=runs / "a")
    status, _, err = call("dpo", *dpo_args(files, sft_run, reference, runs / "f", max_steps=3, samples=0))
    assert status == 0 and losses["a"] == metrics(runs / "f"), err
    printed = go("g", loss="simpo")
    assert "ref auto" not in printed, "without a reference none is made"


def test_ref_auto_with_an_adapter(files, sft_run, call, tmp_path):
    """The file holds the adapter as it starts: the run is the one that measures it at each step."""
    lora = {"init_from": sft_run, "data": files["pairs"], "lora_rank": 4, "samples": 0}
    assert call("dpo", *flags(**lora, max_steps=2, lr=1e-2, out_dir=tmp_path / "first"))[0] == 0
    lora |= {"init_from": tmp_path / "first/adapter", "max_steps": 3, "lr": 1e-3}
    assert call("dpo", *flags(**lora, out_dir=tmp_path / "measured"))[0] == 0
    status, out, err = call("dpo", *flags(**lora, out_dir=tmp_path / "stored", ref="auto"))
    assert status == 0 and "making one" in out, err
    for a, b in zip(metrics(tmp_path / "measured"), metrics(tmp_path / "stored"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_completions_that_were_cut_off_have_no_end(files, sft_run, reference, call, tmp_path):
    """Without end-of-text each of two completions has a token less to predict; a reference of those with it does not fit."""
    status, printed, err = call(
        "dpo", *dpo_args(files, sft_run, "auto", tmp_path / "run", max_steps=1, samples=0, add_eos="false")
    )
    assert status == 0 and "<|endoftext|>'" not in printed, err
    cut, whole = (
        read(next(folder.glob(name)))[1] for folder, name in ((tmp_path, "ref_*"), (reference.parent, reference.name))
    )
    assert cut["data_sha256"] != whole["data_sha256"]
    status, _, err = call(
        "dpo", *dpo_args(files, sft_run, reference, tmp_path / "other", max_steps=1, samples=0, add_eos="false")
    )
    assert status == 2 and "--add_eos False" in err


@pytest.mark.slow
def test_ref_auto_in_two_processes(files, sft_run, call, world, tmp_path):
    args = dpo_args(files, sft_run, "auto", tmp_path / "two/run", max_steps=3, samples=0, replicate=1)
    good(world(2, "dpo", args))
    assert call("dpo", *dpo_args(files, sft_run, "auto", tmp_path / "one/run", max_steps=3, samples=0))[0] == 0
    one, two = (sorted(contents(tmp_path / name)) for name in ("one", "two"))
    assert [path for path in one if "/" not in path] == [path for path in two if "/" not in path] != []
    made = [reference.read(next((tmp_path / name).glob("*.safetensors")))[0] for name in ("one", "two")]
    assert all(torch.allclose(made[0][name], made[1][name], rtol=0, atol=1e-4) for name in ("logps", "val_logps"))
    close(metrics(tmp_path / "one/run"), metrics(tmp_path / "two/run"), 1e-4)
