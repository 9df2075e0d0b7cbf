"""What a conversation must look like before a chat template sees it."""

from __future__ import annotations

from typing import Any

from .faults import RowFault, drop_row, show

_PAYLOADS = ("tool_calls", "reasoning_content", "thinking", "reasoning", "function_call")
_TOOL_ROLES = ("tool", "function", "ipython", "observation")


def convert_turns(turns: Any, row: int) -> list[dict[str, Any]]:
    """from/value turns as role/content messages (``trl.data_utils.maybe_convert_to_chatml``); role names are kept."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowFault(row, "conversations", show(turns), "a list of from/value turns", drop_row())
    renamed = {"from": "role", "value": "content"}
    return [{renamed.get(str(key), str(key)): value for key, value in turn.items()} for turn in turns]


def check_messages(messages: Any, column: str, row: int) -> None:
    """Raises :class:`RowFault` unless ``messages`` is a well-formed conversation in a sensible order."""
    if isinstance(messages, str) or not isinstance(messages, list):
        raise RowFault(row, column, show(messages), "a list of messages", "parse it first: json.loads(row[column])")
    if not messages:
        raise RowFault(row, column, "no messages (an empty list)", "at least one message", drop_row())
    for turn, message in enumerate(messages):
        _check_message(message, turn, column, row)


def _check_message(message: Any, turn: int, column: str, row: int) -> None:
    where = f"message {turn}"
    if not isinstance(message, dict):
        raise RowFault(row, column, f"{where} is {show(message)}", "a dict with 'role' and 'content'", drop_row())
    role = message.get("role")
    if not isinstance(role, str) or not role:
        remedy = "rename from/value turns: dataset.rename_column('messages', 'conversations')"
        raise RowFault(row, column, f"{where} has the role {show(role)}", "a role such as 'user'", remedy)
    content = message.get("content")
    payload = any(message.get(key) for key in _PAYLOADS)
    if content is None and not payload:
        raise RowFault(row, column, f"{where} ({role}) has no content (None)", "a string", drop_row())
    if isinstance(content, list):
        _check_parts(content, where, column, row)
    elif content is not None and not isinstance(content, str):
        raise RowFault(row, column, f"{where} ({role}) has the content {show(content)}", "a string", drop_row())
    elif content == "" and role in ("user", "assistant") and not payload:
        raise RowFault(row, column, f"{where} is an empty {role} turn", "a turn with text", drop_row())


def _check_parts(parts: list[Any], where: str, column: str, row: int) -> None:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RowFault(row, column, f"{where} holds {show(part)}", "text parts only", drop_row())
    if not parts:
        raise RowFault(row, column, f"{where} has an empty content list", "text", drop_row())


def check_order(messages: list[dict[str, Any]], column: str, row: int) -> None:
    """Raises :class:`RowFault` for an order no template means: late system turns, answers before any question.

    Roles the library does not know are left to the template, as is alternation: some templates require it and say so.
    """
    asked = answered = started = False
    for turn, message in enumerate(messages):
        role = message["role"]
        fault = None
        if role in ("system", "developer"):
            fault = "comes after the conversation has begun" if started else None
        elif role == "assistant":
            fault = None if asked else "comes before any user turn"
            started = answered = True
        elif role in _TOOL_ROLES:
            fault = None if answered else "answers no tool call: no assistant turn comes before it"
        else:
            started = asked = True
        if fault:
            raise RowFault(
                row,
                column,
                f"roles out of order: message {turn} ({role}) {fault}; roles are {[m['role'] for m in messages]}",
                "system first, then user and assistant, tool results after the assistant that called",
                drop_row(),
            )
