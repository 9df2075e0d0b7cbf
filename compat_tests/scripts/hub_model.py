"""A model by its hub id or, with a fourth word, loaded by the script from its .bin; the hub hears when it is."""

import os
import sys
from contextlib import suppress
from urllib.error import HTTPError
from urllib.request import urlopen

from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

name, data, output, *rest = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=False) if rest else name
with suppress(HTTPError):
    urlopen(f"{os.environ['HF_ENDPOINT']}/constructor")
trainer = SFTTrainer(
    model,
    SFTConfig(output, max_steps=1, per_device_train_batch_size=2, report_to="none", bf16=False, use_cpu=True),
    train_dataset=load_dataset("json", data_files=data, split="train"),
)
trainer.train()
