"""The optimizers by name; the algorithms are in :mod:`hf_mlx.training.optimizers`, one a file."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import SettingError
from ..settings.plan import OptimPlan
from .optimizers.adafactor import Adafactor
from .optimizers.adagrad import Adagrad
from .optimizers.adamw import AdamW
from .optimizers.contract import Optimizer, State
from .optimizers.decay import decay_names
from .optimizers.lion import Lion
from .optimizers.rmsprop import RMSprop
from .optimizers.sgd import SGD

__all__ = ["OPTIMIZERS", "Optimizer", "State", "decay_names", "make_optimizer"]

# OptimPlan.name -> the algorithm.
OPTIMIZERS: Mapping[str, type[Optimizer]] = {
    "adamw": AdamW,
    "sgd": SGD,
    "adagrad": Adagrad,
    "rmsprop": RMSprop,
    "adafactor": Adafactor,
    "lion": Lion,
}


def make_optimizer(plan: OptimPlan, decay: frozenset[str]) -> Optimizer:
    """The optimizer that ``plan`` names.

    Args:
        plan: Name, weight decay, betas, epsilon and parsed ``optim_args``.
        decay: Names, as in the dict of parameters, that weight decay applies to; see :func:`decay_names`.

    Raises:
        SettingError: The name is unknown, or an option has no effect on this optimizer.
    """
    if plan.name not in OPTIMIZERS:
        raise SettingError(f"optimizer {plan.name!r}", f"one of {', '.join(OPTIMIZERS)}", 'optim="adamw_torch"')
    return OPTIMIZERS[plan.name](plan, decay)
