"""Recipe C: problems, final answers and their equality, maj@k and pass@k, pairs, and what is said of bad files."""

import itertools
import json
import random
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

import data
from base.errors import UserError
from data import math_problems, toy_math
from data.jsonl import read
from data.math_problems import extract
from data.tokenizer import get
from runtime import config
from selftrain import eval_math, grading, pairs
from selftrain.eval_math import evaluate, interval, maj_at_k, pass_at_k, votes
from selftrain.samples import Sample, load_graded
from tests.conftest import SHARED
from tests.selftrain import published

REAL = SHARED / "data"


def lines(path: Path, *records) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return str(path)


def records(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def real(name: str) -> Path:
    path = REAL / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no {path}")
    return path


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
    (tmp_path / "MATH" / "test" / "algebra").mkdir(parents=True)
    for name, r in {"1": record, "2": record | {"problem": "R?"}}.items():
        (tmp_path / "MATH" / "test" / "algebra" / f"{name}.json").write_text(json.dumps(r))
    math500 = {"problem": "P?", "solution": r"\boxed{\frac12}", "answer": r"\frac{1}{2}", "level": 5, "subject": "Algebra"}
    lines(tmp_path / "test.jsonl", math500)
    (a, b), (c,) = (math_problems.problems("math", "test", data_dir=str(d)) for d in (tmp_path / "MATH", tmp_path))
    assert a.answer == c.answer == r"\frac{1}{2}" and b.problem == "R?"
    assert a.kind == c.kind == {"level": "5", "subject": "Algebra"}
    own = lines(tmp_path / "own.jsonl", {"problem": "2+2?", "answer": 4})
    assert math_problems.problems(own)[0].answer == "4" and math_problems.problems(own)[0].solution == ""
    with pytest.raises(UserError, match=r"none of math_train.jsonl, train.jsonl is there"):
        math_problems.problems("math", "train", data_dir=str(tmp_path / "MATH"))


def test_prompts(tmp_path, call, refused):
    """A suffix, solved examples, a level; and a range that goes on with the first problem after the last."""
    out = tmp_path / "p.jsonl"
    args = ("selftrain.problems", "--out", out, "--data")
    assert call(*args, "toy_math", "--split", "test", "--limit", 20)[0] == 0
    assert len(records(out)) == 20 and set(records(out)[0]) == {"prompt", "answer", "level", "completion"}
    more = ("--few_shot", 2, "--suffix", " 1+1=2,\\n", "--level", 3, "--limit", 20)
    assert call(*args, "toy_math", "--split", "test", *more)[0] == 0
    shown = records(out)
    head = shown[0]["prompt"].rpartition("Question:")[0]
    assert head.count("####") == 2 and all(r["prompt"].startswith(head) for r in shown)
    assert all(r["prompt"].endswith("Answer: 1+1=2,\n") for r in shown)
    assert {r["level"] for r in shown} == {"3"} and "completion" not in shown[0]
    own = lines(tmp_path / "own.jsonl", *({"problem": f"{i}?", "answer": str(i), "solution": f"It is {i}."} for i in range(5)))
    assert call(*args, own, "--few_shot", 2)[0] == 0
    asked = {r["prompt"].rpartition("Question: ")[2].partition("\n")[0] for r in records(out)}
    assert len(asked) == 3 and not any(a in records(out)[0]["prompt"].rpartition("Question:")[0] for a in asked)
    for skip, wrap, answers in ((3, "false", "34"), (3, "true", "340"), (8, "true", "340")):
        assert call(*args, own, "--skip", skip, "--limit", 3, "--wrap", wrap)[0] == 0
        assert "".join(r["answer"] for r in records(out)) == answers
    refused(*args, own, "--few_shot", 9, says="only 5 problems have a solution")
    refused(*args, "gsm9k", says="neither one of gsm8k, math, toy_math nor a .jsonl")
    refused(*args, own, "--skip", 5, says="no problem is left")


def test_bad_problems(tmp_path):
    for record, message in (
        ({"problem": "a"}, r":1: no answer: give 'answer', or a 'solution' that ends in"),
        ({"problem": "a", "solution": "no end"}, r":1: no answer"),
        ({"problem": "a", "answer": " "}, r":1: no answer"),
        ({"answer": "1"}, r":1: the field 'problem' is missing"),
        ({"problem": " ", "answer": "1"}, r":1: the problem is empty"),
        ({"problem": "a", "answer": ["1"]}, r":1: the field 'answer' must be text"),
    ):
        with pytest.raises(UserError, match=message):
            math_problems.problems(lines(tmp_path / "x.jsonl", record))


# --- grading --------------------------------------------------------------------------------------------------------


def test_final_answer():
    for text, answer in (
        (r"so \boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7} and the next was cut \boxed{8", "7"),
        ("2+2 = <<2+2=4>>4\n#### 1,234\nmore 5", "1,234"),
        ("She has 3.\nA: 18", "18"),
        ("Answer: $5.50\n", "$5.50"),
        ("**Answer: 18**", "18"),
        ("first 12, then 3,456.50 dollars.", "3,456.50"),
        ("about -7", "-7"),
        ("5-3 is x2 or 1/2", "1/2"),
        ("up by 12.5%!", "12.5%"),
        ("of v1.5", None),
        ("", None),
    ):
        assert extract(text) == answer, text


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
# each begins with what it must not equal
UNEQUAL = [
    ("5", "-5", "5 or 6", "5 million", "5, 5", "5x", "50"),
    ("3", "3 feet 4 inches", "3 ab", r"3\mathrm{i}", "3-xy", "1, 3"),
    ("1/3", "0.33", r"\operatorname{arcsin}(1/3)"),
    ("1/23", r"\frac{1}{2}3", r"\frac{1}{2},3"),
    ("1/2000", r"\frac{1}{2},000", r"\frac12 000"),
    ("12", "1 2", "1, 2"),
    ("56", r"5\text{ or }6", "5, 6"),
    ("130", r"1\text{ hour }30\text{ minutes}"),
    ("15.5", r"3\frac12"),
    ("23^n", r"2 \cdot 3^n"),
    ("7", r"7\text{ or more}", "7 to 8"),
    ("2", "2 pi", "2t"),
    ("(1,2)", "(2,1)", "[1,2)", "1, 2"),
    ("x=5, y=3", "x=3, y=5"),
    ("6 am", "6 pm"),
    ("4:30", r"\text{4:30 p.m.}"),
    (r"\Delta", r"\delta"),
]
HOSTILE = ("9" * 100_000, "1/0", r"\frac{1}{0}", "10^999999", "3\\times10^{99999}", "(" * 500, r"\boxed{" * 50, "%", "$", ",")


def test_equal_and_unequal_answers():
    for forms in EQUAL:
        for a, b in itertools.product(forms, forms):
            assert grading.plain_equal(a, b), (a, b)
    for a, b in [*itertools.permutations([f[0] for f in EQUAL], 2), *((a, b) for a, *rest in UNEQUAL for b in rest)]:
        assert not grading.plain_equal(a, b), (a, b)
    assert grading.plain_equal(r"50\%", "0.5") and grading.plain_equal("0.5", "50%") and not grading.plain_equal("0.5", "50")
    for text in HOSTILE:
        assert not grading.plain_equal("1", text) and grading.normal(text) == grading.normal(text)


def test_math_verify_where_installed():
    pytest.importorskip("math_verify")
    _, equal = grading.equality("auto")
    assert equal(r"\sqrt{12}", r"2\sqrt{3}") and equal("(x+1)^2", "x^2+2x+1") and not equal("1", "2")
    assert not grading.plain_equal(r"\sqrt{12}", r"2\sqrt{3}"), "what plain cannot do"


def test_math_verify_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert grading.equality("auto")[0] == "plain"
    with pytest.raises(UserError, match="pip install math-verify"):
        grading.equality("math_verify")


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


def test_votes_join_equal_answers():
    answers, grades = ["1/2", ".5", "3", "3.0", None], [True, True, False, False, False]
    s = Sample("p", "0.5", ["a"] * 5, {}, {}, "f:1", grades=grades, pred=answers)
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
    for noise in (1 - 2**-53, 1 + 2**-52):  # with 64 samples a problem this was once a division by zero
        assert interval([1.0] * 9 + [noise], 640) == interval([1.0] * 10, 640)
    low, high = interval([0.5] * 10, 80)
    assert 0 < low < 0.5 < high < 1


@pytest.mark.parametrize(
    ("name", "answers", "maj", "mixed"), [("math_samples", 320, 0.950, 4), ("gsm8k_model_solutions", 4000, 0.486, 561)]
)
def test_real_grades(tmp_path, call, name, answers, maj, mixed):
    """Our own grades agree with every published one."""
    path, out, details = tmp_path / "s.jsonl", tmp_path / "r.json", tmp_path / "d.jsonl"
    published.main(real(name), path)
    args = ("selftrain.eval_math", "--samples", path, "--grader", "plain", "--out", out, "--details", details)
    assert call(*args)[0] == 0
    result, graded = json.loads(out.read_text()), records(details)
    for (_, r), found in zip(read(real(name)), graded, strict=True):
        theirs = {m["solution"]: m["is_correct"] for m in r.values() if isinstance(m, dict)}
        theirs |= dict(zip(r.get("response", []), r.get("score", []), strict=True))
        assert {c[1:]: g for c, g in zip(found["completions"], found["grades"], strict=True)} == theirs
    assert result["samples"] == answers and result["grades"] == "stored" and result["maj"] == pytest.approx(maj, abs=5e-4)
    assert result["pass"] == sum(any(r["grades"]) for r in graded) / len(graded)
    assert result["pass_at_1"] == pytest.approx(sum(sum(r["grades"]) / len(r["grades"]) for r in graded) / len(graded))
    if name == "math_samples":
        assert result["by_level"]["5"]["n"] == 8 and set(result["by_level"]) == set("12345")
    said = call(*args, "--grades", "own")[1]
    assert f"plain agrees with the stored grades on {answers:,} of {answers:,}" in said
    assert [r["grades"] for r in records(details)] == [r["grades"] for r in graded]
    assert call("selftrain.pairs", "--samples", path, "--out", out, "--max_pairs", 2)[0] == 0
    assert len({p["problem"] for p in records(out)}) == mixed


def test_results_files(tmp_path, call):
    many = [
        {"prompt": f"p{i}", "answer": "7", "level": "a|b", "completions": ["A: 7"] * (i % 5) + ["A: 8!", "x"]} for i in range(9)
    ]
    path, out, details, plot = lines(tmp_path / "s.jsonl", *many), tmp_path / "r.json", tmp_path / "d.jsonl", tmp_path / "c.png"
    more = ("--out", out, "--details", details, "--plot", plot, "--marker", "!", "--k", "2")
    status, said, err = call("selftrain.eval_math", "--samples", path, *more)
    assert status == 0, err
    result = json.loads(out.read_text())
    assert {"n", "k", "maj", "pass", "pass_at_1"} <= set(result) and result["n"] == 9 and result["k"] == 2
    assert [r["k"] for r in result["by_k"]] == [1, 2], "as far as every problem has samples"
    total = sum(len(m["completions"]) for m in many)
    assert result["marker"] == pytest.approx(9 / total) and result["no_answer"] == 9 and "level" in said
    assert f"| 2 | {result['maj']:.3f} ({result['maj_ci95'][0]:.3f} to {result['maj_ci95'][1]:.3f}) |" in said
    assert "| a&#124;b |" in said, "a name from the data does not end its cell"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [r["grades"] for r in records(details)] == [[True] * (i % 5) + [False, False] for i in range(9)]
    again = call("selftrain.eval_math", "--samples", details)[1]
    assert "grades: stored" in again


def test_disagreements_are_listed(tmp_path, call):
    path = lines(tmp_path / "s.jsonl", {"prompt": "p", "answer": "7", "completions": ["A: 7", "A: 8"], "grades": [True, True]})
    said = call("selftrain.eval_math", "--samples", path, "--grades", "own", "--grader", "plain")[1]
    assert "plain agrees with the stored grades on 1 of 2 answers" in said
    assert "s.jsonl:1, completion 1: answer '7', given '8': stored True, plain False" in said


BAD = [
    ('{"prompt": "p", "completions": ["a"]}', "neither 'grades' nor an 'answer'"),
    ('{"prompt": "p", "answer": "1", "completions": []}', "'completions' must be a list of texts, at least one"),
    ('{"prompt": "p", "answer": "1", "completions": [3]}', "'completions' must be a list of texts"),
    ('{"prompt": "p", "answer": "1"}', "the field 'completions' is missing"),
    ('{"answer": "1", "completions": ["a"]}', "the field 'prompt' is missing"),
    ('{"prompt": "p", "answer": "1", "completions": ["a"], "grades": [true, false]}', "'grades' must be a list of true or"),
    (
        '{"prompt": "p", "answer": "1", "completions": ["a"], "grades": [1]}',
        "'grades' must be a list of true or false, one for",
    ),
    ('{"prompt": "p", "answer": "1", "completions": ["a"], "grades": [true], "pred": [1]}', "'pred' must be a list"),
    ("{", "not JSON"),
]


def test_bad_samples(tmp_path, refused):
    path = tmp_path / "s.jsonl"
    for line, message in BAD:
        lines(path, {"prompt": "p", "answer": "1", "completions": ["1", "2"]}, line)
        with pytest.raises(UserError) as error:
            load_graded(config.load(eval_math.Config, [f"--samples={path}"]))
        assert f"s.jsonl:2: {message}" in str(error.value)
    refused("selftrain.eval_math", "--samples", path, "--out", tmp_path / "r.json", says="s.jsonl:2: not JSON")
    refused("selftrain.pairs", "--samples", path, "--out", tmp_path / "p.jsonl", says="s.jsonl:2: not JSON")
    assert [p.name for p in tmp_path.iterdir()] == ["s.jsonl"]


def test_more_bad_input(tmp_path, refused):
    path = lines(tmp_path / "s.jsonl", *({"prompt": "p", "answer": "1", "completions": ["1"] * n} for n in (4, 2, 3)))
    own = lines(tmp_path / "own.jsonl", {"prompt": "p", "answer": " ", "completions": ["1"], "grades": [True]})
    large = lines(tmp_path / "large.jsonl", {"prompt": "p", "answer": "1", "completions": ["1"] * 1001})
    for more, says in (
        (("--samples", path, "--k", 3), "s.jsonl:2: 2 completions, k is 3"),
        (("--samples", path, "--grades", "stored"), "s.jsonl:1: no 'grades' are stored there"),
        (("--samples", own, "--grades", "own"), "own.jsonl:1: no 'answer' is there to grade by"),
        (("--samples", large), "large.jsonl:1: 1,001 completions, at most 1,000"),
    ):
        refused("selftrain.eval_math", *more, says=says)
    args = ("selftrain.pairs", "--samples", path, "--out", tmp_path / "p.jsonl")
    refused(*args, says="no problem has enough right and wrong answers")
    refused(*args, "--balanced", "true", says="key balanced: give max_pairs")


# --- pairs ----------------------------------------------------------------------------------------------------------


def graded(tmp_path, *problems) -> str:
    """A file of problems, each a list of (text, grade)."""
    texts, grades = ([[answer[i] for answer in p] for p in problems] for i in (0, 1))
    rows = zip(texts, grades, strict=True)
    return lines(tmp_path / "g.jsonl", *({"prompt": f"p{i}", "completions": c, "grades": g} for i, (c, g) in enumerate(rows)))


def test_pairs_by_hand(tmp_path, call):
    """Two right (one twice) and two wrong: two pairs of nearest length; all right and all wrong give none."""
    mixed = [(" aa", True), (" bbbb", True), (" aa", True), (" ccccc", False), (" d", False)]
    path = graded(tmp_path, mixed, [(" a", True)] * 3, [(" b", False)], [(" r", True), (" w", False)])
    out, report = tmp_path / "p.jsonl", tmp_path / "r.json"
    args = ("selftrain.pairs", "--samples", path, "--out", out, "--report", report)
    status, said, _ = call(*args)
    assert status == 0 and "2 with pairs, 1 all right, 1 all wrong" in said
    found = {(p["prompt"], p["chosen"], p["rejected"]) for p in records(out)}
    assert found == {("p0", " bbbb", " ccccc"), ("p0", " aa", " d"), ("p3", " r", " w")}
    counts = {"pairs": 3, "problems": 4, "all_right": 1, "all_wrong": 1, "repeated_texts": 3, "fewest": 1, "most": 2}
    assert counts.items() <= json.loads(report.read_text()).items()
    call(*args, "--max_pairs", 4, "--balanced", "true", "--marker", " !")
    balanced = records(out)
    assert len(balanced) == 4 and {p["prompt"] for p in balanced} == {"p0"}, "the last problem has one pair only: left out"
    assert len({(p["chosen"], p["rejected"]) for p in balanced}) == 4 and all(p["chosen"].startswith(" ! ") for p in balanced)
    assert json.loads(report.read_text())["too_few"] == 1
    assert all(e.completions[0].startswith(" ! ") for e in data.load(str(out), "train", "preference"))


def test_pairs_of_empty_and_of_doubtful_texts(tmp_path, call):
    """A model that writes nothing is all wrong, not all right; a text is never chosen over itself."""
    same, out = [(" a", True), (" a", False), (" b", False)], tmp_path / "p.jsonl"
    path = graded(tmp_path, [("", False)] * 3, same, [(" r", True), ("", False)], [(" r", True), (" w", False)])
    status, said, _ = call("selftrain.pairs", "--samples", path, "--out", out)
    assert status == 0 and "1 with pairs, 0 all right, 1 all wrong, 2 too few" in said
    assert [(p["problem"], p["chosen"], p["rejected"]) for p in records(out)] == [(3, " r", " w")]


def test_pairs_use_every_text_before_any_again_and_follow_the_seed(tmp_path):
    problem = [(f" r{'x' * i}", True) for i in range(6)] + [(f" w{'y' * 2 * i}", False) for i in range(5)]
    path = graded(tmp_path, *[problem] * 8)

    def make(**keys) -> list[dict]:
        argv = [f"--{name}={value}" for name, value in {"samples": path, "out": tmp_path / "p.jsonl", **keys}.items()]
        cfg = config.load(pairs.Config, argv)
        return pairs.make_pairs(load_graded(cfg)[0], cfg)[0]

    made = {}
    for partner, seed in itertools.product(("length", "random"), (0, 1)):
        made[partner, seed] = make(max_pairs=10, partner=partner, seed=seed)
        assert make(max_pairs=10, partner=partner, seed=seed) == made[partner, seed]
        for i in range(8):
            ours = [p for p in made[partner, seed] if p["problem"] == i]
            uses = [Counter(p[side] for p in ours) for side in ("chosen", "rejected")]
            assert len(ours) == 10 and len({(p["chosen"], p["rejected"]) for p in ours}) == 10
            assert len(uses[0]) == 6 and max(uses[0].values()) == 2 and set(uses[1].values()) == {2}
    assert made["random", 0] != made["random", 1]
    gap = {k: sum(abs(len(p["chosen"]) - len(p["rejected"])) for p in v) for k, v in made.items()}
    assert gap["length", 0] < gap["random", 0]
    numbers, shuffled = ([p["problem"] for p in found] for found in (make(shuffle="false"), made["length", 0]))
    assert numbers == sorted(numbers) and shuffled != sorted(shuffled)


def test_no_text_takes_long_to_extract_from():
    """A model that repeats itself writes such texts."""
    began = time.monotonic()
    for part in ("\\boxed{", "\\boxed{a ", "\\fbox {{", "A: ", "A:\n", "####", "1,111", "\n> * "):
        extract((part * 60_000)[:60_000])
    assert extract("\\boxed{1} " + "\\boxed{" * 9_000) == "1" and extract("\\boxed{" * 9_000 + "2}") == "2"
    assert time.monotonic() - began < 10
