"""The assistant's turns, read off the text of templates without markers."""

import pytest

from hf_mlx.data.families import FAMILIES, find_turns, has_markers, match_family, rewrite_template

# family: (template source that identifies it, rendered text, the trained stretches)
TEXTS = {
    "Mistral": ("[INST] [/INST]", "<s>[INST] a [/INST] b</s>[INST] c [/INST] d</s>", [" b</s>", " d</s>"]),
    "Zephyr": (
        "<|user|> <|assistant|> {{ eos_token }}",
        "<|user|>\na</s>\n<|assistant|>\nb</s>\n<|user|>\nc</s>\n<|assistant|>\nd</s>\n",
        ["b</s>\n", "d</s>\n"],
    ),
    "Phi-4": (
        "<|im_start|> <|im_sep|>",
        "<|im_start|>user<|im_sep|>a<|im_end|><|im_start|>assistant<|im_sep|>b<|im_end|>",
        ["b<|im_end|>"],
    ),
    "Phi-3": (
        "<|assistant|> <|end|>",
        "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n</s>",
        ["b<|end|>\n", "</s>"],
    ),
    "ChatML": ("<|im_start|> <|im_end|>", "<|im_start|>assistant\ncut short", ["cut short"]),
    "Llama 3": (
        "<|start_header_id|> <|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\ncall<|eom_id|><|start_header_id|>ipython<|end_header_id|>",
        ["call<|eom_id|>"],
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_turns_are_found(name):
    source, text, expected = TEXTS[name]
    family = match_family(source)
    assert family.name == name
    assert [text[start:end] for start, end in find_turns(text, family, "</s>", True)] == expected
    assert rewrite_template(family, source) is None
    assert len(TEXTS) == 6


def test_markers_are_recognised_with_any_trimming():
    marked = ["{% generation %}", "{%- generation -%}", "{%+ generation %}", "{%generation%}"]
    assert [has_markers(template) for template in marked] == [True] * 4
    assert not has_markers("{{ add_generation_prompt }}")


def test_names_are_unique():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) >= 10
