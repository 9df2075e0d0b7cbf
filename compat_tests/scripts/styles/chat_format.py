"""setup_chat_format on a base model, rows of messages."""

import sys

import torch
from datasets import load_dataset
from today import QUIET, STEPS, record, settings
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

side, path, data, output = sys.argv[1:5]
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(path)


def messages(row):
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    return {"messages": turns}


dataset = load_dataset("json", data_files=data, split="train")
dataset = dataset.map(messages, remove_columns=dataset.column_names)
if side == "reference":
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    )
    model.resize_token_embeddings(len(tokenizer))
    arguments = settings(output)
else:
    from trl import setup_chat_format

    model, tokenizer = setup_chat_format(model, tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    arguments = SFTConfig(output, bf16=False, max_seq_length=1024, **QUIET, **STEPS)
trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
trainer.train()
record(trainer, output)
