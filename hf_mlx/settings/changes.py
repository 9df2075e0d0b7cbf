"""Settings that a script changes on a constructed trainer: which count at ``train()``, and which it is too late for."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import SettingError
from .ledger import Ledger, complete_arguments
from .plan import TrainPlan
from .reading import read_values
from .resolve import resolve_plan
from .tensor_parallel import check_tensor_parallel
from .verdicts import Verdict

logger = logging.getLogger(__name__)

_STEP = """
    learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon optim optim_args lr_scheduler_type
    lr_scheduler_kwargs warmup_steps max_grad_norm max_steps num_train_epochs gradient_accumulation_steps
    dataloader_drop_last train_sampling_strategy per_device_eval_batch_size torch_empty_cache_steps
    logging_nan_inf_filter
"""
# Not in the plan: transformers' callbacks, the loop and the hub read them from args whenever they need them.
_READ_LATE = """
    output_dir logging_strategy logging_steps logging_first_step eval_strategy eval_steps eval_delay eval_on_start
    prediction_loss_only save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model
    greater_is_better ignore_data_skip restore_callback_states_from_checkpoint run_name project hub_model_id
    hub_token hub_private_repo hub_strategy hub_always_push hub_revision
"""
_LIVE = frozenset((_STEP + _READ_LATE).split())

# transformers 5.23 reads these in ``Trainer.__init__`` and never again, so its runs go on with the first value.
_ONCE = """
    per_device_train_batch_size seed data_seed report_to disable_tqdm log_level skip_memory_metrics neftune_noise_alpha
"""
_READ_ONCE = frozenset(_ONCE.split())


# Another name of what the plan reads; that has had its value since construction.
_ALIASES = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}


class Asked:
    """What a trainer's plan was resolved from.

    Args:
        args: The configuration, as the constructor read it.
        ledger: What was found in it.
        options: Those of :func:`~hf_mlx.settings.resolve.resolve_plan` that a later call needs again.
    """

    def __init__(self, args: Any, ledger: Ledger, **options: Any) -> None:
        self._options = options
        self.keep(args, ledger)

    def keep(self, args: Any, ledger: Ledger) -> None:
        """Compare with these from now on, which are in force."""
        self._ledger = ledger
        self._values = copy.deepcopy(self._read(args))
        self._names = _names(args)

    def find_changes(self, args: Any) -> dict[str, Any]:
        """Fields of ``args`` that differ from those the plan was resolved from, with their new values."""
        now = self._read(args)
        missing = object()
        return {
            name: now.get(name)
            for name in {**self._values, **now}
            if now.get(name, missing) != self._values.get(name, missing)
        }

    def say_unread(self, args: Any) -> None:
        """Say which settings a callback changed during training that were not looked at again."""
        for name in sorted(self.find_changes(args).keys() & set(_STEP.split())):
            logger.warning(
                f"args.{name} was changed during training and is read when train() begins: it counts from the next one"
            )

    def resolve_again(self, args: Any, plan: TrainPlan) -> tuple[TrainPlan, Ledger]:
        """The plan with what was changed in ``args`` since it was resolved.

        Args:
            args: The trainer's, as they are now.
            plan: The one in force.

        Returns:
            The plan, ``plan`` itself where nothing changed, and the ledger of ``args``; in force once
            :meth:`keep` is told.

        Raises:
            SettingError: A change that comes too late, or a value that is out of range; the old ones stay in force.
        """
        _say_unknown(args, self._names, self._values)
        changed = self.find_changes(args)
        if not changed:
            return plan, self._ledger
        overrides = {k: v for k, v in self._options["overrides"].items() if k not in changed}
        # What loads a model has done so, and is not resolved again.
        options = {**self._options, "overrides": {**overrides, "model_init_kwargs": None}}
        new, ledger = resolve_plan(args, None, **options)
        idle = _idle(self._ledger) & _idle(ledger)
        late = [name for name in changed if name not in _LIVE | _READ_ONCE | idle]
        if late:
            raise _too_late(args, late[0], self._values.get(late[0]), changed[late[0]])
        once = [name for name in changed if name in _READ_ONCE]
        for name in once:
            logger.warning(
                f"{name}={changed[name]!r}, set after construction, has no effect, as under TRL, whose trainer reads "
                f"it in its constructor: the run goes on with {self._values.get(name)!r}. "
                f"Write {type(args).__name__}({name}={changed[name]!r}, ...) to change it."
            )
        known = set(self._ledger.notices())
        for line in ledger.notices():
            if line not in known:
                logger.warning(line)
        batch = replace(
            new.batch,
            train_batch_size=plan.batch.train_batch_size,
            seed=plan.batch.seed,
            data_seed=plan.batch.data_seed,
        )
        plan = replace(
            plan,
            batch=batch,
            optim=new.optim,
            schedule=new.schedule,
            clip=new.clip,
            clear_cache_steps=new.clear_cache_steps,
            nan_inf_filter=new.nan_inf_filter,
        )
        check_tensor_parallel(plan)
        return plan, ledger

    def _read(self, args: Any) -> dict[str, Any]:
        # The fields as they stand: what transformers made of some on construction doesn't follow them.
        return complete_arguments(args, table=self._options["table"]) | read_values(args)


def _idle(ledger: Ledger) -> set[str]:
    return {entry.field for entry in ledger.entries if entry.verdict is Verdict.NO_OP} - _ALIASES


def _names(args: Any) -> set[str]:
    held = args if isinstance(args, Mapping) else vars(args)
    return {name for name in held if not name.startswith("_")}


def _say_unknown(args: Any, names: set[str], fields: Mapping[str, Any]) -> None:
    for name in sorted(_names(args) - names - set(fields)):
        close = difflib.get_close_matches(name, fields, n=1)
        logger.warning(
            f"args.{name} is no setting, and no trainer reads it, as under TRL"
            + (f": did you mean args.{close[0]}?" if close else "")
        )


def _too_late(args: Any, name: str, before: Any, now: Any) -> SettingError:
    return SettingError(
        f"trainer.args.{name} = {now!r} on a trainer that was constructed with {before!r}",
        f"{name} is known when the trainer is constructed: model, rows or step were built with it",
        f"{type(args).__name__}({name}={now!r}, ...) for a new trainer, or trainer.args.{name} = {before!r}",
    )
