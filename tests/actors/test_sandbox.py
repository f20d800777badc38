"""Programs in a sandbox: what they cannot do, what ends them, and what is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from actors import sandbox, wrapping
from actors.sandbox import (
    Limits,
    Mode,
    Ran,
    SandboxBusy,
    SandboxFailed,
    SandboxMissing,
    in_force,
    run,
)

SMALL = Limits(cpu_s=1.0, wall_s=20.0, memory_mib=256, processes=16, file_mib=1, output_kib=64)
MODES = ["auto", "limits alone"]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Mode:
    """With bubblewrap where it works, and without it."""
    if request.param == "limits alone":
        monkeypatch.setattr(sandbox, "bubblewrap", lambda: (None, "not here"))
    elif sandbox.bubblewrap()[0] is None:
        pytest.skip(sandbox.bubblewrap()[1])
    return "auto"


def python(program: str, mode: Mode = "auto", limits: Limits = SMALL, stdin: bytes = b"") -> Ran:
    command = [sys.executable, "-I", "-S", "program.py"]
    files = {"program.py": program}
    return asyncio.run(run(command, files=files, stdin=stdin, limits=limits, mode=mode))


@pytest.mark.slow
def test_a_program_reads_its_input_and_says_its_output(mode: Mode) -> None:
    ran = python("print(input()[::-1]); import sys; sys.stderr.write('aside')", mode, stdin=b"abc")
    assert (ran.stdout, ran.stderr, ran.well) == (b"cba\n", b"aside", True)
    assert python("raise SystemExit(3)", mode).status == 3
    assert python("import os; os.kill(os.getpid(), 11)", mode).status in (-11, 139)


def test_nothing_of_the_environment_is_there(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "Rumpel417")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    ran = python("import os; print(dict(os.environ))", mode)
    assert b"Rumpel" not in ran.stdout
    assert b"PATH" in ran.stdout
    assert b"CUDA" not in ran.stdout


def test_it_sees_no_gpu_where_its_actor_has_none(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ran = python("import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))", mode)
    assert ran.stdout == b"''\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        # Many times what it may, and no more: other tests' processes live here too.
        "import os\nfor _ in range(7): os.fork()\nwhile True: pass",
        "x = bytearray(2**30)",
        "open('big', 'wb').write(bytes(2**22))",
        "while True: print('x' * 1000)",
        "import time; time.sleep(600)",
    ],
    ids=["processor", "forks", "memory", "file", "output", "sleep"],
)
def test_a_program_that_takes_too_much_ends(mode: Mode, program: str) -> None:
    if "fork" in program and sandbox.bubblewrap()[0] is None and os.getuid() == 0:
        pytest.skip("nothing bounds the processes of root but bubblewrap")
    limits = Limits(**{**vars(SMALL), "wall_s": 1.0 if "sleep" in program else 3.0})
    began = time.monotonic()
    ran = python(program, mode, limits)
    assert not ran.well
    assert time.monotonic() - began < 60
    assert len(ran.stdout) <= 64 * 1024


MANY = """
import os, time
ready, said = os.pipe()
for _ in range(5):
    if os.fork() == 0:
        os.close(ready)
        {use}
        os.write(said, b"x")
        time.sleep(300)
seen = b""
while len(seen) < 5:
    seen += os.read(ready, 1)
time.sleep(20)  # longer than it takes to look
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("use", "over"),
    [
        ("x = b'x' * 70 * 2**20", ""),
        ("while time.process_time() < 0.5: pass", "time"),
    ],
    ids=["memory", "processor"],
)
def test_the_processes_of_a_program_have_its_limits_together(
    mode: Mode, use: str, over: str
) -> None:
    ran = python(MANY.format(use=use), mode, Limits(**{**vars(SMALL), "wall_s": 120.0}))
    assert (ran.status < 0, ran.over) == (True, over)


@pytest.mark.slow
def test_memory_that_processes_share_counts_once(mode: Mode) -> None:
    program = """
import os, time
x = b"x" * 100 * 2**20
ready, said = os.pipe()
for _ in range(5):
    if os.fork() == 0:
        os.close(said)
        os.read(ready, 1)
        os._exit(0)
time.sleep(0.5)  # several looks
"""
    assert python(program, mode).well


@pytest.mark.slow
def test_files_in_the_scratch_folder_are_bounded_together(mode: Mode) -> None:
    """Each is within the limit of one. It waits longer than it takes to look."""
    write = """
import os, time
os.mkdir("in")
for n in range(6):
    with open("in/%d" % n, "wb") as file:
        file.write(bytes(2**20))
time.sleep({})
"""
    large = Limits(**{**vars(SMALL), "memory_mib": 64, "file_mib": 16})
    ran = python(write.replace("2**20", "15 * 2**20").format(20), mode, large)
    assert (ran.status < 0, ran.over) == (True, "")
    assert python(write.format(0.5), mode, large).well


