"""Published samples of math problems, with their grades, as lines that selftrain reads: our graders are held against them.

    python -m tests.selftrain.published math_samples.jsonl.gz samples.jsonl

Qwen2.5-Math's output files (`question`, `answer`, `response`, `pred`, `score`), and OpenAI's model solutions of GSM8K, which is
example_model_solutions.jsonl of https://github.com/openai/grade-school-math (`question`, `ground_truth`, and for each model
`{"is_correct", "solution"}`).
"""

import json
import sys
from pathlib import Path

from data import math_problems
from data.jsonl import read


def convert(record: dict) -> dict:
    """A line in our form. It gets our prompt, and its completions a space to begin with."""
    if "ground_truth" in record:
        models = [value for value in record.values() if isinstance(value, dict)]
        answer = math_problems.extract(record["ground_truth"], markers_only=True)
        completions, found = [m["solution"] for m in models], {"grades": [m["is_correct"] for m in models]}
    else:
        answer, completions, found = record["answer"], record["response"], {"grades": record["score"], "pred": record["pred"]}
    prompt = math_problems.prompt(record["question"])
    completions = [f" {c}" for c in completions]
    return {"prompt": prompt, "answer": answer, **math_problems.kind_of(record), "completions": completions, **found}


def main(source: str, out: str) -> None:
    Path(out).write_text("".join(json.dumps(convert(record)) + "\n" for _, record in read(source)))


if __name__ == "__main__":
    main(*sys.argv[1:])
