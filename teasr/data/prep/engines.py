"""Run one idempotent task over many specs: in this process, in local processes, or as Ray tasks.

A task is `task(spec, on_done) -> result`. It writes its output itself, can be repeated at any time, and calls
`on_done(n)` each time n more units of work are done. Several machines without Ray share a job through RANK and
WORLD_SIZE (see `my_part`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from teasr.util.optional import needed_for

S = TypeVar("S")
R = TypeVar("R")
Task = Callable[[S, Callable[[int], None]], R]
ATTEMPTS = 3  # attempts per spec when its worker dies


def my_part(specs: Sequence[S], rank: int, world: int) -> list[S]:
    """The specs of one rank: every `world`-th, starting at `rank`."""
    return list(specs[rank::world])


def split_from_environment() -> tuple[int, int]:
    """(rank, world) from RANK and WORLD_SIZE, (0, 1) without them. Raises ValueError when they are invalid."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdigit() and world.isdigit() and int(rank) < int(world)):
        raise ValueError(f"RANK={rank} WORLD_SIZE={world}: RANK must be 0 .. WORLD_SIZE - 1")
    return int(rank), int(world)


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(task: Task, specs: Sequence[S], engine: str, workers: int, on_done: Callable[[int], None]) -> list[R]:
    """Run `task` on every spec and return the results in the order of the specs.

    `on_done(n)` is called each time n more units of work are done; n is negative when a worker was lost and its
    progress is undone. An error in a task stops the job. Raises OSError when a spec lost its worker `ATTEMPTS` times.
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
    """Worker processes that take specs one at a time; a worker that dies is replaced and its spec is run again."""

    def __init__(self, task: Task, specs: Sequence[S], on_done: Callable[[int], None]):
        self.task, self.specs, self.on_done = task, specs, on_done
        self.todo = deque(range(len(specs)))
        self.attempts = [0] * len(specs)
        self.results: dict[int, Any] = {}
        self.workers: dict[Connection, multiprocessing.process.BaseProcess] = {}
        self.at_work: dict[Connection, list[int]] = {}  # [index of the spec, units reported so far]

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
            with contextlib.suppress(OSError):  # the worker is dead: the next wait() reports it and it is replaced
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
                    f"a worker process died {ATTEMPTS} times on the same task "
                    f"(exit code {process.exitcode}; -9 usually means that "
                    "memory ran out): use fewer workers"
                )
            self.todo.appendleft(spec)
        if self.todo:
            self._start_worker()


def _serve(end: Connection, task: Task) -> None:
    """Main loop of a worker: receive specs, send progress and results, until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops its workers
    try:
        while True:
            spec = end.recv()
            try:
                message = ("result", task(spec, lambda n: end.send(("done", n))))
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:
                message = ("error", error)
            except MemoryError:
                message = ("error", OSError("memory ran out: use fewer workers"))
            except Exception:  # our own mistake, which would come again in a new worker: the parent raises it
                message = ("error", RuntimeError(f"in a worker:\n{traceback.format_exc()}"))
            end.send(message)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has exited, so this worker exits too


def _run_ray(task: Task, specs: Sequence[S], on_done: Callable[[int], None]) -> list[R]:
    """Run as Ray tasks on the cluster named by RAY_ADDRESS, or on this machine.

    Ray itself retries the tasks of lost workers and nodes.
    """
    with needed_for("--engine ray"):
        import ray
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False, logging_level="error")
    remote = ray.remote(num_cpus=1, max_retries=ATTEMPTS)(_ray_task)
    results: list[Any] = [None] * len(specs)
    todo, at_work = deque(range(len(specs))), {}
    try:
        while todo or at_work:
            # Keep about two tasks per core submitted: enough to keep every core busy, few enough for the object store.
            while todo and len(at_work) < 2 + 2 * ray.cluster_resources().get("CPU", 1):
                i = todo.popleft()
                at_work[remote.remote(task, specs[i])] = i
            ready, _ = ray.wait(list(at_work), num_returns=1)
            results[at_work.pop(ready[0])], done = ray.get(ready[0])
            on_done(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ValueError | OSError) else error from None
    except ray.exceptions.RayError as error:
        raise OSError(f"Ray could not run a task: {' '.join(str(error).split())[:300]}") from error
    finally:
        ray.shutdown()
    return results


def _ray_task(task: Task, spec: Any) -> tuple[Any, int]:
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n

    return task(spec, count), done
