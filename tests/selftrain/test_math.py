"""Recipe C: problems, final answers and their equality, maj@k and pass@k, pairs, and what is said of bad files."""

import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

import data
from base.errors import UserError
from data import math_problems, toy_math
from data.tokenizer import get
from selftrain import grading
from selftrain.eval_math import evaluate, interval, maj_at_k, pass_at_k, votes
from selftrain.samples import Sample
from tests.conftest import flags

SHARED = Path(__file__).parents[3] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared real data is not there")


def lines(path: Path, *records) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def records(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# --- problems -------------------------------------------------------------------------------------------------------


def test_toy_sums_are_right_and_splits_disjoint():
    made = {split: toy_math.problems(split, 1000) for split in ("train", "val", "test")}
    for text, solution, answer, level in made["train"]:
        assert eval(text) == int(answer) and 2 <= level <= 5 and len(text.replace("+", "-").split("-")) == level + 1
        *steps, last = solution.split("\n")
        assert last == f"####{answer}" and all(eval(s.replace("=", "==")) for line in steps for s in line.split(","))
    assert 250 < sum("\n" in solution for _, solution, _, _ in made["train"]) < 420, "one of three shows its steps"
    texts = [{p[0] for p in problems} for problems in made.values()]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert toy_math.problems("train", 30) == toy_math.problems("train", 1000)[:30]
    tokenizer = get("toy_math")
    for e in data.load("toy_math", "train", "sft", limit=50):
        assert tokenizer.decode(tokenizer.encode(e.prompt + e.completions[0])) == e.prompt + e.completions[0]
    with pytest.raises(UserError, match="toy_math has no pairs: sample answers"):
        data.load("toy_math", "train", "preference")


def test_published_forms(tmp_path):
    gsm8k = [{"question": f"Q{i}?", "answer": f"1 + {i} = <<1+{i}={i}>>\n#### 1,{i:03}"} for i in range(600)]
    lines(tmp_path / "train.jsonl", *gsm8k)
    train, val = (math_problems.problems("gsm8k", s, data_dir=str(tmp_path)) for s in ("train", "val"))
    assert (len(train), len(val)) == (100, 500) and train[5].answer == "1,005" and val[0].problem == "Q100?"
    assert data.load("gsm8k", "train", "sft", data_dir=str(tmp_path))[5].prompt == "Question: Q5?\nAnswer:"
    record = {"problem": "P?", "level": "Level 5", "type": "Algebra", "solution": r"so $x = \boxed{\frac{1}{2}}$."}
    for name, r in {"1": record, "2": record | {"problem": "R?"}}.items():
        (tmp_path / "MATH" / "test" / "algebra").mkdir(parents=True, exist_ok=True)
        (tmp_path / "MATH" / "test" / "algebra" / f"{name}.json").write_text(json.dumps(r))
    math500 = {"problem": "P?", "solution": r"\boxed{\frac12}", "answer": r"\frac{1}{2}", "level": 5, "subject": "Algebra"}
    lines(tmp_path / "test.jsonl", math500)
    (a, b), (c,) = (math_problems.problems("math", "test", data_dir=str(d)) for d in (tmp_path / "MATH", tmp_path))
    assert a.answer == c.answer == r"\frac{1}{2}" and b.problem == "R?"
    assert a.kind == c.kind == {"level": "5", "subject": "Algebra"}
    own = lines(tmp_path / "own.jsonl", {"problem": "2+2?", "answer": 4})
    assert math_problems.problems(own)[0].answer == "4" and math_problems.problems(own)[0].solution == ""


def test_prompts_with_suffix_and_few_shot(tmp_path, call, refused):
    out = tmp_path / "p.jsonl"
    args = ("--data", "toy_math", "--split", "test", "--limit", 20, "--out", out)
    assert call("problems", *args)[0] == 0
    plain = records(out)
    assert len(plain) == 20 and set(plain[0]) == {"prompt", "answer", "level", "completion"}
    assert call("problems", *args, "--few_shot", 2, "--suffix", " 1+1=2,\\n", "--level", 3)[0] == 0
    shown = records(out)
    head = shown[0]["prompt"].rpartition("Question:")[0]
    assert head.count("####") == 2 and all(
        r["prompt"].startswith(head) and r["prompt"].endswith("Answer: 1+1=2,\n") for r in shown
    )
    assert {r["level"] for r in shown} == {"3"} and "completion" not in shown[0]
    own = lines(tmp_path / "own.jsonl", *({"problem": f"{i}?", "answer": str(i), "solution": f"It is {i}."} for i in range(5)))
    assert call("problems", "--data", own, "--few_shot", 2, "--out", out)[0] == 0
    asked = {r["prompt"].rpartition("Question: ")[2] for r in records(out)}
    assert len(asked) == 3 and not any(a.partition("\n")[0] in records(out)[0]["prompt"].rpartition("Q")[0] for a in asked)
    refused("problems", "--data", own, "--few_shot", 9, "--out", out, says="only 5 problems have a solution")
    refused("problems", "--data", "gsm9k", "--out", out, says="neither one of gsm8k, math, toy_math nor a .jsonl")
    refused("problems", "--data", own, "--skip", 5, "--out", out, says="no problem is left")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"problem": "a"}, r":1: neither 'answer' nor 'solution'"),
        ({"answer": "1"}, r":1: the field 'problem' is missing"),
        ({"problem": "a", "solution": "no end"}, r":1: no answer: give 'answer', or a 'solution' that ends in"),
        ({"problem": "a", "answer": " "}, r":1: no answer"),
        ({"problem": " ", "answer": "1"}, r":1: the problem is empty"),
        ({"problem": "a", "answer": ["1"]}, r":1: the field 'answer' must be text"),
    ],
)
def test_bad_problems(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        math_problems.problems(lines(tmp_path / "x.jsonl", record))


# --- grading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"the set \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and the next was cut \boxed{8", "7"),
        ("2+2 = <<2+2=4>>4\n#### 1,234\nmore 5", "1,234"),
        ("She has 3.\nA: 18", "18"),
        ("Answer: $5.50\n", "$5.50"),
        ("first 12, then 3,456.50 dollars.", "3,456.50"),
        ("about -7", "-7"),
        ("5-3 is x2 or 1/2", "1/2"),
        ("up by 12.5%!", "12.5%"),
        ("**Answer: 18**", "18"),
        ("of v1.5", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert grading.extract(text) == answer


EQUAL = [
    ("0.5", ".5", "1/2", r"\frac12", r"\dfrac{1}{2}", r"$\tfrac{1}{2}$", "0.50", "x = 1/2", r"\(0.5\)"),
    (r"12\frac{3}{5}", "12 3/5", "12.6", "63/5", r"\frac{63}{5}"),
    ("1,000", "1000", "$1,000.00", "1000.", r"1{,}000", "1000 dollars"),
    (r"100\text{ square units}", "100", "100 square units"),
    (r"48^\circ", "48", r"48^{\circ}", "48 degrees", r"48\degree"),
    (r"198\%", "198%", "198"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", "-0.5", "−0.5"),
    (r"3\times10^5", "300000", r"3 \cdot 10^{5}"),
    (r"(3, \frac{1}{2})", "(3,0.5)", r"\left(3,\ .5\right)"),
    ("1, 2", "2, 1", r"\{2, 1\}", r"\{1,2\}"),
    (r"2\sqrt3", r"2\sqrt{3}", r"2 \sqrt{3}"),
    (r"\text{Monday}", "Monday", "monday"),
    ("10,000", r"10,\!000", r"10\,000", "10 000"),
    ("5 cm", r"5\text{ cm}", "5 cm^2", r"5\mathrm{~cm}"),
    (r"3\frac12", "3.5", "3 1/2", "3 1/2 cups", r"3 \frac{1}{2}"),
    (r"\text{(C)}", "C", r"\text{C}"),
    ("2516_8", "2516_{8}"),
    (r"5\text{ or }6", "6, 5"),
    ("x=4, y=2", "y = 2, x = 4"),
    ("4a-2", "4a - 2"),
]


@pytest.mark.parametrize("forms", EQUAL)
def test_equal_answers(forms):
    assert {grading.plain_equal(a, b) for a, b in itertools.product(forms, forms)} == {True}


def test_unequal_answers():
    firsts = [forms[0] for forms in EQUAL]
    assert not any(grading.plain_equal(a, b) for a, b in itertools.permutations(firsts, 2))
    for a, b in [
        ("4t", "4"),
        ("(1,2)", "(2,1)"),
        ("[1,2)", "(1,2)"),
        ("4:30", r"\text{4:30 p.m.}"),
        ("5", "-5"),
        ("1/3", "0.33"),
        ("5", "5 or 6"),
        ("3", "3 feet 4 inches"),
        ("5", "5 million"),
        ("2", "2 pi"),
        ("6 am", "6 pm"),
        ("7", r"7\text{ or more}"),
        ("3 ab", "3"),
        ("3-ab", "3-xy"),
        ("12", "1 2"),
        ("1, 234", "1234"),
        ("56", r"5\text{ or }6"),
        ("130", r"1\text{ hour }30\text{ minutes}"),
        ("15.5", r"3\frac12"),
        ("1/23", r"\frac{1}{2}3"),
        ("3", r"3\mathrm{i}"),
        ("1/3", r"\operatorname{arcsin}(1/3)"),
        ("x=5, y=3", "x=3, y=5"),
        (r"2 \cdot 3^n", "23^n"),
        (r"\Delta", r"\delta"),
    ]:
        assert not grading.plain_equal(a, b)
    assert grading.plain_equal(r"50\%", "0.5") and grading.plain_equal("0.5", "50%") and not grading.plain_equal("0.5", "50")
    for hostile in (
        "9" * 100_000,
        "1/0",
        r"\frac{1}{0}",
        "10^999999",
        "(" * 500,
        r"\boxed{" * 50,
        "3\\times10^{99999}",
        "%",
        "$",
        ",",
    ):
        assert not grading.plain_equal("1", hostile) and grading.normal(hostile) == grading.normal(hostile)


def test_math_verify_where_installed():
    pytest.importorskip("math_verify")
    _, equal = grading.equality("auto")
    assert equal(r"\sqrt{12}", r"2\sqrt{3}") and equal("(x+1)^2", "x^2+2x+1") and not equal("1", "2")
    assert not grading.plain_equal(r"\sqrt{12}", r"2\sqrt{3}"), "what plain cannot do"


def test_math_verify_missing(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    assert grading.equality("auto")[0] == "plain"
    path = lines(tmp_path / "s.jsonl", {"prompt": "p", "answer": "1", "completions": ["1"]})
    refused("eval_math", "--samples", path, "--grader", "math_verify", says="pip install math-verify")


# --- maj@k and pass@k -----------------------------------------------------------------------------------------------


def by_hand(right: int, wrong: tuple[int, ...], silent: int, k: int) -> tuple[Fraction, Fraction]:
    """maj@k and pass@k by looking at every draw."""
    answers = ["right"] * right + [str(j) for j, n in enumerate(wrong) for _ in range(n)] + [None] * silent
    maj = passed = total = Fraction(0)
    for draw in itertools.combinations(answers, k):
        counts = Counter(a for a in draw if a is not None)
        total += 1
        passed += "right" in draw
        if counts and counts["right"] == max(counts.values()):
            maj += Fraction(1, list(counts.values()).count(counts["right"]))
    return maj / total, passed / total


def test_majority_and_pass_against_every_draw():
    rng = random.Random(0)
    for _ in range(40):
        right, silent = rng.randint(0, 4), rng.randint(0, 2)
        wrong = tuple(sorted(rng.randint(1, 3) for _ in range(rng.randint(0, 3))))
        n = right + sum(wrong) + silent
        if not n:
            continue
        found = maj_at_k(right, wrong, silent)
        assert len(found) == n
        for k in range(1, n + 1):
            maj, passed = by_hand(right, wrong, silent, k)
            assert found[k - 1] == pytest.approx(float(maj), abs=1e-12)
            assert pass_at_k(n, right, k) == pytest.approx(float(passed), abs=1e-12)
    assert maj_at_k(40, (20, 20, 20), 28)[-1] == pytest.approx(1.0), "large counts keep their digits"
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert max(maj_at_k(60, (1, 1, 1, 1), 0)) == 1 == maj_at_k(63, (1,), 0)[-1], "never above 1, and 1 where it is"
    assert all(0 < share < 1 for share in maj_at_k(500, (300, 200), 0)[:20]), "no overflow"
    large = Sample("p", "1", [""] * 1001, {}, {}, "f:7", grades=[True] * 1001, pred=["1"] * 1001)
    with pytest.raises(UserError, match="f:7: 1,001 completions, at most 1,000"):
        evaluate([large])


def test_votes_join_equal_answers():
    s = Sample(
        "p", "0.5", ["a"] * 5, {}, {}, "f:1", grades=[True, True, False, False, False], pred=["1/2", ".5", "3", "3.0", None]
    )
    assert votes(s) == (2, (2,), 1)
    assert evaluate([s])["maj"] == 0.5 and evaluate([s], k=1)["maj"] == pytest.approx(0.4)


def test_interval_covers():
    """Of many experiments 95% hold the truth, whether a problem's samples say much (8 of them) or little (1)."""
    rng = random.Random(1)
    for n_samples in (1, 8):
        hits = 0
        for _ in range(400):
            chances = [rng.betavariate(0.7, 0.9) for _ in range(120)]
            values = [sum(rng.random() < c for _ in range(n_samples)) / n_samples for c in chances]
            low, high = interval(values, 120 * n_samples)
            hits += low <= 0.7 / 1.6 <= high
        assert 0.92 <= hits / 400 <= 0.98
    assert interval([1.0] * 10, 80)[0] == pytest.approx(10 / (10 + 1.959964**2)), "Wilson's where all are right"
    for noise in (1 - 2**-53, 1 + 2**-52):  # found with 64 samples a problem: a division by zero
        assert interval([1.0] * 9 + [noise], 640) == interval([1.0] * 10, 640)
    low, high = interval([0.5] * 10, 80)
    assert 0 < low < 0.5 < high < 1


@shared
@pytest.mark.parametrize(("name", "answers"), [("math_samples", 320), ("gsm8k_model_solutions", 4000)])
def test_real_grades(tmp_path, call, name, answers):
    """maj and pass follow from the stored grades; our own grades agree with at least 99% of them."""
    path, out, details = SHARED / f"{name}.jsonl.gz", tmp_path / "r.json", tmp_path / "d.jsonl"
    results = {}
    for grades in ("stored", "own"):
        status, said, _ = call(
            "eval_math", "--samples", path, "--grades", grades, "--grader", "plain", "--out", out, "--details", details
        )
        assert status == 0
        results[grades] = json.loads(out.read_text()), records(details), said
    result, graded, _ = results["stored"]
    assert result["samples"] == answers and result["grades"] == "stored"
    assert result["pass"] == sum(any(r["grades"]) for r in graded) / len(graded)
    assert result["pass_at_1"] == pytest.approx(sum(sum(r["grades"]) / len(r["grades"]) for r in graded) / len(graded))
    n = result["k"]
    expected = [
        float(by_hand(*votes(Sample("", "", r["completions"], {}, r, "", grades=r["grades"], pred=r["pred"])), n)[0])
        for r in graded
    ]
    assert result["maj"] == pytest.approx(sum(expected) / len(expected))
    own = [g for r in results["own"][1] for g in r["grades"]]
    same = sum(a == b for a, b in zip(own, [g for r in graded for g in r["grades"]], strict=True))
    assert same >= 0.99 * answers and f"agrees with the stored grades on {same:,} of {answers:,}" in results["own"][2]
    if name == "math_samples":
        assert result["by_level"]["5"]["n"] == 8 and set(result["by_level"]) == set("12345")


def test_results_files(tmp_path, call):
    many = [
        {"prompt": f"p{i}", "answer": "7", "subject": "S", "completions": ["A: 7"] * (i % 5) + ["A: 8!", "x"]} for i in range(9)
    ]
    path, out, details, plot = lines(tmp_path / "s.jsonl", *many), tmp_path / "r.json", tmp_path / "d.jsonl", tmp_path / "c.png"
    status, said, err = call(
        "eval_math", "--samples", path, "--out", out, "--details", details, "--plot", plot, "--marker", "!", "--k", "2"
    )
    assert status == 0, err
    result = json.loads(out.read_text())
    assert {"n", "k", "maj", "pass", "pass_at_1"} <= set(result) and result["n"] == 9 and result["k"] == 2
    assert [r["k"] for r in result["by_k"]] == [1, 2], "as far as every problem has samples"
    total = sum(len(m["completions"]) for m in many)
    assert result["marker"] == pytest.approx(9 / total) and result["no_answer"] == 9 and "subject" in said
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [r["grades"] for r in records(details)] == [[True] * (i % 5) + [False, False] for i in range(9)]
    again = call("eval_math", "--samples", details)[1]
    assert "grades: stored" in again


BAD = [
    ('{"prompt": "p", "completions": ["a"]}', "s.jsonl:2: neither 'grades' nor an 'answer'"),
    ('{"prompt": "p", "answer": "", "completions": ["a"]}', "s.jsonl:2: neither 'grades' nor an 'answer'"),
    ('{"prompt": "p", "answer": "1", "completions": []}', "s.jsonl:2: 'completions' is empty: a problem needs"),
    ('{"prompt": "p", "answer": "1"}', "s.jsonl:2: the field 'completions' is missing"),
    ('{"prompt": "p", "answer": "1", "completions": "a"}', "s.jsonl:2: the field 'completions' must be a list"),
    ('{"prompt": "p", "answer": "1", "completions": [3]}', "s.jsonl:2: 'completions' must be a list of texts"),
    ('{"answer": "1", "completions": ["a"]}', "s.jsonl:2: the field 'prompt' is missing"),
    ('{"prompt": "p", "answer": "1", "completions": ["a"], "grades": [true, false]}', "s.jsonl:2: 'grades' must be"),
    ('{"prompt": "p", "answer": "1", "completions": ["a"], "grades": [1]}', "s.jsonl:2: 'grades' must be"),
    ('{"prompt": "p", "answer": "1", "completions": ["a"], "grades": [true], "pred": [1]}', "s.jsonl:2: 'pred' must be"),
    ('{"question": "p", "ground_truth": "A: 1"}', 's.jsonl:2: no {"is_correct"'),
    ("{", "s.jsonl:2: not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_samples(tmp_path, refused, line, message):
    path = lines(tmp_path / "s.jsonl", {"prompt": "p", "answer": "1", "completions": ["1", "2"]}, line)
    refused("eval_math", "--samples", path, "--out", tmp_path / "r.json", says=message)
    refused("pairs", "--samples", path, "--out", tmp_path / "p.jsonl", says=message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.jsonl"]


def test_more_bad_input(tmp_path, refused):
    path = lines(tmp_path / "s.jsonl", *({"prompt": "p", "answer": "1", "completions": ["1"] * n} for n in (4, 2, 3)))
    refused("eval_math", "--samples", path, "--k", 3, says="s.jsonl:2: 2 completions, k is 3")
    refused("eval_math", "--samples", path, "--grades", "stored", says="s.jsonl:1: no 'grades' are stored there")
    refused("eval_math", "--samples", tmp_path / "none.jsonl", says="no such file")
    own = lines(tmp_path / "own.jsonl", {"prompt": "p", "answer": " ", "completions": ["1"], "grades": [True]})
    refused("eval_math", "--samples", own, "--grades", "own", says="own.jsonl:1: no 'answer' is there to grade by")
    refused("eval_math", "--samples", path, "--plot", tmp_path / "x.jpg", says="name it FILE.png")
    refused("eval_math", "--samples", path, "--program_seconds", 0, says="must be above 0")
    refused("pairs", "--samples", path, "--out", tmp_path / "p.jsonl", says="no problem has both a right and a wrong answer")
    refused(
        "pairs", "--samples", path, "--out", tmp_path / "p.jsonl", "--balanced", "true", says="key balanced: give max_pairs"
    )
    refused("pairs", "--samples", path, "--out", tmp_path, says="is a folder")


# --- pairs ----------------------------------------------------------------------------------------------------------


def graded(tmp_path, *problems) -> str:
    """Problems as lists of (text, grade)."""
    rows = [
        {
            "prompt": f"p{i}",
            "answer": "1",
            "completions": [t for t, _ in p],
            "grades": [g for _, g in p],
            "pred": ["1"] * len(p),
        }
        for i, p in enumerate(problems)
    ]
    return lines(tmp_path / "g.jsonl", *rows)


def test_pairs_by_hand(tmp_path, call):
    """Two right (one twice) and two wrong: two pairs of nearest length; all right and all wrong give none."""
    mixed = [(" aa", True), (" bbbb", True), (" aa", True), (" ccccc", False), (" d", False)]
    path = graded(tmp_path, mixed, [(" a", True)] * 3, [(" b", False)], [(" r", True), (" w", False)])
    out, report = tmp_path / "p.jsonl", tmp_path / "r.json"
    status, said, _ = call("pairs", "--samples", path, "--out", out, "--report", report)
    assert status == 0 and "2 give pairs; all answers right in 1, all wrong in 1" in said
    found = {(p["prompt"], p["chosen"], p["rejected"]) for p in records(out)}
    assert found == {("p0", " bbbb", " ccccc"), ("p0", " aa", " d"), ("p3", " r", " w")}
    counts = json.loads(report.read_text())
    assert [counts[n] for n in ("pairs", "problems", "all_right", "all_wrong", "repeated_texts", "fewest", "most")] == [
        3,
        4,
        1,
        1,
        3,
        1,
        2,
    ]
    call("pairs", "--samples", path, "--out", out, "--max_pairs", 4, "--balanced", "true", "--marker", " !", "--report", report)
    balanced = records(out)
    assert len(balanced) == 4 and {p["prompt"] for p in balanced} == {"p0"}, "the last problem has one pair only: left out"
    assert len({(p["chosen"], p["rejected"]) for p in balanced}) == 4 and all(p["chosen"].startswith(" ! ") for p in balanced)
    assert json.loads(report.read_text())["too_few"] == 1
    assert all(e.completions[0].startswith(" ! ") for e in data.load(str(out), "train", "preference"))


def test_pairs_of_empty_and_of_doubtful_texts(tmp_path, call, refused):
    """A model that writes nothing is all wrong, not all right; a text is never chosen over itself."""
    same = [(" a", True), (" a", False), (" b", False)]
    path, out = graded(tmp_path, [("", False)] * 3, same, [(" r", True), ("", False)], [(" r", True), (" w", False)]), "p.jsonl"
    status, said, _ = call("pairs", "--samples", path, "--out", tmp_path / out)
    assert status == 0 and "1 give pairs; all answers right in 0, all wrong in 1, too few texts in 2" in said
    assert [(p["problem"], p["chosen"], p["rejected"]) for p in records(tmp_path / out)] == [(3, " r", " w")]
    refused(
        "pairs", "--samples", graded(tmp_path, same), "--out", tmp_path / out, says="no problem has both a right and a wrong"
    )


def test_pairs_use_every_text_before_any_again_and_follow_the_seed(tmp_path, call):
    problem = [(f" r{'x' * i}", True) for i in range(6)] + [(f" w{'y' * 2 * i}", False) for i in range(5)]
    path, out = graded(tmp_path, *[problem] * 8), tmp_path / "p.jsonl"
    made = {}
    for partner, seed in itertools.product(("length", "random"), (0, 1)):
        assert call("pairs", "--samples", path, "--out", out, "--max_pairs", 10, "--partner", partner, "--seed", seed)[0] == 0
        made[partner, seed] = records(out)
        assert call("pairs", "--samples", path, "--out", out, "--max_pairs", 10, "--partner", partner, "--seed", seed)[0] == 0
        assert records(out) == made[partner, seed], "the same seed, the same file"
        for i in range(8):
            ours = [p for p in made[partner, seed] if p["problem"] == i]
            uses = [Counter(p[side] for p in ours) for side in ("chosen", "rejected")]
            assert len(ours) == 10 and len({(p["chosen"], p["rejected"]) for p in ours}) == 10
            assert len(uses[0]) == 6 and max(uses[0].values()) == 2 and set(uses[1].values()) == {2}
    assert made["random", 0] != made["random", 1]
    gap = {k: sum(abs(len(p["chosen"]) - len(p["rejected"])) for p in v) for k, v in made.items()}
    assert gap["length", 0] < gap["random", 0]
    call("pairs", "--samples", path, "--out", out, "--shuffle", "false")
    assert [p["problem"] for p in records(out)] == sorted(p["problem"] for p in records(out))
    assert [p["problem"] for p in made["length", 0]] != sorted(p["problem"] for p in made["length", 0])


@shared
def test_pairs_of_real_samples(tmp_path, call):
    out = tmp_path / "p.jsonl"
    for name, problems in (("gsm8k_model_solutions", 561), ("math_samples", 4)):
        assert call("pairs", "--samples", SHARED / f"{name}.jsonl.gz", "--out", out, "--max_pairs", 2)[0] == 0
        pairs = records(out)
        assert len({p["problem"] for p in pairs}) == problems
        answers = [s for _, s in data.jsonl.read(SHARED / f"{name}.jsonl.gz")]
        for p in pairs:
            r = answers[p["problem"]]
            right = (
                {" " + t: g for t, g in zip(r["response"], r["score"], strict=True)}
                if "score" in r
                else {" " + m["solution"]: m["is_correct"] for m in r.values() if isinstance(m, dict)}
            )
            assert right[p["chosen"]] is True and right[p["rejected"]] is False
            assert grading.plain_equal(r.get("answer") or grading.extract(r["ground_truth"]), grading.extract(p["chosen"]))


@shared
def test_lora_dpo_on_pairs_of_real_samples(tmp_path, call, spawn):
    """A random small GPT-2: killed after a checkpoint and gone on with it ends in the adapter of the unbroken run, which peft
    loads on transformers' GPT-2 with the logits of model/."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import torch
    from safetensors.torch import load_file

    import weights

    pairs, err = tmp_path / "pairs.jsonl", tmp_path / "err"
    samples = SHARED / "gsm8k_model_solutions.jsonl.gz"
    assert call("pairs", "--samples", samples, "--out", pairs, "--max_pairs", 1)[0] == 0
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 512}
    keys = {"init_from": "scratch", "tokenizer": "gpt2", **shape, "data": pairs, "limit": 6, "max_len": 512, "batch_size": 2}
    keys |= {"lora_rank": 4, "lr": 1e-3, "save_every": 1, "samples": 0}
    assert call("dpo", *flags(**keys, out_dir=tmp_path / "whole"))[0] == 0
    run = tmp_path / "run"
    process = spawn("dpo", flags(**keys, out_dir=run), err)
    until = time.monotonic() + 60
    while not (run / "checkpoints/step_1").exists() and process.is_alive() and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (run / "checkpoints/step_1").exists() and not (run / "adapter").exists(), err.read_text()
    status, said, _ = call("dpo", *flags(**keys, out_dir=run))
    assert status == 0 and f"resuming {run} at step" in said
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        resumed, unbroken = (load_file(folder / name) for folder in (run, tmp_path / "whole"))
        assert resumed.keys() == unbroken.keys() and all(torch.equal(resumed[n], unbroken[n]) for n in resumed)
    weights.save(weights.load("scratch", seed=0, vocab_size=get("gpt2").size, **shape), get("gpt2"), tmp_path / "base")
    tokens = torch.arange(1000, 1040).view(2, 20)
    base, ours = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tmp_path / "base", run / "model")
    )
    with torch.no_grad():
        before, want = base(tokens).logits, ours(tokens).logits
        got = peft.PeftModel.from_pretrained(base, run / "adapter").eval()(tokens).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert (got - before).abs().max() > 1e-4, "the adapter does something"
