"""Ray workers that start in a fraction of the time: forks of a process that has imported
everything.

Most of a worker's start is imports: a rank's are Ray, torch, transformers and DeepSpeed, and after
every failure it imports them again. Ray starts a worker with the command that `py_executable` of
its runtime environment names; `make_command` gives one that runs this file. The first worker of a
job on a node becomes their fork server: it imports, and forks itself to be that worker. Later ones
hand their arguments, environment and standard streams over, and end: Ray knows a worker by the
process that registers, as it must for workers in containers. Where no server answers, a worker
starts as it would without one.

The server `light` has imported Ray; `full`, a fork of it that ranks on CPUs need, the rest. They
end with the node's raylet, or once `light` has had no other child for IDLE_SECONDS; who wants them
to stay keeps one (`cluster.WarmNodes`). Their sockets lie in a folder that only their user can
enter. What has touched CUDA cannot be forked, so `light` imports nothing that may touch it.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import math
import os
import select
import shlex
import socket
import stat
import sys
import time
import types
import zlib
from contextlib import suppress
from typing import Any

PRELOADS = {"light": "dray.train.worker", "full": "dray.rank.loop"}
"""Server → the module whose `preload` imports what its children need."""
IDLE_SECONDS = 60.0
ANSWER_SECONDS = 20.0
"""How long a worker waits for a server that is still importing; Ray waits a minute for a worker."""
BIND_SECONDS = 5.0
"""How long a worker waits for a server that has just been started to listen."""
_LENGTH_BYTES, _DONE = 4, b"1"
Request = dict[str, Any]
"""A worker to be: `arguments` (of Python), `environment`, `folder`."""


def make_command(kind: str) -> str:
    """The `py_executable` of workers that are to be forks of a server: words for a shell.

    `kind`: a server, or `server:soon` where another one will soon be asked for. A node that has
    neither this Python nor this file starts the worker with a Python of its own.
    """
    python, file = shlex.quote(sys.executable), shlex.quote(__file__)
    script = (
        f'[ -x {python} ] && [ -f {file} ] && exec {python} -I -S {file} {kind} "$@"; exec '
        'python "$@"'
    )
    return f"bash -c {shlex.quote(script)} dray"


def is_command(py_executable: str) -> bool:
    """Whether it is one of `make_command`."""
    return any(
        py_executable == make_command(kind)
        for kind in ("light", "full", "light:light", "light:full")
    )


def become_worker(kind: str, arguments: list[str]) -> None:
    """Be what Ray started this process for, in a fork of the node's server if there is one. Returns
    when such a fork has taken over."""
    _name_cluster(arguments)
    try:
        place = _find_place(with_full="full" in kind)
        lock = os.open(f"{place}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        _start_alone(arguments, error)
        return
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # there is a server, or another worker has begun to be it
        os.close(lock)
        if _hand_over(f"{place}.{kind.partition(':')[0]}", arguments):
            return
    else:  # such a lock outlives exec, and forks do not have it
        os.set_inheritable(lock, True)
        # A thread of a fork gets an arena that a thread of the server had, if there was one, and no
        # option of `dray.processes.heap.prepare_heap` is for those: what a rank frees would be
        # faulted in again at every step.
        os.environ["MALLOC_ARENA_MAX"] = "1"
        server_command = [
            sys.executable,
            "-P",
            "-m",
            "dray.processes.forkserver",
            "--serve",
            place,
            kind,
        ]
        os.execv(sys.executable, server_command + arguments)
    os.execv(sys.executable, [sys.executable, *arguments])


def _name_cluster(arguments: list[str]) -> None:
    """Tell what asks Ray's state API in this worker which cluster it belongs to. Without that it
    would ask the one that was started last on this machine, which may be another, or gone: Ray
    Train's cleaner of placement groups would take the group of a controller that the other one does
    not know, or hold up the end of a run."""
    mark = "--gcs-address="
    address = next((word.removeprefix(mark) for word in arguments if word.startswith(mark)), "")
    if address:
        os.environ["RAY_ADDRESS"] = address


def _start_alone(arguments: list[str], why: OSError) -> None:
    """Start as Ray starts workers, with a word in the worker's log."""
    print(
        "dray: this worker imports everything itself, since this node can have no fork server "
        f"({why})",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, [sys.executable, *arguments])


def _find_place(*, with_full: bool) -> str:
    """Where this job's servers on this node listen: the beginning of a path.

    Raises OSError where there can be no server: no folder for its sockets that is this user's alone
    and has a short name, or a system (gVisor) that cannot tell a server that its raylet has ended.
    """
    if not hasattr(os, "pidfd_open"):
        raise OSError("this system has no pidfd_open")
    os.close(os.pidfd_open(os.getppid()))
    # What decides what an import gives: a job's runtime environment is its own.
    job = [os.environ.get(name, "") for name in ("PYTHONPATH", "RAY_JOB_ID")]
    imports = [sys.executable, __file__, str(with_full), *job]
    name = f"{os.getppid()}-{zlib.crc32(chr(0).join(imports).encode()):08x}"
    failure = OSError()
    for parent in dict.fromkeys((os.environ.get("TMPDIR", "/tmp"), "/tmp", "/dev/shm")):
        try:
            return _make_place(f"{parent}/dray-fork-{os.getuid()}", name)
        except OSError as error:
            failure = error
    raise failure


def _make_place(folder: str, name: str) -> str:
    """The path of that name in a folder that is this user's alone, if a socket can be there. Raises
    OSError."""
    os.makedirs(folder, 0o700, exist_ok=True)
    found = os.lstat(folder)
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise PermissionError(f"{folder} can be entered by others")
    probe = f"{folder}/{name}.{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(probe)
    os.unlink(probe)
    return f"{folder}/{name}"


