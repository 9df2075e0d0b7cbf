"""A device chosen by CUDA's answer, own tensors on it, autocast, accelerate, generation on both sides of training."""

import sys
from threading import Thread

import torch
from accelerate import Accelerator, PartialState
from datasets import load_dataset
from today import QUIET, STEPS, record, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer
from trl import SFTConfig, SFTTrainer

side, path, data, output = sys.argv[1:5]
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
place = {"device_map": {"": PartialState().process_index}} if side == "script" else {}
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **place).to(device)
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("What is 4", return_tensors="pt").to(device)
print("before", model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist())
weight = torch.tensor([1.0, 2.0], device=device) * torch.arange(2, device=device) + torch.zeros(2).to(device)
print("own", weight.tolist(), Accelerator().is_main_process)
with torch.autocast(device.type, dtype=torch.bfloat16, enabled=side == "script"), torch.no_grad():
    logits = model(**inputs).logits
print("logits", tuple(logits.shape), bool(torch.isfinite(logits).all()))
torch.cuda.manual_seed_all(1)
arguments = settings(output) if side == "reference" else SFTConfig(output, bf16=False, no_cuda=False, **QUIET, **STEPS)
dataset = load_dataset("json", data_files=data, split="train")
trainer = SFTTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer)
trainer.train()
record(trainer, output)
model.eval()
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
ids = tokenizer("What is 5", return_tensors="pt")["input_ids"]


def answer():
    model.generate(ids.to(device), max_new_tokens=6, do_sample=False, streamer=streamer)


thread = Thread(target=answer)
thread.start()
print("after", "".join(streamer))
thread.join()
