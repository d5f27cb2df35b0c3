"""Run folders made by hand, and losses as a training writes them."""

import json

import numpy as np
import pytest


@pytest.fixture
def folder(tmp_path):
    """folder("name", records, …) writes a run folder and returns its path; settings: its config.toml, tail: a torn line."""

    def make(name: str, records: list[dict], settings: str = "", tail: str = "") -> str:
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
        if settings:
            (path / "config.toml").write_text(settings)
        return str(path)

    return make


@pytest.fixture
def losses():
    """losses(n, …) gives n training records of a noisy, falling loss; `jump` nats more for `lasting` steps from `at` on."""

    def make(n: int = 300, jump: float = 0.0, at: int = 150, lasting: int = 40, seed: int = 0) -> list[dict]:
        loss = 1.5 + np.exp(-np.arange(n) / 50) + np.random.default_rng(seed).gamma(2, 0.15, n)
        loss[at : at + lasting] += jump
        return [{"step": i + 1, "split": "train", "loss": x, "lr": 1e-5, "step_s": 0.5} for i, x in enumerate(loss.tolist())]

    return make
