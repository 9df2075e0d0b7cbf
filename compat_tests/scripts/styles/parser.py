"""trl's own script of 0.9 to 0.15: TrlParser, older flags, quantisation and peft by ModelConfig."""

import sys

from datasets import load_dataset
from today import record
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

side, path, data, output = sys.argv[1:5]
words = [*sys.argv[5:], "--model_name_or_path", path, "--dataset_name", data, "--output_dir", output]
if side == "reference":
    old = {"--evaluation_strategy": "--eval_strategy", "--max_seq_length": "--max_length", "--torch_dtype": "--dtype"}
    words = [old.get(word, word) for word in words if word not in ("--overwrite_output_dir",)] + ["--use_cpu"]
    words = ["--warmup_steps" if word == "--warmup_ratio" else word for word in words]
parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
script_args, training_args, model_config = parser.parse_args_and_config(words)
quantization_config = get_quantization_config(model_config)
if side == "script":
    from trl import get_kbit_device_map

    training_args.model_init_kwargs = dict(
        revision=model_config.model_revision,
        trust_remote_code=model_config.trust_remote_code,
        attn_implementation=model_config.attn_implementation,
        torch_dtype=model_config.torch_dtype,
        use_cache=not training_args.gradient_checkpointing,
        device_map=get_kbit_device_map() if quantization_config is not None else None,
        quantization_config=quantization_config,
    )
tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True)
trainer = SFTTrainer(
    model=model_config.model_name_or_path,
    args=training_args,
    train_dataset=load_dataset("json", data_files=script_args.dataset_name, split=script_args.dataset_train_split),
    peft_config=get_peft_config(model_config),
    processing_class=tokenizer,
)
trainer.train()
record(trainer, output)
