"""What a user can get wrong: each is one line on stderr that says what and where, exit status 2, and nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import dpo_args, flags, ref_args, sft_args


def toy_lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "x.jsonl: no such file"),
        ("", "x.jsonl: an empty file"),
        ('{"prompt": " the", "completion": " red"}\n{"prompt"\n', "x.jsonl:2: not JSON"),
        ('{"prompt": " the"}\n', "x.jsonl:1: the field 'completion' is missing"),
        ('{"prompt": " the", "completion": ""}\n', "x.jsonl:1: 'completion' is empty"),
        ('{"prompt": " the", "completion": " quux"}\n', "quux"),
    ],
)
def test_training_files(files, refused, tmp_path, content, says):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    refused("sft", *sft_args(files, tmp_path / "run", data=path), says=says)
    assert not (tmp_path / "run").exists(), "nothing is written before the data is read"


def test_options_out_of_range(refused, sft_run, tmp_path):
    path = toy_lines(tmp_path / "x.jsonl", {"prompt": " the", "choices": [" red", " old"], "label": 2})
    args = flags(model=sft_run / "model", data=path, out=tmp_path / "out.json")
    refused("eval_mcq", *args, says="x.jsonl:1: label 2 is out of range")
    assert not (tmp_path / "out.json").exists()


def test_examples_longer_than_the_context(files, call, refused, tmp_path):
    """drop: left out and counted; all dropped: an error. left: the prompt is cut; a completion that cannot fit: an error."""
    short = {"prompt": " the red", "completion": " scarf"}
    long_prompt = {"prompt": " the red" * 100, "completion": " scarf"}
    long_completion = {"prompt": " the", "completion": " red" * 200}
    mixed = toy_lines(tmp_path / "mixed.jsonl", short, long_prompt, long_completion)
    _, printed, _ = call("sft", *sft_args(files, tmp_path / "a", data=mixed, val_data=None))
    assert "3 examples, 2 dropped as too long" in printed
    hopeless = toy_lines(tmp_path / "hopeless.jsonl", long_prompt, long_completion)
    line = refused("sft", *sft_args(files, tmp_path / "b", data=hopeless), says="no example is left of 2")
    assert "hopeless.jsonl:1" in line and "truncation left" in line
    cut = toy_lines(tmp_path / "cut.jsonl", short, long_prompt)
    _, printed, _ = call("sft", *sft_args(files, tmp_path / "c", data=cut, val_data=None, truncation="left"))
    assert "1 prompts cut from the left by 74 tokens" in printed
    line = refused(
        "sft", *sft_args(files, tmp_path / "d", data=mixed, truncation="left"), says="mixed.jsonl:3: a completion of 201"
    )
    assert "does not fit max_len 128" in line


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"learning_rte": 1}, "unknown key 'learning_rte'"),
        ({"bach_size": 1}, "'batch_size'"),
        ({"lr": "fast"}, "lr = 'fast' is not a float"),
        ({"batch_size": 0}, "key batch_size: 0 is too small"),
        ({"batch_size": 1.5}, "batch_size = '1.5' is not an int"),
        ({"schedule": "step"}, "is not one of cosine, linear, constant"),
        ({"epochs": 0}, "key epochs: 0.0 must be above 0"),
        ({"min_lr": 1}, "min_lr: 1.0 is above lr"),
        ({"lr": "nan"}, "key lr: nan"),
        ({"dropout": 1}, "key dropout: 1.0 must be below 1"),
        ({"max_len": 200}, "key max_len: 200 is more than the model's context of 128"),
        ({"dtype": "float16"}, "float16 is refused"),
        ({"device": "tpu9"}, "device 'tpu9' cannot be used"),
        ({"tokenizer": "bert"}, "unknown tokenizer 'bert'"),
        ({"data": "helaswag"}, "did you mean hellaswag?"),
        ({"init_from": "gpt-2-medium"}, "gpt2-medium"),
        ({"n_head": 3}, "n_embd 32 is no multiple of n_head 3"),
        ({"config": "nowhere.toml"}, "nowhere.toml"),
    ],
)
def test_settings(files, refused, tmp_path, keys, says):
    refused("sft", *sft_args(files, tmp_path / "run", **keys), says=says)
    assert not (tmp_path / "run").exists()


def test_config_file_names_its_line(refused, tmp_path):
    config = tmp_path / "x.toml"
    config.write_text('data = "toy"\nbatch_sise = 3\n')
    line = refused("sft", "--config", config, says="unknown key 'batch_sise'")
    assert "x.toml:2" in line and "'batch_size'" in line


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"ref": None}, "loss sigmoid needs the reference's log-probs: make them with"),
        ({"beta": 0}, "key beta: 0.0 must be above 0"),
        ({"loss": "robust", "label_smoothing": 0.5}, "must be 0 or more and below 0.5 for loss robust"),
        ({"loss": "exo_pair"}, "label_smoothing: 0.0 must be above 0"),
        ({"loss": "ppo"}, "is not one of sigmoid"),
    ],
)
def test_dpo_settings(files, sft_run, reference, refused, tmp_path, keys, says):
    refused("dpo", *dpo_args(files, sft_run, reference, tmp_path / "run", **keys), says=says)


# --- the reference file ----------------------------------------------------------------------------------------------


def test_reference_for_other_weights(files, sft_run, reference, call, refused, tmp_path):
    """The failure that the project is about: refused by the hash; insisted on, it runs with a warning."""
    import weights
    from data.tokenizer import get

    model = weights.load(sft_run / "model")
    with torch.no_grad():
        model.ln_f.weight.mul_(1.5)
    weights.save(model, get("toy"), tmp_path / "other")
    args = dpo_args(files, sft_run, reference, tmp_path / "run", init_from=tmp_path / "other")
    line = refused("dpo", *args, says="holds the log-probs of other weights")
    assert "--allow_ref_mismatch true" in line and not (tmp_path / "run").exists()
    status, _, err = call("dpo", *args, "--allow_ref_mismatch", "true", "--max_steps", 1)
    assert status == 0 and "warning: key ref:" in err and "warning: policy and reference differ by at most" in err


def test_reference_that_lies_is_caught_on_the_first_batch(files, sft_run, reference, refused, tmp_path):
    """Right hashes, wrong numbers: the check does not trust the file's word."""
    from safetensors import safe_open

    with safe_open(reference, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(reference)
    tensors["logps"] = tensors["logps"] - 0.1
    save_file(tensors, tmp_path / "lie.safetensors", metadata)
    line = refused("dpo", *dpo_args(files, sft_run, tmp_path / "lie.safetensors", tmp_path / "run"), says="differ by at most")
    assert "ln 2 = 0.6931" in line


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"data": "val_pairs"}, "another number of pairs (48, here 16)"),
        ({"max_len": 100}, "another max_len (128, here 100)"),
        ({"truncation": "left"}, "another truncation (drop, here left)"),
        ({"val_data": "pairs"}, "another validation data"),
    ],
)
def test_reference_for_other_data(files, sft_run, reference, refused, tmp_path, keys, says):
    keys = {name: files.get(value, value) for name, value in keys.items()}
    refused("dpo", *dpo_args(files, sft_run, reference, tmp_path / "run", **keys), says=says)


