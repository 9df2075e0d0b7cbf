"""The hub: a repository, a model card, and uploads that run beside training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..atomic import disk_errors, replaced
from ..errors import CheckpointError
from ..recipes.recipe import Paper
from ..version import find_version

# What transformers 5.23 ``Trainer._push_from_checkpoint`` leaves on the machine, and the report, which shows rows.
_IGNORED = ["_*", "checkpoint-*", ".hf_mlx*", "report.html"]
_LIBRARIES = ("hf-mlx", "mlx", "mlx-lm", "transformers", "datasets", "tokenizers", "trl", "peft")


class HubRepo:
    """The hub repository of one run.

    Args:
        args: ``TrainingArguments``: output_dir and the ``hub_*`` fields.

    Attributes:
        model_id: ``owner/name`` once the repository exists, else None.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.model_id: str | None = None
        self._jobs: list[Any] = []

    def create(self, token: str | None = None, private: bool | None = None) -> str:
        """Create the repository if there is none (transformers 5.23 ``Trainer.init_hf_repo``)."""
        args = self.args
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        private = args.hub_private_repo if private is None else private
        made = _api(token or args.hub_token).create_repo(name, private=private, exist_ok=True).repo_id
        self.model_id = made
        return made

    def push_checkpoint(self, folder: Path, step: int, epoch: float | None) -> None:
        """Start the uploads that ``hub_strategy`` asks for after a checkpoint, without waiting for them.

        As in transformers 5.23 ``Trainer._push_from_checkpoint``, a push is left out while the last one is under way,
        and the model's files go through ``output_dir``, so that rotation may delete the checkpoint meanwhile.
        """
        args = self.args
        strategy = getattr(args.hub_strategy, "value", args.hub_strategy)
        busy = any(not job.done() for job in self._jobs)
        if strategy == "end" or (busy and not args.hub_always_push):
            return
        by_step = str(getattr(args.save_strategy, "value", args.save_strategy)) == "steps"
        progress = f"Training in progress, {f'step {step}' if by_step else f'epoch {int(epoch or 0)}'}"
        for path in folder.iterdir():
            if path.is_file() and not any(path.match(pattern) for pattern in _STATE_FILES):
                shutil.copyfile(path, Path(args.output_dir) / path.name)
        self._start(args.output_dir, progress, ignore=_IGNORED)
        if strategy in ("checkpoint", "all_checkpoints"):
            place = "last-checkpoint" if strategy == "checkpoint" else folder.name
            self._start(folder, f"{progress}, checkpoint", place=place)

    def push(
        self, *, message: str | None, blocking: bool, token: str | None = None, revision: str | None = None
    ) -> Any:
        """Upload ``output_dir``; a CommitInfo, or its Future without ``blocking``."""
        self.finish()
        return _api(token or self.args.hub_token).upload_folder(
            repo_id=str(self.model_id),
            folder_path=self.args.output_dir,
            commit_message=message,
            run_as_future=not blocking,
            ignore_patterns=_IGNORED,
            revision=revision or self.args.hub_revision,
        )

    def finish(self) -> None:
        """Wait for the uploads in progress; an upload that failed raises here."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def _start(
        self, folder: str | Path, message: str, *, place: str | None = None, ignore: list[str] | None = None
    ) -> None:
        job = _api(self.args.hub_token).upload_folder(
            repo_id=str(self.model_id),
            folder_path=str(folder),
            path_in_repo=place,
            commit_message=message,
            run_as_future=True,
            ignore_patterns=ignore,
            revision=self.args.hub_revision,
        )
        self._jobs.append(job)


# What only resuming needs stays in the checkpoint's own folder.
_STATE_FILES = ("optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "hf_mlx*")


def upload(
    folder: Path,
    repo_id: str,
    *,
    message: str = "Upload model",
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> Any:
    """Create ``repo_id`` if needed and upload ``folder`` to it; gives the hub's CommitInfo."""
    api = _api(token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message, revision=revision)


