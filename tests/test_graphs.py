"""Rounds on buffers that stay where they are: what the decoder's steps give, with nothing that waits for a number.

Graphs are recorded on a GPU alone. Here the same rounds run step by step, and as often as recording runs them.
"""

import contextlib
import copy
import gc
import itertools
import threading
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from caddf import graphs
from caddf.categorical import RowGenerators, Warp
from caddf.compile import compiled
from caddf.decoding import Autoregressive, Speculative, Task
from caddf.decoding.task import DecodingError
from caddf.graphs import Engine, Graphs, Shape
from caddf.interface import Drafting
from caddf.models.backbone import DualBranch
from caddf.models.causal_model import CausalConfig, CausalModel
from caddf.models.config import BranchConfig, ModelConfig

V, T = 83, 40


def loud(model):
    """In float64, with weights that are large enough for every part to be heard, biases among them."""
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.1 * torch.randn(parameter.shape)).double()
    return model.eval().requires_grad_(False)


def dual(context: int = T, **settings) -> DualBranch:
    torch.manual_seed(4)
    own = {"token_shift": True, **settings.pop("causal", {})}
    diffusion = BranchConfig(2, 32, 4, alibi=settings.pop("alibi", True))
    settings = {"embeddings": "tied", "draft": "chained", "block_size": 6, "own_state": True, **settings}
    return loud(DualBranch(ModelConfig(V, context, diffusion, BranchConfig(2, 48, 3, **own), **settings)))


def small() -> DualBranch:
    return dual(draft_vocab=40, causal={"activation": "relu2", "qk_norm": True})


def learned() -> DualBranch:
    return dual(causal={"positions": "learned", "bias": True, "token_shift": False}, embeddings="separate", alibi=False)


def gpt2() -> CausalModel:
    torch.manual_seed(0)
    return loud(CausalModel(CausalConfig(V, T, BranchConfig(2, 48, 3, positions="learned", bias=True), block_size=6)))


def shifted() -> CausalModel:
    torch.manual_seed(0)
    return loud(CausalModel(CausalConfig(V, 24, BranchConfig(2, 48, 3, token_shift=True), block_size=6)))


def attached(model):
    model.graphs = Graphs(model)
    return model


def texts(rows: int, prompt: int, seed: int = 0) -> torch.Tensor:
    """Prompts of unequal length, the first's given."""
    x = torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.arange(T) < prompt + 3 * torch.arange(rows)[:, None], x, V)


def written(model, decoder, x, *, seed: int = 0, warp: Warp | None = None, **more):
    lengths = torch.tensor([T, T - 5, T - 1, T - 18])[: len(x)]
    task = Task(x, lengths, V, RowGenerators(seed, len(x)), warp or Warp(), **more)
    return [replace(frame, counts=frame.counts.copy()) for frame in decoder(model, task)]


def assert_alike(one, two):
    assert len(one) == len(two) > 2
    for whole, steps in zip(one, two, strict=True):
        for name in ("tokens", "fresh", "drafts", "corrected"):
            a, b = getattr(whole, name), getattr(steps, name)
            assert (a is None and b is None) or torch.equal(a, b), name
        assert torch.equal(whole.counts.all, steps.counts.all)


@pytest.fixture
def rounds(monkeypatch):
    """How many rounds were made, and how wide their attention was; the narrowest is that of few slots."""
    monkeypatch.setattr(graphs, "NARROWEST", 16)
    made, round = [], Engine.round
    monkeypatch.setattr(Engine, "round", lambda self, upto, *more: (made.append(upto), round(self, upto, *more))[1])
    return made


KINDS = {
    "autoregressive": (dual, Autoregressive()),
    "of a model of one branch": (gpt2, Autoregressive()),
    "of one that slides": (shifted, Autoregressive()),
    "drafts": (dual, Speculative()),
    "drafts of all places": (dual, Speculative(drafts=6, renew=1)),
    "a window each round": (dual, Speculative(drafts=6, renew=6)),
    "windows used up": (dual, Speculative(block_size=8, drafts=2, renew=1, lookup=1, least=0.05)),
    **{f"{k} drafts": (dual, Speculative(block_size=k)) for k in (1, 2, 3, 8)},
    "unsure drafts": (dual, Speculative(least=0.2)),
    "copies": (dual, Speculative(lookup=1)),
    "long copies": (dual, Speculative(block_size=2, lookup=1, copies=12)),
    "long copies of a model of one branch": (gpt2, Speculative(block_size=2, lookup=1)),
    "long copies of more than the context": (learned, Speculative(block_size=2, lookup=1, copies=64)),
    "few copies, unsure": (small, Speculative(block_size=2, lookup=1, least=0.2)),
    "copies of a model of one branch": (gpt2, Speculative(lookup=1)),
    "surer drafts": (dual, Speculative(least=0.6)),
    "drafts that are never sure": (dual, Speculative(least=1.0)),
    "a context that slides": (lambda: dual(context=24), Speculative(block_size=4)),
    "a small vocabulary": (small, Speculative()),
    "a small vocabulary, unsure": (small, Speculative(least=0.2)),
    "learned positions": (learned, Speculative()),
}


