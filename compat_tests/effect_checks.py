"""Settings whose effect is not in the log: each check builds what a script would and looks where a user would."""

from __future__ import annotations

import gc
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import transformers
from datasets import Dataset
from effect_cases import BEST, EVALUATES, LORA, SETTINGS, TEMPLATE
from pairs import SILENT, rows_of, text_rows, tiny_model
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_mlx import MLXSFTTrainer
from hf_mlx.errors import ModelError, TrainingError
from hf_mlx.surface.estimate import estimate_memory

Check = Callable[..., None]
ARGUMENTS: dict[str, Check] = {}
ADAPTER: dict[str, Check] = {}


def shows(*fields: str, of: dict[str, Check] = ARGUMENTS) -> Callable[[Check], Check]:
    """Registers a check as the one that shows the effect of ``fields``."""

    def register(check: Check) -> Check:
        of.update(dict.fromkeys(fields, check))
        return check

    return register


class Scene:
    """Builds trainers for one check.

    Args:
        model: Folder of a tiny model.
        folder: Empty, for outputs.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.made = 0

    def trainer(
        self,
        kind: Any = MLXSFTTrainer,
        *,
        adapter: dict | None = None,
        rows: Any = None,
        model: Any = None,
        **given: Any,
    ) -> Any:
        """A trainer of TRL or ours; keywords that are no setting go to the trainer."""
        keywords = {
            k: given.pop(k) for k in ("compute_metrics", "callbacks", "data_collator", "eval_dataset") if k in given
        }
        self.made += 1
        settings = {"output_dir": str(self.folder / str(self.made)), **SILENT, **SETTINGS, **given}
        lora = LORA if adapter is None else adapter
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(
                str(model or self.model),
                SFTConfig(**settings),
                train_dataset=Dataset.from_list(rows or text_rows(12)),
                eval_dataset=keywords.pop("eval_dataset", Dataset.from_list(text_rows(5, seed=1))),
                peft_config=LoraConfig(**lora) if lora else None,
                **keywords,
            )

    def losses(self, **given: Any) -> list[float]:
        """The losses of our run."""
        made = self.trainer(**given)
        made.train()
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


@shows("output_dir")
def _output_dir(scene: Scene) -> None:
    made = scene.trainer(output_dir=str(scene.folder / "here"))
    made.save_model()
    assert (scene.folder / "here" / "adapter_model.safetensors").is_file()


@shows("auto_find_batch_size")
def _pieces(scene: Scene) -> None:
    rows = [{"input_ids": list(range(5, 37))}] * 12
    curves, sizes = [], []
    for value in (False, True):
        made = scene.trainer(rows=rows, auto_find_batch_size=value)
        earlier = mx.set_memory_limit(estimate_memory(made, 1).total)
        try:
            made.train()
            batch = next(iter(made.data.train_loader(made.train_dataset)))
            sizes.append([piece["input_ids"].shape[0] for piece in made.session.step.cut(made.data.inputs(batch))])
        finally:
            mx.set_memory_limit(earlier)
        curves.append([entry["loss"] for entry in made.state.log_history if "loss" in entry])
    assert sizes == [[2], [1, 1]]
    assert curves[1] == pytest.approx(curves[0], rel=1e-6)


@shows("use_cpu")
def _use_cpu(scene: Scene) -> None:
    scene.trainer(use_cpu=True)
    assert mx.default_device() == mx.cpu


@shows("resume_from_checkpoint", "do_train", "do_eval", "do_predict")
def _left_to_the_script(scene: Scene) -> None:
    given = {"resume_from_checkpoint": "elsewhere", "do_train": True, "do_eval": True, "do_predict": True}
    made = scene.trainer(**given)
    assert {name: getattr(made.args, name) for name in given} == given
    made.train()  # not read here either: "elsewhere" does not exist


@shows("use_cache")
def _use_cache(scene: Scene) -> None:
    for value in (False, True):
        theirs, ours = (scene.trainer(kind, adapter={}, use_cache=value) for kind in (SFTTrainer, MLXSFTTrainer))
        assert theirs.model.config.use_cache is ours.model.config.use_cache is value
        ours.save_model(str(scene.folder / "saved"))
        assert json.loads((scene.folder / "saved" / "config.json").read_text())["use_cache"] is value


@shows("bf16")
def _bf16(scene: Scene) -> None:
    plain, cast = scene.losses(), scene.losses(bf16=True)
    assert plain != cast
    assert cast == pytest.approx(plain, rel=0.01)  # bfloat16 keeps 8 bits


@shows("bf16_full_eval")
def _bf16_full_eval(scene: Scene) -> None:
    plain, cast = (scene.trainer(bf16_full_eval=value).evaluate()["eval_loss"] for value in (False, True))
    assert plain != cast
    assert cast == pytest.approx(plain, rel=0.01)


@shows("model_init_kwargs")
def _init_kwargs(scene: Scene) -> None:
    found = []
    for kind in (SFTTrainer, MLXSFTTrainer):
        made = scene.trainer(kind, adapter={}, model_init_kwargs={"dtype": "bfloat16"})
        made.save_model()
        found.append(json.loads((Path(made.args.output_dir) / "config.json").read_text())["dtype"])
    assert found == ["bfloat16"] * 2


@shows("full_determinism")
def _determinism(scene: Scene) -> None:
    # In torch it chooses other kernels; here there is one of each, and the curve is what it was.
    assert scene.losses(full_determinism=True) == scene.losses() == scene.losses()


@shows("neftune_noise_alpha")
def _neftune(scene: Scene) -> None:
    assert scene.losses() != scene.losses(neftune_noise_alpha=5)


@shows("torch_empty_cache_steps")
def _empty_cache(scene: Scene) -> None:
    held = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            held.setdefault(args.torch_empty_cache_steps, []).append(mx.get_cache_memory())

    for steps in (None, 1):
        scene.losses(torch_empty_cache_steps=steps, callbacks=[Watch()])
    assert len(held[1]) == 4
    assert max(held[1]) < max(held[None])


@shows("logging_nan_inf_filter")
def _nan_filter(scene: Scene) -> None:
    explode = {"learning_rate": 1e38, "weight_decay": 10.0}
    with pytest.raises(TrainingError, match="logging_nan_inf_filter=False"):
        scene.losses(**explode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = scene.losses(**explode, logging_nan_inf_filter=False)
    assert len(losses) == 4
    assert not all(np.isfinite(losses))


@shows("log_level")
def _log_level(scene: Scene) -> None:
    logger = transformers.utils.logging
    before = logger.get_verbosity()
    try:
        for name, level in (("error", logging.ERROR), ("info", logging.INFO)):
            for kind in (SFTTrainer, MLXSFTTrainer):
                logger.set_verbosity_warning()
                scene.trainer(kind, log_level=name)
                assert logger.get_verbosity() == level, (kind, name)
        logger.set_verbosity_warning()
        scene.trainer()
        assert logger.get_verbosity() == logging.WARNING
    finally:
        logger.set_verbosity(before)


@shows("disable_tqdm")
def _disable_tqdm(scene: Scene) -> None:
    for value in (True, False):
        names = [
            [type(callback).__name__ for callback in scene.trainer(kind, disable_tqdm=value).callback_handler.callbacks]
            for kind in (SFTTrainer, MLXSFTTrainer)
        ]
        assert ("ProgressCallback" in names[1], "PrinterCallback" in names[1]) == (not value, value)
        assert ("ProgressCallback" in names[0]) is not value


@shows("report_to")
def _report_to(scene: Scene) -> None:
    # An integration whose package is missing: transformers' own complaint is what the user sees.
    for kind in (SFTTrainer, MLXSFTTrainer):
        with pytest.raises(RuntimeError, match="TensorBoardCallback requires tensorboard"):
            scene.trainer(kind, report_to="tensorboard")


@shows("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
def _read_by_integrations(scene: Scene) -> None:
    given = {"run_name": "first", "project": "curves", "trackio_space_id": "a/b"}
    given |= {"trackio_bucket_id": "a/c", "trackio_static_space_id": "a/d"}
    seen = []

    class Integration(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append({name: getattr(args, name) for name in given})

    scene.losses(callbacks=[Integration()], **given)
    assert seen == [given]


@shows("skip_memory_metrics")
def _memory(scene: Scene) -> None:
    for value in (True, False):
        gc.collect()  # what earlier trainers left would be freed in the middle of a stage
        made = scene.trainer(skip_memory_metrics=value, **EVALUATES)
        train, evaluated = made.train().metrics, made.evaluate()
        predicted = made.predict(made.eval_dataset).metrics
        for metrics, stage in ((train, "train"), (evaluated, "eval"), (predicted, "test")):
            assert (f"{stage}_mem_gpu_alloc_delta" in metrics) is not value
            assert (f"{stage}_mem_gpu_peaked_delta" in metrics) is not value
        assert (train.get("init_mem_gpu_alloc_delta", 0) > 0) is not value
        # Evaluations during training count as training, as upstream.
        assert not any("mem" in key for entry in made.state.log_history for key in entry if "eval_loss" in entry)


@shows("prediction_loss_only")
def _loss_only(scene: Scene) -> None:
    for kind in (SFTTrainer, MLXSFTTrainer):
        for value in (False, True):
            made = scene.trainer(kind, prediction_loss_only=value, compute_metrics=lambda _: {"one": 1.0})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert ("eval_one" in made.evaluate()) is not value, kind


@shows("batch_eval_metrics", "include_for_metrics", "eval_do_concat_batches")
def _forms_of_metrics(scene: Scene) -> None:
    forms = [
        {"batch_eval_metrics": True},
        {"include_for_metrics": ["inputs", "loss"]},
        {"eval_do_concat_batches": False},
    ]
    seen = []
    for kind in (SFTTrainer, MLXSFTTrainer):
        calls = []

        def metrics(given, compute_result=None, calls=calls):
            calls.append((type(given.label_ids).__name__, given.inputs is None, given.losses is None, compute_result))
            return {}

        for form in ({}, *forms):
            scene.trainer(kind, compute_metrics=metrics, **form).evaluate()
        seen.append(calls)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 4


@shows("remove_unused_columns", "dataset_kwargs")
def _columns(scene: Scene) -> None:
    for value in (True, False):
        keys = []

        def collator(rows, keys=keys):
            keys.append(set(rows[0]))
            ids = np.array([row["input_ids"][:4] for row in rows])
            return {"input_ids": ids, "labels": ids}

        rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "weight": 1.0}] * 6
        made = scene.trainer(
            rows=rows,
            remove_unused_columns=value,
            data_collator=collator,
            eval_dataset=None,
            max_steps=1,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        made.train()
        assert ("weight" in keys[0]) is not value


@shows("ignore_data_skip")
def _data_skip(scene: Scene) -> None:
    curves = {}
    for kind in (SFTTrainer, MLXSFTTrainer):
        saving = {"save_strategy": "steps", "save_steps": 2}
        whole = scene.trainer(kind, **saving)
        whole.train()
        for value in (False, True):
            resumed = scene.trainer(kind, **saving, ignore_data_skip=value)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
            curves[kind, value] = [e["loss"] for e in resumed.state.log_history if "loss" in e]
    assert curves[MLXSFTTrainer, True] != curves[MLXSFTTrainer, False]
    for value in (False, True):
        assert curves[MLXSFTTrainer, value] == pytest.approx(curves[SFTTrainer, value], rel=1e-4)


@shows("restore_callback_states_from_checkpoint")
def _callback_states(scene: Scene) -> None:
    from transformers import EarlyStoppingCallback

    settings = {**EVALUATES, "save_strategy": "steps", "save_steps": 2, "metric_for_best_model": "loss"}
    settings |= {"load_best_model_at_end": True}
    first = scene.trainer(callbacks=[EarlyStoppingCallback(3)], **settings)
    first.train()
    for value in (False, True):
        mine = EarlyStoppingCallback(1)
        resumed = scene.trainer(callbacks=[mine], restore_callback_states_from_checkpoint=value, **settings)
        resumed.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-2"))
        found = [c for c in resumed.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        assert found[0].early_stopping_patience == (3 if value else 1)


@shows("load_best_model_at_end")
def _load_best(scene: Scene) -> None:
    losses = {}
    for kind in (SFTTrainer, MLXSFTTrainer):
        for value in (False, True):
            made = scene.trainer(kind, **BEST, load_best_model_at_end=value)
            made.train()
            logged = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
            losses[kind, value] = made.evaluate()["eval_loss"]
            assert losses[kind, value] == pytest.approx(max(logged) if value else logged[-1], rel=1e-6)
    assert losses[MLXSFTTrainer, True] == pytest.approx(losses[SFTTrainer, True], rel=1e-4)
    assert losses[MLXSFTTrainer, True] != losses[MLXSFTTrainer, False]


class Hub:
    """Stands in for huggingface_hub.HfApi and writes down what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, token: str | None = None) -> Hub:
        self.calls.append(("token", {"token": token}))
        return self

    def create_repo(self, name: str, **given: Any) -> Any:
        self.calls.append(("create", {"name": name, **given}))
        return type("Repo", (), {"repo_id": name})()

    def upload_folder(self, **given: Any) -> Any:
        self.calls.append(("upload", given))
        return type("Job", (), {"done": lambda self: False, "result": lambda self: None})()

    def places(self) -> list[str | None]:
        """Where each upload went in the repository."""
        return [given.get("path_in_repo") for name, given in self.calls if name == "upload"]


