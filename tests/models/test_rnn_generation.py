"""generate() with the cache against without, and stream_tokens() against generate()."""

import copy
from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TextStreamer, TopKLogitsWarper, TopPLogitsWarper

from fastlm.models import RNNCache
from fastlm.models._sampling import Sampling
from fastlm.models.rnn.generation import Engine
from tests.cache import CACHE, cache_of
from tests.models.small import CELLS, KINDS, PAD, VOCABULARY, make_model, random_ids, twin_of
from tests.numerics import check, each_isa

STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled_beams": {"num_beams": 3, "do_sample": True, "temperature": 2.0},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("padded", [False, True], ids=("whole", "padded"))
def test_generate_is_as_without_cache_and_as_torch(cell: str, strategy: str, padded: bool) -> None:
    model, ids, mask = make_model(cell, eos_token_id=3), random_ids(), torch.ones(3, 7, dtype=torch.long)
    if padded:
        mask[1, :3] = mask[2, :6] = 0
        ids = ids.masked_fill(mask == 0, PAD)

    def generate(model: torch.nn.Module, **options: object) -> list:
        torch.manual_seed(3)
        found = model.generate(ids, attention_mask=mask, max_new_tokens=9, **STRATEGIES[strategy], **options)
        return found.tolist()

    cached = generate(model)
    assert cached == generate(model)
    assert cached == generate(model, use_cache=False)
    assert cached == generate(twin_of(model))


def test_padded_prompts_continue_as_alone() -> None:
    model, mask = make_model(), torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
    ids = random_ids(2).masked_fill(mask == 0, PAD)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(together[0:1], model.generate(ids[:1], max_new_tokens=8))
    assert torch.equal(together[1:, 4:], model.generate(ids[1:, 4:], max_new_tokens=8))


@pytest.mark.parametrize("cell", CELLS)
def test_each_token_costs_one_step(cell: str) -> None:
    model, steps = make_model(cell), []
    model.model.rnn.register_forward_hook(lambda module, inputs, output: steps.append(inputs[0].shape[1]))
    model.generate(random_ids(), max_new_tokens=5)
    assert steps == [7, 1, 1, 1, 1]


@pytest.mark.parametrize("cell", CELLS)
def test_generate_goes_on_from_a_cache(cell: str) -> None:
    model, ids, cache = make_model(cell), random_ids(), RNNCache()
    whole = model.generate(ids, max_new_tokens=9)
    first = model.generate(ids, max_new_tokens=4, **{CACHE: cache})
    assert cache.seq_length == 10  # the last token is not in the state yet
    assert torch.equal(model.generate(first, max_new_tokens=5, **{CACHE: cache}), whole)
    prompt = cache_of(model(ids[:1]))
    prompt.batch_repeat_interleave(3)
    again = model.generate(whole[:1, :10], max_new_tokens=4, do_sample=True, num_return_sequences=3, **{CACHE: prompt})
    assert again.shape == (3, 14)


def test_prefill_in_chunks_and_assistants() -> None:
    model, ids = make_model(), random_ids()
    whole = model.generate(ids, max_new_tokens=5)
    assert torch.equal(model.generate(ids, max_new_tokens=5, prefill_chunk_size=3, **{CACHE: RNNCache()}), whole)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(ids[:1], assistant_model=make_model(), max_new_tokens=5)


def test_generate_from_embeddings() -> None:
    model, ids = make_model(), random_ids()
    new = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=5)
    assert torch.equal(new, model.generate(ids, max_new_tokens=5)[:, 7:])


