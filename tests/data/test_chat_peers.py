"""Conversations as TRL's trainers tokenize them: the same rows, the same completions, the same tokens to predict."""

import warnings

import pytest

from data import messages
from data import tokenizer as tok
from data.encode import encode
from data.examples import Example
from tests.chats import ASKED, CHATML, LAST, MARKED, MISTRAL, QWEN3, SAID, SYSTEM, TALK, ZEPHYR, tokenizer_folder
from tests.peers import quiet

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

NO = {"role": "assistant", "content": "\n\nNo.  "}
PAIRS = [
    {"prompt": [*TALK[:3]], "chosen": [LAST], "rejected": [NO]},
    {"prompt": [SYSTEM, ASKED], "chosen": [SAID], "rejected": [NO]},
]
TALKS = [{"messages": [*TALK]}, {"messages": [SYSTEM, *TALK]}]


def trained(trainer: str, folder, records: list[dict], **settings) -> list[dict]:
    """What a trainer of TRL makes of the records."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    theirs = AutoTokenizer.from_pretrained(folder, pad_token="<unk>")
    sizes = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=len(theirs), n_positions=256, bos_token_id=1, eos_token_id=2)
    config = getattr(trl, f"{trainer}Config")(
        output_dir=str(folder / "trl"), report_to=[], use_cpu=True, max_length=None, **settings
    )
    more = {"ref_model": GPT2LMHeadModel(sizes)} if trainer == "DPO" else {}
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        data = Dataset.from_list(records)
        made = getattr(trl, f"{trainer}Trainer")(
            GPT2LMHeadModel(sizes), args=config, train_dataset=data, processing_class=theirs, **more
        )
    return list(made.train_dataset)


@pytest.mark.parametrize("template", [CHATML, MISTRAL, ZEPHYR, MARKED, QWEN3])
def test_rows_are_those_of_trl(template, tmp_path):
    """Also where an answer's first characters share a token with the prompt's last one."""
    ours = tok.get(tokenizer_folder(tmp_path, template))
    examples = [e for record in PAIRS for e in messages.examples(record, "preference", 0, "f:1")]
    items, _ = encode(examples, ours, 999, "drop")
    for row, item in zip(trained("DPO", tmp_path, PAIRS), items, strict=True):
        found = [item.prompt.tolist(), *(c.tolist() for c in item.completions)]
        assert found == [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
    answers = [{"prompt": record["prompt"], "completion": record[name]} for record in PAIRS for name in ("chosen", "rejected")]
    examples = [e for record in answers for e in messages.examples(record, "sft", 0, "f:1")]
    items, _ = encode(examples, ours, 999, "drop")
    for row, item in zip(trained("SFT", tmp_path, answers), items, strict=True):
        assert row["input_ids"] == [*item.prompt, *item.completions[0]]
        assert predicted(row) == list(range(len(item.prompt), len(row["input_ids"])))


def predicted(row: dict) -> list[int]:
    """Where the tokens stand that TRL predicts."""
    return [i for i, label in enumerate(row["labels"]) if label != -100]


def test_the_assistants_turns_are_those_of_trl(tmp_path):
    ours = tok.get(tokenizer_folder(tmp_path, MARKED))
    examples = [Example((), (tuple(record["messages"]),), source="f:1") for record in TALKS]
    items, _ = encode(examples, ours, 999, "drop")
    for row, item in zip(trained("SFT", tmp_path, TALKS, assistant_only_loss=True), items, strict=True):
        assert row["input_ids"] == [*item.prompt, *item.completions[0]]
        assert predicted(row) == [len(item.prompt) + i for i, wanted in enumerate(item.targets[0]) if wanted]


@pytest.mark.parametrize("system", [(), (SYSTEM,)])
def test_the_common_beginning_is_that_of_trl(system):
    from trl import extract_prompt

    whole = {"chosen": [*system, *TALK], "rejected": [*system, *TALK[:3], NO]}
    theirs = extract_prompt(whole)
    assert messages.pair(whole, "f:1") == tuple(tuple(theirs[name]) for name in ("prompt", "chosen", "rejected"))