WARPS = {"greedy": Warp(0.0), "warm": Warp(0.8), "filters": Warp(0.9, 30, 0.8, 0.02)}
MANY = ("autoregressive", "a small vocabulary", "copies")
"""Kinds under every warp, with a prompt and without; others once, each as `ONCE` says in turn."""
ONCE = ((0, "warm"), (9, "greedy"))


@pytest.mark.parametrize(
    ("kind", "prompt", "name"),
    [
        each
        for each in itertools.product(KINDS, (0, 9), WARPS)
        if each[0] in MANY or each[1:] == ONCE[list(KINDS).index(each[0]) % 2] or (each[1] and "long" in each[0])
    ],
)
@torch.inference_mode()
def test_a_round_is_what_its_steps_are(kind, prompt, name, rounds):
    """Rows of unequal length, one of which meets its end early: the same tokens, marks and counts, frame by frame."""
    (make, decoder), warp = KINDS[kind], WARPS[name]
    plain, model = make(), attached(make())

    def early(rows: torch.Tensor) -> torch.Tensor:
        return torch.tensor([False, False, True, False]) & (rows[:, prompt + 10] != V)

    given = {"warp": warp, "finished": early}
    x = texts(4, prompt)
    if "long" in kind:
        x = torch.where(x == V, V, x[:, torch.arange(T) % 3])
    one = written(model, decoder, x, **given)
    assert "long" not in kind or not prompt or int((one[0].drafts != V).sum(1).max()) >= 8
    assert len(one) - len(rounds) <= 1  # all of them but where a prompt is read
    assert len({*rounds}) > 1 or "more than the context" in kind
    rounds.clear()
    assert_alike(one, written(plain, decoder, x, **given))
    assert not rounds
    assert one[-1].tokens[:2].unique().numel() > 1 + 4 * bool(warp.temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.inference_mode()
def test_a_single_row_and_many_seeds(temperature, rounds):
    plain, model = dual(), attached(dual())
    for seed in range(6):
        x = texts(1, 1 + seed, seed)
        given = {"seed": seed, "warp": Warp(temperature)}
        assert_alike(written(model, Speculative(), x, **given), written(plain, Speculative(), x, **given))
    assert rounds and len(model.graphs.idle) == 1  # one engine served them all


@torch.inference_mode()
def test_what_a_template_gives_stays_where_nothing_fuses():
    """The target is causal there, as that of recorded rounds, which know nothing of what is given behind."""
    settings = {"exchange": "one_way", "fusion": "none", "own_state": False}
    x = torch.where(torch.arange(T) % 7 == 5, 1, texts(3, 4))
    one, two = (
        written(model, Autoregressive(), x, template=True) for model in (attached(dual(**settings)), dual(**settings))
    )
    assert_alike(one, two)
    assert (one[-1].tokens[:, 5::7] == 1).all()


class Forbidden(TorchDispatchMode):
    """Fails where a number is waited for, or where a shape follows from one, and where tensors come from the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, indices = function.name(), args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ()
        waits = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "lift_fresh", "is_nonzero", "equal.")
        assert not any(word in name for word in waits if word != "equal." or name.startswith("aten::equal")), name
        if "index" in name:
            assert not any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in indices), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "temperature"), [*((kind, 0.7) for kind in KINDS), *((kind, 0.0) for kind in MANY)])
def test_nothing_is_waited_for(kind, temperature, monkeypatch):
    """Once tables are made, a round is operations on tensors alone."""
    make, decoder = KINDS[kind]
    model, round, seen = attached(make()), Engine.round, []

    def strict(self, upto, *of):
        round(self, upto, *of)
        with Forbidden():
            round(self, upto, *of)
        seen.append(upto)

    monkeypatch.setattr(Engine, "round", strict)
    with torch.no_grad():
        written(model, decoder, texts(2, T - 8), warp=Warp(temperature))
    assert seen


@pytest.fixture
def recorded(monkeypatch):
    """As on a GPU, but for the recording: the round runs as often as it would, and then for each replay."""
    taken = []

    class Graph:
        def __init__(self, engine, *of):
            self.engine, self.of = engine, of

        def replay(self):
            self.engine.round(*self.of)

    def record(self, *of):
        taken.append(of)
        for _ in range(graphs.WARM):
            self.round(*of)
        return Graph(self, *of)

    class Anywhere:
        def __init__(self, device):
            pass

        __enter__ = __exit__ = lambda *_: None

    init = Engine.__init__
    monkeypatch.setattr(
        Engine, "__init__", lambda self, *given: (init(self, *given), setattr(self, "capture", True))[0]
    )
    monkeypatch.setattr(Engine, "_record", record)
    monkeypatch.setattr(torch.cuda, "device", Anywhere)
    monkeypatch.setattr(graphs, "NARROWEST", 16)
    return taken


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["autoregressive", "drafts", "windows used up", "copies", "of a model of one branch"])
@torch.inference_mode()
def test_rounds_that_are_recorded_can_run_again(kind, temperature, recorded):
    make, decoder = KINDS[kind]
    plain, model = make(), attached(make())
    for _ in range(2):
        x = texts(3, 0)
        one, two = (written(m, decoder, x, warp=Warp(temperature)) for m in (model, plain))
        assert_alike(one, two)
        assert len(recorded) == len({*recorded}) > 1  # each width once, with drafts and without, for both texts


@torch.inference_mode()
def test_where_recording_fails_decoding_goes_on_and_says_so_once(recorded, monkeypatch):
    plain, model, record = dual(), attached(dual()), Engine._record

    def fails(self, upto, *more):
        if upto > 16:
            raise RuntimeError("\nno graph\nand much more")
        return record(self, upto, *more)

    monkeypatch.setattr(Engine, "_record", fails)
    with pytest.warns(UserWarning, match="a CUDA graph could not be recorded; going on without: no graph$") as said:
        one = written(model, Speculative(), texts(3, 2))
        two = written(model, Speculative(), texts(3, 2))
    assert len(said) == 1 and recorded == [(16, True, True, False)]
    for frames in (one, two):
        assert_alike(frames, written(plain, Speculative(), texts(3, 2)))


@torch.inference_mode()
def test_two_texts_at_once_never_share_an_engine():
    plain, model = dual(), attached(dual())

    def frames(model: DualBranch, seed: int):
        return Speculative()(model, Task(texts(2, 5, seed), torch.tensor([T, T - 3]), V, RowGenerators(seed, 2)))

    alone = [list(frames(plain, seed)) for seed in range(2)]
    pair = list(zip(*(frames(model, seed) for seed in range(2)), strict=False))
    assert len(pair) > 3
    for one, two in zip(pair, zip(*alone, strict=False), strict=True):
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, two, strict=True))
    gc.collect()
    assert len(model.graphs.idle) == 2
    left = frames(model, 0)
    next(left)
    assert len(model.graphs.idle) == 1
    del left
    gc.collect()
    assert len(model.graphs.idle) == 2
    # The engine that was left in the middle serves other texts as if it had not been.
    for seed, expected in enumerate(alone):
        later = list(frames(model, seed))
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(later, expected, strict=True))
    assert len(model.graphs.idle) == 2


def test_few_engines_wait():
    model = attached(dual())
    for size in (2, 3, 4, 5, 6, 7):
        drafting = Drafting(size, size, proposes=True)
        model.graphs.rounds(torch.tensor([T]), drafting, model.allocate(1, T), warp=Warp())
    gc.collect()
    assert [engine.how.size for engine in model.graphs.idle] == [4, 5, 6, 7]


def test_an_engine_serves_one_generation_at_a_time(monkeypatch):
    """A thread that looks for one while another does waits until that has made its choice."""
    model = attached(dual())
    written(model, Speculative(), texts(1, 24))
    gc.collect()
    graphs = model.graphs
    (engine,) = graphs.idle
    found, threads = [], []

    def reads(self, read):
        if not threads:
            threads.append(threading.Thread(target=lambda: found.append(graphs._take(engine.shape, read))))
            threads[0].start()
            threads[0].join(0.2)
        return True

    monkeypatch.setattr(Engine, "reads", reads)
    first = graphs._take(engine.shape, None)
    threads[0].join()
    assert first is engine and found == [None] and not graphs.idle


@pytest.mark.parametrize("attach", [attached, lambda model: model], ids=["graphs", "modules"])
@torch.inference_mode()
def test_a_target_that_is_no_number_accepts_nothing(attach):
    """Copies of the prompt, with an end of text among them, do not stand because nothing is known of them."""
    model, x, eos = attach(dual()), torch.full((1, T), V), 7
    model.causal.norm.weight.fill_(torch.nan)
    x[0, :11] = torch.tensor([1, 2, 3, 4, eos, 5, 6, 8, 1, 2, 3])
    wanted = x == V
    task = Task(x, torch.tensor([T]), V, RowGenerators(0, 1), Warp(1.0), lambda x: ((x == eos) & wanted).any(1))
    frame = None
    with contextlib.suppress(DecodingError):  # of rounds that are recorded it is the caller who sees that nothing came
        for frame in Speculative(lookup=3)(model, task):
            assert (frame.tokens[wanted] == V).all()
    assert frame is not None


@pytest.mark.parametrize("make", [dual, small, learned, gpt2])
def test_weights_may_change_between_texts(make):
    """In place, in parts that tables are made of, and by new tensors: the next text is that of the new weights."""
    model, decoder = attached(make()), Autoregressive() if make is gpt2 else Speculative()

    def check():
        plain = copy.deepcopy(model)
        assert plain.graphs is None
        with torch.inference_mode():
            one, two = (written(m, decoder, texts(2, 24)) for m in (model, plain))
        assert_alike(one, two)
        return one[-1].tokens

    before = [check()]
    for name, parameter in model.named_parameters():
        if name.endswith(("embedding.weight", "map", "join.weight", "layers.1.mlp.up.weight")):
            with torch.no_grad():
                parameter.mul_(1.1)
            before.append(check())
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.8
    before.append(check())
    model.load_state_dict({name: each * 1.2 for name, each in model.state_dict().items() if each.is_floating_point()},
                          assign=True, strict=False)  # fmt: skip
    before.append(check())
    if make is small:
        model.choose_draft_tokens(torch.arange(V))
        before.append(check())
    assert sum(not torch.equal(*pair) for pair in zip(before[1:], before, strict=False)) > 3
    assert len(model.graphs.idle) == 1


def test_engines_serve_with_gradients_on_and_off():
    model = attached(dual()).requires_grad_(True)
    plain = written(dual(), Speculative(), texts(2, 3))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert_alike(written(model, Speculative(), texts(2, 3)), plain)
    assert len(model.graphs.idle) == 1


@pytest.mark.parametrize(
    ("make", "size", "rows", "fits"),
    [
        (dual, 6, 4, True),
        (dual, 6, 40, False),
        (dual, 0, 256, True),
        (dual, T + 1, 1, False),
        (gpt2, 0, 2, True),
        (gpt2, 2, 2, True),
        (lambda: dual(draft="factorised"), 6, 1, False),
        (lambda: dual(draft="factorised"), 0, 1, True),
        (lambda: dual(exchange="one_way"), 6, 1, False),
        (lambda: dual(context=T - 1), 6, 1, True),
        (lambda: dual(context=T - 1, causal={"positions": "learned"}), 6, 1, False),
    ],
)
def test_other_rounds_are_read_step_by_step(make, size, rows, fits):
    model = attached(make())
    drafting = Drafting(size, size, proposes=size > 0 and "draft" in model.heads)
    made = model.rounds(torch.full((rows,), T), drafting, model.allocate(rows, T), warp=Warp())
    assert (made is not None) == fits


def test_on_a_cpu_there_are_none():
    assert compiled(dual(), "auto").graphs is None and compiled(dual().float(), "auto").graphs is None
    assert Graphs.suits(dual()) and Graphs.suits(gpt2())
    assert not Graphs.suits(dual(fusion="layers", exchange="one_way", own_state=False))


@pytest.mark.parametrize(
    "kind",
    [
        "of one that slides",
        "copies",
        "a small vocabulary, unsure",
        "learned positions",
    ],
)
@torch.no_grad()
def test_all_of_a_round_is_on_the_models_device(kind):
    """Tensors without content, which do not mix with others, and of which nothing can be known."""
    make, decoder = KINDS[kind]
    model = make().to("meta")
    drafting = Drafting() if isinstance(decoder, Autoregressive) else decoder.drafting(model)
    for temperature in (0.0, 0.7) if kind == "copies" else (0.7,):
        engine = Engine(model, Shape(3, T, drafting, Warp(temperature), torch.float64, torch.device("meta")), [])
        engine.begin(torch.zeros(3, dtype=torch.long), T, engine.caches, 1)
        for looks, opening, wide in itertools.product(
            {False, drafting.proposes}, (False, True), {False, drafting.lookup > 0}
        ):
            for renews in {False, looks}:
                engine.round(32, looks, renews, wide, opening)
        assert engine.made(T).work.device.type == "meta"
