"""``TrainingArguments`` (transformers 5.23), second half: when to log, evaluate and save, and on how many processes."""

from __future__ import annotations

from .verdicts import (
    DictRule,
    Rule,
    adapt,
    alone,
    cases,
    given,
    honour,
    honoured,
    ignore,
    no_op,
    one_of,
    otherwise,
    refuse,
    refused,
    several,
)

_INTERVALS = ("no", "steps", "epoch")
_ONE_PROCESS = "concerns several processes; this is one"
_TORCH_DDP = "is a knob of torch's DistributedDataParallel; MLX adds the gradients up"
# transformers 5.23, training_args.trainer_log_levels.
_LOG_LEVELS = ("passive", "detail", "debug", "info", "warning", "error", "critical")
_LOADER = "is a speed knob of torch's DataLoader; batches are the same"


def _strategy(field: str, default: str, *names: str) -> Rule:
    known = one_of(*names, ruling=honoured("when to act"))
    unknown = refused(f"is none of {', '.join(names)}", write=f'{field}="{names[1]}"')
    return cases(field, default, known, otherwise(unknown))


def _shared(field: str, default: object, reason: str) -> Rule:
    """A field that means what it means upstream on several processes, and nothing on one."""
    return cases(field, default, several(honoured(reason)), otherwise(no_op(_ONE_PROCESS)))


def _asks_nothing(value: object) -> bool:
    return not any(value.values()) if isinstance(value, dict) else not value


def _names_known(value: object) -> bool:
    """Words of ``include_for_metrics``; None asks for nothing."""
    return value is None or (isinstance(value, (list, tuple)) and set(map(str, value)) <= {"inputs", "loss"})


LOGGING = (
    _strategy("logging_strategy", "steps", *_INTERVALS),
    honour("logging_steps", 500, "below 1: a share of the run"),
    honour("logging_first_step", False, "logs step 1"),
    honour("logging_nan_inf_filter", True, "what is logged for a NaN loss; the NaN itself is always reported"),
    cases(
        "include_num_input_tokens_seen",
        "no",
        one_of("no", "all", "non_padding", True, False, ruling=honoured("counts tokens and tokens per second")),
        otherwise(refused("is none of no, all, non_padding", write='include_num_input_tokens_seen="all"')),
    ),
    cases(
        "log_level",
        "passive",
        one_of(*_LOG_LEVELS, ruling=honoured("of transformers' loggers")),
        otherwise(refused(f"is none of {', '.join(_LOG_LEVELS)}", write='log_level="passive"')),
    ),
    _shared("log_level_replica", "warning", "of transformers' loggers on all processes but the first"),
    _shared("log_on_each_node", True, "whether the first process of each machine logs as the first of all"),
    honour("disable_tqdm", None, "transformers' own progress bar"),
    honour("report_to", "none", "transformers' own integrations"),
    honour("run_name", None, "read by the integrations"),
    honour("project", "huggingface", "read by the integrations"),
    honour("trackio_space_id", None, "read by the integrations"),
    honour("trackio_bucket_id", None, "read by the integrations"),
    honour("trackio_static_space_id", None, "read by the integrations"),
    adapt(
        "skip_memory_metrics", True, "reports MLX's memory under upstream's gpu keys; unified memory has no cpu keys"
    ),
)

EVALUATION = (
    _strategy("eval_strategy", "no", *_INTERVALS),
    honour("eval_steps", None, "below 1: a share of the run"),
    honour("eval_delay", 0, "steps or epochs before the first evaluation"),
    honour("per_device_eval_batch_size", 8, "rows in an evaluation batch"),
    honour("eval_on_start", False, "evaluates before step 1"),
    adapt("prediction_loss_only", False, "keeps no logits, so compute_metrics is not called"),
    honour("eval_do_concat_batches", True, "False hands compute_metrics lists of one array a batch"),
    ignore("eval_use_gather_object", False, _ONE_PROCESS),
    ignore("eval_accumulation_steps", None, "moves predictions off the GPU; memory is unified here"),
    cases(
        "include_for_metrics",
        [],
        given("inputs and loss", lambda value, values: _names_known(value), honoured("compute_metrics gets them, too")),
        otherwise(refused("names something else than inputs and loss", write='include_for_metrics=["inputs", "loss"]')),
    ),
    honour("batch_eval_metrics", False, "calls compute_metrics once a batch, with compute_result=True for the last"),
    cases(
        "label_names",
        None,
        given("['labels']", lambda value, values: value in (None, [], ["labels"]), honoured("the SFT column")),
        otherwise(refused("a causal model has one label column", write='label_names=["labels"]')),
    ),
    adapt("remove_unused_columns", True, "the collator takes the columns it needs and leaves the others"),
)

