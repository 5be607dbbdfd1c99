"""Runs our Gluon kernels on a CPU, and fails where one of them is out of step with whom it shares memory with.

Triton's interpreter does not know Gluon. Here a kernel's Python function runs once for each program, with names of its
module (gl, mbarrier, ...) replaced by what is below; values are torch tensors. Layouts are not looked at (the compiler
does that: compile_kernels.py), but for the order of a shared buffer's columns. What is asynchronous counts as under
way until it is waited for; a program runs alone until it waits for another one, and so does a partition of its warps.
Not as on a GPU: integers do not overflow, // and % round down, and `a += b` changes whatever else is named `a`'s value.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from types import FunctionType, SimpleNamespace
from typing import Any, NoReturn

import torch
from gluon_memory import Barrier, Barriers, Blocks, Fault, Memory, Pointer, Shared, check
from torch import Tensor
from triton import language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SHARED_BYTES = 227 << 10
"""Shared memory that a program may have on sm_90."""
TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
Fresh = Mapping[str, Callable[[dict[str, Any]], Tensor] | None]
"""Names of the arguments that the predecessor writes; None: all of it, else bool, where, by the arguments."""


def _split(pairs: Tensor) -> tuple[Tensor, Tensor]:
    first, second = pairs.unbind(-1)
    return first, second


def _where(condition: Any, yes: Any, no: Any) -> Tensor:
    return torch.where(*map(torch.as_tensor, (condition, yes, no)))


class _Swizzles:
    """Layouts of shared memory; a kernel's types are torch's here."""

    def __call__(self, width: int, bits: int, rank: int) -> gl.NVMMASharedLayout:
        return gl.NVMMASharedLayout(width, bits, rank=rank)

    def get_default_for(self, shape: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
        return gl.NVMMASharedLayout.get_default_for(shape, TYPES[dtype])


STATELESS: dict[str, Any] = {
    "arange": lambda start, end, layout: torch.arange(start, end, dtype=torch.int32),
    "zeros": lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
    "full": lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    "convert_layout": lambda value, layout: value,
    "reshape": torch.reshape, "permute": torch.permute, "split": _split,
    "sum": torch.sum, "max": torch.amax, "maximum": torch.maximum, "where": _where, "abs": torch.abs,
    "minimum": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)), "floor": torch.floor,
    "exp2": torch.exp2, "log2": torch.log2, "rsqrt": torch.rsqrt, "static_range": range,
    "cdiv": lambda a, b: (a + b - 1) // b, "float8e4nv": torch.float8_e4m3fn,
    "float32": torch.float32, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64,
    "BlockedLayout": gl.BlockedLayout, "SliceLayout": gl.SliceLayout, "DotOperandLayout": gl.DotOperandLayout,
    "SwizzledSharedLayout": gl.SwizzledSharedLayout, "SharedLinearLayout": gl.SharedLinearLayout,
    "NVMMADistributedLayout": gl.NVMMADistributedLayout, "NVMMASharedLayout": _Swizzles(),
}  # fmt: skip
"""What `gl` has that concerns neither memory nor other programs."""
OF_BITS: dict[str, Callable[[Tensor], Tensor]] = {
    "leading_bits": lambda values: (values.view(torch.int32) & -(1 << 20)).view(torch.float32),
    "low_nibbles": lambda values: (values & 15).float() * 2**-9,
    "high_nibbles": lambda values: (values >> 4 & 15).float() * 2**-9,
    "scales_of": lambda meta: meta.to(torch.int16).view(torch.float16).float(),
    "zeros_of": lambda meta: (meta >> 16).to(torch.int16).view(torch.bfloat16).float() - 128,
    "points_of": lambda meta: (meta >> 16).to(torch.int16).view(torch.bfloat16),
    "values_of": lambda words, points, plane: ((words >> (4 * plane) & 15) + 128).bfloat16() - points,
}
"""Functions of row_kernels.py and wide_kernels.py that take numbers for what their bits say."""


class Pending:
    """The accumulator of products that may be under way."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def _refuse(self, *_other: object) -> NoReturn:
        raise Fault("an accumulator is read while its product is under way")

    __getattr__ = __getitem__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __truediv__ = _refuse


