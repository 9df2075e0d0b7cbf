"""What each field that ``trl.SFTConfig`` (1.16) adds does on MLX, and the defaults it overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .quantization import QUANTIZATION_CASES
from .verdicts import (
    DictRule,
    Rule,
    adapted,
    cases,
    enabled,
    given,
    honour,
    honoured,
    ignore,
    no_op,
    one_of,
    otherwise,
    refused,
)

# Fields of TrainingArguments that SFTConfig gives another default (trl 1.16, _BaseConfig and SFTConfig).
SFT_DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 2e-5,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "bf16": None,
}

_DTYPES = ("float32", "bfloat16", "float16", "auto", None)
_QUANTIZED = adapted(
    "becomes MLX affine quantisation with groups of 64; bitsandbytes rounds weights otherwise, so the curve differs",
    write='model_init_kwargs without "{key}"',
    changes_numbers=True,
)

TRUST_REMOTE_CODE = cases(
    "trust_remote_code",
    False,
    enabled(adapted("runs the tokenizer's code; a model that needs its own code is refused")),
    otherwise(honoured("off")),
)
ROUTER_AUX_LOSS_COEF = honour(
    "router_aux_loss_coef", None, "of mixture-of-experts models; None is the model config's own value"
)


CHAT_TEMPLATE_PATH = cases(
    "chat_template_path",
    None,
    given(
        "a .jinja or .j2 file",
        lambda value, values: str(value).endswith((".jinja", ".j2")),
        honoured("replaces the tokenizer's template"),
    ),
    otherwise(
        refused(
            "is a tokenizer, whose tokens would resize the embeddings",
            write='chat_template_path="template.jinja", holding only the template',
        )
    ),
)


def _bits(key: str) -> Rule:
    return cases(key, None, enabled(_QUANTIZED), otherwise(honoured("off")))


def _dtype(key: str) -> Rule:
    unknown = refused(
        f"is none of {', '.join(map(str, _DTYPES[:4]))}", write=f'model_init_kwargs={{"{key}": "float32"}}'
    )
    return cases(key, None, one_of(*_DTYPES, ruling=honoured("of the weights as loaded")), otherwise(unknown))


MODEL_INIT_KWARGS = DictRule(
    "model_init_kwargs",
    None,
    (
        given("with None", lambda value, values: value is None, no_op("not set")),
        otherwise(
            refused("is not passed on to a loader here", write='model_init_kwargs without "{key}"'),
        ),
    ),
    (
        _dtype("dtype"),
        _dtype("torch_dtype"),
        honour("revision", None, "the branch, tag or commit"),
        honour("token", None, "of the hub"),
        cases("quantization_config", None, *QUANTIZATION_CASES),
        _bits("load_in_4bit"),
        _bits("load_in_8bit"),
        ignore("attn_implementation", None, "picks a torch kernel; MLX's own attention computes the same"),
        ignore("device_map", None, "places weights on devices; memory is unified here"),
        ignore("low_cpu_mem_usage", None, "is not read by transformers 5 either"),
        ignore("max_memory", None, "places weights on devices; memory is unified here"),
        ignore("use_safetensors", None, "safetensors is what is read"),
        ignore("use_cache", None, "concerns generation; training keeps no cache"),
        ignore("use_kernels", None, "swaps in CUDA kernels with equal numbers"),
        TRUST_REMOTE_CODE,
    ),
)

SFT_CONFIG: tuple[Rule, ...] = (
    MODEL_INIT_KWARGS,
    TRUST_REMOTE_CODE,
    ROUTER_AUX_LOSS_COEF,
    CHAT_TEMPLATE_PATH,
    honour("dataset_text_field", "text", "the column of plain text"),
    DictRule(
        "dataset_kwargs",
        None,
        (otherwise(adapted("is without effect, as under TRL")),),
        (honour("skip_prepare_dataset", False, "the rows hold input_ids already"),),
    ),
    honour("dataset_num_proc", None, "processes that tokenize"),
    honour("eos_token", None, "must be in the vocabulary"),
    honour("pad_token", None, "must be in the vocabulary"),
    honour("max_length", 1024, "tokens kept of a row; how many rows were cut is logged"),
    cases(
        "truncation_mode",
        "keep_start",
        one_of("keep_start", "keep_end", ruling=honoured("which end of a long row is kept")),
        otherwise(refused("is none of keep_start, keep_end", write='truncation_mode="keep_start"')),
    ),
    honour("shuffle_dataset", False, "shuffles once before training"),
    honour("packing", False, "several rows in one sequence"),
    cases(
        "packing_strategy",
        "bfd",
        one_of("bfd", "bfd_split", "bfd-requeue", "wrapped", ruling=honoured("how rows are packed")),
        otherwise(refused("is none of bfd, bfd_split, wrapped", write='packing_strategy="bfd"')),
    ),
    honour("padding_free", False, "a batch is one long row, without attention between its rows"),
    honour("pad_to_multiple_of", "auto", '"auto" and None round lengths to buckets, which changes no number'),
    honour("eval_packing", None, "None follows packing"),
    honour("completion_only_loss", None, "None is True for prompt-completion rows"),
    honour("assistant_only_loss", False, "needs a template with generation markers"),
    cases(
        "loss_type",
        "nll",
        one_of("nll", "dft", ruling=honoured("the loss, summed in fp32")),
        one_of("chunked_nll", ruling=honoured("an alias of nll")),
        otherwise(refused("is none of nll, dft", write='loss_type="nll"')),
    ),
    ignore("activation_offloading", False, "has no place to offload to in unified memory"),
)
