"""`visibility` against the rule written out as two loops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm5.model.masks import TokenPositions, visibility
from glm5.model.transformer import token_positions

quick = settings(max_examples=200, deadline=None)
CPU = torch.device("cpu")


@dataclass
class Row:
    """One row of a batch: left padding, then packed documents, each with a prefix."""

    padding: int
    documents: list[tuple[int, int]]  # (length, prefix length)

    def slots(self) -> list[tuple[int, bool, bool, int]]:
        """(position, valid, prefix, document) of every slot."""
        out = [(0, False, False, 0)] * self.padding
        for document, (length, prefix) in enumerate(self.documents):
            out += [(position, True, position < prefix, document) for position in range(length)]
        return out


@st.composite
def rows(draw: st.DrawFn) -> list[list[tuple[int, bool, bool, int]]]:
    length = draw(st.integers(1, 12))
    batch = []
    for _ in range(draw(st.integers(1, 3))):
        padding = draw(st.sampled_from([0, 0, 1, length - 1]))
        documents, left = [], length - padding
        while left:
            size = draw(st.integers(1, left))
            documents.append((size, draw(st.integers(0, size))))
            left -= size
        batch.append(Row(padding, documents).slots())
    return batch


def column(batch: list[list[tuple[int, bool, bool, int]]], index: int) -> Tensor:
    return torch.tensor([[slot[index] for slot in row] for row in batch])


def last(places: TokenPositions, count: int) -> TokenPositions:
    parts = (places.positions, places.valid, places.prefix, places.documents)
    return TokenPositions(*(None if part is None else part[:, -count:] for part in parts))  # type: ignore[arg-type]


def visible_by_loops(keys: TokenPositions, num_queries: int) -> Tensor:
    """Slot order instead of positions: within a document the two must say the same."""
    batch, num_keys = keys.positions.shape
    mask = torch.zeros(batch, num_queries, num_keys, dtype=torch.bool)
    for b in range(batch):
        for t in range(num_queries):
            query = num_keys - num_queries + t
            for s in range(num_keys):
                if keys.valid is not None and not keys.valid[b, query]:
                    mask[b, t, s] = s == query
                    continue
                usable = keys.valid is None or bool(keys.valid[b, s])
                same = keys.documents is None or bool(keys.documents[b, s] == keys.documents[b, query])
                ahead = keys.prefix is not None and bool(keys.prefix[b, s])
                mask[b, t, s] = usable and same and (s <= query or ahead)
    return mask


@quick
@given(st.data(), rows(), st.booleans())
def test_visibility_is_the_rule(data: st.DataObject, batch: list, has_prefix: bool) -> None:
    several = any(slot[3] for row in batch for slot in row)
    has_documents = several or data.draw(st.booleans())
    padded = not all(slot[1] for row in batch for slot in row)
    keys = TokenPositions(
        column(batch, 0),
        column(batch, 1) if padded or data.draw(st.booleans()) else None,
        column(batch, 2) if has_prefix else None,
        column(batch, 3) if has_documents else None,
    )
    num_queries = data.draw(st.integers(1, len(batch[0])))
    queries = last(keys, num_queries)
    if queries.valid is not None and bool(queries.valid.all()) and data.draw(st.booleans()):
        queries = TokenPositions(queries.positions, None, queries.prefix, queries.documents)
    seen = visibility(queries, keys)
    assert seen.num_keys == len(batch[0])
    mask = seen.as_mask(num_queries, CPU).expand(len(batch), -1, -1)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, visible_by_loops(keys, num_queries))
    assert bool(mask.any(dim=-1).all())  # a softmax over nothing is not finite


@quick
@given(st.integers(1, 9), st.integers(0, 9))
def test_plain_rows_need_no_mask(num_queries: int, cached: int) -> None:
    keys = TokenPositions(torch.arange(num_queries + cached).expand(3, -1))
    seen = visibility(last(keys, num_queries), keys)
    assert seen.mask_BTS is None and seen.is_causal
    mask = seen.as_mask(num_queries, CPU).expand(3, -1, -1)
    assert torch.equal(mask, visible_by_loops(keys, num_queries))


@quick
@given(rows())
def test_positions_count_from_the_first_token_of_each_document(batch: list) -> None:
    valid = column(batch, 1)
    places = token_positions(valid.long(), attention_mask=valid.long(), document_ids=column(batch, 3))
    assert torch.equal(places.positions[valid], column(batch, 0)[valid])
    assert places.is_plain is False
    if bool(valid.all()):
        assert places.valid is None
    else:
        assert torch.equal(places.valid, valid)


@quick
@given(st.integers(1, 9), st.data())
def test_prefix_lengths_count_from_the_first_unpadded_token(length: int, data: st.DataObject) -> None:
    padding = [data.draw(st.integers(0, length - 1)) for _ in range(2)]
    prefix = [data.draw(st.integers(0, length)) for _ in range(2)]
    attention_mask = torch.tensor([[int(slot >= pad) for slot in range(length)] for pad in padding])
    places = token_positions(attention_mask, attention_mask, prefix_lengths=torch.tensor(prefix))
    mask = visibility(places, places).as_mask(length, CPU)
    for b, (pad, size) in enumerate(zip(padding, prefix, strict=True)):
        for t in range(pad, length):
            reach = max(t, min(pad + size, length) - 1)
            assert mask[b, t].nonzero().flatten().tolist() == list(range(pad, reach + 1))
