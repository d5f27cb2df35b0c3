"""What every script imports first. Importing torch takes seconds; Ctrl-C and `--help` do not wait for it.

Ctrl-C while modules are imported ends in one word, without a traceback. `--help` takes stand-ins for the packages of `HEAVY`,
because the keys need nothing of them. Where a test or another program imports a script, neither is done.
"""

import os
import signal
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

HEAVY = ("torch", "numpy", "requests", "urllib3", "safetensors", "tiktoken")
ROOT = Path(__file__).parents[1]


class _Anything(type):
    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    __or__ = __ror__ = __getitem__ = lambda cls, _: cls  # Tensor | None, Callable[…]


class StandIn(metaclass=_Anything):
    """Whatever a module asks of a package while it is imported: a base class, an annotation, a decorator, a constant."""

    def __new__(cls, *given, **_):
        return given[0] if given and callable(given[0]) else super().__new__(cls)

    def __call__(self, decorated):
        return decorated


class Finder:
    """Imports stand-ins in place of the packages of `HEAVY`."""

    def find_spec(self, name: str, *_) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: getattr(StandIn, name)
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def interrupted(*_) -> None:
    """End at once, with the exit status of Ctrl-C."""
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


def run(main: Callable[[], int | None], alone: bool = False) -> None:
    """`base.errors.run`, which from here on answers Ctrl-C itself."""
    from base import errors

    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    errors.run(main, alone)


_started = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").absolute()
if sys.argv[:1] == ["-m"] or ROOT in _started.parents[:2]:  # `-m`: the module to be run is still being looked for
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup and the like ignore it
        signal.signal(signal.SIGINT, interrupted)
    # CUDA's allocator, which reads this when torch is imported: blocks that grow leave no holes between them
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if "--help" in sys.argv or "-h" in sys.argv:
        sys.meta_path.insert(0, Finder())
