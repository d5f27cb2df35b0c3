"""A checkpoint from somebody else: whatever its files hold, going on from it runs none of their code and ends in one line."""

import ast
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import checkpoint
from tests.conftest import ROOT, script, sft_args
from tests.size import sizes


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Hidden(Evil):
    """The same, through getattr, a partial, and torch's own unpickling of bytes: no name that a list of bad names has."""

    def __reduce__(self):
        import functools

        inner = io.BytesIO()
        torch.save(Evil(self.marker), inner)
        return functools.partial(getattr(torch.storage, "_load_from_bytes"), inner.getvalue()), ()  # noqa: B009


def pickles(marker: Path) -> list[bytes]:
    """Files as torch writes and reads them, each of which runs code where it is unpickled."""
    from torch.distributed.checkpoint.metadata import Metadata

    out = [pickle.dumps(kind(marker)) for kind in (Evil, Hidden)]
    out.append(pickle.dumps(Metadata({}, planner_data={"a": [Evil(marker)]}, storage_data={})))
    file = io.BytesIO()
    torch.save({"model": Evil(marker)}, file)
    return [*out, file.getvalue()]


def written(folder: Path, **contents: bytes) -> None:
    """Write files into a checkpoint and put their hashes into its state.json, as whoever made it could."""
    state = json.loads((folder / "state.json").read_text())
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        state["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
    (folder / "state.json").write_text(json.dumps(state))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert script("sft", *sft_args(files, folder, epochs=1, samples=0)) == 0
    return folder


def test_a_checkpoint_from_somebody_else_runs_no_code(whole, files, call, tmp_path):
    """Every file of it is a pickle in turn, and so is one more, where torch keeps its own."""
    marker, run = tmp_path / "ran", tmp_path / "run"
    newest = max((whole / "checkpoints").iterdir(), key=lambda f: f.stat().st_mtime).name
    names = [f.name for f in (whole / "checkpoints" / newest).glob("rank_*")]  # what going on reads of it
    for content in pickles(marker):
        pickle.loads(content) if content[:2] != b"PK" else torch.load(io.BytesIO(content), weights_only=False)
        assert marker.exists(), "the pickle is harmless: the test would show nothing"
        for name in {*names, ".metadata"}:
            marker.unlink(missing_ok=True)
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(whole, run)
            written(run / "checkpoints" / newest, **{name: content})
            status, _, err = call("sft", *sft_args(files, run, epochs=1, samples=0))
            assert not marker.exists(), name
            assert status == (2 if name in names else 0) and "Traceback" not in err, err
            if status:
                assert (
                    err.strip().splitlines()[-1].startswith(f"error: {run}/checkpoints/{newest} is no checkpoint of this run")
                )


def test_tensors_of_another_model_are_refused(whole, files, call, tmp_path):
    """Cut, longer, of another width, gone, or with a number that is none; overlapping rows; and a state of other types."""
    newest = max((whole / "checkpoints").iterdir(), key=lambda f: f.stat().st_mtime)
    tensors = load_file(newest / "rank_0.safetensors")
    name = next(n for n in tensors if n.endswith("wte.weight"))
    starts = dict.fromkeys(tensors, "0")
    cases = [
        (tensors | {name: tensors[name][:-1].clone()}, starts),
        (tensors | {name: tensors[name].repeat(2, 1)}, starts),
        (tensors | {name: tensors[name][:, :-1].clone()}, starts),
        ({n: t for n, t in tensors.items() if n != name}, {n: "0" for n in tensors if n != name}),
        (tensors, starts | {name: "1"}),
        (tensors, starts | {name: "-1"}),
        (tensors, starts | {name: "one"}),
        (tensors, starts | {"more": "0"}),
        (tensors | {name: torch.tensor(1.0)}, starts),
    ]
    for n, (changed, metadata) in enumerate(cases):
        run = shutil.copytree(whole, tmp_path / str(n))
        save_file(changed, tmp_path / "x", metadata)
        written(run / "checkpoints" / newest.name, **{"rank_0.safetensors": (tmp_path / "x").read_bytes()})
        status, _, err = call("sft", *sft_args(files, run, epochs=1, samples=0))
        assert status == 2 and "is no checkpoint of this run" in err and "Traceback" not in err, (n, err)


@pytest.mark.parametrize(
    "change",
    [{"step": "5"}, {"step": 7}, {"step": True}, {"metrics_bytes": -1}, {"metrics_bytes": 1.5}, {"best": 3}, {"best": {}},
     {"best": {"step": 1, "loss": "low"}}, {"files": 3}, {"files": {"rank_0.safetensors": 3}}, {"files": {"x": [1, 2]}}],
)  # fmt: skip
def test_a_state_of_other_types_is_damage(change, whole, tmp_path):
    folder = shutil.copytree(max((whole / "checkpoints").iterdir(), key=lambda f: f.stat().st_mtime), tmp_path / "step_5")
    state = json.loads((folder / "state.json").read_text())
    assert checkpoint.inspect(folder)[1] is None
    (folder / "state.json").write_text(json.dumps(state | change))
    assert checkpoint.inspect(folder)[1] is not None


def test_nothing_in_the_project_unpickles_or_executes():
    """No file of ours imports a module that unpickles, or calls what does. (The sandbox runs programs: that is its purpose.)"""
    found = set()
    for path in sizes():
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found |= {(path, name) for name in names if name.split(".")[0] in ("pickle", "shelve", "marshal", "dill")}
                found |= {(path, name) for name in names if name.startswith("torch.distributed.checkpoint")}
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("eval", "exec", "torch.load", "torch.hub.load", "np.load", "numpy.load", "yaml.load"):
                    found.add((path, called))
    assert found <= {("selftrain/sandbox.py", "exec")}, found


def test_a_kill_while_checkpoints_are_deleted_leaves_the_older_ones(tmp_path, monkeypatch):
    """The best one is among these, often; what is newer comes again by training."""
    for step in (2, 4, 6):
        (tmp_path / f"step_{step}").mkdir()
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: rename(a, b) if a.name == "step_6" else sys.exit(1))
    with pytest.raises(SystemExit):
        checkpoint.prune(tmp_path, 0, None)
    assert [folder.name for folder in checkpoint.steps(tmp_path)] == ["step_2", "step_4"]


def test_a_best_score_that_is_no_number_is_damage(whole, tmp_path):
    """It is compared with the next validation's."""
    newest = checkpoint.steps(whole / "checkpoints")[-1]
    folder = shutil.copytree(newest, tmp_path / newest.name)
    state = json.loads((folder / "state.json").read_text())
    for score, why in ((0.5, None), ("high", "state.json does not hold what was saved")):
        state["best"] = {"step": 1, "loss": 1.0, "score": score}
        (folder / "state.json").write_text(json.dumps(state))
        assert checkpoint.inspect(folder)[1] == why
