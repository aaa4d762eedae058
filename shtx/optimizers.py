"""Several optimizers of one model as one: their groups in a row, and one state for a checkpoint."""

from collections.abc import Iterable

from torch.optim import Optimizer


class Optimizers:
    """Holds optimizers that step together.

    Args:
        optimizers: an Optimizer, or several of different parameters.

    Attributes:
        all: the optimizers, in their order.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what is allowed.
    """

    def __init__(self, optimizers: Optimizer | Iterable[Optimizer]):
        is_one = isinstance(optimizers, Optimizer) or not isinstance(optimizers, Iterable)
        self.all = (optimizers,) if is_one else tuple(optimizers)
        for optimizer in self.all:
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    "TrainStep takes a model and its optimizer or several of them, in this order,"
                    f" got {type(optimizer).__name__} for an optimizer"
                )
        if not self.all:
            raise ValueError("optimizer must be an optimizer or several, got none")
        stepped = [p for group in self.param_groups for p in group["params"]]
        if len(set(stepped)) < len(stepped):
            raise ValueError(
                "optimizer must have different parameters in each of several optimizers, got"
                f" {len(stepped) - len(set(stepped))} that are in two of them"
            )

    @property
    def param_groups(self) -> list[dict]:
        """The groups of all, which may be changed."""
        return [group for optimizer in self.all for group in optimizer.param_groups]

    @property
    def states(self) -> list[dict]:
        """The state that each optimizer keeps, by parameter."""
        return [optimizer.state for optimizer in self.all]

    def state_dict(self) -> dict:
        """Return the state of all as if one optimizer had all groups."""
        state, groups, begin = {}, [], 0
        for optimizer in self.all:
            own = optimizer.state_dict()
            state |= {begin + index: values for index, values in own["state"].items()}
            for group in own["param_groups"]:
                groups.append(group | {"params": [begin + index for index in group["params"]]})
            begin += sum(len(group["params"]) for group in own["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict) -> None:
        """Load what `state_dict` gave.

        Raises:
            ValueError: it is of other groups.
        """
        state, groups = state_dict["state"], list(state_dict["param_groups"])
        ours, given = ([len(g["params"]) for g in gs] for gs in (self.param_groups, groups))
        if given != ours:
            raise ValueError(f"state_dict must have groups of {ours} parameters, got {given}")
        begin = 0
        for optimizer in self.all:
            count = len(optimizer.param_groups)
            own, groups = groups[:count], groups[count:]
            end = begin + sum(len(group["params"]) for group in own)
            optimizer.load_state_dict(
                {
                    "state": {i - begin: v for i, v in state.items() if begin <= i < end},
                    "param_groups": [
                        group | {"params": [index - begin for index in group["params"]]}
                        for group in own
                    ],
                }
            )
            begin = end
