"""What several processes do together, by name: ``rank_scenarios.py FOLDER OUT SCENARIO ...``.

Each returns what the test looks at, as JSON; OUT.<rank> holds them by name. One that raises ends its process.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from rank_cases import CASES, SAVED, token_rows
from rank_worker import build, count_exchanges, describe, untimed
from transformers import TrainerCallback

FOLDER, OUT = Path(sys.argv[1]), Path(sys.argv[2])
#: Two steps each: enough to stop, to be killed or to be interrupted in between.
SHORT = CASES["plain"] | {"save_strategy": "steps", "save_steps": 100}


class At(TrainerCallback):
    """Calls a function of the control after a step, on one rank or on all."""

    def __init__(self, step: int, act: Any, rank: int | None = None) -> None:
        self.step, self.act, self.rank = step, act, rank

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and self.rank in (None, args.process_index):
            self.act(control)


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def stop(control: Any) -> None:
    control.should_training_stop = True


def objects() -> Any:
    import torch

    trainer = build(CASES["plain"], FOLDER, f"{OUT}-objects")
    args, accelerator = trainer.args, trainer.accelerator
    order: list[str] = []
    with accelerator.main_process_first():
        order.append(f"{time.time():.6f}")
    rank = args.process_index
    return {
        "args": [args.world_size, rank, args.local_process_index, args.should_save, args.should_log],
        "state": [trainer.state.is_world_process_zero, trainer.state.is_local_process_zero],
        "trainer": [trainer.is_world_process_zero(), trainer.is_local_process_zero()],
        "batch": trainer.get_total_train_batch_size(args),
        "processes": [accelerator.num_processes, accelerator.process_index, accelerator.is_main_process],
        "scalar": accelerator.gather(torch.tensor(rank)).tolist(),
        "rows": accelerator.gather_for_metrics({"a": torch.tensor([[rank, 1.5]])})["a"].tolist(),
        "sum": accelerator.reduce(torch.tensor([1.0, rank])).tolist(),
        "mean": accelerator.reduce(torch.tensor([1.0, rank]), reduction="mean").tolist(),
        "padded": list(accelerator.pad_across_processes(torch.ones(2, 3 + rank), dim=1).shape),
        "loader": [batch["input_ids"].shape[0] for batch in trainer.get_train_dataloader()],
        "first": order,
    }


def exchange() -> Any:
    """Gradients of several dtypes and sizes, and metrics, summed in one compiled function."""
    import mlx.core as mx

    from hf_mlx.processes.world import the_world
    from hf_mlx.training.bundles import LARGEST
    from hf_mlx.training.exchange import Exchange

    world = the_world()
    draw = np.random.default_rng(world.rank)
    grads = {
        "a": mx.array(draw.standard_normal((3, 5)), mx.float32),
        "large": mx.array(draw.standard_normal(LARGEST + 64), mx.float32),
        "b": mx.array(draw.standard_normal(7), mx.float32),
        "half": mx.array(draw.integers(-8, 8, 9), mx.bfloat16),
    }
    metrics = {
        "loss": mx.array(0.5 + world.rank),
        "micro_batches": mx.array(2.0),
        "entropy": mx.array(float(world.rank)),
    }
    summed, measured, norm = mx.compile(Exchange(world))(grads, metrics)
    mx.eval(summed, measured, norm)
    others = [np.random.default_rng(rank) for rank in range(world.size)]
    parts = [
        {
            "a": other.standard_normal((3, 5)).astype(np.float32),
            "large": other.standard_normal(LARGEST + 64).astype(np.float32),
            "b": other.standard_normal(7).astype(np.float32),
            "half": other.integers(-8, 8, 9).astype(np.float32),
        }
        for other in others
    ]
    worst = {
        name: float(np.abs(np.array(summed[name].astype(mx.float32)) - sum(part[name] for part in parts)).max())
        for name in grads
    }
    whole = np.sqrt(sum(float((sum(part[name] for part in parts).astype(np.float64) ** 2).sum()) for name in grads))
    metrics = {name: value.item() for name, value in measured.items()}
    return {"worst": worst, "metrics": metrics, "norm": [norm.item(), float(whole)]}


def graph() -> Any:
    trainer = build(CASES["plain"], FOLDER, f"{OUT}-graph")
    return {"exchanges": count_exchanges(trainer, Path(f"{OUT}-graph")), "arrays": len(trainer.session.step.params)}


def resumed() -> Any:
    whole = build(SAVED, FOLDER, f"{OUT}-whole")
    whole.train()
    again = build(SAVED, FOLDER, f"{OUT}-whole")
    again.train(resume_from_checkpoint=f"{OUT}-whole/checkpoint-2")
    folder = Path(f"{OUT}-whole/checkpoint-2")
    return {"whole": describe(whole), "again": describe(again), "files": sorted(path.name for path in folder.iterdir())}


def own_disk() -> Any:
    """The checkpoints lie on rank 0's disk alone."""
    from hf_mlx.processes.world import the_world

    mine = "" if the_world().is_main else f"-elsewhere-{the_world().rank}"
    trainer = build(SAVED, FOLDER, f"{OUT}-whole{mine}")
    trainer.train(resume_from_checkpoint=f"{OUT}-whole{mine}/checkpoint-2")
    written = Path(f"{OUT}-whole{mine}")
    return {
        "again": describe(trainer),
        "written": sorted(p.name for p in written.iterdir()) if written.exists() else [],
    }


