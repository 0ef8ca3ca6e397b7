"""Programs that try to hurt the machine, really run: every one is stopped, counted as wrong, and leaves nothing."""

import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fedlora.code_eval import folder, sandbox
from fedlora.code_eval.sandbox import Sandbox, SandboxError
from tests.fixtures.sandbox import living, on_landlock, sleeping, until

pytestmark = on_landlock

ADDS = "def add(a, b):\n    return a + b\n"
TEST = "assert add(1, 2) == 3"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where programs' folders are made; empty again after every run, and no process is left in it."""
    here = tmp_path / "programs"
    here.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    yield here
    assert list(here.iterdir()) == []
    assert living(here) == []


def run(program: str, tests: str = "", **limits):
    return Sandbox(**{"seconds": 2, "wall_seconds": 10, **limits}).run(program, tests)


def test_right_and_wrong(place):
    right = run(f"print('hello')\n{ADDS}", TEST)
    assert right.ok and right.output == "hello\n" and right.why == ""
    wrong = run("def add(a, b):\n    return a - b\n", TEST)
    assert not wrong.ok and wrong.why == f"AssertionError in {TEST}"
    assert run("def add(:", TEST).why.startswith("SyntaxError")
    assert run("", TEST).why == f"NameError: name 'add' is not defined in {TEST}"
    assert run("import dataclasses, numpy\n@dataclasses.dataclass\nclass A:\n    b: 'int'\n" + ADDS, TEST).ok
    assert run(
        "with open('mine', 'w') as f:\n    f.write('x')\n" + ADDS, "import os\nassert os.listdir('.') == ['mine']"
    ).ok


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "raise KeyboardInterrupt",
        "def add(a, b):\n    import os\n    os._exit(0)",
        "def add(a, b):\n    raise SystemExit(0)",
        "import os\nos.closerange(0, 64)",
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'+' + b'0' * 32)\n    except OSError: pass\nos._exit(0)",
        "import os, sys\nos._exit = os.write = sys.exit = lambda *a: 0\ndef add(a, b): return 4",
        "import atexit, os\natexit.register(os._exit, 0)\n1 / 0",
        "import signal, os\nos.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes\nctypes.string_at(0)",
        "if True:\n    pass\n'''",
        "def f():\n    f()\nf()",
    ],
)
def test_only_the_last_test_says_that_all_ran(place, program):
    assert not run(program, TEST).ok


def test_a_program_that_puts_others_in_their_place_is_judged_all_the_same(place):
    assert run("import os, sys\nsys.stdout.close()\nos.close(2)\n" + ADDS, TEST).ok
    assert run("import os, sys\nos._exit = os.write = sys.exit = lambda *a: 0\n" + ADDS, TEST).ok


@pytest.mark.parametrize(
    "program, why",
    [
        ("while True: pass", "processor time"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "processor time"),
        ("import time\ntime.sleep(100)", "ran longer than"),
        ("x = []\nwhile True: x.append(bytearray(2**20))", "MemoryError"),
        ("import mmap\nx = [mmap.mmap(-1, 2**26) for _ in range(99)]", "Cannot allocate memory"),
        ("import os\nwhile True: os.fork()", "Operation not permitted"),
        ("import subprocess\nsubprocess.run(['true'])", "Operation not permitted"),
        ("import os\nos.execv('/bin/true', ['true'])", "Permi"),
        ("import threading\nthreading.Thread(target=print).start()", "can't start new thread"),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "Operation not permitted"),
        ("open('big', 'wb').write(bytes(2**26))", "File too large"),
        ("for i in range(99):\n    with open(str(i), 'wb') as f: f.write(bytes(2**23))", "left more than"),
        ("import os\nfor i in range(99999): os.mkdir(str(i))", "left more than"),
        ("import os\nwhile True:\n    os.mkdir('a', 0o700)\n    os.chdir('a')", "left more than"),
        ("while True: print('x' * 100)", "kB of output"),
        ("import os, time\nos.close(1); os.close(2)\ntime.sleep(100)", "ran longer than"),
        ("import socket\nsocket.socket()", "Operation not permitted"),
        ("import socket\nsocket.socketpair()", "Operation not permitted"),
        ("import os\nos.kill(os.getppid(), 9)", "Operation not permitted"),
        ("import os\nos.kill(-1, 9)", "Operation not permitted"),
        ("import os\nos.killpg(0, 9)", "Operation not permitted"),
        ("import os\nos.setsid()", "Operation not permitted"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))", "limit"),
        ("import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))", "not permitted"),
        ("input()", "EOFError"),
        ("import os\nos.memfd_create('x')", "Operation not permitted"),
        ("import ctypes\nif ctypes.CDLL(None).unshare(0x10000000): raise OSError('no')", "no"),
    ],
)  # fmt: skip
def test_what_costs_too_much_or_reaches_out_is_stopped(place, program, why):
    limits = {"wall_seconds": 1 if "ran longer" in why else 60, "seconds": 1 if "processor" in why else 5}
    began = time.monotonic()
    found = run(program + "\n" + ADDS, TEST, disk_mb=32, **limits)
    assert not found.ok and why in found.why
    assert len(found.output) <= 256 * 1024
    assert time.monotonic() - began < 60


