"""``trainer.model`` of a model named by a string, beside the transformers and PEFT objects it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from dropin_models import ROWS, make_model, make_tokenizer, write_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, TextStreamer
from transformers.integrations import TensorBoardCallback
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import SettingError

# Two fp32 forward passes.
LOGITS = 1e-5
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("facade") / "model")


def _trainer(folder, output, peft_config=None, steps=3, **keywords):
    arguments = SFTConfig(
        str(output), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return MLXSFTTrainer(
        str(folder), arguments, train_dataset=Dataset.from_list(ROWS), peft_config=peft_config, **keywords
    )


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """An untrained full fine-tuning run, and the same model in torch."""
    return _trainer(folder, tmp_path_factory.mktemp("out")).model, make_model().eval()


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")  # transformers', for the case without a length
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 12},
        {"max_new_tokens": 12, "repetition_penalty": 1.3},
        {},
        {"max_length": 20},
        {"max_new_tokens": 30, "eos_token_id": [1, 33]},
        {"generation_config": GenerationConfig(max_new_tokens=5, eos_token_id=1), "max_new_tokens": 7},
        {"max_new_tokens": 6, "use_cache": True, "num_return_sequences": 1},
    ],
)
def test_greedy_generation_gives_transformers_ids(options, plain):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    inputs = tokenizer(["What is 3 plus 3? ", "It"], return_tensors="pt", padding=True)
    model, theirs = plain
    wanted = theirs.generate(**inputs, do_sample=False, pad_token_id=2, **options)
    found = model.generate(**inputs, do_sample=False, pad_token_id=2, **options)
    assert torch.equal(found, wanted)
    assert found.dtype == wanted.dtype


def test_generation_takes_and_gives_lists_and_numpy(plain):
    model, theirs = plain
    wanted = theirs.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).numpy()
    for ids in ([5, 6, 7], [[5, 6, 7]], np.array([[5, 6, 7]])):
        found = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert isinstance(found, np.ndarray)
        assert (found == wanted).all()


def test_sampling_follows_the_filtered_distribution(plain):
    model, theirs = plain
    prompt = torch.tensor([[5, 6, 7]])
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.8}
    drawn = model.generate(prompt, max_new_tokens=1, do_sample=True, num_return_sequences=400, **options)[:, -1]
    with torch.no_grad():
        scores = theirs(prompt).logits[0, -1] / options["temperature"]
    top = torch.softmax(scores, -1).sort(descending=True)
    kept = top.values[:20] / top.values[:20].sum()
    nucleus = kept[: int((kept.cumsum(0) < options["top_p"]).sum()) + 1]
    expected = dict(zip(top.indices.tolist(), (nucleus / nucleus.sum()).tolist(), strict=False))
    seen = {token: (drawn == token).float().mean().item() for token in drawn.unique().tolist()}
    assert seen.keys() == expected.keys()
    # Four standard deviations of a share among 400 draws.
    assert all(abs(seen[token] - share) < 4 * (share / 400) ** 0.5 for token, share in expected.items())


def test_a_streamer_gets_the_answer_as_it_comes(plain, capsys):
    model, _ = plain
    tokenizer = make_tokenizer()
    inputs = tokenizer("What is 3 plus 3? ", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out.strip() == tokenizer.decode(ids[0]).strip()


@pytest.mark.parametrize("name", ["num_beams", "no_repeat_ngram_size", "typo", "logits_processor"])
def test_an_option_that_is_not_honoured_is_refused_by_name(name, plain):
    with pytest.raises(SettingError, match=f"generate\\({name}="):
        plain[0].generate([1, 2], **{name: 3})


def test_forward_gives_logits_and_loss(plain):
    model, theirs = plain
    inputs = make_tokenizer()(["What is 3 plus 3? ", "It"], return_tensors="pt", padding=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        wanted = theirs(**inputs, labels=labels)
    found = model(**inputs, labels=labels)
    real = inputs["attention_mask"].bool()
    assert (found.logits - wanted.logits)[real].abs().max() < LOGITS
    assert found.loss == pytest.approx(wanted.loss.item(), rel=1e-6)


def test_parameters_have_hf_names_order_and_values(plain):
    model, theirs = plain
    wanted, found = dict(theirs.named_parameters()), dict(model.named_parameters())
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert model.num_parameters() == theirs.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == theirs.num_parameters(exclude_embeddings=True)
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    with pytest.raises(AttributeError, match="no parameter"):
        model.get_parameter("nothing")


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapters_parameters_have_pefts_names(changes, folder, tmp_path, capsys):
    theirs = get_peft_model(make_model(), LoraConfig(**LORA, **changes))
    trainer = _trainer(folder, tmp_path, LoraConfig(**LORA, **changes))
    wanted = {name: value for name, value in theirs.named_parameters() if "original_module" not in name}
    found = dict(trainer.model.named_parameters())
    assert found.keys() == wanted.keys()
    assert {n for n, v in found.items() if v.requires_grad} == {n for n, v in wanted.items() if v.requires_grad}
    assert all(value.shape == wanted[name].shape for name, value in found.items())
    if not changes:
        theirs.print_trainable_parameters()
        trainer.model.print_trainable_parameters()
        first, second = capsys.readouterr().out.splitlines()
        assert first == second


def test_training_moves_the_adapter_and_nothing_else(folder, tmp_path):
    trainer = _trainer(folder, tmp_path / "out", LoraConfig(**LORA))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in before.items() if not torch.equal(value, trainer.model.get_parameter(name))}
    assert moved == {name for name in before if "lora_" in name}
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = loaded(ids).logits
    assert (trainer.model(ids).logits - wanted).abs().max() < LOGITS
    merged = trainer.model.merge_and_unload()
    assert not hasattr(merged, "peft_config")
    assert "lora_A" not in " ".join(dict(merged.named_parameters()))
    assert (merged(ids).logits - wanted).abs().max() < LOGITS
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (whole(ids).logits - wanted).abs().max() < LOGITS


def test_reporting_callbacks_read_the_facade(folder, tmp_path):
    written = {}

    class Writer:
        def add_text(self, name, text):
            written[name] = text

        def add_scalar(self, *args): ...
        def flush(self): ...
        def close(self): ...
        def add_hparams(self, *args, **kwargs): ...

    callback = TensorBoardCallback(tb_writer=Writer()) if _has_tensorboard() else None
    if callback is None:
        model = _trainer(folder, tmp_path, LoraConfig(**LORA)).model
        written["model_config"] = model.config.to_json_string()
        assert model.peft_config["default"].r == 4
        assert model.config.to_dict()["hidden_size"] == 64
    else:
        _trainer(folder, tmp_path, LoraConfig(**LORA), callbacks=[callback]).train()
    assert '"hidden_size": 64' in written["model_config"]


def _has_tensorboard() -> bool:
    from transformers.integrations import is_tensorboard_available

    return is_tensorboard_available()
