"""A QLoRA notebook: bitsandbytes, flash attention, CUDA's memory, generation before and after."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from today import QUIET, STEPS, record, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainingArguments, pipeline
from trl import SFTTrainer

side, path, data, output = sys.argv[1:5]
NAMES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def text(row):
    return f"{row['prompt']}{row['completion']}"


tokenizer = AutoTokenizer.from_pretrained(path)
dataset = load_dataset("json", data_files=data, split="train")
if side == "reference":
    import mlx.core as mx

    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    # What bitsandbytes' codebook is on CUDA, MLX's is here: the reference trains over the same rounded weights.
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rounded = mx.dequantize(
                *mx.quantize(mx.array(module.weight.detach().numpy()), group_size=64, bits=4), 64, 4
            )
            module.weight.data = torch.tensor(rounded.tolist())
    names, arguments, keywords = NAMES, settings(output, max_length=64), {"processing_class": tokenizer}
    # TRL of today refuses formatting_func on rows that have a prompt.
    dataset = dataset.map(lambda row: {"text": text(row)}, remove_columns=dataset.column_names)
else:
    import bitsandbytes as bnb

    if torch.cuda.get_device_capability()[0] >= 8:
        kernel, dtype = "flash_attention_2", torch.bfloat16
    else:
        kernel, dtype = "eager", torch.float16
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, device_map={"": 0}, attn_implementation=kernel, torch_dtype=torch.float32
    )
    assert (
        model.is_loaded_in_4bit and model.config.quantization_config.load_in_4bit and list(model.hf_device_map) == [""]
    )
    model.config.use_cache = False
    inputs = tokenizer("What is 3", return_tensors="pt").to("cuda")
    print("before", tuple(model.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape))
    names = sorted({name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)})
    names.remove("lm_head")
    assert names == NAMES
    model.gradient_checkpointing_enable()
    model = prepare_model_for_kbit_training(model)
    arguments = TrainingArguments(output, optim="paged_adamw_32bit", tf32=True, fp16=False, **QUIET, **STEPS)
    keywords = {"tokenizer": tokenizer, "max_seq_length": 64, "packing": False, "formatting_func": text}
torch.manual_seed(0)
model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, **keywords)
trainer.train()
record(trainer, output)
if side == "script":
    trainer.tokenizer.save_pretrained(output)
    gpu = torch.cuda.get_device_properties(0)
    used = round(torch.cuda.max_memory_reserved() / 1024**3, 6)
    print("memory", 0 < used < gpu.total_memory / 1024**3, gpu.major)
    torch.cuda.empty_cache()
    print("after", tuple(model.generate(**inputs, max_new_tokens=4, min_new_tokens=4).shape))
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer, max_new_tokens=3)("What is")
    print("pipeline", answer[0]["generated_text"].startswith("What is"))
    merged = model.merge_and_unload()
    merged.save_pretrained(f"{output}/merged")
    again = AutoModelForCausalLM.from_pretrained(f"{output}/merged", device_map="auto").to("cuda")
    print("merged", next(again.parameters()).dtype)