@shows(
    "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_revision", "hub_strategy", "hub_always_push"
)
def _hub(scene: Scene) -> None:
    settings = {"push_to_hub": True, "hub_model_id": "me/it", "hub_token": "secret", "hub_private_repo": True}
    settings |= {"hub_revision": "branch", "save_strategy": "steps", "save_steps": 2}
    expected = {
        ("end", False): [],
        ("every_save", False): [None],  # the second save finds the first upload under way
        ("every_save", True): [None, None],
        ("checkpoint", True): [None, "last-checkpoint"] * 2,
        ("all_checkpoints", True): [None, "checkpoint-2", None, "checkpoint-4"],
    }
    for (strategy, always), places in expected.items():
        hub = Hub()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.HfApi", hub)
            made = scene.trainer(**settings, hub_strategy=strategy, hub_always_push=always)
            made.train()
            assert hub.places() == places, strategy
            made.push_to_hub()
        assert ("create", {"name": "me/it", "private": True, "exist_ok": True}) in hub.calls
        assert all(given["token"] == "secret" for name, given in hub.calls if name == "token")
        uploads = [given for name, given in hub.calls if name == "upload"]
        assert {(given["repo_id"], given["revision"]) for given in uploads} == {("me/it", "branch")}
        assert "secret" not in repr(made.ledger) + str(made.ledger) + repr(made.plan)
    hub = Hub()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi", hub)
        scene.losses()
    assert not hub.calls


