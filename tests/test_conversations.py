"""Conversations through the stages: SFT, reference, DPO, samples, a conversation in the terminal, the judge's reading."""

import io
import json
import tomllib

import pytest
import torch

from data import tokenizer as tok
from data.encode import encode
from data.examples import Example
from runtime import reference
from tests.chats import ASKED, CHATML, LAST, LLAMA3, SAID, SYSTEM, TALK, tokenizer_folder
from tests.conftest import flags, metrics
from tests.data.published import write

NO = {"role": "assistant", "content": "No."}
SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 192}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer with a template, conversations and pairs."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer_folder(folder / "tokenizer")
    write(
        folder / "sft.jsonl",
        {"messages": [*TALK]},
        {"messages": [SYSTEM, ASKED, SAID]},
        {"prompt": "Hello", "completion": " there!"},
    )
    pairs = [{"chosen": [*TALK], "rejected": [*TALK[:3], NO]}, {"prompt": [SYSTEM, ASKED], "chosen": [SAID], "rejected": [NO]}]
    write(folder / "pairs.jsonl", *pairs)
    return folder


def sft(folder, out, **keys):
    common = {"init_from": "scratch", "tokenizer": folder / "tokenizer", "data": folder / "sft.jsonl", "out_dir": out, **SIZES}
    return flags(**common | {"val_data": folder / "sft.jsonl", "batch_size": 3, "max_steps": 2, "lr": 1e-3} | keys)


@pytest.fixture(scope="module")
def model(folder):
    """The folder of a model that SFT on the conversations made."""
    from tests.conftest import script

    assert script("sft", *sft(folder, folder / "run")) == 0
    return folder / "run" / "model"


