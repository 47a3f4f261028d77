"""What a training did, epoch by epoch."""

from dataclasses import asdict, dataclass, field
from typing import Any, Self

from compress.training.evaluation import Evaluation


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data; the last one under a pruner may be a part of a pass.

    steps: minibatches seen. train_loss: mean over them of the loss that was minimised, smoothing and teacher
        included. learning_rate: of the last step. seconds: wall time, evaluation included.
    test: evaluation at the end of the epoch, where test data were given.
    """

    steps: int
    train_loss: float
    learning_rate: float
    seconds: float
    test: Evaluation | None = None


@dataclass
class History:
    """The epochs of one training, in order."""

    epochs: list[Epoch] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Minibatches seen so far."""
        return sum(epoch.steps for epoch in self.epochs)

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `as_dict`."""
        epochs = []
        for epoch in values["epochs"]:
            test = None if epoch["test"] is None else Evaluation(**epoch["test"])
            epochs.append(Epoch(**{**epoch, "test": test}))
        return cls(epochs)
