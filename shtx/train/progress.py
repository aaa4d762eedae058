"""Shows a run: one line that redraws itself on a terminal, plain lines elsewhere."""

import signal
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shtx.train import visible


class Output:
    """A stream whose loss ends nothing: what cannot be written is dropped.

    Attributes:
        signum: SIGPIPE once nobody reads it any more, as behind `| head`; else 0.
    """

    signum = 0

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function, *args) -> None:
        try:
            function(*args)
        except BrokenPipeError:
            self.signum = int(signal.SIGPIPE)
        except OSError:  # its disk is full, or its terminal is gone
            pass


class Display:
    """Shows a run, while the context lasts. Control characters are shown as escapes.

    Args:
        steps: steps in all.
        done: steps already done.
        quiet: show nothing (all processes but the first).
        unit: what is counted.
    """

    def __init__(self, steps: int, done: int, quiet: bool, unit: str = "step"):
        self.steps, self.first, self.unit = steps, done, unit
        self.output = Output(sys.stdout)
        self.console = Console(
            file=self.output,
            quiet=quiet,
            soft_wrap=True,
            markup=False,
            emoji=False,
            highlight=False,
        )
        self.bar = Progress(
            TextColumn(unit),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> "Display":
        self.began = time.monotonic()
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(visible(text))

    def step(self, done: int, loss: float, bits: str, tokens_per_second: float) -> None:
        self.show(done, f"loss {loss:.3f} nats, {bits}, {tokens_per_second:,.0f} tokens/s")

    def show(self, done: int, text: str) -> None:
        self.bar.update(self.task, completed=done, description=text)
        if self.bar.disable:
            left = (time.monotonic() - self.began) / max(1, done - self.first) * (self.steps - done)
            self.say(f"{self.unit} {done}/{self.steps}: {text}, {clock_of(left)} left")

    def note(self, text: str) -> None:
        """Show what goes on between two steps, where there is a bar."""
        self.bar.update(self.task, description=text)


def clock_of(seconds: float) -> str:
    """Format a time as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
