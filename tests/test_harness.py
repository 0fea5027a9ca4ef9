"""lm-evaluation-harness: its requests are answered with the likelihoods and the decoders that were named."""

import functools
import json
import math

import pytest
import torch
from enumeration import denoiser_of
from over_bytes import text_model

from caddf import InputError, generate, score

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from caddf import harness
from caddf.harness import HarnessModel

PAIRS = [("", "some"), ("the cat", " sat"), ("a", " b c"), ("the dog", " ran"), ("x" * 40, "yes")]
LONG = "all that is longer than the context is read in windows, each a row of its own."


@functools.cache
def model_of(method="caddf-lambda-dce"):
    """Its arg max differs from place to place."""
    model = text_model(method, scale=3.0)
    for parameter in model.model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


def ask(kind, requests, lm):
    instances = [Instance(kind, {}, arguments, i) for i, arguments in enumerate(requests)]
    return getattr(lm, kind)(instances, disable_tqdm=True)


def written(model, *arguments, **settings):
    *_, frame = generate(model, *arguments, **settings)
    return frame.text


@pytest.mark.parametrize("likelihood", ["causal", "ar", "block"])
def test_a_continuation_costs_what_the_text_costs_beyond_its_context(model, likelihood):
    found = ask("loglikelihood", PAIRS, HarnessModel(model, likelihood, block_size=4))
    for (context, continuation), (nats, _) in zip(PAIRS, found, strict=True):
        (tokens,) = score(model, (context + continuation)[-32:], likelihood=likelihood, block_size=4)
        assert math.isclose(nats, tokens[-len(continuation) :].sum(), rel_tol=1e-12)
    together = ask("loglikelihood", PAIRS, HarnessModel(model, likelihood, block_size=4, batch_size=3))
    assert [pair[1] for pair in together] == [pair[1] for pair in found]
    assert [pair[0] for pair in together] == pytest.approx([pair[0] for pair in found], rel=1e-12)


@pytest.mark.parametrize(("likelihood", "target"), [("causal", "causal"), ("block", "fused")])
def test_the_greedy_continuation_is_what_is_written_at_temperature_0(model, likelihood, target):
    text = "the cat "
    settings = dict(decoder="autoregressive", target=target, temperature=0.0, max_new_tokens=5, block_size=4)
    *_, frame = generate(model, text, **settings)
    best = frame.frame.tokens[0].tolist()[-5:]
    other = [*best[:4], (best[4] + 1) % 256]
    lm = HarnessModel(model, likelihood, block_size=4)
    requests = [(None, [*text.encode()], continuation) for continuation in (best, other)]
    assert [flag for _, flag in lm._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]


def test_a_text_is_read_in_windows_that_score_every_token_once(model):
    (whole,), (none,) = ask("loglikelihood_rolling", [(LONG[:32],)], HarnessModel(model)), [0.0]
    assert math.isclose(whole, score(model, LONG[:32])[0].sum(), rel_tol=1e-12)
    assert ask("loglikelihood_rolling", [("",)], HarnessModel(model)) == [none]
    for likelihood in ("causal", "block"):
        windows = score(model, [LONG[:32], LONG[32:64], LONG[-32:]], likelihood=likelihood)
        total = windows[0].sum() + windows[1].sum() + windows[2][32 - len(LONG) + 64 :].sum()
        for batch_size in (1, 2):
            lm = HarnessModel(model, likelihood, batch_size=batch_size)
            first, second = ask("loglikelihood_rolling", [(LONG,), ("short",)], lm)
            assert math.isclose(first, total, rel_tol=1e-12)
            assert math.isclose(second, score(model, "short", likelihood=likelihood)[0].sum(), rel_tol=1e-12)
    shorter = score(model, [LONG[:16], LONG[16:32]])
    (halves,) = ask("loglikelihood_rolling", [(LONG[:32],)], HarnessModel(model, max_length=16))
    assert math.isclose(halves, shorter[0].sum() + shorter[1].sum(), rel_tol=1e-12)


@pytest.mark.parametrize("method", ["caddf-lambda-dce", "radd-lambda-dce"])
def test_the_bound_is_that_of_the_continuation_given_its_context(method):
    """Of one token it is exact; of two, half of the draws mask both, and the others the first or the second."""
    model = model_of(method)
    lm = HarnessModel(model, "diffusion", samples=8)
    one, two = [*b"given-x"], [*b"given-xy"]
    mask, denoise = model.model.mask_id, denoiser_of(model.model)

    def nats(row, *masked):
        x = torch.tensor([row]).index_fill(1, torch.tensor(masked), mask)
        log_q = denoise(x, x == mask)
        return -sum(log_q[i, row[at]].item() for i, at in enumerate(masked))

    asked = [("given-", "x"), ("given-", "xy"), ("given-", "zz")]
    (exact, _), (bound, _), _ = found = ask("loglikelihood", asked, lm)
    assert math.isclose(-exact, nats(one, 6), rel_tol=1e-9)
    choices = sorted((nats(two, 6), nats(two, 7)))
    low, high = (nats(two, 6, 7) / 2 + each for each in choices)
    assert low < -bound < high
    assert found == ask("loglikelihood", asked, HarnessModel(model, "diffusion", samples=8))
    together = HarnessModel(model, "diffusion", samples=8, batch_size=3)
    assert [a for a, _ in ask("loglikelihood", asked[::-1], together)][::-1] == pytest.approx([a for a, _ in found])
    assert ask("loglikelihood", asked, HarnessModel(model, "diffusion", samples=8, seed=3))[1] != found[1]


