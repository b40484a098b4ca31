"""`slm chat`."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from slmkit.cli import options
from slmkit.cli.errors import in_words
from slmkit.cli.show import INDENT, MarkdownText, PlainText, counted, open_model, printable
from slmkit.config import UserError

if TYPE_CHECKING:
    from slmkit.generation.chat import ChatSession

HELP = '''\
What can be typed beside messages:
/retry         another answer to the last question
/undo          take back the last question and its answer
/system TEXT   set the system message; /system - removes it, /system shows it
/reset         forget the conversation, but not the system message
/save [FILE]   write the conversation to a file
/load [FILE]   go on with a conversation that was saved
/quit          leave, as Ctrl-D does; Ctrl-C stops an answer
A line that ends with \\ goes on in the next one.
A message that begins with """ goes on to the next """.'''
MOST = "Stop an answer after this many tokens; default: what the model advises, or 300."
FILE = "chat.json"  # of /save and /load without a name
YOU, MODEL, MORE, QUOTES = "you> ", "model> ", "...> ", '"""'
CUT = {"length": "cut at {} tokens: --max-new-tokens allows more", "context": "cut: the model's context is full"}


@options.with_options(options.SAMPLING)
def chat(
    model: options.ModelPath,
    system: Annotated[str | None, typer.Option(help="A system message for the whole conversation.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help=MOST)] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Print answers as they are: no Markdown, no colours.")] = False,
    others: options.OtherModels = None,
    device: options.DeviceName = "auto",
    **sampling: Any,
) -> None:
    """Talk to a model.

    Ctrl-C stops an answer, Ctrl-D ends the chat. /help lists what can be typed beside messages: /retry, /undo, /system,
    /reset, /save, /load and /quit.

    Example: slm chat runs/quickstart/chat
    """
    from slmkit.generation.sampling_settings import USUAL_IN_CHAT

    decoder, tokenizer, settings, advice = open_model(model, others, device, USUAL_IN_CHAT, sampling)
    from slmkit.files.find import learned_conversations
    from slmkit.generation.chat import ChatSession
    from slmkit.model.files.generation_config import new_tokens

    most = max_new_tokens or new_tokens(advice, usual=300)
    session = ChatSession(decoder, tokenizer, settings, system=system, max_new_tokens=most)
    if learned_conversations(model) is False:
        print(f"note: {model} was trained on plain text alone and never saw a conversation, so it will hardly answer.")
        print(f"To teach it: slm train own-chat model.path={model} data.source=YOUR_CHATS.jsonl")
    print("/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the chat.")
    _Dialogue(session, plain).run()


