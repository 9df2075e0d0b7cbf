"""Whole models as GGUF: transformers' own reader computes the same logits and reads the same tokenizer."""

import json
import warnings

import gguf
import numpy as np
import pytest
import torch
from adapter_pairs import adapt_mlx, load_mlx, make_base
from pairs import text_rows, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_mlx.adapters.export import export_adapter
from hf_mlx.adapters.gguf_model import TYPES, write_gguf_model
from hf_mlx.adapters.gguf_vocabulary import _LLAMA3, _NAMES
from hf_mlx.cli.main import main
from hf_mlx.errors import ModelError

pytestmark = pytest.mark.usefixtures("uncompiled")

TEXT = "Add 12345 and 67; don't say it's café or naïve.\n\n  Then: done!"
IDS = torch.arange(5, 29)[None]


def splitters():
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made = {
        "gpt-2": level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]),
    }
    for pattern, name in _NAMES.items():
        made[name] = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bare])
    return made


def give_tokenizer(folder, pre, **options):
    special = ["<s>", "</s>", "<pad>", "<|im_start|>"]
    bpe = Tokenizer(models.BPE(**options))
    bpe.pre_tokenizer = pre
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([row["text"] for row in text_rows(60)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made.save_pretrained(folder)
    return made


def read_back(path, config=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"gguf_file": path.name, "dtype": torch.float32} | ({"config": config} if config else {})
        return AutoModelForCausalLM.from_pretrained(path.parent, **options).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_transformers_own_reader_computes_the_same(model_type, dtype, tmp_path):
    # Its reader knows no head_dim of Qwen 3's but the default.
    options = {"sliding_window": None} if model_type == "mistral" else {}
    options |= {"head_dim": 24} if model_type == "qwen3" else {}
    base = tiny_model(model_type, tmp_path / "base", dtype=dtype, **options)
    give_tokenizer(base, splitters()["qwen2" if "qwen" in model_type else "smollm"])
    path = write_gguf_model(base, tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    config = AutoConfig.from_pretrained(base) if model_type == "qwen3" else None
    ours = read_back(path, config)
    # The same bits in the same places: sums of one order.
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-6)
    kinds = {one.tensor_type.name for one in gguf.GGUFReader(path).tensors if len(one.shape) > 1}
    assert kinds == {{"float32": "F32", "bfloat16": "BF16"}[dtype]}
    wanted, found = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert found.get_vocab().items() >= wanted.get_vocab().items()
    assert found.eos_token_id == wanted.eos_token_id and found.chat_template == wanted.chat_template


@pytest.mark.parametrize("pre", sorted(splitters()))
def test_the_way_of_splitting_text_has_llama_cpps_name(pre, tmp_path):
    base = tiny_model("llama", tmp_path / "base")
    tokenizer = give_tokenizer(base, splitters()[pre])
    fields = gguf.GGUFReader(write_gguf_model(base, tmp_path / "model.gguf")).fields
    assert fields["tokenizer.ggml.pre"].contents() == pre
    assert fields["tokenizer.ggml.model"].contents() == "gpt2"
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    size = AutoConfig.from_pretrained(base).vocab_size
    assert len(tokens) == len(types) == size
    # What the file says, put together by hand, splits text as the tokenizer does.
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    again = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    again.pre_tokenizer = splitters()[pre]
    assert again.encode(TEXT).ids == tokenizer(TEXT).input_ids
    control = [index for index, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    assert control == sorted(tokenizer.added_tokens_decoder)
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id


def test_llama_3s_frequencies_are_divided_as_transformers_does(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    base = tiny_model("llama", tmp_path / "base", rope_theta=5000.0, rope_parameters=rope, head_dim=32)
    give_tokenizer(base, splitters()["llama-bpe"])
    reader = gguf.GGUFReader(write_gguf_model(base, tmp_path / "model.gguf"))
    (factors,) = [one.data for one in reader.tensors if one.name == "rope_freqs.weight"]
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(base), "cpu")
    plain = 5000.0 ** -(np.arange(0, 32, 2) / 32)
    assert len(set(np.round(factors, 4))) > 2
    np.testing.assert_allclose(plain / factors, wanted.numpy(), rtol=1e-5)
    assert reader.fields["llama.rope.freq_base"].contents() == 5000.0


def test_commands_write_a_merged_adapter_and_a_whole_model(tmp_path, capsys):
    base = tiny_model("llama", tmp_path / "base", tie_word_embeddings=True)
    give_tokenizer(base, splitters()["smollm"])
    adapter = adapt_mlx(load_mlx(base), {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
    export_adapter(adapter, tmp_path / "adapter", base=str(base))
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged.gguf")]) == 0
    assert main(["export", str(tmp_path / "merged"), str(tmp_path / "again.gguf"), "--format", "gguf"]) == 0
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    plain = logits(AutoModelForCausalLM.from_pretrained(base).eval())
    assert (theirs - plain).abs().max() > 1e-2
    for name in ("merged.gguf", "again.gguf"):
        torch.testing.assert_close(logits(read_back(tmp_path / name)), theirs, rtol=0, atol=1e-6)
    assert "output.weight" not in {one.name for one in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    assert sorted(one.name for one in tmp_path.iterdir()) == ["adapter", "again.gguf", "base", "merged", "merged.gguf"]
    assert "the model in" in capsys.readouterr().out


def edit(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


REFUSED = {
    "type": (lambda f: make_base("olmo2", f), "model type 'olmo2'"),
    "rope": (edit("config.json", rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}), "'yarn'"),
    "quantised": (edit("config.json", quantization={"bits": 4, "group_size": 64}), "quantised weights"),
    "splitting": (edit("tokenizer.json", pre_tokenizer={"type": "Whitespace"}), "splits text by Whitespace"),
    "normalizer": (edit("tokenizer.json", normalizer={"type": "Lowercase"}), "rewrites text"),
    "unigram": (edit("tokenizer.json", model={"type": "Unigram", "vocab": []}), "'Unigram'"),
    "sentencepiece": (edit("tokenizer.json", model={"type": "BPE", "byte_fallback": True}), "SentencePiece"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_by_name_and_nothing_is_written(case, tmp_path):
    change, message = REFUSED[case]
    base = tiny_model("llama", tmp_path / "base")
    give_tokenizer(base, splitters()["gpt-2"])
    change(base)
    with pytest.raises(ModelError, match=message) as refused:
        write_gguf_model(base, tmp_path / "model.gguf")
    assert "convert_hf_to_gguf.py" in refused.value.remedy or "hf-mlx merge" in refused.value.remedy
    assert sorted(one.name for one in tmp_path.iterdir()) == ["base"]


def test_a_window_is_refused(tmp_path):
    base = tiny_model("mistral", tmp_path / "base", sliding_window=8)
    with pytest.raises(ModelError, match="sliding_window=8"):
        write_gguf_model(base, tmp_path / "model.gguf")


def test_the_table_of_patterns_is_llama_3s():
    assert len(_NAMES) == 2 and _LLAMA3 in _NAMES
