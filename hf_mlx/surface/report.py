"""A trainer's run as its report shows it."""

from __future__ import annotations

import datetime
import logging
from typing import Any

from ..intake import describe
from ..models.doctor import environment
from ..reports.place import VARIABLE, choose_place, write_page
from ..reports.run import Run, read_series
from ..reports.samples import read_samples
from ..training.memory import show_bytes

logger = logging.getLogger(__name__)


def write_report(trainer: Any, failure: BaseException | None = None) -> None:
    """Write the report of the call of ``train()`` that just ended, where one is wanted.

    Nothing about it stops a run: what goes wrong is one line in the log.

    Args:
        trainer: Whose ``state.log_history`` is shown.
        failure: Why it ended early.
    """
    trainer._recorder.stop()
    path = choose_place(trainer.args.output_dir)
    if path is None or not trainer.is_world_process_zero() or not trainer.state.log_history:
        return
    try:
        write_page(read_run(trainer, failure), path)
    except Exception as error:
        # A tokenizer's, a dataset's or a disk's own error: the weights are trained, whatever a page says.
        logger.warning(f"{path} was not written ({describe(error)}); {VARIABLE}=0 asks for no report")
        return
    logger.info(f"report of this run: {path}")


def read_run(trainer: Any, failure: BaseException | None = None) -> Run:
    """What a trainer's report shows."""
    state, marks = trainer.state, trainer._recorder.marks
    rulings = [(entry.field, entry.shown, str(entry.verdict), entry.reason) for entry in trainer.ledger.changed()]
    adapter = trainer.adapter
    notes = [*trainer.session.loaded.notes, *(adapter.notes if adapter is not None else ())]
    try:
        samples = read_samples(trainer.train_dataset, trainer.processing_class)
    except Exception as error:
        # A tokenizer that cannot tell a token's text costs the rows, not the curves.
        samples = ()
        notes.append(f"training rows are not shown: {describe(error)}")
    return Run(
        title=f"{trainer._base.name}: {type(trainer).__name__}",
        facts=_facts(trainer),
        series=read_series(state.log_history, marks),
        rulings=rulings,
        notes=notes,
        samples=samples,
        failure="" if failure is None else describe(failure),
    )


def _facts(trainer: Any) -> dict[str, str]:
    state, marks = trainer.state, trainer._recorder.marks
    last = marks[max(marks)] if marks else None
    trained = sum(value.size for value in trainer.session.step.params.values())
    facts = {
        "steps": f"{state.global_step:,} of {state.max_steps:,}"
        + (f", epoch {state.epoch:.2f}" if state.epoch is not None else ""),
        "trained parameters": f"{trained:,}",
    }
    if last is not None and last.seconds:
        facts["time"] = str(datetime.timedelta(seconds=round(last.seconds)))
        facts["tokens"] = f"{last.tokens - marks[-1].tokens:,.0f}"
        facts["memory, at the most"] = show_bytes(last.memory)
    if trainer.startup.first_step is not None:
        facts["start"] = trainer.startup.describe()
    return {**facts, **environment(), "ended": datetime.datetime.now().astimezone().isoformat(timespec="seconds")}
