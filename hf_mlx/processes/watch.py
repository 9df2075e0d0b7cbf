"""Who of the other processes has ended, and who keeps them waiting: a line to rank 0 beside MLX's own.

MLX waits without limit for a process that hangs, and does not say which one was lost. Each process therefore keeps a
socket to rank 0 open, on which it says what it is at; rank 0 tells all of them who has ended. Where rank 0 cannot be
reached, messages name nobody, and all else is as it was.
"""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

#: Seconds of waiting after which it is said who is waited for.
PATIENCE = 30.0
#: Seconds after another process has failed in which MLX's own error is given the chance to be raised, and of a wait
#: that is begun after them.
FAILED = 3.0, 1.0
#: The same after one has ended well: what it sent last may still be under way.
LEFT = 5.0, 5.0
#: Seconds that a process which ends with an error, after another has failed, gets to clear up.
CLEARING = 2.0


class Watch:
    """Watches the other processes from a thread.

    Args:
        rank, size: Of the process.

    Attributes:
        limit: Seconds that the process waits for others before it ends (``ddp_timeout``).
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.limit = 1800.0
        self._ended: str | None = None
        self._gone: str | None = None
        self._who: int | None = None
        self._closed: set[int] = set()
        self._at: dict[int, int] = {}
        self._since: float | None = None
        self._what, self._computes = "", False
        self._unsaid: int | None = None
        self._has_failed = False
        self._lock = threading.RLock()
        self._lines: dict[int, socket.socket] = {}
        self._news = threading.Event()
        self._is_over = False
        self._server: socket.socket | None = None
        threading.Thread(target=self._look, name="watch", daemon=True).start()
        atexit.register(self.leave)

    def listen(self, host: str | None) -> tuple[str, int, str]:
        """On rank 0: where the others are to :meth:`connect`, as its arguments."""
        self._server = _listen(host)
        return host or socket.gethostname(), self._server.getsockname()[1], secrets.token_hex(8)

    def connect(self, host: str, port: int, token: str) -> None:
        """Open the line to rank 0, which waits for all of them."""
        if self._server is not None:
            self._accept(self._server, token)
        else:
            self._call(host, port, token)

    @contextmanager
    def waiting(self, what: str, *, computes: bool = False) -> Iterator[None]:
        """A block in which the main thread may have to wait for other processes.

        Args:
            what: What for.
            computes: It also has work of its own, so nobody is waited for unless one is behind.
        """
        before = self._what, self._computes, self._since
        self._what, self._computes, self._since = what, computes, time.monotonic()
        try:
            yield
        finally:
            self._what, self._computes, self._since = before

    def say(self, step: int) -> None:
        """Let the others know soon which step this process is at."""
        self._at[self.rank] = step
        if self._has_failed:
            # The script has caught the error, and goes on.
            self._has_failed = False
            self._send({"rank": self.rank, "at": step})
        else:
            # The watching thread sends it: a step has nothing to wait for here.
            self._unsaid = step

    def fail(self, error: BaseException) -> None:
        """Let the others know why this process ends."""
        line = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        with self._lock:
            # Said later it would mean that the process goes on.
            self._unsaid, self._has_failed = None, True
            self._send({"rank": self.rank, "failed": line[:500]})

    def leave(self) -> None:
        """Let the others know that this process ends."""
        # What the interpreter has just printed, if that is why it ends.
        error = getattr(sys, "last_value", None)
        if error is not None:
            self.fail(error)
            if self._ended is not None:
                self._end_within(CLEARING)
        self._is_over = True
        self._send({"rank": self.rank, "done": True})

    @property
    def is_left(self) -> bool:
        """Whether another process has failed and is gone: a script that catches the error goes on."""
        return self._ended is not None and self._who in self._closed

    def name_ended(self) -> str | None:
        """Which process has ended, in words; waits a moment for the news."""
        if self._lines:
            self._news.wait(2.0)
        return self._ended or self._gone

    def _send(self, message: dict[str, Any], leave_out: int | None = None) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            for rank, line in list(self._lines.items()):
                if rank == leave_out:
                    continue
                try:
                    line.sendall(data)
                except OSError:
                    self._lines.pop(rank, None)

    def _accept(self, server: socket.socket, token: str) -> None:
        deadline = time.monotonic() + 5
        while len(self._lines) < self.size - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                line, _ = server.accept()
                line.settimeout(2)
                hello = json.loads(line.makefile().readline())
                if hello["token"] == token:
                    line.settimeout(None)
                    self._lines[int(hello["rank"])] = line
            except (OSError, ValueError, KeyError):
                continue
        server.close()
        self._follow()

    def _call(self, host: str, port: int, token: str) -> None:
        try:
            line = socket.create_connection((host, port), timeout=5)
        except OSError:
            return
        line.settimeout(None)
        line.sendall(json.dumps({"rank": self.rank, "token": token}).encode() + b"\n")
        self._lines[0] = line
        self._follow()

    def _follow(self) -> None:
        for rank, line in self._lines.items():
            threading.Thread(target=self._read, args=(rank, line), name=f"watch-{rank}", daemon=True).start()

    def _read(self, rank: int, line: socket.socket) -> None:
        done = False
        try:
            for text in line.makefile():
                message = json.loads(text)
                who = int(message["rank"])
                if "at" in message:
                    self._at[who] = int(message["at"])
                    if who == self._who:
                        # Its script has caught the error, and goes on.
                        self._ended = self._who = None
                        self._news.clear()
                    if self.rank == 0:
                        self._send(message, leave_out=who)
                elif "done" in message:
                    done = done or who == rank
                    self._gone = self._gone or f"rank {who} has ended before the others"
                elif "failed" in message:
                    self._hear(who, f"rank {who} has ended with {message['failed']}")
                elif "ended" in message:
                    self._hear(who, message["ended"])
                elif "closed" in message:
                    self._closed.add(who)
        except (OSError, ValueError, KeyError):
            pass
        if not done and not self._is_over:
            at = f" at step {self._at[rank]}" if rank in self._at else ""
            self._hear(rank, f"rank {rank} has ended without a word{at}")
        self._closed.add(rank)
        if self.rank == 0:
            self._send({"rank": rank, "closed": True}, leave_out=rank)

    def _hear(self, rank: int, words: str) -> None:
        if self._ended is None:
            self._ended, self._who = words, rank
            if self.rank == 0:
                self._send({"rank": rank, "ended": words})
            self._news.set()

    def _look(self) -> None:
        said, heard = False, None
        while True:
            time.sleep(0.25)
            with self._lock:
                step, self._unsaid = self._unsaid, None
                if step is not None:
                    self._send({"rank": self.rank, "at": step})
            since, now = self._since, time.monotonic()
            if (ended := self._ended or self._gone) is not None:
                heard = heard or now
                # The ring raises by itself; what does not would wait for ever. A ring that sums what is left of it goes
                # from one wait to the next.
                grace, brief = FAILED if self._ended else LEFT
                if since is not None and now - heard > grace and now - since > brief:
                    self._end(f"{ended}; rank {self.rank} waited for it at {self._what}")
            else:
                heard = None
            if since is None:
                said = False
                continue
            behind = self._behind()
            if self._computes and not behind:
                continue
            if not said and now - since > PATIENCE:
                said = True
                print(
                    f"rank {self.rank} has waited {PATIENCE:.0f} s at {self._what} for {behind or 'another rank'}; "
                    f"it ends after ddp_timeout={self.limit:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
            if now - since > self.limit:
                who = behind or "another rank"
                self._end(f"rank {self.rank} waited ddp_timeout={self.limit:.0f} s at {self._what} for {who}")

    def _behind(self) -> str:
        """Who has not come as far as this process, in words; empty where nobody is known to."""
        own = self._at.get(self.rank, 0)
        others = [rank for rank in range(self.size) if rank != self.rank]
        known = [f"rank {rank} (at step {self._at[rank]})" for rank in others if self._at.get(rank, own) < own]
        return ", ".join(known) or (f"rank {others[0]}" if len(others) == 1 and not self._computes else "")

    def _end_within(self, seconds: float) -> None:
        """End soon, whatever is left to do: a busy machine takes half a minute to unload torch and its kin."""
        # Its timer needs neither the interpreter nor another thread. What it would print has been said.
        self._nowhere = open(os.devnull, "w")  # noqa: SIM115
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._nowhere)

    def _end(self, words: str) -> None:
        print(f"hf_mlx: {words}. trainer.train(resume_from_checkpoint=True) goes on.", file=sys.stderr, flush=True)
        os._exit(1)


def _listen(host: str | None) -> socket.socket:
    try:
        return socket.create_server((host or "", 0))
    except OSError:
        return socket.create_server(("", 0))
