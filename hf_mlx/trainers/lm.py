"""MLXTrainer: transformers' ``Trainer`` for causal language models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..checkpoints.random_states import RandomStates
from ..data.process_generator import ProcessGenerator
from ..errors import SettingError
from ..recipes.lm import LM, default_args, default_collator
from ..surface.signature import is_causal_lm
from .base import TrainerBase, handed_over
from .refused import refuse


class MLXTrainer(TrainerBase):
    """Training on MLX with the interface of ``transformers.Trainer``, for causal language models.

    Rows are taken as they are: nothing is tokenized, cut, dropped or reordered, and no tokenizer is needed. Columns
    that the model's forward does not take are left out (``remove_unused_columns``); the collator makes the batches.
    Any attention mask counts: padding on either side, holes, labels on padding.

    Args:
        model: A transformers model or PeftModel of a causal language model, which is trained as it is and has the
            trained weights written back into it; or a hub id or local folder.
        args: ``TrainingArguments``; None is ``TrainingArguments("tmp_trainer")``.
        data_collator: Called with a list of rows; None is ``DataCollatorWithPadding`` of ``processing_class``, or
            ``default_data_collator`` without one.
        train_dataset: A ``datasets`` dataset of any format, a ``torch.utils.data.Dataset``, a list of rows, or a
            stream; None to evaluate alone.
        eval_dataset: Likewise, or a dict of datasets.
        processing_class: Tokenizer, saved beside the model; None saves none.
        model_init: Called for the model, once, after ``set_seed(args.seed)``; training begins with the random states
            that it leaves. An argument that it takes, the trial, is None.
        compute_loss_func, optimizers, optimizer_cls_and_kwargs: As in ``transformers.Trainer``, where they are taken.
        compute_metrics: Called with a ``transformers.EvalPrediction``.
        callbacks: ``transformers.TrainerCallback`` instances or classes.
        preprocess_logits_for_metrics: Called with the logits and labels of each evaluation batch.
        max_grad_value: Elementwise clip; wins over ``args.max_grad_norm``.
        finetune_last_n_layers: Train the last n blocks only.
        strict: Also refuse settings that are honoured another way with other numbers.
        **keywords: ``tokenizer``, the older name of ``processing_class``.

    Attributes:
        plan, ledger, grad_clip, args, state, control, callback_handler: As of :class:`~hf_mlx.MLXSFTTrainer`.
        train_dataset, eval_dataset: As they were given.

    Raises:
        HFMLXError: One of its subclasses, before any training.
    """

    recipe = LM
    # Where model_init left the process's random states.
    _made: RandomStates | None = None

    @staticmethod
    def trains(model: Any) -> bool:
        """Whether ``model`` is of a class that this trainer trains; a name is, until it is loaded."""
        return is_causal_lm(model)

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        *,
        max_grad_value: float | None = None,
        finetune_last_n_layers: int | None = None,
        strict: bool = False,
        **keywords: Any,
    ) -> None:
        args = args if args is not None else default_args("")
        made = None
        if model is None or model_init is not None:
            model, made = _init_model(model, model_init, args)
        if not self.trains(model):
            raise SettingError(
                f"model of class {type(model).__name__}",
                "a causal language model (AutoModelForCausalLM): MLX trains no other here",
                "transformers.Trainer(model=model, ...) on torch",
            )
        if data_collator is None:
            data_collator = default_collator(processing_class or keywords.get("tokenizer"))
        super().__init__(**handed_over(locals(), "model_init", "made"))
        if getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager":
            self.data.refuse_blind_targets()
        if made is not None:
            made.restore(self.data.rng)
        self._set_own(_made=made)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train to the end of the plan; arguments and result as of :meth:`~hf_mlx.MLXSFTTrainer.train`.

        Raises:
            SettingError: Also for a second run of a trainer with ``model_init``, which upstream starts anew.
        """
        if self._made is not None and self.state.global_step and not resume_from_checkpoint:
            raise SettingError(
                "train() again on a trainer with model_init",
                "one run: upstream makes the model anew for each, and here it is made once",
                "MLXTrainer(model_init=model_init, ...).train(), a new trainer",
            )
        if self._made is not None:
            # Upstream seeds and makes the model again, so that whatever was drawn since does not count.
            self._made.restore(self.data.rng)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    @refuse("trainer.train()")
    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Forward and backward of one batch."""

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write README.md into ``output_dir``.

        Args:
            language, license: Front matter.
            tags: Further tags.
            model_name: Heading; None is the name of the repository or folder.
            finetuned_from: The base model; None is the one that was loaded.
            tasks: The hub's names of tasks; the first is the card's.
            dataset_tags: Ids of the training data.
            dataset: Its name for people.
            dataset_args: Further names of its parts.
        """
        front = {"language": language, "license": license, "datasets": dataset_tags, "dataset_args": dataset_args}
        front |= {
            "base_model": finetuned_from,
            "pipeline_tag": tasks[0] if isinstance(tasks, list) and tasks else tasks,
        }
        given = {name: value for name, value in front.items() if value}
        self._write_card(model_name, ", ".join(dataset) if isinstance(dataset, list) else dataset, tags, given)


def _init_model(model: Any, model_init: Callable | None, args: Any) -> tuple[Any, RandomStates]:
    """The model, and the process's random states once it is made."""
    if model is not None or model_init is None:
        given = "a model and model_init" if model is not None else "neither a model nor model_init"
        raise SettingError(
            given,
            "`Trainer` requires either a `model` or `model_init` argument" + (", but not both" if model else ""),
            "MLXTrainer(model=model, ...)",
        )
    from transformers import set_seed
    from transformers.trainer_utils import number_of_arguments

    taken = number_of_arguments(model_init)
    if taken > 1:
        raise SettingError(
            f"a model_init of {taken} arguments",
            "model_init should have 0 or 1 argument, the trial, which is None here",
            "MLXTrainer(model_init=lambda: make_model(...), ...)",
        )
    # A model that is made here is made from the run's seed, as upstream.
    set_seed(args.seed)
    model = model_init(*[None] * taken)
    if model is None:
        raise SettingError(
            "a model_init that returned None", "model_init should not return None.", "def model_init(): return model"
        )
    states = RandomStates.capture(ProcessGenerator(args.seed))
    # MLX's own key is not upstream's, and is the session's.
    return model, replace(states, key=None)