@pytest.fixture(params=["here", 1, 2, 3, 5])
def kernel(request, tmp_path, monkeypatch):
    """The confinement as this kernel has it, and as one would whose Landlock is older."""
    if request.param != "here":
        older = tmp_path / "older"
        shutil.copytree(Path(sandbox.__file__).parent, older)
        text = (older / "kernel.py").read_text()
        call = '_call("Landlock", others["landlock_create_ruleset"], 0, 0, 1)'
        assert call in text
        (older / "kernel.py").write_text(text.replace(call, f"min({request.param}, {call})"))
        monkeypatch.setattr(sandbox, "SCRIPT", older / "inside.py")
    return request.param


def test_files_of_the_user_stay_as_they_are(place, tmp_path, kernel):
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter").write_text("dear")
    os.symlink(home, tmp_path / "link")
    before = (home / "letter").stat()
    attempts = "\n".join(
        [
            "import os, shutil",
            "def attempt(act, *a, **k):",
            "    try:",
            "        act(*a, **k)",
            "    except OSError:",
            "        return",
            "    assert act is shutil.rmtree, act",  # it ignores errors here
            *(
                f"for home in {[str(home), str(tmp_path / 'link'), '../../home']!r}:\n    letter = home + '/letter'\n    {line}"
                for line in (
                    "attempt(shutil.rmtree, home, ignore_errors=True)",
                    "attempt(os.unlink, letter)",
                    "attempt(open, letter)",
                    "attempt(open, letter, 'w')",
                    "attempt(open, letter, 'r+')",
                    "attempt(os.open, letter, os.O_RDONLY | os.O_TRUNC)",
                    "attempt(os.truncate, letter, 0)",
                    "attempt(os.rename, letter, 'mine')",
                    "attempt(os.rename, home, home + '2')",
                    "attempt(os.link, letter, 'mine')",
                    "attempt(os.chmod, letter, 0)",
                    "attempt(os.chown, letter, 1, 1)",
                    "attempt(os.utime, letter, (1, 1))",
                    "attempt(os.setxattr, letter, 'user.a', b'1')",
                    "attempt(os.mkdir, home + '/new')",
                    "attempt(os.symlink, '/', home + '/new')",
                    "attempt(os.mknod, home + '/new')",
                    "attempt(os.listdir, home)",
                )
            ),
            "os.symlink('../../home/letter', 'by')\nattempt(open, 'by', 'w')\nattempt(open, '/proc/self/environ')",
        ]
    )
    found = run(attempts)
    assert found.ok, f"{found.why} {found.output}"
    assert [p.name for p in home.iterdir()] == ["letter"] and (home / "letter").read_text() == "dear"
    after = (home / "letter").stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns) == (before.st_mode, before.st_uid, before.st_mtime_ns)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="this processor has one table of system calls")
def test_the_other_table_of_system_calls_is_no_way_out(place):
    """The 32-bit table has other numbers: 0x14 there is getpid. A page of machine code asks by it."""
    code = "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)"
    program = f"import ctypes, mmap\npage = {code}\npage.write(bytes.fromhex('b814000000cd80c3'))\n"
    program += "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()"
    assert run(program).why in ("died of SIGSYS", "died of SIGSEGV")
    assert (
        run("import ctypes\nif ctypes.CDLL(None).syscall(0x40000029, 2, 1, 0) < 0: raise OSError('x32')").why
        == "OSError: x32"
    )


def test_what_went_wrong_cannot_speak_to_a_terminal(place):
    assert run("raise ValueError('\\x1b[2Jgone\\n')").why == "ValueError: ?[2Jgone"


def test_no_connection_leaves(place):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        found = run(f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}))")
        with pytest.raises(TimeoutError):
            server.accept()
    assert not found.ok


def test_a_daemon_of_a_daemon_is_dead(place):
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(60)\n    os._exit(0)\n"
    quiet = f"try:\n    exec({daemon!r})\nexcept OSError:\n    pass\n"
    found = run(quiet + ADDS, TEST)
    assert found.ok, "what it tried was refused, and it is judged by its tests"
    assert living(place) == []


def test_nothing_of_the_environment_comes_in(place, monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)
    tests = "import os, sys\nassert 'hidden' not in str(os.environ)\nassert os.environ['HOME'] == os.getcwd()\nassert os.listdir('.') == []\n"
    tests += f"try:\n    os.write({writing}, b'x')\nexcept OSError:\n    pass\nassert sys.argv == ['program'] and __name__ != '__main__'"
    found = run("", tests)
    os.close(writing)
    assert found.ok, found.why
    assert os.read(reading, 1) == b"", "no descriptor of ours is open there"
    os.close(reading)


