"""Row for row what trl's SFTTrainer trains on: formats and options on real rows."""

from __future__ import annotations

import json
from functools import cache

import materials
import pytest
from datasets import Dataset
from row_tokenizers import ALTERNATING, CHATML, MARKED, STYLED, bpe, smollm2, trl_template
from sampling import sampled
from trl_rows import compare_rows, our_rows, trl_trainer


def format_problem(row):
    return f"### Task\n{row['task']}\n### Answer\n{row['answer']}"


@cache
def problems() -> Dataset:
    return Dataset.from_list(materials.human_eval())


def texts(field="text") -> Dataset:
    return Dataset.from_list([{field: row["prompt"] + row["completion"]} for row in materials.human_eval()])


def closed_texts() -> Dataset:
    """Half of the texts end with EOS already."""
    rows = [row["completion"] for row in materials.human_eval()]
    return Dataset.from_list([{"text": text + "</s>" * (number % 2)} for number, text in enumerate(rows)])


def dialogues(language="english") -> Dataset:
    return Dataset.from_list(materials.dialogues(language)[:200])


def long_dialogues() -> Dataset:
    rows = materials.dialogues()[:240]
    return Dataset.from_list(
        [{"messages": [message for row in rows[i : i + 4] for message in row["messages"]]} for i in range(0, 240, 4)]
    )


def system_dialogues() -> Dataset:
    system = {"role": "system", "content": "Answer briefly."}
    return Dataset.from_list([{"messages": [system, *row["messages"]]} for row in materials.dialogues()[:100]])


def turns() -> Dataset:
    rows = [
        [{"from": m["role"], "value": m["content"]} for m in row["messages"]] for row in materials.dialogues()[:100]
    ]
    return Dataset.from_list([{"conversations": row, "source": "chatterbot"} for row in rows])


def split_dialogues() -> Dataset:
    rows = [row["messages"] for row in materials.dialogues()[:120]]
    return Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])


def split_long() -> Dataset:
    rows = [row["messages"] for row in long_dialogues()]
    return Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])


def answered_tools(as_json=False) -> Dataset:
    rows = []
    for row in materials.tool_questions()[:80]:
        tools = json.dumps(row["tools"]) if as_json else row["tools"]
        answer = {"role": "assistant", "content": json.dumps(row["answer"])}
        rows.append({"messages": [*row["messages"], answer], "tools": tools})
    return Dataset.from_list(rows)


def called_tools() -> Dataset:
    rows = []
    for row in materials.tool_questions()[:60]:
        ((name, arguments),) = row["answer"][0].items()
        call = {"type": "function", "function": {"name": name, "arguments": {"json": json.dumps(arguments)}}}
        said = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "content": "42"}
        last = {"role": "assistant", "content": "The result is 42."}
        rows.append({"messages": [*row["messages"], said, result, last], "tools": json.dumps(row["tools"])})
    return Dataset.from_list(rows)


def styled() -> Dataset:
    rows = materials.dialogues()[:60]
    return Dataset.from_list(
        [{**row, "chat_template_kwargs": {"style": f"Style {number % 3}"}} for number, row in enumerate(rows)]
    )


def split_tools() -> Dataset:
    rows = materials.tool_questions()[:60]
    return Dataset.from_list(
        [
            {
                "prompt": row["messages"],
                "completion": [{"role": "assistant", "content": json.dumps(row["answer"])}],
                "tools": json.dumps(row["tools"]),
            }
            for row in rows
        ]
    )


def tokens(*extra) -> Dataset:
    tokenizer, rows = bpe(), []
    for number, row in enumerate(materials.human_eval()):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        half = len(ids) // 2
        mask = [0] * half + [1] * (len(ids) - half)
        columns = {
            "labels": [-100] * half + ids[half:],
            "completion_mask": mask,
            "assistant_masks": [bit * (place % 3 > 0) for place, bit in enumerate(mask)],
        }
        rows.append({"input_ids": ids, **{name: columns[name] for name in extra}, "number": number})
    return Dataset.from_list(rows)


def raw_problems() -> Dataset:
    return Dataset.from_list([{"task": r["prompt"], "answer": r["completion"]} for r in materials.human_eval()])


