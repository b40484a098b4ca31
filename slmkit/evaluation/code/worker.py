"""The two processes behind a verdict. Each runs this file's text as a script of its own, in a sandbox of its own.

`program` executes the candidate's program, which is not trusted, and answers calls. `tests` executes the tests and says
the verdict. The tests know the program's functions as `Remote` objects: a call sends the arguments and gets the result
back as plain data, rebuilt from JSON, so that nothing of the program (no `__eq__`, no replaced builtin) runs in the
process of the tests. What is not plain data stays where it is and is known to the tests by a number.

The file imports nothing but the standard library, since slmkit is not visible in the sandbox, and little of that: a
verdict takes two starts of Python.
"""

from __future__ import annotations

import builtins
import importlib
import itertools
import json
import operator
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

LONGEST = 16 << 20  # bytes of a message
DEEPEST = 100  # levels of nesting in a value
COLLECTIONS: dict[str, type] = {kind.__name__: kind for kind in (list, tuple, set, frozenset)}
PLAIN = (bool, int, float, complex, str, bytes, tuple, list, dict, frozenset, set, range)
ENDED = "the program has ended"
TYPES = {kind.__name__: kind for kind in (*PLAIN, object)}
NUMBERS = {"Fraction": "fractions", "Decimal": "decimal"}
# How values that JSON does not have are written, and read.
WRITTEN: dict[type, Callable[[Any], Any]] = {
    int: hex, complex: lambda value: [value.real, value.imag], bytes: bytes.hex,
    range: lambda value: [value.start, value.stop, value.step],
}  # fmt: skip
READ: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16), "complex": lambda parts: complex(*parts), "bytes": bytes.fromhex,
    "range": lambda bounds: range(*bounds), "type": lambda name: TYPES[name],
} | {
    name: lambda text, name=name, module=module: getattr(importlib.import_module(module), name)(text)
    for name, module in NUMBERS.items()
}  # fmt: skip
# What the tests may do with a thing in the program's process. Comparing is not among them: the tests do that.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "bool": bool, "call": lambda function, positional, named: function(*positional, **named), "get": getattr,
    "item": operator.getitem, "iter": iter, "len": len, "next": lambda things: [*itertools.islice(things, 1)],
    "put": operator.setitem, "set": setattr, "str": str,
}  # fmt: skip


class Link:
    """Messages over a socket: four bytes of length, then a list in JSON."""

    def __init__(self, descriptor: int, number_of: Callable[[Any], int], thing_of: Callable[[int], Any]) -> None:
        """`number_of`, `thing_of`: from a value that is not plain data to the number that is sent for it, and back."""
        self.reader, self.descriptor = os.fdopen(descriptor, "rb"), descriptor
        self.number_of, self.thing_of = number_of, thing_of

    def send(self, *message: Any) -> None:
        """Raises `ValueError` for a value that is nested too deep or too long."""
        text = json.dumps([self.pack(part) for part in message]).encode()
        if len(text) > LONGEST:
            raise ValueError(f"a value of {len(text)} bytes, more than {LONGEST}")
        rest = memoryview(len(text).to_bytes(4, "big") + text)
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]

    def receive(self) -> list[Any]:
        """Raises `EOFError` if the other process has ended, and others for what `send` did not write."""
        length = int.from_bytes(self.reader.read(4), "big")
        if not 0 < length <= LONGEST or len(text := self.reader.read(length)) < length:
            raise EOFError
        return [self.unpack(part) for part in json.loads(text)]

    def pack(self, value: Any, depth: int = DEEPEST) -> Any:
        """Subclasses of plain types (`Counter`, `namedtuple`, numpy's scalars) are written as their plain type."""
        if not depth:
            raise ValueError(f"a value nested deeper than {DEEPEST} levels")
        module, name = type(value).__module__, type(value).__name__
        if module == "numpy" and value.shape == ():
            value = value.item()
        kind = next((kind for kind in PLAIN if isinstance(value, kind)), None)
        if value is None or kind in (bool, float, str) or (kind is int and -(2**53) < value < 2**53):
            return value
        if kind is not None and kind in COLLECTIONS.values():
            return [kind.__name__, *(self.pack(part, depth - 1) for part in iter(value))]
        if kind is dict:
            pairs = dict.items(value)
            return ["dict", *([self.pack(key, depth - 1), self.pack(part, depth - 1)] for key, part in pairs)]
        if kind is not None:
            return [kind.__name__, WRITTEN[kind](value)]
        if NUMBERS.get(name) == module:
            return [name, str(value)]
        if isinstance(value, type) and value in TYPES.values():
            return ["type", value.__name__]
        return ["thing", self.number_of(value)]

    def unpack(self, data: Any) -> Any:
        if type(data) is not list:
            return data
        tag, *parts = data
        if tag in COLLECTIONS:
            return COLLECTIONS[tag]([self.unpack(part) for part in parts])
        if tag == "dict":
            return {self.unpack(key): self.unpack(part) for key, part in parts}
        (part,) = parts
        return self.thing_of(part) if tag == "thing" else READ[tag](part)


