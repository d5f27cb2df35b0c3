"""The house: imports run downward only, in no circle, and nothing in the core knows a room beside it."""

import ast
from pathlib import Path

import pytest

from tests.size import FAMILIES, ROOT, is_core, sizes

ROOMS = ("judge", "selftrain", "report", "bench", "tools")  # beside the core: each can be deleted
FLOORS = {  # from the ground up; every other file at the root is a stage, on the top floor with the rooms
    "base": 0,
    "losses.py": 1,
    "lora.py": 1,
    "head_kernels.py": 1,
    "logprobs.py": 1,
    **dict.fromkeys(FAMILIES, 2),
    "weights.py": 3,
    "adapters.py": 3,
    "generate.py": 3,
    "data": 4,
    "runtime": 4,
}


def floor(path: str) -> int:
    return FLOORS.get(path.partition("/")[0], 5)


def file_of(module: str, files: set[str]) -> str | None:
    """The project's file of an imported module; None for somebody else's."""
    path = module.replace(".", "/")
    return next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in files), None)


def imports(path: str, files: set[str]) -> set[str]:
    """The project's files that a file imports, wherever in it, and those that a table of names in it stands for."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            members = {f"{node.module}.{alias.name}" for alias in node.names}  # submodules, or names in the module
            names |= {member if file_of(member, files) else node.module for member in members}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            names.add(node.value)  # "data.toy" in data's table of recipes
    if path == "weights.py":
        names |= {name.removesuffix(".py") for name in FAMILIES}  # weights.FAMILIES
    return {found for name in names if (found := file_of(name, files))} - {path}


FILES = set(sizes())
ARROWS = {path: imports(path, FILES) for path in FILES}


def test_arrows_run_downward():
    up = {(a, b) for a, targets in ARROWS.items() for b in targets if floor(b) > floor(a)}
    assert not up, f"these files import from a floor above them: {sorted(up)}"


def test_no_circle():
    done: set[str] = set()

    def visit(path: str, above: tuple[str, ...]) -> None:
        assert path not in above, f"a circle: {' -> '.join((*above[above.index(path) :], path))}"
        if path not in done:
            for target in ARROWS[path]:
                visit(target, (*above, path))
            done.add(path)

    for path in FILES:
        visit(path, ())


def test_the_core_knows_no_room():
    known = {(a, b) for a, targets in ARROWS.items() if is_core(a) for b in targets if b.startswith(ROOMS)}
    assert not known, f"the core imports a room beside it: {sorted(known)}"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_knows_the_contract_and_the_layer_alone(family):
    assert ARROWS[family] <= {"logprobs.py", "lora.py"}


def test_rooms_do_not_know_tests():
    knowing = [f for f in FILES if "import tests" in (text := (ROOT / f).read_text()) or "from tests" in text]
    assert not knowing


def test_every_room_has_its_tests():
    for room in (*ROOMS, "base", "data", "runtime"):
        assert list(Path(ROOT, "tests", room).glob("test_*.py")), f"tests/{room} is empty"
