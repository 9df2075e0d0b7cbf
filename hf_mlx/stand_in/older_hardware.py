"""What older releases said about the machine and its user, which needs neither torch nor datasets."""

from __future__ import annotations

from typing import Any


def no(*args: Any, **kwargs: Any) -> bool:
    """Whether a package or a chip is here that this machine does not have."""
    return False


def strtobool(value: str) -> bool:
    """``trl.env_utils.strtobool``."""
    return value.lower() in ("y", "yes", "t", "true", "on", "1")


def send_nothing(*args: Any, **kwargs: Any) -> None:
    """Nothing is sent to anybody."""


class HfFolder:
    """``huggingface_hub.HfFolder``: the token on this machine."""

    @staticmethod
    def get_token() -> str | None:
        """The token, if there is one."""
        from huggingface_hub import get_token

        return get_token()

    @staticmethod
    def save_token(token: str) -> None:
        """Keep a token, for this process."""
        import os

        os.environ["HF_TOKEN"] = token

    @staticmethod
    def delete_token() -> None:
        """Forget it."""
        from huggingface_hub import logout

        logout()
