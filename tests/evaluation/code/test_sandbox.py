"""Programs that mean harm, one by one, in the real sandbox: none passes, none outlives its verdict, nothing hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slmkit.config import UserError
from slmkit.evaluation.code import sandbox
from slmkit.evaluation.code.sandbox import Limits, Verdict, run

KINDS = [kind for kind in ("bubblewrap", "namespaces") if sandbox.works(kind)]
pytestmark = pytest.mark.skipif(not KINDS, reason="neither bubblewrap nor Linux namespaces work on this machine")

# A size that no other process has in its command line: by it the processes of these tests are found.
SMALL = Limits(seconds=1, wall_seconds=6, memory=256 << 20, file=(4 << 20) + os.getpid())
SQUARES = "assert f(2) == 4\nassert f(3) == 9"
TO_ALL = "for number in range(3, 64):\n    try: os.write(number, {message})\n    except OSError: pass\n"

# Each would pass if it reached the verdict; none computes a square.
FORGERIES = {
    "exits": "import sys\nsys.exit(0)",
    "exits when called": "def f(x): raise SystemExit(0)",
    "exits at once": "import os\nos._exit(0)",
    "exits at once when called": "import os\ndef f(x): os._exit(0)",
    "exits in a hook": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "is equal to everything": """
class Same:
    def __eq__(self, other): return True
    def __bool__(self): return True
    def __hash__(self): return 4
def f(x): return Same()""",
    "is a number equal to everything": """
