"""Every error this library raises on purpose, and the one shape they share.

A message reads *received → required → remedy*: what was handed over, what the
library needs, and the corrected line to write instead.

    HFMLXError
    ├── SettingError       a TrainingArguments, SFTConfig, LoraConfig or keyword value   (ValueError)
    ├── DataError          a dataset, a column or a row                                  (ValueError)
    ├── ModelError         a checkpoint, its config, its weights or its tokenizer        (ValueError)
    ├── AdapterError       a PEFT adapter coming in or going out                         (ValueError)
    ├── CheckpointError    a folder to resume from or to write                           (ValueError)
    ├── TrainingError      the run itself: a loss that is NaN or infinite, no memory     (RuntimeError)
    └── MissingDependency  an optional library that the request needs                    (ImportError)

Each also derives from the built-in exception that HF's own trainers raise for the
same mistake, so existing ``except ValueError`` clauses keep working.
"""

from __future__ import annotations


class HFMLXError(Exception):
    """Base of every deliberate error.

    Args:
        received: What was handed over, with the name and the value.
        required: The rule it breaks.
        remedy: What to write instead; a line of code where one exists.

    Attributes:
        received, required, remedy: The three parts, for programs.
    """

    def __init__(self, received: str, required: str, remedy: str) -> None:
        self.received = received
        self.required = required
        self.remedy = remedy
        super().__init__(f"received: {received}\n  required: {required}\n  remedy: {remedy}")

    def __reduce__(self):
        # Exception pickles args, which is one string here; worker processes need all three parts.
        return type(self), (self.received, self.required, self.remedy)


class SettingError(HFMLXError, ValueError):
    """A setting that is invalid, or that cannot be honoured and would change results."""


class DataError(HFMLXError, ValueError):
    """A dataset, column or row that cannot be trained on."""


class ModelError(HFMLXError, ValueError):
    """A checkpoint that is missing, unreadable, unsupported or known to load wrong."""


class AdapterError(HFMLXError, ValueError):
    """An adapter that does not fit its base, or a target that matches nothing."""


class CheckpointError(HFMLXError, ValueError):
    """A checkpoint folder that cannot be written, or must not be resumed from."""


class TrainingError(HFMLXError, RuntimeError):
    """The run went wrong: a NaN or infinite loss, or no memory left, with the step it happened at."""


class MissingDependency(HFMLXError, ImportError):
    """An optional library is needed for this request and is not installed."""
