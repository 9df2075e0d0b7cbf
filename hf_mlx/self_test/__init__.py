"""``hf-mlx doctor --self-test``: does training compute the right numbers on this machine?

A tiny model is trained in ways whose every loss and gradient norm TRL was asked for once (``reference``); what has no
stored number is compared with the same thing computed another way. Nothing is downloaded.
"""

from .report import SelfTestReport
from .watch import run_self_test

__all__ = ["SelfTestReport", "run_self_test"]
