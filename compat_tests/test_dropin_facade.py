"""``trainer.model`` of a model named by a string, beside the transformers and PEFT objects it stands for."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from dropin_models import ROWS, make_model, make_tokenizer, write_model
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, TextStreamer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import SFTConfig

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import HFMLXError, SettingError

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


def _torch_twin(changes):
    return make_model() if changes is None else get_peft_model(make_model(), LoraConfig(**LORA, **changes))


@pytest.mark.parametrize("changes", [None, {}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_modules_and_states_have_their_names_order_and_classes(changes, folder, tmp_path):
    theirs = _torch_twin(changes)
    ours = _trainer(folder, tmp_path, None if changes is None else LoraConfig(**LORA, **changes)).model
    wanted = [(name, type(module)) for name, module in theirs.named_modules()]
    assert [(name, type(module)) for name, module in ours.named_modules()][1:] == wanted[1:]
    assert len(wanted) > 20
    assert next(ours.modules()) is ours
    assert [name for name, _ in ours.named_children()] == [name for name, _ in theirs.named_children()]
    assert [(n, tuple(b.shape)) for n, b in ours.named_buffers()] == [
        (n, tuple(b.shape)) for n, b in theirs.named_buffers()
    ]
    state = [name for name in theirs.state_dict() if "original_module" not in name]
    assert sorted(ours.state_dict()) == sorted(state)
    assert all(not value.requires_grad for value in ours.state_dict().values())
    if changes is not None:
        found, kept = (get_peft_model_state_dict(model) for model in (ours, theirs))
        assert sorted(found) == sorted(kept)
        layer = "base_model.model.model.layers.0.self_attn.q_proj"
        assert ours.get_submodule(layer).scaling == theirs.get_submodule(layer).scaling
        assert ours.base_model.model.model.layers[0].self_attn.q_proj.lora_A.default.weight.shape == (4, 64)
        assert ours.active_adapter == theirs.active_adapter
    assert ours.get_input_embeddings().weight.shape == theirs.get_input_embeddings().weight.shape
    with pytest.raises(AttributeError):
        ours.get_submodule("model.nothing")


@pytest.mark.parametrize("peft_config", [None, LoraConfig(**LORA)])
def test_a_deep_copy_is_a_torch_model_of_its_own(peft_config, folder, tmp_path):
    trainer = _trainer(folder, tmp_path, peft_config)
    trainer.train()
    model, ids = trainer.model, torch.tensor([[5, 6, 7, 8]])
    copied = copy.deepcopy(model).eval()
    assert isinstance(copied, PeftModel if peft_config else LlamaForCausalLM)
    with torch.no_grad():
        assert (copied(ids).logits - model(ids).logits).abs().max() < LOGITS
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for value in copied.parameters():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trained = {name for name, value in copied.named_parameters() if value.requires_grad}
    assert trained == {name for name, value in model.named_parameters() if value.requires_grad}


def test_a_kept_state_goes_back_in(folder, tmp_path):
    trainer = _trainer(folder, tmp_path, LoraConfig(**LORA))
    model = trainer.model
    best = copy.deepcopy(model.state_dict())
    trainer.train()
    assert any(not torch.equal(value, best[name]) for name, value in model.state_dict().items())
    result = model.load_state_dict(best)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    adapter = {name: torch.full_like(value, 0.5) for name, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, adapter)
    assert all((value == 0.5).all() for name, value in model.state_dict().items() if "lora_" in name)
    with pytest.raises(RuntimeError, match="missing"):
        model.load_state_dict({})


@pytest.mark.parametrize("as_object", [False, True])
def test_older_scripts_save_a_state_of_the_model(as_object, folder, tmp_path):
    trainer = _trainer(folder, tmp_path / "out")
    if as_object:
        arguments = SFTConfig(str(tmp_path / "out"), max_steps=1, bf16=False, use_cpu=True, report_to="none")
        rows = Dataset.from_list(ROWS)
        trainer = MLXSFTTrainer(make_model(), arguments, train_dataset=rows, processing_class=make_tokenizer())
    state = {name: value.cpu() for name, value in trainer.model.state_dict().items()}
    trainer._save(str(tmp_path / "saved"), state_dict=state)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).state_dict()
    assert state.keys() == saved.keys()
    assert all(torch.equal(value, state[name]) for name, value in saved.items())
    name = next(iter(state))
    if as_object:
        return
    with pytest.raises(SettingError, match=name):
        trainer._save(str(tmp_path / "saved"), state_dict={**state, name: state[name] + 1})


def _hook(*args):
    return None


def _set_forward(model):
    model.get_submodule("base_model.model.model.layers.0").forward = _hook


def _scale(model):
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").scaling["default"] = 4.0


def _replace(model):
    model.get_base_model().lm_head = torch.nn.Linear(2, 2)


def _new_parameter(model):
    model.get_base_model().lm_head.weight = torch.nn.Parameter(torch.zeros(2, 2))


def _hook_parameter(model):
    next(p for p in model.parameters() if p.requires_grad).register_hook(_hook)


CHANGES = {
    "hook": lambda model: model.get_submodule("base_model.model.model").register_forward_hook(_hook),
    "forward": _set_forward,
    "scaling": _scale,
    "modules": _replace,
    "parameter": _new_parameter,
    "tensor hook": _hook_parameter,
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_a_callback_sets_on_a_module_is_refused(kind, folder, tmp_path):
    class Sets(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            CHANGES[kind](model)

    trainer = _trainer(folder, tmp_path, LoraConfig(**LORA), callbacks=[Sets()])
    with pytest.raises(HFMLXError, match=kind):
        trainer.train()


def test_a_hook_that_a_callback_sets_on_an_object_is_refused(folder, tmp_path):
    class Sets(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.model.layers[0].register_forward_hook(_hook)

    arguments = SFTConfig(str(tmp_path), max_steps=1, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)
    rows = Dataset.from_list(ROWS)
    trainer = MLXSFTTrainer(
        make_model(), arguments, train_dataset=rows, processing_class=make_tokenizer(), callbacks=[Sets()]
    )
    with pytest.raises(SettingError, match=r"forward hook .*_hook.* on model\.layers\.0"):
        trainer.train()


def test_a_method_that_changes_the_model_is_refused_by_name(plain):
    model, _ = plain
    with pytest.raises(SettingError, match=r"model\.resize_token_embeddings"):
        model.resize_token_embeddings(3)
    assert not hasattr(model, "gradient_checkpointing_enable")
    assert not hasattr(model, "no_such_thing")
