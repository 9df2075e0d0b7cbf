"""Every value that is refused, on live objects: the error names field and value, and its corrected line works."""

import ast

import peft
import pytest
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from transformers import BitsAndBytesConfig, GPTQConfig
from transformers.training_args import OptimizerNames
from trl import DPOConfig, SFTConfig

from hf_mlx.errors import SettingError
from hf_mlx.settings.ledger import explain
from hf_mlx.settings.optimizers import ALGORITHMS
from hf_mlx.settings.resolve import resolve_plan

pytestmark = pytest.mark.filterwarnings("ignore")

OTHER_OPTIMIZERS = [name.value for name in OptimizerNames if name.value not in ALGORITHMS]

# field, value, other fields it takes to be refused
ARGUMENTS = [
    ("fp16", True, {}),
    ("fp16_full_eval", True, {}),
    ("train_sampling_strategy", "batch_rebalance", {}),
    ("optim_target_modules", "all-linear", {}),
    ("optim_target_modules", ["q_proj"], {}),
    *(("optim", name, {}) for name in OTHER_OPTIMIZERS),
    ("optim", "muon", {}),
    ("optim_args", "beta1=0.5", {}),
    ("optim_args", "rank=128", {"optim": "adamw_8bit"}),
    ("optim_args", "momentum=0.9", {"optim": "adagrad"}),
    ("optim_args", "weight_decay=0.1", {"optim": "sgd"}),
    ("lr_scheduler_kwargs", {"num_cycles": 2}, {}),
    ("lr_scheduler_kwargs", {"power": 2}, {"lr_scheduler_type": "cosine"}),
    ("lr_scheduler_kwargs", {"last_epoch": 3}, {"lr_scheduler_type": "cosine"}),
    ("label_smoothing_factor", 0.1, {"loss_type": "dft"}),
    ("activation_checkpointing_kwargs", {"offload": True}, {}),
    ("activation_checkpointing_kwargs", {"context_fn": print}, {}),
    ("gradient_checkpointing_kwargs", {"determinism_check": "none"}, {}),
    ("include_for_metrics", ["logits"], {}),
    ("label_names", ["start_positions", "end_positions"], {}),
    ("enable_jit_checkpoint", True, {}),
    ("debug", "underflow_overflow", {}),
    ("accelerator_config", {"use_configured_state": True}, {}),
    ("accelerator_config", {"gradient_accumulation_kwargs": {"plugin": 1}}, {}),
    ("parallelism_config", {"tp_size": 2}, {}),
    ("fsdp", "full_shard", {}),
    ("fsdp", True, {}),
    ("fsdp_config", {"min_num_params": 1000}, {}),
    ("deepspeed", "ds_config.json", {}),
    ("deepspeed", {"zero_optimization": {"stage": 2}}, {}),
    ("dataloader_in_order", False, {"dataloader_num_workers": 2}),
    ("save_strategy", "sometimes", {}),
    ("model_init_kwargs", {"subfolder": "x"}, {}),
    ("model_init_kwargs", {"gguf_file": "x.gguf"}, {}),
    ("model_init_kwargs", {"rope_scaling": {"factor": 2}}, {}),
    ("model_init_kwargs", {"dtype": "int8"}, {}),
    ("model_init_kwargs", {"quantization_config": GPTQConfig(bits=4)}, {}),
    (
        "model_init_kwargs",
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["x"])},
        {},
    ),
    ("chat_template_path", "HuggingFaceTB/SmolLM2-135M-Instruct", {}),
    ("packing_strategy", "ffd", {}),
    ("truncation_mode", "keep_middle", {}),
    ("loss_type", "sft", {}),
]
LORA = [
    *(("init_lora_weights", name) for name in ("pissa_niter_4", "pissa_niter_16", "corda", "loftq", "eva", "lora_ga")),
    *(("init_lora_weights", name) for name in ("mica", "orthogonal")),
    ("inference_mode", True),
    ("task_type", "SEQ_CLS"),
    ("task_type", "TOKEN_CLS"),
    ("bias", "some"),
    ("alora_invocation_tokens", [1, 2]),
    ("use_qalora", True),
    ("layer_replication", [(0, 2), (1, 3)]),
    ("megatron_config", {"a": 1}),
    ("loftq_config", {"loftq_bits": 4}),
    *((f"{name}_config", {"a": 1}) for name in ("eva", "corda", "lora_ga", "velora", "monteclora", "arrow", "kasa")),
    ("use_bdlora", {"a": 1}),
]


def test_the_tables_hold_at_least_sixty_values():
    assert len(ARGUMENTS) >= 60
    assert len(LORA) >= 25


@pytest.fixture(scope="module")
def make_config(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("run"))
    return lambda: SFTConfig(output_dir=folder, bf16=False)


def refusal(args, peft_config=None):
    with pytest.raises(SettingError) as caught:
        resolve_plan(args, peft_config)
    return caught.value


def apply_remedy(settings, remedy):
    """Write the corrected line, where it is an assignment of literals to fields; False where it is prose."""
    try:
        call = ast.parse(f"set({remedy.removeprefix('write ').split(', or ')[0]})", mode="eval").body
        fields = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        return False
    for name, value in fields.items():
        assert hasattr(settings, name), name
        setattr(settings, name, value)
    return bool(fields)


@pytest.mark.parametrize(("field", "value", "others"), ARGUMENTS)
def test_an_argument_is_refused_by_name_value_and_remedy(make_config, field, value, others):
    args = make_config()
    for name, item in (others | {field: value}).items():
        setattr(args, name, item)
    error = refusal(args)
    assert f"{field}=" in error.received
    assert len([entry for entry in explain(args).refused if entry.field == field]) == 1
    if isinstance(value, (str, bool)):
        assert f"{field}={value!r}" in error.received
    assert error.required.startswith(f"SFTConfig.{field} ")
    assert "write " in error.remedy
    if apply_remedy(args, error.remedy):
        assert field not in {entry.field for entry in explain(args).refused}


@pytest.mark.parametrize(("field", "value"), LORA)
def test_a_lora_field_is_refused_by_name_value_and_remedy(field, value):
    peft_config = LoraConfig()
    setattr(peft_config, field, value)
    error = refusal(None, peft_config)
    assert f"{field}=" in error.received
    assert error.required.startswith(f"LoraConfig.{field} ")
    assert apply_remedy(peft_config, error.remedy)
    resolve_plan(None, peft_config)


@pytest.mark.parametrize(
    "peft_config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        LoHaConfig(),
        IA3Config(),
        AdaLoraConfig(total_step=10),
    ],
    ids=lambda config: type(config).__name__,
)
def test_an_adapter_that_is_not_lora_is_refused_once(peft_config):
    error = refusal(None, peft_config)
    assert f"peft_type='{peft_config.peft_type.value}'" == error.received
    assert "LoraConfig(" in error.remedy


@pytest.mark.parametrize(
    ("field", "config"),
    [
        ("kasa_config", peft.KasaConfig()),
        ("monteclora_config", peft.MontecloraConfig()),
        ("arrow_config", peft.ArrowConfig()),
        ("use_bdlora", peft.BdLoraConfig()),
        ("eva_config", peft.EvaConfig()),
    ],
)
def test_a_variant_is_refused_with_its_config_at_defaults_too(field, config):
    assert f"{field}=" in refusal(None, LoraConfig(**{field: config})).received


def test_the_config_of_another_trl_trainer_is_refused_where_it_asks_for_more(tmp_path):
    error = refusal(DPOConfig(output_dir=str(tmp_path), bf16=False, beta=0.5))
    assert "beta=0.5" in error.received
