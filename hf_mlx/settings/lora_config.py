"""What each field of ``peft.LoraConfig`` (0.21.2) does on MLX, with its upstream default."""

from __future__ import annotations

from .verdicts import SCORES, Rule, cases, given, honour, honoured, ignore, one_of, otherwise, refuse, refused

_NOT_LORA = 'peft_config=LoraConfig(r=8, target_modules="all-linear")'


def _variant(field: str, default: object, what: str) -> Rule:
    return refuse(field, default, f"turns on {what}, which is not implemented", write=f"{field}={default!r}")


IDENTITY = (
    cases(
        "peft_type",
        None,
        one_of("LORA", ruling=honoured("LoRA")),
        otherwise(refused("is not LoRA, the one adapter that is implemented", write=_NOT_LORA)),
    ),
    cases(
        "task_type",
        None,
        given(
            "CAUSAL_LM, of a language model",
            lambda value, values: value == "CAUSAL_LM" and not values.get(SCORES),
            honoured("written to the adapter's config"),
        ),
        given(
            "SEQ_CLS, of a reward model",
            lambda value, values: value == "SEQ_CLS" and bool(values.get(SCORES)),
            honoured("the score is trained in full and written beside the adapter"),
        ),
        given(
            "any other value, of a reward model",
            lambda value, values: bool(values.get(SCORES)),
            refused("is not what a reward model's adapter is for (PEFT raises too)", write='task_type="SEQ_CLS"'),
        ),
        otherwise(refused("is not language modelling", write='task_type="CAUSAL_LM"')),
    ),
    honour("auto_mapping", None, "written to the adapter's config"),
    ignore("peft_version", None, "is a record of what wrote the config"),
    honour("base_model_name_or_path", None, "the name of the model that is trained takes its place, as in PEFT"),
    honour("revision", None, "written to the adapter's config"),
    refuse("inference_mode", False, "freezes the adapter, so nothing would train", write="inference_mode=False"),
)

TARGETS = (
    honour("r", 8, "rank"),
    honour("lora_alpha", 8, "the update is scaled by lora_alpha / r"),
    honour("lora_dropout", 0.0, "on the adapter's input; masks differ from torch's, their distribution does not"),
    honour("target_modules", None, 'None: the architecture\'s own; "all-linear", names, suffixes or a regex'),
    honour("exclude_modules", None, "names, suffixes or a regex"),
    honour("rank_pattern", {}, "the first pattern that matches"),
    honour("alpha_pattern", {}, "the first pattern that matches"),
    honour("use_rslora", False, "scales by lora_alpha / sqrt(r)"),
    honour("layers_to_transform", None, "indexes of the layers"),
    honour("layers_pattern", None, "the name of the layer list"),
    cases(
        "init_lora_weights",
        True,
        one_of(True, False, "gaussian", ruling=honoured("the numbers of PEFT where torch is installed")),
        one_of(
            "pissa", "olora", ruling=honoured("taken out of the base's weights, as PEFT does on training and loading")
        ),
        otherwise(
            refused(
                "derives the start from data or by chance, which PEFT does not find again when it loads the adapter",
                write='init_lora_weights="pissa", or True',
            )
        ),
    ),
)

BEYOND_LINEAR = (
    honour("modules_to_save", None, "trained in full and written beside the adapter"),
    honour(
        "trainable_token_indices", None, "rows of embedding and head, trained in full and written beside the adapter"
    ),
    honour("use_dora", False, "magnitudes are trained too"),
    honour("lora_bias", False, "a bias on B"),
    cases(
        "bias",
        "none",
        one_of("none", "all", "lora_only", ruling=honoured("which biases of the base are trained")),
        otherwise(refused("is none of none, all, lora_only", write='bias="none"')),
    ),
    honour("fan_in_fan_out", False, "of Conv1D weights, as GPT-2 has"),
    honour("target_parameters", None, "stacked experts, routers and weights of Linear layers, by name"),
    honour("ensure_weight_tying", False, "a tied embedding that is trained in full or by rows stays the head, too"),
)

VARIANTS = (
    ignore("runtime_config", {}, "concerns GPU offloading; memory is unified here"),
    ignore("megatron_core", "megatron.core", "names a module that megatron_config would use"),
    ignore("qalora_group_size", 16, "is read with use_qalora only"),
    _variant("megatron_config", None, "Megatron's parallel layers"),
    _variant("loftq_config", {}, "LoftQ"),
    _variant("eva_config", None, "EVA"),
    _variant("corda_config", None, "CorDA"),
    _variant("lora_ga_config", None, "LoRA-GA"),
    _variant("velora_config", None, "VeLoRA"),
    _variant("alora_invocation_tokens", None, "activated LoRA"),
    _variant("use_qalora", False, "QALoRA"),
    _variant("monteclora_config", None, "MonteCLoRA"),
    _variant("layer_replication", None, "layers that share weights"),
    _variant("use_bdlora", None, "block-diagonal LoRA"),
    _variant("arrow_config", None, "Arrow routing"),
    _variant("kasa_config", None, "KaSA"),
)

LORA_CONFIG: tuple[Rule, ...] = (*IDENTITY, *TARGETS, *BEYOND_LINEAR, *VARIANTS)