def test_text_streamer() -> None:
    class Recorder(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    model, recorder = make_model(), Recorder()
    found = model.generate(random_ids(1), max_new_tokens=5, streamer=recorder)
    assert recorder.seen == [*found[0].tolist(), -1]


@pytest.mark.parametrize(("cell", "output"), KINDS)
def test_stream_tokens_is_greedy_generate(cell: str, output: str) -> None:
    model, ids = make_model(cell, output), random_ids(1)
    expected = model.generate(ids, max_new_tokens=12)[0, 7:].tolist()
    assert list(model.stream_tokens(ids, 12)) == expected
    assert list(model.stream_tokens(ids[0].tolist(), 12)) == expected
    assert list(twin_of(model).stream_tokens(ids[0], 12)) == expected
    assert list(model.stream_tokens(ids, 0)) == []


def test_stream_tokens_in_training_mode() -> None:
    model, ids = make_model(dropout=0.5), random_ids(1)
    expected = list(model.stream_tokens(ids, 12))
    assert list(model.train().stream_tokens(ids, 12)) == expected


@pytest.mark.parametrize(("cell", "output"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_logits_of_the_engine(cell: str, output: str, dtype: torch.dtype) -> None:
    model, ids = make_model(cell, output).to(dtype), random_ids(1, 9)
    same, truth = model(ids).logits[0, 3:], copy.deepcopy(model).double()(ids).logits[0, 3:]
    for _ in each_isa(dtype):
        engine = Engine(model)
        hidden = [engine.prefill(ids[0, :4]), *(engine.step(int(token)) for token in ids[0, 4:])]
        check("logits", model.lm_head(torch.cat(hidden)), same, truth)


def test_stream_tokens_ends() -> None:
    model, ids = make_model(), random_ids(1)
    tokens = list(model.stream_tokens(ids, 12))
    end = tokens[5]
    until = tokens[: tokens.index(end) + 1]
    assert list(model.stream_tokens(ids, 12, eos_token_id=end)) == until
    model.generation_config.eos_token_id = [end, VOCABULARY]
    assert list(model.stream_tokens(ids, 12)) == until
    assert list(model.stream_tokens(ids, 12, eos_token_id=())) == tokens


def test_stream_tokens_reads_the_weights_at_each_call() -> None:
    model, ids = make_model(), random_ids(1)
    before = list(model.stream_tokens(ids, 12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.flip(0)
    assert list(model.stream_tokens(ids, 12)) == model.generate(ids, max_new_tokens=12)[0, 7:].tolist() != before


def test_stream_tokens_leaves_the_callers_mode() -> None:
    tokens = make_model().stream_tokens([1, 2], 3)
    next(tokens)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_stream_tokens_samples_with_a_seed() -> None:
    model, ids = make_model(), random_ids(1)

    def sample(seed: int, **options: object) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return list(model.stream_tokens(ids, 20, do_sample=True, temperature=2.0, generator=generator, **options))

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, top_k=1) == list(model.stream_tokens(ids, 20))
    torch.manual_seed(1)
    first = list(model.stream_tokens(ids, 20, do_sample=True))
    torch.manual_seed(1)
    assert list(model.stream_tokens(ids, 20, do_sample=True)) == first


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, VOCABULARY + 1])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 1.0])
def test_distribution_is_that_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    warpers.append(TopPLogitsWarper(top_p))
    logits = torch.randn(5, VOCABULARY) * 2
    for row, *expected in zip(
        logits, warpers(None, logits).softmax(1), warpers(None, logits.double()).softmax(1), strict=True
    ):
        probabilities, tokens = Sampling(temperature, top_k, top_p).distribution(row)
        got = torch.zeros(VOCABULARY)
        got[torch.arange(VOCABULARY) if tokens is None else tokens] = probabilities / probabilities.sum()
        assert torch.equal(got > 0, expected[0] > 0)
        check("probabilities", got, *expected)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0])
    sampling = Sampling(1.0, 3, 1.0, torch.Generator().manual_seed(0))
    drawn = Counter(sampling.draw(logits) for _ in range(3000))
    expected = logits.masked_fill(logits < 0, float("-inf")).softmax(0)
    assert drawn[2] == 0
    for token in (0, 1, 3):
        deviation = (3000 * expected[token] * (1 - expected[token])) ** 0.5
        assert abs(drawn[token] - 3000 * expected[token]) < 4 * deviation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a finite number above 0"),
        ({"temperature": float("nan")}, "temperature: expected a finite number above 0"),
        ({"top_k": -1}, "top_k: expected a whole number of at least 0, got -1"),
        ({"top_k": 2.0}, "top_k: expected a whole number"),
        ({"top_p": 0.0}, "top_p: expected a number above 0 and up to 1, got 0.0"),
        ({"top_p": 1.1}, "top_p: expected a number above 0 and up to 1, got 1.1"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected a whole number of at least 0, got -1"),
        ({"input_ids": []}, r"input_ids: expected whole numbers \(T,\) or \(1, T\)"),
        ({"input_ids": [[1], [2]]}, "input_ids: expected whole numbers"),
        ({"input_ids": [1.5]}, "input_ids: expected whole numbers"),
        ({"input_ids": [True]}, "input_ids: expected whole numbers"),
        ({"input_ids": [-1, 2]}, r"input_ids: expected 0 to 36 \(vocab_size - 1\), got -1 to 2"),
        ({"input_ids": [VOCABULARY]}, "input_ids: expected 0 to 36"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_stream_tokens_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model().stream_tokens(**{"input_ids": [1], "max_new_tokens": 3, "do_sample": True} | options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_stream_tokens_of_a_quantised_model() -> None:
    model = torch.ao.quantization.quantize_dynamic(
        twin_of(make_model()), {torch.nn.Linear, torch.nn.GRU}, dtype=torch.qint8
    )
    ids = random_ids(1)
    assert list(model.stream_tokens(ids, 12)) == model.generate(ids, max_new_tokens=12)[0, 7:].tolist()
