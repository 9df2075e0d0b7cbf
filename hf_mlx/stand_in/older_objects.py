"""Functions and classes that trl and transformers had, as they were; imported when a script asks for one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Features, IterableDataset, Sequence, Value
from transformers import DataCollatorForLanguageModeling

from ..errors import SettingError

_CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


SIMPLE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{message['role'].capitalize() + ': ' + message['content'] + '\n\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SIMPLE_SFT_CHAT_TEMPLATE = "{% for message in messages %}{{' ' + message['content']}}{% endfor %}{{ eos_token }}"


@dataclass
class ChatMlSpecialTokens:
    """ChatML's tokens and template, as ``trl.models.utils`` had them."""

    bos_token: str = "<|im_start|>"
    eos_token: str = "<|im_end|>"
    pad_token: str = "<|im_end|>"
    chat_template: str = _CHATML


def setup_chat_format(
    model: Any, tokenizer: Any, format: str = "chatml", resize_to_multiple_of: int | None = None
) -> tuple[Any, Any]:
    """Give a base model ChatML's tokens and template, and rows for the tokens.

    Source: trl 0.25 ``setup_chat_format``.

    Raises:
        ValueError: The tokenizer has a template already.
        SettingError: Another format than ChatML, the only one there was.
    """
    if tokenizer.chat_template is not None:
        raise ValueError(
            "Chat template is already added to the tokenizer. If you want to overwrite it, please set it to None"
        )
    if format != "chatml":
        raise SettingError(f"setup_chat_format(format={format!r})", "chatml", 'write format="chatml"')
    chat = ChatMlSpecialTokens()
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token = chat.eos_token, chat.pad_token, chat.bos_token
    tokenizer.add_special_tokens({"additional_special_tokens": [chat.bos_token, chat.eos_token]})
    tokenizer.chat_template = chat.chat_template
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=resize_to_multiple_of)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


class DataCollatorForCompletionOnlyLM(DataCollatorForLanguageModeling):
    """Trains on what follows ``response_template``, and with ``instruction_template`` on each answer of a conversation.

    Source: trl 0.19. The last response template of a row counts where there is no instruction template.

    Args:
        response_template: Text, or its token ids, after which an answer begins.
        instruction_template: Likewise for a question.
        ignore_index: The label of what is not trained on.
        padding_free: Not supported.
    """

    def __init__(
        self,
        response_template: str | list[int],
        instruction_template: str | list[int] | None = None,
        *args: Any,
        mlm: bool = False,
        ignore_index: int = -100,
        padding_free: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, mlm=mlm, **kwargs)
        if padding_free:
            raise SettingError(
                "DataCollatorForCompletionOnlyLM(padding_free=True)", "padded rows", "SFTConfig(padding_free=True)"
            )
        self.response_template, self.instruction_template = response_template, instruction_template
        self.response_token_ids = self._encode(response_template)
        self.instruction_token_ids = None if instruction_template is None else self._encode(instruction_template)
        self.ignore_index = ignore_index

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """A batch of padded rows whose labels are the answers'."""
        # Rows come with their own labels today, which would not be padded.
        kept = [
            {name: row[name] for name in ("input_ids", "attention_mask") if name in row}
            if hasattr(row, "keys")
            else row
            for row in examples
        ]
        batch = super().torch_call(kept)
        for labels in batch["labels"]:
            self._ignore(labels)
        return batch

    def _encode(self, template: str | list[int]) -> list[int]:
        return self.tokenizer.encode(template, add_special_tokens=False) if isinstance(template, str) else template

    def _ignore(self, labels: torch.Tensor) -> None:
        answers = [start + len(self.response_token_ids) for start in _find(labels, self.response_token_ids)]
        if self.instruction_token_ids is None:
            labels[: answers[-1] if answers else len(labels)] = self.ignore_index
            return
        questions = _find(labels, self.instruction_token_ids)
        if not answers or not questions:
            labels[:] = self.ignore_index
            return
        if questions[0] > answers[0]:
            questions = [0, *questions]
        # As trl pairs them; what precedes the first answer is a question whatever it is.
        for index, (question, answer) in enumerate(zip(questions, answers, strict=False)):
            labels[question if index else 0 : answer] = self.ignore_index
        if len(answers) < len(questions):
            labels[questions[-1] :] = self.ignore_index


def _find(labels: torch.Tensor, ids: list[int]) -> list[int]:
    row = labels.tolist()
    return [at for at in range(len(row)) if row[at : at + len(ids)] == ids]


