"""Preparation: what is counted and said, what TRL gets wrong, and the tokenizer's settings."""

import json

import datasets
import pytest
from byte_tokenizer import CHATML, byte_tokenizer

from hf_mlx.data.prepare import prepare, prepare_eval, prepare_tokenizer
from hf_mlx.errors import DataError, ModelError, SettingError
from hf_mlx.settings.plan import DataPlan

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
TEXTS = [{"text": "a" * size} for size in (3, 30, 60)]
PAIRS = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "x" * 40, "completion": "y"}]


def run(dataset, *, tokenizer=None, formatting_func=None, **settings):
    plan = DataPlan(**settings)
    tokenizer = tokenizer or byte_tokenizer()
    return prepare(dataset, tokenizer, plan, name="train", packing=plan.packing, formatting_func=formatting_func)


def decode(row, trained=True):
    labels = [label for label in row["labels"] if label != -100] if trained else row["input_ids"]
    return byte_tokenizer().decode(labels)


def test_every_text_ends_with_one_eos():
    rows = run([{"text": "ab"}, {"text": "cd</s>"}]).dataset
    assert [decode(row) for row in rows] == ["ab</s>", "cd</s>"]


def test_the_report_says_what_was_cut_and_dropped():
    report = run(PAIRS, max_length=20).report
    assert (report.rows, report.cut, report.dropped, report.trained) == (2, 1, 1, 2)
    assert report.describe() == (
        "train: 2 rows, 1 longer than max_length=20, 1 dropped with nothing left to train, 7.7% of 26 tokens trained"
    )


def test_the_report_of_a_packed_set_counts_rows_and_packed_rows():
    report = run(TEXTS, packing=True, max_length=40).report
    assert (report.rows, report.cut, report.packed) == (3, 1, 2)
    assert "packed into 2" in report.describe()
    assert report.tokens == 4 + 31 + 40


def test_wrapped_packing_says_that_documents_see_each_other():
    assert "across documents" in run(TEXTS, packing=True, packing_strategy="wrapped", max_length=40).report.describe()


def test_columns_that_are_not_read_stay():
    rows = [{**row, "length": number} for number, row in enumerate(PAIRS)]
    prepared = run(rows, max_length=20).dataset
    assert prepared.column_names == ["input_ids", "labels", "length"]
    assert prepared["length"][:] == [0]


def test_a_formatters_text_wins_over_the_rows_own_columns():
    """TRL ignores it for prompt or messages columns, and when dataset_text_field is not text."""
    for rows in ([{"prompt": "p", "answer": "a"}], [{"messages": [USER, ANSWER]}], [{"body": "b"}]):
        prepared = run(rows, formatting_func=lambda row: f"<{sorted(row)[0]}>", dataset_text_field="body")
        assert decode(prepared.dataset[0]).endswith("></s>")


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (TEXTS, {"completion_only_loss": True}, "completion_only_loss=True with a train dataset of 'text' rows"),
        ([{"messages": [USER, ANSWER]}], {"completion_only_loss": True}, "'messages' rows"),
        ([{"input_ids": [5, 6], "completion_mask": [0, 1]}], {}, "trains on the prompt too"),
        (TEXTS, {"assistant_only_loss": True}, "not conversational"),
        (TEXTS, {"packing": True, "max_length": None}, "max_length is the length rows are packed to"),
        (TEXTS, {"padding_free": True}, "padding_free=True without packing"),
        (TEXTS, {"max_length": 1}, "max_length=1"),
    ],
)
def test_settings_the_dataset_cannot_honour_are_refused(rows, settings, words):
    with pytest.raises(SettingError) as caught:
        run(rows, **settings)
    assert words in str(caught.value)


def test_formatting_func_on_tokenized_rows_is_not_called_and_said_once():
    report = run([{"input_ids": [5, 6]}], formatting_func=lambda row: 1 / 0).report
    assert report.describe().count("formatting_func is not called") == 1


def test_rows_of_one_token_and_of_none_are_counted():
    report = run([{"input_ids": ids} for ids in ([5, 6], [5], [], [7], [8, 9])]).report
    assert (report.rows, report.short, report.empty, report.dropped) == (5, 2, 1, 1)
    assert "2 of one token, which nothing predicts, 1 without a token, 1 dropped" in report.describe()


def test_formatting_func_is_refused_where_it_would_be_ignored():
    with pytest.raises(SettingError, match="completion_only_loss=True with a formatting_func"):
        run(PAIRS, formatting_func=str, completion_only_loss=True)


def test_a_second_bos_is_mentioned():
    report = run([{"text": "<s>twice"}], tokenizer=byte_tokenizer(bos=True)).report
    assert "BOS twice" in report.describe()


def test_a_prompt_that_merges_into_its_completion_is_mentioned():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"a": 0, "b": 1, "ab": 2, "</s>": 3, "c": 4}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    backend.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    prepared = run([{"prompt": "ca", "completion": "bc"}], tokenizer=tokenizer)
    assert prepared.dataset[0]["labels"] == [-100, 2, 4, 3]
    assert "1 rows tokenize differently" in prepared.report.describe()


