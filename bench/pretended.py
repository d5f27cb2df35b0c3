"""A GPU that is not there: tensors that say `cuda:0`, are computed on the CPU, and obey what CUDA demands of devices.

Whole scripts run on it, with real numbers, on a machine without a GPU:

    with pretended.gpu() as seen:
        dpo.main()
    print(seen.kernels, seen.syncs)

It refuses an operation on tensors of two devices, as CUDA does, and it counts kernels and waits. Torch's FakeTensorMode has no
values, so it could not run a script past its first loss. What is not real: attention (one kernel, computed by the CPU's), and
compiled functions, which run uncompiled.
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types as optimizer_types
from torch.utils._foreach_utils import _foreach_supported_types as clip_types
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # take an index from the CPU too, and wait
ACROSS = {aten._to_copy, aten.copy_} | INDEXING
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.equal}
NO_KERNEL = {aten._local_scalar_dense, aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view,
             aten.detach, aten.lift_fresh, aten.new_empty_strided}  # fmt: skip


@dataclass
class Seen:
    """`kernels`: operations on the device by name, copies included, views not. `syncs`: what made the host wait, by name."""

    kernels: Counter = field(default_factory=Counter)
    syncs: Counter = field(default_factory=Counter)

    def copy(self) -> "Seen":
        return Seen(self.kernels.copy(), self.syncs.copy())

    def since(self, before: "Seen") -> "Seen":
        return Seen(self.kernels - before.kernels, self.syncs - before.syncs)


class OnGPU(Tensor):
    """A tensor on the pretended GPU; `held` is the CPU tensor with its values.

    Python sees a device `cuda:0`. Torch's C++ sees one of the CPU: its autograd engine has no threads for CUDA in a build
    without it. So what asks C++ for the device is answered here.
    """

    seen = Seen()  # of the latest `gpu()`

    @staticmethod
    def __new__(cls, held: Tensor):
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "layout": held.layout}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **like)

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self, **_) -> str:
        return f"{self.held!r} on the pretended GPU"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return ASKED.get(func, func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {}, cls.seen)


def move(t: Tensor, *how, copy: bool = False, **settings) -> Tensor:
    """Tensor.to."""
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*how, **settings)
    if how and isinstance(how[0], Tensor):
        device = where(how[0])
    if device in (None, where(t)):
        return Tensor.to(t, t.dtype if dtype is None else dtype, copy=copy)
    if device.type == "cuda":
        return aten._to_copy(t, dtype=dtype, device=GPU, non_blocking=non_blocking)
    return to_cpu(t, non_blocking).to(t.dtype if dtype is None else dtype)


def to_cpu(t: Tensor, non_blocking: bool = False) -> Tensor:
    assert not (t.requires_grad and torch.is_grad_enabled()), "gradients do not come back from the CPU here"
    if not non_blocking:
        OnGPU.seen.syncs["copy to the CPU"] += 1
    OnGPU.seen.kernels["copy to the CPU"] += 1
    return t.held.clone()


def no_numpy(*_, **__):
    raise TypeError("can't convert cuda:0 device type tensor to numpy")


def where(t: Tensor) -> torch.device:
    return GPU if isinstance(t, OnGPU) else torch.device("cpu")


GPU = torch.device("cuda:0")
ASKED = {
    Tensor.device.__get__: where, Tensor.is_cuda.__get__: lambda t: isinstance(t, OnGPU),
    Tensor.is_cpu.__get__: lambda t: not isinstance(t, OnGPU), Tensor.get_device: lambda t: 0, Tensor.to: move,
    Tensor.cpu: to_cpu, Tensor.cuda: lambda t, *_, **__: t, Tensor.tolist: lambda t: to_cpu(t.detach()).tolist(),
    Tensor.numpy: no_numpy, Tensor.__array__: no_numpy,
}  # fmt: skip


class Mode(TorchDispatchMode):
    """Catches also what has no tensor on the device yet: `torch.zeros(…, device="cuda")`, `x.to("cuda")`."""

    def __init__(self, seen: Seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {}, self.seen)


def compute(func, args: tuple, kwargs: dict, seen: Seen):
    """Do an operation on the CPU; its results are on the device where CUDA's would be. RuntimeError as CUDA's where the
    arguments are on two devices."""
    kind, given = func.overloadpacket, tree_flatten((args, kwargs))[0]
    tensors = [a for a in given if isinstance(a, Tensor)]
    there = [t for t in tensors if isinstance(t, OnGPU)]
    here = [t for t in tensors if not isinstance(t, OnGPU) and t.dim()]  # a scalar of the CPU goes with everything
    if there and here and kind not in ACROSS:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got some on cuda:0 and some on cpu")
    device = kwargs.get("device")  # where there is a tensor on the GPU, this is what C++ thinks of that one's device
    on_gpu = isinstance(args[0], OnGPU) if kind is aten.copy_ else bool(there) or (device is not None and device.type == "cuda")
    if on_gpu or there:
        name = kind.__name__
        if kind in WAITING:
            seen.syncs[name] += 1
        elif kind in (aten._to_copy, aten.copy_) and (here or not there):
            blocking = len(args) < 3 or not args[2] if kind is aten.copy_ else not kwargs.get("non_blocking")
            seen.syncs[f"copy to the {'GPU' if on_gpu else 'CPU'}"] += blocking
        elif kind in INDEXING:
            index = tree_flatten(args[1])[0]
            if here:
                seen.syncs["an index from the CPU"] += 1
            elif any(isinstance(t, Tensor) and t.dtype == torch.bool for t in index):
                seen.syncs["a boolean index"] += 1
        if kind not in NO_KERNEL and not func.is_view:
            seen.kernels[name] += 1
    inner_args, inner = tree_map_only(OnGPU, lambda t: t.held, (args, kwargs))
    if device is not None:
        inner["device"] = torch.device("cpu")
    if inner.get("pin_memory"):
        inner["pin_memory"] = False
    out = EMULATED.get(kind, func)(*inner_args, **inner)
    if on_gpu:
        out = tree_map_only(Tensor, OnGPU, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if there else out
    return out


# --- operations that the CPU has in another form, or not at all -----------------------------------------------------------


def product(a: Tensor, b: Tensor, dtype: torch.dtype | None = None, **_) -> Tensor:
    """mm, also with `out_dtype`."""
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected m1 and m2 to have the same dtype, but got: {a.dtype} != {b.dtype}")
    return torch.mm(a, b) if dtype is None else torch.mm(a.to(dtype), b.to(dtype))


def add_product(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype | None = None, *, beta=1, alpha=1, out=None) -> Tensor:
    """addmm, also with `out_dtype`."""
    found = torch.addmm(total, a, b, beta=beta, alpha=alpha) if dtype is None else beta * total + alpha * product(a, b, dtype)
    return found if out is None else out.copy_(found)


def flash(q, k, v, dropout=0.0, causal=False, _debug=False, scale=None):
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, scale=scale)
    nothing = torch.empty(0)
    return out, lse, nothing, nothing, q.size(2), k.size(2), nothing, nothing, nothing


def flash_backward(grad, q, k, v, out, lse, _cq, _ck, _mq, _mk, dropout, causal, _seed, _offset, scale=None):
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, dropout, causal, scale=scale)


def efficient(q, k, v, bias, _lse, dropout=0.0, causal=False, scale=None):
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, attn_mask=bias, scale=scale)
    return out, lse, torch.empty(0), torch.empty(0)


def efficient_backward(grad, q, k, v, bias, out, lse, _seed, _offset, dropout, _mask, causal=False, scale=None):
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return *backward(grad, q, k, v, out, lse, dropout, causal, attn_mask=bias, scale=scale), None


def scores(q, k, cu_q, cu_k, causal: bool, scale: float | None, window):
    """Of each sequence: its queries and keys as slices, and its scores (heads, queries, keys); causal is bottom-right."""
    for (a, b), (c, d) in zip(*(itertools.pairwise(ends.tolist()) for ends in (cu_q, cu_k)), strict=True):
        found = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * (scale or q.size(2) ** -0.5)
        if causal or tuple(window or ()) == (-1, 0):
            found = found.masked_fill(torch.ones(b - a, d - c).tril(d - c - (b - a)) == 0, -math.inf)
        yield slice(a, b), slice(c, d), found


def varlen(q, k, v, cu_q, cu_k, _max_q, _max_k, causal=False, scale=None, window=None, *_, **__):
    """torch.nn.attention.varlen: q (queries, heads, head_dim), sequences one behind the other."""
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got: {q.dtype} {k.dtype} {v.dtype}")
    out, lse = torch.empty_like(q), torch.empty(q.size(1), len(q))
    keys, values = (x.float().repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    for queries, at, found in scores(q.float(), keys, cu_q, cu_k, causal, scale, window):
        out[queries] = torch.einsum("hqk,khd->qhd", found.softmax(-1), values[at]).to(q.dtype)
        lse[:, queries] = found.logsumexp(-1)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def varlen_backward(grad, q, k, v, out, lse, cu_q, cu_k, _max_q, _max_k, causal, _rng, scale=None, window=None):
    group, g, queries32 = q.size(1) // k.size(1), grad.float(), q.float()
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    dq, dk, dv = (torch.zeros_like(x) for x in (queries32, keys, values))
    for queries, at, found in scores(queries32, keys, cu_q, cu_k, causal, scale, window):
        p = (found - lse[:, queries, None]).exp()
        dp = torch.einsum("qhd,khd->hqk", g[queries], values[at])
        ds = p * (dp - (g * out)[queries].sum(-1).T[:, :, None]) * (scale or q.size(2) ** -0.5)
        dv[at] += torch.einsum("hqk,qhd->khd", p, g[queries])
        dq[queries] += torch.einsum("hqk,khd->qhd", ds, keys[at])
        dk[at] += torch.einsum("hqk,qhd->khd", ds, queries32[queries])
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return tuple(x.to(q.dtype) for x in (dq, dk, dv))


EMULATED = {
    aten.mm: product,
    aten.addmm: add_product,
    aten._scaled_dot_product_flash_attention: flash,
    aten._scaled_dot_product_flash_attention_backward: flash_backward,
    aten._scaled_dot_product_efficient_attention: efficient,
    aten._scaled_dot_product_efficient_attention_backward: efficient_backward,
}
with contextlib.suppress(ImportError):  # torch before 2.10 has none
    import torch.nn.attention.varlen

    EMULATED |= {torch.ops.torch_attn._varlen_attn: varlen, torch.ops.torch_attn._varlen_attn_backward: varlen_backward}


# --- functions that do not go through an operation ----------------------------------------------------------------------


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention: on the device one kernel, as CUDA's: "flash", or with a mask "efficient"."""
    if not isinstance(q, OnGPU):
        return REAL_ATTENTION(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise RuntimeError(f"Expected query, key, and value to have the same dtype, but got: {q.dtype} {k.dtype} {v.dtype}")
    if enable_gqa:
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    bias = attn_mask.to(q.dtype)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal, scale=scale)[0]


