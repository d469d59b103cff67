"""How a run ends before its last step: by a signal, or by an error that lets its state be saved first."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import jax

from hybrid_attn import checkpoint, files
from hybrid_attn.parallel.processes import Peers


class Stop:
    """Turns the first SIGINT or SIGTERM into a request that the loop answers after its step; the second acts at once.

    Before the first step there is nothing to save, and the first SIGINT acts at once. Of several processes (`peers`) one gets
    the signal, and all stop after the same step. Once all is saved there is nothing to wait for: the first one ends the run.
    """

    def __init__(self, peers: Peers | None):
        self.peers, self.requested, self.saved = peers, False, False
        self.failure: OSError | None = None
        self.before, self.received = {}, set()

    def __enter__(self):
        self._catch(signal.SIGTERM)
        return self

    def begun(self) -> None:
        """Call it after the first step, which may compile for minutes: from now on there is something to save."""
        if signal.SIGINT not in self.before:
            self._catch(signal.SIGINT)

    def _catch(self, number: int) -> None:
        self.before[number] = signal.signal(number, self.request)

    def request(self, number, frame):
        again, before = number in self.received, self.before[number]
        if again and callable(before):
            before(number, frame)  # called, not put back: `programs.watch` would take the first signal for its own
        self.requested = True
        self.received.add(number)
        if not callable(before):
            signal.signal(number, before)
        if self.peers:
            self.peers.ask_to_stop()
        elif self.saved:
            raise KeyboardInterrupt

    def reached(self, step: int) -> bool:
        """Whether the run is to end before its step `step`, counted from 0."""
        return self.peers.reached(step) if self.peers else self.requested

    def asked(self) -> bool:
        """Whether the run is to end soon; processes learn it one after the other."""
        return self.peers.asked() if self.peers else self.requested

    @contextlib.contextmanager
    def after_saving(self, together: bool = False) -> Iterator[None]:
        """Has an OSError of the body end the run after the state is saved: `failure` is then for the caller to raise.

        An error within collectives (`together`) of several processes leaves the others there, and is raised at once.
        """
        try:
            yield
        except OSError as error:
            if together and self.peers:
                raise
            self.failure = self.failure or error
            self.requested = True
            if self.peers:
                self.peers.ask_to_stop()

    def all_saved(self, last_words: str) -> None:
        """Has the next signal end the run at once: by KeyboardInterrupt, or with its processes and `last_words`."""
        self.saved = True
        if self.peers:
            self.peers.all_saved(last_words)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def hold(workdir: str | os.PathLike) -> contextlib.AbstractContextManager:
    """Holds `workdir` for this run until the context ends; the first of several processes does it for all.

    ValueError, before it is created, for a bucket's address, a file, or a name that no checkpoint can be written to;
    BlockingIOError if another run is in it.
    """
    if "://" in str(workdir):
        raise ValueError(f"--workdir={workdir} is no directory; mount the bucket, and name the directory in the mount")
    checkpoint.check_name(os.path.abspath(workdir))
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise ValueError(f"--workdir={workdir} is not a directory")
    return files.lock(Path(workdir)) if jax.process_index() == 0 else contextlib.nullcontext()
