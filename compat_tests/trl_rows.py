"""The rows that trl's own SFTTrainer trains on, and ours, from the same inputs."""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import Any

from hf_mlx.data.prepare import Prepared, prepare, prepare_eval
from hf_mlx.settings.plan import DataPlan

COLUMNS = ("input_ids", "labels", "seq_lengths")


def trl_trainer(
    dataset: Any, tokenizer: Any, *, eval_dataset: Any = None, formatting_func: Any = None, **settings: Any
):
    """An SFTTrainer around a tiny Llama, built but not run."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        args = SFTConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", max_steps=1, disable_tqdm=True, **settings
        )
        return SFTTrainer(
            LlamaForCausalLM(config),
            args,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            processing_class=copy.deepcopy(tokenizer),
            formatting_func=formatting_func,
        )


def our_rows(dataset: Any, tokenizer: Any, *, formatting_func: Any = None, **settings: Any) -> Prepared:
    """The same set through hf_mlx."""
    plan = DataPlan(**settings)
    return prepare(
        dataset,
        copy.deepcopy(tokenizer),
        plan,
        name="train",
        packing=plan.packing,
        formatting_func=formatting_func,
    )


def our_eval(dataset: Any, tokenizer: Any, like: Prepared, **settings: Any):
    """Evaluation sets through hf_mlx."""
    return prepare_eval(dataset, copy.deepcopy(tokenizer), DataPlan(**settings), like=like)


def compare_rows(ours: Any, theirs: Any) -> int:
    """Asserts that both hold the same rows and returns how many."""
    count = 0
    mine = iter(ours)
    for number, row in enumerate(theirs):
        found = next(mine, None)
        assert found is not None, f"row {number} is missing"
        for column in COLUMNS:
            assert (column in found) == (column in row), (number, column)
            if column in row:
                assert list(found[column]) == list(row[column]), (number, column)
        count += 1
    assert next(mine, None) is None, f"more than {count} rows"
    return count
