"""What a run counts as it goes: tokens, positions and operations."""

from __future__ import annotations

from ..data.collate import Batch
from ..session import Session
from ..training.inputs import Inputs
from .host import Host


def count_micro_batch(host: Host, session: Session, batch: Batch, inputs: Inputs, pad_token_id: int | None) -> None:
    """Count one micro-batch, of several processes those that all of them train at the same time.

    Args:
        host: Its state is brought up to date.
        session: Its progress, likewise.
        batch: As it was collated.
        inputs: As it is computed.
        pad_token_id: Of the tokenizer, or None.
    """
    args, state, progress, peers = host.args, host.state, session.progress, inputs.peers
    progress.mode = "train"
    progress.num_tokens += inputs.tokens if peers is None else peers.kept_tokens
    progress.padding += inputs.padding
    progress.positions += inputs.arrays["input_ids"].size
    positions = batch.input_ids.size if peers is None else sum(peers.positions)
    if args.include_num_input_tokens_seen == "all":
        state.num_input_tokens_seen += positions
    elif args.include_num_input_tokens_seen == "non_padding":
        state.num_input_tokens_seen += batch.count_input_tokens(pad_token_id) if peers is None else sum(peers.real)
    state.total_flos += session.flops_per_token * positions
