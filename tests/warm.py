"""Run Python programs for tests by forking a parent process that has already imported torch, DeepSpeed and MLflow.

This takes one second for each start instead of ten. `run` and `Popen` accept the commands and arguments of
`subprocess`. A Python script, `-m module` or the deepspeed launcher on one node is forked; any other command, or one
whose environment changes variables that are read at import time, is started as a real process. The forked launcher
behaves like DeepSpeed's: it sets each rank's environment, and when one rank fails it stops the others and exits with
the code of the failed rank.

Run as a program, this file is the parent: it reads JSON requests from standard input, one per line, and writes its
answers to standard output.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

IMPORTS = """
import numpy, cv2, PIL.Image, scipy.special, torch, torch.distributed, torch.utils.checkpoint, torch._dynamo, \
safetensors.torch, webdataset
import torchvision, lpips, peft, accelerate, deepspeed, deepspeed.ops, deepspeed.runtime.zero.stage3, \
deepspeed.runtime.zero.stage_1_and_2
import deepspeed.utils, mlflow, mlflow.entities, mlflow.tracking.client, \
mlflow.store.tracking.sqlalchemy_store, skimage.data
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
import teasr.training.trainer, teasr.training.footprint, teasr.backbones.tiny, \
teasr.backbones.qwen_image.backbone, teasr.methods.teasr
import teasr.restore.upscaler, teasr.restore.batch, teasr.evaluation.benchmark, teasr.data.prep.job
"""
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "DS_ACCELERATOR", "OMP_NUM_THREADS", "PYTHONPATH")


class _Parent:
    """The warm process of this test session, started on first use."""

    def __init__(self):
        self.process: subprocess.Popen | None = None
        self.codes: dict[int, int] = {}
        self.started = self.ended = None
        self.dead = False
        self.lock = threading.Lock()

    def fork(self, request: dict) -> int:
        """Fork a child for `request` and return its process id."""
        with self.lock:
            if self.process is None:
                self._start()
            self.started.clear()
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            self.started.wait()
            assert not self.dead, "the warm parent has died"
            return self.pid

    def _start(self) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.started, self.ended = threading.Event(), threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            answer = json.loads(line)
            if "pid" in answer:
                self.pid = answer["pid"]
                self.codes.pop(self.pid, None)  # of an earlier process with this number
                self.started.set()
            else:
                with self.ended:
                    self.codes[answer["ended"]] = answer["code"]
                    self.ended.notify_all()
        with self.ended:
            self.dead = True
            self.ended.notify_all()
        self.started.set()


_PARENT = _Parent()


class _Forked:
    """A forked child with the parts of subprocess.Popen's interface that tests use."""

    def __init__(self, request: dict, merge: bool, text: bool):
        self.text, self.returncode = text, None
        self._out, self._err = (Path(tempfile.mkstemp(prefix=f"warm-{name}-")[1]) for name in ("out", "err"))
        self.pid = _PARENT.fork(request | {"out": str(self._out), "err": None if merge else str(self._err)})
        self.stdout, self.stderr = (
            open(path, "r" if text else "rb")  # noqa: SIM115
            for path in (self._out, self._err)
        )

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _PARENT.codes.get(self.pid)
            if self.returncode is not None:
                for path in (self._out, self._err):
                    path.unlink()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the child ends. If the test runs out of time before, print where the child is, and kill it."""
        try:
            with _PARENT.ended:
                if not _PARENT.ended.wait_for(lambda: self.pid in _PARENT.codes or _PARENT.dead, timeout):
                    raise subprocess.TimeoutExpired("a forked program", timeout)
                assert self.pid in _PARENT.codes, "the warm parent has died"
        except BaseException:
            self.send_signal(signal.SIGUSR1)
            time.sleep(1)
            self.kill()
            print(self.stdout.read()[-5000:], self.stderr.read()[-5000:], file=sys.stderr)
            raise
        return self.poll()

    def communicate(self, timeout: float | None = None):
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def Popen(command: list, env=None, cwd=None, stdout=None, stderr=None, text=False, start_new_session=False):
    """Like subprocess.Popen; the output is always captured."""
    command = [str(part) for part in command]
    env = dict(os.environ if env is None else env)
    changed = [k for k in {*env, *os.environ} if k.startswith(READ_AT_IMPORT) and env.get(k) != os.environ.get(k)]
    changed = [k for k in changed if (k, env.get(k)) != ("OMP_NUM_THREADS", "1")]
    program, ranks, port = _program(command)
    if program is None or changed:
        return subprocess.Popen(
            command, env=env, cwd=cwd, stdout=stdout, stderr=stderr, text=text, start_new_session=start_new_session
        )
    request = {"program": program, "ranks": ranks, "port": port, "env": env, "cwd": str(cwd or os.getcwd())}
    return _Forked(request | {"session": start_new_session}, stderr == subprocess.STDOUT, text)


def run(command: list, capture_output=False, timeout=None, check=False, **how) -> subprocess.CompletedProcess:
    """Like subprocess.run."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if capture_output else {}
    process = Popen(command, **(how | pipes))
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        raise
    if not capture_output and isinstance(process, _Forked):  # print the output as if the streams had been inherited
        for stream, text in ((sys.stdout, out), (sys.stderr, err)):
            stream.write(text if isinstance(text, str) else text.decode(errors="replace"))
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _program(command: list[str]) -> tuple[list[str] | None, int | None, int | None]:
    """Return the Python program (script or -m module, with arguments) and the launcher's number of ranks and port.

    The program is None if the command has to be a real process.
    """
    if command[0] == sys.executable:
        return (command[1:], None, None) if command[1].endswith(".py") or command[1] == "-m" else (None, None, None)
    if Path(command[0]).name != "deepspeed":
        return None, None, None
    rest, found = [part for part in command[1:] if part != "--quiet"], {"--num_gpus": 1, "--master_port": 29500}
    while rest and rest[0] in found:
        found[rest[0]], rest = int(rest[1]), rest[2:]
    if not rest or not rest[0].endswith(".py"):
        return None, None, None
    return rest, found["--num_gpus"], found["--master_port"]


