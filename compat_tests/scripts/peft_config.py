"""Style 2: a model object with peft_config=, callbacks that read the model, metrics, early stopping."""

import sys

import numpy as np
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

model_path, data, output = sys.argv[1:4]

model = AutoModelForCausalLM.from_pretrained(model_path, torch_dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(model_path)
dataset = load_dataset("json", data_files=data, split="train").train_test_split(test_size=5, seed=0)


class Samples(TrainerCallback):
    """Prints what the model says after each evaluation."""

    def on_evaluate(self, args, state, control, model=None, processing_class=None, **kwargs):
        inputs = processing_class("What is 4 plus 4? ", return_tensors="pt")
        with torch.no_grad():
            answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        print("sample:", state.global_step, answer[0].tolist())


def first_choice(logits, labels):
    return logits.argmax(dim=-1)


def accuracy(prediction):
    predicted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    scored = labels != -100
    return {"accuracy": float(np.mean(predicted[scored] == labels[scored]))}


trainer = SFTTrainer(
    model,
    args=SFTConfig(
        output_dir=output,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=8,
        learning_rate=2e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        report_to="none",
        bf16=False,
        use_cpu=True,
    ),
    train_dataset=dataset["train"],
    eval_dataset=dataset["test"],
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    compute_metrics=accuracy,
    preprocess_logits_for_metrics=first_choice,
    callbacks=[Samples(), EarlyStoppingCallback(early_stopping_patience=3)],
)
trainer.train()
metrics = trainer.evaluate()
trainer.log_metrics("eval", metrics)
trainer.save_metrics("eval", metrics)
predicted = trainer.predict(trainer.eval_dataset)
print("predicted:", predicted.predictions.shape, predicted.metrics["test_accuracy"])
trainer.save_state()
trainer.save_model(output)
print("saved to", output)
