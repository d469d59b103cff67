"""How a run ends before its last step: by a signal, or by an error after which its state is still saved."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax

from hybrid_attn import checkpoint, files
from hybrid_attn.parallel.processes import Peers
from hybrid_attn.trees import check


class Stop:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step; the second one acts at once.

    Before the first step there is nothing to save, and the first SIGINT acts at once. If there are `peers`, all processes stop
    after the same step, whichever gets the signal. Once the last step is saved, the first signal ends the run.
    """

    def __init__(self, peers: Peers | None):
        self.peers, self.requested, self.saved = peers, False, False
        self.failure: OSError | None = None
        self.before, self.received = {}, set()

    def __enter__(self):
        self._catch(signal.SIGTERM)
        return self

    def first_step_began(self) -> None:
        """To be called when the first step, which may compile for minutes, is dispatched: from then on signals wait."""
        if signal.SIGINT not in self.before:
            self._catch(signal.SIGINT)

    def _catch(self, number: int) -> None:
        self.before[number] = signal.signal(number, self.request)

    def request(self, number, frame):
        again, before = number in self.received, self.before[number]
        if again and callable(before):
            before(number, frame)  # called and not restored: `programs.watch` would act on the first signal
        self.requested = True
        self.received.add(number)
        if not callable(before):
            signal.signal(number, before)
        if self.peers:
            self.peers.request_stop()
        elif self.saved:
            raise KeyboardInterrupt

    def reached(self, step: int) -> bool:
        """Whether the run must end before its step `step`, counted from 0."""
        return self.peers.reached(step) if self.peers else self.requested

    def is_requested(self) -> bool:
        """Whether the run must end soon; processes may learn this at different steps."""
        return self.peers.stop_requested() if self.peers else self.requested

    @contextlib.contextmanager
    def after_saving(self, together: bool = False) -> Iterator[None]:
        """An OSError in the body ends the run after its state is saved; the caller then raises `failure`.

        Where the body runs collectives (`together`), the other processes would wait in them: the error is raised at once.
        """
        try:
            yield
        except OSError as error:
            if together and self.peers:
                raise
            self.failure = self.failure or error
            self.requested = True
            if self.peers:
                self.peers.request_stop()

    def all_saved(self, message: str) -> None:
        """The next signal ends the run at once, by KeyboardInterrupt, or all of its processes after `message`."""
        self.saved = True
        if self.peers:
            self.peers.all_saved(message)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def hold(workdir: str | os.PathLike) -> contextlib.AbstractContextManager:
    """Locks `workdir` for this run until the context ends; process 0 does it for all.

    ValueError, before it is created, for a URL, a file, or a name that no checkpoint can be written to; BlockingIOError if
    another run has locked it.
    """
    is_url, is_other = "://" in str(workdir), os.path.exists(workdir) and not os.path.isdir(workdir)
    check(not is_url, f"--workdir={workdir} is no directory; mount the bucket, and name the directory in the mount")
    checkpoint.check_name(os.path.abspath(workdir))
    check(not is_other, f"--workdir={workdir} is not a directory")
    return files.lock(Path(workdir)) if jax.process_index() == 0 else contextlib.nullcontext()