def test_sft_learns_the_assistants_turns_alone(folder, model):
    """The first loss is the mean over what transformers' logits say of these tokens, each turn after all that is before it."""
    transformers = pytest.importorskip("transformers")
    tokenizer = tok.get(model)
    start = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    total = count = 0
    for talk in (TALK, (SYSTEM, ASKED, SAID)):
        ids = tokenizer.encode_rendered(tokenizer.chat.render(talk, "")[0])[0]
        logps = start(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for i in (i for i, message in enumerate(talk) if message["role"] == "assistant"):
            before, until = (tokenizer.encode_rendered(tokenizer.chat.render(talk[:n], "", n == i)[0])[0] for n in (i, i + 1))
            assert ids[: len(until)] == until and until[: len(before)] == before
            for at in range(len(before), len(until)):
                total, count = total - logps[at - 1, ids[at]].item(), count + 1
    ids = [*tokenizer.encode("Hello"), *(answer := [*tokenizer.encode(" there!"), tokenizer.eot])]
    logps = start(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    total -= sum(logps[at - 1, ids[at]].item() for at in range(len(ids) - len(answer), len(ids)))
    last = [record for record in metrics(model.parent) if record["split"] == "val"][-1]
    assert last["loss"] == pytest.approx(total / (count + len(answer)), abs=1e-5)


def test_a_model_is_saved_with_the_files_of_its_tokenizer(folder, model):
    for path in (folder / "tokenizer").iterdir():
        assert (model / path.name).read_bytes() == path.read_bytes()
    config = json.loads((model / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(model)
    ours = tok.get(model)
    ids = theirs.apply_chat_template(list(TALK))["input_ids"]
    assert ours.encode_rendered(ours.chat.render(TALK, "")[0])[0] == ids


@pytest.mark.slow
def test_dpo_on_conversations(folder, model, tmp_path, call):
    """log-probs of the reference file are transformers' sums over what follows the prompt."""
    data = {"init_from": model, "data": folder / "pairs.jsonl"}
    status, _, err = call("precompute_ref", *flags(**data, out=tmp_path / "ref.safetensors"))
    assert status == 0, err
    tensors, metadata = reference.read(tmp_path / "ref.safetensors")
    assert metadata["date"] == "", "this template writes no date"
    start = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(model).eval()
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(model)
    for logps, prompt, answers in zip(tensors["logps"], (TALK[:3], (SYSTEM, ASKED)), ((LAST, NO), (SAID, NO)), strict=True):
        before = theirs.apply_chat_template(list(prompt), add_generation_prompt=True)["input_ids"]
        for logp, answer in zip(logps, answers, strict=True):
            ids = theirs.apply_chat_template([*prompt, answer])["input_ids"]
            assert ids[: len(before)] == before
            all_logps = start(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            want = sum(all_logps[at - 1, ids[at]] for at in range(len(before), len(ids)))
            assert logp.item() == pytest.approx(want.item(), abs=1e-3)
    run = flags(**data, ref=tmp_path / "ref.safetensors", out_dir=tmp_path / "dpo", batch_size=2, max_steps=2)
    status, said, err = call("dpo", *run)
    assert status == 0 and "loss 0.6931" in said, err


def test_reward_on_conversations(folder, model, tmp_path, call):
    keys = {"model": model, "ref_model": model, "data": folder / "pairs.jsonl", "out": tmp_path / "r.json"}
    status, _, err = call("eval_reward", *flags(**keys))
    assert status == 0 and json.loads((tmp_path / "r.json").read_text())["n"] == 2, err


@pytest.mark.slow
def test_a_written_date_is_pinned(folder, tmp_path, call, refused, monkeypatch):
    """A run that is resumed, and one with yesterday's reference, go on with the day that they were begun on."""
    import runtime.build

    class Day(runtime.build.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(DAY)

    monkeypatch.setattr(runtime.build, "date", Day)
    (tmp_path / "t.jinja").write_text(LLAMA3)
    more = {"chat_template": tmp_path / "t.jinja", "save_every": 1}
    DAY = "2026-01-01"
    status, _, err = call("sft", *sft(folder, tmp_path / "run", **more))
    assert status == 0, err
    assert tomllib.loads((tmp_path / "run" / "config.toml").read_text())["date"] == DAY
    model = tmp_path / "run" / "model"
    assert (model / "chat_template.jinja").read_text() == LLAMA3, (
        "the model is saved with the template that it was trained with"
    )
    saved = max((tmp_path / "run/checkpoints").glob("step_*"))
    assert (saved / "chat_template.jinja").read_text() == LLAMA3, "and so is a checkpoint"
    data = {"init_from": model, "data": folder / "pairs.jsonl"}
    assert call("precompute_ref", *flags(**data, out=tmp_path / "ref.safetensors"))[0] == 0
    assert reference.read(tmp_path / "ref.safetensors")[1]["date"] == DAY

    DAY = "2026-01-02"
    status, said, err = call("sft", *sft(folder, tmp_path / "run", **more))
    assert status == 0 and "resuming" in said, err
    dpo = {**data, "ref": tmp_path / "ref.safetensors", "batch_size": 2, "max_steps": 1}
    status, _, err = call("dpo", *flags(**dpo, out_dir=tmp_path / "dpo"))
    assert status == 0, err
    assert tomllib.loads((tmp_path / "dpo" / "config.toml").read_text())["date"] == "2026-01-01"
    refused("dpo", *flags(**dpo, out_dir=tmp_path / "other", date=DAY), says="was made with another data")


def test_samples_of_conversations(folder, model, tmp_path, call):
    """Greedy samples equal transformers', which go on from the same ids."""
    lines = [{"messages": [*TALK[:3]]}, {"prompt": "Hello"}, {"messages": [ASKED, SAID], "chosen": [ASKED, SAID]}]
    file, out = write(tmp_path / "p.jsonl", *lines), tmp_path / "out.jsonl"
    keys = {"model": model, "prompts": file, "out": out, "temperature": 0, "max_new_tokens": 8}
    status, _, err = call("sample", *flags(**keys))
    assert status == 0, err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{k: v for k, v in line.items() if k != "completions"} for line in found] == lines
    transformers = pytest.importorskip("transformers")
    theirs, start = transformers.AutoTokenizer.from_pretrained(model), transformers.AutoModelForCausalLM.from_pretrained(model)
    for line, talk in ((found[0], TALK[:3]), (found[2], (ASKED,))):
        ids = theirs.apply_chat_template(list(talk), add_generation_prompt=True)["input_ids"]
        stops = sorted(tok.get(model).stops | {tok.get(model).turn_end()})
        made = start.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=stops, pad_token_id=0)[0]
        written = [i for i in made[len(ids) :].tolist() if i not in (*stops, 0)]
        assert line["completions"] == [theirs.decode(written)]

    from judge.items import read_items

    items = read_items(str(write(tmp_path / "j.jsonl", found[2])), "", 1, 0)
    assert (items[0].prompt, items[0].others) == (ASKED["content"], (SAID["content"],))


def test_a_conversation_is_remembered(folder, model, monkeypatch, call, refused):
    """The second answer is that to the whole conversation; one that gets too long loses its oldest turns."""
    import sample

    asked = []
    real = sample.completions

    def completions(cfg, prompts, *rest):
        asked.append(next(iter(prompts.values())))
        yield from real(cfg, prompts, *rest)

    monkeypatch.setattr(sample, "completions", completions)
    lines = ["Hello there!", "How are you?", "Tell me more about it, please. " * 4, "Hello"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    status, said, err = call("sample", *flags(model=model, chat="true", temperature=0, max_new_tokens=40, stop="\\n"))
    assert status == 0, err
    tokenizer = tok.get(model)

    def ids(*talk):
        return tokenizer.encode_rendered(tokenizer.chat.render(talk, "", True)[0])[0]

    answers = said.split("\n")[:-1]
    assert len(answers) == len(asked) == 4
    talk = []
    for n, (line, text) in enumerate(zip(lines, answers, strict=True)):
        talk.append({"role": "user", "content": line})
        kept = next(at for at in range(0, len(talk), 2) if len(ids(*talk[at:])) + 40 <= SIZES["block_size"] + 1)
        assert asked[n] == ids(*talk[kept:]), "the whole conversation, or as much of its end as there is room for"
        talk.append({"role": "assistant", "content": text})
    assert kept > 0 and len(asked[1]) > len(asked[0])
    refused("sample", *flags(model=model, chat="true", prompts="x", out="y"), says="key chat: it is for the terminal")


def test_no_template_is_one_line(folder, tmp_path, refused):
    plain = tokenizer_folder(tmp_path / "plain", None)
    keys = sft(folder, tmp_path / "run", tokenizer=plain)
    refused("sft", *keys, says="sft.jsonl:1: a conversation, and ")
    keys = sft(folder, tmp_path / "run", tokenizer=plain, chat_template=tmp_path / "none.jinja")
    refused("sft", *keys, says="key chat_template: ")
    (tmp_path / "t.jinja").write_text(CHATML)
    keys = sft(folder, tmp_path / "run", tokenizer=plain, chat_template=tmp_path / "t.jinja", chat_template_kwargs="{]")
    refused("sft", *keys, says="key chat_template_kwargs: '{]' is no JSON object")


def test_gpt2_takes_a_template():
    gpt2 = tok.get("gpt2")
    (item,), _ = encode([Example((ASKED,), ((SAID,),), source="f:1")], gpt2.with_chat(CHATML), 999, "drop")
    assert gpt2.decode(item.completions[0].tolist()) == "Paris is the capital.<|done|>\n<|endoftext|>"
