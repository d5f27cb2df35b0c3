"""Where a run computes, in which precision, and with how many processes: everything that torchrun's workers must agree on.

The model is sharded with FSDP2 (`fully_shard`): a block at a time is gathered, used and let go. Which examples a step takes
does not depend on the number of processes, gradients are summed and not averaged, and what is reported is global. So without
dropout the curve is the same for every number of them.
"""

import ctypes
import hashlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from base.errors import UserError

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # float16's range is too small for log-probs and gradients
ROOM = 4  # a whole copy may take one part in so many of the memory; the rest is for activations, logits and weights as cast
STUCK = timedelta(minutes=10)  # a collective of training that takes longer will never end
PATIENCE = timedelta(hours=24)  # while rank 0 downloads, tokenizes, or saves, the others wait


@dataclass(frozen=True)
class Compute:
    """The device, the dtype of matrix products (master weights and optimizer stay float32), and this process's place.

    `control` is a group on the CPU for what the processes tell each other; None where there is only one.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    control: Any = None

    def autocast(self, on: bool = True) -> torch.autocast:
        """Products in `dtype`. Weights are cast once until the outermost one ends: one that is off, around all micro-batches of
        a step, keeps the casts for them."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=on and self.dtype != torch.float32)

    @property
    def memory(self) -> int:
        """Bytes of the device, all that is in use included."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    @property
    def late(self) -> bool:
        """Whether the host goes on while the device works, and reads one step late what a step found (runtime/step.py)."""
        return self.device.type == "cuda"

    def row_multiple(self, micro_tokens: int) -> int:
        """Row lengths are rounded up to this. On CUDA that is a micro-batch, in blocks of 128: so each is one packed row of one
        shape, for which kernels are chosen and compiled once. A longer example's row is a multiple of it."""
        return max(128, micro_tokens // 128 * 128) if self.device.type == "cuda" else 1

    def __str__(self) -> str:
        name, note = f"{torch.get_num_threads()} threads", ""
        if self.device.type == "cuda":
            name = f"{torch.cuda.get_device_name(self.device)}, {self.memory / 1e9:.1f} GB"
            note = "" if has_bfloat16() else "; this GPU has no bfloat16 of its own, and float32 is faster there"
        many = f", {self.world} processes" if self.world > 1 else ""
        return f"{self.device} ({name}), {str(self.dtype).removeprefix('torch.')}, torch {torch.__version__}{many}{note}"

    def once(self, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 and hand its result (pickled) to all; a UserError or OSError of it is raised on all."""
        if self.world == 1:
            return work()
        box: list = [None]
        if self.rank == 0:
            try:
                box = [(work(), None)]
            except (UserError, OSError) as error:
                box = [(None, error)]
        dist.broadcast_object_list(box, src=0, group=self.control)
        value, error = box[0]
        if error is not None:
            raise error
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (pickled), in the order of ranks, on all of them."""
        if self.world == 1:
            return [value]
        values: list = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor of one shape, on its device, the same to the bit on all of them."""
        if self.world > 1 and values.is_cuda:
            dist.all_reduce(values)
            return values
        return torch.stack(self.gather(values)).sum(0)


def setup(device: str = "auto", dtype: str = "auto") -> Compute:
    """Choose device and dtype, and join the other processes where torchrun started several.

    `auto`: CUDA where there is one (under torchrun the one of this process's local rank), bfloat16 on a GPU that has it, else
    float32. On every rank but 0 standard output goes nowhere. Raises UserError for a device that is not there.
    """
    rank, world, local = (_number(name, least) for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if world > 1 and name.startswith("cuda"):  # each process takes its own
        name = f"cuda:{local}"
        if local >= (gpus := torch.cuda.device_count()) > 0:
            said = f"{gpus} GPUs are here, but torchrun started more processes: give --nproc_per_node {gpus}"
            raise UserError(said, here=local == gpus)
    try:
        where = torch.device(name)
        if where.type not in ("cpu", "cuda"):
            raise NotImplementedError("cpu and cuda can, ROCm's GPUs by the name cuda; Apple's mps has no float64")
        torch.zeros(1, device=where).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]}): try --device cpu") from None
    if where.type == "cuda":
        torch.cuda.set_device(where.index or 0)
    if dtype == "auto":
        dtype = "bfloat16" if where.type == "cuda" and has_bfloat16() else "float32"
    if where.type == "cpu":
        keep_freed_memory()
    else:  # sums within a matrix product stay float32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if world == 1:
        return Compute(where, DTYPES[dtype])

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UserError(f"WORLD_SIZE is {world} but {name} is not set: start with torchrun --nproc_per_node {world}")
    if not dist.is_initialized():
        join(rank, world, where)
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return Compute(where, DTYPES[dtype], rank, world, dist.new_group(backend="gloo", timeout=PATIENCE))


def has_bfloat16() -> bool:
    """Whether the GPU computes in bfloat16 (NVIDIA's since Ampere, 2020): torch emulates it on older ones, which is slow."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def join(rank: int, world: int, device: torch.device) -> None:
    """Join the other processes. UserError, of each process for itself, where some do not come for as long as STUCK; rank 0
    says which."""
    how = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}  # NCCL connects at once
    dist.init_process_group(store=meet(rank, world), rank=rank, world_size=world, timeout=STUCK, **how)


def meet(rank: int, world: int) -> dist.Store:
    """A store whose keys only the processes of this start use.

    torchrun keeps its store when it starts workers again, with the addresses of the dead in it, and no number of the start is
    the same on all nodes. So each process draws a token. Rank 0 publishes the tokens that it sees. A process that finds its
    own among them confirms the list. When all have confirmed one list, rank 0 says so, and the keys are prefixed with its hash.
    """
    host, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 1)
    torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    missing, why = [], f"waited {STUCK}"
    deadline = time.monotonic() + STUCK.total_seconds()
    try:  # torch's own way to the store waits for all processes, and cannot say for whom
        store = dist.TCPStore(host, port, None, rank == 0 and not torchruns, STUCK, wait_for_workers=False, multi_tenant=True)
        own = secrets.token_hex(8)
        store.set(f"token/{rank}", own)
        while time.monotonic() < deadline:
            if rank == 0:
                missing = [r for r in range(world) if not store.check([f"token/{r}"])]
                if not missing:
                    tokens = b" ".join(store.multi_get([f"token/{r}" for r in range(world)]))
                    store.set("tokens", tokens)
                    store.set("confirmed/0", tokens)
                    confirmed = (
                        store.check([f"confirmed/{r}"]) and store.get(f"confirmed/{r}") == tokens for r in range(world)
                    )
                    missing = [r for r, sure in enumerate(confirmed) if not sure]
                if not missing:
                    store.set("start", tokens)
            elif store.check(["tokens"]) and own in (tokens := store.get("tokens")).decode().split():
                store.set(f"confirmed/{rank}", tokens)
            if store.check(["start"]) and own in (start := store.get("start").decode()).split():
                return dist.PrefixStore(hashlib.sha256(start.encode()).hexdigest(), store)
            time.sleep(0.02)
    except (dist.DistError, RuntimeError) as error:  # the store is not there, or has gone with rank 0
        why = str(error).splitlines()[0].rstrip(".")
    who = f"rank {', '.join(map(str, missing))}" if missing else "others"
    raise UserError(f"rank {rank}: {who} did not come to {host}:{port} ({why}): look for why they did not start", here=True)


def _number(name: str, least: int) -> int:
    text = os.environ.get(name, str(least))
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"environment variable {name}: {text!r} is no number from {least} up: unset it, or let torchrun set it")
    return int(text)


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of handing each back to the kernel and faulting its pages in again.

    With GPT-2 124M on 2 cores that cost 5 s of system time in 5 DPO steps, 1 s with this; the peak stayed where it was.
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # malloc.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_max, 0), libc.mallopt(trim_threshold, 2**31 - 1), libc.mallopt(top_pad, 64 << 20)
    except (OSError, AttributeError):
        pass  # another C library: only slower


# --- the model over several processes -----------------------------------------------------------------------------------


def shard(model: nn.Module, compute: Compute, replicate: int = 0, needed: int = 0) -> None:
    """Shard a model (on the meta device, with `.blocks`) over all processes: each block, then the rest, is gathered when used.

    Parameters are gathered in `compute.dtype`; shards, gradients' sums and the optimizer are float32. `replicate` copies of
    the sharded model share the work (hybrid sharding: make it the number of nodes); 0 = one a process, so that nothing but
    gradients travels, where there is room for whole copies (`fits`), else one in all. `needed`: the bytes of a whole copy, with
    gradients and optimizer. Raises UserError if it does not divide the number of processes. One process: does nothing.
    """
    if compute.world % (replicate or 1):
        raise UserError(f"key replicate: {compute.world} processes cannot hold {replicate} copies of equal size")
    if compute.world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh

    if not replicate:
        replicate = compute.world if all(compute.gather(fits(needed, compute))) else 1
    sizes = (replicate, compute.world // replicate)
    mesh = init_device_mesh(compute.device.type, sizes, mesh_dim_names=("replicate", "shard"))
    wrap(model, mesh if replicate > 1 else mesh["shard"], compute.dtype)


def fits(needed: int, compute: Compute) -> bool:
    """Whether each process has room for a whole copy of so many bytes. On a CPU they may share one machine's memory."""
    sharers = compute.world if compute.device.type == "cpu" else 1
    return ROOM * needed <= compute.memory / sharers


def wrap(model: nn.Module, mesh, dtype: torch.dtype) -> None:
    """fully_shard on every block and on the rest. Activations keep the dtypes that autocast gives them, as in one process."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        # embeddings and the last norm stay float32: bfloat16 there moves a completion's log-prob by tenths of a nat
        fully_shard(module, mesh=mesh, mp_policy=exact if module is model else policy)
        module.set_gradient_divide_factor(1.0)  # every rank's loss is its share of the global mean: sum, do not average
        module.set_force_sum_reduction_for_comms(True)  # … in a way that gloo knows too
    register_fsdp_forward_method(model, "inside")


def fill(model: nn.Module, tensors: Iterator[tuple[str, Tensor]], compute: Compute) -> None:
    """Give a model on the meta device its memory, on `compute.device`, and its weights, which only rank 0 reads.

    tensors: on rank 0 (name, whole float32 tensor) of every parameter, in any order; nothing is read from it elsewhere. Each
    is cast to its parameter's dtype. A tensor at a time travels, so that a rank never holds more than its own part and that
    tensor.
    """
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    if compute.world == 1:
        model.load_state_dict({name: tensor.to(dtypes[name]) for name, tensor in tensors}, assign=True)
        model.to(compute.device)
        return
    from torch.distributed.tensor import DTensor, distribute_tensor

    model.to_empty(device=compute.device)
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    here: list[Tensor] = []  # on rank 0 the tensor whose name the others are told

    def read_next() -> str | None:
        name, tensor = next(tensors, (None, None))
        if name is not None:
            here.append(tensor)
        return name

    while (name := compute.once(read_next)) is not None:
        p = parameters[name]
        # memory that nobody writes to takes no room
        like = {"device": compute.device, "dtype": dtypes[name]}
        tensor = here.pop().to(**like) if here else torch.empty(p.shape, **like)
        with torch.no_grad():
            if isinstance(p, DTensor):
                p.to_local().copy_(distribute_tensor(tensor, p.device_mesh, p.placements).to_local())
            else:
                dist.broadcast(tensor, 0)
                p.copy_(tensor)
        missing.discard(name)
    assert not missing, f"no weights for {missing}"


def own(p: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    return p.to_local() if hasattr(p, "to_local") else p


def sync_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass adds up the gradients of all ranks: worth it only in a step's last micro-batch.

    Until then the blocks' weights stay gathered: they do not change within a step."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)
        for block in model.blocks:
            block.set_reshard_after_forward(now, recurse=False)
            block.set_reshard_after_backward(now, recurse=False)


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients, a scalar, the same on every rank: by one exchange of a number."""
    norm = torch.nn.utils.get_total_norm([own(g) for g in gradients])
    mesh = getattr(gradients[0], "device_mesh", None)
    if mesh is not None and mesh["shard"].size() > 1:
        squares = norm.square()
        dist.all_reduce(squares, group=mesh.get_group("shard"))
        norm = squares.sqrt()
    return norm
