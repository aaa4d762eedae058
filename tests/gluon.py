"""Runs a kernel in Gluon for Hopper on a CPU, in a random order of everything that may overlap.

Each partition of warps is a thread, and one thread at a time goes on, from one call of Gluon to the
next. Copies, products and stores happen at any time between their begin and the wait for them.
An order in which nobody can go on is a deadlock; reading what is not there yet, and writing over
what is still read, are errors, as is what one warp does before another one could know of it.
"""

import random
import threading
from types import SimpleNamespace

import torch

Hazard = type("Hazard", (AssertionError,), {})


def check(holds, message: str):
    if not holds:
        raise Hazard(message)


class Tile(torch.Tensor):
    """A tensor in registers."""

    type = SimpleNamespace(layout=None)

    def split(self):
        return self[..., 0], self[..., 1]


def tile(t: torch.Tensor) -> Tile:
    return t.as_subclass(Tile)


class Descriptor:
    """A matrix in global memory, which is copied by blocks."""

    def __init__(self, t: torch.Tensor, *block: int):
        self.t, self.dtype, self.layout = t, t.dtype, None
        nbytes = block[0] * block[1] * t.itemsize
        self.block_type = SimpleNamespace(shape=[*block], nbytes=nbytes)

    def at(self, place: list[int]) -> tuple:
        return tuple(slice(a, a + b) for a, b in zip(place, self.block_type.shape, strict=True))


class Barrier:
    def __init__(self):
        self.phase, self.arrivals, self.bytes = 0, None, 0

    def end_phase(self):
        if self.arrivals == self.bytes == 0:
            self.phase, self.arrivals = self.phase + 1, 1


class Buffer:
    """A tile in shared memory."""

    def __init__(self, program, shape, dtype):
        self.program, self.dtype = program, dtype
        self.value = torch.full(shape, torch.nan, dtype=torch.float32)
        self.filling = self.multiplied = 0  # copies and products under way
        self.stores = []  # copies to global memory that not all warps know the end of
        self.written = None  # by threads: "raw", "fenced", None where all can see it
        self.read = False  # by threads, since they met
        self.user = None  # the threads that did either

    def permute(self, order):
        return SimpleNamespace(buffer=self, transposed=True)

    def load(self, layout):
        self.program.pause()
        check(not self.filling, "threads read a tile that is not there yet")
        self.read, self.user = True, threading.current_thread()
        return tile(self.value.clone())

    def store(self, t):
        self.program.pause()
        check(not self.stores, "threads write over what is copied out")
        check(not self.read, "threads write over what others may not have read")
        check(not self.filling, "threads write where a copy arrives")
        check(t.dtype == self.dtype and t.shape == self.value.shape, "another tile")
        self.value, self.written = t.float().clone(), "raw"
        self.user = threading.current_thread()


class Memory:
    """Several tiles, or barriers, in shared memory."""

    def __init__(self, items, shape):
        self.items, self.type = items, SimpleNamespace(shape=shape)

    def index(self, i: int):
        check(0 <= i < len(self.items), f"no buffer {i} of {len(self.items)}")
        return self.items[i]


