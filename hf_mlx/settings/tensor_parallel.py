"""What of a plan several processes cannot train that hold one model together."""

from __future__ import annotations

from ..errors import SettingError
from .plan import TrainPlan


def check_tensor_parallel(plan: TrainPlan) -> None:
    """Refuse a plan that is not proven with a model that is split over processes.

    Raises:
        SettingError: Names the first setting.
    """
    ways, lora = plan.model.tensor_parallel, plan.lora
    if ways == 1:
        return
    found: list[tuple[bool, str, str, str]] = []
    if lora is None:
        found.append((True, "full fine-tuning", "an adapter", 'peft_config=LoraConfig(target_modules="all-linear")'))
    else:
        found += [
            (lora.use_dora, "use_dora=True", "plain LoRA", "LoraConfig(use_dora=False)"),
            (lora.bias != "none", f"bias={lora.bias!r}", "frozen biases", 'LoraConfig(bias="none")'),
            (lora.lora_bias, "lora_bias=True", "pairs without a bias", "LoraConfig(lora_bias=False)"),
            (
                lora.init_lora_weights in ("pissa", "olora"),
                f"init_lora_weights={lora.init_lora_weights!r}",
                "a start that leaves the base as it is",
                "LoraConfig(init_lora_weights=True)",
            ),
        ]
        for name in ("modules_to_save", "trainable_token_indices"):
            value = getattr(lora, name)
            found.append((bool(value), f"{name}={value!r}", "adapters on Linear layers", f"LoraConfig({name}=None)"))
    found.append((plan.optim.name == "adafactor", 'optim="adafactor"', "AdamW or another", 'optim="adamw_torch"'))
    for given, what, required, remedy in found:
        if given:
            raise SettingError(f"{what}, on a model that is split over {ways} processes", required, remedy)
