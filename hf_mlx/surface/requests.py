"""What the constructor was handed, checked and completed before anything is loaded."""

from __future__ import annotations

from typing import Any

from ..errors import SettingError


def check_functions(keywords: dict[str, Any]) -> None:
    """Refuse what would run inside the step; takes it out of ``keywords`` when it is None.

    Raises:
        SettingError: One of them was given.
    """
    for name, remedy in _REFUSED_KEYWORDS.items():
        if keywords.pop(name, None) is not None:
            raise SettingError(f"{name}=", "what runs inside the compiled step is chosen by name", remedy)


_REFUSED_KEYWORDS = {
    "compute_loss_func": 'SFTConfig(loss_type="nll"), or "dft"; label_smoothing_factor=… smooths labels',
    "optimizer_cls_and_kwargs": 'SFTConfig(optim="adamw_torch", optim_args="…", learning_rate=…)',
    "model_init": "MLXSFTTrainer(model=model_init(), …)",
}


def check_optimizers(optimizers: tuple[Any, Any]) -> None:
    """Refuse optimizer and schedule objects.

    Raises:
        SettingError: One of them was given.
    """
    if any(part is not None for part in optimizers):
        raise SettingError(
            f"optimizers=({type(optimizers[0]).__name__}, {type(optimizers[1]).__name__})",
            "the optimizer and schedule are chosen by name, so that they can run inside the compiled step",
            'SFTConfig(optim="adamw_torch", lr_scheduler_type="cosine", ...)',
        )


def check_evaluation(args: Any, eval_dataset: Any, trainer: str) -> None:
    """Refuse to evaluate on nothing; ``trainer`` is the class's name.

    Raises:
        SettingError: ``eval_strategy`` asks for evaluation and there is no ``eval_dataset``.
    """
    if args.eval_strategy != "no" and eval_dataset is None:
        raise SettingError(
            f"eval_strategy={str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r} without an eval_dataset",
            "an eval_dataset to evaluate on",
            f'{trainer}(..., eval_dataset=my_dataset), or eval_strategy="no"',
        )


def no_rows(trainer: str) -> SettingError:
    """What ``train()`` on a trainer without a train dataset raises."""
    return SettingError(
        "train() on a trainer without a train_dataset",
        "`Trainer: training requires a train_dataset.`",
        f"{trainer}(..., train_dataset=my_dataset)",
    )
