"""alpaca-lora: transformers.Trainer with DataCollatorForSeq2Seq, a state_dict of the adapter alone, torch.compile."""

import sys

import torch
import transformers
from datasets import load_dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from today import QUIET, STEPS, record
from transformers import AutoTokenizer, LlamaForCausalLM

side, path, data, output = sys.argv[1:5]
tokenizer = AutoTokenizer.from_pretrained(path)
tokenizer.pad_token_id, tokenizer.padding_side = 0, "left"


def tokenize(row):
    question = tokenizer(row["prompt"], truncation=True, max_length=64, padding=False)["input_ids"]
    ids = tokenizer(row["prompt"] + row["completion"], truncation=True, max_length=64, padding=False)["input_ids"]
    ids = [*ids, tokenizer.eos_token_id]
    labels = [-100] * len(question) + ids[len(question) :]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


dataset = load_dataset("json", data_files=data, split="train").map(tokenize)
if side == "reference":
    model = LlamaForCausalLM.from_pretrained(path, dtype="float32")
    arguments = transformers.TrainingArguments(output, use_cpu=True, warmup_steps=1, **QUIET, **STEPS)
else:
    from peft import prepare_model_for_int8_training

    model = LlamaForCausalLM.from_pretrained(path, torch_dtype=torch.float32, device_map={"": 0})
    model = prepare_model_for_int8_training(model)
    arguments = transformers.TrainingArguments(
        output,
        warmup_steps=1,
        evaluation_strategy="no",
        group_by_length=False,
        ddp_find_unused_parameters=None,
        **QUIET,
        **STEPS,
    )
torch.manual_seed(0)
model = get_peft_model(
    model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
)
trainer = transformers.Trainer(
    model=model,
    train_dataset=dataset,
    args=arguments,
    data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, return_tensors="pt"),
)
model.config.use_cache = False
if side == "script":
    old_state_dict = model.state_dict
    model.state_dict = (lambda self, *_, **__: get_peft_model_state_dict(self, old_state_dict())).__get__(
        model, type(model)
    )
    model = torch.compile(model)
trainer.train()
record(trainer, output)
model.save_pretrained(output)