def test_reference_for_changed_text(files, sft_run, reference, refused, tmp_path):
    changed = tmp_path / "pairs.jsonl"
    lines = Path(files["pairs"]).read_text().splitlines(keepends=True)
    changed.write_text("".join([*lines[1:], lines[0]]))
    args = dpo_args(files, sft_run, reference, tmp_path / "run", data=changed)
    refused("dpo", *args, says="another data (SHA-256")


def test_reference_without_validation_pairs(files, sft_run, refused, call, tmp_path):
    out = tmp_path / "ref.safetensors"
    assert call("precompute_ref", *ref_args(files, sft_run, out, val_data=None))[0] == 0
    refused("dpo", *dpo_args(files, sft_run, out, tmp_path / "run"), says="has no validation pairs: make it with --val_data")


def test_reference_that_is_cut_or_no_reference(files, sft_run, reference, refused, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(reference.read_bytes()[:-100])
    refused("dpo", *dpo_args(files, sft_run, cut, tmp_path / "run"), says="is damaged or no .safetensors file")
    other = sft_run / "model/model.safetensors"
    refused("dpo", *dpo_args(files, sft_run, other, tmp_path / "run"), says="is not a file of precompute_ref.py")
    refused("dpo", *dpo_args(files, sft_run, tmp_path / "no", tmp_path / "run"), says="no such file: make it with")
    refused("precompute_ref", *ref_args(files, sft_run, tmp_path / "ref.pt"), says="must end in .safetensors")


# --- models and folders ----------------------------------------------------------------------------------------------


def test_model_folders(files, sft_run, refused, tmp_path):
    """The rest of what can be wrong with a model folder is in test_weights.py."""
    empty = tmp_path / "empty"
    shutil.copytree(sft_run / "model", empty)
    (empty / "model.safetensors").unlink()
    refused("eval_mcq", *flags(model=empty, data=files["mcq"]), says="empty")
    tensors = load_file(sft_run / "model/model.safetensors")
    tensors["transformer.ln_f.weight"] = torch.ones(7)
    save_file(tensors, empty / "model.safetensors", {"format": "pt"})
    line = refused("eval_mcq", *flags(model=empty, data=files["mcq"]), says="ln_f.weight")
    assert "7" in line and "32" in line
    refused("eval_mcq", *flags(model=tmp_path / "none", data=files["mcq"]), says="none")


def test_out_dir_that_is_a_file(files, refused, tmp_path):
    (tmp_path / "run").write_text("")
    refused("sft", *sft_args(files, tmp_path / "run"), says="is a file: name a folder")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [("WORLD_SIZE", "2", "start with torchrun --nproc_per_node 2"), ("WORLD_SIZE", "abc", "WORLD_SIZE: 'abc' is no number")],
)
def test_an_environment_that_torchrun_did_not_make(files, refused, tmp_path, monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused("sft", *sft_args(files, tmp_path / "run"), says=says)
