"""The checkpoints of one trainer: written whole or not at all, read only when everything in them fits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from ..intake import lies
from .boundary import Boundary, Layout
from .damage import FILES
from .files import disk_errors, replaced_folder
from .fingerprint import compare_fingerprints, take_fingerprint
from .folders import checkpoint_path, rotate
from .inspection import ADAPTER, ARGUMENTS, RUN, STATE, find_checkpoint, read_trainer_state
from .manifest import MANIFEST, extend_manifest, write_manifest
from .optimizer_state import Moments, dump_optimizer, load_optimizer
from .own_optimizer import load_own, save_own
from .parameters import make_parameters
from .random_files import read_random, write_random
from .random_states import RandomStates
from .schedules import compare_schedules
from .state_files import OPTIMIZER, SCHEDULER, TORCH_NAMES, has_state, read_state, write_state
from .torch_files import has_torch, pickle_object
from .trainer_state import write_trainer_state
from .trees import read_tree, write_tree
from .weights import load_weights

logger = logging.getLogger(__name__)

# Since 2 metrics have names.
_FORMAT, _READ = 2, (1, 2)


@dataclass
class Loaded:
    """A checkpoint, read and checked, not yet applied to anything.

    Attributes:
        folder: Where it was read.
        boundary: Where the run stood.
        weights: Trained arrays by MLX name.
        frozen: Frozen ones that the adapter's file holds as well.
        moments: The optimizer's state; None begins it afresh.
        schedule: The schedule's state; None begins it afresh.
        updates: Steps that ``moments`` has seen; None where there are no moments.
        own_optimizer: The state of a torch optimizer of the script's own.
    """

    folder: Path
    boundary: Boundary
    weights: dict[str, mx.array]
    frozen: dict[str, mx.array]
    moments: Moments | None
    schedule: dict[str, Any] | None
    updates: int | None = None
    own_optimizer: dict[str, Any] | None = None


class CheckpointStore:
    """Writes and reads ``checkpoint-N`` folders.

    Args:
        args: HF's arguments: output_dir, save_total_limit, save_only_model and optim are read.
        session: Model, adapter, step and plan of the run.
        data: Its ``rng`` is the generator of the order.
        rows: Rows of the train dataset, or None for a stream.
        layout: What a position of this run is counted in.
    """

    def __init__(self, args: Any, session: Any, data: Any, rows: int | None, layout: Layout) -> None:
        self.args, self.session, self.data, self.layout = args, session, data, layout
        self.plan = session.plan
        self.parameters = make_parameters(session.adapter, session.loaded, list(session.step.params))
        self.rows = rows
        self._fingerprint: dict[str, Any] | None = None

    def save(
        self,
        state: Any,
        boundary: Boundary,
        schedule: Any,
        callbacks: dict[str, Any],
        write_model: Callable[[Path], None],
        random: Sequence[RandomStates] = (),
    ) -> Path:
        """Write ``checkpoint-{global_step}`` and delete what ``save_total_limit`` leaves no room for.

        Args:
            state: The TrainerState; its ``best_model_checkpoint`` and ``stateful_callbacks`` are brought up to date.
            boundary: Where the run stands.
            schedule: The learning rate's schedule.
            callbacks: The callbacks' states.
            write_model: Writes weights, config and tokenizer into the folder it is given.
            random: Of several processes the random states of each, by rank.

        Returns:
            The folder.

        Raises:
            CheckpointError: It cannot be written. Earlier checkpoints are as they were.
        """
        folder = checkpoint_path(self.args.output_dir, state.global_step)
        state.stateful_callbacks = callbacks
        best = checkpoint_path(self.args.output_dir, state.best_global_step) if state.best_global_step else None
        if best is not None and (best == folder or best.is_dir()):
            state.best_model_checkpoint = str(best)
        with replaced_folder(folder) as temporary:
            write_model(temporary)
            if has_torch():
                pickle_object(self.args, temporary / ARGUMENTS)
            if not self.args.save_only_model:
                self._write_progress(temporary, state.global_step, boundary, schedule, random)
            history = state.log_history[: boundary.history]
            write_trainer_state(state, temporary / STATE, log_history=history, **boundary.seen)
            write_manifest(temporary)
        keep = [folder] if state.best_model_checkpoint is None else [folder, state.best_model_checkpoint]
        rotate(self.args.output_dir, self.args.save_total_limit, keep=keep)
        return folder

    def adopt_additions(self, step: int) -> None:
        """Take files that callbacks put into the checkpoint of ``step`` for a part of it.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        folder = checkpoint_path(self.args.output_dir, step)
        if lies(folder / MANIFEST):
            with disk_errors(folder):
                extend_manifest(folder)

    def find(self, asked: str | bool | None) -> Path | None:
        """The folder that ``resume_from_checkpoint`` means; says which damaged ones were passed over."""
        folder, passed_over = find_checkpoint(self.args.output_dir, asked)
        for damage in passed_over:
            logger.warning(f"Passed over, not complete: {damage}")
        return folder

    def load(self, folder: Path) -> Loaded:
        """Read a checkpoint; nothing of the run is changed.

        Args:
            folder: A complete checkpoint.

        Raises:
            CheckpointError: It does not fit this run.
        """
        with FILES.understood(folder, "the state of this run, as a trainer writes it"):
            return self._load(folder)

    def load_best(self, folder: str | Path) -> None:
        """Put the weights of the best checkpoint into the model; the optimizer is left as it is."""
        step = self.session.step
        folder = Path(folder)
        with FILES.understood(folder, "the weights of this run's best checkpoint"):
            weights, frozen = self._load_weights(folder)
        self.session.adopt_frozen(frozen)
        step.load(weights, step.state)

    def _load(self, folder: Path) -> Loaded:
        step = self.session.step
        weights, frozen = self._load_weights(folder)
        state = read_trainer_state(folder)
        run = read_tree(folder, RUN) if lies(folder / f"{RUN}.json") else None
        random = read_random(folder, run, self.session.world.sharing, self.data.rng)
        if run is not None:
            self._compare_runs(folder, run, replaced=frozen)
            boundary = Boundary.from_tree(run["boundary"], random)
        else:
            self._check_batch(folder, state.get("train_batch_size"))
            boundary = Boundary.from_hf(state, self.layout, random)
        if run is not None and boundary.layout != self.layout:
            # The position counts in steps of another size; upstream's arithmetic is the best there is.
            moved = Boundary.from_hf(state, self.layout, random)
            boundary = dataclasses.replace(moved, progress=boundary.progress)
        if not has_state(folder, OPTIMIZER):
            self._check_weights_only(folder)
            boundary.offset = state["global_step"]
            return Loaded(folder, boundary, weights, frozen, None, None)
        if step.optimizer.on_host:
            optimizer, schedule = load_own(folder, step.optimizer.torch)
            if run is None:
                boundary.offset = state["global_step"] - schedule.get("last_epoch", state["global_step"])
            return Loaded(folder, boundary, weights, frozen, None, schedule, boundary.updates, optimizer)
        moments, updates = load_optimizer(read_state(folder, OPTIMIZER), step, self.parameters, self.plan.optim, folder)
        schedule = read_state(folder, SCHEDULER)
        compare_schedules(schedule, self.plan, folder, updates=updates, recorded=boundary.updates)
        if run is None and "num_bad_epochs" not in schedule:
            boundary.offset = state["global_step"] - schedule["last_epoch"]
        if updates is None:
            made = state["global_step"] - boundary.offset
            updates = made if boundary.updates is None else boundary.updates
        return Loaded(folder, boundary, weights, frozen, moments, schedule, updates)

    def _load_weights(self, folder: Path) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        session = self.session
        # PEFT saves an adapter that is not called "default" into a folder of its name.
        named = folder / session.adapter_name
        folder = named if (named / ADAPTER).is_file() else folder
        return load_weights(folder, session.step.params, self.parameters, session.adapter, session.loaded)

    def _write_progress(
        self, folder: Path, global_step: int, boundary: Boundary, schedule: Any, random: Sequence[RandomStates]
    ) -> None:
        made = global_step - boundary.offset
        if self.session.step.optimizer.on_host:
            save_own(self.session.step.optimizer.torch, schedule.scheduler, folder)
        else:
            self._write_optimizer(folder, made, schedule)
        write_random(random or [boundary.random], folder)
        run = {"format": _FORMAT, "boundary": boundary.to_tree(), "base": self._base(), "settings": self._settings()}
        if random:
            run["random"] = [state.to_tree() for state in random]
        write_tree(run, folder, RUN)

    def _write_optimizer(self, folder: Path, made: int, schedule: Any) -> None:
        optimizer, for_torch = dump_optimizer(
            self.session.step,
            self.parameters,
            self.plan.optim,
            lr=schedule.lr(made),
            base_lr=None if schedule.by_metric else schedule.base_lr,
            updates=self.session.step.updates,
            fused=str(getattr(self.args.optim, "value", self.args.optim)) == "adamw_torch_fused",
        )
        if has_torch() and not for_torch:
            logger.warning(
                "This model's parameters in torch are not those of its files: the optimizer's state is saved as "
                "optimizer.safetensors, which hf_mlx resumes from and TRL does not."
            )
        write_state(optimizer, folder, OPTIMIZER, torch=None if for_torch else False)
        write_state(schedule.state_dict(made), folder, SCHEDULER)

    def _base(self) -> dict[str, Any]:
        if self._fingerprint is None:
            known: dict[str, Any] | None = self.session.fingerprint
            held = take_fingerprint(self.session.loaded, self.session.step.params) if known is None else known
            self._fingerprint = held
        return self._fingerprint

    def _settings(self) -> dict[str, Any]:
        batch = dataclasses.asdict(self.plan.batch)
        schedule = {"lr_scheduler_type": self.plan.schedule.name, "warmup_steps": self.plan.schedule.warmup_steps}
        return {**batch, **schedule, "rows of train_dataset": self.rows}

    def _compare_runs(self, folder: Path, run: dict[str, Any], replaced: Iterable[str]) -> None:
        if run.get("format") not in _READ:
            raise CheckpointError(
                f"{folder}: written in format {run.get('format')!r}",
                f"format {_FORMAT}, which this version reads",
                "pip install -U hf-mlx",
            )
        compare_fingerprints(run["base"], self._base(), folder, self.session.loaded.path, replaced)
        # Those weights are about to be the checkpoint's own.
        self._fingerprint = None
        now = self._settings()
        changed = [
            f"{name} {run['settings'].get(name)!r} → {now[name]!r}"
            for name in now
            # What a later version has added was at its default.
            if name in run["settings"] and run["settings"][name] != now[name]
        ]
        if changed and self.session.world.is_main:
            logger.warning(
                f"Changed since {folder.name}, so the run goes on but not as it would have: {', '.join(changed)}."
            )

    def _check_batch(self, folder: Path, found: int | None) -> None:
        # transformers 5.23 Trainer.train: with auto_find_batch_size the checkpoint's batch is the one to go on with.
        rows = self.plan.batch.train_batch_size
        if self.plan.auto_find_batch_size and found not in (None, rows):
            raise CheckpointError(
                f"{folder}: a run of transformers that auto_find_batch_size had brought to {found} rows a micro-batch",
                f"per_device_train_batch_size={found}, in which its steps are counted, not {rows}",
                f"per_device_train_batch_size={found}; it is computed in pieces where it does not fit",
            )

    def _check_weights_only(self, folder: Path) -> None:
        if not self.args.save_only_model:
            raise CheckpointError(
                f"{folder}: no {TORCH_NAMES[OPTIMIZER]} and no {TORCH_NAMES[SCHEDULER]}; it was saved with "
                "save_only_model=True",
                "the optimizer's and the schedule's state, without which the moments and the warmup begin anew",
                "SFTConfig(save_only_model=True) to go on from the weights alone, with a fresh optimizer and warmup",
            )
        logger.warning(
            f"{folder.name} holds weights only (save_only_model=True): the optimizer and the warmup begin anew. "
            "save_only_model=False makes checkpoints that a run goes on from exactly."
        )
