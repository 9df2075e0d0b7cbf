"""The trainers: each a signature and a recipe on one house.

:mod:`~hf_mlx.trainers.base` wires the stages in the constructor. What a trainer does afterwards is one class on top of
the other: :mod:`~hf_mlx.trainers.records` (logs, metrics, callbacks), :mod:`~hf_mlx.trainers.publishing` (saving, hub),
:mod:`~hf_mlx.trainers.evaluating` (``evaluate``, ``predict``), :mod:`~hf_mlx.trainers.running` (``train``).
"""
