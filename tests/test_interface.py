"""Patterns, and a plain function in the place of a model."""

import pytest
import torch
from catalogue import Joint
from enumeration import denoiser_of
from torch import Tensor

from caddf.denoiser import as_model
from caddf.errors import InputError
from caddf.interface import AnyOrder, Block, Infill

V, L = 3, 4
JOINT = Joint.random(V, L)
MODEL = as_model(JOINT, V)
M = V


def conditional(shown: list[int], i: int) -> Tensor:
    """log p0(x_i | shown), from the joint by hand; the mask stands for what is not shown."""
    total = torch.zeros(V, dtype=torch.float64)
    for x, p in zip(JOINT.sequences.tolist(), JOINT.probs, strict=True):
        if all(s in (M, token) for s, token in zip(shown, x, strict=True)):
            total[x[i]] += p
    return (total / total.sum()).log()


def test_blocks_are_counted_from_the_offset() -> None:
    positions = torch.arange(7)
    assert Block(3).index(positions).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert Block(3).start(positions).tolist() == [0, 0, 0, 3, 3, 3, 6]
    assert Block(3, 2).index(positions).tolist() == [-1, -1, 0, 0, 0, 1, 1]
    assert Block(3, 2).start(positions).tolist() == [0, 0, 2, 2, 2, 5, 5]
    for wrong in ((0, 0), (3, 3), (3, -1)):
        with pytest.raises(InputError):
            Block(*wrong)


PREFIX = torch.tensor([[2, 0, 1, 2], [1, 1, 0, 0]])
CANVAS = torch.tensor([[M, 0, M, M], [M, M, M, 0]])
MASKED = CANVAS == M


@pytest.mark.parametrize(
    ("pattern", "head", "shown"),
    [
        (Infill(), "fused", lambda x, z, i: x[:i] + z[i:]),
        (Infill(), "draft", lambda x, z, i: z),
        (Infill(), "causal", lambda x, z, i: x[:i] + [M] * (L - i)),
        (Block(2), "fused", lambda x, z, i: x[:i] + z[i : i // 2 * 2 + 2] + [M] * (L - i // 2 * 2 - 2)),
        (
            Block(2),
            "draft",
            lambda x, z, i: x[: i // 2 * 2] + z[i // 2 * 2 : i // 2 * 2 + 2] + [M] * (L - i // 2 * 2 - 2),
        ),
        (Block(2), "causal", lambda x, z, i: x[:i] + [M] * (L - i)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_function_s_readings(pattern, head, shown) -> None:  # type: ignore[no-untyped-def]
    states, _ = MODEL(PREFIX, CANVAS, pattern)
    given = MODEL.log_probs(states, MASKED, head)
    rows, columns = MASKED.nonzero(as_tuple=True)
    for log_p, r, i in zip(given, rows.tolist(), columns.tolist(), strict=True):
        torch.testing.assert_close(log_p, conditional(shown(PREFIX[r].tolist(), CANVAS[r].tolist(), i), i))
    nll = MODEL.nll(states, MASKED, PREFIX, head)
    torch.testing.assert_close(nll, -given.gather(-1, PREFIX[MASKED][:, None])[:, 0])


def test_any_order_reading() -> None:
    given = denoiser_of(MODEL)(CANVAS, MASKED)
    rows, columns = MASKED.nonzero(as_tuple=True)
    for log_p, r, i in zip(given, rows.tolist(), columns.tolist(), strict=True):
        torch.testing.assert_close(log_p, conditional(CANVAS[r].tolist(), i))


def test_reading_nothing() -> None:
    nowhere = torch.zeros_like(MASKED)
    for pattern, canvas in ((AnyOrder(), PREFIX), (Infill(), CANVAS)):
        states, _ = MODEL(PREFIX, canvas, pattern)
        assert MODEL.log_probs(states, nowhere).shape == (0, V)
        assert MODEL.nll(states, nowhere, PREFIX).shape == (0,)


def test_a_function_s_mistakes_are_named() -> None:
    def read(function: object) -> None:
        denoiser_of(as_model(function, V))(CANVAS, MASKED)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="shape"):
        read(lambda x: torch.zeros(*x.shape, V - 1))
    with pytest.raises(InputError, match="sum to 3"):
        read(lambda x: torch.zeros(*x.shape, V))  # logits
    with pytest.raises(InputError, match="vocab_size"):
        as_model(JOINT)
    read(lambda x: torch.zeros(*x.shape, V + 1).log_softmax(-1).fill_(-torch.tensor(V).log().item()))


def test_a_model_stays_itself() -> None:
    assert as_model(MODEL) is MODEL
