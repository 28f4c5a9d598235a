"""Who may use a model and who may change it: many threads at once, or one alone."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

from .errors import SwitchError


class Gate:
    """Threads that use a model, and changes of it between them. One that waits to change it lets
    nobody else begin to use it."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._users: Counter[int] = Counter()  # by thread: how many times it is within
        self._changing = False
        self._waiting = 0  # to change it

    def enter(self) -> None:
        """Use the model until :meth:`leave`; a thread that uses it already, once more."""
        me = threading.get_ident()
        with self._free:
            self._free.wait_for(
                lambda: me in self._users or not (self._changing or self._waiting)
            )
            self._users[me] += 1

    def leave(self) -> None:
        me = threading.get_ident()
        with self._free:
            self._users[me] -= 1
            if not self._users[me]:
                del self._users[me]
            self._free.notify_all()

    def is_user(self) -> bool:
        """Whether this thread uses the model."""
        with self._free:
            return threading.get_ident() in self._users

    @contextlib.contextmanager
    def changing(self, stay: bool = False) -> Iterator[None]:
        """A block in which this thread is alone with the model, once nobody uses it. Where the
        block ends well and is to ``stay``, the thread uses it from then on: nobody comes between.

        Raises SwitchError where the thread itself uses it, and so would wait for itself.
        """
        me = threading.get_ident()
        with self._free:
            if me in self._users:
                raise SwitchError(
                    "this thread is in the middle of a forward pass, or in the block of another "
                    "task: the model cannot be switched under it (in asynchronous code: no await "
                    "within a block, or blocks in threads)"
                )
            self._waiting += 1
            try:
                self._free.wait_for(lambda: not self._changing and not self._users)
                self._changing = True
            finally:
                self._waiting -= 1
                self._free.notify_all()
        try:
            yield
            if stay:
                with self._free:
                    self._users[me] += 1
        finally:
            with self._free:
                self._changing = False
                self._free.notify_all()
