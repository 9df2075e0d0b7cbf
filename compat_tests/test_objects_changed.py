"""What a script did to a torch object before it was handed over: TRL's numbers, or a refusal that names the change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from dropin_models import ROWS, losses, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from sampling import sampled
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import HFMLXError

pytestmark = pytest.mark.usefixtures("uncompiled")

# fp32 on both sides, three optimizer steps apart.
LOSS = 2e-6


def _arguments(folder: Any, **changes: Any) -> SFTConfig:
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=3, learning_rate=1e-2, logging_steps=1,
        bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    return SFTConfig(**settings | changes)


def _train(trainer: type, folder: Any, model: Any, settings: dict[str, Any] | None = None, **keywords: Any) -> Any:
    rows, tokenizer = Dataset.from_list(ROWS), make_tokenizer()
    made = trainer(
        model, _arguments(folder, **settings or {}), train_dataset=rows, processing_class=tokenizer, **keywords
    )
    made.train()
    return made


def _lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") | changes)


def _adapted(**changes: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(make_model(), _lora(init_lora_weights=False, **changes))


def _layer(model: Any) -> Any:
    return model.model.layers[0]


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class HandMade(torch.nn.Module):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class OwnForward(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class OwnLogits(LlamaForCausalLM):
    @property
    def loss_function(self):
        return None


class Chatty(LlamaForCausalLM):
    def describe(self):
        return "a model with one more method, which training never calls"


def _own_class(cls: type) -> Any:
    model = make_model()
    model.__class__ = cls
    return model


def _changed(change: Callable[[Any], Any]) -> Callable[[], Any]:
    def make() -> Any:
        model = make_model()
        change(model)
        return model

    return make


def _changed_adapter(change: Callable[[Any], Any], **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = _adapted(**config)
        change(model)
        return model

    return make


def _tuners(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "scale_layer")]


def _halve(module: Any, inputs: Any, output: Any) -> Any:
    return output * 0.5


def _wrap_forward(model: Any) -> None:
    mlp = _layer(model).mlp
    plain = mlp.forward

    @functools.wraps(plain)
    def forward(x):
        return 0.5 * plain(x)

    mlp.forward = forward


def _two_adapters(model: Any) -> None:
    model.add_adapter("second", _lora())
    model.base_model.set_adapter(["default", "second"])


def _swap(place: Callable[[Any], Any], name: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda model: setattr(place(model), name, make(getattr(place(model), name)))


def _untie() -> Any:
    model = make_model("qwen2-tied")
    model.lm_head.weight = torch.nn.Parameter(1.5 * model.lm_head.weight.detach())
    return model


def _tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _scale_inv_freq(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


# How the object is made, and what the refusal must say.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "head untied by hand": (_untie, r"lm_head\.weight not tied to .*tie_word_embeddings = False"),
    "head tied by hand": (_changed(_tie), r"lm_head\.weight tied to .*tie_word_embeddings = True"),
    "two layers tied": (
        _changed(lambda m: setattr(m.model.layers[1].mlp.up_proj, "weight", _layer(m).mlp.up_proj.weight)),
        r"layers\.1\.mlp\.up_proj\.weight tied to model\.layers\.0",
    ),
    "forward hook": (_changed(lambda m: _layer(m).mlp.register_forward_hook(_halve)), r"forward hook \(_halve\).*mlp"),
    "forward hook on the model": (_changed(lambda m: m.register_forward_hook(lambda *_: None)), "hook .* the model"),
    "forward pre-hook": (
        _changed(lambda m: _layer(m).mlp.register_forward_pre_hook(lambda *_: None)),
        "forward pre-hook",
    ),
    "full backward hook": (
        _changed(lambda m: m.lm_head.register_full_backward_hook(lambda *_: None)),
        "backward hook .*lm_head",
    ),
    "full backward pre-hook": (
        _changed(lambda m: m.lm_head.register_full_backward_pre_hook(lambda *_: None)),
        "backward pre-hook .*lm_head",
    ),
    "tensor hook": (_changed(lambda m: m.lm_head.weight.register_hook(lambda g: g)), r"tensor hook .*lm_head\.weight"),
    "post accumulate hook": (
        _changed(lambda m: m.lm_head.weight.register_post_accumulate_grad_hook(lambda p: None)),
        r"accumulated .*lm_head\.weight",
    ),
    "hook on LoRA's matrix": (
        _changed_adapter(lambda m: _tuners(m)[0].lora_A.default.register_forward_hook(_halve)),
        r"forward hook .*q_proj\.lora_A\.default",
    ),
    "parametrization": (
        _changed(lambda m: parametrize.register_parametrization(m.lm_head, "weight", torch.nn.Identity())),
        r"lm_head\.weight.*parametrize.*remove_parametrizations",
    ),
    "weight norm": (_changed(lambda m: parametrizations.weight_norm(m.lm_head)), r"lm_head\.weight.*parametrize"),
    "old weight norm": (
        _changed(lambda m: torch.nn.utils.weight_norm(m.lm_head)),
        r"lm_head\.weight.*weight_norm",
    ),
    "spectral norm": (_changed(lambda m: parametrizations.spectral_norm(m.lm_head)), r"lm_head\.weight.*parametrize"),
    "old spectral norm": (
        _changed(lambda m: torch.nn.utils.spectral_norm(m.lm_head)),
        r"lm_head\.weight.*remove_spectral_norm",
    ),
    "pruning mask": (
        _changed(lambda m: prune.l1_unstructured(_layer(m).mlp.up_proj, "weight", 0.3)),
        r"up_proj\.weight.*prune\.remove",
    ),
    "own forward of the model": (lambda: _own_class(OwnForward), r"OwnForward overrides LlamaForCausalLM\.forward"),
    "own loss of the model": (lambda: _own_class(OwnLogits), r"OwnLogits overrides .*loss_function"),
    "loss_function set": (_changed(lambda m: setattr(m, "loss_function", lambda **_: None)), "loss_function"),
    "own forward of a layer": (
        _changed(lambda m: setattr(_layer(m).mlp.up_proj, "__class__", Doubled)),
        r"up_proj: Doubled overrides Linear\.forward",
    ),
    "forward assigned": (
        _changed(lambda m: setattr(_layer(m).mlp, "forward", lambda x: 0 * x)),
        r"assigned on the instance.*mlp",
    ),
    "forward wrapped with functools.wraps": (_changed(_wrap_forward), r"_wrap_forward.*assigned on the instance"),
    "hand-made LoRA": (_changed(_swap(lambda m: _layer(m).self_attn, "q_proj", HandMade)), r"q_proj: .*HandMade"),
    "Sequential head": (
        _changed(_swap(lambda m: m, "lm_head", lambda head: torch.nn.Sequential(head, torch.nn.Dropout(0.1)))),
        "lm_head: Sequential in the place of Linear",
    ),
    "activation replaced": (
        _changed(_swap(lambda m: _layer(m).mlp, "act_fn", lambda _: torch.nn.ReLU())),
        r"act_fn: ReLU in the place of SiLU",
    ),
    "norm replaced": (
        _changed(_swap(lambda m: m.model, "norm", lambda _: torch.nn.LayerNorm(64))),
        r"model\.norm: LayerNorm",
    ),
    "LoRA's dropout replaced": (
        _changed_adapter(lambda m: _tuners(m)[0].lora_dropout.update({"default": torch.nn.Dropout(0.5)})),
        r"q_proj.*dropout",
    ),
    "submodule added": (_changed(lambda m: m.add_module("scorer", torch.nn.Linear(4, 1))), "scorer, a submodule"),
    "parameter added": (
        _changed(lambda m: _layer(m).mlp.register_parameter("gate", torch.nn.Parameter(torch.ones(1)))),
        r"mlp\.gate, a parameter",
    ),
    "bias given": (
        _changed(lambda m: setattr(m.lm_head, "bias", torch.nn.Parameter(torch.ones(384)))),
        r"lm_head\.bias is set",
    ),
    "layer dropped": (
        _changed(lambda m: setattr(m.model, "layers", m.model.layers[:1])),
        r"model\.layers\.1, a submodule that is missing",
    ),
    "rotary buffer": (_changed(_scale_inv_freq), r"rotary_emb\.inv_freq, a buffer"),
    "attention scale": (_changed(lambda m: setattr(_layer(m).self_attn, "scaling", 0.1)), r"scaling is 0\.1"),
    "norm's epsilon": (
        _changed(lambda m: setattr(m.model.norm, "variance_epsilon", 0.1)),
        r"norm\.variance_epsilon is 0\.1",
    ),
    "config changed: activation": (_changed(lambda m: setattr(m.config, "hidden_act", "relu")), r"act_fn"),
    "config changed: epsilon": (_changed(lambda m: setattr(m.config, "rms_norm_eps", 0.1)), r"variance_epsilon"),
    "config changed: layers": (
        _changed(lambda m: setattr(m.config, "num_hidden_layers", 1)),
        r"layers\.1, a submodule that was added",
    ),
    "scale_layer": (_changed_adapter(lambda m: [t.scale_layer(0.25) for t in _tuners(m)]), "q_proj.*unscale_layer"),
    "set_scale": (_changed_adapter(lambda m: _tuners(m)[1].set_scale("default", 3)), r"v_proj.*lora_alpha=24"),
    "unscale_layer": (_changed_adapter(lambda m: _tuners(m)[0].unscale_layer(2)), r"q_proj.*lora_alpha=4"),
    "merge_adapter": (_changed_adapter(lambda m: m.merge_adapter()), r"unmerge_adapter"),
    "adapter disabled": (
        _changed_adapter(lambda m: m.base_model.disable_adapter_layers()),
        "enable_adapter_layers",
    ),
    "two adapters active": (_changed_adapter(_two_adapters), "active adapters.*set_adapter"),
    "alpha of the config changed": (
        _changed_adapter(lambda m: setattr(m.peft_config["default"], "lora_alpha", 32)),
        r"q_proj.*lora_alpha",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_mlx_would_leave_out_is_refused_by_name(name, tmp_path):
    make, words = REFUSED[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(HFMLXError, match=f"(?s){words}"):
        _train(MLXSFTTrainer, tmp_path, model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_how_many_changes_are_refused():
    assert len(REFUSED) >= 30


def test_a_class_patched_after_loading_is_refused(tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.setattr(type(_layer(model).mlp), "forward", lambda self, x: 0 * x)
    with pytest.raises(HFMLXError, match=r"LlamaMLP\.forward, replaced on the class"):
        _train(MLXSFTTrainer, tmp_path, model)


def _untied_and_said() -> Any:
    model = _untie()
    model.config.tie_word_embeddings = False
    return model


def _tied_and_said() -> Any:
    model = make_model()
    _tie(model)
    model.config.tie_word_embeddings = True
    return model


def _kbit() -> Any:
    return get_peft_model(prepare_model_for_kbit_training(make_model()), _lora())


def _named(name: str) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(3)
        return get_peft_model(
            make_model(), _lora(init_lora_weights=False, modules_to_save=["lm_head"]), adapter_name=name
        )

    return make


def _on_device_map() -> Any:
    from accelerate import dispatch_model

    return dispatch_model(make_model(), device_map={"": "cpu"}, force_hooks=True)


def _resized() -> Any:
    model = make_model()
    torch.manual_seed(4)
    model.resize_token_embeddings(400)
    return model


def _used_before() -> Any:
    model = make_model()
    model.eval()
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    model(
        input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]]), output_hidden_states=True
    ).loss.backward()
    model.zero_grad()
    return model


def _scale_and_back(model: Any) -> None:
    for tuner in _tuners(model):
        tuner.scale_layer(3)
        tuner.unscale_layer()


def _inactive_second() -> Any:
    model = _adapted()
    model.add_adapter("second", _lora(r=2))
    model.set_adapter("default")
    return model


# What transformers, accelerate and PEFT put there themselves, and changes that are honoured.
HONOURED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "untied, and the config says so": (_untied_and_said, {}),
    "tied, and the config says so": (_tied_and_said, {}),
    "one more method": (lambda: _own_class(Chatty), {}),
    "checkpointing and inputs that require grad": (
        _changed(lambda m: (m.activation_checkpointing_enable(), m.enable_input_require_grads())),
        {},
    ),
    "checkpointing by SFTConfig": (make_model, {"gradient_checkpointing": True}),
    "prepare_model_for_kbit_training": (_kbit, {}),
    "hooks of device_map": (_on_device_map, {}),
    "resized": (_resized, {}),
    "generated and trained on before": (_used_before, {}),
    "eval() before": (_changed(lambda m: m.eval()), {}),
    "pruned for good": (
        _changed(lambda m: (prune.l1_unstructured(m.lm_head, "weight", 0.3), prune.remove(m.lm_head, "weight"))),
        {},
    ),
    "merged and unmerged": (_changed_adapter(lambda m: (m.merge_adapter(), m.unmerge_adapter())), {}),
    "scaled and unscaled": (_changed_adapter(_scale_and_back), {}),
    "hook removed": (_changed(lambda m: m.lm_head.register_forward_hook(_halve).remove()), {}),
    "hook on a frozen parameter": (
        _changed(lambda m: (m.lm_head.weight.register_hook(lambda g: 0 * g), m.lm_head.weight.requires_grad_(False))),
        {},
    ),
    "weights written before": (_changed(lambda m: m.lm_head.weight.data.mul_(0.5)), {}),
    "a second adapter that is not active": (_inactive_second, {}),
    "an adapter called like a layer": (_named("q_proj"), {}),
    "an adapter called mine": (_named("mine"), {}),
}  # fmt: skip


FEW = (
    "untied, and the config says so", "tied, and the config says so", "one more method",
    "checkpointing and inputs that require grad", "prepare_model_for_kbit_training", "hooks of device_map", "resized",
    "generated and trained on before", "merged and unmerged", "hook on a frozen parameter",
    "a second adapter that is not active", "an adapter called like a layer",
)  # fmt: skip


@pytest.mark.parametrize("name", sampled(HONOURED, *FEW))
def test_stock_paths_and_plain_changes_train_as_in_trl(name, tmp_path):
    make, settings = HONOURED[name]
    theirs = _train(SFTTrainer, tmp_path / "trl", make(), settings)
    ours = _train(MLXSFTTrainer, tmp_path / "mlx", make(), settings)
    expected, found = losses(theirs.state.log_history), losses(ours.state.log_history)
    assert len(found) == 3
    assert found == pytest.approx(expected, rel=LOSS)
