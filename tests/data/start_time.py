"""Seconds and memory of a first and a second start on generated pairs: python tests/data/start_time.py 10000 100000 1000000

Each start is a process of its own. It reads the pairs as `dpo.py` does, hashes them, and plans the first step. What is counted
is what comes on top of the imports: seconds, seconds of the CPU (where other work takes it, the clock says little), and memory
of its own (RssAnon), at the end and at most.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def memory() -> dict[str, float]:
    """MB of this process now, by kind: RssAnon is its own, RssFile is mapped and shared with all that map it."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) / 1000 for words in lines if words[0].startswith("Rss")}


def start(path: str) -> dict:
    import torch  # noqa: F401

    from data.encode import data_hash, load_encoded
    from data.plan import BatchPlan
    from data.tokenizer import get

    tokenizer = get("gpt2")
    before, done, most = memory(), threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], memory()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun, begun_cpu = time.perf_counter(), time.process_time()
    items = load_encoded(path, "train", "preference", tokenizer, 1024, "drop")
    loaded, loaded_cpu = time.perf_counter(), time.process_time()
    data_hash(items)
    plan = BatchPlan(items, 64, seed=0, per_group=1)
    plan[0]
    planned = time.perf_counter()
    done.set(), watcher.join()
    after = memory()
    return {
        "seconds": loaded - begun,
        "cpu": loaded_cpu - begun_cpu,
        "plan_seconds": planned - loaded,
        "own_mb": after["RssAnon"] - before["RssAnon"],
        "most_mb": most[0] - before["RssAnon"],
        "tokens_mb": sum(4 * int(n) for n in plan.lengths) / 1e6,
    }


def generate(n: int, path: Path) -> None:
    """Pairs of English from the project's own pages: prompts of 20 to 80 words, answers of 10 to 60."""
    words, draw = [word for page in sorted(Path("docs").glob("*.md")) for word in page.read_text().split()], random.Random(0)

    def text(least: int, most: int) -> str:
        k = draw.randint(least, most)
        at = draw.randrange(len(words) - k)
        return " ".join(words[at : at + k])

    with path.open("w") as file:
        for i in range(n):
            pair = {"prompt": f"{i}: {text(20, 80)}", "chosen": f" {text(10, 60)}", "rejected": f" {text(10, 60)}"}
            file.write(json.dumps(pair) + "\n")


def main(sizes: list[str], as_json: bool) -> None:
    if not as_json:
        print(
            "| pairs | data, MB | start | seconds | CPU s | planning, s | own memory at the end, MB | at most, MB |\n"
            + "|---" * 8
            + "|"
        )
    for n in map(int, sizes):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "pairs.jsonl")
            generate(n, path)
            for name in ("first", "second"):
                env = os.environ | {"NANOPREF_CACHE": folder}
                out = subprocess.check_output([sys.executable, __file__, "--one", str(path)], env=env, text=True)
                found = json.loads(out.splitlines()[-1])
                if as_json:
                    print(json.dumps(found))
                    continue
                size, at = (
                    path.stat().st_size / 1e6,
                    "{seconds:.1f} | {cpu:.1f} | {plan_seconds:.1f} | {own_mb:.0f} | {most_mb:.0f}",
                )
                print(f"| {n:,} | {size:,.0f} | {name} | {at.format(**found)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(start(sys.argv[2])))
    else:
        main([a for a in sys.argv[1:] if a != "--json"], "--json" in sys.argv)
