"""Public names of transformers' trainer that scripts read and that have one answer here."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from ..surface.upstream import upstream_trainer
from .loaders import Loaders
from .refused import Refused


class Names(Loaders, Refused):
    """What HF's trainer also says about itself: no split model, one device, labels under their usual name."""

    is_deepspeed_enabled = False
    is_fsdp_enabled = False
    is_fsdp_xla_enabled = None
    is_fsdp_xla_v1_enabled = None
    is_fsdp_xla_v2_enabled = None
    is_model_parallel = False
    is_distributed_loading_by_transformers = False
    place_model_on_device = True
    can_return_loss = False
    deepspeed = None
    label_smoother = None
    model_init = None
    hp_name = None
    hp_search_backend = None
    # Added to ``state.total_flos`` at once, step by step.
    current_flos = 0

    @property
    def label_names(self) -> list[str]:
        """The column that holds the labels."""
        return ["labels"]

    @property
    def model_wrapped(self) -> Any:
        """``trainer.model``: nothing is wrapped around it."""
        return self.model

    @property
    def neftune_noise_alpha(self) -> float | None:
        """``args.neftune_noise_alpha``."""
        return getattr(self.args, "neftune_noise_alpha", None)

    @property
    def chat_template(self) -> str | None:
        """The template that training replaced the tokenizer's own with: none, its masks are found without one."""
        return None

    @property
    def completion_only_loss(self) -> bool:
        """Whether prompts are left out of the loss."""
        return self.data.is_completion_only

    @property
    def padding_free(self) -> bool:
        """Whether batches are collated into one row of documents."""
        return self.data.is_padding_free

    @property
    def router_aux_loss_coef(self) -> float:
        """What the balance of the routers weighs in the loss; 0.0 without routers."""
        return self.session.step.objective.aux_coefficient

    @property
    def aux_loss_enabled(self) -> bool:
        """Whether the balance of the routers is part of the loss."""
        return bool(self.router_aux_loss_coef)

    @property
    def gather_function(self) -> Any:
        """``accelerator.gather_for_metrics``."""
        return self.accelerator.gather_for_metrics

    @property
    def maybe_activation_offload_context(self) -> AbstractContextManager[None]:
        """Does nothing: memory is unified, so nothing can be moved out of it."""
        return nullcontext()

    def get_num_trainable_parameters(self) -> int:
        """How many numbers are trained."""
        sizes = self.session.loaded.sizes
        return sum(sizes.get(name, value.size) for name, value in self.session.step.params.items())

    def get_total_train_batch_size(self, args: Any) -> int:
        """Rows of one optimizer step, of all processes.

        Args:
            args: Whose accumulation counts.
        """
        return self.plan.batch.train_batch_size * args.gradient_accumulation_steps * self.world.sharing.size

    def get_learning_rates(self) -> list[float]:
        """The learning rate of each group of ``trainer.optimizer``.

        Raises:
            ValueError: Before ``train()`` (as transformers').
        """
        return [group["lr"] for group in self._made_optimizer().param_groups]

    def get_optimizer_group(self, param: Any = None) -> Any:
        """The group of ``trainer.optimizer`` that holds ``param``; without one, the parameters of each group.

        Raises:
            ValueError: Before ``train()`` (as transformers').
        """
        groups = self._made_optimizer().param_groups
        if param is not None:
            for group in groups:
                if any(held is param for held in group["params"]):
                    return group
        return [group["params"] for group in groups]

    def get_cp_size(self) -> int:
        """1: no model is split over processes."""
        return 1

    def get_sp_size(self) -> int:
        """1: no model is split over processes."""
        return 1

    def get_tp_size(self) -> int:
        """How many processes hold one model together."""
        return self.plan.model.tensor_parallel

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a step on ``inputs``: 6 for each token and each parameter that is no embedding."""
        ids = inputs.get("input_ids")
        return 0 if ids is None else int(self.session.flops_per_token) * ids.shape[0] * ids.shape[-1]

    def store_flos(self) -> None:
        """Nothing is left to store: ``state.total_flos`` is counted as training goes."""

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[None]:
        """Does nothing: MLX's models cast by themselves."""
        return nullcontext()

    def compute_loss_context_manager(self) -> ExitStack:
        """Does nothing."""
        return ExitStack()

    def create_accelerator_and_postprocess(self) -> None:
        """``trainer.accelerator`` is there from the constructor on."""

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """Epochs, updates and rows of a run over ``dataloader``, as transformers counts them."""
        return upstream_trainer().set_initial_training_values(self, args, dataloader)

    @staticmethod
    def metrics_format(metrics: dict[str, float]) -> dict[str, float]:
        """``metrics`` as people read them."""
        from transformers.trainer_pt_utils import metrics_format

        return metrics_format(metrics)

    def _made_optimizer(self) -> Any:
        if self.optimizer is None:
            raise ValueError("Trainer optimizer is None, please make sure you have setup the optimizer before.")
        return self.optimizer
