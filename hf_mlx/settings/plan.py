"""The frozen plan of a run: every setting, resolved to plain values, before an array exists.

``resolve_plan`` (in :mod:`hf_mlx.settings.resolve`) reads the HF objects once; everything
below it reads only these dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .clipping import GradClip

Sampling = Literal["random", "sequential", "group_by_length"]


@dataclass(frozen=True)
class DataPlan:
    """How rows become token ids and labels. Fields mean what ``trl.SFTConfig`` says they mean."""

    dataset_text_field: str = "text"
    max_length: int | None = 1024
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    packing: bool = False
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = "bfd"
    eval_packing: bool | None = None
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    eos_token: str | None = None
    pad_token: str | None = None
    chat_template_path: str | None = None
    shuffle_dataset: bool = False
    dataset_num_proc: int | None = None
    skip_prepare_dataset: bool = False
    seed: int = 42


@dataclass(frozen=True)
class BatchPlan:
    """How rows are ordered, batched and accumulated; all counts are in rows, micro-batches or steps.

    ``processes`` is how many share the work; ``split_batches`` deals each batch to all of them, and ``average_tokens``
    divides by the tokens of all, each as accelerate and transformers mean it.
    """

    train_batch_size: int = 8
    eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    num_train_epochs: float = 3.0
    max_steps: int = -1
    drop_last: bool = False
    seed: int = 42
    data_seed: int | None = None
    sampling: Sampling = "random"
    seedable_sampler: bool = True
    length_column_name: str = "length"
    processes: int = 1
    split_batches: bool = False
    average_tokens: bool = True

    @property
    def own_batch_size(self) -> int:
        """Rows of a full micro-batch of one process."""
        return self.train_batch_size // self.processes if self.split_batches else self.train_batch_size


@dataclass(frozen=True)
class OptimPlan:
    """The optimizer under its HF name, and the numbers it needs.

    ``name`` is the resolved algorithm (``adamw``, ``sgd``, ``adagrad``, ``rmsprop``, ``adafactor``, ``lion``);
    ``options`` holds what ``optim_args`` set, parsed.
    """

    name: str = "adamw"
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SchedulePlan:
    """The learning-rate schedule. ``warmup_steps`` is as the user wrote it: >=1 steps, <1 a ratio of the total."""

    name: str = "linear"
    warmup_steps: float = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossPlan:
    """What is minimised. ``router_aux_loss_coef`` None means the model config's own value.

    ``divides_by_none`` says that the mean over no token is 0 / 0 upstream, not 0.
    """

    kind: Literal["nll", "dft"] = "nll"
    label_smoothing_factor: float = 0.0
    neftune_noise_alpha: float | None = None
    router_aux_loss_coef: float | None = None
    divides_by_none: bool = False


@dataclass(frozen=True)
class PairLossPlan:
    """What preference training minimises. Fields mean what ``trl.DPOConfig`` says they mean.

    Attributes:
        losses: Each loss type with its weight, in the order they are added up.
        f_divergence_type: Which divergence keeps the policy near its reference.
        use_weighting: WPO's weights of pairs.
        disable_dropout: The adapter's dropout is off while training.
        precompute: The reference's log-probabilities are computed once, before training.
        precompute_batch_size: Pairs at once then; None is the batch size of the set.
        sync_steps: Steps after which the reference is moved towards the policy; None leaves it where it is.
        mixup_alpha: The policy's share then.
    """

    losses: tuple[tuple[str, float], ...] = (("sigmoid", 1.0),)
    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    router_aux_loss_coef: float | None = None
    disable_dropout: bool = True
    precompute: bool = False
    precompute_batch_size: int | None = None
    sync_steps: int | None = None
    mixup_alpha: float = 0.6

    @property
    def sorts(self) -> bool:
        """Whether a loss looks at all pairs of a micro-batch at once."""
        return any(name in ("aot", "aot_unpaired") for name, _ in self.losses)


@dataclass(frozen=True)
class ScoreLossPlan:
    """What a reward model minimises. Fields mean what ``trl.RewardConfig`` says they mean.

    Attributes:
        center_rewards_coefficient: Of the square of the sum of a pair's rewards; None leaves it out.
        disable_dropout: The adapter's dropout is off while training.
    """

    center_rewards_coefficient: float | None = None
    disable_dropout: bool = True
    router_aux_loss_coef: None = None


AnyLossPlan = LossPlan | PairLossPlan | ScoreLossPlan


@dataclass(frozen=True)
class PrecisionPlan:
    """Dtypes by their MLX names. ``autocast`` is torch's: Linear layers compute in it, the residual does not.

    ``dtype`` ``"auto"`` is the checkpoint's own, as ``from_pretrained(dtype="auto")`` has it.
    """

    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    autocast: Literal["bfloat16"] | None = None


@dataclass(frozen=True)
class ModelPlan:
    """Which weights to load and how.

    Attributes:
        scores: Puts a score of one value in the place of the vocabulary head.
        tensor_parallel: How many processes hold the weights together.
    """

    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    quantization_bits: int | None = None
    quantization_group_size: int = 64
    scores: bool = False
    precision: PrecisionPlan = field(default_factory=PrecisionPlan)
    tensor_parallel: int = 1


@dataclass(frozen=True)
class LoraPlan:
    """A LoraConfig as plain values. Names and meanings are ``peft.LoraConfig``'s."""

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora"] = True
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    target_parameters: tuple[str, ...] | None = None
    ensure_weight_tying: bool = False
    fan_in_fan_out: bool = False
    task_type: str | None = None
    auto_mapping: Mapping[str, str] | None = None
    revision: str | None = None


@dataclass(frozen=True)
class CheckpointingPlan:
    """Gradient (activation) checkpointing: recompute each block in the backward pass."""

    enabled: bool = False
    every_n_layers: int = 1


@dataclass(frozen=True)
class TrainPlan:
    """Everything a run needs, resolved. Printed by ``repr`` and shown as ``trainer.plan``."""

    batch: BatchPlan
    data: DataPlan
    model: ModelPlan
    optim: OptimPlan
    schedule: SchedulePlan
    loss: AnyLossPlan
    clip: GradClip
    lora: LoraPlan | None
    checkpointing: CheckpointingPlan
    finetune_last_n_layers: int | None = None
    clear_cache_steps: int | None = None
    use_cpu: bool = False
    full_eval_dtype: Literal["bfloat16"] | None = None
    nan_inf_filter: bool = True
    auto_find_batch_size: bool = False