def _make_request(arguments: list[str]) -> Request:
    return {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}


def _hand_over(path: str, arguments: list[str]) -> bool:
    """Ask the server at `path` for a fork that takes this process' place. Returns whether there is
    one."""
    body = json.dumps(_make_request(arguments)).encode()
    deadline = time.monotonic() + BIND_SECONDS
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            try:
                connection.connect(path)
                socket.send_fds(connection, [len(body).to_bytes(_LENGTH_BYTES, "big")], [0, 1, 2])
                connection.sendall(body)
                return connection.recv(1) == _DONE
            except (FileNotFoundError, ConnectionRefusedError):
                time.sleep(0.05)
            except OSError:
                return False
    return False


class Server:
    """Listens at a path, and forks a worker for each request."""

    def __init__(self, path: str) -> None:
        self._path = path
        if os.path.exists(
            path
        ):  # of a server that was killed: the holder of the lock is the only one
            os.unlink(path)
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(path)
        self.socket.listen(128)
        self._children: set[int] = set()

    def serve(
        self, master: int, companion: int | None = None, idle_seconds: float = math.inf
    ) -> Request | None:
        """Answer requests until the process with the file descriptor `master` has ended, or the
        child `companion`, or there has been no other child for so long.

        Returns None then, and in each child the request that it is to fulfil.
        """
        used = time.monotonic()
        while time.monotonic() - used < idle_seconds:
            waiting: list[Any] = [self.socket, master]
            ready, _, _ = select.select(waiting, [], [], 1.0)
            if master in ready:
                break
            if ready and (request := self._answer()):
                return request
            if companion in self._reap():
                break
            used = time.monotonic() if ready or self._children - {companion} else used
        with suppress(FileNotFoundError):
            os.unlink(self._path)
        return None

    def fork(self) -> int:
        """Returns the child's process id, and 0 in the child."""
        child = os.fork()
        if child:
            self._children.add(child)
        else:
            os.setpgrp()  # Ray ends what a dead worker leaves behind by its process group
        return child

    def _reap(self) -> set[int]:
        """The children that have ended since the last call."""
        ended = set()
        while self._children and (child := os.waitpid(-1, os.WNOHANG)[0]):
            ended.add(child)
            self._children.discard(child)
        return ended

    def _answer(self) -> Request | None:
        """Fork for whoever has come. Returns the request in the child."""
        connection, _ = self.socket.accept()
        streams: list[int] = []
        with connection:
            connection.settimeout(ANSWER_SECONDS)
            try:
                head, streams, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, 3)
                with connection.makefile("rb") as body:
                    request: Request = json.loads(body.read(int.from_bytes(head, "big")))
                connection.send(_DONE)
                if not self.fork():
                    for number, stream in enumerate(streams):
                        os.dup2(stream, number)
                    return request
            except (
                OSError,
                ValueError,
            ):  # nonsense, or one that has not waited and starts by itself
                return None
            finally:
                for stream in streams:
                    os.close(stream)
        return None


def serve(place: str, kind: str, arguments: list[str]) -> None:
    """Be the servers that a worker of this kind needs, and that worker as the first of their
    children."""
    first, raylet = _make_request(arguments), os.getppid()
    _clear(os.path.dirname(place))
    try:
        light = Server(f"{place}.light")
        full = Server(f"{place}.full") if "full" in kind else None
    except OSError as error:
        _start_alone(arguments, error)
        return
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy would start its threads when it is imported
    _preload("light")
    if full is None:
        _serve(light, raylet, first, idle_seconds=IDLE_SECONDS)
    else:
        asked, parent = full if kind == "full" else light, os.getpid()
        companion = light.fork()
        if not companion:
            light.socket.close()
            _preload("full")
            _serve(full, parent, first if asked is full else None)
            return
        full.socket.close()
        _serve(light, raylet, first if asked is light else None, companion, IDLE_SECONDS)
    os.unlink(f"{place}.lock")  # two servers for a moment would do no harm: the later one is asked


def _serve(
    server: Server,
    master: int,
    first: Request | None,
    companion: int | None = None,
    idle_seconds: float = math.inf,
) -> None:
    """Have the server answer, and be whatever it is asked for in its children, who do not
    return."""
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page
    descriptor = os.pidfd_open(master)
    request = (
        first if first and not server.fork() else server.serve(descriptor, companion, idle_seconds)
    )
    if request:
        server.socket.close()
        os.close(descriptor)
        _run(request)
        raise SystemExit


def _clear(folder: str) -> None:
    """Remove what servers have left there that were killed, once their raylets have ended."""
    for name in os.listdir(folder):
        if not os.path.exists(f"/proc/{name.partition('-')[0]}"):
            with suppress(FileNotFoundError):
                os.unlink(f"{folder}/{name}")


def _preload(kind: str) -> None:
    """Import what children of this kind need. What cannot be imported is their failure to
    report."""
    try:
        importlib.import_module(PRELOADS[kind]).preload()
    except Exception as error:
        print(f"dray's fork server could not import everything: {error!r}", file=sys.stderr)


def _run(request: Request) -> None:
    """Be the worker that was asked for, as if Python had just been started with its arguments."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # Python's own generator does so after a fork
    main = types.ModuleType("__main__")
    main.__file__ = sys.argv[0]
    sys.modules["__main__"] = main
    with open(sys.argv[0], encoding="utf-8") as script:
        code = compile(script.read(), sys.argv[0], "exec", dont_inherit=True)
    exec(code, main.__dict__)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], sys.argv[3], sys.argv[4:])
    else:
        become_worker(sys.argv[1], sys.argv[2:])
