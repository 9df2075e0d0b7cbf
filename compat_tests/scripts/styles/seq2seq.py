"""QLoRA's script: Seq2SeqTrainer with arguments of its own that redeclare older fields, tokens joined in a collator."""

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from today import QUIET, STEPS, record
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Seq2SeqTrainer

side, path, data, output = sys.argv[1:5]
words = [f"--output_dir={output}", *(f"--{name}={value}" for name, value in (QUIET | STEPS).items())]
if side == "reference":
    words += ["--warmup_steps=0.5", "--optim=adamw_torch", "--use_cpu", "--remove_unused_columns=False"]
    parser = transformers.HfArgumentParser(transformers.Seq2SeqTrainingArguments)
    (arguments,) = parser.parse_args_into_dataclasses(words)
    keyword = "processing_class"
else:

    @dataclass
    class TrainingArguments(transformers.Seq2SeqTrainingArguments):
        full_finetune: bool = field(default=False)
        optim: str = field(default="paged_adamw_32bit")
        remove_unused_columns: bool = field(default=False)
        warmup_ratio: float = field(default=0.5)
        group_by_length: bool = field(default=False)

    parser = transformers.HfArgumentParser(TrainingArguments)
    arguments, rest = parser.parse_args_into_dataclasses(
        [*words, "--evaluation_strategy", "no", "--mine", "3"], return_remaining_strings=True
    )
    assert rest == ["--mine", "3"] and not arguments.full_finetune and arguments.warmup_ratio == 0.5
    arguments.generation_config = transformers.GenerationConfig(max_new_tokens=8)
    keyword = "tokenizer"
tokenizer = AutoTokenizer.from_pretrained(path)
assert side == "reference" or tokenizer._pad_token is not None
model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
model.model_parallel = model.is_parallelizable = True
torch.manual_seed(0)
model = get_peft_model(
    model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
)
for name, module in model.named_modules():
    if isinstance(module, LoraLayer) or "norm" in name:
        module.to(torch.float32)


@dataclass
class Collator:
    tokenizer: Any

    def __call__(self, rows):
        sources = self.tokenizer([row["prompt"] for row in rows], add_special_tokens=False)["input_ids"]
        answers = self.tokenizer([row["completion"] for row in rows], add_special_tokens=False)["input_ids"]
        pairs = list(zip(sources, answers, strict=True))
        ids = [torch.tensor([*source, *answer]) for source, answer in pairs]
        labels = [torch.tensor([-100] * len(source) + answer) for source, answer in pairs]
        ids = pad_sequence(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        return {"input_ids": ids, "attention_mask": ids.ne(self.tokenizer.pad_token_id), "labels": labels}


trainer = Seq2SeqTrainer(
    model=model,
    args=arguments,
    train_dataset=load_dataset("json", data_files=data, split="train"),
    data_collator=Collator(tokenizer),
    **{keyword: tokenizer},
)
trainer.train()
record(trainer, output)