class Program:
    """A program of a grid. `globals` has what its kernel's page imports from Gluon."""

    def __init__(self, pid: int, programs: int, seed: int):
        self.pid, self.programs, self.random = pid, programs, random.Random(seed)
        self.workers, self.under_way, self.error, self.buffers = [], [], None, []
        self.haste = self.random.choice((0.0, 0.2, 0.8))  # with which others than the threads go on
        self.globals = dict(
            gl=self._language(),
            mbarrier=SimpleNamespace(
                MBarrierLayout=lambda: "barrier", init=self._init, wait=self._wait,
                expect=self._expect, arrive=self._arrive,
            ),
            tma=SimpleNamespace(store_wait=self._store_wait),
            copy_in=self._copy_in, copy_out=self._copy_out, meet=self._meet,
            hopper=SimpleNamespace(
                fence_async_shared=self._fence,
                warpgroup_mma=self._multiply, warpgroup_mma_wait=self._multiply_wait,
            ),
        )  # fmt: skip

    def _language(self):
        nothing = lambda *args, **kwargs: None
        return SimpleNamespace(
            constexpr=object, static_range=range, minimum=min, cdiv=lambda a, b: -(-a // b),
            program_id=lambda axis: self.pid, num_programs=lambda axis: self.programs,
            float32=torch.float32, int64=torch.int64, NVMMADistributedLayout=nothing,
            zeros=lambda shape, dtype, layout: tile(torch.full(shape, torch.nan, dtype=dtype)),
            allocate_shared_memory=self._allocate,
            warp_specialize=self._specialize,
        )  # fmt: skip

    # threads, and what happens beside them

    def pause(self, until=lambda: True):
        """Let others go on, and go on once `until` holds."""
        worker = threading.current_thread()
        if worker not in self.workers:  # the kernel itself, before its partitions begin
            check(until(), "deadlock")
            return
        worker.until = until
        self.back.release()
        worker.go.acquire()
        if self.error:
            raise SystemExit

    def _begin(self, happen, queue=None):
        """Something that happens later, after all of the same queue."""
        event = SimpleNamespace(happen=happen, done=False, queue=queue)
        self.under_way.append(event)
        return event

    def _specialize(self, partitions, warps, registers):
        self.back = threading.Semaphore(0)
        for function, args in partitions:
            worker = threading.Thread(target=self._work, args=(function, args), daemon=True)
            worker.go, worker.until, worker.ended = threading.Semaphore(0), lambda: True, False
            worker.products, worker.stores = [], []
            self.workers.append(worker)
            worker.start()
        while not self.error:
            waiting = [w for w in self.workers if not w.ended]
            queues = [e.queue for e in self.under_way]
            first = [
                e
                for i, e in enumerate(self.under_way)
                if e.queue is None or e.queue not in queues[:i]
            ]
            able = [w for w in waiting if w.until()]
            if first and (not able or self.random.random() < self.haste):
                # without haste the oldest is late, too
                able = first if self.haste else first[-1:]
            if not able:
                self.error = Hazard("deadlock") if waiting else None
                break
            chosen = self.random.choice(able)
            if chosen in first:
                self.under_way.remove(chosen)
                chosen.happen()
                chosen.done = True
            else:
                chosen.go.release()
                self.back.acquire()
        for worker in self.workers:
            worker.go.release()
        if self.error:
            raise self.error

    def _work(self, function, args):
        worker = threading.current_thread()
        worker.go.acquire()
        try:
            if not self.error:
                function(*args)
                check(all(event.done for event in worker.stores), "an end before that of copies")
        except BaseException as error:
            self.error = self.error or error
        worker.ended = True
        self.back.release()

    # shared memory

    def _allocate(self, dtype, shape, layout):
        if layout == "barrier":
            return Memory([Barrier() for _ in range(shape[0])], shape)
        buffers = [Buffer(self, shape[1:], dtype) for _ in range(shape[0])]
        self.buffers += buffers
        return Memory(buffers, shape)

    def _init(self, bar, count):
        bar.arrivals = count

    def _wait(self, bar, parity):
        self.pause(lambda: bar.phase & 1 != parity)

    def _arrive(self, bar, count=1, pred=True):
        self.pause()
        if pred:
            check(bar.arrivals is not None, "no barrier yet")
            bar.arrivals -= count
            check(bar.arrivals >= 0, "one arrival too many")
            bar.end_phase()

    def _expect(self, bar, nbytes):
        bar.bytes += nbytes
        self._arrive(bar)

    # copies

    def _copy_in(self, desc, place, bar, buffer):
        self.pause()
        check(desc.block_type.shape == [*buffer.value.shape], "another tile")
        check(not buffer.filling and not buffer.multiplied, "a copy into what is in use")
        check(not buffer.read, "a copy into what threads may not have read")
        check(all(s.waited for s in buffer.stores), "a copy into what is copied out")
        buffer.filling += 1
        buffer.stores, buffer.written = [], None

        def happen():
            block = desc.t[desc.at(place)].float()
            buffer.value = torch.zeros(desc.block_type.shape)
            buffer.value[: block.shape[0], : block.shape[1]] = block
            buffer.filling -= 1
            bar.bytes -= desc.block_type.nbytes
            bar.end_phase()

        self._begin(happen)

    def _copy_out(self, desc, place, buffer):
        self.pause()
        check(buffer.written is None, "a copy of what it cannot see yet")

        def happen():
            block = desc.t[desc.at(place)]
            block.copy_(buffer.value[: block.shape[0], : block.shape[1]])

        event = self._begin(happen)
        event.waited = False
        buffer.stores.append(event)
        threading.current_thread().stores.append(event)

    def _store_wait(self, pending):
        stores = threading.current_thread().stores
        older = stores[: len(stores) - pending] if pending else stores[:]
        self.pause(lambda: all(event.done for event in older))
        for event in older:
            event.waited = True

    def _fence(self):
        self.pause()
        for buffer in self._own():
            if buffer.written == "raw":
                buffer.written = "fenced"

    def _meet(self):
        self.pause()
        for buffer in self._own():
            buffer.read = False
            buffer.stores = [event for event in buffer.stores if not event.waited]
            if buffer.written == "fenced":
                buffer.written = None

    def _own(self):
        """The buffers that were last used by the threads that call."""
        return [b for b in self.buffers if b.user is threading.current_thread()]

    # products

    def _multiply(self, x, w, acc, use_acc, is_async):
        self.pause()
        worker, total = threading.current_thread(), getattr(acc, "total", None)
        if total is None:
            total = SimpleNamespace(value=acc, pending=0)
        w, turned = (w.buffer, True) if hasattr(w, "buffer") else (w, False)
        check(not x.filling and not w.filling, "a product of what is not there yet")
        for buffer in (x, w):
            buffer.multiplied += 1

        def happen():
            product = x.value @ (w.value.T if turned else w.value)
            total.value = tile(product + total.value if use_acc else product)
            for buffer in (x, w):
                buffer.multiplied -= 1

        worker.products.append(self._begin(happen, queue=worker))
        return SimpleNamespace(total=total)

    def _multiply_wait(self, pending, deps):
        products = threading.current_thread().products
        older = products[: len(products) - pending] if pending else products[:]
        self.pause(lambda: all(event.done for event in older))
        (acc,) = deps
        return acc if pending or not hasattr(acc, "total") else acc.total.value