def shown() -> Any:
    """A callback looks at the gradients before each step."""
    norms: list[float] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(float(sum(grad.double().square().sum() for grad in grads) ** 0.5))

    trainer = build(CASES["plain"], FOLDER, f"{OUT}-shown", callbacks=[Look()])
    trainer.train()
    return {"norms": norms, **describe(trainer)}


def stopped() -> Any:
    """A callback that stops on every rank, and one that stops on rank 1 alone."""
    said = Said()
    logging.getLogger("hf_mlx").addHandler(said)
    made = {}
    for name, rank in {"all": None, "one": 1}.items():
        trainer = build(SHORT, FOLDER, f"{OUT}-stopped-{name}", callbacks=[At(2, stop, rank)])
        trainer.train()
        made[name] = [trainer.state.global_step, trainer.control.should_training_stop]
    made["said"] = [line for line in said.lines if "asked to stop" in line]
    return made


def interrupted() -> Any:
    """Ctrl-C on rank 1 alone."""
    trainer = build(
        SHORT, FOLDER, f"{OUT}-interrupted", callbacks=[At(1, lambda _: os.kill(os.getpid(), signal.SIGINT), 1)]
    )
    try:
        trainer.train()
    except KeyboardInterrupt:
        saved = sorted(path.name for path in Path(f"{OUT}-interrupted").glob("checkpoint-*"))
        return {"step": trainer.state.global_step, "saved": saved}
    return {"step": None}


