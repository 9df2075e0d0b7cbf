"""Module paths and their order beside the torch class: PEFT's keys and first values hang on both."""

from __future__ import annotations

import pytest
import torch
import transformers
from adapter_pairs import load_torch
from architecture_checks import load_quietly
from architecture_zoo import make_model
from training_checks import quiet

from hf_mlx.adapters.defaults import RENAMED_MODULES
from hf_mlx.adapters.sites import list_sites
from hf_mlx.adapters.start import count_loading_draws
from hf_mlx.models.architectures import VERIFIED

SAMPLE = ("llama", "gpt_neox", "jamba", "kimi_linear", "lfm2", "longcat_flash", "olmo_hybrid", "qwen3_5_moe")


def _cases() -> list:
    return [t if t in SAMPLE else pytest.param(t, marks=pytest.mark.wide) for t in sorted(VERIFIED)]


@pytest.mark.parametrize("model_type", _cases())
def test_adaptable_modules_are_where_torch_has_them_and_in_its_order(model_type, tmp_path):
    with quiet():
        make_model(model_type).save_pretrained(tmp_path)
        order = {name: i for i, (name, _) in enumerate(load_torch(tmp_path).named_modules())}

    sites = [site for site in list_sites(load_quietly(tmp_path)) if site.kind in ("linear", "embedding")]

    paths = [site.hf_path for site in sites if not _is_reached_otherwise(model_type, site)]
    assert len(paths) >= 8
    assert [path for path in paths if path not in order] == []
    assert [order[path] for path in paths] == sorted(order[path] for path in paths)


@pytest.mark.parametrize("model_type", _cases())
def test_loading_draws_as_often_from_the_generator_as_counted(model_type, tmp_path):
    with quiet():
        make_model(model_type).save_pretrained(tmp_path)
        draws = count_loading_draws(load_quietly(tmp_path))

        transformers.set_seed(3)
        torch.rand(draws)
        expected = torch.rand(4)
        transformers.set_seed(3)
        load_torch(tmp_path)

    assert torch.equal(torch.rand(4), expected)


def _is_reached_otherwise(model_type, site) -> bool:
    # Refused by name.
    return site.hf_path.rsplit(".", 1)[-1] in RENAMED_MODULES.get(model_type, ())
