"""A new user's first hour: what she types, the exit status, and what is said. A page to read from top to bottom.

A line of `SITUATIONS` is a command in a folder with the files of `FILES`; {run} and {pairs} stand for a run of one step from
scratch, sft.py's and dpo.py's. What takes more than a line has a test of its own below.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

import dpo
import nanopref
import sft
import weights
from data import load
from model import SIZES, GPTConfig
from runtime import config, optim
from runtime.keys import TrainKeys
from tests.conftest import ROOT, contents, flags, metrics, sft_args
from tests.size import sizes

TURNS = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
FILES = {
    "good.jsonl": [{"prompt": "Why?", "completion": " So."}] * 3,
    "glued.jsonl": [{"prompt": "Why?", "completion": "So."}] * 3,
    "chinese.jsonl": [{"prompt": "为什么？", "completion": "因为。"}] * 3,
    "marked.jsonl": [{"prompt": "Why?", "completion": " So.<|endoftext|>"}] * 3,
    "same.jsonl": [{"prompt": "Why?", "chosen": " So.", "rejected": rejected} for rejected in (" So.", " No.", " Oh.")],
    "questions.jsonl": [{"question": "Why?", "response": "So."}],
    "rated.jsonl": [{"instruction": "Why?", "better": "So.", "worse": "No."}],
    "strange.jsonl": [{"question": "Why?", "x": "So."}],
    "sharegpt.jsonl": [{"conversations": TURNS}],
    "talks.jsonl": [{"conversations": TALK}],
    "mmlu.jsonl": [{"question": "Why?", "choices": ["So", "No"], "answer": 2}],
    "arc.jsonl": [{"question": "Why?", "choices": {"text": ["So", "No"], "label": ["A", "B"]}, "answerKey": "C"}],
    "semicolons.csv": "prompt;completion\nWhy?; So.\n",
    "tabs.csv": "prompt\tcompletion\nWhy?\t So.\n",
}
RUN = (
    "sft --init_from scratch --tokenizer gpt2 --n_layer 1 --n_head 1 --n_embd 8 --block_size 16 --batch_size 2 "
    "--max_steps 1 --samples 0 --out_dir run"
)
PAIRS = RUN.replace("sft", "dpo", 1) + " --loss simpo"

SITUATIONS = [  # the command, its exit status, what is said on stderr
    # keys by the names of other trainers, and keys that are spelled almost right
    ("sft --learning_rate 1e-5", 2, "unknown key 'learning_rate': the nearest known key is 'lr' (peak learning rate)"),
    ("sft --learning-rate 1e-5", 2, "the nearest known key is 'lr'"),
    ("sft --num_train_epochs 3", 2, "the nearest known key is 'epochs'"),
    ("sft --model_name_or_path gpt2", 2, "the nearest known key is 'init_from'"),
    ("eval_mcq --model_name_or_path gpt2", 2, "the nearest known key is 'model'"),
    ("sft --per_device_train_batch_size 4", 2, "'batch_size' (examples or pairs per optimizer step, over all ranks)"),
    ("sft --gradient_accumulation_steps 4", 2, "'batch_size' (examples or pairs per optimizer step, over all ranks)"),
    ("sft --output_dir run", 2, "the nearest known key is 'out_dir'"),
    ("precompute_ref --output_dir run", 2, "the nearest known key is 'out'"),
    ("sft --max_length 512", 2, "the nearest known key is 'max_len'"),
    ("sft --bf16 true", 2, "the nearest known key is 'dtype'"),
    ("dpo --loss_type ipo", 2, "the nearest known key is 'loss'"),
    ("sft --bacth_size 4", 2, "the nearest known key is 'batch_size'"),
    ("sft --num_beams 4", 2, "unknown key 'num_beams': --help lists all"),
    # what is not there is said before anything is downloaded or tokenized: gpt2 is a download
    ("sft --init_from gpt2 --data none.jsonl --out_dir run", 2, "error: key data: none.jsonl: no such file: check the path"),
    ("sft --init_from gpt2 --data good.jsonl --val_data none.jsonl --out_dir run", 2, "none.jsonl: no such file"),
    ("sft --init_from gpt2 --data hellaswag --data_dir nowhere --out_dir run", 2, "nowhere: no such file or folder"),
    ("sft --init_from gpt2 --data helaswag --out_dir run", 2, "did you mean hellaswag?"),
    ("sft --init_from gpt2 --data good.jsonl,none.jsonl --out_dir run", 2, "none.jsonl: no such file"),
    ("sft --init_from gpt2 --data good.jsonl --chat_template t.jinja --out_dir run", 2, "t.jinja: no such file or folder"),
    ("dpo --init_from gpt2 --data same.jsonl --ref r.safetensors --out_dir run", 2, "r.safetensors: no such file: make it"),
    ("eval_mcq --model gpt2 --data none.jsonl", 2, "none.jsonl: no such file"),
    ("eval_reward --model gpt2 --ref_model none --data same.jsonl --out r.json", 2, "none is no folder and no known model"),
    # fields by the names of other formats
    ("{run} --data questions.jsonl", 2, "found question, response: --columns prompt=question,completion=response"),
    ("{run} --data questions.jsonl --columns prompt=question,completion=response", 0, "no white space stands between"),
    ("{pairs} --data rated.jsonl", 2, "--columns prompt=instruction,chosen=better,rejected=worse"),
    ("{run} --data strange.jsonl", 2, "'prompt' is missing (fields there: question, x); found question\n"),
    ("{run} --data sharegpt.jsonl", 2, "found conversations as {from, value}: write it as `messages` of {role, content}"),
    ("{run} --data talks.jsonl", 2, "found conversations: --columns messages=conversations"),
    ("{run} --data semicolons.csv", 2, "semicolons.csv:1: ';' stands between its columns, not a comma"),
    ("{run} --data tabs.csv", 2, "tabs.csv:1: '\\t' stands between its columns, not a comma"),
    ("data --data mmlu.jsonl --view mcq --out o.jsonl", 2, "mmlu.jsonl:1: answer 2 is out of range: there are 2"),
    ("data --data arc.jsonl --view mcq --out o.jsonl", 2, "arc.jsonl:1: answerKey 'C' is not one of A, B"),
    # warnings
    ("{run} --data good.jsonl", 0, ""),
    ("{run} --data glued.jsonl", 0, "warning: data glued.jsonl: in 3 of 3 examples no white space stands between prompt and"),
    ("{run} --data chinese.jsonl", 0, ""),
    ("{run} --data marked.jsonl", 0, "warning: data marked.jsonl: 3 of 3 examples spell out a special token in a completion"),
    ("{pairs} --data same.jsonl", 0, "warning: data same.jsonl: 1 pair dropped, chosen and rejected being the same tokens"),
    ("{run} --data good.jsonl --warmup 1", 0, "warning: key warmup: 1 of 1 step: the learning rate climbs to the end"),
    # devices
    ("{run} --data good.jsonl --device mps", 2, "device 'mps' cannot be used here (cpu and cuda can"),
]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, rows in FILES.items():
        text = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(("command", "wanted", "says"), SITUATIONS)
def test_situation(command, wanted, says, here, call):
    before = contents(here)
    name, *words = shlex.split(command.format(run=RUN, pairs=PAIRS))
    status, _, err = call("data.__main__" if name == "data" else name, *words)
    assert status == wanted and "Traceback" not in err, err
    assert says in err if says else "warning" not in err, err
    if wanted:
        assert err.count("\n") == 1 and err.startswith("error: ") and contents(here) == before


# --- the learning rate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "size", "keys", "says"),
    [
        ("sft", "gpt2", {"lr": 5e-5}, ""),
        (
            "sft",
            "gpt2",
            {"lr": 5e-2},
            "key lr: SFT of all weights by adamw rarely takes 0.05: usual for a model of this size is",
        ),
        ("sft", "gpt2", {"lr": 1e-8}, "rarely takes 1e-08"),
        ("sft", "gpt2", {"lr": 1e-5, "optimizer": "sgd"}, "by sgd rarely takes 1e-05"),
        ("sft", "gpt2-large", {"lr": 2e-4, "lora_rank": 8}, ""),
        ("sft", "gpt2-large", {"lr": 1e-6, "lora_rank": 8}, "SFT with LoRA by adamw rarely takes 1e-06"),
        ("sft", "gpt2", {"lr": 1.0, "init_from": "scratch"}, ""),
        ("dpo", "gpt2-large", {"lr": 1e-6}, ""),
        ("dpo", "gpt2-large", {"lr": 5e-5}, "DPO of all weights by adamw rarely takes 5e-05, but SFT does"),
        ("dpo", "gpt2-large", {"lr": 5e-5, "lora_rank": 8}, ""),
        ("sft", "gpt2", {"lr": 5e-5, "warmup": 99}, ""),
        ("sft", "gpt2", {"lr": 5e-5, "warmup": 100}, "key warmup: 100 of 100 steps"),
    ],
)
def test_the_learning_rate(stage, size, keys, says):
    kind = dpo.Config if stage == "dpo" else TrainKeys
    cfg = kind(**{"data": "x", "out_dir": "x", **keys})
    found = optim.doubts(cfg, weights.empty(GPTConfig(*SIZES[size])), 100)
    assert len(found) == bool(says) and says in "".join(found), found


def test_the_configs_of_published_experiments_are_not_doubted():
    """But for reviews_dpo, whose model is tiny."""
    doubted, stages = {}, {"sft": sft, "dpo": dpo, "lora": sft}
    for path in sorted((ROOT / "configs").glob("*.toml")):
        stage = stages.get(path.stem.rpartition("_")[2])
        if stage and path.stem != "toy_math_lora":
            cfg = config.load(stage.Config, ["--config", str(path)])
            size = cfg.init_from if cfg.init_from in SIZES else "gpt2"
            doubted[path.stem] = optim.doubts(cfg, weights.empty(GPTConfig(*SIZES[size])), 1000)
    assert len(doubted) > 10 and [name for name, found in doubted.items() if found] == ["reviews_dpo"]


# --- what a run prints and leaves ------------------------------------------------------------------------------------------


def test_the_header_says_what_it_counted_and_the_disk(run, tmp_path):
    printed, _, _ = run("sft", tmp_path / "run")
    assert "\n5 steps of an epoch, 10 examples each: " in printed
    params = int(re.search(r"([\d,]+) trained", printed)[1].replace(",", ""))
    assert f"on the disk: at most 4 checkpoints of {12e-9 * params:.3g} GB, and {4e-9 * params:.3g} GB for the model" in printed


@pytest.mark.slow
def test_keep_0_leaves_the_model_alone(files, call, refused, tmp_path):
    """The best weights become the model all the same; the run is not begun anew over it."""
    args, alone = (sft_args(files, tmp_path / name, keep=keep, epochs=4, lr=0.5) for name, keep in (("two", 2), ("none", 0)))
    assert call("sft", *args)[0] == call("sft", *alone)[0] == 0
    weights_of = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("two", "none")]
    assert weights_of[0] == weights_of[1] and metrics(tmp_path / "two") == metrics(tmp_path / "none")
    assert list((tmp_path / "two/checkpoints").iterdir()) and not list((tmp_path / "none/checkpoints").iterdir())
    refused("sft", *alone, says="the run there is done, and no checkpoint of it is left")
    assert call("sft", *alone, "--overwrite")[0] == 0


def test_every_optimizer_is_in_one_place():
    choices = config.rules(next(f for f in config.fields(TrainKeys) if f.name == "optimizer")).choices
    assert choices == tuple(optim.OPTIMIZERS)


def test_several_files_are_read_one_behind_the_other(here, call, refused):
    found = load("good.jsonl,chi*.jsonl", "train", "sft")
    assert [e.source for e in found] == [f"{name}.jsonl:{n}" for name in ("good", "chinese") for n in (1, 2, 3)]
    assert "6 examples" in call(*shlex.split(RUN), "--data", "good.jsonl,chi*.jsonl")[1]
    says = "key out: the run would write over marked.jsonl, which key data names"
    for data in ("good.jsonl,marked.jsonl", "*ed.jsonl"):
        refused("data.__main__", *flags(data=data, view="sft", out="marked.jsonl"), says=says)


# --- multiple choice as MMLU and ARC have it -------------------------------------------------------------------------------


def test_questions_of_mmlu_and_arc(tmp_path):
    arc = {"question": "Why?", "choices": {"text": ["So", "No", "Oh"], "label": ["1", "2", "3"]}, "answerKey": "2"}
    mmlu = {"question": "Why?", "subject": "x", "choices": ["So", "No", "Oh"], "answer": 1}
    (tmp_path / "q.jsonl").write_text(f"{json.dumps(arc)}\n{json.dumps(mmlu)}\n")
    views = {view: load(str(tmp_path / "q.jsonl"), "train", view) for view in ("mcq", "loglik", "sft", "preference")}
    for written, scored, answer in zip(views["mcq"], views["loglik"], views["sft"], strict=True):
        assert written.prompt == answer.prompt == "Why?\nA) So\nB) No\nC) Oh\nAnswer:" and answer.completions == (" No",)
        assert written.completions == scored.completions == (" So", " No", " Oh") and written.label == scored.label == 1
    assert [e.completions for e in views["preference"]] == 2 * [(" No", " So"), (" No", " Oh")]
    harness = Path(find_spec("lm_eval").submodule_search_locations[0], "tasks/arc/arc_easy.yaml")
    asks = yaml.safe_load(harness.read_text().replace("!function", ""))["doc_to_text"]
    assert views["loglik"][0].prompt == asks.replace("{{question}}", "Why?")


# --- before torch is imported ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_help_needs_no_torch_and_is_that_of_the_script(call, tmp_path):
    """By the one command that `pip install -e .` makes: a package torch that cannot be imported stands before the real one."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for name in set(nanopref.SCRIPTS) - {"report.memory"}:  # which has no keys
        command = [sys.executable, str(ROOT / "nanopref.py"), name, "--help"]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), (name, done.stderr)
        package = find_spec(name).submodule_search_locations
        assert done.stdout == call(f"{name}.__main__" if package else name, "--help")[1], name
        assert max(map(len, done.stdout.splitlines())) <= 100, name


