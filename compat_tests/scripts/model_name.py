"""Style 3: a model by its name, HfArgumentParser in front, everything through the trainer."""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig
from transformers import HfArgumentParser, set_seed
from trl import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer


@dataclass
class ScriptArguments:
    """What this script adds to SFTConfig."""

    model_name: str = field(metadata={"help": "hub id or folder"})
    data: str = field(metadata={"help": "a .jsonl file"})
    lora_r: int = field(default=8, metadata={"help": "rank"})


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, SFTConfig))
    script_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    dataset = load_dataset("json", data_files=script_args.data, split="train")

    trainer = SFTTrainer(
        model=script_args.model_name,
        args=training_args,
        train_dataset=dataset,
        eval_dataset={"first": dataset.select(range(4)), "second": dataset.select(range(4, 9))},
        peft_config=LoraConfig(r=script_args.lora_r, lora_alpha=16, task_type="CAUSAL_LM"),
    )
    if trainer.accelerator.is_main_process:
        trainer.model.print_trainable_parameters()
    result = trainer.train()
    metrics = result.metrics
    metrics["train_samples"] = len(dataset)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(training_args.output_dir)
    trainer.create_model_card(model_name="tiny", dataset_name="rows", tags=["test"])
    trainer.accelerator.print("done", trainer.state.global_step)
