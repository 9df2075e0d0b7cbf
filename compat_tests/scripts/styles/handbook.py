"""A handbook's recipe: one YAML file for three dataclasses, the model by name with model_init_kwargs, metrics saved."""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from datasets import load_dataset
from peft import LoraConfig
from today import record, settings
from transformers import AutoTokenizer, set_seed
from trl import SFTTrainer

side, path, data, output = sys.argv[1:5]
tokenizer = AutoTokenizer.from_pretrained(path)
template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def text(row, tokenizer):
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    return {"text": tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template)}


dataset = load_dataset("json", data_files=data, split="train")
dataset = dataset.map(text, fn_kwargs={"tokenizer": tokenizer}, remove_columns=dataset.column_names)
if side == "reference":
    set_seed(42)
    adapter = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    arguments = settings(output, warmup_steps=0.5, max_length=48, model_init_kwargs={"dtype": "float32"})
    keywords = {"args": arguments, "processing_class": tokenizer, "peft_config": adapter}
else:
    from trl import ModelConfig, TrlParser, get_kbit_device_map, get_peft_config, get_quantization_config

    @dataclass
    class SFTConfig(transformers.TrainingArguments):
        max_seq_length: int | None = field(default=None)
        dataset_kwargs: dict | None = field(default=None)

    words = ["--config", str(Path(__file__).with_suffix(".yaml")), "--output_dir", output]
    parser = TrlParser((ModelConfig, SFTConfig))
    config, arguments = parser.parse_args_and_config([*words, "--model_name_or_path", path])
    set_seed(arguments.seed)
    logging.getLogger(__name__).warning("%s %s %s", arguments.local_rank, arguments.device, arguments.n_gpu)
    quantization_config = get_quantization_config(config)
    model_kwargs = {
        "revision": config.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "use_flash_attention_2": True,
        "attn_implementation": config.attn_implementation,
        "torch_dtype": config.torch_dtype,
        "use_cache": not arguments.gradient_checkpointing,
        "device_map": get_kbit_device_map() if quantization_config is not None else None,
        "quantization_config": quantization_config,
    }
    keywords = {
        "model_init_kwargs": model_kwargs,
        "args": arguments,
        "dataset_text_field": "text",
        "max_seq_length": arguments.max_seq_length,
        "tokenizer": tokenizer,
        "packing": False,
        "peft_config": get_peft_config(config),
        "dataset_kwargs": arguments.dataset_kwargs,
    }
trainer = SFTTrainer(model=path, train_dataset=dataset, **keywords)
result = trainer.train()
trainer.save_metrics("train", result.metrics | {"train_samples": len(dataset)})
trainer.save_state()
if side == "script":
    trainer.create_model_card(finetuned_from=path, tags=["handbook"], dataset_tags=["rows"])
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
record(trainer, output)
