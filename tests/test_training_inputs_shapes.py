"""How many shapes a compiled step can be asked for, whatever the lengths and masks of the rows."""

import numpy as np

from hf_mlx.data.collate import collate
from hf_mlx.training.inputs import make_inputs

LONGEST = 1024
# 24 lengths up to 1,024, and for each: six levels of gathered positions, or all of them.
BOUND = 24 * 7
BATCHES = 600


def test_shapes_are_bounded_and_every_scored_token_is_there():
    draw = np.random.default_rng(0)
    shapes = set()
    for _ in range(BATCHES):
        rows = []
        for length in draw.integers(2, LONGEST + 1, 4):
            ids = draw.integers(3, 100, length)
            labels = np.where(np.arange(length) >= draw.integers(0, length), ids, -100)
            rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
        inputs = make_inputs(collate(rows, pad_token_id=0), 0)
        targets = np.array(inputs.arrays["targets"])
        assert (targets != -100).sum() == inputs.valid == sum(sum(x != -100 for x in r["labels"][1:]) for r in rows)
        shapes.add(tuple((name, array.shape) for name, array in sorted(inputs.arrays.items())))
    assert 20 < len(shapes) <= BOUND