QWEN25, QWEN3 = trl_template("qwen2_5"), trl_template("qwen3")
CASES = {
    # text
    "text": (texts, bpe, {}),
    "text bos": (texts, lambda: bpe(bos=True), {}),
    "text smollm2": (texts, smollm2, {}),
    "text field": (lambda: texts("body"), bpe, {"dataset_text_field": "body"}),
    "text closed": (closed_texts, bpe, {}),
    "text eos": (texts, bpe, {"eos_token": "<|im_end|>"}),
    "text cut": (texts, bpe, {"max_length": 100}),
    "text cut keep_end": (texts, bpe, {"max_length": 100, "truncation_mode": "keep_end"}),
    "text unlimited": (texts, bpe, {"max_length": None}),
    "text shuffled": (texts, bpe, {"shuffle_dataset": True, "seed": 7}),
    "text two processes": (texts, bpe, {"dataset_num_proc": 2}),
    "text indices": (lambda: texts().shuffle(seed=1).select(range(50)), bpe, {"max_length": 64}),
    "text padding free": (texts, bpe, {"padding_free": True, "max_length": None}),
    "formatting": (raw_problems, bpe, {"formatting_func": format_problem}),
    "formatting bfd": (raw_problems, bpe, {"formatting_func": format_problem, "packing": True, "max_length": 512}),
    # packing
    "bfd": (texts, bpe, {"packing": True, "max_length": 256}),
    "bfd short": (lambda: texts(), bpe, {"packing": True, "max_length": 48}),
    "bfd long": (texts, lambda: bpe(bos=True), {"packing": True, "max_length": 4096}),
    "bfd_split": (texts, bpe, {"packing": True, "packing_strategy": "bfd_split", "max_length": 128}),
    "wrapped": (texts, bpe, {"packing": True, "packing_strategy": "wrapped", "max_length": 200}),
    "bfd shuffled": (texts, bpe, {"packing": True, "max_length": 300, "shuffle_dataset": True, "seed": 3}),
    "wrapped shuffled": (
        texts, bpe, {"packing": True, "packing_strategy": "wrapped", "max_length": 300, "shuffle_dataset": True}
    ),
    "bfd two processes": (texts, bpe, {"packing": True, "max_length": 300, "dataset_num_proc": 2}),
    "bfd_split two processes": (
        texts, bpe, {"packing": True, "packing_strategy": "bfd_split", "max_length": 90, "dataset_num_proc": 2}
    ),
    "bfd dialogues": (dialogues, lambda: bpe(CHATML), {"packing": True, "max_length": 128}),
    "bfd pairs": (problems, bpe, {"packing": True, "max_length": 512}),
    "bfd_split pairs": (problems, bpe, {"packing": True, "packing_strategy": "bfd_split", "max_length": 100}),
    "wrapped assistant": (
        long_dialogues, lambda: bpe(MARKED),
        {"packing": True, "packing_strategy": "wrapped", "max_length": 100, "assistant_only_loss": True},
    ),
    # messages
    "messages chatml": (dialogues, lambda: bpe(CHATML), {}),
    "messages smollm2": (dialogues, smollm2, {}),
    "messages long cut": (long_dialogues, lambda: bpe(CHATML), {"max_length": 60}),
    "messages spanish": (lambda: dialogues("spanish"), smollm2, {}),
    "messages persian": (lambda: dialogues("persian"), lambda: bpe(CHATML, bos=True), {}),
    "messages japanese": (lambda: dialogues("japanese"), smollm2, {"max_length": 40}),
    "messages system": (system_dialogues, lambda: bpe(QWEN25), {}),
    "messages alternating": (dialogues, lambda: bpe(ALTERNATING), {}),
    "messages qwen3": (long_dialogues, lambda: bpe(QWEN3), {}),
    "messages llama3": (dialogues, lambda: bpe(trl_template("llama3")), {}),
    "messages gemma": (dialogues, lambda: bpe(trl_template("gemma3"), bos=True), {}),
    "conversations": (turns, lambda: bpe(CHATML), {}),
    "conversations smollm2 bfd": (turns, smollm2, {"packing": True, "max_length": 100}),
    "kwargs": (styled, lambda: bpe(STYLED), {}),
    "tools list": (answered_tools, lambda: bpe(QWEN25), {}),
    "tools json": (lambda: answered_tools(as_json=True), lambda: bpe(QWEN25), {}),
    "tools calls qwen25": (called_tools, lambda: bpe(QWEN25), {}),
    "tools calls qwen3": (called_tools, lambda: bpe(QWEN3), {"max_length": 2048}),
    # assistant masks from the template's own markers
    "assistant marked": (dialogues, lambda: bpe(MARKED), {"assistant_only_loss": True}),
    "assistant marked bfd": (
        long_dialogues, lambda: bpe(MARKED), {"assistant_only_loss": True, "packing": True, "max_length": 150}
    ),
    "assistant marked tools": (answered_tools, lambda: bpe(MARKED), {"assistant_only_loss": True, "max_length": 4096}),
    "assistant pairs": (split_dialogues, lambda: bpe(MARKED), {"assistant_only_loss": True}),
    "assistant pairs whole": (
        split_long, lambda: bpe(MARKED), {"assistant_only_loss": True, "completion_only_loss": False}
    ),
    # prompt and completion
    "pairs": (problems, bpe, {}),
    "pairs bos": (problems, lambda: bpe(bos=True), {}),
    "pairs smollm2": (problems, smollm2, {}),
    "pairs whole": (problems, bpe, {"completion_only_loss": False}),
    "pairs explicit": (problems, bpe, {"completion_only_loss": True}),
    "pairs cut drops": (problems, bpe, {"max_length": 90}),
    "pairs cut keep_end": (problems, bpe, {"max_length": 90, "truncation_mode": "keep_end"}),
    "pairs unlimited": (problems, bpe, {"max_length": None}),
    "pairs eos": (problems, bpe, {"eos_token": "<|eot_id|>"}),
    "pairs messages": (split_dialogues, lambda: bpe(CHATML), {}),
    "pairs messages smollm2": (split_dialogues, smollm2, {}),
    "pairs messages qwen3": (split_long, lambda: bpe(QWEN3), {}),
    "pairs messages whole": (split_dialogues, lambda: bpe(CHATML), {"completion_only_loss": False}),
    "pairs messages cut": (split_long, lambda: bpe(CHATML), {"max_length": 180}),
    "pairs tools": (split_tools, lambda: bpe(QWEN25), {}),
    # tokenized
    "tokens": (tokens, bpe, {}),
    "tokens labels": (lambda: tokens("labels"), bpe, {"max_length": 150}),
    "tokens completion mask": (lambda: tokens("completion_mask"), bpe, {"completion_only_loss": True}),
    "tokens completion mask off": (lambda: tokens("completion_mask"), bpe, {"completion_only_loss": False}),
    "tokens assistant masks": (lambda: tokens("assistant_masks"), bpe, {"max_length": 99}),
    "tokens both masks": (
        lambda: tokens("completion_mask", "assistant_masks"), bpe, {"completion_only_loss": True}
    ),
    "tokens labels bfd": (lambda: tokens("labels"), bpe, {"packing": True, "max_length": 256}),
}  # fmt: skip