class Same(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Same(7)""",
    "is a text equal to everything": """
class Same(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(x): return Same(x)""",
    "is a list equal to everything": """
class Same(list):
    def __eq__(self, other): return True
    def __iter__(self): return iter([4, 9])
def f(x): return Same()""",
    "replaces builtins": """
import builtins
for name in ("isinstance", "type", "abs", "len", "all", "any", "print", "hash", "int"):
    setattr(builtins, name, lambda *a, **k: True)
def f(x): return 0""",
    "replaces AssertionError": """
import builtins
class Nothing(BaseException): pass
builtins.AssertionError = Nothing
def f(x): return 0""",
    "replaces modules": """
import sys, json, operator
json.dumps = lambda *a, **k: '["returned", true]'
sys.modules["builtins"] = sys.modules["tests"] = sys.modules["__main__"]
def f(x): return 0""",
    "raises a BaseException": "class B(BaseException): pass\ndef f(x): raise B",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "raises GeneratorExit": "def f(x): raise GeneratorExit",
    "prints a verdict": "import os, sys\nprint('\"\"', flush=True)\n"
    + TO_ALL.format(message="b'\"\"'").replace("3", "0"),
    "answers before it is asked": "import os\nm = b'[\"returned\", true]'\nm = (len(m).to_bytes(4, 'big') + m) * 50\n"
    + TO_ALL.format(message="m")
    + "def f(x): return 0",
    "answers with an exception of its own": 'import os\nm = b\'["raised", ["Exception", "SystemExit"], ""]\'\n'
    "m = (len(m).to_bytes(4, 'big') + m) * 50\n" + TO_ALL.format(message="m") + "def f(x): return 0",
    "writes what is no message": "import os\n" + TO_ALL.format(message="b'\\xff' * 100") + "def f(x): return 0",
    "announces four gigabytes": "import os\n" + TO_ALL.format(message="b'\\xff\\xff\\xff\\xff['"),
    "nests a message": "import os\nm = b'[' * 4000000\n" + TO_ALL.format(message="len(m).to_bytes(4, 'big') + m"),
    "searches the frames": """
import gc, sys
def f(x):
    frame = sys._getframe()
    for found in [*gc.get_objects(), *iter(lambda: frame and frame.f_globals, frame)][:100000]:
        if isinstance(found, dict) and callable(found.get("judge")): found["judge"] = lambda *a: None
    while frame:
        for value in [*frame.f_locals.values(), *frame.f_globals.values()]:
            if getattr(value, "__name__", "") in ("finish", "judge"):
                try: value("")
                except BaseException: pass
        frame = frame.f_back
    return 0""",
    "traces": """
import sys
def trace(frame, event, argument):
    for name in [*frame.f_locals]: frame.f_locals[name] = True
    return trace
sys.settrace(trace)
def f(x): return 0""",
    "closes every descriptor": "import os\nos.closerange(0, 64)\ndef f(x): return 0",
    "writes to other processes": """
import glob
for path in glob.glob("/proc/*/fd/*") + glob.glob("/dev/fd/*"):
    try: open(path, "w").write('""')
    except OSError: pass
def f(x): return 0""",
    "traces other processes": """
import ctypes
c = ctypes.CDLL(None)
for process in range(1, 40):
    c.ptrace(16, process, 0, 0)
    c.process_vm_writev(process, None, 0, None, 0, 0)
def f(x): return 0""",
    "kills its parent": """
import os, signal
for process in (os.getppid(), 1, -1, *range(2, 3000), 0):
    try: os.kill(process, signal.SIGKILL)
    except OSError: pass
def f(x): return 0""",
    "kills itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "recurses": "def f(x): return f(x)",
    "recurses to the end of the stack": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "nests a value without end": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "returns a long value": "def f(x): return 'a' * (40 << 20)",
    "is not Python": "def f(x) return",
    "lies about its class": "class Lie:\n    __class__ = int\n    __eq__ = lambda a, b: True\ndef f(x): return Lie()",
}

# Each uses something without end.
HOGS = {
    "sleeps and ignores SIGTERM": """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(3600)""",
    "leaves a grandchild": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(3600)
    os._exit(0)
def f(x): return 0""",
    "leaves a program": """
import subprocess
subprocess.Popen(["/usr/bin/sleep", "3617.25"], start_new_session=True)
def f(x): return 0""",
    "loops in threads": """
import threading
def loop():
    while True: pass
threading.Thread(target=loop).start()
f = loop""",
    "prints without end": "while True: print('a' * 100000)",
    "returns an endless generator": "import itertools\ndef f(x): return itertools.repeat(x)",
    "forks without end": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "starts threads without end": """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(3600,)).start()
    except RuntimeError: time.sleep(0.01)""",
    "takes 10 GB": "a = bytearray(10 << 30)\ndef f(x): return x * x",
    "takes 10 GB bit by bit": "a = []\nwhile True: a.append(bytearray(10 << 20))",
    "takes 10 GB in children": """
import os, time
for _ in range(10):
    if os.fork() == 0:
        a = b"a" * (100 << 20)
        time.sleep(3600)
time.sleep(3600)""",
    "sends signals without end": """
import os, signal
signal.signal(signal.SIGALRM, lambda *a: None)
signal.setitimer(signal.ITIMER_REAL, 1e-6, 1e-6)
while True: os.kill(os.getpid(), signal.SIGALRM)""",
    "fills the disk with empty files": """
import itertools
for n in itertools.count(): open(f"/tmp/{n}", "x").close()""",
    "fills the disk": """
import itertools
def f(x):
    for n in itertools.count(1):
        try: open(f"/tmp/{n}", "wb").write(b"a" * (1 << 20))
        except OSError: return n""",
}
HOSTILE = FORGERIES | HOGS


def processes_with(marker: str) -> list[str]:
    """Command lines with a text in them, of all processes of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text(errors="replace"))
        except OSError:
            continue
    return [line for line in found if marker in line]


def gone(*markers: str) -> bool:
    """Whether no process has such a text in its command line, soon: a busy machine gets longer."""
    deadline = time.monotonic() + 60
    while (left := [line for marker in markers for line in processes_with(marker)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not left


@pytest.fixture(scope="module")
def verdicts() -> dict[str, Verdict]:
    """All hostile programs, a few at a time: most of them wait for their end."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(HOSTILE, pool.map(lambda name: run(HOSTILE[name], SQUARES, SMALL), HOSTILE), strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_not_pass(verdicts: dict[str, Verdict], name: str) -> None:
    assert not verdicts[name].passed
    assert verdicts[name].reason


def test_nothing_is_left_of_hostile_programs(verdicts: dict[str, Verdict]) -> None:
    assert gone(str(SMALL.file), "3617.25")


def test_the_reason_says_what_went_wrong(verdicts: dict[str, Verdict]) -> None:
    expected = {
        "exits": "the program raised SystemExit: 0",
        "exits at once": "the program has ended (exit code 0)",
        "is equal to everything": "AssertionError:  in: assert f(2) == 4",
        "sleeps and ignores SIGTERM": "not finished after 6 s",
        "nests a message": "the program's answer cannot be read",
        "takes 10 GB": "MemoryError: ",
        "takes 10 GB in children": "more than 256 MiB of memory",
    }
    assert {name: verdicts[name].reason for name in expected} == expected
    assert verdicts["is not Python"].reason.startswith("SyntaxError")


@pytest.mark.parametrize("kind", [*KINDS, "none"])
def test_each_kind_of_sandbox_judges_and_ends_what_runs(kind: str) -> None:
    assert sandbox._run(kind, "def f(x): return x * x", SQUARES, SMALL).passed
    assert not sandbox._run(kind, "def f(x): return x + x", SQUARES, SMALL).passed
    limits = Limits(seconds=1, wall_seconds=1, file=SMALL.file + 1)
    verdict = sandbox._run(kind, "import os, time\nos.fork()\ntime.sleep(3600)", SQUARES, limits)
    assert verdict.reason == "not finished after 1 s"
    assert gone(str(limits.file))


WHAT_IS_SEEN = """
import os, socket
def listed(path):
    try: return os.listdir(path)
    except OSError as error: return []
def files(path):
    return [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
def text(path):
    try: return open(path).read()
    except OSError: return ""
def variables(): return sorted(os.environ)
def written(path):
    try: open(path, "a").close()
    except OSError: return False
    return True
def connected(port):
    try: socket.create_connection(("127.0.0.1", port), 5)
    except OSError: return False
    return True
def interfaces(): return [name for _, name in socket.if_nameindex()]
def others(): return [p for p in range(3, 70000) if p != os.getpid() and alive(p)]
def alive(process):
    try: os.kill(process, 0)
    except ProcessLookupError: return False
    except PermissionError: pass
    return True
def rights(): return os.geteuid() == 0
def families(): return {int(s.family) for s in map(opened, range(46)) if s}
def opened(family):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try: return socket.socket(family, kind)
        except OSError: pass
def memory_of_no_process():
    import ctypes
    c = ctypes.CDLL(None)
    return [c.shmget(0, 1 << 20, 0o1600), c.msgget(0, 0o1600), c.memfd_create(b"a", 0)]
def read(): return input()
def privileges():
    import ctypes
    c = ctypes.CDLL(None)
    return [c.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None), c.chroot(b"/tmp"), c.sethostname(b"a", 1)]
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_sees_no_files_variables_processes_or_network(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        tests = f"""
assert text({str(secret)!r}) == text({str(Path(__file__))!r}) == text("/etc/passwd") == text("/proc/self/status") == ""
python = {sys.prefix!r}, {sys.base_prefix!r}
assert [name for name in files({str(Path.home())!r}) if not name.startswith(python)] == []
assert listed("/proc") == listed("/home") == listed("/sys") == listed("/tmp") == []
assert not {{"HF_TOKEN", "USER", "LOGNAME"}} & {{*variables()}}
assert not connected({server.getsockname()[1]})
assert interfaces() == ["lo"]
assert others() == []
assert not rights()
assert privileges() == memory_of_no_process() == [-1, -1, -1]
assert families() == {{1, 2, 10, 16}}  # vsock, which no network namespace has, reaches the machine's host
assert written("/tmp/here")
assert not any(written(path) for path in ("/here", "/usr/here", "/dev/here", {sys.base_prefix + "/lib/here"!r}))
try: read()  # nobody types: it ends at once
except EOFError: pass
else: assert False
"""
        verdict = sandbox._run(kind, WHAT_IS_SEEN, tests, Limits())
    assert verdict.passed, verdict.reason


def test_a_verdict_that_nobody_waits_for_ends_at_once() -> None:
    """As after Ctrl-C."""
    stop = threading.Event()
    stop.set()
    limits = Limits(file=SMALL.file + 3)
    assert run("import time\ntime.sleep(3600)", SQUARES, limits, stop=stop).reason == "stopped"
    assert gone(f'"RLIMIT_FSIZE": {limits.file}')


def test_nothing_is_left_when_slmkit_is_killed() -> None:
    marker = SMALL.file + 2
    script = f"""
from slmkit.evaluation.code.sandbox import Limits, run
run("import os, time\\nos.setsid() if os.fork() else os.fork()\\ntime.sleep(3600)", "", Limits(file={marker}))"""
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(processes_with(f'"RLIMIT_FSIZE": {marker}')) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(processes_with(f'"RLIMIT_FSIZE": {marker}')) >= 5  # both sandboxes and the children
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert gone(f'"RLIMIT_FSIZE": {marker}')


def test_a_slow_program_passes_while_all_cores_are_busy() -> None:
    """It takes 0.9 of the processor time allowed; several at once take what the others would need."""
    slow = "import time\ndef f(x):\n    while time.process_time() < 0.9: pass\n    return x * x"
    with ThreadPoolExecutor(6) as pool:
        verdicts = [*pool.map(lambda _: run(slow, SQUARES, Limits(seconds=1)), range(6))]
    assert [verdict.reason for verdict in verdicts] == [""] * 6


PLAIN = """
import collections, decimal, enum, fractions
class Kind(enum.IntEnum): A = 1
Pair = collections.namedtuple("Pair", "a b")
def same(value): return value
def odd(): return [Kind.A, Pair(1, 2), collections.Counter("aab"), collections.OrderedDict(a=1)]
def exact(): return fractions.Fraction(1, 3), decimal.Decimal("0.10")
def squares(n):
    for i in range(n): yield i * i
class Node:
    def __init__(self, value): self.value, self.next = value, None
    def __len__(self): return 1 + (len(self.next) if self.next else 0)
    def __str__(self): return f"Node({self.value})"
def last(node): return last(node.next) if node.next else node
def fails(kind): raise kind("why")
class Own(ValueError): pass
def own(): raise Own("why")
def stop(x): raise StopIteration
def sum(a, b): return a * b
LIMIT = 7
"""


def test_values_cross_exactly_and_things_stay_where_they_are() -> None:
    tests = """
from program import sum
from collections import Counter
from decimal import Decimal
from fractions import Fraction
values = [None, True, 0, -(2**200), 1.5, -0.0, float("inf"), 1 - 2j, "é\\ud800\\0", b"\\xff", (), [[1], (2,)],
          {1: {"a": ()}}, {1, 2}, frozenset({(1, 2)}), range(3), int, {(1, True): None}]
for value in values:
    assert same(value) == value and type(same(value)) is type(value), value
assert str(same(-0.0)) == "-0.0" and str(same(float("nan"))) == "nan"
assert odd() == [1, (1, 2), {"a": 2, "b": 1}, {"a": 1}]
assert exact() == (Fraction(1, 3), Decimal("0.1"))
assert list(squares(4)) == [0, 1, 4, 9] and next(squares(1)) == 0 and 9 in squares(9)
node = Node(3)
node.next = Node(4)
assert node.value == 3 and len(node) == 2 and last(node) == node.next != node and str(node) == "Node(3)"
assert sum(3, 4) == 12 and LIMIT == 7 and max([1, 2]) == 2
for call, kind in ((lambda: same(), TypeError), (own, ValueError), (lambda: node.missing, AttributeError)):
    try:
        call()
    except kind as error:
        assert kind is not ValueError or str(error) == "why"
    else:
        assert False
try:
    assert list(map(stop, [1])) and False
except RuntimeError:
    pass
assert math.isclose(1.0, 1.0) and abs(-1) == 1
"""
    verdict = run(PLAIN, tests, SMALL)
    assert verdict.passed, verdict.reason


def test_what_the_tests_define_or_python_has_is_not_the_programs() -> None:
    program = (
        "import types\ndef abs(x): return 0\ndef helper(x): return 0\nmath = types.SimpleNamespace(sqrt=lambda x: 0)"
    )
    tests = "def helper(x): return 5\nassert helper(1) == 5 and abs(-3) == 3 and math.sqrt(4) == 2"
    assert run(program, tests, SMALL).passed


def test_without_a_sandbox_it_refuses_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "works", lambda kind: False)
    with pytest.raises(UserError, match=r"install bubblewrap .*--unsafe-code") as error:
        run("", "")
    assert "\n" not in str(error.value)
    assert run("def f(x): return x * x", SQUARES, SMALL, unsafe=True).passed
    assert sandbox.sandbox_kind(unsafe=True) == "none"


def test_many_verdicts_at_once_do_not_share_anything() -> None:
    program = "import os\nopen('/tmp/left', 'x').close()\nimport builtins\nbuiltins.left = True\ndef f(x): return x * x"
    before = threading.active_count()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: run(program, SQUARES, SMALL).passed, range(8)))
    assert threading.active_count() == before
