"""Several completions of a prompt in one row: training, reference and rewards are those of the same pairs apart."""

import contextlib
import itertools
import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file

import weights
from data.tokenizer import get
from data.toy import problems
from runtime import checkpoint
from tests.conftest import close, flags, good, metrics, script

PAIRS = list(itertools.combinations(range(4), 2))  # six a prompt
KEYS = {"batch_size": 12, "shuffle": "false", "max_steps": 4, "eval_every": 2, "save_every": 2, "lr": 1e-3, "samples": 0,
        "micro_tokens": 300}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict:
    """Files of 8 prompts (val: 3) with four completions and six pairs: `rows` has a prompt a line, `apart` a pair a line."""
    folder, rng, out = tmp_path_factory.mktemp("rows"), random.Random(0), {}
    for split, n in (("train", 8), ("val", 3)):
        together, apart = [], []
        for problem, _ in problems(split, n):
            texts = [" " + " ".join([ending] * rng.randint(1, 3)) for ending in problem.endings]
            pairs = [rng.sample(pair, 2) for pair in PAIRS]
            together.append({"prompt": problem.context, "completions": texts, "pairs": pairs})
            apart += [{"prompt": problem.context, "chosen": texts[w], "rejected": texts[l]} for w, l in pairs]
        for name, records in (("rows", together), ("apart", apart)):
            out[name, split] = folder / f"{name}_{split}.jsonl"
            out[name, split].write_text("".join(json.dumps(record) + "\n" for record in records))
    return out


@pytest.fixture(scope="module")
def refs(rows, sft_run, tmp_path_factory) -> dict:
    """The reference files of both forms, under weights that are not the policy's."""
    folder = tmp_path_factory.mktemp("refs")
    model = weights.load(sft_run / "model")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.05)
    weights.save(model, get("toy"), folder / "model")
    for form in ("rows", "apart"):
        data = {"data": rows[form, "train"], "val_data": rows[form, "val"]}
        with contextlib.redirect_stdout(None):
            args = flags(init_from=folder / "model", **data, out=folder / f"{form}.safetensors")
            assert script("precompute_ref", *args) == 0
    return {form: folder / f"{form}.safetensors" for form in ("rows", "apart")}


@pytest.fixture
def dpo_args(rows, refs, sft_run, tmp_path):
    """dpo_args("rows", "name", key=value) -> the arguments of a run of one form in the folder `name`."""

    def arguments(form: str, name: str, **keys) -> list[str]:
        data = {"data": rows[form, "train"], "val_data": rows[form, "val"], "ref": refs[form], "allow_ref_mismatch": "true"}
        return flags(init_from=sft_run / "model", out_dir=tmp_path / name, **{**KEYS, **data, **keys})

    return arguments


def trained(folder) -> torch.Tensor:
    return torch.cat([t.flatten() for t in load_file(folder / "model/model.safetensors").values()])


