"""`make demo` on a smaller scale: what its picture claims holds, and does not when the reference or the loss is spoiled."""

import contextlib
import json
import math
import operator
import shutil
import sys
from pathlib import Path

import pytest
import torch

import demo
import dpo
import losses
import sft
from runtime import config
from tests.conftest import flags, script
from tests.data.test_recipe_page import command

SMALL = {"sft_steps": 200, "dpo_steps": 100, "prompts": 1200, "n": 48}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(folder, what was printed, results) of a demo with one beta and one curve over steps."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(open(out.with_name("said"), "w")) as said:
        patch.setattr(demo, "BETAS", (1,))
        patch.setattr(demo, "CURVES", demo.CURVES[:1])
        patch.setattr(torch, "set_num_threads", lambda n: None)  # it would hold for all later tests
        assert script("demo", *flags(**SMALL, out_dir=out)) == 0
        said.flush()
    return out, out.with_name("said").read_text(), json.loads((out / "results.json").read_text())


def holds(results: dict) -> bool:
    found = demo.findings(results)
    return found["gap"] < 0.05 and found["lead"] > 0.1 and found["far"] > 5


@pytest.mark.slow
def test_what_the_picture_claims(small):
    out, said, results = small
    assert holds(results), demo.findings(results)
    assert [p["name"] for p in results["policies"]] == ["SFT", "SFT on chosen", "best of 4", "DPO", "DPO, wrong reference"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    best = next(p for p in results["policies"] if p["name"] == "best of 4")
    assert best["kl"] <= math.log(4) - 3 / 4
    assert -0.005 < demo.limit_at(best["kl"], results["limit"]) - best["reward"] < 0.05
    for line in said.splitlines():
        if line.startswith("$ "):
            module, words = command(line)
            paths = [] if module == "report.page" else None
            config.load(__import__(module, fromlist=["Config"]).Config, words, paths=paths)
    assert said.count("\n$ ") == 6 + 3 + 4 + 3 * 2 + 1  # to prepare, to train, to measure, the curve, the page


@pytest.mark.slow
@pytest.mark.parametrize("spoiled", ["sign", "reference"])
def test_the_claims_fail_when_dpo_is_spoiled(spoiled, small, monkeypatch):
    out, _, results = small
    if spoiled == "sign":
        loss = losses.LOSSES["sigmoid"]
        swap = operator.itemgetter(1, 0, 3, 2, 5, 4)  # chosen and rejected
        monkeypatch.setitem(losses.LOSSES, "sigmoid", lambda p, cfg: loss(losses.Pairs(*swap(p)), cfg))
    else:
        as_pairs = dpo.as_pairs
        monkeypatch.setattr(dpo, "as_pairs", lambda sums, ref, *of: as_pairs(sums, 0 * ref, *of))
        monkeypatch.setattr(dpo, "check_first_batch", lambda *_: None)
    shutil.rmtree(out / "dpo" / f"beta_1.0_steps_{SMALL['dpo_steps']}", ignore_errors=True)
    run = demo.Demo(demo.Config(**SMALL, out_dir=str(out)))
    folder = run.dpo(demo.DPO, 1.0, SMALL["dpo_steps"])
    worse = demo.policy(demo.DPO, 1, run.measure(folder))
    kept = [p for p in results["policies"] if p["name"] != demo.DPO]
    assert not holds({**results, "policies": [*kept, worse]})


def test_the_commands_are_right_wherever_the_user_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "main", lambda: None)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.chdir(tmp_path)
    demo.Demo(demo.Config(out_dir="out")).chosen()
    files = [word for word in capsys.readouterr().out.split() if word.endswith((".py", ".toml"))]
    assert len(files) == 2 and all(Path(file).is_file() for file in files), files


def test_no_point_of_the_limit_that_rests_on_few_samples():
    limit = [{"kl": k / 10, "reward": k / 10, "ess": 100 / (k + 1)} for k in range(10)]
    assert [p["kl"] for p in demo.drawn(limit)] == [0, 0.1, 0.2, 0.3, 0.4]
    assert demo.limit_at(0.25, limit) == pytest.approx(0.25) and demo.limit_at(0.45, limit) is None
