"""What each field of ``transformers.TrainingArguments`` (5.23) does on MLX, with its upstream default."""

from __future__ import annotations

from .optimizers import OPTIM_ARGS_CASES, OPTIM_CASES, judge_optim_args
from .schedules import OPTIONS_CASES, SCHEDULE_CASES, judge_options
from .training_logistics import EVALUATION, LOGGING, PROCESSES, SAVING
from .verdicts import (
    ComputedRule,
    DictRule,
    Rule,
    adapt,
    adapted,
    alone,
    cases,
    enabled,
    given,
    honour,
    honoured,
    ignore,
    one_of,
    otherwise,
    refuse,
    refused,
)

_COMPILED = "is moot: the step is compiled by MLX anyway"


def _checkpointing_kwargs(field: str, kind: type[DictRule] = DictRule) -> Rule:
    keys = (
        ignore("use_reentrant", None, "is a choice between two torch implementations with equal numbers"),
        ignore("preserve_rng_state", None, "is always so: random keys are functional in MLX"),
        honour("every_n_layers", 1, "checkpoints every n-th layer"),
        refuse("offload", False, "has no place to offload to in unified memory", write=f'{field}={{"offload": False}}'),
    )
    unknown = otherwise(refused("belongs to torch.utils.checkpoint", write=f"{field}=None"))
    return kind(field, None, (unknown,), keys)


class _MirrorRule(DictRule):
    """``gradient_checkpointing_kwargs`` repeats the activation_ field, which is the one that is judged."""

    def _decide(self, value, values):
        if value is not None and value == values.get("activation_checkpointing_kwargs"):
            return honoured("mirrors activation_checkpointing_kwargs")
        return super()._decide(value, values)


RUN = (
    honour("output_dir", None, 'where checkpoints and the adapter go; None is "trainer_output"'),
    honour("per_device_train_batch_size", 8, "rows in a micro-batch"),
    honour("num_train_epochs", 3.0, "fractions of an epoch included"),
    honour("max_steps", -1, "optimizer steps; overrides num_train_epochs when positive"),
    honour("gradient_accumulation_steps", 1, "micro-batches in a step, weighted by their tokens"),
    honour("seed", 42, "data order and LoRA start equal torch's"),
    honour("data_seed", None, "seed of the data order alone"),
    honour(
        "dataloader_drop_last", False, "drops a last micro-batch that is not full, in evaluation too; not of a stream"
    ),
    honour(
        "length_column_name",
        "length",
        "lengths for group_by_length, where the column exists and remove_unused_columns=False keeps it",
    ),
    cases(
        "train_sampling_strategy",
        "random",
        one_of("random", "sequential", "group_by_length", ruling=honoured("order of the rows")),
        one_of(
            "batch_rebalance",
            ruling=refused(
                "balances batches across processes by their length", write='train_sampling_strategy="random"'
            ),
        ),
        otherwise(refused("is none of random, sequential, group_by_length", write='train_sampling_strategy="random"')),
    ),
    honour("use_cpu", False, "True runs on the MLX CPU device"),
    honour("resume_from_checkpoint", None, "for the script; transformers never reads it"),
    honour("do_train", False, "for the script; transformers never reads it"),
    honour("do_eval", False, "for the script; transformers never reads it"),
    honour("do_predict", False, "for the script; transformers never reads it"),
    honour("use_cache", False, "written to the model's config only"),
    adapt("full_determinism", False, "seeds every generator; MLX has no nondeterministic kernels to switch off"),
    alone(
        "auto_find_batch_size",
        False,
        adapted(
            "computes a micro-batch that does not fit in pieces of its rows: batch, order, steps and curve stay as "
            "written; upstream halves the batch and starts again"
        ),
        "has one process compute a step again that others have done",
        "auto_find_batch_size=False and a smaller per_device_train_batch_size",
    ),
)

OPTIMIZER = (
    honour("learning_rate", 5e-5, "peak learning rate"),
    cases("lr_scheduler_type", "linear", *SCHEDULE_CASES),
    ComputedRule("lr_scheduler_kwargs", None, OPTIONS_CASES, judge_options),
    honour("warmup_steps", 0, "at least 1: steps; below 1: a share of the run, rounded up"),
    cases("optim", "adamw_torch_fused", *OPTIM_CASES),
    ComputedRule("optim_args", None, OPTIM_ARGS_CASES, judge_optim_args),
    honour("weight_decay", 0.0, "of every trainable but biases and norms, as upstream"),
    honour("adam_beta1", 0.9, "of AdamW and Lion"),
    honour("adam_beta2", 0.999, "of AdamW and Lion"),
    honour("adam_epsilon", 1e-8, "of AdamW"),
    refuse(
        "optim_target_modules",
        None,
        "belongs to GaLore, APOLLO and LOMO, which are not implemented",
        write="optim_target_modules=None",
    ),
    honour("max_grad_norm", 1.0, "clips by the global L2 norm; 0 or None is off, and grad_norm is logged either way"),
    cases(
        "label_smoothing_factor",
        0.0,
        given(
            'with loss_type="dft"',
            lambda value, values: values.get("loss_type") == "dft",
            refused(
                "is dropped by TRL when loss_type is dft, so no smoothing would happen",
                write='label_smoothing_factor=0.0, or loss_type="nll"',
            ),
        ),
        otherwise(honoured("transformers' LabelSmoother")),
    ),
    honour("neftune_noise_alpha", None, "uniform noise on the embedding output while training"),
)

PRECISION = (
    cases(
        "bf16",
        False,
        enabled(adapted("is torch's autocast, dtype by dtype; frozen Linear weights are stored in bf16")),
        otherwise(honoured("off")),
    ),
    refuse(
        "fp16",
        False,
        "needs a loss scaler that skips overflowing steps, which MLX lacks",
        write="fp16=False, bf16=True",
    ),
    adapt(
        "bf16_full_eval",
        False,
        "evaluate() outside train() runs on a bfloat16 copy; upstream casts the model itself, here its weights stay",
    ),
    refuse(
        "fp16_full_eval",
        False,
        "would evaluate bf16-trained weights in a narrower range",
        write="fp16_full_eval=False, bf16_full_eval=True",
    ),
    ignore("tf32", None, "is an NVIDIA matmul mode; fp32 is fp32 here"),
    honour("activation_checkpointing", None, "recomputes each block in the backward pass; same numbers"),
    honour("gradient_checkpointing", None, "deprecated mirror of activation_checkpointing"),
    _checkpointing_kwargs("activation_checkpointing_kwargs"),
    _checkpointing_kwargs("gradient_checkpointing_kwargs", _MirrorRule),
    ignore("torch_compile", False, _COMPILED),
    ignore("torch_compile_backend", None, _COMPILED),
    ignore("torch_compile_mode", None, _COMPILED),
    ignore("use_liger_kernel", False, "swaps in CUDA kernels with equal numbers"),
    ignore("liger_kernel_config", None, "swaps in CUDA kernels with equal numbers"),
    adapt("torch_empty_cache_steps", None, "calls mx.clear_cache() at those steps"),
)

TRAINING_ARGUMENTS: tuple[Rule, ...] = (
    *RUN,
    *OPTIMIZER,
    *PRECISION,
    *LOGGING,
    *EVALUATION,
    *SAVING,
    *PROCESSES,
)