SAVING = (
    _strategy("save_strategy", "steps", *_INTERVALS, "best"),
    honour("save_steps", 500, "below 1: a share of the run"),
    honour("save_total_limit", None, "oldest checkpoints are deleted, the best one is kept"),
    honour("save_only_model", False, "leaves out the optimizer, scheduler and random state"),
    alone(
        "save_on_each_node",
        False,
        no_op(_ONE_PROCESS),
        "writes each checkpoint on every machine; here the first process hands on what a run resumes from",
        "save_on_each_node=False",
    ),
    refuse("enable_jit_checkpoint", False, "waits for a cluster's signal", write="enable_jit_checkpoint=False"),
    honour("load_best_model_at_end", False, "by metric_for_best_model"),
    honour("metric_for_best_model", None, 'None is "loss" when a best model is asked for'),
    honour("greater_is_better", None, "derived from the metric's name when None"),
    honour("ignore_data_skip", False, "on resuming, starts the epoch's data again"),
    honour("restore_callback_states_from_checkpoint", False, "on resuming"),
    honour("push_to_hub", False, "uploads through huggingface_hub"),
    honour("hub_token", None, "never printed"),
    honour("hub_private_repo", None, "of the repository that is created"),
    honour("hub_model_id", None, "the repository"),
    _strategy("hub_strategy", "every_save", "every_save", "end", "checkpoint", "all_checkpoints"),
    honour("hub_always_push", False, "does not wait for a push that is under way"),
    honour("hub_revision", None, "the branch"),
)

PROCESSES = (
    DictRule(
        "accelerator_config",
        None,
        (otherwise(refused("is not a key of AcceleratorConfig", write="accelerator_config=None")),),
        (
            alone(
                "use_seedable_sampler",
                True,
                honoured("which generator orders the rows"),
                "draws an order that the processes have to agree on",
                'accelerator_config={"use_seedable_sampler": True}',
            ),
            DictRule(
                "gradient_accumulation_kwargs",
                None,
                (otherwise(refused("has no effect in the Trainer", write="accelerator_config=None")),),
                (
                    honour("num_steps", 1, "sets gradient_accumulation_steps when that is 1"),
                    ignore("sync_each_batch", False, _ONE_PROCESS),
                    ignore("adjust_scheduler", True, "is not read by the Trainer's own loop"),
                    ignore("sync_with_dataloader", True, "is not read by the Trainer's own loop"),
                ),
            ),
            _shared("split_batches", False, "deals the rows of each batch to all processes"),
            alone(
                "dispatch_batches",
                None,
                no_op(_ONE_PROCESS),
                "lets one process read for all",
                'accelerator_config={"dispatch_batches": False}',
                (False,),
            ),
            alone(
                "even_batches",
                True,
                no_op(_ONE_PROCESS),
                "gives processes unlike numbers of batches, so that one would wait for ever",
                'accelerator_config={"even_batches": True}, or dataloader_drop_last=True',
            ),
            ignore("non_blocking", False, _LOADER),
            refuse(
                "use_configured_state",
                False,
                "takes over an Accelerator of torch that was made before",
                write='accelerator_config={"use_configured_state": False}',
            ),
        ),
    ),
    refuse(
        "parallelism_config",
        None,
        "splits a torch model; hf-mlx launch --tensor-parallel splits MLX's",
        write="parallelism_config=None",
    ),
    refuse("fsdp", None, "shards a torch model; memory is unified here", write="fsdp=None"),
    cases(
        "fsdp_config",
        None,
        given("only empty values, as older releases fill in", lambda value, values: _asks_nothing(value), no_op("off")),
        otherwise(refused("shards a torch model; memory is unified here", write="fsdp_config=None")),
    ),
    refuse("deepspeed", None, "is a torch engine", write="deepspeed=None, and gradient_checkpointing=True for memory"),
    refuse("debug", "", "turns on torch's overflow or TPU debugging", write='debug=""'),
    _shared("average_tokens_across_devices", True, "whether a step is divided by the tokens of all processes"),
    _shared("ddp_timeout", 1800, "seconds that a process waits for another before it ends"),
    *(
        ignore(field, default, _TORCH_DDP)
        for field, default in {
            "ddp_find_unused_parameters": None,
            "ddp_bucket_cap_mb": None,
            "ddp_broadcast_buffers": None,
            "ddp_static_graph": None,
            "ddp_backend": None,
            "local_rank": -1,
        }.items()
    ),
    ignore("dataloader_num_workers", 0, _LOADER),
    ignore("dataloader_pin_memory", True, _LOADER),
    ignore("dataloader_persistent_workers", False, _LOADER),
    ignore("dataloader_prefetch_factor", None, _LOADER),
    ignore("dataloader_multiprocessing_context", None, _LOADER),
    cases(
        "dataloader_in_order",
        True,
        given(
            "False with dataloader_num_workers > 0",
            lambda value, values: not value and (values.get("dataloader_num_workers") or 0) > 0,
            refused("lets the order of batches depend on timing", write="dataloader_in_order=True"),
        ),
        otherwise(no_op(_LOADER)),
    ),
)