def test_when_the_grader_is_killed_its_program_dies(tmp_path):
    code = "import sys; from fedlora.code_eval.sandbox import Sandbox; Sandbox().run('import time; time.sleep(60)')"
    grader = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)})
    until(
        lambda: (
            any(folder.measure(str(p), 9)[1] == 0 for p in tmp_path.glob("fedlora-program-*")) and sleeping(tmp_path)
        )
    )
    grader.send_signal(signal.SIGKILL)
    grader.wait()
    until(lambda: living(tmp_path) == [])


def test_a_folder_is_removed_however_deep_and_whatever_its_modes(tmp_path):
    top = tmp_path / "deep"
    top.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("stays")
    here = os.open(top, os.O_RDONLY)
    for level in range(1500):
        os.mkdir("a", dir_fd=here)
        if level % 500 == 0:
            os.symlink(outside, "b", dir_fd=here)
        below = os.open("a", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.mkdir("closed", 0, dir_fd=here)
    os.close(here)
    folder.remove(str(top))
    assert not top.exists() and (outside / "file").read_text() == "stays"


REFUSING = """
import sys
sys.path.insert(0, {neighbours!r})
import kernel, struct
from syscalls import read_syscalls
others = read_syscalls({machine!r})[1]
code = [kernel._encode(kernel.LOAD, 0), kernel._encode(kernel.EQUAL, others[{call!r}], 0, 1)]
code += [kernel._encode(kernel.RETURN, value) for value in (0x00050000 | 38, 0x7FFF0000)]
kernel._prctl("", 38, 1)
kernel.install_filter(others["seccomp"], b"".join(code))
from fedlora.code_eval.sandbox import Sandbox, SandboxError
try:
    Sandbox().run("open({marker!r}, 'w')")
except SandboxError as error:
    print(error)
"""


@pytest.mark.parametrize("call", ["landlock_create_ruleset", "landlock_restrict_self", "seccomp", "capset"])
def test_a_machine_that_lacks_a_part_runs_nothing(tmp_path, call):
    neighbours, machine = str(Path(sandbox.__file__).parent), platform.machine()
    marker = str(tmp_path / "marker")
    code = REFUSING.format(neighbours=neighbours, machine=machine, call=call, marker=marker)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.startswith("this machine cannot confine a program (") and found.stdout.count("\n") == 1
    assert "Function not implemented" in found.stdout
    assert not Path(marker).exists()


def test_a_confinement_that_does_not_hold_is_found_out(monkeypatch):
    """Where the kernel says yes to every step and yet lets something through, nothing is run either."""
    monkeypatch.setattr(sandbox, "find_readable", lambda: ["/"])
    sandbox.check_confinement.cache_clear()
    try:
        with pytest.raises(SandboxError, match="open is not refused"):
            run(ADDS, TEST)
    finally:
        sandbox.check_confinement.cache_clear()


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    sandbox.check_confinement.cache_clear()
    try:
        with pytest.raises(SandboxError, match="Linux only"):
            run(ADDS, TEST)
    finally:
        sandbox.check_confinement.cache_clear()


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="memory_mb is 0"):
        Sandbox(memory_mb=0)


SYSTEM = "/usr/bin/python3"


def _of_the_system() -> bool:
    """Whether root can try the sandbox as somebody without rights, with an interpreter that others may read."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or not Path(SYSTEM).exists():
        return False
    asked = [SYSTEM, "-c", "import sys; print(sys.version_info >= (3, 11))"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == "True"


@pytest.mark.skipif(not _of_the_system(), reason="needs root and a system Python of 3.11 or later")
def test_a_user_without_rights_is_protected_as_well():
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o777)
        package = Path(place) / "fedlora"
        shutil.copytree(
            Path(sandbox.__file__).parent, package / "code_eval", ignore=shutil.ignore_patterns("__pycache__")
        )
        (package / "__init__.py").write_text("")
        subprocess.run(["chmod", "-R", "a+rX", str(package)], check=True)
        code = (
            f"from fedlora.code_eval.sandbox import Sandbox; r = Sandbox().run({ADDS!r}, {TEST!r}); print(r.ok, r.why)"
        )
        code += "\nr = Sandbox().run('import os; os.fork()'); print(r.ok, r.why)"
        found = subprocess.run(
            [SYSTEM, "-B", "-c", code], user=65534, group=65534, extra_groups=[], capture_output=True, text=True,
            cwd=place, env={"PYTHONPATH": place, "TMPDIR": place}, check=False,
        )  # fmt: skip
        assert found.stdout == "True \nFalse PermissionError: [Errno 1] Operation not permitted\n", found.stderr
