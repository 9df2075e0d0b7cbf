"""One call of ``train()``: windows of micro-batches, callbacks, logs, evaluation and saving, in transformers' order.

The reference for every event and every logged value is transformers 5.23 ``Trainer._inner_training_loop``
and ``_run_epoch``, with the metrics of trl 1.16 ``SFTTrainer.compute_loss`` and ``log``.
"""
