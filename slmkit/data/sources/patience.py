"""What to do when the network fails: one line that says what happened, and another try after a while.

The wait doubles up to a minute, or is as long as the server asks for (`Retry-After`), and begins anew as soon as
something was read.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from slmkit.config import UserError
from slmkit.network import NetworkError

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds


@dataclass
class Patience:
    """Waits between tries, for `retry_for` seconds without success in all."""

    retry_for: float
    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    say: Callable[[str], None] = logging.getLogger(__name__).warning
    has_read: bool = False
    tries: int = field(default=0, init=False)
    failing_since: float = field(default=0.0, init=False)

    def wait(self, error: NetworkError) -> None:
        """Until the next try. Raises `UserError` where none will help or the time is over."""
        if error.lasting and not self.has_read:
            raise UserError(str(error)) from None
        if self.tries == 0:
            self.failing_since = self.now()
        # A little by chance, so that many processes do not all come back at once.
        delay = min(FIRST_WAIT * 2**self.tries, LONGEST_WAIT) * random.uniform(1, 1.25)
        delay = max(delay, error.retry_after)
        self.tries += 1
        failing = self.now() - self.failing_since
        if failing + delay > self.retry_for:
            raise UserError(f"{error}; given up after {self.tries} tries in {failing:.0f} s (retry_for)") from None
        self.say(f"{error}; try {self.tries + 1} in {delay:.0f} s")
        self.sleep(delay)

    def succeeded(self) -> None:
        self.tries, self.has_read = 0, True

    def until_done(self, work: Callable[[], T]) -> T:
        """The result of `work`, tried again as long as it is interrupted."""
        while True:
            try:
                result = work()
            except NetworkError as error:
                self.wait(error)
            else:
                self.tries = 0
                return result
