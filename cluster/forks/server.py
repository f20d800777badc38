"""A process that has imported what workers import, and forks one for each that asks.

Run as a script: `python server.py SOCKET MODULES MODULES-WITH-RAY`, lists with commas. It ends with
its standard input, which its owner holds. The server itself never imports Ray, which reads at its
import which raylet it belongs to: for each set of Ray's variables it forks a branch that does.

Invariant: nothing is forked from a process with threads that a fork would lose, nor from one that
has touched a GPU, nor from one whose forks would draw the same ids of Ray.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

sys.path[0] = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from cluster.forks import agree, ids, threads, wire  # noqa: E402
from cluster.forks.become import PLACE, Become, prepare  # noqa: E402

sys.path[0] = PLACE

LATER = "later"  # in place of a module: import when the first process is asked for
REQUEST_S = 5.0  # longest wait for the rest of a request
BRANCH_EVERY_S = 5.0  # how often a branch looks whether its raylet still runs


@contextlib.contextmanager
def or_end() -> Iterator[None]:
    """A fork that fails ends: it must never go on as what it was forked from."""
    try:
        yield
    except Exception:  # noqa: BLE001 - printed, and said by the end
        traceback.print_exc()
        os._exit(1)


class Asker(NamedTuple):
    """Who hears of the end of a process, and ends it by ending."""

    hears: socket.socket
    alive: int  # readable once it is not

    @classmethod
    def of(cls, connection: socket.socket) -> Asker:
        who = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return cls(connection.dup(), os.pidfd_open(struct.unpack("3i", who)[0]))


class Server:
    """One process of the tree: it imports, hears requests and forks."""

    def __init__(self, of_ray: list[str]) -> None:
        self._of_ray = of_ray
        self._pid = os.getpid()
        self._before = dict(os.environ)
        self._own: list[Any] = []  # descriptors that no fork is to have
        self._modules: set[str] = set()
        self._askers: dict[int, Asker] = {}  # by the process that was forked for each
        self._branches: dict[tuple[tuple[str, str], ...], socket.socket] = {}
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the owner
        self._hear_of_ends()

    def _hear_of_ends(self) -> None:
        """Have the end of a process that is forked here wake this process, and no other."""
        self._ended, ending = os.pipe()
        self._own += [self._ended, ending]
        os.set_blocking(self._ended, False)
        os.set_blocking(ending, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(ending, warn_on_full_buffer=False)

    def load(self, modules: list[str]) -> None:
        """Import what can be imported; the rest is the workers' own affair."""
        for name in filter(None, modules):
            self._modules.add(name)
            try:
                importlib.import_module(name)
            except Exception as error:  # noqa: BLE001 - a module may raise anything; workers say it
                print(f"not imported here: {name}: {error}", flush=True)
        gc.collect()
        gc.freeze()

    def serve(self, listener: socket.socket, owner: int, modules: list[str]) -> None:
        """Answer until the owner is gone. Raises Become in a fork that is to be a program.

        With LATER among the modules, they are imported when the first process is asked for.
        """
        self._own += [listener, owner]
        trouble, loaded = None, False
        if LATER not in modules:
            trouble, loaded = self._loaded(modules), True
        while True:
            watched: list[Any] = [listener, owner, self._ended, *self._alive()]
            ready, _, _ = select.select(watched, [], [])
            self._reap()
            self._end_with_askers(ready)
            if owner in ready and not os.read(owner, 64):
                _leave_nothing(listener.getsockname())
                os._exit(0)
            if listener in ready:
                connection, _ = listener.accept()
                if not loaded:
                    trouble, loaded = self._loaded(modules), True
                self._answer(connection, trouble)

    def _loaded(self, modules: list[str]) -> str | None:
        """Import; why nothing may be forked from what came of it, or None."""
        self.load([name for name in modules if name != LATER])
        if "ray" in sys.modules:
            return "what it was told to import has imported Ray"
        return threads.trouble()

    def _answer(self, connection: socket.socket, trouble: str | None) -> None:
        files: list[int] = []
        try:
            connection.settimeout(REQUEST_S)
            heard = wire.receive(connection)
            if heard is None:
                return
            request, files = heard
            if refusal := trouble or self._refusal(request):
                print(f"refused: {refusal}", flush=True)
                connection.sendall(f"{refusal}\n".encode())
            elif request["of_ray"] is not None:
                self._branch(request, connection, files)
            else:
                self._fork(request, files, connection)
        except (OSError, ValueError, KeyError) as error:
            print(f"a request was not served: {error}", flush=True)
        finally:
            self._done_with(connection, files)

    def _done_with(self, connection: socket.socket, files: list[int]) -> None:
        """Close what came with a request; a fork has put it elsewhere already."""
        if os.getpid() == self._pid:
            connection.close()
            for file in files:
                os.close(file)

    def _refusal(self, request: dict[str, Any]) -> str | None:
        # Who was forked itself has agreed then, and looks itself what has changed since.
        spawned = request["spawned"]
        differing = [] if spawned else agree.differing(self._before, request["environment"])
        if differing:
            return f"it has not the environment of the imports: {', '.join(differing)} differ"
        if request["nice"] < os.getpriority(os.PRIO_PROCESS, 0):
            return "it has a higher priority than the fork server"
        return None

    def _fork(self, request: dict[str, Any], files: list[int], connection: socket.socket) -> None:
        asker = Asker.of(connection) if request["spawned"] else None
        self._own += asker or ()
        pid = os.fork()
        if pid == 0:
            wanted, after = request["environment"], dict(os.environ)
            if not request["exact"]:
                request["environment"] = agree.environment(wanted, self._before, after)
            prepare(request, files, connection, self._own, self._modules)
        if asker is not None:
            self._askers[pid] = asker

    def _branch(self, request: dict[str, Any], asker: socket.socket, files: list[int]) -> None:
        """Hand a request over to the branch that has its variables of Ray."""
        key = tuple(sorted(request["of_ray"].items()))
        if key not in self._branches:
            ours, theirs = socket.socketpair()
            if os.fork() == 0:
                with or_end():
                    ours.close()  # held here too, it would never say that the server has ended
                    self._become_branch(theirs, [asker.fileno(), *files], dict(key))
            theirs.close()
            self._branches[key] = ours
            self._own.append(ours)
        try:
            wire.send(self._branches[key], request, [asker.fileno(), *files])
        except OSError:
            ended = self._branches.pop(key)
            self._own.remove(ended)
            ended.close()
            raise

    def _become_branch(
        self, requests: socket.socket, files: list[int], of_ray: dict[str, str]
    ) -> NoReturn:
        """Serve those whose variables of Ray are `of_ray`, until their raylet ends."""
        for file in (*files, *(own for own in self._own if isinstance(own, int))):
            if file > 2:
                os.close(file)
        for one in self._own:
            if not isinstance(one, int):
                one.close()
        self._pid, self._own, self._branches = os.getpid(), [requests], {}
        self._askers = {}
        self._hear_of_ends()
        os.environ.update(of_ray)
        self._before |= of_ray
        with ids.of_the_system():
            self.load(self._of_ray)
        threads.follow_ray()
        trouble = threads.trouble() or ids.trouble()
        raylet = of_ray.get("RAY_RAYLET_PID")
        while True:
            watched: list[Any] = [requests, self._ended, *self._alive()]
            ready, _, _ = select.select(watched, [], [], BRANCH_EVERY_S)
            self._reap()
            self._end_with_askers(ready)
            if raylet is not None and not os.path.exists(f"/proc/{raylet}"):
                os._exit(0)
            if requests in ready:
                heard = wire.receive(requests)
                if heard is None:
                    os._exit(0)
                request, (asker, *files) = heard
                connection = socket.socket(fileno=asker)
                try:
                    connection.settimeout(REQUEST_S)
                    if trouble:
                        connection.sendall(f"{trouble}\n".encode())
                    else:
                        self._fork(request, files, connection)
                except OSError as error:
                    print(f"a request was not served: {error}", flush=True)
                finally:
                    self._done_with(connection, files)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._ended, 4096)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                self._tell(*ended)

    def _tell(self, pid: int, status: int) -> None:
        """Have who asked for a process know how it has ended."""
        if asker := self._askers.get(pid):
            with contextlib.suppress(OSError):
                asker.hears.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
            self._forget(pid)

    def _alive(self) -> list[int]:
        return [asker.alive for asker in self._askers.values()]

    def _end_with_askers(self, ready: list[Any]) -> None:
        """End what was forked for those that have ended; it is still this process's to reap."""
        for pid, asker in list(self._askers.items()):
            if asker.alive in ready:
                os.kill(pid, signal.SIGKILL)
                self._forget(pid)

    def _forget(self, pid: int) -> None:
        asker = self._askers.pop(pid)
        self._own = [one for one in self._own if one not in asker]
        asker.hears.close()
        os.close(asker.alive)


def _leave_nothing(path: str) -> None:
    """Remove the socket and the folder around it, which an owner that was killed leaves behind."""
    folder = os.path.dirname(path)
    for name in (path, os.path.join(folder, "log")):
        with contextlib.suppress(OSError):
            os.unlink(name)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def main(path: str, modules: str, of_ray: str) -> Callable[[], None]:
    """Serve; in a process that was forked to become a program, return that program."""
    with contextlib.suppress(ImportError):  # what titles vLLM's processes: once variables are set,
        importlib.import_module("setproctitle").getproctitle()  # it finds no more where they lie
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(128)
        try:
            server = Server(of_ray.split(","))
            server.serve(listener, owner=0, modules=modules.split(","))
        except Become as become:
            return become.run
    raise AssertionError("a server serves until it ends")


if __name__ == "__main__":
    main(*sys.argv[1:])()