def grouped(tensors, with_indices: bool = False) -> dict:
    """torch's lists of tensors by device and dtype, which are made in C++."""
    found = REAL_GROUPS(tensors, with_indices)
    return {(where(lists[0][0]), dtype): (lists, at) for (_, dtype), (lists, at) in found.items()}


class Autocast(contextlib.ExitStack):
    """torch.autocast, where `cuda` means the pretended GPU: for C++ its tensors are the CPU's."""

    def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **more):
        super().__init__()
        self.settings = [(device, dtype, enabled) for device in {device_type, "cpu"}]

    def __enter__(self):
        for device, dtype, enabled in self.settings:
            self.enter_context(REAL_AUTOCAST(device, dtype=dtype, enabled=enabled))


REAL_GROUPS = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype
REAL_AUTOCAST = torch.autocast
REAL_ATTENTION = F.scaled_dot_product_attention
ANSWERS = {
    "is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0,
    "get_device_name": "a pretended GPU", "get_device_capability": (9, 0), "mem_get_info": (80 * 10**9,) * 2,
    "max_memory_allocated": 0, "memory_allocated": 0, "memory_reserved": 0, "is_current_stream_capturing": False,
    "graph_pool_handle": None,
    "get_device_properties": SimpleNamespace(total_memory=80 * 10**9, name="a pretended GPU", major=9, minor=0),
    "get_rng_state": torch.get_rng_state(),
    **dict.fromkeys(("_lazy_init", "set_device", "set_rng_state", "manual_seed_all", "empty_cache", "reset_peak_memory_stats")),
}  # fmt: skip