def test_there_are_enough_cases():
    assert len(CASES) >= 60


FEW = (
    "text", "text bos", "text field", "text closed", "text eos", "text cut keep_end", "text shuffled",
    "text two processes", "text indices", "text padding free", "formatting", "formatting bfd", "bfd", "bfd_split",
    "wrapped", "bfd_split two processes", "bfd dialogues", "bfd_split pairs", "wrapped assistant", "messages chatml",
    "messages smollm2", "messages persian", "messages system", "messages alternating", "messages qwen3",
    "messages gemma", "conversations", "kwargs", "tools json", "tools calls qwen25", "assistant marked bfd",
    "assistant marked tools", "assistant pairs whole", "pairs", "pairs bos", "pairs whole", "pairs cut keep_end",
    "pairs eos", "pairs messages qwen3", "pairs messages cut", "pairs tools", "tokens labels",
    "tokens completion mask off", "tokens both masks", "tokens labels bfd",
)  # fmt: skip


@pytest.mark.parametrize("case", sampled(CASES, *FEW))
def test_rows_equal_trl(case):
    make_dataset, make_tokenizer, settings = CASES[case]
    tokenizer = make_tokenizer()
    theirs = trl_trainer(make_dataset(), tokenizer, **settings).train_dataset
    ours = our_rows(make_dataset(), tokenizer, **settings)
    count = compare_rows(ours.dataset, theirs)
    assert count >= 5
    assert ours.report.rows is not None and "rows" in ours.report.describe()