@pytest.mark.parametrize("place", ["/tmp", "/dev/shm", "/var/tmp", "/dev", "/run"])
def test_files_in_memory_are_bounded(place: str) -> None:
    program = sandbox.bubblewrap()[0]
    if program is None or in_force("required") != "bubblewrap":
        pytest.skip("there is no bubblewrap that bounds them")
    write = f"""
for n in range(64):
    with open("{place}/%d" % n, "wb") as file:
        file.write(bytes(4 * 2**20))
"""
    limits = Limits(**{**vars(SMALL), "memory_mib": 64, "file_mib": 16})
    ran = python(write, "required", limits)
    assert ran.status == 1
    assert b"No space" in ran.stderr or b"Read-only" in ran.stderr


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv({python!r}, ["{mark}", "-S", "-c", "import time; time.sleep(300)"])
    os._exit(0)
os.wait()
time.sleep({stay})
"""


def alive(mark: str) -> bool:
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_bytes().startswith(mark.encode()):
                return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("stay", [0, 300])
def test_what_a_program_leaves_behind_ends_with_it(mode: Mode, stay: int, tmp_path: Path) -> None:
    mark = f"daemon-{os.getpid()}-{stay}-{tmp_path.name}"
    program = DAEMON.format(python=sys.executable, mark=mark, stay=stay)
    python(program, mode, Limits(**{**vars(SMALL), "wall_s": 2.0}))
    assert not alive(mark)


@pytest.mark.slow
def test_a_program_whose_caller_leaves_ends(mode: Mode, tmp_path: Path) -> None:
    mark = f"left-{os.getpid()}-{tmp_path.name}"
    program = DAEMON.format(python=sys.executable, mark=mark, stay=300)

    async def leave() -> None:
        command = [sys.executable, "-I", "-S", "program.py"]
        running = asyncio.create_task(run(command, files={"program.py": program}, mode=mode))
        deadline = time.monotonic() + 30
        while not alive(mark) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert alive(mark)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(leave())
    assert not alive(mark)


def test_under_bubblewrap_there_is_no_network_and_no_home_and_nothing_can_be_written() -> None:
    if sandbox.bubblewrap()[0] is None:
        pytest.skip(sandbox.bubblewrap()[1])
    assert in_force("required").startswith("bubblewrap")
    program = """
import os, socket
def tried(what):
    try:
        return repr(what())
    except OSError as error:
        return type(error).__name__
print(tried(lambda: socket.create_connection(("127.0.0.1", PORT), timeout=5)))
print(tried(lambda: open("/etc/made", "w")))
print(tried(lambda: os.listdir(HOME)))
print(tried(lambda: open("here", "w").write("x")))
print(len([p for p in os.listdir("/proc") if p.isdigit()]) < 10)
print(os.access("/proc/sys/vm/swappiness", os.W_OK))
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        home = repr(os.path.expanduser("~"))
        text = program.replace("PORT", str(server.getsockname()[1])).replace("HOME", home)
        ran = python(text, "required")
    network, written, listed, scratch, alone, kernel = ran.stdout.decode().splitlines()
    assert network in ("ConnectionRefusedError", "OSError", "TimeoutError")
    assert written in ("OSError", "PermissionError")
    assert scratch == "1"
    assert alone == "True"
    assert kernel == "False", "root may write there, and the machine has one for all"
    prefixes = {Path(p).relative_to(home.strip("'")).parts[0] for p in (sys.prefix, sys.base_prefix)
                if Path(p).is_relative_to(home.strip("'"))}  # fmt: skip
    assert set(eval(listed)) <= prefixes


LISTENING = """
import socket, sys
with socket.socket(socket.AF_UNIX) as one:
    try:
        one.connect("{path}")
        print("reached")
    except OSError as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_sockets_in_a_temporary_folder_of_another_place_are_not_there(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of Ray, or of what starts processes: no read-only mount keeps a program from them."""
    here = next(path for path in ("/opt", "/var/lib", "/usr/local") if os.access(path, os.W_OK))
    with tempfile.TemporaryDirectory(dir=here) as folder:
        (link := Path(folder) / "link").symlink_to(place := Path(folder) / "place")
        place.mkdir()
        monkeypatch.setenv(variable, str(link))
        monkeypatch.setattr(tempfile, "tempdir", None)
        scratch = tempfile.mkdtemp()
        command = wrapping.wrapped("bwrap", scratch, most=7)
        assert command[command.index(str(place)) - 1] == "--tmpfs"
        if variable == "TMPDIR":  # over it
            assert command.index(os.path.realpath(scratch)) > command.index(str(place))
        if sandbox.bubblewrap()[0] is not None:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(f"{place}/socket")
                server.listen()
                ran = python(LISTENING.format(path=server.getsockname()), "required")
            assert ran.stdout == b"FileNotFoundError\n"


