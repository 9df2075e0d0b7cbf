"""Packages that are not here, under ``hf-mlx run``: scripts may import them, libraries do not see them."""

import pytest
from forked_scripts import HF_MLX_RUN, run_forked
from test_dropin_scripts import HF_MLX, _run

SEEN = """
import apex, bitsandbytes, deepspeed, flash_attn, mlflow, wandb, xformers
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from flash_attn.bert_padding import unpad_input
from liger_kernel.transformers import AutoLigerKernelForCausalLM, apply_liger_kernel_to_llama
from xformers.ops import memory_efficient_attention
import importlib.util, sys
import torch, transformers, trl
from accelerate.utils import is_deepspeed_available, is_wandb_available, is_bnb_available
from peft.import_utils import is_bnb_available as peft_has_bnb
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import is_bitsandbytes_available, is_flash_attn_2_available, is_triton_available
from trl import SFTTrainer

for name in ("wandb", "deepspeed", "flash_attn", "bitsandbytes"):
    assert name in sys.modules and importlib.util.find_spec(name) is None
assert not any((is_deepspeed_available(), is_wandb_available(), is_bnb_available(), peft_has_bnb()))
assert not any((is_bitsandbytes_available(), is_flash_attn_2_available(), is_triton_available()))
assert get_available_reporting_integrations() == []
assert not torch.utils._triton.has_triton_package()
assert torch.nn.functional.softmax(torch.compile(torch.nn.Linear(2, 2))(torch.ones(1, 2)), -1).sum() > 0.99
assert TrainingArguments("unused", report_to="all").report_to == []
assert TrainingArguments("unused", report_to=["wandb", "mlflow"]).report_to == []
assert AutoLigerKernelForCausalLM is AutoModelForCausalLM and apply_liger_kernel_to_llama() is None
init, initialize = deepspeed.zero.Init, deepspeed.initialize
for refused in (unpad_input, memory_efficient_attention, init, initialize, apex.amp.initialize):
    try:
        refused(torch.ones(1))
    except ValueError as error:
        print("refused", str(error).splitlines()[0])
run = wandb.init(project="p", config={"rate": 0.5})
wandb.config.update({"more": 1})
wandb.watch(None), wandb.log({"loss": 1.0}), run.log({}), mlflow.start_run()
with wandb.init() as inner:
    inner.summary["x"] = 1
print("tracked", wandb.config.rate, wandb.config.more, repr(run.name), isinstance(run, object))
# trl was imported before it.
assert Trainer.__module__.startswith("hf_mlx.") and transformers.Trainer is Trainer
assert SFTTrainer.__module__.startswith("hf_mlx.")
try:
    import triton
except ImportError as error:
    print("triton", str(error).splitlines()[0])
try:
    import unsloth
except ImportError as error:
    print("unsloth", "AutoModelForCausalLM.from_pretrained" in str(error), "peft_config=LoraConfig" in str(error))
"""


def test_scripts_import_them_and_libraries_do_not_see_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SEEN)
    done = run_forked([*HF_MLX_RUN, script])
    printed = done.stdout.splitlines()
    refused = [line for line in printed if line.startswith("refused received: ")]
    assert len(refused) == 5
    assert printed[5:] == ["tracked 0.5 1 '' True", "triton received: import triton", "unsloth True True"]
    said = [line for line in done.stderr.splitlines() if line.startswith("hf-mlx run: ")]
    for name in ("wandb is not installed", "mlflow is not installed", "deepspeed needs CUDA", "flash_attn needs CUDA"):
        assert sum(f"hf-mlx run: {name}" in line for line in said) == 1


@pytest.mark.parametrize("name", ["wandb", "flash_attn", "google.colab", "bitsandbytes"])
def test_strict_offers_none_of_them(name, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import {name}\n")
    done = _run([*HF_MLX, "run", "--strict", script], status=1)
    assert "ModuleNotFoundError" in done.stderr


def test_unsloth_is_refused_by_name(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from unsloth import FastLanguageModel\n")
    done = _run([*HF_MLX, "run", script], status=1)
    assert "received: import unsloth" in done.stderr and "peft_config=LoraConfig" in done.stderr
