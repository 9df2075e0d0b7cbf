"""A PeftModel whose adapter is not called "default": saved where PEFT saves it, resumed, loaded again, verified."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from dropin_models import ROWS, losses, make_model, make_tokenizer, write_model
from peft import PeftModel, get_peft_model
from sampling import sampled
from test_objects_changed import LOSS, _arguments, _lora
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from hf_mlx import MLXSFTTrainer, verify_adapter
from hf_mlx.errors import AdapterError

pytestmark = pytest.mark.usefixtures("uncompiled")

NAMES = ("mine", "q_proj", "lora_A")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"))


def _make(trainer: type, base: Path, name: str, folder: Path, *, second: bool = False, **changes: Any) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, _lora(init_lora_weights=False), adapter_name="default" if second else name)
    if second:
        model.add_adapter(name, _lora(init_lora_weights=False, r=2))
        model.set_adapter(name)
    settings = dict(
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        # With an adapter called "default" beside it transformers 5.23 loads that one's file, and stops.
        load_best_model_at_end=not second,
        learning_rate=0.5, lr_scheduler_type="constant",
    )  # fmt: skip
    return trainer(
        model,
        _arguments(folder, **settings | changes),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:3]),
        processing_class=make_tokenizer(),
    )


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("adapter_*")}


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("name", sampled(NAMES, *NAMES[1:]))
def test_a_named_adapter_goes_the_whole_way(name, second, base, tmp_path):
    theirs = _make(SFTTrainer, base, name, tmp_path / "trl", second=second)
    theirs.train()
    theirs.save_model(str(tmp_path / "saved by trl"))
    ours = _make(MLXSFTTrainer, base, name, tmp_path / "mlx", second=second)
    ours.train()
    expected, found = losses(theirs.state.log_history), losses(ours.state.log_history)
    assert len(found) == 3
    assert found == pytest.approx(expected, rel=1e-4)
    assert Path(ours.state.best_model_checkpoint or "").name == Path(theirs.state.best_model_checkpoint or "").name
    loaded = tmp_path / "mlx" / "checkpoint-3" if second else Path(ours.state.best_model_checkpoint)
    ours.save_model(str(tmp_path / "saved"))
    assert _files(tmp_path / "saved") == _files(tmp_path / "saved by trl")
    assert f"{name}/adapter_model.safetensors" in _files(tmp_path / "saved")
    again = PeftModel.from_pretrained(make_model(), tmp_path / "saved" / name, adapter_name=name)
    best = PeftModel.from_pretrained(make_model(), loaded / name, adapter_name=name)
    pairs = list(zip(again.named_parameters(), best.named_parameters(), strict=True))
    assert len(pairs) > 10
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    report = verify_adapter(tmp_path / "saved" / name, base)
    assert report.missing == report.unexpected == ()
    assert report.adapter_effect > 100 * report.largest_difference


@pytest.mark.parametrize("name", sampled(NAMES[:2], NAMES[0]))
def test_a_run_on_a_named_adapter_resumes(name, base, tmp_path):
    whole, part = (_make(MLXSFTTrainer, base, name, tmp_path / "run", learning_rate=1e-2) for _ in range(2))
    whole.train()
    part.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert losses(part.state.log_history) == pytest.approx(losses(whole.state.log_history), rel=LOSS)
    pairs = list(zip(whole.model.named_parameters(), part.model.named_parameters(), strict=True))
    assert len(pairs) > 10
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_the_folder_above_says_where_the_adapter_is(base, tmp_path):
    _make(MLXSFTTrainer, base, "mine", tmp_path / "run").save_model(str(tmp_path / "saved"))
    with pytest.raises(AdapterError, match="saved/mine"):
        verify_adapter(tmp_path / "saved", base)