class Program:
    """One program of a launch: what it has under way, and what names of its kernel stand for."""

    def __init__(self, ids: tuple[int, ...], pdl: bool) -> None:
        self.ids = ids
        self.give_way: Callable[[], None]  # set by the strand that runs it, or a partition
        self.changes = 0
        """Of what others may wait for, by now."""
        self.divided = False
        """Whether it is partitions of its warps that run."""
        self.polled: int | None = None
        """What it has read last of a counter, if it has changed nothing since."""
        self.waited = not pdl
        """Whether it sees what the predecessor writes."""
        self.shared_bytes = 0
        self.loads: list[tuple[Shared, Barrier, Tensor]] = []
        self.products: list[tuple[Pending, Shared | Tensor, Shared]] = []
        self.unfenced: list[Shared | Barrier] = []
        """What its threads have written, not visible yet to what is asynchronous."""
        self.unpublished = False
        """Whether not all of its threads know of what they have stored."""
        own = {"load": self.load, "store": self.store, "atomic_add": self.atomic_add}
        own |= {"allocate_shared_memory": self.allocate, "program_id": lambda axis: torch.tensor(self.ids[axis])}
        own["warp_specialize"] = self.divide
        cuda = SimpleNamespace(gdc_launch_dependents=lambda: None, gdc_wait=self.gdc_wait)
        self.names = OF_BITS | {
            "gl": SimpleNamespace(**STATELESS, **own),
            "tl": SimpleNamespace(
                extra=SimpleNamespace(cuda=cuda), sigmoid=torch.sigmoid, erf=torch.erf,
                static_assert=partial(check, message="static_assert"),
            ),
            "mbarrier": SimpleNamespace(
                init=self.init, expect=self.expect, arrive=self.arrive, wait=self.wait,
                MBarrierLayout=mbarrier.MBarrierLayout,
            ),
            "load_block": self.load_block, "all_threads": self.all_threads, "fence_async_shared": self.fence,
            "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.wait_for_products,
            "quick_silu": torch.nn.functional.silu,
        }  # fmt: skip

    def bound(self, function: FunctionType) -> FunctionType:
        """The function, and those that it calls, with these names."""
        names = {}
        for name in {*function.__code__.co_names} & (self.names.keys() | function.__globals__.keys()):
            value = self.names.get(name, function.__globals__.get(name))
            if isinstance(value, tl.constexpr):
                value = value.value
            elif isinstance(kernel := getattr(value, "fn", None), FunctionType):
                value = self.bound(kernel)
            names[name] = value
        return FunctionType(function.__code__, names, function.__name__, function.__defaults__)

    def run(self, kernel: Callable[..., None], arguments: dict[str, Any]) -> None:
        kernel(**arguments)
        check(not self.loads and not self.products, "a program ends while something of it is under way")

    # ------------------------------------------------------------------ global memory

    def gdc_wait(self) -> None:
        self.waited = True

    def load(self, pointer: Pointer, mask: Any = None, other: Any = None, cache_modifier: str = "") -> Tensor:
        places, live = pointer.places(mask)
        values = pointer.memory.seen(self.waited)[places]
        if other is None:
            other = float("nan") if values.is_floating_point() else 1 << 30
        return torch.where(live, values, other)

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        memory = pointer.memory
        check(self.waited, f"{memory.name} is written before gdc_wait")
        places, live = pointer.places(mask)
        values = torch.as_tensor(value).to(memory.like.dtype).expand(places.shape)[live]
        places = places[live]
        again = memory.written[places].any() or len(places.unique()) < len(places)
        check(not again, f"{memory.name} is written twice")
        memory.written[places] = True
        memory.final[places] = values
        self.unpublished, self.polled = True, None
        self.changes += 1

    def all_threads(self) -> None:
        self.unpublished = False

    def atomic_add(self, pointer: Pointer, value: int, sem: str, scope: str) -> int:
        """Who adds zero twice waits for others: they have their turn."""
        counter = pointer.memory
        check(self.waited, f"{counter.name} is written before gdc_wait")
        check(not (self.unpublished and sem in ("release", "acq_rel")), "not all threads have stored what is released")
        place, _live = pointer.places(None)
        if value == 0 and self.polled == int(counter.final[place]):
            self.give_way()
        old = int(counter.final[place])
        counter.final[place] = old + value
        self.polled = old if value == 0 else None
        self.changes += value != 0
        return old

    # ------------------------------------------------------------------ shared memory

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared | Barriers:
        if isinstance(layout, mbarrier.MBarrierLayout):
            return Barriers([Barrier() for _ in range(shape[0])])
        nothing = float("nan") if dtype.is_floating_point else 85
        memory = torch.full((torch.Size(shape).numel(),), nothing, dtype=dtype)
        self.shared_bytes += memory.nbytes
        check(self.shared_bytes <= SHARED_BYTES, f"{self.shared_bytes} bytes of shared memory")
        return Shared(self, memory, 0, tuple(shape), layout)

    def fence(self) -> None:
        self.unfenced.clear()

    def reads(self, buffer: Shared, asynchronous: bool = False) -> None:
        """Fail unless a buffer can be read now."""
        check(not any(buffer.overlaps(target) for target, _, _ in self.loads), "a buffer is read before it is loaded")
        check(not (asynchronous and any(map(buffer.overlaps, self.unfenced))), "no fence between a store and its use")

    def writes(self, buffer: Shared) -> None:
        """Fail unless a buffer can be written now; whoever does it."""
        check(not any(buffer.overlaps(target) for target, _, _ in self.loads), "a buffer is written while it is loaded")
        used = any(buffer.overlaps(operand) for _, *operands in self.products for operand in operands)
        check(not used, "a buffer is written while a product reads it")

    def stores(self, buffer: Shared) -> None:
        """Fail unless its threads can write a buffer now, and keep in mind that they do."""
        self.writes(buffer)
        self.unfenced.append(buffer)

    def init(self, barrier: Barrier, count: int) -> None:
        check(barrier.count == 0, "a barrier is initialised twice")
        barrier.count = barrier.missing = count
        self.unfenced.append(barrier)

    def expect(self, barrier: Barrier, nbytes: int) -> None:
        check(barrier.missing > 0, "a barrier is armed again before its phase has been waited for")
        barrier.missing -= 1
        barrier.nbytes += nbytes

    def arrive(self, barrier: Barrier, count: int) -> None:
        """Whoever waits for it goes on before the one who arrives."""
        check(barrier.missing >= count, "a barrier has an arrival too much before its phase has been waited for")
        barrier.missing -= count
        self.changes += 1
        if self.divided:
            self.give_way()

    def load_block(self, blocks: Blocks, first: list[Any], barrier: Barrier, target: Shared) -> None:
        check(barrier.count and barrier not in self.unfenced, "no fence after a barrier's initialisation")
        check(not any(map(target.overlaps, self.unfenced)), "no fence between a store and a load into its buffer")
        check(target.layout == blocks.layout, f"a block of {blocks.layout} in a buffer of {target.layout}")
        self.writes(target)
        self.loads.append((target, barrier, blocks.block(first, self.waited)))
        self.changes += 1

    def wait(self, barrier: Barrier, phase: int) -> None:
        """Wait until a phase of this parity is complete: the current one, or the one before it, which is."""
        check(barrier.count, "a barrier is not initialised")
        if barrier.completed % 2 != phase:
            return
        while not self._complete(barrier):
            missing = f"{barrier.missing} arrivals and {barrier.nbytes} bytes are missing"
            check(self.divided, f"a barrier's phase never completes: {missing}")
            self.give_way()
        barrier.completed += 1
        barrier.missing = barrier.count
        self.changes += 1

    def _complete(self, barrier: Barrier) -> bool:
        """Let its loads arrive; whether that was all."""
        for target, _, values in [load for load in self.loads if load[1] is barrier]:
            target.fill(values)
            barrier.nbytes -= target.nbytes
        self.loads = [load for load in self.loads if load[1] is not barrier]
        return barrier.missing == barrier.nbytes == 0

    # ------------------------------------------------------------------ partitions

    def divide(self, partitions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> Any:
        """Run functions side by side until each waits; returns the first one's results."""
        check(not self.divided and len(warps) == len(registers) == len(partitions) - 1, "partitions")
        whole, self.divided = self.give_way, True
        strands = [_Strand(self, partial(function, *arguments)) for function, arguments in partitions]
        _side_by_side(strands)
        self.give_way, self.divided = whole, False
        return strands[0].result

    # ------------------------------------------------------------------ products

    def multiply(
        self, a: Shared | Tensor, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False
    ) -> Pending:
        check(is_async, "a product that is waited for at once")
        for operand in (a, b):
            if isinstance(operand, Shared):
                self.reads(operand, asynchronous=True)
        left = a.values() if isinstance(a, Shared) else a
        product = left.float() @ b.values().float()
        before = acc.value if isinstance(acc, Pending) else acc
        check(before.shape == product.shape, "an accumulator of another shape")
        pending = Pending(before + product if use_acc else product)
        self.products.append((pending, a, b))
        return pending

    def wait_for_products(self, outstanding: int, deps: list[Any]) -> Any:
        self.products = self.products[max(0, len(self.products) - outstanding) :]
        left = [pending for pending, _, _ in self.products]
        results = [x if x in left or not isinstance(x, Pending) else x.value for x in deps]
        return results[0] if len(results) == 1 else tuple(results)


class _Stopped(BaseException):
    """Ends a program whose launch has failed."""


class _Strand(threading.Thread):
    """Runs a program or a partition of it, when it is told to and until it gives way."""

    def __init__(self, program: Program, body: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.program, self.body = program, body
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.ended = self.stopped = False
        self.result: Any = None

    def run(self) -> None:
        self.go.acquire()
        try:
            self.result = self.body()
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.ended = True
        self.back.release()

    def _give_way(self) -> None:
        self.back.release()
        self.go.acquire()
        if self.stopped:
            raise _Stopped

    def resume(self) -> None:
        """Let it run until it gives way, or to its end; raise what it raises."""
        self.program.give_way = self._give_way
        if self.ident is None:
            self.start()
        self.go.release()
        self.back.acquire()
        if self.error is not None:
            raise self.error


def _side_by_side(strands: list[_Strand]) -> None:
    """Run them in turns to their end; fail when each waits for others."""
    waiting, idle = deque(strands), 0
    try:
        while waiting:
            strand = waiting.popleft()
            before = strand.program.changes
            strand.resume()
            idle = idle + 1 if strand.program.changes == before and not strand.ended else 0
            if not strand.ended:
                waiting.append(strand)
            check(idle <= len(waiting), "each waits for others")
    finally:
        for strand in waiting:
            if strand.ident is not None and not strand.ended:
                strand.stopped = True
                strand.resume()


class Emulated:
    """Stands for a kernel where it is launched: `Emulated(kernel, fresh)[grid](*arguments)`. Raises Fault."""

    def __init__(self, kernel: Any, fresh: Fresh) -> None:
        self.kernel, self.fresh = kernel, fresh

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._run, grid)

    def _run(
        self, grid: tuple[int, ...], *args: Any, num_warps: int = 4, launch_pdl: bool = False, **more: Any
    ) -> None:
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | more
        check(given.keys() == set(self.kernel.arg_names), f"arguments {sorted(given)}")
        arguments = {name: self._argument(name, value, given) for name, value in given.items()}
        strands = []
        for ids in product(*map(range, grid)):
            program = Program(ids, launch_pdl)
            strands.append(_Strand(program, partial(program.run, program.bound(self.kernel.fn), arguments)))
        _side_by_side(strands)

    def _argument(self, name: str, value: Any, given: dict[str, Any]) -> Any:
        """What a kernel has of it."""
        tensor = value.base if isinstance(value, TensorDescriptor) else value
        if not isinstance(tensor, Tensor):
            return value
        fresh = None
        if name in self.fresh:
            where = self.fresh[name]
            fresh = torch.tensor(True) if where is None else where(given)
        return Pointer(Memory(name, tensor, fresh)) if tensor is value else Blocks(name, value, fresh)