def test_one_command_for_every_script():
    scripts = [file for file in sizes() if "\n    run(main" in (ROOT / file).read_text(encoding="utf-8")]
    names = {file.removesuffix(".py").removesuffix("/__main__").replace("/", ".") for file in scripts}
    assert names | {"report.memory"} == set(nanopref.SCRIPTS)
    done = subprocess.run([sys.executable, "nanopref.py", "dop"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: command line: no script 'dop': did you mean dpo?\n")


def test_ctrl_c_while_torch_is_imported(tmp_path):
    """In place of torch stands a module that says when it is imported, and takes its time. Ctrl-C counts, also where the tests
    run in the background and ignore it."""
    begun = tmp_path / "begun"
    (tmp_path / "torch.py").write_text(f"import time\nopen({str(begun)!r}, 'w').close()\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen([sys.executable, "sft.py"], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env, **heard)
    while process.poll() is None and not begun.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "\ninterrupted\n" and process.returncode == 130


# --- the project's papers ---------------------------------------------------------------------------------------------------


def test_the_papers_of_all_losses_can_be_cited():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    urls = {paper["url"] for paper in cited["references"]}
    named = set(re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / "losses.py").read_text()))
    assert len(named) == 18 and {f"https://arxiv.org/abs/{number}" for number in named} <= urls
    assert cited["license"] == "MIT" and (ROOT / "LICENSE").read_text().startswith("MIT License")
