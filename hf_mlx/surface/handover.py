"""Weights between a user's torch model and the session that trains its MLX copy: over before, back after."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..adapters.adapter import Adapter
from ..adapters.export import peft_tensors
from ..adapters.files import write_files
from ..adapters.layers import LoRAEmbedding
from ..adapters.slots import Slot, slots_of
from ..adapters.source import WEIGHTS, read_shapes, read_tensors
from ..adapters.vocabulary import carried_slots
from ..errors import AdapterError, SettingError, TrainingError
from ..models.bridge import TorchModel, without_adapter
from ..models.heads import module_at
from ..models.torch_arrays import to_mlx, to_torch
from ..models.torch_hooks import check_hooks
from ..session import Session
from .gradients import read_written
from .marks import FrozenMarks
from .ties import Tied, tie_object
from .writes import differs, refuse_frozen, refuse_toggled, refuse_within, take_over


class Handover:
    """The tie between a torch model and the session that trains its copy.

    Args:
        source: The user's model, with its adapter already on it.
        session: Trains the MLX copy; takes the adapter's weights as its start.

    Raises:
        AdapterError: PEFT holds other tensors than this config calls for.
        SettingError: ``requires_grad`` is set on other parameters than those that would be trained.
    """

    def __init__(self, source: TorchModel, session: Session) -> None:
        self.source = source
        self.session = session
        if session.adapter is not None:
            self._adopt(session.adapter)
        self._trained = source.trained()
        self._lent: dict[str, tuple[Any, mx.array]] = {}
        self._hand_out()

    def write_back(self) -> None:
        """Copy what was trained since the last call, and what came from a checkpoint, into the user's model."""
        step = self.session.step
        self._write_restored()
        if step.params is not self._written:
            step.objective.slots.bind(step.params)
            held, ours = self._both()
            self.source.write({key: ours[key] for key in held}, held)
        self._hand_out()

    def take_over(self, event: str) -> None:
        """Train on from what was written into the user's model since it was handed out.

        Raises:
            TrainingError: Into what is not trained, where no step would see it in time, or requires_grad was set.
            SettingError: A hook was set.
        """
        # Weights of a checkpoint were loaded meanwhile: upstream's would have overwritten what was written.
        if not self._out or self.session.step.params is not self._written:
            return
        self._out = False
        check_hooks(self.source.model)
        trained = self.source.trained()
        toggled = next(iter(sorted(trained ^ self._trained)), None)
        if toggled is not None:
            refuse_toggled(toggled, toggled in trained, event)
        frozen = self._frozen.find_written(self.source)
        if frozen is not None:
            refuse_frozen(frozen, event)
        held, ours = self._both()
        changed = {key: to_mlx(value) for key, value in held.items() if differs(value, ours[key])}
        if changed:
            refuse_within(event, next(iter(changed)))
            take_over(self.session, self._to_params(held, changed))
            self._written = self.session.step.params

    def parameters(self, paths: Iterable[str]) -> list[Any]:
        """The user's parameters at these MLX paths, in their order."""
        wanted, adapter = {self.session.hf_name(path) for path in paths}, self.source.adapter
        named = [(name, value) for name, value in self.source.model.named_parameters() if value.requires_grad]
        return [value for name, value in named if (without_adapter(name, adapter) if adapter else name) in wanted]

    def lend_gradients(self, grads: dict[str, mx.array]) -> None:
        """Let ``p.grad`` of the user's trained parameters be these, by MLX name.

        Raises:
            TrainingError: A parameter of the object is stacked from several of its checkpoint's.
        """
        held, ours = self._gradients_by_key(grads)
        live = {value.data_ptr(): value for value in self.source.model.parameters()}
        self._lent = {}
        for key, value in ours.items():
            parameter = live.get(held[key].data_ptr())
            if parameter is None or parameter.shape != held[key].shape:
                raise TrainingError(
                    f"p.grad of {key}, which the object holds stacked with others",
                    "a parameter of its own",
                    "leave on_pre_optimizer_step out, or name the model: its copies have gradients",
                )
            parameter.grad = to_torch(value).to(parameter.device, parameter.dtype)
            self._lent[key] = (parameter, value)

    def take_gradients(self) -> dict[str, mx.array]:
        """End the loan; by MLX name, what was written into the gradients."""
        lent, self._lent = self._lent, {}
        found = {key: read_written(key, parameter, value) for key, (parameter, value) in lent.items()}
        changed = {key: value for key, value in found.items() if value is not None}
        params = self._to_params({key: p.grad for key, (p, _) in lent.items()}, changed) if changed else {}
        for parameter, _ in lent.values():
            parameter.grad = None
        return params

    def _gradients_by_key(self, grads: dict[str, mx.array]) -> tuple[dict[str, Any], dict[str, mx.array]]:
        slots = self.session.step.objective.slots
        if self.session.adapter is None:
            held, ours = self.source.tensors(), self.session.loaded.names.export_weights(grads)
            return {key: held[key] for key in ours}, ours
        # The adapter's own layers say under which key each array is.
        slots.bind(grads)
        try:
            return self.source.adapter_tensors(), peft_tensors(self.session.adapter)
        finally:
            slots.bind(self.session.step.params)

    def tie(self, parameters: list[Any]) -> Tied:
        """Ties between parameters of an optimizer over the user's model and what is trained."""
        return tie_object(self.source, self.session, self._both()[0], parameters)

    def _hand_out(self) -> None:
        self._written = self.session.step.params
        self._frozen = FrozenMarks(self.source)
        self._out = True

    def _both(self) -> tuple[dict[str, Any], dict[str, mx.array]]:
        """The user's trained tensors, and ours under the same names."""
        if self.session.adapter is not None:
            return self.source.adapter_tensors(), peft_tensors(self.session.adapter)
        ours = self.session.loaded.names.export_weights(self.session.step.params)
        held = self.source.tensors()
        return {key: held[key] for key in ours}, ours

    def _to_params(self, held: Mapping[str, Any], changed: Mapping[str, mx.array]) -> dict[str, mx.array]:
        # Stacked and fused parameters need all of their tensors, so all are read and the changed ones kept.
        tensors = {key: changed[key] if key in changed else to_mlx(value) for key, value in held.items()}
        adapter, names = self.session.adapter, self.session.loaded.names
        if adapter is None:
            params = names.import_weights(tensors)
            return {path: params[path] for path in params if not changed.keys().isdisjoint(names.to_hf_names(path))}
        slots = {k: s for k, s in slots_of(adapter).items() if not s.base}
        params = read_parameters(adapter, slots, tensors)
        paths = {slots[key].mlx_path for key in changed if key in slots}
        return {path: params[path] for path in paths}

    def complete_adapter(self, folder: Path) -> None:
        """Add to a saved adapter what PEFT leaves out of it.

        Of a resized model of which one end is targeted and the other is not, PEFT 0.21 writes the first alone: new rows
        of the other would be lost. PEFT reads them where they are there.

        Args:
            folder: What ``save_pretrained`` of the user's object has written.
        """
        adapter, loaded = self.session.adapter, self.session.loaded
        if adapter is None or not loaded.resized or not (folder / WEIGHTS).is_file():
            return
        there, held = read_shapes(folder), self.source.tensors()
        slots = {key: slot for key, slot in carried_slots(loaded, adapter.blueprint).items() if key not in there}
        names = {key: loaded.names.to_hf_name(slot.plain) for key, slot in slots.items() if slot.mlx_path}
        lost = {key: to_mlx(held[name]) for key, name in names.items() if name in held}
        if lost:
            tensors = read_tensors(folder) | lost
            save = partial(mx.save_safetensors, arrays=tensors, metadata={"format": "pt"})
            write_files(folder, {WEIGHTS: lambda path: save(str(path))})

    def _write_restored(self) -> None:
        restored, self.session.restored = self.session.restored, {}
        if restored:
            plain = {name.replace(".base_layer.", "."): value for name, value in restored.items()}
            # Of a tied pair the object has one tensor; either end alone may come from the checkpoint.
            held = self.source.tensors(tied=True)
            exported = self.session.loaded.names.export_weights(plain)
            self.source.write({name: value for name, value in exported.items() if name in held}, held)

    def _adopt(self, adapter: Adapter) -> None:
        held = self.source.adapter_tensors()
        slots = {k: s for k, s in slots_of(adapter).items() if not s.base}
        _account(held, slots)
        _check_scales(self.source, adapter)
        _check_trained(self.source.trained() - adapter.idle.keys(), {adapter.hf_name(p) for p in adapter.trainable()})
        params = dict(self.session.step.params)
        arrays = {key: to_mlx(held[key]) for key in slots}
        adapter.idle.update({key: value for key, value in arrays.items() if slots[key].idle})
        params |= read_parameters(adapter, slots, arrays)
        if not self.session.plan.model.precision.autocast:
            _compute_in_own_dtype(adapter, params)
        mx.eval(params)
        self.session.step.load(params, self.session.step.optimizer.init(params))


