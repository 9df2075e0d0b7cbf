from contextvars import ContextVar

current_space_id = ContextVar("space", default=None)
current_run = ContextVar("run", default=None)
