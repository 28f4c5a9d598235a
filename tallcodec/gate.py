"""Who may use a model and who may change it: many at once, or one alone."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from .errors import SwitchError

_LOOK = 0.5  # seconds between looks for passes that have ended without a word


@dataclass(eq=False)
class Use:
    """One use of the model, from :meth:`Gate.enter` to :meth:`Gate.leave`."""

    thread: threading.Thread
    frame: FrameType | None
    """Of a forward pass: what runs for as long as it does."""


class Gate:
    """Uses of a model by any number of threads, and changes of it between them.

    Who waits to change it lets nobody else begin to use it, but for passes while a block is open
    (which the block may wait for), and but for those who waited during the change before.
    """

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._uses: set[Use] = set()
        self._changing = False
        self._changers = 0  # that wait
        self._users = 0  # that wait
        self._due = 0  # of these, how many come before the next change

    def enter(self, frame: FrameType | None = None) -> Use:
        """Use the model until :meth:`leave`, which another thread may call: as a block, or, with
        the frame of its call, as a forward pass. A thread that uses it already does not wait."""
        use = Use(threading.current_thread(), frame)
        with self._free:
            if not self._is_user():
                self._users += 1
                try:
                    self._free.wait_for(lambda: not self._changing and self._may_enter(use))
                finally:
                    self._users -= 1
                    self._due = max(0, min(self._due - 1, self._users))
                    self._free.notify_all()
            self._uses.add(use)
        return use

    def leave(self, use: Use) -> None:
        with self._free:
            self._uses.discard(use)
            self._free.notify_all()

    def is_user(self) -> bool:
        """Whether this thread uses the model."""
        with self._free:
            return self._is_user()

    def is_free(self) -> bool:
        """Whether nobody uses or changes the model, or waits to."""
        with self._free:
            self._forget_dead_passes()
            return not (self._uses or self._changing or self._changers or self._users)

    @contextlib.contextmanager
    def changing(self, unless: Callable[[], bool] = lambda: False) -> Iterator[Use | None]:
        """A block in which this thread is alone with the model, once nobody uses it: gives None.
        Where ``unless()`` comes to hold while it waits, it uses the model instead, as others do:
        gives what is to be left. (Whoever makes it hold calls :meth:`wake`.)

        Raises SwitchError where the thread itself uses it, and so would wait for itself.
        """
        with self._free:
            if self._is_user():
                raise SwitchError(
                    "this thread is in the middle of a forward pass, or in the block of another "
                    "task: the model cannot be switched under it (in asynchronous code: no await "
                    "within a block, or blocks in threads)"
                )
            use = None
            self._changers += 1
            try:
                while use is None and (self._changing or self._uses or self._due):
                    if not self._changing and unless():
                        use = self.stay()
                    else:
                        self._free.wait(_LOOK)
                        self._forget_dead_passes()
                self._changing |= use is None
            finally:
                self._changers -= 1
                self._free.notify_all()
        if use is not None:
            yield use
            return
        try:
            yield None
        finally:
            with self._free:
                self._changing = False
                self._due = self._users
                self._free.notify_all()

    def wake(self) -> None:
        """Have those that wait look again."""
        with self._free:
            self._free.notify_all()

    def stay(self) -> Use:
        """Use the model from here on, where nobody can come between, as in :meth:`changing`."""
        use = Use(threading.current_thread(), None)
        with self._free:
            self._uses.add(use)
        return use

    def _may_enter(self, use: Use) -> bool:
        if not self._changers or self._due:
            return True
        return use.frame is not None and any(other.frame is None for other in self._uses)

    def _is_user(self) -> bool:
        self._forget_dead_passes()
        me = threading.current_thread()
        return any(use.thread is me for use in self._uses)

    def _forget_dead_passes(self) -> None:
        """Drop passes that Ctrl-C, or whatever else torch does not catch, has ended."""
        for use in [use for use in self._uses if use.frame is not None]:
            if _has_ended(use.frame):
                self._uses.discard(use)


def _has_ended(frame: FrameType) -> bool:
    """Whether what ran in a frame is over: Python refuses to clear one that is running. (It can
    crash where one walks the stack of another thread.)"""
    try:
        frame.clear()
    except RuntimeError:
        return False
    return True