def test_what_lies_deeper_is_mounted_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else a project that is shown would show the temporary folder in it."""
    monkeypatch.setattr(wrapping, "HOME", str(tmp_path))
    scratch = tmp_path / "project" / "temporary" / "scratch"
    scratch.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch.parent))
    command = wrapping.wrapped("bwrap", str(scratch), [str(tmp_path / "project")])
    places = [tmp_path, tmp_path / "project", scratch.parent, scratch]
    found = [command.index(str(place)) for place in places]
    assert found == sorted(found)
    kinds = ["--tmpfs", "--ro-bind", "--tmpfs", "--bind"]
    assert [command[at - 1] for at in found] == kinds
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: ("bwrap", ""))
    with pytest.raises(SandboxMissing, match="is for others' files"):
        sandbox.held("auto", "episodes.sandbox", str(scratch), [str(scratch.parent)], None)


def test_what_is_needed_is_there_where_a_link_leads_to_it_in_a_hidden_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where /scratch is a link, and holds the temporary folder, Python and the user's code."""
    here = next(path for path in ("/opt", "/var/lib", "/usr/local") if os.access(path, os.W_OK))
    with tempfile.TemporaryDirectory(dir=here) as folder:
        (link := Path(folder) / "link").symlink_to(place := Path(folder) / "place")
        (place / "code").mkdir(parents=True)
        (place / "code" / "file").touch()
        (place / "python").symlink_to(sys.prefix)
        monkeypatch.setenv("RAY_TMPDIR", str(link))
        monkeypatch.setattr(wrapping, "HOME", str(link / "code"))
        assert {str(place), str(place / "code")} <= set(wrapping.hidden())
        monkeypatch.setattr(wrapping, "HOME", "/root")
        monkeypatch.setattr(sys, "exec_prefix", str(place / "python"))
        shown, log = [str(link / "code")], str(link / "log")
        Path(log).touch()
        scratch = tempfile.mkdtemp(dir=place)
        command = wrapping.wrapped("bwrap", scratch, shown, log)
        bound = {command[at + 1] for at, part in enumerate(command) if part.endswith("-bind")}
        assert {str(place / "code"), str(place / "python")} <= bound
        assert command[command.index(str(place / "log")) - 1] == "--bind"
        program, _ = sandbox.bubblewrap()
        if program is not None:
            look = ["/bin/sh", "-c", f"ls {link}/code {link}/python/bin/python && echo 1 > {log}"]
            found = subprocess.run([program, *command[1:], *look], capture_output=True, check=False)
            assert b"file" in found.stdout, found.stderr
            assert Path(log).read_text() == "1\n"
        monkeypatch.setattr(sandbox, "bubblewrap", lambda: ("bwrap", ""))
        with pytest.raises(SandboxMissing, match="is for others' files"):
            sandbox.held("auto", "episodes.sandbox", scratch, [str(link)], None)


def test_a_python_that_links_in_a_hidden_folder_lead_to_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As of a virtual environment that ~/.local/bin/python3 made, which is a link itself."""
    here = next(path for path in ("/opt", "/var/lib", "/usr/local") if os.access(path, os.W_OK))
    with tempfile.TemporaryDirectory(dir=here) as folder:
        (place := Path(folder) / "home" / "bin").mkdir(parents=True)
        (place / "python3").symlink_to(real := os.path.realpath(sys.executable))
        (python := Path(folder) / "python").symlink_to("home/bin/python3")
        monkeypatch.setattr(wrapping, "HOME", str(place.parent))
        monkeypatch.setattr(sys, "executable", str(python))
        with tempfile.TemporaryDirectory() as scratch:
            command = wrapping.wrapped("bwrap", scratch)
            at = command.index("--symlink")
            assert command[at + 1 : at + 3] == [real, str(place / "python3")]
            program, _ = sandbox.bubblewrap()
            if program is not None:
                run = [program, *command[1:], str(python), "-c", "print(6 * 7)"]
                done = subprocess.run(run, capture_output=True, check=False)
                assert done.stdout == b"42\n", done.stderr


@pytest.mark.parametrize("user", [0, 1000])
def test_a_part_of_proc_is_covered_for_root_alone(
    user: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over a /proc with covered parts nobody but root may mount another, as episodes need."""
    monkeypatch.setattr(os, "geteuid", lambda: user)
    command = wrapping.wrapped("bwrap", str(tmp_path))
    assert ("/proc/sys" in command) == (user == 0)


