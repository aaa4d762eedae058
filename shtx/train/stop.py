"""Signals that ask a command to end."""

import os
import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal ends what is going on; `advice` is how to go on."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum, self.advice = signum, ""


class Stop:
    """Notes SIGINT, SIGTERM and SIGHUP while the context lasts; a second SIGINT raises Stopped.

    Args:
        at_once: raise at the first signal, as nothing is lost by that.

    Attributes:
        signum: the latest signal, 0 if there was none.
    """

    def __init__(self, at_once: bool = False):
        self.at_once, self.signum = at_once, 0

    def __enter__(self) -> "Stop":
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
        caught = SIGNALS[:-1] if ignored else SIGNALS
        self.previous = {s: signal.signal(s, self.note) for s in caught}
        return self

    def __exit__(self, *_) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def note(self, signum: int, frame) -> None:
        again = self.signum and signum == signal.SIGINT
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun repeats what a terminal sent to all
            again = False
        self.signum = signum
        if self.at_once or again:
            raise Stopped(signum)


def name(signum: int) -> str:
    """Say in a word or two how a signal has ended the process."""
    return "interrupted" if signum == signal.SIGINT else f"stopped by {signal.Signals(signum).name}"
