"""What a user can get wrong: each is one line on stderr that says what and where, exit status 2, and nothing half-written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import weights
from base import errors
from data.tokenizer import get
from tests.conftest import ROOT, dpo_args, flags, metrics, ref_args, sft_args


def jsonl(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.mark.slow
def test_a_command_line_ends_in_one_line_and_status_2():
    done = subprocess.run([sys.executable, "sft.py", "--learning_rte", "1"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: command line: unknown key 'learning_rte'")


@pytest.mark.parametrize(
    ("name", "keys", "says"),
    [  # sft, or a loss of dpo's; data that names one of the fixture's files is that file
        ("sft", {"bach_size": 1}, "'batch_size'"),
        ("sft", {"batch_size": 0}, "key batch_size: 0 is too small"),
        ("sft", {"schedule": "step"}, "is not one of cosine, linear, constant"),
        ("sft", {"epochs": 0}, "key epochs: 0.0 must be above 0"),
        ("sft", {"min_lr": 1}, "min_lr: 1.0 is above lr"),
        ("sft", {"lr": "nan"}, "key lr: nan"),
        ("sft", {"dropout": 1}, "key dropout: 1.0 must be below 1"),
        ("sft", {"lora_alpha": 8}, "key lora_alpha: given, but lora_rank is 0"),
        ("sft", {"max_len": 200}, "key max_len: 200 is more than the model's context of 128"),
        ("sft", {"dtype": "float16"}, "dtype = 'float16' is not one of auto, float32, bfloat16"),
        ("sft", {"device": "tpu9"}, "device 'tpu9' cannot be used"),
        ("sft", {"tokenizer": "bert"}, "unknown tokenizer 'bert'"),
        ("sft", {"data": "helaswag"}, "did you mean hellaswag?"),
        ("sft", {"init_from": "gpt-2-medium"}, "gpt2-medium"),
        ("sft", {"n_head": 3}, "n_embd 32 is no multiple of n_head 3"),
        ("sft", {"config": "nowhere.toml"}, "nowhere.toml"),
        ("sigmoid", {"ref": None}, "loss sigmoid needs the reference's log-probs: make them with"),
        ("sigmoid", {"beta": 0}, "key beta: 0.0 must be above 0"),
        ("robust", {"label_smoothing": 0.5}, "key label_smoothing: 0.5 must be below 0.5 for loss robust"),
        ("exo_pair", {}, "label_smoothing: 0.0 must be above 0"),
        ("cpo", {"ref": None}, "key sft_weight: 0.0 must be above 0 (1 in its paper) for loss cpo"),
        ("orpo", {"ref": None}, "key sft_weight: 0.0 must be above 0 (1 in its paper) for loss orpo"),
        ("kto", {"sft_weight": 0.5}, "key sft_weight: 0.5 must be 0 for loss kto"),
        ("kto", {"batch_size": 1}, "key batch_size: 1 must be above 1, better 8 or more"),
        ("kto", {"desirable_weight": -1}, "key desirable_weight: -1.0 is too small"),
        ("ppo", {}, "is not one of sigmoid"),
        ("sigmoid", {"data": "val_pairs"}, "it holds 48 pairs, the training data 16): make it anew"),
        ("sigmoid", {"max_len": 100}, "another max_len (128, here 100)"),
        ("sigmoid", {"truncation": "left"}, "another truncation (drop, here left)"),
        ("sigmoid", {"val_data": "pairs"}, "another validation data"),
    ],
)
def test_settings(name, keys, says, files, stage, refused, tmp_path):
    script, args = stage(name, tmp_path / "run", **{key: files.get(value, value) for key, value in keys.items()})
    refused(script, *args, says=says)
    assert not (tmp_path / "run").exists()


def test_training_files(files, refused, tmp_path):
    """What can be wrong in a line is in tests/data."""
    path = tmp_path / "x.jsonl"
    refused("sft", *sft_args(files, tmp_path / "run", data=path), says="x.jsonl: no such file")
    path.write_text('{"prompt": " the", "completion": " red"}\n{"prompt"\n')
    refused("sft", *sft_args(files, tmp_path / "run", data=path), says="x.jsonl:2: not JSON")
    jsonl(path, {"prompt": " the", "completion": " quux"})
    refused("sft", *sft_args(files, tmp_path / "run", data=path), says="quux")
    assert not (tmp_path / "run").exists(), "nothing is written before the data is read"


def test_examples_longer_than_the_context(files, call, refused, tmp_path):
    """drop: left out and counted; all dropped: an error. left: the prompt is cut; a completion that cannot fit: an error."""
    short = {"prompt": " the red", "completion": " scarf"}
    long_prompt = {"prompt": " the red" * 100, "completion": " scarf"}
    long_completion = {"prompt": " the", "completion": " red" * 200}
    mixed = jsonl(tmp_path / "mixed.jsonl", short, long_prompt, long_completion)
    hopeless = jsonl(tmp_path / "hopeless.jsonl", long_prompt, long_completion)
    cut = jsonl(tmp_path / "cut.jsonl", short, long_prompt)
    _, printed, _ = call("sft", *sft_args(files, tmp_path / "a", data=mixed, val_data=None))
    assert "3 examples, 2 dropped as too long" in printed
    _, printed, _ = call("sft", *sft_args(files, tmp_path / "c", data=cut, val_data=None, truncation="left"))
    assert "1 prompt cut from the left, 74 tokens cut off them" in printed
    line = refused("sft", *sft_args(files, tmp_path / "b", data=hopeless), says="no example is left of 2")
    assert "hopeless.jsonl:1" in line and "truncation left" in line
    args = sft_args(files, tmp_path / "d", data=mixed, truncation="left")
    assert "does not fit max_len 128" in refused("sft", *args, says="mixed.jsonl:3: a completion of 201")


def test_evaluation(files, sft_run, refused, tmp_path):
    """The rest of what can be wrong with a model folder is in test_weights.py."""
    path = jsonl(tmp_path / "x.jsonl", {"prompt": " the", "choices": [" red", " old"], "label": 2})
    args = flags(model=sft_run / "model", data=path, out=tmp_path / "out.json")
    refused("eval_mcq", *args, says="x.jsonl:1: label 2 is out of range")
    shutil.copytree(sft_run / "model", tmp_path / "empty")
    (tmp_path / "empty/model.safetensors").unlink()
    for name in ("empty", "none"):
        refused("eval_mcq", *flags(model=tmp_path / name, data=files["mcq"], out=tmp_path / "out.json"), says=name)
    assert not (tmp_path / "out.json").exists()


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"n_layer": 900, "n_embd": 2**14}, {"n_embd": 2**22}, {"n_layer": 10**7}])
@pytest.mark.slow
def test_a_scratch_model_that_no_machine_holds(sizes, files, refused, tmp_path):
    says = "is above 1,000" if "n_embd" not in sizes else "take a smaller model, or more processes"
    refused("sft", *sft_args(files, tmp_path / "run", **sizes), says=says)
    assert not (tmp_path / "run").exists()


def on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has …")


@pytest.mark.parametrize("work", [lambda: torch.empty(2**60), lambda: bytearray(2**62), on_a_gpu])
def test_out_of_memory_is_one_line(work, capsys):
    with pytest.raises(SystemExit) as end:
        errors.run(work)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith("error: out of memory (") and said.count("\n") == 1
    assert "lower micro_tokens or batch_size" in said


# --- the reference file ----------------------------------------------------------------------------------------------


def test_reference_for_other_weights(files, sft_run, reference, call, refused, tmp_path):
    """The failure that the project is about: refused by the hash; insisted on, it runs with a warning."""
    model = weights.load(sft_run / "model")
    with torch.no_grad():
        model.ln_f.weight.mul_(1.5)
    weights.save(model, get("toy"), tmp_path / "other")
    args = dpo_args(files, sft_run, reference, tmp_path / "run", init_from=tmp_path / "other")
    line = refused("dpo", *args, says="holds the log-probs of other weights")
    assert "--allow_ref_mismatch true" in line and not (tmp_path / "run").exists()
    status, _, err = call("dpo", *args, "--allow_ref_mismatch", "true", "--max_steps", 1)
    assert status == 0 and "warning: key ref:" in err and "warning: policy and reference differ by at most" in err
    assert len(metrics(tmp_path / "run")) == 3


def test_a_reference_with_too_few_numbers_is_refused(files, sft_run, reference, refused, tmp_path):
    with safe_open(reference, "pt") as file:
        metadata = file.metadata()
    for name in ("logps", "val_logps"):
        tensors = load_file(reference)
        tensors[name] = tensors[name][:7].clone()
        save_file(tensors, tmp_path / "short.safetensors", metadata)
        refused("dpo", *dpo_args(files, sft_run, tmp_path / "short.safetensors", tmp_path / "run"), says="is damaged: (7, 2)")


def test_reference_that_lies_is_caught_on_the_first_batch(files, sft_run, reference, refused, call, tmp_path):
    """Right hashes, wrong numbers: the check does not trust the file's word."""
    with safe_open(reference, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(reference)
    tensors["logps"] = tensors["logps"] - 0.1
    save_file(tensors, tmp_path / "lie.safetensors", metadata)
    args = dpo_args(files, sft_run, tmp_path / "lie.safetensors", tmp_path / "run")
    refused("dpo", *args, says="differ by at most")
    args[args.index("--ref") + 1] = str(reference)  # what the line advises works: a run without a step binds nobody
    assert call("dpo", *args, "--max_steps", 1)[0] == 0


def test_reference_that_is_no_reference_for_this_run(files, sft_run, reference, refused, call, tmp_path):
    no_val, cut, other = tmp_path / "no_val.safetensors", tmp_path / "cut", sft_run / "model/model.safetensors"
    assert call("precompute_ref", *ref_args(files, sft_run, no_val, val_data=None))[0] == 0
    cut.write_bytes(reference.read_bytes()[:-100])
    first, *rest = Path(files["pairs"]).read_text().splitlines(keepends=True)
    (tmp_path / "turned.jsonl").write_text("".join([*rest, first]))
    for path, keys, says in (
        (reference, {"data": tmp_path / "turned.jsonl"}, "was made with another data ("),
        (no_val, {}, "has no validation pairs: make it anew with `python precompute_ref.py --init_from"),
        (cut, {}, "is damaged or no .safetensors file"),
        (other, {}, "is not a file of precompute_ref.py"),
        (tmp_path / "no", {}, "no such file: make it with"),
    ):
        refused("dpo", *dpo_args(files, sft_run, path, tmp_path / "run", **keys), says=says)
    refused("precompute_ref", *ref_args(files, sft_run, tmp_path / "ref.pt"), says="must end in .safetensors")


# --- folders and processes ---------------------------------------------------------------------------------------------


def test_folders_that_are_not_ours(files, refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    refused("demo", "--out_dir", str(tmp_path / "mine"), says="was not made by a demo")
    refused("demo", "--out_dir", str(tmp_path / "new/../mine"), says="was not made by a demo")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years"
    refused("sft", *sft_args(files, tmp_path / "mine/thesis.txt"), says="thesis.txt: File exists: name another path")


def test_a_demo_deletes_only_what_a_demo_made(refused, tmp_path, monkeypatch):
    """Killed in the middle, it begins anew; notes of a user beside its files stay."""
    out = tmp_path / "demo"
    for name in ("sft/model/x", "ref.safetensors", "notes.txt", "mine/x", ".demo"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    (out / "dpo").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()

    def stop(*_, **__):
        raise errors.UserError("stopped")

    monkeypatch.setattr("demo.step", stop)
    for _ in range(2):
        refused("demo", "--out_dir", out, says="stopped")
        assert {p.name for p in out.iterdir()} == {"notes.txt", "mine", ".demo"} and (out / "mine/x").exists()
    assert (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize(("world", "says"), [("2", "start with torchrun --nproc_per_node 2"), ("abc", "'abc' is no number")])
def test_an_environment_that_torchrun_did_not_make(world, says, files, refused, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused("sft", *sft_args(files, tmp_path / "run"), says=says)


def test_of_several_processes_one_does_what_cannot_be_shared(capsys, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            errors.run(lambda: print("did it"), alone=True)
        assert end.value.code == 0 and capsys.readouterr().out == ("did it\n" if rank == "0" else "")