def answer(descriptor: int) -> None:
    """The program's process: executes the program, then what is asked, until the other process has ended."""
    things: list[Any] = []
    numbers: dict[int, int] = {}

    def number_of(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(things)
            things.append(value)
        return numbers[id(value)]

    def execute(text: str) -> Any:
        module = sys.modules["program"] = type(sys)("program")
        exec(compile(text, "program", "exec"), module.__dict__)
        return module

    link = Link(descriptor, number_of, things.__getitem__)
    operations = OPERATIONS | {"execute": execute}
    while True:
        try:
            operation, *arguments = link.receive()
        except EOFError:
            return
        try:
            link.send("returned", operations[operation](*arguments))
        except BaseException as error:
            link.send("raised", [kind.__name__ for kind in type(error).__mro__], str(error)[:500])


class Remote:
    """A thing in the program's process. Two are equal if they are the same thing."""

    _ask: Callable[..., Any]
    _number: int

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        self.__dict__.update(_ask=ask, _number=number)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._ask("call", self, positional, named)

    def __next__(self) -> Any:
        if found := self._ask("next", self):
            return found[0]
        raise StopIteration


for method, operation in {
    "__getattr__": "get", "__setattr__": "set", "__getitem__": "item", "__setitem__": "put", "__iter__": "iter",
    "__len__": "len", "__bool__": "bool", "__str__": "str",
}.items():  # fmt: skip
    setattr(Remote, method, lambda self, *arguments, name=operation: self._ask(name, self, *arguments))


def names_in(code: Any) -> set[str]:
    """The names that the code reads, attributes too."""
    return {*code.co_names}.union(*(names_in(part) for part in code.co_consts if isinstance(part, type(code))))


def judge(descriptor: int, program: str, tests: str, finish: Callable[[str], None]) -> None:
    """The tests' process. `finish(reason)` says the verdict and ends the process; no reason: passed."""
    remotes: dict[int, Remote] = {}

    def number_of(value: Any) -> int:
        if type(value) is not Remote:
            raise TypeError(f"the program cannot be given a {type(value).__name__}")
        return value._number

    def ask(operation: str, *arguments: Any) -> Any:
        try:
            link.send(operation, *arguments)
            outcome, *found = link.receive()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return finish(ENDED)
        except (LookupError, ArithmeticError, RecursionError, MemoryError, UnicodeError, json.JSONDecodeError):
            outcome = "unreadable"
        if outcome == "returned" and len(found) == 1:
            return found[0]
        if outcome != "raised":
            return finish("the program's answer cannot be read")
        kinds, text = found
        if "Exception" not in kinds:  # SystemExit, KeyboardInterrupt: not for the tests to catch
            return finish(f"the program raised {kinds[0]}: {text}")
        known = (getattr(builtins, kind, None) for kind in kinds)
        kind = next(kind for kind in known if isinstance(kind, type) and issubclass(kind, Exception))
        # A StopIteration would end a loop of the tests before its time.
        kind = RuntimeError if issubclass(kind, StopIteration | StopAsyncIteration) else kind
        error = kind.__new__(kind)
        error.args = (text,)
        raise error

    link = Link(descriptor, number_of, lambda number: remotes.setdefault(number, Remote(ask, number)))
    try:
        there = ask("execute", program)
        module = sys.modules["program"] = type(sys)("program")
        module.__dict__["__getattr__"] = lambda name: getattr(there, name)
        code = compile(tests, "tests", "exec")
        space: dict[str, Any] = {"__name__": "tests"}
        for name in names_in(code) - {*dir(builtins)}:
            try:
                known = name in sys.stdlib_module_names
                space[name] = importlib.import_module(name) if known else getattr(there, name)
            except (AttributeError, ImportError):
                continue  # the tests define it, or miss it
        exec(code, space)
    except BaseException as error:
        trace, line = error.__traceback__, 0
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "tests" else line
            trace = trace.tb_next
        finish(
            f"{type(error).__name__}: {error}"[:500] + (f" in: {tests.splitlines()[line - 1].strip()}" if line else "")
        )
    finish("")


# seccomp(2), by machine: its number for audits, its `socket`, and the system calls that fail: memory that belongs to no
# process (shmget, msgget, memfd_create, memfd_secret), and doors to the kernel that no program of a task needs (bpf,
# userfaultfd, perf_event_open, io_uring_setup, add_key, request_key, keyctl, unshare, setns).
GENERIC = (194, 186, 279, 447, 280, 282, 241, 425, 217, 218, 219, 97, 268)
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, 41, (29, 68, 319, 447, 321, 323, 298, 425, 248, 249, 250, 272, 308)),
    "aarch64": (0xC00000B7, 198, GENERIC), "riscv64": (0xC00000F3, 198, GENERIC),
}  # fmt: skip
FAMILIES = (1, 2, 10, 16)  # of sockets: unix, IPv4, IPv6, netlink. Others, such as vsock, know no network namespaces
OTHER_ABI, ALLOW, FAIL = 0x40000000, 0x7FFF0000, 0x00050001  # the first number of x32; FAIL: with EPERM
LOAD, EQUAL, AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06  # instructions of a filter (BPF)


