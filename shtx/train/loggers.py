"""The rows of a run, told to a tool that draws them: TensorBoard or Weights & Biases."""

from importlib.util import find_spec

from shtx.train import TrainError
from shtx.train.home import Home

MODULES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def refuse_what_is_not_installed(kind: str) -> None:
    """Raise a TrainError for a tool that --log names and that is not there."""
    if kind != "none" and find_spec(MODULES[kind]) is None:
        raise TrainError(f'--log {kind}: not installed: pip install "shtx[{kind}]"')


class Logger:
    """Takes rows, and does nothing with them."""

    def append(self, step: int, **row: float) -> None:
        pass

    def sync(self) -> None:
        """Let what was appended be seen."""

    def close(self) -> None:
        pass


class TensorBoard(Logger):
    """Writes event files to `tensorboard/` in the directory of the run.

    Args:
        home: of the run.
        settings: of the run, as JSON.
        done: steps of the rows that stay; later ones, which are done again, are not shown.
    """

    def __init__(self, home: Home, settings: dict, done: int):
        from torch.utils.tensorboard import SummaryWriter

        purge = done + 1 if done else 0
        self.writer = SummaryWriter(str(home.path / "tensorboard"), purge_step=purge)

    def append(self, step: int, **row: float) -> None:
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def sync(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB(Logger):
    """Sends rows to the run of Weights & Biases that has the run's id; its arguments are those of
    TensorBoard.
    """

    def __init__(self, home: Home, settings: dict, done: int):
        import wandb

        self.run = wandb.init(
            project="shtx",
            name=home.path.name,
            id=home.id,
            resume="allow",
            dir=str(home.path),
            config=settings,
        )

    def append(self, step: int, **row: float) -> None:
        self.run.log(row, step=step)

    def close(self) -> None:
        self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB}


def logger_of(kind: str, home: Home | None, settings: dict, done: int) -> Logger:
    """Make the logger that --log names. On all processes but the first it does nothing."""
    if home is None or kind == "none":
        return Logger()
    return LOGGERS[kind](home, settings, done)
