"""The project's scripts under one name: `nanopref dpo --config FILE` is `python dpo.py --config FILE`.

`pip install -e .` makes the command. The scripts stay where they are, and are run from there.
"""

import difflib
import runpy
import sys
from pathlib import Path

SCRIPTS = (
    *("sft", "precompute_ref", "dpo", "eval_mcq", "eval_reward", "eval_winrate", "sample", "data", "demo", "bench"),
    *("selftrain.loop", "selftrain.problems", "selftrain.eval_math", "selftrain.pairs", "selftrain.reward_pairs"),
    *("report.page", "report.plot", "report.tables", "report.memory", "tools.convert_openai", "tools.export"),
)


def main() -> None:
    """Run the script that the first word names, with the words behind it."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print(f"usage: nanopref SCRIPT [--config FILE.toml] [--key value …]\n\nscripts: {', '.join(SCRIPTS)}")
        sys.exit(0)
    if name not in SCRIPTS:
        near = difflib.get_close_matches(name, SCRIPTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"name one of {', '.join(SCRIPTS)}"
        print(f"error: command line: no script {name!r}: {hint}", file=sys.stderr)
        sys.exit(2)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.argv[:] = ["-m", *rest]  # as `python -m` begins
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
