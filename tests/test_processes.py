"""Who the processes are, what a window weighs over them, and that one process has nothing to do with any of it."""

import json
import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from hf_mlx import device
from hf_mlx.data.order import Share, count_steps, deal
from hf_mlx.errors import DataError, SettingError, TrainingError
from hf_mlx.loop.pending import Pending
from hf_mlx.processes.comparison import find_different
from hf_mlx.processes.launcher import Launched, read_launcher
from hf_mlx.processes.world import World, the_world
from hf_mlx.settings.ledger import explain
from hf_mlx.settings.plan import BatchPlan
from hf_mlx.settings.resolve import resolve_plan
from hf_mlx.training.exchange import Exchange
from hf_mlx.training.inputs import Inputs, Peers
from hf_mlx.training.measured import StepMetrics
from hf_mlx.training.weighting import ByTokens


def test_a_process_that_was_started_by_itself_is_alone():
    assert read_launcher({}) is None
    world = the_world()
    assert (world.rank, world.size, world.group, world.watch) == (0, 1, None, None)
    assert world.gather_object({"a": 1}) == [{"a": 1}]
    assert world.hand_on([2]) == [2]


def test_launchers_are_read(tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["10.0.0.1:32323"], ["10.0.0.2:32324"], ["10.0.0.2:32325"]]))
    ring = {"MLX_RANK": "2", "MLX_HOSTFILE": str(hosts)}
    assert read_launcher(ring) == Launched("ring", 2, 3, "10.0.0.1", 1)
    nccl = {"MLX_RANK": "1", "MLX_WORLD_SIZE": "2", "NCCL_HOST_IP": "10.0.0.1", "CUDA_VISIBLE_DEVICES": "1"}
    assert read_launcher(nccl) == Launched("nccl", 1, 2, "10.0.0.1", 1)
    jaccl = {"MLX_RANK": "1", "MLX_JACCL_COORDINATOR": "10.0.0.1:5000"}
    assert read_launcher(jaccl) == Launched("jaccl", 1, None, "10.0.0.1", 0)
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    assert read_launcher(mpi) == Launched("mpi", 1, 4, None, 1)
    # mlx.launch -n 1, and a file of one host.
    assert read_launcher({"MLX_RANK": "0"}) is None
    hosts.write_text(json.dumps([["127.0.0.1:32323"]]))
    assert read_launcher({"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}) is None


def test_processes_of_torch_are_refused_with_the_line_to_write():
    with pytest.raises(SettingError, match=r"hf-mlx launch -n 4 train\.py"):
        read_launcher({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"})


def test_a_group_of_one_that_should_be_two_is_refused(tmp_path, monkeypatch):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["127.0.0.1:1"], ["127.0.0.1:2"]]))
    for name, value in {"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}.items():
        monkeypatch.setenv(name, value)

    class Alone:
        def size(self):
            return 1

    monkeypatch.setattr(mx.distributed, "init", lambda **_: Alone())
    the_world.cache_clear()
    try:
        with pytest.raises(SettingError, match="launcher of 2 processes, and MLX that sees one"):
            the_world()
    finally:
        the_world.cache_clear()


@pytest.fixture
def two(monkeypatch):
    """Rank 0 of two processes that say the same, and what each of them exchanges, in its order."""
    exchanged = []

    def gather(array, group):
        exchanged.append(array.shape)
        return mx.concatenate([array, array])

    monkeypatch.setattr(mx.distributed, "all_gather", gather)
    world = World(0, 2, 0, group=object(), host="127.0.0.1")
    monkeypatch.setattr(world.watch, "connect", lambda *address: exchanged.append(address[0]))
    return world, exchanged


def test_processes_meet_once_a_run_has_set_mlxs_limits(two):
    world, exchanged = two
    with world.meeting():
        # MLX reads its limits on pending work at its first computation, an exchange included.
        assert exchanged == []
    assert "127.0.0.1" in exchanged
    met = len(exchanged)
    world.meet()
    assert len(exchanged) == met


def test_a_rank_that_fails_before_they_meet_can_still_say_why(two):
    world, exchanged = two
    with pytest.raises(SettingError, match="bf16"), world.meeting():
        raise SettingError("bf16=True", "a device that has it", "bf16=False")
    assert "127.0.0.1" in exchanged


def test_the_first_exchange_lets_processes_meet(two):
    world, exchanged = two
    world.barrier("main_process_first")
    assert "127.0.0.1" in exchanged[:-1]


@pytest.mark.parametrize("kind", ["nothing", "a part", "what was there before"])
def test_a_table_that_a_lost_process_did_not_send_is_told(two, monkeypatch, kind):
    world, _ = two
    world.meet()
    monkeypatch.setattr(world.watch, "name_ended", lambda: "rank 1 has ended without a word")
    earlier = world.gather_later("counts", np.array([7, 8])).read()[0]

    def gather(array, group):
        own = np.array(array)[0]
        other = {"nothing": np.zeros_like(own), "a part": [*own[:5], *earlier[5:]], "what was there before": earlier}
        return mx.array(np.stack([own, np.asarray(other[kind], np.int32)]))

    monkeypatch.setattr(mx.distributed, "all_gather", gather)
    with pytest.raises(TrainingError, match="rank 1 has ended without a word"):
        world.gather("counts", np.array([7, 9]))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sum_over_fewer_processes_than_there_are_is_no_loss(two, monkeypatch, ranks):
    world, _ = two
    monkeypatch.setattr(mx.distributed, "all_sum", lambda array, group: array * ranks)
    metrics = {"loss": mx.array(0.5), "micro_batches": mx.array(1.0), "entropy": mx.array(2.0)}
    grads, measured, norm = Exchange(world)({"a": mx.array([3.0, 4.0])}, metrics)
    assert grads["a"].tolist() == [3.0 * ranks, 4.0 * ranks] and norm.item() == 5.0 * ranks
    assert measured["loss"].item() == pytest.approx(1.0 if ranks == 2 else float("nan"), nan_ok=True)


@pytest.mark.parametrize(("ended", "said"), [("rank 1 has ended without a word", "rank 1"), (None, "learning_rate")])
def test_a_loss_that_is_no_number_is_the_lost_processs(two, monkeypatch, ended, said):
    world, _ = two
    monkeypatch.setattr(world.watch, "name_ended", lambda: ended)
    pending = Pending(SimpleNamespace(world=world, plan=SimpleNamespace(nan_inf_filter=True)), 0, lambda step: 1e-3)
    loss = {"loss": float("nan"), "micro_batches": 1.0}
    pending._steps = [StepMetrics.split({name: mx.array(value) for name, value in loss.items()})]
    with pytest.raises(TrainingError, match=said):
        pending.check()


def test_the_rank_that_differs_is_found():
    assert find_different([{"a": 1}, {"a": 1}, {"a": 2}]) == (2, "a", 2, 1)
    assert find_different([{"a": 1}, {"a": 1, "b": 0}]) == (1, "b", 0, None)
    assert find_different([{"a": 1}] * 3) is None


def test_rounds_are_dealt_and_the_last_is_filled_from_the_first_rows():
    order = np.arange(13)
    assert deal(order, 2, Share(0, 2)).tolist() == [[0, 1], [4, 5], [8, 9], [12, 0]]
    assert deal(order, 2, Share(1, 2)).tolist() == [[2, 3], [6, 7], [10, 11], [1, 2]]
    assert deal(order, 2, Share(1, 2), drop_last=True).tolist() == [[2, 3], [6, 7], [10, 11]]
    assert deal(order, 4, Share(1, 2, split=True)).tolist() == [[2, 3], [6, 7], [10, 11], [1, 2]]
    # Fewer rows than a round: they are repeated as often as it takes.
    assert deal(np.arange(2), 3, Share(1, 2)).tolist() == [[1, 0, 1]]


def test_steps_are_counted_by_process():
    plan = BatchPlan(train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2, processes=2)
    assert (count_steps(13, plan).batches_per_epoch, count_steps(13, plan).total_steps) == (4, 4)
    dropped = BatchPlan(train_batch_size=2, drop_last=True, processes=2, num_train_epochs=1)
    assert count_steps(13, dropped).total_steps == 3
    with pytest.raises(DataError, match="on 2 processes"):
        count_steps(3, dropped)


def test_metrics_of_the_last_round_are_those_of_the_first_ranks():
    share = Share(0, 3)
    assert [share.kept(rows, 2) for rows in (12, 13, 14, 15, 17)] == [3, 1, 2, 3, 3]
    assert share.kept(13, 2, drop_last=True) == 3


def _window(rank, kept, average=True):
    valid = ((3, 5), (2, 0))
    made = []
    for counts in valid:
        peers = Peers(
            rank, counts, tuple(n + 1 for n in counts), counts, counts, counts, counts, counts, kept, average=average
        )
        made.append(Inputs({}, counts[rank], counts[rank], 0, counts[rank] + 1, None, peers=peers))
    return made


def test_a_window_is_divided_by_the_tokens_of_all_processes():
    for rank in (0, 1):
        weights = ByTokens()(_window(rank, kept=2))
        assert [w["loss"].item() for w in weights] == [10, 10]
        assert [w["aux_loss"].item() for w in weights] == [4, 4]
        assert [w["metrics"]["entropy"].item() for w in weights] == [8, 2]
    assert ByTokens(counts_every_label=True).count(_window(0, kept=2)) == 14


def test_without_average_tokens_each_process_divides_by_its_own():
    own = [ByTokens()(_window(rank, kept=2, average=False))[0]["loss"].item() for rank in (0, 1)]
    assert own == [5 * 2, 5 * 2]
    micro = ByTokens(accepts_loss_kwargs=False)(_window(0, kept=2))
    assert [w["loss"].item() for w in micro] == [3 * 4, 2 * 4]


def test_metrics_that_are_cut_weigh_nothing_on_the_other_ranks():
    first, second = (ByTokens()(_window(rank, kept=1)) for rank in (0, 1))
    assert first[0]["metrics"]["entropy"].item() == 3
    assert [w["metrics"]["entropy"].item() for w in second] == [math.inf, math.inf]
    assert second[0]["metrics"]["aux_loss"].item() == math.inf


# Field, a value that is not its default, and the verdict on one process and on two.
SEVERAL = [
    ("average_tokens_across_devices", False, "NO-OP", "HONOUR"),
    ("ddp_timeout", 60, "NO-OP", "HONOUR"),
    ("log_level_replica", "error", "NO-OP", "HONOUR"),
    ("log_on_each_node", False, "NO-OP", "HONOUR"),
    ("save_on_each_node", True, "NO-OP", "REFUSE"),
    ("auto_find_batch_size", True, "ADAPT", "REFUSE"),
    ("ddp_bucket_cap_mb", 5, "NO-OP", "NO-OP"),
    ("accelerator_config", {"split_batches": True}, "NO-OP", "HONOUR"),
    ("accelerator_config", {"even_batches": False}, "NO-OP", "REFUSE"),
    ("accelerator_config", {"dispatch_batches": True}, "NO-OP", "REFUSE"),
    ("accelerator_config", {"dispatch_batches": False}, "NO-OP", "NO-OP"),
    ("accelerator_config", {"use_seedable_sampler": False}, "HONOUR", "REFUSE"),
]


@pytest.mark.parametrize(("field", "value", "alone", "together"), SEVERAL)
def test_verdicts_depend_on_how_many_processes_there_are(field, value, alone, together):
    assert explain({field: value})[field].verdict == alone
    entry = explain({field: value}, processes=2)[field]
    assert entry.verdict == together
    assert together != "REFUSE" or "several processes" in entry.reason


def test_the_plan_knows_the_processes():
    split = {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 6}
    plan, _ = resolve_plan(split, processes=2)
    assert (plan.batch.processes, plan.batch.split_batches, plan.batch.own_batch_size) == (2, True, 3)
    alone, _ = resolve_plan(split)
    assert (alone.batch.processes, alone.batch.split_batches, alone.batch.own_batch_size) == (1, False, 6)
    with pytest.raises(SettingError, match="per_device_train_batch_size=4"):
        resolve_plan({**split, "per_device_train_batch_size": 5}, processes=2)


@pytest.mark.parametrize("cuda", [False, True])
def test_a_table_arrives_as_it_was_sent(monkeypatch, cuda):
    monkeypatch.setattr(device, "on_cuda", lambda: cuda)
    table = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 6)).astype(np.int32)

    assert np.array_equal(device.Coming(mx.array(table)).read(), table)


def test_a_table_that_waits_for_the_step_is_sent_in_its_turn(two):
    world, exchanged = two
    world.meet()
    met = len(exchanged)
    with_step = world.gather_later("counts", np.array([7, 8]), with_step=True)
    assert len(exchanged) == met
    world.barrier("a save")
    sent = exchanged[met:]

    assert np.array_equal(world.read(with_step, "counts"), [[7, 8], [7, 8]])
    assert len(sent) == 2 and len(exchanged) == met + 2
