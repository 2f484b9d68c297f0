"""What is measured, on any device: seconds in interleaved rounds or of a CUDA graph, and bytes saved for a backward.

Caches are warm: the same call is repeated within a round. On a CPU a call is timed by the wall clock. On a GPU it is
timed by events on the stream, so an eager call that the host launches more slowly than the GPU works takes as long as
its launches.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

ROUND_S = {"cpu": 0.01, "cuda": 0.004}  # short calls are repeated within a round: long against the clock, a time slice
MOST_REPEATS = 50
LEAST_ROUNDS = 5


class WaitsForGPU(RuntimeError):
    """A step that reads something back from the GPU."""


Step = Callable[[], object]


def interleaved(
    steps: dict[str, Step],
    device: torch.device,
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds per call of every step: one value per round, the same round at the same place of every list.

    Args:
        steps: by name. In each round, each runs once, or several times in a row where it is short.
        device: on which they work.
        rounds: at most that many.
        seconds: no new round after that long, but `LEAST_ROUNDS` in any case.
        clock: of a CPU, in seconds; `time.process_time` leaves out what a call of one thread waits for other jobs.
    """
    repeats = {}
    for name, step in steps.items():
        step()  # compiled, memory touched
        once = max(_timed(step, 1, device, clock)(), 1e-9)
        repeats[name] = max(1, min(MOST_REPEATS, int(ROUND_S[device.type] / once)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    began = clock()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and clock() - began > seconds:
            break
        readings = {name: _timed(step, repeats[name], device, clock) for name, step in steps.items()}
        for name, read in readings.items():
            times[name].append(read() / repeats[name])
    return times


def _timed(
    step: Step, repeats: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """Runs or enqueues the calls; what it returns gives their seconds, on a GPU after waiting for them."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            step()
        stop.record()

        def read() -> float:
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3

        return read
    began = clock()
    for _ in range(repeats):
        step()
    passed = clock() - began
    return lambda: passed


def captured(step: Step, calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of that many calls in a row.

    Raises:
        WaitsForGPU: the step does, so it cannot be captured. Found out before the capture starts, since a capture that
            breaks off can leave the process unusable.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize()
        try:
            with sync_forbidden():
                step()
        except RuntimeError as error:
            raise WaitsForGPU(str(error)) from error
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            step()
    return graph


@contextmanager
def sync_forbidden() -> Iterator[None]:
    """Within it torch raises where it would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def graph_seconds(step: Step, seconds: float, calls: int) -> float:
    """Seconds per call on the GPU alone: the median over replays of a graph of that many calls.

    Args:
        step: what to time.
        seconds: for all replays together, but 5 of them in any case.
        calls: in the graph.
    """
    graph = captured(step, calls)
    graph.replay()
    readings, began = [], time.perf_counter()
    while len(readings) < LEAST_ROUNDS or time.perf_counter() - began < seconds:
        readings.append(_timed(graph.replay, 1, torch.device("cuda"))() / calls)
    return sorted(readings)[len(readings) // 2]


def saved_bytes(run: Callable[[], Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes that a forward saves for its backward: distinct storages seen by autograd, without the parameters'.

    What a function keeps on its context without telling autograd is not seen.
    """
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}
    alive = []  # a storage that was freed could give its address to the next

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(kept.values())
