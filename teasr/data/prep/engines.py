"""Ways to run one pure task over many specs: in this process, in local processes, or as Ray tasks.

A task is `task(spec, on_done) -> result`; it commits what it makes by itself, so that it can be repeated at any time, and calls
`on_done(n)` as n units of work are through. Several machines without Ray share a job by RANK and WORLD_SIZE, see `my_part`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

S = TypeVar("S")
R = TypeVar("R")
Task = Callable[[S, Callable[[int], None]], R]
ATTEMPTS = 3  # how often a spec may lose its worker


def my_part(specs: Sequence[S], rank: int, world: int) -> list[S]:
    """The static split: every `world`-th spec."""
    return list(specs[rank::world])


def split_from_environment() -> tuple[int, int]:
    """(rank, world) from RANK and WORLD_SIZE, (0, 1) without them. ValueError when they make no sense."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise ValueError(f"RANK={rank} WORLD_SIZE={world}: RANK must be 0 .. WORLD_SIZE - 1")
    return int(rank), int(world)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(task: Task, specs: Sequence[S], engine: str, workers: int, on_done: Callable[[int], None]) -> list[R]:
    """Results in the order of the specs. `on_done(n)`: n more units are through (fewer, when a worker was lost).

    The error of a task stops the job; OSError when a spec lost its worker `ATTEMPTS` times.
    """
    if engine == "ray":
        return _run_ray(task, specs, on_done)
    if workers <= 1 or len(specs) <= 1:
        return [task(spec, on_done) for spec in specs]
    pool = _Pool(task, specs, on_done)
    try:
        return pool.run(min(workers, len(specs)))
    finally:
        pool.stop()


class _Pool:
    """Processes that take specs one by one; one that dies is replaced and its spec is done again."""

    def __init__(self, task: Task, specs: Sequence[S], on_done: Callable[[int], None]):
        self.task, self.specs, self.on_done = task, specs, on_done
        self.todo = deque(range(len(specs)))
        self.attempts = [0] * len(specs)
        self.results: dict[int, Any] = {}
        self.workers: dict[Connection, multiprocessing.process.BaseProcess] = {}
        self.at_work: dict[Connection, list[int]] = {}  # [spec, units reported so far]

    def run(self, workers: int) -> list:
        for _ in range(workers):
            self._start_worker()
        while len(self.results) < len(self.specs):
            for end in wait(list(self.workers)):
                try:
                    kind, value = end.recv()
                except (EOFError, OSError):
                    self._replace(end)
                    continue
                if kind == "done":
                    self.at_work[end][1] += value
                    self.on_done(value)
                elif kind == "error":
                    raise value
                else:
                    self.results[self.at_work.pop(end)[0]] = value
                    self._assign(end)
        return [self.results[i] for i in range(len(self.specs))]

    def stop(self) -> None:
        for end, process in self.workers.items():
            end.close()
            process.terminate()
        for process in self.workers.values():
            process.join()

    def _start_worker(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_serve, args=(theirs, self.task), daemon=True)
        process.start()
        theirs.close()
        self.workers[ours] = process
        self._assign(ours)

    def _assign(self, end: Connection) -> None:
        if self.todo:
            spec = self.todo.popleft()
            self.at_work[end] = [spec, 0]
            self.attempts[spec] += 1
            with contextlib.suppress(OSError):  # it is dead: the next wait says so and replaces it
                end.send(self.specs[spec])

    def _replace(self, end: Connection) -> None:
        process = self.workers.pop(end)
        process.join()
        end.close()
        if end in self.at_work:
            spec, done = self.at_work.pop(end)
            self.on_done(-done)
            if self.attempts[spec] >= ATTEMPTS:
                raise OSError(
                    f"a worker died {ATTEMPTS} times over the same part (exit code {process.exitcode}; -9 is most often "
                    "a lack of memory): use fewer workers"
                )
            self.todo.appendleft(spec)
        if self.todo:
            self._start_worker()


def _serve(end: Connection, task: Task) -> None:
    """A worker: specs in, units of work and results out, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops its workers
    try:
        while True:
            spec = end.recv()
            try:
                message = ("result", task(spec, lambda n: end.send(("done", n))))
            except (ValueError, OSError) as error:
                if isinstance(error, BrokenPipeError):
                    raise
                message = ("error", error)
            end.send(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has ended: so do we


def _run_ray(task: Task, specs: Sequence[S], on_done: Callable[[int], None]) -> list[R]:
    """Ray tasks on the cluster that RAY_ADDRESS names, or on this machine; lost workers and nodes are retried by Ray."""
    try:
        import ray
    except ImportError:
        raise ValueError("engine ray needs Ray: pip install 'teasr[ray]', or use --engine local") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False, logging_level="error")
    remote = ray.remote(num_cpus=1, max_retries=ATTEMPTS)(_ray_task)
    results: list[Any] = [None] * len(specs)
    todo, at_work = deque(range(len(specs))), {}
    try:
        while todo or at_work:
            # A few tasks a core ahead: enough to keep every core busy, few enough to hold in the object store.
            while todo and len(at_work) < 2 + 2 * ray.cluster_resources().get("CPU", 1):
                i = todo.popleft()
                at_work[remote.remote(task, specs[i])] = i
            ready, _ = ray.wait(list(at_work), num_returns=1)
            results[at_work.pop(ready[0])], done = ray.get(ready[0])
            on_done(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ValueError | OSError) else error from None
    except ray.exceptions.RayError as error:
        raise OSError(
            f"Ray gave up on a part: {' '.join(str(error).split())[:300]}; what is finished is kept"
        ) from error
    finally:
        ray.shutdown()
    return results


def _ray_task(task: Task, spec: Any) -> tuple[Any, int]:
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n

    return task(spec, count), done