def forbid_system_calls() -> None:
    """Raises `OSError` where the kernel has no filters, and `KeyError` on other machines. The process has given up new
    privileges before, as both kinds of sandbox do.
    """
    import ctypes

    def answer_if(kind: int, value: int, answer: int) -> list[tuple[int, ...]]:
        return [(kind, 0, 1, value), (RETURN, 0, 0, answer)]  # else leave out the next one

    audit, socket, forbidden = SYSTEM_CALLS[os.uname().machine]
    code: list[tuple[int, ...]] = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, audit), (RETURN, 0, 0, FAIL), (LOAD, 0, 0, 0)]
    for number in forbidden:
        code += answer_if(EQUAL, number, FAIL)
    code += [*answer_if(AT_LEAST, OTHER_ABI, FAIL), (EQUAL, 1, 0, socket), (RETURN, 0, 0, ALLOW), (LOAD, 0, 0, 16)]
    for family in FAMILIES:
        code += answer_if(EQUAL, family, ALLOW)
    code.append((RETURN, 0, 0, FAIL))
    text = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
    program = struct.pack("@HP", len(code), ctypes.addressof(text))
    if ctypes.CDLL(None, use_errno=True).prctl(22, 2, program, 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "prctl")


def main(settings: dict[str, Any]) -> None:
    """Gives up what the process may do, and then does its part."""
    if os.getpgrp() != os.getpid():
        os.setsid()  # a signal to its process group reaches nothing outside
    if settings["user"] and os.geteuid() == 0:  # the limit on processes does not bind root
        os.setgroups([])
        os.setresgid(*[settings["user"]] * 3)
        os.setresuid(*[settings["user"]] * 3)
    for name, value in settings["limits"].items():
        limit = getattr(resource, name)
        most = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value, value) if most == resource.RLIM_INFINITY else (min(value, most),) * 2)
    if settings["forbid"]:
        forbid_system_calls()
    sys.path += settings["packages"]
    if settings["part"] == "program":
        return answer(settings["link"])

    verdict, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    request = json.load(sys.stdin)
    for number in range(3):
        os.dup2(null, number)

    def finish(reason: str) -> None:
        os.write(verdict, json.dumps(reason).encode())
        os._exit(0)

    return judge(settings["link"], request["program"], request["tests"], finish)


main(json.loads(sys.argv[1]))
