"""Training a network: from scratch, while it is pruned, or back to accuracy after pruning."""

from compress.training.distillation import Distillation
from compress.training.evaluation import Evaluation, evaluate
from compress.training.fit import fit
from compress.training.history import Epoch, History
from compress.training.loop import Pruning
from compress.training.preflight import check_fit
from compress.training.schedule import TrainingConfig

__all__ = [
    "Distillation",
    "Epoch",
    "Evaluation",
    "History",
    "Pruning",
    "TrainingConfig",
    "check_fit",
    "evaluate",
    "fit",
]
