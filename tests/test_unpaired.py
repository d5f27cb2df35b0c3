"""dpo.py with loss kto: the reference file, layouts and processes, adapters, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import weights
from data.tokenizer import get
from tests.conftest import close, flags, good, metrics
from tests.data.published import write


@pytest.fixture(scope="module")
def unpaired(files, tmp_path_factory):
    """The fixture's pairs, one completion of each, as {"train", "val"} -> file."""
    folder, found = tmp_path_factory.mktemp("unpaired"), {}
    for name, source in (("train", "pairs"), ("val", "val_pairs")):
        pairs = [json.loads(line) for line in Path(files[source]).read_text().splitlines()]
        rows = [{"prompt": p["prompt"], "label": bool(n % 2)} for n, p in enumerate(pairs)]
        rows = [r | {"completion": p["chosen" if r["label"] else "rejected"]} for r, p in zip(rows, pairs, strict=True)]
        found[name] = write(folder / f"{name}.jsonl", *rows)
    return found


@pytest.fixture
def kto(unpaired, sft_run):
    """kto(folder, key=value): the arguments of a run of 5 steps, in a folder whose reference file is made at the first."""

    def arguments(folder, **keys):
        common = {"loss": "kto", "init_from": sft_run / "model", "data": unpaired["train"], "val_data": unpaired["val"]}
        run = {"ref": "auto", "out_dir": folder, "batch_size": 10, "max_steps": 5, "lr": 1e-3, "eval_every": 5, "samples": 1}
        return flags(**common | run | keys)

    return arguments


def test_the_reference_file_and_the_first_loss(kto, unpaired, sft_run, call, tmp_path):
    out = tmp_path / "ref.safetensors"
    args = flags(init_from=sft_run / "model", data=unpaired["train"], val_data=unpaired["val"], out=out)
    status, printed, err = call("precompute_ref", *args)
    assert status == 0, err
    assert "mean log-prob of the completion, of the borrowed one" in printed
    logps, toy, model = load_file(out)["logps"], get("toy"), weights.load(sft_run / "model")
    rows = [json.loads(line) for line in unpaired["train"].read_text().splitlines()]
    assert logps.shape == (len(rows), 2)
    for n, (prompt, *texts) in {0: (rows[1], rows[1], rows[0]), len(rows) - 1: (rows[0], rows[0], rows[-1])}.items():
        for side, row in enumerate(texts):
            ids, answer = toy.encode(prompt["prompt"]), [*toy.encode(row["completion"]), toy.eot]
            tokens = torch.tensor([ids + answer])
            every = model.logits(tokens)[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
            assert logps[n, side].item() == pytest.approx(every[len(ids) - 1 :].sum().item(), abs=1e-4)
    status, printed, err = call("dpo", *kto(tmp_path / "run", ref=out, max_steps=25, lr=3e-3))
    assert status == 0, err
    assert "loss 0.5000" in printed and "labels: 24 true, 24 false" in printed and err == ""
    records = metrics(tmp_path / "run")
    assert {"kl", "rewards/margins"} <= records[-1].keys() and "rewards/accuracies" not in records[-1]
    assert [r["rewards/margins"] for r in records if r["split"] == "train"][-1] > 0.01


@pytest.mark.slow
def test_the_curve_under_any_layout_and_with_two_processes(kto, call, world, tmp_path):
    """The KL estimate is that of the whole batch."""
    assert call("dpo", *kto(tmp_path / "want"))[0] == 0
    want = metrics(tmp_path / "want")
    assert max(r["kl"] for r in want) > 0.01
    for n, layout in enumerate(({"micro_tokens": 1}, {"row_len": 200, "micro_tokens": 400})):
        assert call("dpo", *kto(tmp_path / str(n), **layout))[0] == 0
        close(metrics(tmp_path / str(n)), want, 1e-4)
    good(world(2, "dpo", kto(tmp_path / "two", micro_tokens=300)))
    close(metrics(tmp_path / "two"), want, 1e-4)


def test_adapters_need_no_file_and_a_run_goes_on(kto, call, tmp_path):
    keys = {"ref": None, "lora_rank": 2, "lr": 1e-2, "save_every": 2}
    status, printed, err = call("dpo", *kto(tmp_path / "run", **keys))
    assert status == 0 and "reference: the model as this run began" in printed, err
    want = metrics(tmp_path / "run")
    assert call("dpo", *kto(tmp_path / "again", **keys | {"max_steps": 4, "schedule": "constant"}))[0] == 0
    assert call("dpo", *kto(tmp_path / "again", **keys | {"schedule": "constant"}))[0] == 0
    assert [r["step"] for r in metrics(tmp_path / "again") if r["split"] == "train"] == [1, 2, 3, 4, 5]
    assert want[0]["loss"] == pytest.approx(0.5, abs=1e-6)


def test_settings_and_data_that_do_not_fit(kto, files, unpaired, sft_run, call, refused, tmp_path):
    ours, run = unpaired["train"], tmp_path / "run"
    for keys, says in (
        ({"data": files["pairs"]}, "key data: it holds pairs, and loss kto takes unpaired lines"),
        ({"val_data": files["val_pairs"]}, "key val_data: it holds pairs, and loss kto"),
        ({"loss": "sigmoid"}, "key data: it holds unpaired lines, and loss sigmoid takes pairs"),
        ({"ref": None}, "key ref: loss kto needs the reference's log-probs"),
    ):
        refused("dpo", *kto(run, **keys), says=says)
    rows = [json.loads(line) for line in ours.read_text().splitlines()]
    for label, word in ((True, "true"), (False, "false")):
        path = write(tmp_path / "one.jsonl", *(row | {"label": label} for row in rows))
        refused("dpo", *kto(run, data=path), says=f"key data: all 48 labels are {word}: loss kto needs both kinds")
    says = "an unpaired line where pairs were expected"
    refused(
        "eval_reward",
        *flags(model=sft_run / "model", ref_model=sft_run / "model", data=ours, out=tmp_path / "r.json"),
        says=says,
    )
    assert not run.exists()
    path = write(tmp_path / "few.jsonl", *(row | {"label": n < 8} for n, row in enumerate(rows)))
    for keys, warns in (({}, "8 to 40: KTO's paper advises 1 to 1.33 times as much of true: --desirable_weight 5,"),
                        ({"desirable_weight": 5}, "")):  # fmt: skip
        status, _, err = call("dpo", *kto(tmp_path / f"few{len(keys)}", data=path, max_steps=1, **keys))
        assert status == 0 and (warns in err if warns else err == ""), err


def test_losses_with_their_likelihood(run, tmp_path):
    for loss in ("cpo", "orpo"):
        train = [r for r in run(loss, tmp_path / loss, ref=None, sft_weight=1.0, beta=0.5)[2] if r["split"] == "train"]
        assert train[-1]["nll_loss"] < train[0]["nll_loss"] and train[-1]["rewards/margins"] > train[0]["rewards/margins"]
