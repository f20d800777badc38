"""Micro-batches as a model reads them: padded, packed, or packed with each group's prompt once.

The response tokens of a batch stay in the order of its rows, whatever the layout.

Shapes: B rows, W padded width, L tokens of a pack, S sequences or pieces of it, N response tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import nn

from actors.messages import GroupTensors, Row
from actors.models.attention import Pieces


@dataclass(frozen=True)
class ModelInputs:
    """A micro-batch for the model: padded [B, W] with a mask, or packed [1, sum of lengths]."""

    input_ids: torch.Tensor  # [B, W] or [1, L] int64
    position_ids: torch.Tensor  # like input_ids; restarts at 0 with every packed sequence
    attention_mask: torch.Tensor | None  # [B, W]; None where packed: positions tell sequences apart
    positions: torch.Tensor  # [N] where, in the flattened batch, each response token is predicted
    targets: torch.Tensor  # [N] the response tokens themselves
    row_ends: torch.Tensor | None = None  # [S + 1] int32 of S packed sequences, 0 first
    longest: int = 0  # tokens of the longest sequence
    pieces: Pieces | None = None  # where a pack holds each prompt once; S counts them then

    def to(self, device: torch.device) -> ModelInputs:
        """The same batch on `device`."""
        return ModelInputs(
            **{
                name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in vars(self).items()
            }
        )


def collate(sequences: Sequence[tuple[np.ndarray, np.ndarray]], packed: bool) -> ModelInputs:
    """A batch from (prompt ids [P], response ids [n]) pairs; response tokens stay in row order.

    Raises:
        ValueError: a prompt is empty, so its first response token is predicted by nothing.
    """
    rows, positions, targets = [], [], []
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    start = 0
    for index, (prompt, response) in enumerate(sequences):
        if len(prompt) == 0:
            raise ValueError(f"sequence {index} of a batch has an empty prompt")
        first = start + len(prompt) - 1  # the last prompt token predicts the first response token
        positions.append(torch.arange(first, first + len(response)))
        targets.append(torch.as_tensor(response, dtype=torch.int64))
        rows.append(torch.as_tensor(np.concatenate([prompt, response]), dtype=torch.int64))
        start += len(rows[-1]) if packed else width
    lengths = torch.tensor([len(row) for row in rows])
    row_ends = None
    if packed:
        input_ids = torch.cat(rows)[None]
        position_ids = torch.cat([torch.arange(len(row)) for row in rows])[None]
        attention_mask = None
        row_ends = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    else:
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        attention_mask = (torch.arange(width)[None] < lengths[:, None]).long()
        position_ids = torch.arange(width).expand(len(rows), width).contiguous()
    return ModelInputs(
        input_ids,
        position_ids,
        attention_mask,
        torch.cat(positions),
        torch.cat(targets),
        row_ends,
        width,
    )


def collate_rows(
    groups: Mapping[int, GroupTensors], rows: Sequence[Row], packed: bool, shared: bool = False
) -> ModelInputs:
    """The model inputs of `rows`, in their order; with `shared` in a pack that holds the prompt of
    each group once."""
    if shared:
        return collate_shared(groups, rows)
    sequences = []
    for row in rows:
        group = groups[row.work]
        sequences.append((group.prompt_ids, group.token_ids[group.completion(row.completion)]))
    return collate(sequences, packed)


def collate_shared(groups: Mapping[int, GroupTensors], rows: Sequence[Row]) -> ModelInputs:
    """A pack of each group's prompt and then its completions among `rows`; response tokens stay in
    the order of the rows.

    The last token of a prompt predicts the first of each of its completions, so `positions` has it
    once for each of them.

    Raises:
        ValueError: a prompt is empty.
    """
    of_group: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        of_group.setdefault(row.work, []).append(index)
    parts: list[np.ndarray] = []
    places: list[torch.Tensor] = []
    after: list[int | None] = []
    positions: dict[int, torch.Tensor] = {}
    end = 0  # of the parts so far
    for work, members in of_group.items():
        group = groups[work]
        prompt = len(group.prompt_ids)
        if prompt == 0:
            raise ValueError(f"group {group.group_id} of a batch has an empty prompt")
        head = len(parts)
        parts.append(group.prompt_ids)
        places.append(torch.arange(prompt))
        after.append(None)
        end += prompt
        last = end - 1
        for index in members:
            response = group.token_ids[group.completion(rows[index].completion)]
            parts.append(response)
            places.append(torch.arange(prompt, prompt + len(response)))
            after.append(head)
            positions[index] = torch.arange(end - 1, end - 1 + len(response))
            positions[index][:1] = last
            end += len(response)
    pieces = Pieces(tuple(map(len, parts)), tuple(after))
    responses = [
        groups[row.work].token_ids[groups[row.work].completion(row.completion)] for row in rows
    ]
    return ModelInputs(
        input_ids=torch.as_tensor(np.concatenate(parts), dtype=torch.int64)[None],
        position_ids=torch.cat(places)[None],
        attention_mask=None,
        positions=torch.cat([positions[index] for index in range(len(rows))]),
        targets=torch.as_tensor(np.concatenate(responses), dtype=torch.int64),
        row_ends=torch.tensor([0, *accumulate(pieces.lengths)], dtype=torch.int32),
        longest=max(pieces.seen),
        pieces=pieces,
    )


def idle_inputs() -> ModelInputs:
    """One prompt and one response token, for a pass whose only use is to keep in step."""
    token = np.zeros(1, dtype=np.int64)
    return collate([(token, token)], packed=False)
