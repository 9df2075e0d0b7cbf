"""What MLXRewardTrainer does not train is refused by name before training, with what to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architecture_zoo import make_model
from pairs import SILENT, tiny_model, tokenizer
from peft import LoraConfig, get_peft_model
from reward_pairs import load, reward_rows
from transformers import BitsAndBytesConfig
from trl import RewardConfig

from hf_mlx import HFMLXError, MLXRewardTrainer, explain, import_adapter
from hf_mlx.models.load import load_model
from hf_mlx.settings.plan import ModelPlan
from hf_mlx.settings.resolve import resolve_plan

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model("llama", tmp_path_factory.mktemp("llama") / "model", hidden_size=32, intermediate_size=48)


def make(
    model: Any, folder: Path, *, settings: dict[str, Any] | None = None, cls: type = MLXRewardTrainer, **more: Any
):
    given = {"train_dataset": reward_rows("text", 4), "processing_class": tokenizer(), **more}
    args = RewardConfig(str(folder / "out"), **{**SILENT, **(settings or {})})
    return cls(str(model) if isinstance(model, Path) else model, args, **given)


def classes(folder: Path, labels: int) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels)


SETTINGS: dict[str, tuple[dict[str, Any], str, str]] = {
    "4 bits": ({"model_init_kwargs": {"load_in_4bit": True}}, "load_in_4bit", "without \"load_in_4bit\""),
    "a quantisation": (
        {"model_init_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}},
        "quantises the base of a reward model",
        "without \"quantization_config\"",
    ),
    "noise": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha", "neftune_noise_alpha=None"),
    "grouped": ({"train_sampling_strategy": "group_by_length"}, "group_by_length", "\"random\""),
    "a tokenizer's template": ({"chat_template_path": "some/model"}, "chat_template_path", "template.jinja"),
    "a token outside": ({"eos_token": "<none>"}, "not in the tokenizer's vocabulary", "RewardConfig(eos_token="),
    "no length": ({"max_length": 0}, "max_length=0", "max_length=1024"),
    "no number": ({"center_rewards_coefficient": float("nan")}, "center_rewards_coefficient", "0.01"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(model, tmp_path, case):
    settings, received, remedy = SETTINGS[case]
    with pytest.raises(HFMLXError) as error:
        make(model, tmp_path, settings=settings)
    assert received in str(error.value) and remedy in error.value.remedy


def test_a_keyword_of_quantisation(model, tmp_path):
    with pytest.raises(HFMLXError, match="quantises the base of a reward model"):
        make(model, tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


@pytest.mark.parametrize(
    ("peft_config", "words"),
    [
        (LoraConfig(task_type="CAUSAL_LM"), 'task_type="SEQ_CLS"'),
        (LoraConfig(task_type="TOKEN_CLS"), 'task_type="SEQ_CLS"'),
        (LoraConfig(task_type="SEQ_CLS", target_modules=["score"]), "match no module"),
        (LoraConfig(task_type="SEQ_CLS", modules_to_save=["nothing"]), "'nothing', which matches no module"),
    ],
)
def test_adapters(model, tmp_path, peft_config, words):
    with pytest.raises(HFMLXError, match=words):
        make(model, tmp_path, peft_config=peft_config)


def test_a_reward_models_adapter_is_none_of_a_language_model(model):
    with pytest.raises(HFMLXError, match='task_type="CAUSAL_LM"'):
        resolve_plan({}, LoraConfig(task_type="SEQ_CLS"))


def test_objects(model, tmp_path):
    causal = transformers.AutoModelForCausalLM.from_pretrained(model)
    cases = {
        r"The model has `num_labels=2`": classes(model, 2),
        r"`num_labels=3`": get_peft_model(classes(model, 3), LoraConfig(task_type="SEQ_CLS")),
        r"`num_labels=2`[\s\S]*num_labels=1\)": causal,
    }
    for words, held in cases.items():
        with pytest.raises(HFMLXError, match=words):
            make(held, tmp_path)
    causal.config.num_labels = 1
    with pytest.raises(HFMLXError, match="LlamaForCausalLM as a reward model"):
        make(causal, tmp_path)
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1
        )
    )
    with pytest.raises(HFMLXError, match="BertForSequenceClassification as a reward model"):
        make(bert, tmp_path)


def test_other_types(tmp_path):
    made = make_model("gpt2", vocab_size=len(tokenizer()))
    made.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(HFMLXError, match=r"'gpt2' as a reward model[\s\S]*trl.RewardTrainer on torch"):
        make(tmp_path / "gpt2", tmp_path)


def test_a_score_to_be_drawn_in_half_precision(tmp_path):
    folder = tiny_model("llama", tmp_path / "odd", hidden_size=40, head_dim=8, intermediate_size=48)
    with pytest.raises(HFMLXError, match=r"no score.weight, to be drawn in float16[\s\S]*bf16=True"):
        make(folder, tmp_path, settings={"model_init_kwargs": {"dtype": "float16"}})
    made = make(folder, tmp_path)
    assert made.session.step.params["score.weight"].shape == (1, 40)


def test_a_score_of_several_labels(model, tmp_path):
    classes(model, 3).save_pretrained(tmp_path / "three")
    with pytest.raises(HFMLXError, match="num_labels=3"):
        make(tmp_path / "three", tmp_path)


def test_a_folder_with_a_score_is_no_language_model(model, tmp_path):
    load(model).save_pretrained(tmp_path / "score")
    with pytest.raises(HFMLXError, match=r"a reward model or classifier[\s\S]*MLXRewardTrainer\(model=folder\)"):
        load_model(tmp_path / "score", ModelPlan())


@pytest.mark.parametrize("rows", [None, {"train": reward_rows("text", 4)}])
def test_no_rows(model, tmp_path, rows):
    with pytest.raises(HFMLXError, match="train_dataset"):
        make(model, tmp_path, train_dataset=rows)


def test_hooks(model, tmp_path):
    class Mine(MLXRewardTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return 0

    with pytest.raises(HFMLXError, match=r"compute_loss[\s\S]*center_rewards_coefficient"):
        make(model, tmp_path, cls=Mine)
    trainer = make(model, tmp_path)
    for call in (
        lambda: trainer.compute_loss(trainer.model, {}),
        lambda: trainer.training_step(trainer.model, {}),
        lambda: trainer.model.generate(torch.tensor([[3, 4]])),
        lambda: trainer.model(torch.tensor([[3, 4]]), labels=torch.tensor([[3, 4]])),
        lambda: trainer.model(torch.tensor([[3, 4]]), torch.tensor([[0, 1]])),
        lambda: setattr(trainer, "loss_is_scaled_for_ga", True),
    ):
        with pytest.raises(HFMLXError):
            call()


def test_remedies_are_a_reward_models(model, tmp_path):
    with pytest.raises(HFMLXError, match=r"center_rewards_coefficient=0.01"):
        make(model, tmp_path, loss=lambda logits, labels, mask: logits)
    trainer = make(model, tmp_path)
    trainer.compute_loss = lambda *args, **kwargs: 0
    with pytest.raises(HFMLXError, match=r"center_rewards_coefficient=0.01"):
        trainer.train()
    changed = load(model)
    changed.model.layers[0].mlp.act_fn = torch.nn.Tanh()
    with pytest.raises(HFMLXError, match=r"AutoModelForSequenceClassification.from_pretrained\("):
        make(changed, tmp_path)
    with pytest.raises(HFMLXError, match=r"keyword|parameter of RewardTrainer"):
        make(model, tmp_path, beta=0.1)
    with pytest.warns(DeprecationWarning, match=r"RewardConfig\(max_length=\.\.\.\)"):
        assert (
            make(
                model, tmp_path, max_length=7, train_dataset=[{"chosen_ids": [3], "rejected_ids": [4]}]
            ).plan.data.max_length
            == 7
        )


def test_the_tools_for_language_models_name_an_adapter_of_a_reward_model(model, tmp_path):
    trainer = make(model, tmp_path, peft_config=LoraConfig(r=2, task_type="SEQ_CLS"), settings={"max_steps": 1})
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    with pytest.raises(HFMLXError, match="SEQ_CLS"):
        import_adapter(tmp_path / "adapter", load_model(model, ModelPlan()))


def test_what_a_score_that_is_not_saved_means_is_said(model, tmp_path, caplog):
    make(model, tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert "the score is neither trained nor saved" in caplog.text
    caplog.clear()
    make(model, tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    assert "the score" not in caplog.text


def test_explain_judges_a_reward_models_settings():
    ledger = explain({"center_rewards_coefficient": 0.1, "max_length": 5}, {"task_type": "SEQ_CLS"})
    ledger.raise_refused(strict=True)
    assert "center_rewards_coefficient" in {entry.field for entry in ledger.changed()}
