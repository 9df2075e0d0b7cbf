"""Streams, evaluation sets and batches: the same as trl's, row by row and array by array."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from row_tokenizers import CHATML, MARKED, bpe
from sampling import sampled
from test_rows_formats import dialogues, format_problem, problems, raw_problems, texts, tokens
from trl_rows import compare_rows, our_eval, our_rows, trl_trainer

from hf_mlx.data.collate import collate, convert_batch
from hf_mlx.errors import DataError

PACK = {"packing": True, "max_length": 256}
STREAMS = {
    "text": (texts, bpe, {}),
    "text cut": (texts, bpe, {"max_length": 80}),
    "text shuffled": (texts, bpe, {"shuffle_dataset": True, "seed": 5}),
    "formatting": (raw_problems, bpe, {"formatting_func": format_problem}),
    "pairs": (problems, bpe, {"max_length": 90}),
    "pairs unlimited": (problems, bpe, {"max_length": None}),
    "messages": (dialogues, lambda: bpe(CHATML), {}),
    "assistant": (dialogues, lambda: bpe(MARKED), {"assistant_only_loss": True}),
    "tokens": (lambda: tokens("labels"), bpe, {"max_length": 100}),
    "bfd": (texts, bpe, PACK),
    "bfd pairs": (problems, bpe, PACK),
    "bfd_split": (texts, bpe, {**PACK, "packing_strategy": "bfd_split", "max_length": 100}),
    "wrapped": (texts, bpe, {**PACK, "packing_strategy": "wrapped"}),
    "bfd shuffled": (texts, bpe, {**PACK, "shuffle_dataset": True, "seed": 9}),
}


def read(rows):
    yield from rows


FEW = ("text shuffled", "formatting", "assistant", "tokens", "bfd pairs", "wrapped")


@pytest.mark.parametrize("source", ["to_iterable", "generator"])
@pytest.mark.parametrize("case", sampled(STREAMS, *FEW))
def test_streams_equal_trl(case, source):
    make_dataset, make_tokenizer, settings = STREAMS[case]

    def stream():
        rows = make_dataset()
        if source == "to_iterable":
            return rows.to_iterable_dataset(num_shards=3)
        return IterableDataset.from_generator(read, gen_kwargs={"rows": rows.to_list()})

    tokenizer = make_tokenizer()
    theirs = trl_trainer(stream(), tokenizer, **settings).train_dataset
    ours = our_rows(stream(), tokenizer, **settings)
    assert compare_rows(ours.dataset, theirs) >= 5
    assert "streamed" in ours.report.describe()


@pytest.mark.parametrize("strategy", sampled(["bfd", "bfd_split", "wrapped"], "bfd_split"))
def test_packing_of_many_batches_equals_trl(strategy):
    rows = Dataset.from_list([row for _ in range(3) for row in texts().to_list()] * 5)
    rows = rows.shuffle(seed=0)
    assert len(rows) > 2000
    settings = {"packing": True, "packing_strategy": strategy, "max_length": 150}
    theirs = trl_trainer(rows, bpe(), **settings).train_dataset
    assert compare_rows(our_rows(rows, bpe(), **settings).dataset, theirs) > 1000


PACKINGS = [{}, {"packing": True}, {"packing": True, "eval_packing": False}, {"eval_packing": True}]


@pytest.mark.parametrize("settings", sampled(PACKINGS, *PACKINGS[2:]))
def test_a_dict_of_evaluation_sets_equals_trl(settings):
    settings = {"max_length": 128, **settings}
    sets = {"code": problems(), "prose": texts(), "chat": dialogues()}
    tokenizer = bpe(CHATML)
    trainer = trl_trainer(problems(), tokenizer, eval_dataset=sets, **settings)
    ours = our_rows(problems(), tokenizer, **settings)
    prepared = our_eval(sets, tokenizer, ours, **settings)
    assert list(prepared) == list(sets)
    counts = [compare_rows(prepared[name].dataset, trainer.eval_dataset[name]) for name in sets]
    assert min(counts) >= 5


def test_evaluation_follows_the_training_sets_masking():
    """trl decides completion_only_loss once, on the training set."""
    trainer = trl_trainer(texts(), bpe(), eval_dataset=problems())
    prepared = our_eval(problems(), bpe(), our_rows(texts(), bpe()))
    assert compare_rows(prepared.dataset, trainer.eval_dataset) == 164


def test_lists_of_dicts_equal_datasets():
    ours = our_rows(problems().to_list(), bpe())
    assert compare_rows(ours.dataset, our_rows(problems(), bpe()).dataset) == 164


BATCHES = {
    "padded": {},
    "padded to 8": {"pad_to_multiple_of": 8},
    "pairs": {"max_length": 150},
    "bfd": {"packing": True, "max_length": 256},
    "bfd to 64": {"packing": True, "max_length": 250, "pad_to_multiple_of": 64},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 100},
    "padding free": {"padding_free": True, "max_length": None},
    "padding free to 128": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 128},
}


@pytest.mark.parametrize(
    "case", sampled(BATCHES, "padded to 8", "pairs", "bfd to 64", "wrapped", "padding free to 128")
)
def test_batches_equal_trls_collator(case):
    settings = BATCHES[case]
    trainer = trl_trainer(problems(), bpe(), **settings)
    ours = our_rows(problems(), bpe(), **{k: v for k, v in settings.items() if k != "pad_to_multiple_of"})
    rows = trainer.train_dataset
    seen = 0
    for start in range(0, len(rows) - 3, 4):
        picked = [rows[index] for index in range(start, start + 4)]
        theirs = trainer.data_collator(picked)
        batch = collate(
            [ours.dataset[index] for index in range(start, start + 4)],
            pad_token_id=trainer.processing_class.pad_token_id,
            padding_free=ours.padding_free,
            pad_to_multiple_of=settings.get("pad_to_multiple_of"),
        )
        np.testing.assert_array_equal(batch.input_ids, theirs["input_ids"])
        np.testing.assert_array_equal(batch.labels, theirs["labels"])
        if "attention_mask" in theirs:
            assert batch.num_tokens == int(theirs["attention_mask"].sum())
            assert batch.segments is None
        else:
            assert batch.num_tokens == theirs["position_ids"].shape[1]
            real = int(batch.lengths[0])
            np.testing.assert_array_equal(batch.segments[0, :real], theirs["seq_idx"][0, :real])
        assert batch.num_items == int((theirs["labels"][:, 1:] != -100).sum())
        if "128" not in case and "64" not in case:
            again = convert_batch(theirs)
            np.testing.assert_array_equal(again.labels, batch.labels)
            assert (again.num_tokens, again.num_items) == (batch.num_tokens, batch.num_items)
            assert (again.segments is None) == (batch.segments is None)
        seen += 1
    assert seen >= 5


def test_a_transformers_collator_converts():
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

    rows = [{"input_ids": list(ids)} for ids in our_rows(problems(), bpe()).dataset[:4]["input_ids"]]
    tokenizer = bpe(pad="<unk>")
    tokenizer.padding_side = "right"
    batch = convert_batch(DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows))
    assert batch.num_items == sum(len(row["input_ids"]) - 1 for row in rows)
    flat = convert_batch(DataCollatorWithFlattening()(rows))
    assert flat.shape[0] == 1 and flat.num_items == batch.num_items
    assert sorted(set(flat.segments[0].tolist())) == [0, 1, 2, 3]
    tokenizer.padding_side = "left"
    with pytest.raises(DataError, match="left"):
        convert_batch(DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows))