@contextlib.contextmanager
def gpu() -> Iterator[Seen]:
    """Inside, torch has one GPU of 80 GB, and what is done on it is counted."""
    seen = OnGPU.seen = Seen()
    with contextlib.ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))

        def wait(*_) -> None:
            seen.syncs["synchronize"] += 1

        def wait_for_event() -> None:
            seen.syncs["an event"] += 1

        clipping = torch.nn.utils.clip_grad
        stack.enter_context(mock.patch.object(clipping, "_group_tensors_by_device_and_dtype", grouped))
        stream = SimpleNamespace(record_event=lambda: SimpleNamespace(synchronize=wait_for_event))
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", lambda *_: stream))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", wait))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda self, *_: self))
        stack.enter_context(mock.patch.object(torch, "autocast", Autocast))
        stack.enter_context(mock.patch.object(torch, "inference_mode", torch.no_grad))  # it knows no tensors like these
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch("runtime.run.peak_flops", lambda *_: 1.0))  # its product is too large for a CPU
        for known in (optimizer_types, clip_types):
            known.append(OnGPU)
            stack.callback(known.remove, OnGPU)
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made on the CPU, then moved
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        future = torch.__future__  # a module's parameters become new tensors: `data` of another kind cannot be set
        overwritten = future.get_overwrite_module_params_on_conversion()
        future.set_overwrite_module_params_on_conversion(True)
        stack.callback(future.set_overwrite_module_params_on_conversion, overwritten)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(Mode(seen))
        yield seen
