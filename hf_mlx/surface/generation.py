"""``generate`` with transformers' settings on mlx-lm's token loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import SettingError

# transformers 5.23 ``GenerationMixin._prepare_generated_length``: without a length, 20 new tokens.
_DEFAULT_NEW_TOKENS = 20
_EVERYTHING = 2**31 - 1  # the largest slice MLX takes
# Settings that change neither ids nor shapes here.
_IDLE = frozenset(
    {"use_cache", "cache_implementation", "cache_config", "bos_token_id", "transformers_version", "max_time",
     "disable_compile", "compile_config", "prefill_chunk_size", "early_stopping", "length_penalty",
     "return_legacy_cache", "trust_remote_code", "continuous_batching_config", "synced_gpus", "renormalize_logits",
     "remove_invalid_values", "output_scores", "output_logits", "output_attentions", "output_hidden_states"}
)  # fmt: skip
_MEANS_OFF: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "encoder_repetition_penalty": (1.0,),
    "diversity_penalty": (0.0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "token_healing": (False,),
    "return_dict_in_generate": (False,),
    "is_assistant": (False,),
    "assistant_early_exit": (0,),
    "guidance_scale": (1.0,),
    "max_time": (),
}
_ASSISTED = ("num_assistant", "assistant_", "prompt_lookup", "target_lookbehind", "max_matching")


@dataclass(frozen=True)
class Generation:
    """How to choose tokens; fields mean what ``transformers.GenerationConfig`` says they mean."""

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    eos_token_id: Any = None
    pad_token_id: int | None = None

    @property
    def copies(self) -> int:
        """Answers for each prompt."""
        return self.num_return_sequences

    @classmethod
    def resolve(cls, config: Any, options: Mapping[str, Any]) -> Generation:
        """Lay keyword arguments over a ``GenerationConfig``.

        Raises:
            SettingError: A setting that is on and not honoured here.
        """
        known = {field.name for field in fields(cls)}
        stored = {k: v for k, v in config.to_dict().items() if not k.startswith("_") and v is not None}
        stored |= options
        for name, value in stored.items():
            off = value is None or value is False or value in _MEANS_OFF.get(name, ())
            if name in known or off or (name not in options and (name in _IDLE or name.startswith(_ASSISTED))):
                continue
            if name not in ("use_cache", "synced_gpus"):
                raise SettingError(
                    f"generate({name}={value!r})",
                    f"among {', '.join(sorted(known))}",
                    f"leave {name}= out, or save the model and generate with transformers",
                )
        values = {name: stored[name] for name in known if stored.get(name) is not None}
        return cls(**values)

    def run(
        self, model: nn.Module, rows: list[np.ndarray], *, width: int, streamer: Any = None, ways: int = 1
    ) -> np.ndarray:
        """New ids of each row, (rows · copies, new) int64, padded at the end.

        Args:
            model: An mlx-lm model in eval mode.
            rows: The prompts, without padding.
            width: Width of the padded prompts, which ``max_length`` counts from.
            streamer: Gets the ids as they come (one row only), as in transformers.
            ways: How many processes hold the model together; all of them call this.

        Raises:
            SettingError: Sampling on several processes, each of which would draw tokens of its own.
        """
        if ways > 1 and self.do_sample:
            raise SettingError(
                f"sampling on a model that {ways} processes hold together",
                "the same tokens on all of them",
                "generate(..., do_sample=False)",
            )
        answers = []
        for row in rows:
            for _ in range(self.copies):
                answers.append(self._answer(model, row, self._limit(width), streamer, ways))
        if streamer is not None:
            streamer.end()
        stops = self._stops()
        pad = self.pad_token_id if self.pad_token_id is not None else (stops[0] if stops else 0)
        length = max(map(len, answers), default=0)
        return np.array([answer + [pad] * (length - len(answer)) for answer in answers], np.int64).reshape(
            len(answers), length
        )

    def _answer(self, model: nn.Module, prompt: np.ndarray, limit: int, streamer: Any, ways: int) -> list[int]:
        from mlx_lm.generate import generate_step
        from mlx_lm.sample_utils import make_repetition_penalty

        processors = None
        if self.repetition_penalty != 1.0:
            # transformers penalises every token seen so far, the prompt's included.
            processors = [make_repetition_penalty(self.repetition_penalty, context_size=_EVERYTHING)]
        if streamer is not None:
            streamer.put(prompt[None])
        stops, answer = set(self._stops()), []
        # What processes exchange goes over one stream, or it is mixed up with what follows.
        own: dict[str, Any] = {} if ways == 1 else {"stream": mx.default_stream(mx.default_device())}
        steps = generate_step(
            mx.array(prompt), model, max_tokens=limit, sampler=self._sampler(), logits_processors=processors, **own
        )
        for token, _ in steps:
            answer.append(int(token))
            if streamer is not None:
                streamer.put(np.array([token]))
            if token in stops:
                break
        return answer

    def _limit(self, width: int) -> int:
        if self.max_new_tokens is not None:
            limit = self.max_new_tokens
        elif self.max_length is not None:
            limit = self.max_length - width
        else:
            limit = _DEFAULT_NEW_TOKENS
        if limit <= 0:
            raise SettingError(
                f"room for {limit} new tokens (max_length={self.max_length}, prompts of {width})",
                "at least one",
                "generate(..., max_new_tokens=64)",
            )
        return limit

    def _stops(self) -> list[int]:
        stops = self.eos_token_id
        return [] if stops is None else [int(stops)] if np.ndim(stops) == 0 else [int(stop) for stop in stops]

    def _sampler(self) -> Callable[[mx.array], mx.array] | None:
        if not self.do_sample:
            return None
        from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

        def sample(logprobs: mx.array) -> mx.array:
            # In transformers' order: temperature first, so that top_p and min_p see the tempered distribution.
            scores = _normalise(logprobs / self.temperature)
            if 0 < self.top_k < scores.shape[-1]:
                scores = _normalise(apply_top_k(scores, self.top_k))
            if 0 < self.top_p < 1.0:
                scores = _normalise(apply_top_p(scores, self.top_p))
            if self.min_p:
                scores = apply_min_p(scores, self.min_p)
            return mx.random.categorical(scores)

        return sample


def read_ids(ids: Any) -> np.ndarray:
    """Ids, a mask or labels as a 2-D int64 array, whatever they came as."""
    if hasattr(ids, "detach"):
        ids = ids.detach().cpu().numpy()
    array = np.asarray(ids, np.int64)
    return array[None] if array.ndim == 1 else array


def read_rows(ids: Any, mask: Any) -> list[np.ndarray]:
    """The prompts without their padding."""
    rows = read_ids(ids)
    if mask is None:
        return list(rows)
    return [row[keep.astype(bool)] for row, keep in zip(rows, read_ids(mask), strict=True)]


def like(sample: Any, array: np.ndarray) -> Any:
    """``array`` as a torch tensor where ``sample`` is one, on its device; else as it is."""
    if not hasattr(sample, "detach"):
        return array
    return sys.modules["torch"].from_numpy(array.copy()).to(sample.device)


def _normalise(scores: mx.array) -> mx.array:
    scores = scores.astype(mx.float32)
    return scores - mx.logsumexp(scores, axis=-1, keepdims=True)
