"""How good are a model's answers? A judge, another model behind an HTTP server, compares or grades them.

    python eval_winrate.py --responses runs/hh_dpo.jsonl --mode pairwise --against chosen \\
        --judge openai --judge_model gpt-4o-mini --out runs/hh_dpo_winrate.json --limit 250 --trials 3
    python eval_winrate.py --responses runs/alpaca.jsonl --mode score --against output \\
        --judge http://127.0.0.1:8000/v1 --judge_model llama3 --out runs/alpaca_score.json
    python eval_winrate.py --calibrate pairs.jsonl --judge local --judge_model HuggingFaceTB/SmolLM2-135M-Instruct \\
        --out agreement.json

pairwise asks which of two texts is better, the model's or another one. score asks for 0 to 100 points, given a reference
answer. `--judge local` needs no server: judge/local.py. `--calibrate` measures how often a judge agrees with known preferences.
docs/judging.md says what the figures mean. `python -m report.plot RESULT.json …` draws them.
eval_reward.py needs no judge: it compares the model with its reference.
"""

from base.script import run

import contextlib
import json
import os
import random
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import adapters
import weights
from base.errors import UserError, warn
from base.files import write_whole
from judge.cache import open_cache
from judge.client import Decision, Judge, JudgeKeys, Question
from judge.figures import Judgement, grade_pairwise, grade_score, say
from judge.items import Item, known_pairs, read_items
from judge.local import LocalJudge
from judge.verdict import fill, read_template, score, side
from report.formats import markdown
from report.tables import cut
from runtime import config, distributed
from runtime.config import REQUIRED, key
from runtime.keys import MOST_SEED, ChatKeys, DeviceKeys

PROMPTS = Path(__file__).parent / "judge" / "prompts"
PLACEHOLDERS = {"pairwise": ("prompt", "response_a", "response_b"), "score": ("prompt", "reference", "response")}


@dataclass
class Config(JudgeKeys, ChatKeys, DeviceKeys):
    """Win rate or score of a model's answers, by a judge."""

    responses: str = key("", "JSONL file of sample.py: {'prompt', 'completions', …}")
    calibrate: str = key("", "instead: preference data; how often does the judge prefer the chosen text?")
    mode: str = key("pairwise", "compare two texts, or grade one (without a judge: eval_reward.py)", ["pairwise", "score"])
    against: str = key("", "field of those lines, or a JSONL file; empty = the field chosen, completion or output")
    out: str = key(REQUIRED, "JSON file for the result", writes="")
    details: str = key("", "JSONL file for a line a judgement", writes="")
    table: str = key("", "Markdown file for a table of examples", writes="")
    table_rows: int = key(10, "examples in the table", least=1)
    cache: str = key("", "JSONL file of the judge's answers, empty = beside `out`, as NAME.cache.jsonl", writes="")
    label: str = key("", "name of the run in tables and pictures (SFT, DPO, …)")
    model: str = key("", "the model that wrote the responses, a folder or gpt2 …: its size is noted", model=True)
    parameters: int = key(0, "its number of parameters, where `model` cannot tell", least=0)
    limit: int = key(0, "use only the first so many prompts, 0 = all", least=0)
    seed: int = key(0, "seed of who is side A, and of which examples the table shows", least=0, most=MOST_SEED)
    trials: int = key(1, "times that every prompt is judged; trial t takes the t-th completion, or the only one", least=1)
    both_orders: bool = key(False, "pairwise: ask with both as side A; a disagreement is a tie")
    judge_prompt: str = key("", "text file of the judge's prompt, empty = judge/prompts/judge_MODE.txt")

    @property
    def tokenizer(self) -> str:
        """The judge's, with judge local."""
        return "auto"

    def check(self) -> None:
        if bool(self.responses) == bool(self.calibrate):
            raise UserError("key responses: give either --responses, a model's answers, or --calibrate, preference data")
        if self.calibrate and self.mode != "pairwise":
            raise UserError("key calibrate: preferences are pairs: leave out --mode score")
        if self.judge == "local":
            if os.environ.get("WORLD_SIZE", "1") != "1":
                raise UserError("key judge: local runs in one process: start it without torchrun")
            self.both_orders = self.mode == "pairwise"
        if self.both_orders and self.mode != "pairwise":
            raise UserError(f"key both_orders: there are no two orders in mode {self.mode}")
        self.cache = self.cache or str(Path(self.out).with_suffix(".cache.jsonl"))


# --- judging --------------------------------------------------------------------------------------------------------


def sides_of(cfg: Config, trial: int, number: int) -> str:
    """Where the response stands in each question: "A" or "B", drawn at random for every prompt and trial, or "AB"."""
    return "AB" if cfg.both_orders else random.Random(f"{cfg.seed} {trial} {number}").choice("AB")


def question(template: str, item: Item, trial: int, where: str) -> Question:
    """What the judge is asked about one text; `where`: the response is side "A" or "B", or "" for a score."""
    ours, other = item.texts[trial], item.others[trial]
    a, b = (ours, other) if where == "A" else (other, ours)
    texts = {"response_a": a, "response_b": b} if where else {"reference": other, "response": ours}
    return Question(fill(template, prompt=item.prompt, **texts), f"trial {trial}")


def outcome_of(verdicts: list, sides: str) -> str | float | None:
    """One judgement's verdicts, seen from the response. Two that differ are a tie; None if one is missing."""
    if None in verdicts or not sides:
        return verdicts[0] if None not in verdicts else None
    seen = {v if v == "tie" else "win" if v == where else "loss" for v, where in zip(verdicts, sides, strict=True)}
    return seen.pop() if len(seen) == 1 else "tie"


