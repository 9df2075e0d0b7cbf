"""The callback that writes a trace; works in TRL and transformers on torch as well as here."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from .trace import VERSION

IGNORE_INDEX = -100
_LOGGED = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr"}
_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "bf16",
)


class TraceCallback(TrainerCallback):
    """Write one JSON line a step: batch hash, tokens, loss, grad_norm and lr.

    Loss, norm and rate are those of the log, so set ``logging_steps=1`` to have them for every step. Of several
    processes only the first writes.

    Args:
        path: File to write; replaced if it exists.

    Example:
        >>> trainer.add_callback(TraceCallback("run.jsonl"))
        >>> trainer.train()
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._micro: deque[tuple[np.ndarray, int | None]] = deque()
        self._in_step = 1
        self._writes = False
        self._line: dict[str, Any] | None = None
        self._detach: Callable[[], None] | None = None
        self._follows = False

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        self._writes = state.is_world_process_zero
        if not self._writes:
            return
        header = {"trace": VERSION, **{name: _plain(getattr(args, name, None)) for name in _SETTINGS}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**header, **_describe(model)}) + "\n")
        self._micro.clear()
        self._in_step, self._line = 1, None
        if not self._follows and hasattr(model, "register_forward_pre_hook"):
            self._stop()
            self._detach = model.register_forward_pre_hook(self._see_forward, with_kwargs=True).remove

    def follow_batches(self, loader: Any) -> None:
        """See every training micro-batch of an MLX trainer, which makes no forward pass that a hook would see.

        Args:
            loader: What the run reads from; its ``collate`` makes the batches, the script's own loader's too.
        """
        self._stop()
        self._follows = True
        collate = loader.collate

        def seen(rows: Any) -> Any:
            batch = collate(rows)
            mask = getattr(batch, "keys", None)
            if mask is None:
                mask = np.arange(batch.input_ids.shape[1]) < np.asarray(batch.lengths)[:, None]
            self._see(batch.input_ids, mask, getattr(batch, "labels", None))
            return batch

        loader.collate = seen
        self._detach = lambda: setattr(loader, "collate", collate)

    def _see_forward(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if module.training and kwargs.get("input_ids") is not None:
            names = ("input_ids", "attention_mask", "labels")
            arrays = [kwargs.get(name) for name in names]
            self._see(*(None if array is None else array.detach().cpu().numpy() for array in arrays))

    def _see(self, ids: Any, mask: Any, labels: Any) -> None:
        kept = ids.reshape(-1) if mask is None else ids[mask.astype(bool)]
        targets = None if labels is None else int((labels[..., 1:] != IGNORE_INDEX).sum())
        self._micro.append((kept.astype("<i4"), targets))

    def on_epoch_begin(self, args, state, control, **kwargs):
        # What was fetched ahead when an epoch was cut short will not be trained on.
        self._micro.clear()
        self._in_step = 1

    def on_substep_end(self, args, state, control, **kwargs):
        self._in_step += 1

    def on_step_end(self, args, state, control, **kwargs):
        self._flush()
        window = [self._micro.popleft() for _ in range(min(self._in_step, len(self._micro)))]
        self._in_step = 1
        self._line = {"step": state.global_step}
        if window:
            tokens = np.concatenate([ids for ids, _ in window])
            targets = [count for _, count in window if count is not None]
            self._line["batch"] = hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()
            self._line["tokens"] = len(tokens)
            self._line["targets"] = sum(targets) if len(targets) == len(window) else None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and self._line is not None:
            self._line |= {_LOGGED[name]: float(logs[name]) for name in _LOGGED if logs.get(name) is not None}

    def on_train_end(self, args, state, control, **kwargs):
        self._flush()
        self._stop()

    def _stop(self) -> None:
        """End what was listened to, by this run or one that was cut short."""
        if self._detach is not None:
            self._detach()
        self._detach, self._follows = None, False

    def _flush(self) -> None:
        if self._line is not None and self._writes:
            with self.path.open("a") as file:
                file.write(json.dumps(self._line) + "\n")
        self._line = None


def _plain(value: Any) -> Any:
    return str(getattr(value, "value", value)) if not isinstance(value, (int, float, str, type(None))) else value


def _describe(model: Any) -> dict[str, Any]:
    """Dtypes of all parameters, and the L2 norm of the trainable ones: where the run starts from."""
    if hasattr(model, "named_parameters"):
        everything = list(model.parameters())
        trainable = [array.detach() for array in everything if array.requires_grad]
    elif hasattr(model, "trainable_parameters"):
        everything, trainable = list(_leaves(model.parameters())), list(_leaves(model.trainable_parameters()))
    else:
        return {"dtypes": None, "start_norm": None}
    dtypes = sorted({str(array.dtype).rpartition(".")[2] for array in everything})
    return {"dtypes": dtypes, "start_norm": sum(float((array * array).sum()) for array in trainable) ** 0.5}


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for branch in tree:
            yield from _leaves(branch)
    else:
        yield tree
