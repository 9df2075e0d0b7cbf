"""A bad row gives one error that names its index and column, before anything trains."""

from __future__ import annotations

import datasets
import pytest
from byte_tokenizer import ALTERNATING, CHATML, byte_tokenizer

from hf_mlx.data.prepare import prepare
from hf_mlx.errors import DataError, HFMLXError
from hf_mlx.settings.plan import DataPlan

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
GOOD = {
    "text": {"text": "fine"},
    "messages": {"messages": [USER, ANSWER]},
    "pair": {"prompt": "2 + 2 = ", "completion": "4"},
    "dialogue": {"prompt": [USER], "completion": [ANSWER]},
    "turns": {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello."}]},
    "tokens": {"input_ids": [5, 6, 7, 8]},
    "labelled": {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
    "masked": {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]},
    "tools": {"messages": [USER, ANSWER], "tools": '[{"name": "add"}]'},
    "kwargs": {"messages": [USER, ANSWER], "chat_template_kwargs": {"style": "short"}},
}


def messages(*turns):
    return {"messages": list(turns)}


# name: (good row, bad row, column, words of the message, settings of the plan)
ROWS = {
    "text None": ("text", {"text": None}, "text", "None", {}),
    "text of a number": ("text", {"text": 7}, "text", "7", {}),
    "text of a list": ("text", {"text": ["a", "b"]}, "text", "list", {}),
    "text of a lone surrogate": ("text", {"text": "a\ud800b"}, "text", "surrogate|utf-8", {}),
    "text of ten million characters": ("text", {"text": "x" * 10_000_000}, "text", "10,000,000", {}),
    "text of a missing column": ("text", {"body": "fine"}, "text", "missing", {}),
    "messages None": ("messages", {"messages": None}, "messages", "None", {}),
    "messages empty": ("messages", messages(), "messages", "no messages", {}),
    "messages of JSON text": ("messages", {"messages": '[{"role": "user"}]'}, "messages", "str|fit", {}),
    "messages of strings": ("messages", {"messages": ["Hi", "Hello."]}, "messages", "Hi|fit", {}),
    "content None": ("messages", messages(USER, {"role": "assistant", "content": None}), "messages", "None", {}),
    "content missing": ("messages", messages(USER, {"role": "assistant"}), "messages", "None", {}),
    "content of a number": ("messages", messages(USER, {"role": "assistant", "content": 4}), "messages", "4", {}),
    "content empty": ("messages", messages(USER, {"role": "assistant", "content": ""}), "messages", "empty", {}),
    "user turn empty": ("messages", messages({"role": "user", "content": ""}, ANSWER), "messages", "empty", {}),
    "role None": ("messages", messages(USER, {"role": None, "content": "x"}), "messages", "role", {}),
    "role empty": ("messages", messages(USER, {"role": "", "content": "x"}), "messages", "role", {}),
    "role missing": ("messages", messages({"from": "user", "value": "x"}), "messages", "role", {}),
    "assistant first": ("messages", messages(ANSWER, USER), "messages", "out of order", {}),
    "system last": ("messages", messages(USER, ANSWER, {"role": "system", "content": "x"}), "messages", "order", {}),
    "tool first": ("messages", messages({"role": "tool", "content": "x"}, USER, ANSWER), "messages", "order", {}),
    "template that raises": ("messages", messages(USER, USER, ANSWER), "messages", "must alternate", {}),
    "image part": (
        "messages",
        messages({"role": "user", "content": [{"type": "image", "url": "x.png"}]}, ANSWER),
        "messages",
        "image|fit",
        {},
    ),
    "surrogate in a message": ("messages", messages({"role": "user", "content": "\udfff"}), "messages", "surr|utf", {}),
    "no assistant turn": ("messages", messages(USER), "messages", "no assistant", {"assistant_only_loss": True}),
    "prompt None": ("pair", {"prompt": None, "completion": "4"}, "prompt", "None", {}),
    "completion None": ("pair", {"prompt": "2", "completion": None}, "completion", "None", {}),
    "completion of messages": ("pair", {"prompt": "2", "completion": [ANSWER]}, "completion", "list|fit", {}),
    "prompt of messages": ("pair", {"prompt": [USER], "completion": "4"}, "prompt", "list|fit", {}),
    "completion of text": ("dialogue", {"prompt": [USER], "completion": "Hello."}, "completion", "str|fit", {}),
    "completion without messages": ("dialogue", {"prompt": [USER], "completion": []}, "completion", "no mess", {}),
    "completion that starts with system": (
        "dialogue",
        {"prompt": [USER], "completion": [{"role": "system", "content": "x"}]},
        "completion",
        "order",
        {},
    ),
    "turns None": ("turns", {"conversations": None}, "conversations", "None", {}),
    "turns empty": ("turns", {"conversations": []}, "conversations", "no messages", {}),
    "turn without a value": (
        "turns",
        {"conversations": [{"from": "user", "value": None}]},
        "conversations",
        "None",
        {},
    ),
    "ids None": ("tokens", {"input_ids": None}, "input_ids", "None", {}),
    "ids empty": ("tokens", {"input_ids": []}, "input_ids", "no token", {"padding_free": True, "max_length": None}),
    "id outside the vocabulary": ("tokens", {"input_ids": [5, 260]}, "input_ids", "260 at position 1", {}),
    "id far outside": ("tokens", {"input_ids": [5, 2**40]}, "input_ids", "position 1", {}),
    "negative id": ("tokens", {"input_ids": [5, -1]}, "input_ids", "-1 at position 1", {}),
    "id None": ("tokens", {"input_ids": [5, None]}, "input_ids", "None", {}),
    "ids of text": ("tokens", {"input_ids": ["a", "b"]}, "input_ids", "a|fit", {}),
    "ids of fractions": ("tokens", {"input_ids": [0.5, 1.5]}, "input_ids", "0.5", {}),
    "labels of another length": ("labelled", {"input_ids": [5, 6], "labels": [5]}, "labels", "1 values for 2", {}),
    "labels outside": ("labelled", {"input_ids": [5, 6], "labels": [5, 999]}, "labels", "999", {}),
    "labels far below": ("labelled", {"input_ids": [5, 6], "labels": [-(2**40), 6]}, "labels", "position 0", {}),
    "labels None": ("labelled", {"input_ids": [5, 6], "labels": None}, "labels", "None", {}),
    "mask of another length": (
        "masked",
        {"input_ids": [5, 6, 7], "completion_mask": [0, 1]},
        "completion_mask",
        "2 values for 3",
        {"completion_only_loss": True},
    ),
    "mask of fives": (
        "masked",
        {"input_ids": [5, 6], "completion_mask": [0, 5]},
        "completion_mask",
        "5 at position 1",
        {"completion_only_loss": True},
    ),
    "tools of broken JSON": ("tools", {**GOOD["tools"], "tools": '[{"name"'}, "tools", "not JSON", {}),
    "tools of a dict": ("tools", {**GOOD["tools"], "tools": '{"name": "add"}'}, "tools", "dict", {}),
    "template kwargs of text": (
        "kwargs",
        {**GOOD["kwargs"], "chat_template_kwargs": "short"},
        "chat_template_kwargs",
        "short|fit",
        {},
    ),
}


def read(rows):
    yield from rows


def fail(dataset, template=CHATML, **settings):
    plan = DataPlan(**settings)
    with pytest.raises(HFMLXError) as caught:
        prepared = prepare(dataset, byte_tokenizer(template), plan, name="train", packing=plan.packing)
        list(prepared.dataset)  # a stream fails when it is read
    return caught.value


def test_there_are_enough_cases():
    assert len(ROWS) >= 50


@pytest.mark.parametrize("streamed", [False, True], ids=["list", "stream"])
@pytest.mark.parametrize("case", ROWS)
def test_a_bad_row_is_named(case, streamed):
    good, bad, column, words, settings = ROWS[case]
    if case == "text of a missing column" and streamed:
        bad = {"text": None}
        words = "None"
    rows = [GOOD[good], GOOD[good], bad]
    dataset = datasets.IterableDataset.from_generator(read, gen_kwargs={"rows": rows}) if streamed else rows
    template = ALTERNATING if case == "template that raises" else CHATML
    error = fail(dataset, template, **settings)
    assert isinstance(error, DataError)
    assert f"row 2 of the train dataset, column {column!r}" in str(error)
    assert any(word in str(error) for word in words.split("|"))
    assert error.remedy


def test_the_first_row_is_checked_before_any_map():
    error = fail([{"text": None}, {"text": "fine"}])
    assert "row 0 of the train dataset, column 'text'" in str(error)


def test_a_bad_row_is_named_from_a_worker_process(tmp_path):
    rows = [GOOD["text"]] * 40 + [{"text": None}] + [GOOD["text"]] * 9
    error = fail(datasets.Dataset.from_list(rows), dataset_num_proc=2)
    assert "row 40 of the train dataset" in str(error)


def test_a_formatter_that_fails_or_returns_no_text_names_the_row():
    for formatting_func, words in ((lambda row: row["gone"], "KeyError"), (lambda row: [row["body"]], "list")):
        with pytest.raises(DataError, match=f"row 0 of the train dataset, column 'formatting_func'.*{words}"):
            prepare(
                [{"body": "x"}],
                byte_tokenizer(),
                DataPlan(),
                name="train",
                packing=False,
                formatting_func=formatting_func,
            )


SETS = {
    "empty list": ([], {}, "empty"),
    "empty dataset": (datasets.Dataset.from_dict({"text": []}), {}, "empty"),
    "no known column": ([{"body": "x"}], {}, "dataset_text_field"),
    "another text field": ([{"text": "x"}], {"dataset_text_field": "body"}, "'body'"),
    "image column": ([{"text": "x", "image": "a.png"}], {}, "'image'"),
    "images column": ([{"messages": [USER, ANSWER], "images": ["a.png"]}], {}, "'images'"),
    "text and messages": ([{"text": "x", "messages": [USER, ANSWER]}], {}, "two formats"),
    "prompt and messages": ([{"prompt": "x", "messages": [USER, ANSWER]}], {}, "two formats"),
    "labels beside messages": ([{"messages": [USER, ANSWER], "labels": 3}], {}, "'labels' beside 'messages'"),
    "labels beside text": ([{"text": "x", "labels": [5]}], {}, "rename_column"),
    "a mask beside a pair": ([{**GOOD["pair"], "assistant_masks": [1]}], {}, "'assistant_masks' beside"),
    "prompt alone": ([{"prompt": "x"}], {}, "'completion'"),
    "completion alone": ([{"completion": "x"}], {}, "'prompt'"),
    "preferences": ([{"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}], {}, "preference"),
    "role turns in conversations": ([{"conversations": [USER, ANSWER]}], {}, "rename_column"),
    "all masked": ([{"input_ids": [5, 6], "labels": [-100, -100]}], {}, "no row has a token to train on"),
    "all masked, packed": ([{"input_ids": [5, 6], "labels": [-100, -100]}], {"packing": True}, "no row has a token"),
    "all cut": ([{"prompt": "x" * 50, "completion": "y"}] * 3, {"max_length": 20}, "3 of them are longer"),
    "a dict of splits": (datasets.DatasetDict(train=datasets.Dataset.from_list([{"text": "x"}])), {}, "split"),
    "a string": ("data.json", {}, "str"),
    "a list of strings": (["x", "y"], {}, "a dict of columns"),
    "a transform": (datasets.Dataset.from_list([{"text": "x"}]).with_transform(lambda b: b), {}, "transform"),
    "masks without labels, unprepared": (
        [{"input_ids": [5, 6], "completion_mask": [0, 1]}],
        {"skip_prepare_dataset": True},
        "labels",
    ),
}


@pytest.mark.parametrize("case", SETS)
def test_a_set_that_cannot_train_is_refused(case):
    dataset, settings, words = SETS[case]
    error = fail(dataset, **settings)
    assert isinstance(error, DataError)
    assert words in str(error)
    assert len(SETS) == 23