def test_required_without_bubblewrap_is_refused_and_auto_says_what_is_in_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: (None, "bwrap is not installed"))
    with pytest.raises(SandboxMissing, match="bwrap is not installed"):
        in_force("required")
    with pytest.raises(SandboxMissing):
        python("", "required")
    assert in_force("auto") == (
        "limits alone, with the network and all that this user may read (bwrap is not installed)"
    )
    assert in_force("off") == "off"
    assert python("print(1)", "off").stdout == b"1\n"


def test_a_program_that_could_not_be_started_is_a_failure_and_no_end(mode: Mode) -> None:
    for how in (mode, "off"):
        with pytest.raises(SandboxFailed, match="No such file"):
            asyncio.run(run(["/no/such"], mode=how))


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("no more namespaces", SandboxFailed),
        ("Creating new namespace failed: Resource temporarily unavailable", SandboxBusy),
    ],
)
def test_a_bubblewrap_that_fails_is_a_failure_with_what_it_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, kind: type[SandboxFailed]
) -> None:
    program = tmp_path / "bwrap"
    program.write_text(f"#!/bin/sh\necho 'bwrap: {said}' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: (str(program), ""))
    with pytest.raises(kind, match=f"bwrap: {said}") as told:
        python("print(1)")
    assert type(told.value) is kind


@pytest.mark.parametrize(
    "trouble",
    [
        BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)),
        subprocess.TimeoutExpired("bwrap", 20.0),
        subprocess.CompletedProcess("bwrap", 1, b"", b"bwrap: fork: Cannot allocate memory\n"),
    ],
    ids=lambda trouble: type(trouble).__name__,
)
def test_what_passes_is_no_word_on_whether_there_is_a_sandbox(
    trouble: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all that its process runs later would run without one."""
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    troubles = [trouble]

    def tried(*arguments: Any, **options: Any) -> Any:
        if not troubles:
            return subprocess.CompletedProcess(arguments, 0, b"--size", b"")
        if isinstance(found := troubles.pop(), Exception):
            raise found
        return found

    monkeypatch.setattr(subprocess, "run", tried)
    monkeypatch.setattr(sandbox, "bubblewrap", functools.cache(sandbox.bubblewrap.__wrapped__))
    with pytest.raises(SandboxBusy):
        in_force("auto")
    assert in_force("auto").startswith("bubblewrap")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_program_that_ends_its_runner_has_not_ended_well(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: (None, "not here"))
    program = f"""
import os, signal, sys
sys.stderr.write('\\x1e{{"status": 0, "late": false}}')
sys.stderr.flush()
os.kill(os.getppid(), signal.{name})
signal.pause()
"""
    ran = python(program)
    assert not ran.well
    assert ran.status < 0


@pytest.mark.slow
def test_a_lower_limit_of_the_machine_stays() -> None:
    program = """
import asyncio, resource, sys
from actors.sandbox import run
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
print(asyncio.run(run(["/bin/sh", "-c", "ulimit -n"])))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Ran(status=0, stdout=b'100\\n'" in done.stdout, done.stderr


BELOW = """
import os, subprocess, sys
from actors import sandbox_runner
from actors.children.keeper import below
inner = "input()"
outer = (
    "import subprocess, sys, threading\\n"
    "def start():\\n"
    f"    p = subprocess.Popen([sys.executable, '-c', {inner!r}], stdin=subprocess.PIPE)\\n"
    "    print(p.pid, flush=True); threading.Event().wait()\\n"
    "threading.Thread(target=start, daemon=True).start(); input()"
)
piped = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child = subprocess.Popen([sys.executable, "-c", outer], **piped)
grandchild = int(child.stdout.readline())
assert sorted(below(os.getpid())) == sorted([child.pid, grandchild])
sandbox_runner.below = None  # the table of all processes
assert sorted(sandbox_runner._started()) == sorted([child.pid, grandchild])
"""


@pytest.mark.skipif(
    not os.path.exists(f"/proc/self/task/{os.getpid()}/children"),
    reason="a kernel with CONFIG_PROC_CHILDREN",
)
def test_what_a_program_has_started_is_found_without_a_look_at_all_processes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BELOW],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