def same_run(a, b, tolerance=1e-5) -> None:
    """Loss, rewards, log-probs and gradient norm of every step, and the parameters. Their tokens are not the same number."""
    one, two = ([{k: v for k, v in r.items() if k != "tokens"} for r in metrics(folder)] for folder in (a, b))
    close(one, two, tolerance)
    assert (trained(a) - trained(b)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "keys",
    [
        {"sft_weight": 0.5},
        {"loss": "aot", "sft_weight": 0.5},
        {"loss": "ipo", "beta": 0.3, "row_len": 200},
        pytest.param({"loss": "aot_unpaired"}, marks=pytest.mark.slow),
        pytest.param({"loss": "simpo", "micro_tokens": 1}, marks=pytest.mark.slow),
        pytest.param({"loss": "dpop", "sft_weight": 0.1}, marks=pytest.mark.slow),
        pytest.param({"lora_rank": 2, "lr": 1e-2, "ref": None, "allow_ref_mismatch": None}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows_train_as_the_same_pairs_apart(keys, dpo_args, call, tmp_path):
    """Two prompts of six pairs a step, in one forward or in several, against twelve separate pairs."""
    for form in ("rows", "apart"):
        assert call("dpo", *dpo_args(form, form, **keys))[0] == 0
    same_run(tmp_path / "rows", tmp_path / "apart")
    tokens = [sum(r.get("tokens", 0) for r in metrics(tmp_path / form)) for form in ("rows", "apart")]
    assert tokens[1] > 2.5 * tokens[0], "a prompt and its completions stand in the row once"
    assert abs(metrics(tmp_path / "rows")[-1]["rewards/margins"]) > 1e-3


def test_the_first_step_has_the_gradient_of_the_pairs_apart(dpo_args, call, tmp_path):
    """Plain gradient descent: what a step adds to the parameters is the gradient itself."""
    start = None
    for form in ("rows", "apart"):
        keys = {"optimizer": "sgd", "grad_clip": 0, "max_steps": 1, "sft_weight": 0.5, "schedule": "constant", "lr": 1.0}
        args = dpo_args(form, form, **keys)
        assert call("dpo", *args)[0] == 0
        start = start or args[args.index("--init_from") + 1]
    before = torch.cat([t.flatten() for t in load_file(f"{start}/model.safetensors").values()])
    one, two = (trained(tmp_path / form) - before for form in ("rows", "apart"))
    assert one.abs().max() > 0.01 and (one - two).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_two_processes_train_the_same(loss, dpo_args, world, tmp_path):
    for n in (1, 2):
        good(world(n, "dpo", dpo_args("rows", str(n), loss=loss, sft_weight=0.5, micro_tokens=100)))
    same_run(tmp_path / "1", tmp_path / "2")


def test_a_resumed_run_is_the_run_never_stopped(dpo_args, call, tmp_path):
    """To the bit; and a second epoch has the prompts in another order."""
    keys = {"shuffle": "true", "max_steps": 7, "save_every": 3, "keep": 9, "dropout": 0.1}
    args = dpo_args("rows", "run", **keys)
    assert call("dpo", *args)[0] == 0
    want, weights_then = metrics(tmp_path / "run"), trained(tmp_path / "run")
    checkpoint.drop_after(tmp_path / "run/checkpoints", 3)
    shutil.rmtree(tmp_path / "run/model")
    status, printed, err = call("dpo", *args)
    assert status == 0 and "at step 3 of 7" in printed, err
    assert metrics(tmp_path / "run") == want and torch.equal(trained(tmp_path / "run"), weights_then)


def test_the_reference_file_has_a_number_a_completion(rows, refs, dpo_args, refused, sft_run, call, tmp_path):
    together, apart = (load_file(refs[form]) for form in ("rows", "apart"))
    assert together["logps"].shape == (8, 4) and apart["logps"].shape == (48, 2)
    lines = [json.loads(line) for line in rows["rows", "val"].read_text().splitlines()]
    wanted = [
        [scores[i] for i in pair] for line, scores in zip(lines, together["val_logps"], strict=True) for pair in line["pairs"]
    ]
    torch.testing.assert_close(torch.tensor(wanted), apart["val_logps"], atol=1e-4, rtol=0)
    refused("dpo", *dpo_args("rows", "x", ref=refs["apart"]), says="made with another data")
    refused("dpo", *dpo_args("apart", "x", ref=refs["rows"]), says="made with another data")
    refused("dpo", *dpo_args("rows", "x", allow_ref_mismatch=None), says="holds the log-probs of other weights")
    lines[0]["pairs"][0].reverse()
    (tmp_path / "turned.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused("dpo", *dpo_args("rows", "x", val_data=tmp_path / "turned.jsonl"), says="made with another validation data")
    refused("dpo", *dpo_args("rows", "x", batch_size=5), says="key batch_size: 5 is less than the 6 pairs of example 0")
    assert not (tmp_path / "x/metrics.jsonl").exists()


def test_rewards_of_rows_are_those_of_the_pairs(rows, refs, sft_run, call, tmp_path):
    found = {}
    for form, source in itertools.product(("rows", "apart"), ("ref", "ref_model")):
        ref = refs[form] if source == "ref" else refs[form].parent / "model"
        out = {"out": tmp_path / f"{form}.json", "details": tmp_path / f"{form}.jsonl"}
        data = {"model": sft_run / "model", "data": rows[form, "val"], source: ref}
        assert call("eval_reward", *flags(**data, **out))[0] == 0
        found[form, source] = json.loads(out["out"].read_text())
        lines = [json.loads(line) for line in out["details"].read_text().splitlines()]
        assert len(lines) == 18 and [line["id"] for line in lines][6] == {"rows": 1, "apart": 6}[form]
        found[form, "margins"] = [line["margin"] for line in lines]
    for name in ("n", "accuracy", "margin", "gain_chosen", "gain_rejected"):
        values = [found[form, source][name] for form, source in itertools.product(("rows", "apart"), ("ref", "ref_model"))]
        assert values == pytest.approx([values[0]] * 4, abs=1e-5)
    assert found["rows", "margins"] == pytest.approx(found["apart", "margins"], abs=1e-5)
    assert found["rows", "ref"]["n"] == 18
    assert found["rows", "ref"]["margin_stderr"] != pytest.approx(found["apart", "ref"]["margin_stderr"], rel=1e-3), (
        "the pairs of a prompt are not independent"
    )
