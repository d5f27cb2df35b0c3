"""Lines of code a file, in the core and in all, against the budgets: `python -m tests.size`.

Blank lines, comments and docstrings do not count, tests neither. Exit status 1 where a budget is passed.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import data
import weights

ROOT = Path(__file__).parents[1]
STAGES = (
    "sft.py",
    "precompute_ref.py",
    "dpo.py",
    "eval_mcq.py",
    "eval_reward.py",
    "eval_winrate.py",
    "sample.py",
)
FAMILIES = tuple(f"{name}.py" for name in weights.FAMILIES.values() if "." not in name)
LOADS = [getattr(load, "func", load) for load in data.RECIPES.values()]
RECIPES = {f"{load.__module__.replace('.', '/')}.py" for load in LOADS} | {"data/toy_math.py"}
FLAT = ("lora.py", "logprobs.py", "head_kernels.py", "generate.py", "weights.py", "adapters.py", "losses.py")
CORE = {*FAMILIES, *FLAT, "sft.py", "precompute_ref.py", "dpo.py", "eval_mcq.py", "sample.py"}
A_STAGE, A_FAMILY, A_FILE = 200, 200, 300
THE_CORE, ALL = 6_140, 10_500
SKIPPED = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> int:
    """Lines that hold code: every line of a token that is no comment, without docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for t in tokens if t.type not in SKIPPED for n in range(t.start[0], t.end[0] + 1)}
    return len(lines - docstrings)


def is_core(path: str) -> bool:
    return path in CORE or path.partition("/")[0] in ("base", "runtime") or (path.startswith("data/") and path not in RECIPES)


def sizes() -> dict[str, int]:
    """File -> lines of code, for the project's Python files outside of tests/."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True)
    files = [f for f in listed.stdout.split() if not f.startswith("tests/") and (ROOT / f).is_file()]
    return {f: code_lines((ROOT / f).read_text(encoding="utf-8")) for f in sorted(files)}


def main() -> int:
    found = sizes()
    budgets = {f: A_STAGE if f in STAGES else A_FAMILY if f in FAMILIES else A_FILE for f in found}
    rows = [(f, n, budgets[f]) for f, n in found.items() if n]
    rows.append(("the core", sum(n for f, n in found.items() if is_core(f)), THE_CORE))
    rows.append(("all", sum(found.values()), ALL))
    for name, lines, budget in rows:
        mark = "core" if is_core(name) else ""
        over = f"  {lines - budget} over" if lines > budget else ""
        print(f"{lines:6,}  of {budget:5,}  {mark:4}  {name}{over}")
    return int(any(lines > budget for _, lines, budget in rows))


if __name__ == "__main__":
    sys.exit(main())