def write_card(
    folder: str | Path,
    *,
    model_name: str,
    base_model: str | None,
    hub_model_id: str | None,
    trainer_tags: Iterable[str],
    method: str,
    paper: Paper | None = None,
    dataset_name: str | None = None,
    tags: str | Iterable[str] | None = None,
    adapter: bool = False,
    scores: bool = False,
    settings: Mapping[str, Any] | None = None,
    links: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write README.md: the metadata of TRL's card, how to use the model, how it was trained.

    Args:
        folder: Where to; an existing README.md is replaced, as upstream does.
        model_name: Heading.
        base_model: What it was trained from; None for an unknown one.
        hub_model_id: Its id on the hub, if it has one.
        trainer_tags: Those that every model of this trainer has.
        method: What it was trained with.
        paper: Where that was introduced.
        dataset_name: Id of the training data.
        tags: Further tags.
        adapter: The folder holds an adapter, not a whole model.
        scores: The model scores texts, and writes none.
        settings: Hyperparameters to list.
        links: Trackers that show the run, and where.
        extra: Further front matter (language, license, …).
    """
    given, links = [tags] if isinstance(tags, str) else list(tags or []), links or {}
    if "Trackio" in links:
        # The hub shows the run on the model's page.
        given = [*(tag for tag in given if not tag.startswith("trackio:")), f"trackio:{links['Trackio']}"]
    front: dict[str, Any] = {
        "base_model": base_model,
        "datasets": dataset_name,
        "library_name": "peft" if adapter else "transformers",
        "model_name": model_name,
        "tags": list(dict.fromkeys([*trainer_tags, *given])),
        **(extra or {}),
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value is not None]
    where = hub_model_id or model_name
    template = _USE[adapter, scores]
    use = template.format(base=base_model or "path/to/the/base", model=where)
    introduced = cited = ""
    if paper is not None:
        introduced = f", a method introduced in [{paper.title}](https://huggingface.co/papers/{paper.number})"
        cited = f"\n## Citation\n\n```bibtex\n{paper.citation}\n```\n"
    table = "\n".join(f"- {key}: {value}" for key, value in (settings or {}).items())
    shown = "".join(f"[Visualize in {name}]({url})\n\n" for name, url in links.items())
    text = (
        "---\n" + "\n".join(lines) + "\n---\n\n"
        f"# {model_name}\n\nA fine-tuned version of {f'`{base_model}`' if base_model else 'its base model'}"
        f"{f' on `{dataset_name}`' if dataset_name else ''}, trained with {method} on Apple MLX by hf_mlx"
        f"{introduced}.\n\n"
        f"## Use\n\n```python\n{use}```\n\n"
        f"## Training\n\n{shown}{table}\n\n### Framework versions\n\n{_versions()}\n{cited}"
    )
    path = Path(folder) / "README.md"
    with disk_errors(path, CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return path


_USE_MODEL = """from transformers import pipeline

generator = pipeline("text-generation", model={model!r})
print(generator([{{"role": "user", "content": "What is MLX?"}}], max_new_tokens=128, return_full_text=False))
"""
_USE_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, {model!r})
"""
_USE_SCORE = """from transformers import pipeline

rewarder = pipeline(model={model!r})
print(rewarder("The capital of France is Paris.")[0]["score"])
"""
_USE_SCORE_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained({base!r}, num_labels=1)
model = PeftModel.from_pretrained(model, {model!r})
"""
# (an adapter, scores) -> how it is used.
_USE = {
    (False, False): _USE_MODEL,
    (True, False): _USE_ADAPTER,
    (False, True): _USE_SCORE,
    (True, True): _USE_SCORE_ADAPTER,
}


def _versions() -> str:
    found = {name: find_version(name) for name in _LIBRARIES}
    return "\n".join(f"- {name}: {version}" for name, version in found.items() if version is not None)


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token)
