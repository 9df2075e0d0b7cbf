"""The trained model as files, on the hub and with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints.files import check_output_dir, saved_folder
from ..checkpoints.inspection import ARGUMENTS
from ..checkpoints.torch_files import has_torch, pickle_object
from ..surface import reporting
from ..surface.hub import write_card
from ..surface.trackers import tracker_links
from ..surface.wording import in_its_words
from .records import Records


class Publishing(Records):
    """What puts a run's result where others find it."""

    @in_its_words
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (or, fully fine-tuned, the model) and the tokenizer to ``output_dir``.

        Of several processes the first one writes; the others return at once, as under transformers. Where they hold
        one model together all of them call it.
        """
        with self.session.step.joined("a model that rank 0 writes"):
            self._save_whole(output_dir, _internal_call)

    def _save_whole(self, output_dir: str | None, _internal_call: bool) -> None:
        if not self.world.is_main:
            self._base.write_back()
            return
        folder = check_output_dir(output_dir or self.args.output_dir)
        with saved_folder(folder) as temporary:
            self._base.write_back()
            self._model.save_pretrained(temporary)
            self._base.complete(temporary)
            # Upstream saves the collator's tokenizer where the trainer has none.
            tokenizer = self.processing_class or getattr(self.data.collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            if has_torch():
                pickle_object(self.args, temporary / ARGUMENTS)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _write_checkpoint(self, folder: Path) -> None:
        """The part of a checkpoint that others load."""
        self.save_model(str(folder), _internal_call=True)

    def _read_checkpoint(self, folder: Path) -> None:
        """What a trainer itself has put there."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Scripts call transformers' own method with weights that they have collected themselves.
        if state_dict is None:
            self.save_model(output_dir, _internal_call=True)
            return
        folder = check_output_dir(output_dir or self.args.output_dir)
        # transformers 5.23 takes the weights out of the dict as it writes them.
        self.model.save_pretrained(folder, state_dict=dict(state_dict))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    @property
    def hub_model_id(self) -> str | None:
        """``owner/name`` on the hub, once the repository exists."""
        return self.hub.model_id

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the run's repository on the hub, unless it exists; the first process does."""
        if self.world.is_main:
            self.hub.create(token, private)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **front_matter: Any,
    ) -> None:
        """Write README.md into ``output_dir``.

        Args:
            model_name: Heading; None is the name of the repository or folder.
            dataset_name: Id of the training data.
            tags: Further tags.
            **front_matter: Further metadata, such as ``language`` or ``license``.
        """
        self._write_card(model_name, dataset_name, tags, front_matter)

    def _write_card(
        self,
        model_name: str | None,
        dataset_name: str | None,
        tags: str | list[str] | None,
        front_matter: dict[str, Any],
    ) -> None:
        if not self.world.is_main:
            return
        base = getattr(self.model.config, "_name_or_path", None)
        write_card(
            self.args.output_dir,
            model_name=model_name or (self.hub_model_id or Path(self.args.output_dir).name).split("/")[-1],
            base_model=base if base and not Path(base).is_dir() else None,
            hub_model_id=self.hub_model_id,
            dataset_name=dataset_name,
            tags=tags,
            links=tracker_links(),
            trainer_tags=self.recipe.tags,
            method=self.recipe.method,
            paper=self.recipe.paper,
            adapter=self.session.adapter is not None,
            scores=self.session.loaded.scores,
            settings=reporting.describe_plan(self.plan),
            extra=front_matter,
        )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save into ``output_dir`` with a model card, and upload the folder without its checkpoints.

        Args:
            commit_message: Of the commit.
            blocking: False returns a Future.
            token, revision: In place of ``args.hub_token`` and ``args.hub_revision``.
            private: For a repository that is created now.
            **card: Keywords of :meth:`create_model_card`.

        Returns:
            ``huggingface_hub.CommitInfo``; None on all processes but the first, which wait for nothing.
        """
        if not self.world.is_main:
            with self.session.step.joined("a model that rank 0 writes"):
                return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        self.create_model_card(**card)
        return self.hub.push(message=commit_message, blocking=blocking, token=token, revision=revision)

    def end(self) -> None:
        """Finish what runs beside training: uploads still in progress."""
        self.hub.finish()