def test_masks_multiply():
    row = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    assert run([row], completion_only_loss=True).dataset[0]["labels"] == [-100, 6, -100, 8]
    assert run([row], completion_only_loss=False).dataset[0]["labels"] == [5, 6, -100, 8]


def test_tools_may_be_lists_or_json():
    template = "{{ tools | tojson }}" + CHATML
    tools = [{"name": "add"}]
    rows = [run([{"messages": [USER, ANSWER], "tools": given}], tokenizer=byte_tokenizer(template)).dataset[0]
            for given in (tools, json.dumps(tools))]  # fmt: skip
    assert rows[0] == rows[1]
    assert decode(rows[0]).startswith('[{"name": "add"}]')


def test_evaluation_sets_follow_eval_packing_and_the_training_masks():
    train = run(TEXTS)
    plan = DataPlan(eval_packing=True, max_length=40)
    sets = prepare_eval({"a": PAIRS, "b": TEXTS}, byte_tokenizer(), plan, like=train)
    assert isinstance(sets, dict) and list(sets) == ["a", "b"]
    assert "seq_lengths" in sets["a"].dataset.column_names
    assert -100 not in sets["a"].dataset[0]["labels"]
    assert sets["a"].report.name == "a"


def test_a_skipped_preparation_hands_the_rows_on():
    rows = [{"input_ids": [5, 6], "labels": [-100, 6]}]
    assert run(rows, skip_prepare_dataset=True).dataset[0] == rows[0]


def test_images_are_refused_where_preparation_is_skipped_too():
    with pytest.raises(DataError, match="column 'image'"):
        run([{"input_ids": [5, 6], "image": None}], skip_prepare_dataset=True)


def test_a_transform_may_make_rows_nobody_prepares():
    made = datasets.Dataset.from_list([{"number": 5}]).with_transform(lambda batch: {"input_ids": [[5, 6]]})
    assert run(made, skip_prepare_dataset=True).dataset[0] == {"input_ids": [5, 6]}


def test_an_answer_without_an_end_is_mentioned():
    template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    rows = [{"messages": [USER, ANSWER]}]
    assert "may not learn to stop" in run(rows, tokenizer=byte_tokenizer(template)).report.describe()
    assert "may not learn to stop" not in run(rows).report.describe()


def test_an_evaluation_set_with_masks_follows_the_training_set():
    rows = [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}]
    for train, labels in ((PAIRS, [-100, 6, 7]), (TEXTS, [5, 6, 7])):
        prepared = prepare_eval(rows, byte_tokenizer(), DataPlan(), like=run(train))
        assert prepared.dataset[0]["labels"] == labels


def test_the_cache_is_found_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in TEXTS))

    def load():
        return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))

    first = run(load(), tokenizer=byte_tokenizer()).dataset
    tokenizer = byte_tokenizer()
    tokenizer("used before", truncation=True, max_length=4)  # which changes the state of a fast tokenizer
    again = run(load(), tokenizer=tokenizer).dataset
    assert first.cache_files and first.cache_files == again.cache_files
    assert run(load(), max_length=8).dataset.cache_files != first.cache_files
    assert run(load(), tokenizer=byte_tokenizer(bos=True)).dataset.cache_files != first.cache_files


def test_tokens_are_resolved_as_trl_does(tmp_path):
    tokenizer = prepare_tokenizer(byte_tokenizer(), DataPlan())
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>")
    tokenizer = prepare_tokenizer(byte_tokenizer(), DataPlan(eos_token="<|im_end|>", pad_token="<s>"))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<s>")
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    tokenizer = prepare_tokenizer(byte_tokenizer(), DataPlan(chat_template_path=str(template)))
    assert tokenizer.chat_template == template.read_text()


@pytest.mark.parametrize(
    ("tokenizer", "settings", "error", "words"),
    [
        (byte_tokenizer, {"eos_token": "<eot>"}, SettingError, "eos_token='<eot>'"),
        (byte_tokenizer, {"pad_token": "<pad>"}, SettingError, "pad_token='<pad>'"),
        (byte_tokenizer, {"chat_template_path": "org/model"}, SettingError, "the path of a tokenizer"),
        (byte_tokenizer, {"chat_template_path": "gone.jinja"}, SettingError, "does not exist"),
        (lambda: byte_tokenizer(eos=None), {}, ModelError, "no EOS token"),
        (object, {}, ModelError, "object"),
    ],
)
def test_tokenizers_that_cannot_be_used_are_refused(tokenizer, settings, error, words):
    with pytest.raises(error) as caught:
        prepare_tokenizer(tokenizer(), DataPlan(**settings))
    assert words in str(caught.value)


def test_a_stream_without_a_trained_row_is_refused():
    rows = [{"input_ids": [5, 6], "labels": [-100, -100]}]
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(DataError, match="no row has a token to train on"):
        run(stream)