class _Dialogue:
    """Reads messages and commands, and shows answers: as Markdown and in colours on a terminal, else as plain text."""

    def __init__(self, session: ChatSession, plain: bool) -> None:
        # Lines are drawn over, so the terminal's real size counts. LINES and COLUMNS may be those of another one.
        variables = {name: value for name, value in os.environ.items() if name not in ("LINES", "COLUMNS")}
        console = Console(highlight=False, _environ=variables)
        self.session, self.console = session, console
        self.is_plain = plain or not console.is_terminal or console.is_dumb_terminal or console.no_color
        self.file: str | None = None  # of the last /save or /load
        self.own: set[str] = set()  # files of this chat, which /save may overwrite

    def run(self) -> None:
        with suppress(ImportError):  # on Windows
            import readline  # arrow keys, history, and below: pasting of several lines

            readline.parse_and_bind("set enable-bracketed-paste on")
        while (message := self._read_message()) is not None and not re.match(r"/quit(\s|$)", message):
            try:
                if message.startswith("/"):
                    said = self._obey(*message.split(maxsplit=1))
                    print(printable(said).replace("\n", f"\n{INDENT}"), end="\n" if said else "")
                elif message.strip():
                    self._answer(self.session.reply(message.strip()))
            except UserError as error:
                print(f"({printable(in_words(error) or '')})")

    def _read_message(self) -> str | None:
        """What the user writes next; None at the end of the input. Ctrl-C gives up what was written.

        What stands between three quotation marks is never a command: it is returned with a line end before it.
        """
        try:
            text = self._read_line(YOU)
            if text.startswith(QUOTES):
                while len(text) < 2 * len(QUOTES) or not text.rstrip().endswith(QUOTES):
                    text += "\n" + self._read_line(MORE)
                return "\n" + text.rstrip()[len(QUOTES) : -len(QUOTES)]
            while text.endswith("\\"):
                text = text[:-1] + "\n" + self._read_line(MORE)
        except (EOFError, KeyboardInterrupt) as error:
            print()
            return "" if isinstance(error, KeyboardInterrupt) else None
        return text

    def _read_line(self, prompt: str) -> str:
        """A line of the terminal, or of a file, which is then shown. Raises `EOFError` at the end."""
        if sys.stdin.isatty():
            is_coloured = not self.is_plain and "readline" in sys.modules  # it expects \1 and \2 around colours
            return input(f"\1\x1b[1;36m\2{prompt}\1\x1b[0m\2" if is_coloured else prompt)
        if not (line := sys.stdin.readline()):
            raise EOFError
        print(prompt + printable(line.rstrip("\r\n")))
        return line.rstrip("\r\n")

    def _obey(self, command: str, argument: str = "") -> str:
        """Run a command; returns what to say about it."""
        session, file = self.session, argument.strip() or self.file or FILE
        match command:
            case "/help":
                return HELP
            case "/retry":
                self._answer(session.retry())
                return ""
            case "/undo":
                return f"(taken back: {session.undo()})"
            case "/reset":
                session.reset()
                return "(forgotten)"
            case "/system":
                if argument:
                    session.set_system(None if argument.strip() == "-" else argument)
                return f"(system message: {session.system or 'none'})"
            case "/save":
                if os.path.isfile(file) and os.path.realpath(file) not in self.own:
                    return f"({file} exists, and is not of this chat; name another file: /save FILE)"
                session.save(file)
                self._is_own(file)
                return f"(saved to {file})"
            case "/load":
                system = session.system
                session.load(file)
                self._is_own(file)
                remarks = [counted(len(session.messages), "message")]
                if system not in (None, session.system):
                    found = "one of its own" if session.system else "none"
                    remarks.append(f"the system message is gone, since the file has {found}: /system TEXT sets it")
                return f"(going on with {file}: {'; '.join(remarks)})"
        return f"(unknown command {command}: /help lists them)"

    def _is_own(self, file: str) -> None:
        self.file = file
        self.own.add(os.path.realpath(file))

    def _answer(self, pieces: Generator[str, None, None]) -> None:
        """Show the answer while it is generated. Ctrl-C ends it and keeps the text so far."""
        session, console, began, forgotten = self.session, self.console, time.monotonic(), self.session.forgotten
        text: PlainText | MarkdownText | None = None
        with _undisturbed() as interrupted:
            try:
                for piece in pieces:
                    if piece:
                        if text is None:
                            label = Text(MODEL, "bold magenta")
                            text = PlainText(MODEL) if self.is_plain else MarkdownText(console, label)
                        text.add(piece)
                    if interrupted.is_set():
                        pieces.close()
            finally:
                if text is not None:
                    text.close()
        remarks = ["stopped"] if interrupted.is_set() else ["no answer"] if text is None else []
        if console.is_terminal:
            seconds = time.monotonic() - began
            speed = f"{session.tokens / seconds:,.1f} tokens/s"
            remarks.append(f"{counted(session.tokens, 'token')} in {seconds:.1f} s, {speed}")
        if session.finish_reason in CUT:
            remarks.append(CUT[session.finish_reason].format(session.tokens))
        if session.forgotten > forgotten:
            remarks.append(f"{session.forgotten} messages no longer fit the context and are forgotten")
        if remarks:
            end = "\n" if self.is_plain else "\n\n"
            console.print(f"({'; '.join(remarks)})", style=None if self.is_plain else "dim", end=end, soft_wrap=True)


@contextmanager
def _undisturbed() -> Iterator[threading.Event]:
    """What is typed is not shown until it is read. Ctrl-C sets the event, so that it interrupts nothing halfway; a
    second Ctrl-C raises `KeyboardInterrupt`.
    """
    event = threading.Event()

    def note(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, note))
        if sys.stdin.isatty() and sys.platform != "win32":
            import termios

            before = termios.tcgetattr(sys.stdin)
            stack.callback(termios.tcsetattr, sys.stdin, termios.TCSANOW, before)
            silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
            termios.tcsetattr(sys.stdin, termios.TCSANOW, silent)
        yield event
