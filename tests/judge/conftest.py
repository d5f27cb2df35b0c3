import pytest

from base import openai
from tests.judge.server import Server


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(openai, "DELAY", 0.01)
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        yield server