def read_parameters(
    adapter: Adapter, slots: Mapping[str, Slot], tensors: Mapping[str, mx.array]
) -> dict[str, mx.array]:
    """PEFT's tensors as MLX parameters, dtypes kept.

    Args:
        adapter: What they belong to.
        slots: PEFT key to slot.
        tensors: PEFT key to array.
    """
    names = adapter.loaded.names
    params: dict[str, mx.array] = {}
    for key, slot in slots.items():
        if slot.idle:
            continue
        if slot.as_stored:
            plain = slot.mlx_path.replace(".base_layer.", ".")
            params[slot.mlx_path] = names.import_weights({names.to_hf_name(plain): tensors[key]})[plain]
        else:
            params[slot.mlx_path] = tensors[key]
    return params


def _account(held: Mapping[str, Any], slots: Mapping[str, Slot]) -> None:
    missing, unexpected = sorted(slots.keys() - held.keys()), sorted(held.keys() - slots.keys())
    wrong = [key for key in slots if key in held and tuple(held[key].shape) != slots[key].shape]
    if missing or unexpected or wrong:
        raise AdapterError(
            f"a PeftModel with {(missing + unexpected + wrong)[0]} "
            f"{'missing' if missing else 'beyond its config' if unexpected else 'in another shape'}",
            f"the {len(slots)} tensors that its LoraConfig calls for",
            "get_peft_model(model, LoraConfig(...)) on the model as it was loaded",
        )


