"""Micro-batches in pieces of rows: the same numbers, whatever the device has room for."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from tiny_checkpoints import write_llama

from hf_mlx.data.collate import collate
from hf_mlx.errors import HFMLXError, TrainingError
from hf_mlx.models.load import load_model
from hf_mlx.recipes.sft import SFT
from hf_mlx.session import Session
from hf_mlx.settings.plan import BatchPlan, CheckpointingPlan, LoraPlan, LossPlan, OptimPlan
from hf_mlx.settings.resolve import resolve_plan
from hf_mlx.training.inputs import make_inputs
from hf_mlx.training.memory import memory_limit, planned_limit
from hf_mlx.training.shortage import describe_evaluation, describe_training, naming_shortage
from hf_mlx.training.splitting import Splitting, choose_computation, split_arrays
from hf_mlx.training.weighting import ByTokens
from hf_mlx.training.wired_memory import bounded_cache, wired_memory

# fp32: the same sums in another order. A wrong denominator is 1e-1.
RELATIVE = 1e-6
# Of the norm of an array. lora_B begins at zero, so it is a sum of gradients, whose terms cancel: measured 1.7e-6. SGD
# with momentum, since Adam divides a gradient by its own size: 1e-5 with it.
WEIGHTS = 5e-6
STEPS, RATE = 4, 0.05
SAID = "[malloc] Unable to allocate 68719476736 bytes."
CONFIG = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_attention_heads=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def plan():
    plan, _ = resolve_plan({"output_dir": "unused", "gradient_checkpointing": False, "bf16": False})
    lora = LoraPlan(r=4, target_modules=("q_proj", "v_proj", "down_proj"), task_type="CAUSAL_LM")
    return replace(plan, lora=lora, optim=OptimPlan(name="sgd", options={"momentum": 0.9}))


def rows_of(kind, count, draw):
    """Rows of uneven length; of ``"completion"`` ones every third scores nothing at all."""
    rows = []
    for number in range(count):
        ids = draw.integers(3, 64, draw.integers(6, 30))
        row = {"input_ids": ids.tolist()}
        if kind == "completion":
            begin = len(ids) if number % 3 == 0 else len(ids) // 2
            row["labels"] = np.where(np.arange(len(ids)) < begin, -100, ids).tolist()
        if kind == "packed":
            row["seq_lengths"] = [2, 3, len(ids) - 5]
        rows.append(row)
    return rows


def windows_of(kind):
    """For each step two micro-batches; the last of a window is smaller."""
    draw = np.random.default_rng(0)
    made = [[rows_of(kind, count, draw) for count in (5, 3)] for _ in range(STEPS)]
    return [[make_inputs(collate(rows, pad_token_id=0), 0) for rows in window] for window in made]


def run(folder, plan, windows, *, most=None, accepts=True, room=None):
    """Train on ``windows``; ``most`` rows at once, or as many as a device with ``room`` rows turns out to take.

    Returns:
        The metrics of each step and the arrays at the end; and the step.
    """
    session = Session(plan, load_model(folder, plan.model), SFT)
    step = session.step
    step.weigh = ByTokens(accepts_loss_kwargs=accepts)
    if room is not None:
        step.objective = Limited(step.objective, room)
    compute = step if most is None else Splitting(step, lambda rows, _: rows, most)
    session.loaded.model.train()
    curve = []
    for number, window in enumerate(windows, 1):
        metrics = compute(window, number, RATE)
        values = [
            metrics.loss,
            metrics.grad_norm,
            metrics.metrics["entropy"],
            metrics.metrics["mean_token_accuracy"],
            metrics.micro_batches,
        ]
        curve.append([value.item() for value in values])
    return np.array(curve), {name: np.array(value) for name, value in step.params.items()}, step


class Limited:
    """An objective on a device that has room for so many rows."""

    def __init__(self, objective, room):
        self.objective, self.room, self.asked = objective, room, []

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def __call__(self, params, arrays):
        rows = arrays["input_ids"].shape[0]
        self.asked.append(rows)
        if rows > self.room:
            raise RuntimeError(SAID)
        return self.objective(params, arrays)


def assert_same(a, b):
    curve, weights, step = a
    assert curve.shape == (STEPS, 5)
    np.testing.assert_allclose(b[0], curve, rtol=RELATIVE)
    assert weights.keys() == b[1].keys()
    for name, value in weights.items():
        assert np.linalg.norm(value - b[1][name]) <= WEIGHTS * np.linalg.norm(value), name
    assert b[2].draws == step.draws == 2 * STEPS


@pytest.mark.parametrize("most", [5, 3, 2, 1], ids=["whole", "2 pieces", "4 pieces", "rows"])
@pytest.mark.parametrize("accepts", [True, False], ids=["tokens of the window", "mean of each micro-batch"])
@pytest.mark.parametrize("kind", ["text", "completion", "packed"])
def test_pieces_change_no_number(folder, plan, kind, accepts, most):
    windows = windows_of(kind)
    whole = run(folder, plan, windows, accepts=accepts)
    assert_same(whole, run(folder, plan, windows, accepts=accepts, most=most))
    assert whole[0][:, 4].tolist() == [2.0] * STEPS


@pytest.mark.parametrize("most", [3, 1])
@pytest.mark.parametrize("loss", [{"kind": "dft"}, {"label_smoothing_factor": 0.1}], ids=["dft", "smoothed"])
def test_other_losses(folder, plan, loss, most):
    plan, windows = replace(plan, loss=LossPlan(**loss)), windows_of("completion")
    assert_same(run(folder, plan, windows), run(folder, plan, windows, most=most))


@pytest.mark.parametrize("most", [3, 2, 1])
def test_dropout_and_noise_draw_for_a_row_what_they_draw_in_the_whole(folder, plan, most):
    windows = windows_of("text")
    drawn = replace(plan, lora=replace(plan.lora, lora_dropout=0.3), loss=LossPlan(neftune_noise_alpha=5.0))
    drawn = replace(drawn, checkpointing=CheckpointingPlan(enabled=True))
    whole = run(folder, drawn, windows)
    assert_same(whole, run(folder, drawn, windows, most=most))
    # They draw at all, and another thing for each seed.
    plain = run(folder, plan, windows)
    other = run(folder, replace(drawn, batch=BatchPlan(seed=7)), windows)
    assert abs(plain[0][0, 0] / whole[0][0, 0] - 1) > 1e-3
    assert abs(other[0][0, 0] / whole[0][0, 0] - 1) > 1e-3


@pytest.mark.parametrize("room", [4, 3, 2, 1])
@pytest.mark.parametrize("order", [1, -1], ids=["the larger first", "the larger last"])
def test_a_step_that_runs_out_of_memory_is_done_again(folder, plan, room, order, caplog):
    plan = replace(plan, lora=replace(plan.lora, lora_dropout=0.3))
    windows = [window[::order] for window in windows_of("text")]
    caplog.set_level(logging.WARNING)
    found = run(folder, plan, windows, most=100, room=room)

    assert_same(run(folder, plan, windows), found)
    assert max(found[2].objective.asked) > room
    said = [record.getMessage() for record in caplog.records if "ran out of memory" in record.getMessage()]
    assert 1 <= len(said) <= 3
    assert SAID in said[0]


def test_gradients_of_an_unfinished_window_survive(folder, plan):
    windows = windows_of("text")

    def train(limit, room):
        session = Session(plan, load_model(folder, plan.model), SFT)
        session.step.objective = Limited(session.step.objective, room)
        compute = Splitting(session.step, lambda rows, _: rows, limit)
        session.loaded.model.train()
        compute.accumulate(windows[0], 1)
        metrics = compute(windows[1], 1, RATE)
        return metrics.loss.item(), metrics.grad_norm.item(), session.step.draws

    whole = train(100, 100)
    assert train(100, 2) == pytest.approx(whole, rel=RELATIVE)
    assert whole[2] == 3


def test_one_row_that_does_not_fit_is_the_end(folder, plan):
    session = Session(plan, load_model(folder, plan.model), SFT)
    session.step.objective = Limited(session.step.objective, 0)
    compute = Splitting(session.step, lambda rows, _: rows, 100)
    window = windows_of("text")[0]
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        compute(window, 1, RATE)
    assert sorted(set(session.step.objective.asked)) == [1, 2, 3, 5]


def test_other_errors_pass(folder, plan):
    session = Session(plan, load_model(folder, plan.model), SFT)
    compute = Splitting(session.step, lambda rows, _: rows, 100)
    broken = replace(windows_of("text")[0][0], arrays={"input_ids": mx.zeros((2, 8), mx.int32)})
    with pytest.raises(KeyError):
        compute([broken], 1, RATE)
    assert compute.most is None


@pytest.mark.parametrize(
    ("rows", "tokens", "pieces"),
    [(8, 64, 1), (8, 128, 2), (8, 512, 8), (8, 4096, 8), (5, 128, 2), (6, 512, 6), (1, 9, 1)],
)
def test_pieces_follow_the_estimate(folder, plan, rows, tokens, pieces):
    session = Session(plan, load_model(folder, plan.model), SFT)
    compute = Splitting(session.step, lambda rows, tokens: rows * tokens, 512)
    assert compute.count_pieces(rows, tokens) == pieces


def test_what_ran_out_holds_for_longer_rows_too(folder, plan):
    session = Session(plan, load_model(folder, plan.model), SFT)
    compute = Splitting(session.step, lambda rows, tokens: 0, 512)
    compute.most = 4 * 32
    assert [compute.count_pieces(8, tokens) for tokens in (16, 32, 64, 256)] == [1, 2, 4, 8]


def test_every_scored_token_is_in_one_piece():
    draw = np.random.default_rng(1)
    cases = 0
    for kind in ("text", "completion", "packed"):
        for count in range(1, 9):
            arrays = make_inputs(collate(rows_of(kind, count, draw), pad_token_id=0), 0).arrays
            rows = arrays["input_ids"].shape[0]
            for pieces in range(1, rows + 1):
                made = split_arrays(arrays, pieces)
                sizes = [part["input_ids"].shape[0] for part in made]
                assert len(made) == pieces and sum(sizes) == rows and max(sizes) - min(sizes) <= 1
                targets = np.concatenate([np.array(part["targets"]) for part in made])
                whole = np.array(arrays["targets"])
                assert targets[targets != -100].tolist() == whole[whole != -100].tolist()
                cases += 1
    assert cases >= 3 * 8


def test_without_the_setting_nothing_is_cut(folder, plan):
    session = Session(plan, load_model(folder, plan.model), SFT)
    assert choose_computation(session.step, plan, CONFIG) is session.step
    chosen = choose_computation(session.step, replace(plan, auto_find_batch_size=True), CONFIG)
    assert isinstance(chosen, Splitting)


def test_routers_keep_their_micro_batches_whole(folder, plan, caplog):
    session = Session(plan, load_model(folder, plan.model), SFT)
    session.step.objective.routers = object()
    chosen = choose_computation(session.step, replace(plan, auto_find_batch_size=True), CONFIG)
    assert chosen is session.step
    assert "router_aux_loss_coef=0.0" in caplog.text


# --- what the user reads ---------------------------------------------------------------------------------------------


CHECKPOINTED = CheckpointingPlan(enabled=True)
SHORTAGES = {
    "as it comes": (
        {},
        ["step 3", "5 row(s) x 32 tokens", "auto_find_batch_size=True", "gradient_checkpointing=True", "max_length=16"],
        ["per_device"],
    ),
    "divided": ({"auto_find_batch_size": True}, ["1 row(s) x 32 tokens", "gradient_checkpointing=True"], ["auto_find"]),
    "all weights": (
        {"lora": None, "checkpointing": CHECKPOINTED},
        ["peft_config=LoraConfig"],
        ["gradient_checkpointing=True"],
    ),
}


@pytest.mark.parametrize(("changes", "said", "unsaid"), SHORTAGES.values(), ids=SHORTAGES)
def test_a_shortage_says_what_to_write(folder, plan, changes, said, unsaid):
    session = Session(plan, load_model(folder, plan.model), SFT)
    window = windows_of("text")[0]
    cause = RuntimeError(SAID)
    with (
        pytest.raises(TrainingError) as caught,
        naming_shortage(lambda: describe_training(session.step, replace(plan, **changes), CONFIG, 3, window)),
    ):
        raise cause

    assert caught.value.__cause__ is cause
    message = str(caught.value)
    assert message.index("received") < message.index(SAID) < message.index("required") < message.index("remedy")
    assert [part for part in said if part not in message] == []
    assert [part for part in unsaid if part in message] == []


def test_an_evaluation_says_its_own_setting():
    with (
        pytest.raises(TrainingError, match="per_device_eval_batch_size=4"),
        naming_shortage(lambda: describe_evaluation(8, 64)),
    ):
        raise MemoryError("std::bad_alloc")
    with pytest.raises(TrainingError, match="max_length=32"), naming_shortage(lambda: describe_evaluation(1, 64)):
        raise MemoryError


@pytest.mark.parametrize(
    "error", [RuntimeError("[matmul] shapes do not match"), ValueError(SAID), TrainingError("a", "out of memory", "c")]
)
def test_only_a_shortage_is_renamed(error):
    with pytest.raises(type(error)) as caught, naming_shortage(lambda: describe_evaluation(8, 64)):
        raise error
    assert caught.value is error
    assert isinstance(error, HFMLXError) or caught.value.__cause__ is None


# --- what the device has ---------------------------------------------------------------------------------------------


class Backend:
    """mlx.core of a machine, as far as these functions see it."""

    gpu, cpu = "gpu", "cpu"

    def __init__(self, *, metal=False, cuda=False, device="gpu", recommended=None, limit=100, free=None):
        self.metal = SimpleNamespace(is_available=lambda: metal)
        self.cuda = SimpleNamespace(is_available=lambda: cuda)
        self.default_device = lambda: device
        told = {"max_recommended_working_set_size": recommended, "free_memory": free}
        self.device_info = lambda: {name: size for name, size in told.items() if size is not None}
        self.get_active_memory, self.get_cache_memory = lambda: 3, lambda: 2
        self.get_memory_limit = lambda: limit
        self.wired, self.cached, self.done = 0, 150, []

    def set_wired_limit(self, size):
        earlier, self.wired = self.wired, size
        self.done.append(("wired", size))
        return earlier

    def set_cache_limit(self, size):
        earlier, self.cached = self.cached, size
        return earlier

    def synchronize(self):
        self.done.append("synchronized")


def test_limits():
    assert memory_limit(Backend(metal=True, recommended=60, limit=90)) == 60
    assert memory_limit(Backend(cuda=True, limit=95, free=99)) == 95
    # Another process has the rest.
    assert memory_limit(Backend(cuda=True, limit=95, free=40)) == 45
    # Where an exception comes in time the estimate may be wrong; elsewhere it must not.
    assert planned_limit(Backend(cuda=True, limit=95)) == 95
    assert planned_limit(Backend(metal=True, recommended=60)) == 40
    assert planned_limit(Backend(cuda=True, device="cpu", limit=90)) == 60


def test_metal_is_wired_during_the_run_and_put_back_after_it():
    backend = Backend(metal=True, recommended=60)
    backend.wired = 7
    with wired_memory(backend):
        assert backend.wired == 60
    assert backend.done == [("wired", 60), "synchronized", ("wired", 7)]
    with pytest.raises(ValueError), wired_memory(backend):
        raise ValueError
    assert backend.wired == 7


@pytest.mark.parametrize(
    "options", [{"cuda": True}, {"metal": True, "device": "cpu", "recommended": 60}, {"metal": True}]
)
def test_nothing_is_wired_elsewhere(options):
    backend = Backend(**options)
    with wired_memory(backend):
        pass
    assert backend.done == []


@pytest.mark.parametrize(("need", "set_before", "during"), [(40, 150, 60), (400, 150, 150), (40, 0, 0)])
def test_metal_keeps_no_more_freed_memory_than_a_step_takes(need, set_before, during):
    backend = Backend(metal=True, recommended=60)
    backend.cached = set_before
    with pytest.raises(ValueError), bounded_cache(lambda: need, backend):
        assert backend.cached == during
        raise ValueError
    assert backend.cached == set_before


@pytest.mark.parametrize("options", [{"cuda": True}, {"metal": True, "device": "cpu"}, {}])
def test_the_cache_is_left_alone_elsewhere(options):
    backend = Backend(**options)
    with bounded_cache(lambda: pytest.fail("not needed"), backend):
        assert backend.cached == 150