# below: the code of the parent and its children


def main() -> None:
    """Import the libraries, then fork a child for every request and report how each one ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of the imports out of the answers
    exec(IMPORTS, {})
    lock = threading.RLock()  # reentrant, since SIGCHLD may arrive while an answer is being written

    def answer(**what) -> None:
        with lock:
            answers.write(json.dumps(what) + "\n")
            answers.flush()

    # use a signal handler: a thread that waits for children would not survive the fork
    signal.signal(signal.SIGCHLD, lambda *_: collect(answer))
    while True:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            answers.close()  # the test session sees the end of the parent when no process has this pipe
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            child(json.loads(line))
        answer(pid=pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def collect(answer) -> None:
    """Report every child that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        answer(ended=pid, code=os.waitstatus_to_exitcode(status))


def child(request: dict) -> None:
    """Become the program, or the launcher of its ranks; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    null = os.open(os.devnull, os.O_RDONLY)
    out = os.open(request["out"], os.O_WRONLY | os.O_APPEND)
    err = out if request["err"] is None else os.open(request["err"], os.O_WRONLY | os.O_APPEND)
    for number, handle in enumerate((null, out, err)):
        os.dup2(handle, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in ((0, "r"), (1, "w"), (2, "w")))
    faulthandler.register(signal.SIGUSR1, sys.stderr)  # show where each thread is
    os.environ.clear()
    os.environ.update(request["env"])
    if request["ranks"] is None:
        become(request["program"])
    launch(request)


def launch(request: dict) -> None:
    """Start the ranks as DeepSpeed's launcher does."""
    pids = {}
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "LOCAL_SIZE": request["ranks"]}
            here |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": request["port"]}
            os.environ.update({k: str(v) for k, v in here.items()})
            script, *arguments = request["program"]
            become([script, f"--local_rank={rank}", *arguments])
        pids[pid] = rank

    def stop(number: int, _frame) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR1, stop)
    code = 0
    while pids:
        pid, status = os.wait()
        pids.pop(pid, None)
        code = code or os.waitstatus_to_exitcode(status)
        if code:
            stop(signal.SIGTERM if code > 0 else signal.SIGKILL, None)
            if code > 0:  # ranks that wait for the failed one do not react to SIGTERM
                time.sleep(0.5)
                stop(signal.SIGKILL, None)
    os._exit(code & 0xFF)


def become(program: list[str]) -> None:
    """Run a script or a module as Python would, then end the process."""
    code = 0
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            sys.path.insert(0, str(Path(program[0]).resolve().parent))
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