def ConstantLengthDataset(
    tokenizer: Any,
    dataset: Any,
    dataset_text_field: str | None = None,
    formatting_func: Callable | None = None,
    infinite: bool = False,
    seq_length: int = 1024,
    num_of_sequences: int = 1024,
    chars_per_token: float = 3.6,
    eos_token_id: int = 0,
    shuffle: bool = True,
    append_concat_token: bool = True,
    add_special_tokens: bool = True,
) -> IterableDataset:
    """Texts, tokenized, joined by EOS and cut into equal pieces, as a stream of ``input_ids``.

    Source: trl 0.19 ``ConstantLengthDataset``; the labels are the ids, which is what training makes of them anyway.
    """
    if formatting_func is not None:
        to_text = formatting_func
    else:

        def to_text(row: Any) -> str:
            return row[dataset_text_field or "text"]

    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else eos_token_id

    def texts() -> Iterator[str]:
        while True:
            for row in dataset:
                yield to_text(row)
            if not infinite:
                return

    def pieces() -> Iterator[dict[str, list[int]]]:
        source, more = texts(), True
        while more:
            buffer: list[str] = []
            size = 0
            while size < seq_length * chars_per_token * num_of_sequences:
                text = next(source, None)
                if text is None:
                    more = False
                    break
                buffer.append(text)
                size += len(text)
            if shuffle:
                random.shuffle(buffer)
            encoded = tokenizer(buffer, add_special_tokens=add_special_tokens, truncation=False) if buffer else {}
            ids = [
                token
                for row in encoded.get("input_ids", [])
                for token in (*row, *([end] if append_concat_token else []))
            ]
            cut = [ids[at : at + seq_length] for at in range(0, len(ids), seq_length)]
            whole = [piece for piece in cut if len(piece) == seq_length]
            if shuffle:
                random.shuffle(whole)
            yield from ({"input_ids": piece} for piece in whole)

    return IterableDataset.from_generator(pieces, features=Features({"input_ids": Sequence(Value("int64"))}))


def get_kbit_device_map() -> dict[str, int] | None:
    """Where a quantised model belongs: trl names the CUDA device, and there is none."""
    return None


def peft_module_casting_to_bf16(model: Any) -> None:
    """Nothing: the precision of what trains is settled by the trainer."""


@dataclass
class SFTScriptArguments:
    """What trl's scripts of 0.8 to 0.11 added to a training configuration."""

    dataset_name: str = field(default="timdettmers/openassistant-guanaco", metadata={"help": "the dataset name"})
    dataset_text_field: str | None = field(default=None, metadata={"help": "the text field of the dataset"})
    dataset_train_split: str = field(default="train", metadata={"help": "the split to train on"})
    dataset_test_split: str = field(default="test", metadata={"help": "the split to evaluate on"})
    gradient_checkpointing_use_reentrant: bool = field(default=False, metadata={"help": "use_reentrant"})


def get_formatting_func_from_dataset(dataset: Any, tokenizer: Any) -> Callable | None:
    """A function that writes chat rows or instruction rows with the tokenizer's template; None for other rows.

    Source: trl 0.19 ``trl.extras.dataset_formatting``.
    """
    columns = dataset.column_names or []
    for name in ("messages", "conversations"):
        if name in columns:
            return conversations_formatting_function(tokenizer, name)
    return instructions_formatting_function(tokenizer) if {"prompt", "completion"} <= set(columns) else None


@dataclass
class SftScriptArguments(SFTScriptArguments):
    """What trl's script of 0.8 added, which then passed it on to the trainer."""

    dataset_text_field: str | None = field(default="text", metadata={"help": "the text field of the dataset"})
    dataset_train_name: str = field(default="train", metadata={"help": "the name of the training set"})
    dataset_test_name: str = field(default="test", metadata={"help": "the name of the evaluation set"})
    max_seq_length: int = field(default=512, metadata={"help": "the maximum sequence length"})
    packing: bool = field(default=False, metadata={"help": "whether to pack rows"})
    config: str | None = field(default=None, metadata={"help": "path to a config file"})


def conversations_formatting_function(tokenizer: Any, messages_field: str, tools: list | None = None) -> Callable:
    """A function that writes the messages of a row, or a list of texts for a batch of them.

    Source: trl 0.26.
    """

    def write(row: Any) -> Any:
        found = row[messages_field]
        if isinstance(found[0], list):
            return [tokenizer.apply_chat_template(messages, tokenize=False, tools=tools) for messages in found]
        return tokenizer.apply_chat_template(found, tokenize=False, tools=tools)

    return write


def instructions_formatting_function(tokenizer: Any) -> Callable:
    """Likewise for rows of prompt and completion."""

    def turns(prompt: str, completion: str) -> str:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    def write(row: Any) -> Any:
        if isinstance(row["prompt"], list):
            return [turns(*pair) for pair in zip(row["prompt"], row["completion"], strict=True)]
        return turns(row["prompt"], row["completion"])

    return write


class AdamW(torch.optim.AdamW):
    """``transformers.AdamW``: torch's, with its own defaults."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
    ) -> None:
        if not correct_bias:
            raise SettingError(
                "AdamW(correct_bias=False)", "the corrected bias of torch's AdamW", "write correct_bias=True"
            )
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