def test_the_greedy_continuation_of_a_denoiser_takes_the_surest_position_first(model):
    *_, frame = generate(model, template="given [MASK:4]", decoder="confidence", threshold=2.0, temperature=0.0)
    best = frame.frame.tokens[0].tolist()[-4:]
    requests = [(None, [*b"given "], each) for each in (best, [*best[:3], (best[3] + 1) % 256])]
    for batch_size in (1, 2):
        lm = HarnessModel(model, "diffusion", samples=1, batch_size=batch_size)
        assert [flag for _, flag in lm._loglikelihood_tokens(requests, disable_tqdm=True)] == [True, False]


@pytest.mark.parametrize("method", ["sedd-scaled", "bd3lm", "plaid"])
def test_a_bound_of_its_own_scores_texts_and_has_no_greedy_continuation(method):
    model = model_of(method)
    lm = HarnessModel(model, "diffusion", samples=4)
    (total,) = ask("loglikelihood_rolling", [(LONG,)], lm)
    parts = [(LONG[:32], 32), (LONG[32:64], 32), (LONG[-32:], len(LONG) - 64)]
    rows = [(None, [*text[: 32 - count].encode()], [*text[32 - count :].encode()]) for text, count in parts]
    assert math.isclose(total, sum(nats for nats, _ in lm._measured(rows, True, greedy=False)), rel_tol=1e-9)
    assert -math.inf < total < 0
    with pytest.raises(InputError, match=f"likelihood is diffusion; {method} says of no continuation"):
        ask("loglikelihood", [("a", "b")], lm)


@pytest.mark.parametrize("decoder", ["autoregressive", "speculative", "confidence"])
def test_generation_is_that_of_the_decoder_up_to_a_stop_string(model, decoder):
    lm = HarnessModel(model, decoder=decoder, max_gen_toks=6, batch_size=2)
    # A prompt after which the untrained model writes a whole character to stop at.
    texts = {
        prompt: written(model, prompt, decoder=decoder, temperature=0.0, max_new_tokens=12)
        for prompt in ("the cat", "no", "where", "12", "ten men")
    }
    prompt, whole, stop = next(
        (prompt, whole, character)
        for prompt, whole in texts.items()
        for character in whole[3:]
        if character != "\N{REPLACEMENT CHARACTER}"
    )
    asked = [
        (prompt, {"until": ["no such text"], "max_gen_toks": 12}),
        (prompt, {"until": stop, "max_gen_toks": 12}),
        ("a dog", {"until": []}),
        ("", {"until": ["no such text"], "max_gen_toks": 12}),
    ]
    found = ask("generate_until", asked, lm)
    assert found[:2] == [whole, whole[: whole.index(stop)]] and len(found[1]) < len(whole)
    assert found[2] == written(model, "a dog", decoder=decoder, temperature=0.0, max_new_tokens=6)
    assert found[3] == written(model, "", decoder=decoder, temperature=0.0, max_new_tokens=12)


def test_samples_are_warped_as_the_task_says_whatever_the_batch(model):
    asked = [(text, {"until": [], "do_sample": True, "temperature": 0.7, "top_k": 40}) for text in ("a", "bb", "ccc")]
    alone, batch = (
        ask("generate_until", asked, HarnessModel(model, batch_size=n, seed=5, max_gen_toks=9)) for n in (1, 3)
    )
    assert alone == batch
    for r, (text, _) in enumerate(asked):
        assert alone[r] == written(model, text, temperature=0.7, top_k=40, seed=5 + r, max_new_tokens=9)
    plain = ask(
        "generate_until", [("a", {"until": [], "do_sample": True})], HarnessModel(model, seed=5, max_gen_toks=9)
    )
    assert plain == [written(model, "a", seed=5, max_new_tokens=9)] != alone[:1]


def test_a_context_is_cut_from_the_left_to_leave_room(model):
    lm = HarnessModel(model, decoder="autoregressive", max_gen_toks=8)
    (found,) = ask("generate_until", [(LONG, {"until": []})], lm)
    assert found == written(model, LONG[-24:], decoder="autoregressive", temperature=0.0, max_new_tokens=8)
    assert lm._fitting("é" * 20, 7) == "ééé"  # the fourth would be half a character


def test_a_setting_of_a_decoder_reaches_it(model):
    lm = HarnessModel(model, decoder="speculative", target="fused", block_size=4, max_gen_toks=9)
    assert lm.get_model_info()["decoder_settings"] == {"target": "fused", "block_size": 4}
    (found,) = ask("generate_until", [("the cat", {"until": []})], lm)
    plain = dict(decoder="autoregressive", target="fused", block_size=4, temperature=0.0, max_new_tokens=9)
    assert found == written(model, "the cat", **plain)


