"""Key-value caches: slots that all rows share equal slots of each row, and what each sees."""

import pytest
import torch

from caddf.caches import KVCache, Slots
from caddf.models.layers import rotation


@pytest.mark.parametrize("first, n", [(0, 1), (0, 4), (3, 1), (3, 4), (7, 1)])
@pytest.mark.parametrize("context", [3, 20])
def test_shared_slots_equal_those_of_each_row(first, n, context):
    torch.manual_seed(0)
    positions, like = torch.arange(first, first + n), torch.zeros(1, dtype=torch.float64)
    shared, own = Slots.of(positions), Slots.of(positions.expand(2, n))
    assert (shared.first, own.first) == (first, None) and shared.upto == own.upto == first + n
    caches = [KVCache.allocate(2, 2, 3, 12, 4, like, rotation(torch.arange(12), 4)) for _ in range(2)]
    keys, values = torch.randn(2, 2, 3, n, 4, dtype=torch.float64)
    for cache, slots in zip(caches, (shared, own), strict=True):
        cache.write(1, slots.where, keys, values)
    assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)
    assert torch.equal(caches[0].read(1, first + n)[0][:, :, first:], keys) and not caches[0].keys[0].any()
    for given, same in zip(caches[0].turn(shared), caches[1].turn(own), strict=True):
        assert torch.equal(given.expand_as(same), same)
    # What is seen, slot by slot: all up to itself, no further back than the context.
    since, every = shared.since(context), own.visible(context)
    assert own.since(context) == 0 and every is not None
    expected = torch.tensor([[i - context < j <= i for j in range(first + n)] for i in positions.tolist()])
    assert torch.equal(every[0, 0], expected) and not expected[:, :since].any()
    visible = shared.visible(context)
    seen = torch.ones(n, first + n - since, dtype=torch.bool) if visible is None else visible[..., :, :]
    assert torch.equal(seen.reshape(n, -1), expected[:, since:])


def test_one_slot_needs_no_mask():
    assert Slots.of(torch.tensor([5])).visible(3) is None
    assert Slots.of(torch.tensor([[5]])).visible(3) is not None