def _check_scales(source: TorchModel, adapter: Adapter) -> None:
    modules = dict(source.base.named_modules())
    for target in adapter.targets:
        scales = getattr(modules.get(target.key), "scaling", {})
        found = scales.get(source.adapter, target.scale)
        if not math.isclose(found, target.scale, rel_tol=1e-6):
            raise AdapterError(
                f"{target.hf_path} with an adapter scaled by {found:g}, whose LoraConfig says {target.scale:g}",
                "a LoraConfig that was not changed after the adapter was made",
                f"set it back: lora_alpha={target.alpha * found / target.scale:g}",
            )


def _check_trained(theirs: set[str], ours: set[str]) -> None:
    # Two spellings of PEFT's live names that its keys do not have.
    theirs = {name.replace(".modules_to_save", "", 1).replace("_vector.weight", "_vector") for name in theirs}
    frozen, extra = sorted(ours - theirs), sorted(theirs - ours)
    if not theirs:
        raise SettingError(
            "a PeftModel of which nothing is trainable",
            "an adapter whose parameters have requires_grad=True",
            "PeftModel.from_pretrained(model, adapter, is_trainable=True)",
        )
    if frozen or extra:
        raise SettingError(
            f"requires_grad={'False' if frozen else 'True'} on {(frozen or extra)[0]} "
            f"({len(frozen) + len(extra)} such parameter(s))",
            "what the LoraConfig trains, no more and no less",
            "leave requires_grad as get_peft_model set it (layers_to_transform and modules_to_save choose layers)",
        )


def _compute_in_own_dtype(adapter: Adapter, params: Mapping[str, mx.array]) -> None:
    # Without autocast PEFT computes in the dtype of the adapter's weights.
    for target in adapter.targets:
        layer = module_at(adapter.loaded.model, target.mlx_path)
        leaf = "lora_embedding_A" if isinstance(layer, LoRAEmbedding) else "lora_A"
        layer.compute_dtype = params[f"{target.mlx_path}.{leaf}"].dtype