def predicted() -> Any:
    """Rows that do not divide by the ranks, their predictions and what compute_metrics is given."""
    seen: dict[str, Any] = {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["shapes"] = [list(prediction.predictions.shape), list(prediction.label_ids.shape)]
        seen["labels"] = [int(row[row != -100].sum()) for row in prediction.label_ids]
        return {"labels": float((prediction.label_ids != -100).sum())}

    trainer = build(
        CASES["evaluated"],
        FOLDER,
        f"{OUT}-predicted",
        compute_metrics=metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )
    evaluated = untimed([trainer.evaluate()])[0]
    output = trainer.predict(trainer.eval_dataset)
    return {
        "evaluated": evaluated,
        "seen": seen,
        "predictions": np.asarray(output.predictions).tolist(),
        "rows": [sum(row["input_ids"]) for row in trainer.eval_dataset],
    }


def different() -> Any:
    """Each rank reads other rows, or another seed: refused before step 1."""
    from hf_mlx.processes.world import the_world

    told = []
    for change in ({"rows": 16 + the_world().rank}, {"seed": 42 + the_world().rank}):
        try:
            build(CASES["plain"] | change, FOLDER, f"{OUT}-different").train()
        except Exception as error:
            told.append([type(error).__name__, str(error)])
    return told


def refused() -> Any:
    """What several processes are not proven for."""
    from datasets import Dataset

    told = {}

    def attempt(name: str, make: Any) -> None:
        try:
            make()
        except Exception as error:
            told[name] = [type(error).__name__, str(error)]

    case, out = CASES["plain"], f"{OUT}-refused"

    attempt("pieces", lambda: build(case | {"auto_find_batch_size": True}, FOLDER, out))
    attempt("uneven", lambda: build(case | {"accelerator_config": {"even_batches": False}}, FOLDER, out))
    attempt("dispatch", lambda: build(case | {"accelerator_config": {"dispatch_batches": True}}, FOLDER, out))
    shards = CASES["shards"]
    attempt("epochs of shards", lambda: build(shards | {"save_strategy": "epoch"}, FOLDER, out).train())
    short = CASES["stream"] | {"rows": 3, "gradient_accumulation_steps": 4}
    attempt("short stream", lambda: build(short, FOLDER, out).train())
    held = Dataset.from_list(token_rows(7, 1)).to_iterable_dataset(num_shards=7)
    one_row = case | {"per_device_eval_batch_size": 1}
    attempt("uneven evaluation", lambda: build(one_row, FOLDER, out, eval_dataset=held).evaluate())
    return told


def raising() -> Any:
    """Rank 1 raises after step 1."""

    def fail(_: Any) -> None:
        raise ValueError("the disk of rank 1 is full")

    build(SHORT, FOLDER, f"{OUT}-raising", callbacks=[At(1, fail, 1)]).train()


class Dies(TrainerCallback):
    """Ends its process with SIGKILL some seconds after an event of a step."""

    def __init__(self, event: str, step: int, delay: float) -> None:
        self.step, self.delay = step, delay
        setattr(self, event, self._begin)

    def _begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            threading.Timer(self.delay, self._die).start() if self.delay else self._die()

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def killed() -> Any:
    """The rank that the environment names dies."""
    from hf_mlx.processes.world import the_world

    rank, event, step, delay = json.loads(os.environ["KILLED"])
    dies = the_world().rank == rank
    try:
        build(SAVED, FOLDER, os.environ["KILLED_DIR"], callbacks=[Dies(event, step, delay)] if dies else []).train()
    finally:
        if dies:
            # The run may be over before it is.
            time.sleep(delay + 60)


def evaluating() -> Any:
    """Rank 1 dies at the first batch of an evaluation that takes the others a minute."""

    class Evaluated(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.process_index == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.5)

    case = CASES["evaluated"] | {"eval_rows": 480}
    build(case, FOLDER, f"{OUT}-evaluating", callbacks=[Evaluated()]).evaluate()


def revived() -> Any:
    """Goes on from the newest checkpoint of each run that ended; what each rank then holds, by folder."""
    made = {}
    for folder in os.environ["KILLED_DIRS"].split(os.pathsep):
        trainer = build(SAVED, FOLDER, folder)
        kept = any(Path(folder).glob("checkpoint-*"))
        trainer.train(resume_from_checkpoint=True if kept else None)
        made[folder] = describe(trainer)
    return made


def hanging() -> Any:
    """Rank 1 hangs after step 1; the others give up after ddp_timeout."""
    build(SHORT | {"ddp_timeout": 6}, FOLDER, f"{OUT}-hanging", callbacks=[At(1, lambda _: time.sleep(600), 1)]).train()


def foreign() -> Any:
    """Goes on from a folder that TRL wrote under DDP, or writes one for it."""
    trainer = build(SAVED, FOLDER, os.environ["FOREIGN_DIR"])
    trainer.train(resume_from_checkpoint=os.environ.get("FOREIGN_CHECKPOINT"))
    return describe(trainer)


def main() -> None:
    warnings.simplefilter("ignore")
    from hf_mlx.processes.world import the_world

    made: dict[str, Any] = {}
    for name in sys.argv[3:]:
        made[name] = globals()[name]()
        Path(f"{OUT}.{the_world().rank}").write_text(json.dumps(made))


if __name__ == "__main__":
    main()