@pytest.mark.parametrize(
    ("method", "settings", "sentence"),
    [
        ("caddf-lambda-dce", {"likelihood": "hybrid"}, "it must be one of causal, ar, block, diffusion"),
        ("gpt2", {"likelihood": "diffusion"}, "this model only reads left to right, so it must be causal"),
        ("gpt2", {"likelihood": "block"}, "likelihood is block; this model has no fused head"),
        ("radd-lambda-dce", {"likelihood": "causal"}, "likelihood is causal; this model has no causal head"),
        ("gpt2", {"decoder": "beam"}, "decoder is beam; it must be one of"),
        ("gpt2", {"steps": 3}, "steps is set, but the decoder autoregressive has no such setting"),
        ("gpt2", {"max_length": 33}, "max_length is 33; it must lie between 1 and the context, 32"),
        ("gpt2", {"block_size": 0}, "block_size is 0; it must lie between 1 and the context, 32"),
        ("gpt2", {"batch_size": "auto"}, "batch_size is auto; it must be a number of rows"),
        ("gpt2", {"samples": 0}, "samples is 0; it must be 1 or more"),
        ("gpt2", {"seed": -1}, "seed is -1"),
    ],
)
def test_what_is_refused_before_any_work(method, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        HarnessModel(model_of(method), **settings)


def test_without_a_gpu_the_harness_default_is_the_cpu(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert HarnessModel(str(tmp_path / "model"), device="cuda:0").device == torch.device("cpu")
    with pytest.raises(InputError, match="device is cuda:1, which this machine does not have"):
        HarnessModel(str(tmp_path / "model"), device="cuda:1")


def test_what_is_refused_of_a_request(model, monkeypatch, capsys):
    lm = HarnessModel(model)
    with pytest.raises(InputError, match="a continuation has 33 tokens; to be scored it must have 1 to 32"):
        ask("loglikelihood", [("a", "b" * 33)], lm)
    with pytest.raises(InputError, match="a continuation has 0 tokens"):
        ask("loglikelihood", [("a", "")], lm)
    with pytest.raises(InputError, match="max_gen_toks is 32; it must leave room for a prompt in 32"):
        ask("generate_until", [("a", {"until": [], "max_gen_toks": 32})], lm)
    with pytest.raises(InputError, match="num_beams is set, but the decoder speculative has no such setting"):
        ask("generate_until", [("a", {"until": [], "max_gen_toks": 9, "num_beams": 4})], lm)
    monkeypatch.setattr(harness, "cli_evaluate", lambda: HarnessModel("no/such/place"))
    assert harness.main() == 2
    assert capsys.readouterr().err.startswith("caddf: error: no/such/place does not exist")


TASKS = {
    "choice": """
        output_type: multiple_choice
        doc_to_text: "{{text}}"
        doc_to_choice: ["mat", "log", "sofa"]
        doc_to_target: answer
        metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
    """,
    "texts": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: byte_perplexity}]
    """,
    "write": """
        output_type: generate_until
        doc_to_text: "{{text}}"
        doc_to_target: "{{continued}}"
        generation_kwargs: {until: ["zzz"], max_gen_toks: 8, do_sample: false}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
    """,
}


def test_local_tasks_from_a_run(model, tmp_path):
    """What the harness makes of three tasks over two lines is what comes out by hand."""
    model.save_pretrained(tmp_path / "model")
    texts, answers = ["the cat sat on the", "the dog sat on the"], [0, 1]
    right = written(model, texts[0], decoder="autoregressive", temperature=0.0, max_new_tokens=8)
    rows = [
        {"text": text, "answer": answer, "continued": continued}
        for text, answer, continued in zip(texts, answers, [right, "something else"], strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache")}
    (tmp_path / "tasks").mkdir()
    for name, task in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(data)}\ntest_split: train\n"
        lines = "".join(f"{line.strip()}\n" for line in task.strip().splitlines())
        (tmp_path / "tasks" / f"{name}.yaml").write_text(head + lines)
    assert get_model("caddf") is HarnessModel
    results = simple_evaluate(
        model="caddf",
        model_args=f"pretrained={tmp_path / 'model'},likelihood=block,decoder=speculative,dtype=float64,device=cpu",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results["config"]["likelihood"] == "block" and results["config"]["decoder"] == "speculative"

    def nats(text, count):
        return score(model, text, likelihood="block")[0][-count:].sum().item()

    choices = [[nats(f"{text} {each}", len(each) + 1) for each in ("mat", "log", "sofa")] for text in texts]
    chosen = [row.index(max(row)) for row in choices]
    assert results["results"]["choice"]["acc,none"] == sum(map(int.__eq__, chosen, answers)) / 2
    asked = [response[0][0] for row in results["samples"]["choice"] for response in row["resps"]]
    assert asked == pytest.approx([each for row in choices for each in row], rel=1e-9)
    total, size = sum(nats(text, len(text)) for text in texts), sum(map(len, texts))
    assert results["results"]["texts"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-9)
    assert results["results"]["write"]["exact_match,none"] == 0.5
