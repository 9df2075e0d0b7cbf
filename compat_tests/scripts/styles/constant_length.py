"""ConstantLengthDataset, prepare_model_for_int8_training and encode_plus, as stack-llama's script had them."""

import sys

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from today import QUIET, STEPS, record, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTTrainer

side, path, data, output = sys.argv[1:5]
model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(path)
dataset = load_dataset("json", data_files=data, split="train")


def text(row):
    return f"Question: {row['prompt']}\n\nAnswer: {row['completion']}"


if side == "reference":
    ids = [token for row in dataset for token in [*tokenizer(text(row))["input_ids"], tokenizer.eos_token_id]]
    rows = [{"input_ids": ids[at : at + 32]} for at in range(0, len(ids) - 31, 32)]
    dataset, arguments = Dataset.from_list(rows).to_iterable_dataset(), settings(output)
    for value in model.parameters():
        value.requires_grad = False
else:
    from peft import prepare_model_for_int8_training
    from trl.trainer import ConstantLengthDataset

    assert tokenizer.encode_plus("What is")["input_ids"] == tokenizer("What is")["input_ids"]
    dataset = ConstantLengthDataset(
        tokenizer, dataset, formatting_func=text, infinite=True, seq_length=32, chars_per_token=2.5, shuffle=False
    )
    arguments = TrainingArguments(output, **QUIET, **STEPS)
    model = prepare_model_for_int8_training(model)
torch.manual_seed(0)
adapter = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
trainer = SFTTrainer(get_peft_model(model, adapter), args=arguments, train_dataset=dataset)
trainer.train()
record(trainer, output)
