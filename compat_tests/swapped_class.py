"""What trl's own tests of its trainers ask for, with the class swapped: models, and what training has moved."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from architecture_zoo import make_model
from pairs import tiny_model, tokenizer


def make_models(root: Path) -> dict[str, Path]:
    """Folders of a small model of each kind, by name."""
    sizes = {"hidden_size": 32, "intermediate_size": 48}
    made = {name: tiny_model(name, root / name, **sizes) for name in ("qwen2", "llama")}
    moe = make_model("qwen3_moe", vocab_size=len(tokenizer()), pad_token_id=2, eos_token_id=1, bos_token_id=0)
    moe.save_pretrained(root / "qwen3_moe")
    tokenizer().save_pretrained(root / "qwen3_moe")
    return made | {"qwen3_moe": root / "qwen3_moe"}


def assert_the_same_moves(build: Callable[[type], Any], theirs: type, ours: type) -> None:
    """Train with both classes: the same parameters train, move and have the same dtype."""
    states = []
    for cls in (theirs, ours):
        with warnings.catch_warnings(action="ignore"):
            trainer = build(cls)
            before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
            trains = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
            trainer.train()
        assert trainer.state.log_history[-1]["train_loss"] is not None
        after = dict(trainer.model.named_parameters())
        states.append(
            {n: (n in trains, bool((after[n] != value).any()), str(value.dtype)) for n, value in before.items()}
        )
    expected, found = states
    # A stack of experts is no one parameter here; copies that do not train are held outside of the model.
    shared = expected.keys() & found.keys()
    assert {n for n, (trained, *_) in expected.items() if trained and (".experts." not in n or "lora" in n)} <= shared
    assert {n: expected[n] for n in shared} == {n: found[n] for n in shared}
    assert sum(moved for _, moved, _ in found.values()) >= 8
