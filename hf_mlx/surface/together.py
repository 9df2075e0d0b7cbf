"""Several processes that train one model: what is refused, what they agree on, and what HF's objects say."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from ..errors import SettingError
from ..processes.comparison import digest_arrays, find_different
from ..processes.world import World
from ..settings.plan import TrainPlan
from ..settings.tensor_parallel import check_tensor_parallel
from ..training.inputs import PEER_COLUMNS
from ..version import find_version

_LIBRARIES = ("hf-mlx", "mlx", "mlx-lm", "transformers", "datasets", "tokenizers", "numpy")
_ROWS_AT_ONCE = 10_000


def check_recipe(recipe: Any, world: World) -> None:
    """Refuse a trainer that several processes are not proven for.

    Raises:
        SettingError: It is one.
    """
    if not world.is_alone and not recipe.trains_together:
        raise SettingError(
            f"{recipe.name} on {world.size} processes",
            "one process: its losses are not compared with several processes of upstream yet",
            f"python train.py, with gradient_accumulation_steps={world.size} times as many",
        )


def check_split(plan: TrainPlan, base: Any, recipe: Any) -> None:
    """Refuse what several processes are not proven for that hold one model together.

    Args:
        plan: Of the run.
        base: The model to train.
        recipe: Of the trainer.

    Raises:
        SettingError: Names it.
    """
    ways = plan.model.tensor_parallel
    if ways == 1:
        return
    if not recipe.splits_model:
        raise SettingError(
            f"{recipe.name} on a model that is split over {ways} processes",
            "a trainer whose losses are compared so: MLXSFTTrainer or MLXTrainer",
            f"hf-mlx launch -n {ways} train.py, where each process holds the whole model",
        )
    if base.is_copied:
        raise SettingError(
            f"a model object, which each of {ways} processes holds whole, to be split over them",
            "a hub id or a folder, of which each process reads its part",
            f"{recipe.name}(model={base.name!r}, ...)",
        )
    check_tensor_parallel(plan)


def check_own(trainer: Any, ways: int) -> None:
    """Refuse parts of the script's own that several processes are not proven for that hold one model together.

    Raises:
        SettingError: Names the first of them.
    """
    if ways == 1:
        return
    asked = {
        "a loss of the script's own": (
            trainer.session.host_loss is not None or trainer.session.native_loss is not None,
            'the losses of the configuration: loss_type="nll"',
        ),
        "an optimizer or a schedule of the script's own": (
            trainer._brings_optimizer(),
            'SFTConfig(optim="adamw_torch", lr_scheduler_type="cosine", …) without optimizers=',
        ),
        "a loader of the script's own": (
            trainer._overrides_loaders(),
            "train_dataset=…, data_collator=… and train_sampling_strategy=… without the override",
        ),
    }
    for name, (given, remedy) in asked.items():
        if given:
            raise SettingError(
                f"{name}, with a model that is split over {ways} processes", "what is compiled into the step", remedy
            )


def check_epochs(args: Any, loader: Any) -> None:
    """Refuse what is due at an epoch's end where each process has an end of its own.

    Args:
        args: ``TrainingArguments``.
        loader: What is trained on.

    Raises:
        SettingError: ``eval_strategy`` or ``save_strategy`` goes by epochs, on shards of a stream.
    """
    if not getattr(loader, "has_own_shards", False):
        return
    for field in ("eval_strategy", "save_strategy"):
        if getattr(getattr(args, field), "value", getattr(args, field)) == "epoch":
            raise SettingError(
                f'{field}="epoch" on a stream of which each process reads shards of its own',
                "an end of the epoch that all processes reach at the same step",
                f'{field}="steps", or to_iterable_dataset(num_shards=1), which is dealt in rounds',
            )


def check_alike(trainer: Any, world: World) -> None:
    """Refuse to begin where the processes differ: their sums would have no meaning.

    Raises:
        SettingError: Names the rank that differs, and in what.
    """
    if world.is_alone:
        return
    different = find_different(world.gather_object(describe(trainer), "the comparison of the processes"))
    if different is None:
        return
    rank, name, found, expected = different
    raise SettingError(
        f"rank {rank} with {name} {found!r}, where rank 0 has {expected!r}",
        "the same versions, settings, rows and start on all processes",
        "the same script, arguments, files and seed on every machine; rows made with a fixed seed",
    )


def join_step(world: World, accumulation: int, timeout: float) -> None:
    """Make room for the counts of a window, and say how long a process waits for another.

    Args:
        world: The processes.
        accumulation: Micro-batches of a window.
        timeout: ``ddp_timeout``, in seconds.
    """
    if world.watch is not None:
        world.width = max(32, -(-(16 + len(PEER_COLUMNS) * accumulation) // 2) * 2)
        world.watch.limit = float(timeout)


def describe(trainer: Any) -> dict[str, Any]:
    """What has to be equal on all processes, as JSON."""
    step = trainer.session.step
    made = {f"version of {name}": find_version(name) or "not installed" for name in _LIBRARIES}
    made |= _plain("", trainer.plan)
    made |= _rows("train_dataset", trainer.train_dataset)
    sets = trainer.eval_dataset
    for name, rows in sets.items() if isinstance(sets, dict) else [("", sets)]:
        made |= _rows(f"eval_dataset{name and f'[{name!r}]'}", rows)
    divided = {} if trainer.session.split is None else trainer.session.split.axes
    for name, array in step.params.items():
        # Of a divided array each process has another part.
        digest = "" if name in divided else digest_arrays({name: array})
        made[f"the start of {name}"] = f"{array.dtype} {array.shape} {digest}"
    made["what decays"] = repr(sorted(step.optimizer.decay))
    return made


def _plain(prefix: str, plan: Any) -> dict[str, str]:
    made: dict[str, str] = {}
    for field in fields(plan):
        value = getattr(plan, field.name)
        # A token is nobody else's business, and may differ.
        if is_dataclass(value):
            made |= _plain(f"{field.name}.", value)
        elif field.repr:
            made[f"{prefix}{field.name}"] = repr(value)
    return made


def _rows(name: str, dataset: Any) -> dict[str, Any]:
    if dataset is None or not hasattr(dataset, "__len__"):
        return {name: type(dataset).__name__}
    digest = hashlib.blake2b(digest_size=16)
    if hasattr(dataset, "with_format") and hasattr(dataset, "column_names"):
        for table in dataset.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
            for column in sorted(table.column_names):
                values = table[column].combine_chunks()
                digest.update(repr((column, values.type)).encode())
                digest.update(pickle.dumps(values.to_pylist()) if values.offset else _buffers(values))
    else:
        for number in range(len(dataset)):
            digest.update(pickle.dumps(dataset[number]))
    return {f"rows of {name}": len(dataset), f"the content of {name}": digest.hexdigest()}


def _buffers(values: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    # A table may hold more than its rows show; written out it holds just those.
    with pyarrow.ipc.new_stream(sink, pyarrow.schema([("v", values.type)])) as writer:
        writer.write_table(pyarrow.table({"v": values}))
    return sink.getvalue().to_pybytes()


def tell_accelerate(args: Any, world: World) -> None:
    """Let HF's objects know the processes, where accelerate has been imported: it only knows those that torch started.

    Args:
        args: ``TrainingArguments``; its ``main_process_first`` waits as MLX's processes wait.
        world: The processes.
    """
    state = sys.modules.get("accelerate.state")
    if world.is_alone or state is None:
        return
    shared = state.PartialState._shared_state
    if shared:
        shared.update(num_processes=world.size, process_index=world.rank, local_process_index=world.local_rank)

    @contextmanager
    def main_process_first(local: bool = True, desc: str = "work") -> Iterator[None]:
        with first(world, local=local):
            yield

    if hasattr(args, "main_process_first"):
        object.__setattr__(args, "main_process_first", main_process_first)


@contextmanager
def first(world: World, *, local: bool = True) -> Iterator[None]:
    """A block that the first process, of the machine or of all, runs before the others do."""
    is_first = world.is_local_main if local else world.is_main
    if not is_first:
        world.barrier("main_process_first")
    try:
        yield
    finally:
        if is_first:
            world.barrier("main_process_first")
