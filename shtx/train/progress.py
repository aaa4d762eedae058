"""What a run shows: one line that redraws itself on a terminal, plain lines elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Use as a context.

    Args:
        steps: steps in all.
        done: steps already done.
        quiet: show nothing (all processes but the first).
    """

    def __init__(self, steps: int, done: int, quiet: bool):
        self.steps = steps
        self.console = Console(quiet=quiet, soft_wrap=True, markup=False, highlight=False)
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text)

    def step(self, done: int, loss: float, bits_per_byte: float, tokens_per_second: float) -> None:
        text = f"loss {loss:.3f} nats, {bits_per_byte:.3f} bits per byte"
        text = f"{text}, {tokens_per_second:,.0f} tokens/s"
        self.bar.update(self.task, completed=done, description=text)
        if self.bar.disable:
            self.say(f"step {done}/{self.steps}: {text}")


def printable(data: bytes) -> str:
    """Text as it is; what is not UTF-8, or would move the cursor, as escapes."""
    return visible(data.decode("utf-8", errors="backslashreplace"))


def visible(text: str) -> str:
    """Text as it is; what would move the cursor, as escapes."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
