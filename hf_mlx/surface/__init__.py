"""Hugging Face's surface around a run: callbacks, the model object, the hub, metric files.

Nothing here computes a loss; :mod:`hf_mlx.trainers.sft` puts these pieces in front of the loop.
"""
