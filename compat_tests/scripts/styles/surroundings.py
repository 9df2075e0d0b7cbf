"""A hosted notebook's surroundings: its secrets, a tracker, CUDA's packages, a login, a generator on the GPU."""

import os
import sys

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from today import QUIET, STEPS, record, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTTrainer

side, path, data, output = sys.argv[1:5]
dataset = load_dataset("json", data_files=data, split="train").map(lambda row: {"text": row["prompt"]})
dataset = dataset.select_columns("text")
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
torch.manual_seed(0)
model = get_peft_model(model, adapter)
if side == "reference":
    trainer = SFTTrainer(model, settings(output, max_length=32), train_dataset=dataset, processing_class=tokenizer)
else:
    import deepspeed
    import flash_attn
    import wandb
    import xformers
    from google.colab import drive, userdata
    from huggingface_hub import login, notebook_login
    from IPython.display import display
    from kaggle_secrets import UserSecretsClient
    from pynvml import nvmlDeviceGetHandleByIndex, nvmlDeviceGetMemoryInfo, nvmlInit

    os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN")
    drive.mount("/content/drive")
    login()
    notebook_login()
    wandb.login(key=UserSecretsClient().get_secret("wandb_key"))
    run = wandb.init(project="rows", config={"rate": 1e-3})
    nvmlInit()
    display(nvmlDeviceGetMemoryInfo(nvmlDeviceGetHandleByIndex(0)).used >= 0)
    try:
        deepspeed.zero.Init()
    except ValueError as error:
        print("refused", "deepspeed.zero.Init" in str(error), flash_attn.__name__, xformers.__name__)
    noise = torch.randn(2, generator=torch.Generator(device="cuda").manual_seed(3), device="cuda")
    kept = torch.randn(2, generator=torch.Generator().manual_seed(3))
    print("noise", bool((noise.cpu() == kept).all()), torch.cuda.FloatTensor([1.0]).tolist())
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.nvtx.range("step"):
        print("type", torch.ones(1).type("torch.cuda.HalfTensor").dtype)
    model.config._attn_implementation = "flash_attention_2"
    model.config.pretraining_tp = 1
    trainer = SFTTrainer(
        model=model,
        args=TrainingArguments(output, **QUIET | {"report_to": ["wandb", "tensorboard"]}, **STEPS),
        train_dataset=dataset,
        dataset_text_field="text",
        peft_config=adapter,
        max_seq_length=32,
        tokenizer=tokenizer,
    )
trainer.train()
record(trainer, output)
if side == "script":
    trainer.model.print_trainable_parameters()
    wandb.log({"done": 1})
    wandb.finish()
    print("run", repr(run.name), len(list(run)), wandb.config.rate)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    messages = [{"role": "user", "content": "What is 4"}]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt").to("cuda")
    first = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    again = model.generate(**ids, max_new_tokens=4, do_sample=False)
    print("chat", first[0][ids.shape[1] :].tolist() == again[0][ids["input_ids"].shape[-1] :].tolist())
    print("ids", tokenizer.apply_chat_template(messages)[:2] == tokenizer("What is 4")["input_ids"][:2])