@shows("trust_remote_code")
def _remote_code(scene: Scene) -> None:
    folder = scene.folder / "coded"
    tiny_model("llama", folder)
    (folder / "mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Mine(PreTrainedTokenizerFast):\n    mark = 1\n"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    made = scene.trainer(model=folder, trust_remote_code=True)
    assert made.processing_class.mark == 1
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        scene.trainer(model=folder)


@shows("chat_template_path", "assistant_only_loss")
def _template(scene: Scene) -> None:
    path = scene.folder / "template.jinja"
    path.write_text(TEMPLATE)
    settings = {"rows": rows_of("messages", 8), "chat_template_path": str(path), "eval_dataset": None}
    rows = {}
    for assistant in (False, True):
        theirs, ours = (
            scene.trainer(kind, **settings, assistant_only_loss=assistant).train_dataset
            for kind in (SFTTrainer, MLXSFTTrainer)
        )
        assert list(ours["input_ids"]) == list(theirs["input_ids"])
        assert list(ours["labels"]) == list(theirs["labels"])
        rows[assistant] = list(ours["labels"])
    assert rows[False] != rows[True]
    plain = scene.trainer(rows=settings["rows"], eval_dataset=None).train_dataset
    assert list(plain["labels"]) != rows[False]


@shows("pad_to_multiple_of")
def _pad_multiple(scene: Scene) -> None:
    widths = {}
    for kind in (SFTTrainer, MLXSFTTrainer):
        for multiple in (None, 48):
            made = scene.trainer(kind, pad_to_multiple_of=multiple)
            loader = made.get_train_dataloader() if kind is SFTTrainer else made.data.train_loader(made.train_dataset)
            batch = next(iter(loader))
            shape = batch["input_ids"].shape if kind is SFTTrainer else batch.input_ids.shape
            widths[kind, multiple] = tuple(shape)[1]
    assert widths[MLXSFTTrainer, 48] == widths[SFTTrainer, 48] == 48 * -(-widths[SFTTrainer, 48] // 48)
    assert widths[MLXSFTTrainer, None] % 48


@shows("router_aux_loss_coef")
def _router(scene: Scene) -> None:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    folder = tiny_model("mixtral", scene.folder / "moe", **sizes)
    curves = [scene.losses(model=folder, router_aux_loss_coef=value) for value in (None, 0.0, 0.5)]
    assert curves[1][0] < curves[0][0] < curves[2][0]


@shows("lora_dropout", of=ADAPTER)
def _dropout(scene: Scene) -> None:
    assert scene.losses() != scene.losses(adapter={**LORA, "lora_dropout": 0.5})


@shows("fan_in_fan_out", of=ADAPTER)
def _conv1d(scene: Scene) -> None:
    folder = tiny_model("gpt2", scene.folder / "gpt2", n_embd=64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    lora = {"r": 4, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    written = []
    for kind in (SFTTrainer, MLXSFTTrainer):
        made = scene.trainer(kind, model=folder, adapter=lora)
        made.save_model()
        written.append(json.loads((Path(made.args.output_dir) / "adapter_config.json").read_text()))
    assert written[0]["fan_in_fan_out"] is written[1]["fan_in_fan_out"] is True


@shows("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", of=ADAPTER)
def _written(scene: Scene) -> None:
    keys = ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision")
    found = []
    mapping = {"auto_mapping": {"base_model_class": "A", "parent_library": "b"}}
    others = {"task_type": None, "revision": "v1", "base_model_name_or_path": "other"}
    for adapter in (LORA, {**LORA, **mapping}, {**LORA, **others}):
        written = []
        for kind in (SFTTrainer, MLXSFTTrainer):
            made = scene.trainer(kind, adapter=adapter)
            made.save_model()
            config = json.loads((Path(made.args.output_dir) / "adapter_config.json").read_text())
            written.append({key: config[key] for key in keys})
        assert written[0] == written[1]
        found.append(written[1])
    assert len({json.dumps(config) for config in found}) == 3