def share_of(decisions: tuple[Decision, ...], sides: str) -> float | None:
    """The probability that a judge gives to the response, the mean over both orders; None where it gives none."""
    if not sides or any(d.share is None for d in decisions):
        return None
    return statistics.fmean(d.share if where == "A" else 1 - d.share for d, where in zip(decisions, sides, strict=True))


def judge_all(judge: Judge | LocalJudge, items: list[Item], template: str, cfg: Config) -> list[Judgement]:
    """A judgement of every item in every trial; none in a dry run."""
    pairwise = cfg.mode == "pairwise"
    sides = {(t, n): sides_of(cfg, t, n) if pairwise else "" for t in range(cfg.trials) for n in range(len(items))}
    asked = [question(template, items[n], t, where) for (t, n), stood in sides.items() for where in stood or [""]]
    decided = iter(judge.decide(asked, side if pairwise else score))
    judgements = []
    for (trial, number), stood in ({} if cfg.dry_run else sides).items():
        decisions = tuple(next(decided) for _ in stood or [""])
        outcome = outcome_of([d.verdict for d in decisions], stood)
        lengths = (len(items[number].texts[trial]), len(items[number].others[trial]))
        judgements.append(Judgement(number, trial, outcome, stood, lengths, decisions, share_of(decisions, stood)))
    return judgements


# --- files ----------------------------------------------------------------------------------------------------------


def examples_table(judgements: list[Judgement], items: list[Item], rows: int, seed: int) -> str:
    """Markdown: prompts drawn at random from the first trial, both texts and the outcome. Long texts are cut."""
    first = [j for j in judgements if j.trial == 0]
    table = [["prompt", "response", "compared with", "outcome", "number"]]
    for j in sorted(random.Random(seed).sample(first, min(rows, len(first))), key=lambda j: j.number):
        item, outcome = items[j.number], "failed" if j.outcome is None else j.outcome
        outcome = str(outcome).removesuffix(".0")
        table.append([item.prompt.strip(), item.texts[0], item.others[0], outcome, str(j.number)])
    return markdown(cut(table))


def detail(j: Judgement, source: str) -> dict:
    """A judgement as a line of `details`."""
    return {
        "id": j.number,
        "trial": j.trial,
        "source": source,
        "outcome": j.outcome,
        **({"side": list(j.sides)} if j.sides else {}),
        "verdicts": [d.verdict for d in j.decisions],
        **({} if j.share is None else {"share": j.share}),
        "replies": [[r.text for r in d.replies] for d in j.decisions],
        "failed": [d.failed for d in j.decisions if d.failed],
        "characters": j.lengths,
    }


def parameters_of(model: str) -> int:
    """Parameters of the model of that name or folder, without an output projection of its own. No weights are read."""
    shape = replace(adapters.source(model, merge=False).config, tied=True)
    return sum(p.numel() for p in weights.empty(shape).parameters())


def main() -> None:
    cfg = config.load(Config, prog="eval_winrate.py")
    asks = "local" if (cfg.judge, cfg.mode) == ("local", "pairwise") else "judge"
    template = read_template(cfg.judge_prompt or PROMPTS / f"{asks}_{cfg.mode}.txt", PLACEHOLDERS[cfg.mode])
    if cfg.calibrate:
        items = known_pairs(cfg.calibrate, cfg.limit, cfg.trials)
    else:
        items = read_items(cfg.responses, cfg.against, cfg.trials, cfg.limit)
    size = cfg.parameters or (parameters_of(cfg.model) if cfg.model else None)
    local = cfg.judge == "local"
    with contextlib.nullcontext() if local else open_cache(cfg.cache) as cache:
        judge = LocalJudge(cfg, distributed.setup(cfg.device, cfg.dtype)) if local else Judge(cfg, cache)
        judgements = judge_all(judge, items, template, cfg)
    if cfg.dry_run:
        return
    settings = ("mode", "label", "model", "responses", "calibrate", "against", "judge_model", "seed", "both_orders")
    settings += () if local else ("temperature",)
    result = {
        **(grade_pairwise if cfg.mode == "pairwise" else grade_score)(judgements),
        "usage": judge.usage(d for j in judgements for d in j.decisions),
        "parameters": size,
        "judge": judge.url,
        "judge_prompt": template,
        **{name: getattr(cfg, name) for name in settings},
    }
    if cfg.details:
        lines = (json.dumps(detail(j, items[j.number].source)) + "\n" for j in judgements)
        write_whole(cfg.details, "".join(lines))
    if cfg.table:
        write_whole(cfg.table, examples_table(judgements, items, cfg.table_rows, cfg.seed).encode(errors="replace"))
    write_whole(cfg.out, json.dumps(result, indent=1) + "\n")
    if result["failed"]:
        unanswered = sum(any(d.failed.startswith("no answer") for d in j.decisions) for j in judgements)
        again = f", {unanswered} of them without an answer: the same command asks those again" if unanswered else ""
        warn(f"{result['failed']} of {result['n']} judgements failed and count for neither side{again}; --details says why")
    if result["ci95"] is None:
        raise UserError(f"key judge: {say(result)}: look into --details, and start again")
    print(f"{say(result)}; asked now: {judge.calls:,} calls")
    print(json.dumps({name: value for name, value in result.items() if name != "judge_prompt"}))


if __name__ == "__main__":
    run(main, alone=True)
