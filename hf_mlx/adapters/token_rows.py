"""Single rows of embedding and head that are trained in place of the table's own (``trainable_token_indices``).

Source: peft 0.21 ``peft.tuners.trainable_tokens.layer.TrainableTokensLayer`` and
``peft.utils.other.set_additional_trainable_modules``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import AdapterError
from ..models.products import matmul
from ..settings.plan import LoraPlan
from .sites import HEADS, Site
from .targets import Target


@dataclass(frozen=True)
class TokenRows:
    """The rows of one end that are trained.

    Attributes:
        site: The embedding or the head.
        indices: Token ids, each once.
    """

    site: Site
    indices: tuple[int, ...]


class TrainableTokens(nn.Module):
    """An embedding, a head or both in one (tied), of which some rows are trained.

    Args:
        base_layer: The layer with the table; freezing it is the caller's business.
        indices: Ids of the trained rows.

    Attributes:
        trainable_tokens_delta: (tokens, dim), fp32: the rows themselves, whatever the name says.
    """

    def __init__(self, base_layer: Any, indices: tuple[int, ...]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.indices = indices
        lookup = np.full(base_layer.weight.shape[0], -1, np.int32)
        lookup[list(indices)] = np.arange(len(indices))
        self._lookup, self._columns = mx.array(lookup), mx.array(indices)
        self.trainable_tokens_delta = base_layer.weight[self._columns].astype(mx.float32)

    def __call__(self, x: mx.array) -> mx.array:
        if not isinstance(self.base_layer, nn.Embedding):
            return self._project(x, self.base_layer(x))
        rows, found = self.base_layer(x), self._lookup[x]
        own = self.trainable_tokens_delta[mx.maximum(found, 0)].astype(rows.dtype)
        return mx.where((found >= 0)[..., None], own, rows)

    def as_linear(self, x: mx.array) -> mx.array:
        """The projection of a head that is the embedding."""
        return self._project(x, self.base_layer.as_linear(x))

    def merged_weight(self) -> mx.array:
        """The table with the trained rows in it, in the base's dtype."""
        weight = mx.array(self.base_layer.weight)
        weight[self._columns] = self.trainable_tokens_delta.astype(weight.dtype)
        return weight

    def _project(self, x: mx.array, logits: mx.array) -> mx.array:
        own = matmul(x.astype(logits.dtype), self.trainable_tokens_delta.astype(logits.dtype).T)
        logits[..., self._columns] = own
        return logits


def choose_rows(sites: list[Site], plan: LoraPlan, targets: list[Target], saved: list[Site], *, tied: bool) -> list:
    """The :class:`TokenRows` that ``trainable_token_indices`` asks for, in HF order.

    Raises:
        AdapterError: It names another layer than embedding and head, ids that are not there, or an end that is adapted
            otherwise, too; or ends of a tied pair apart.
    """
    asked = plan.trainable_token_indices
    if not asked:
        return []
    named = dict(asked) if isinstance(asked, Mapping) else {"embed_tokens": asked}
    ends = [site for site in sites if _is_end(site, by_list=not isinstance(asked, Mapping))]
    if tied:
        heads = [name for name in named if name.rsplit(".", 1)[-1] in HEADS]
        others = [name for name in named if name not in heads]
        if heads and (not others or any(tuple(named[head]) != tuple(named[others[0]]) for head in heads)):
            raise _refused(
                f"trainable_token_indices={_shown(asked)}",
                "the same ids for embedding and head, which this model ties",
                f"trainable_token_indices={list(named[heads[0]])!r}",
            )
        named = {name: named[name] for name in others}
    rows = []
    for name, indices in named.items():
        found = [site for site in ends if site.hf_path.endswith(name)] or (
            ends if not isinstance(asked, Mapping) else []
        )
        if len(found) != 1:
            raise _refused(
                f"trainable_token_indices names {name!r}",
                "the input embedding or the head",
                f"trainable_token_indices={list(indices)!r}",
            )
        rows.append(_checked(found[0], tuple(indices), targets, saved))
    order = {site.mlx_path: position for position, site in enumerate(sites)}
    return sorted(rows, key=lambda chosen: order[chosen.site.mlx_path])


def _is_end(site: Site, *, by_list: bool) -> bool:
    leaf = site.hf_path.rsplit(".", 1)[-1]
    embeds = leaf in ("embed_tokens", "wte", "embed_in", "embeddings", "word_embeddings")
    return (embeds and site.kind == "embedding") or (leaf in HEADS and site.kind == "linear" and not by_list)


def _checked(site: Site, indices: tuple[int, ...], targets: list[Target], saved: list[Site]) -> TokenRows:
    module: Any = site.module
    problem = None
    if any(target.mlx_path == site.mlx_path for target in targets):
        problem = "which target_modules adapts too", "each end trained in one way"
    elif any(f"{site.mlx_path}.".startswith(f"{whole.mlx_path}.") for whole in saved):
        problem = "which modules_to_save trains in full (PEFT raises too)", "each end trained in one way"
    elif "scales" in module:
        problem = "which is quantised", "an end in floating point"
    elif "bias" in module:
        problem = "whose bias PEFT leaves out of the product", "a head without bias"
    if problem:
        raise _refused(f"trainable_token_indices on {site.hf_path}, {problem[0]}", problem[1], "leave one of them out")
    count = module.weight.shape[0]
    wrong = [i for n, i in enumerate(indices) if not 0 <= i < count or i in indices[:n]]
    if wrong or not indices:
        raise _refused(
            f"trainable_token_indices={_shown(indices)} on {site.hf_path}",
            f"ids from 0 to {count - 1}, each once",
            "tokenizer.convert_tokens_to_ids(new_tokens), after model.resize_token_embeddings(len(tokenizer))",
        )
    return TokenRows(site, indices)


def _shown(value: Any) -> str:
    text = repr(dict(value) if isinstance(value, Mapping) else list(value))
    return text if len(text) < 80 else f"{text[:77]}..."


def _refused(received: str, required: str, remedy: str) -> AdapterError:
    return AdapterError(received, required, remedy)
