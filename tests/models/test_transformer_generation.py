"""generate() with the cache against without and against GPT-2's, and stream_tokens() against generate()."""

import pytest
import torch
from transformers import DynamicCache

from tests.cache import CACHE
from tests.models.small import PAD, VOCABULARY, random_ids
from tests.models.small_transformer import CONTEXT, gpt2_of, make_transformer

STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampled_beams": {"num_beams": 3, "do_sample": True, "temperature": 2.0},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("padded", [False, True], ids=("whole", "padded"))
def test_generate_is_as_without_cache_and_as_gpt2(strategy: str, padded: bool) -> None:
    model, ids, mask = make_transformer(), random_ids(), torch.ones(3, 7, dtype=torch.long)
    if padded:
        mask[1, :3] = mask[2, :6] = 0
        ids = ids.masked_fill(mask == 0, PAD)

    def generate(model: torch.nn.Module, **options: object) -> list:
        torch.manual_seed(3)
        settings = {"max_new_tokens": 9, "eos_token_id": 3, "pad_token_id": PAD} | STRATEGIES[strategy]
        return model.generate(ids, attention_mask=mask, **settings, **options).tolist()

    cached = generate(model)
    assert cached == generate(model)
    assert cached == generate(model, use_cache=False)
    assert cached == generate(gpt2_of(model))
    if "beams" not in strategy:
        assert cached == generate(model, cache_implementation="static")


def test_padded_prompts_continue_as_alone() -> None:
    model, mask = make_transformer(), torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
    ids = random_ids(2).masked_fill(mask == 0, PAD)
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(together[0:1], model.generate(ids[:1], max_new_tokens=8))
    assert torch.equal(together[1:, 4:], model.generate(ids[1:, 4:], max_new_tokens=8))


def test_each_token_costs_one_step() -> None:
    model, rows = make_transformer(), []
    model.model.norm.register_forward_hook(lambda module, inputs, output: rows.append(inputs[0].shape[0]))
    model.generate(random_ids(), max_new_tokens=5)
    assert rows == [3 * 7, 3, 3, 3, 3]
    rows.clear()
    list(model.stream_tokens(random_ids(1), 5))
    assert rows == [7, 1, 1, 1, 1]


def test_generate_goes_on_from_a_cache_and_in_chunks() -> None:
    model, ids, cache = make_transformer(), random_ids(), DynamicCache()
    whole = model.generate(ids, max_new_tokens=9)
    first = model.generate(ids, max_new_tokens=4, **{CACHE: cache})
    assert torch.equal(model.generate(first, max_new_tokens=5, **{CACHE: cache}), whole)
    assert torch.equal(model.generate(ids, max_new_tokens=9, prefill_chunk_size=3), whole)
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=9), whole[:, 7:])


def test_assisted_generation() -> None:
    model, assistant, ids = make_transformer(), make_transformer(num_layers=1), random_ids(1)
    expected = model.generate(ids, max_new_tokens=9)
    assert torch.equal(model.generate(ids, max_new_tokens=9, assistant_model=assistant), expected)


def test_generate_beyond_the_context_is_an_error() -> None:
    model = make_transformer()
    whole = model.generate(random_ids(1), max_length=CONTEXT + 1)  # the last token is not read
    assert whole.shape == (1, CONTEXT + 1)
    with pytest.raises(ValueError, match=r"expected .* \(max_position_embeddings"):
        model.generate(random_ids(1), max_length=CONTEXT + 2)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"tie_word_embeddings": False}], ids=str)
def test_stream_tokens_is_greedy_generate(options: dict) -> None:
    model, ids = make_transformer(**options), random_ids(1)
    expected = model.generate(ids, max_length=CONTEXT + 1)[0, 7:].tolist()
    for count in (5, CONTEXT - 6):  # another search for the most likely token each
        assert list(model.stream_tokens(ids, count)) == expected[:count]
    assert list(model.stream_tokens(ids[0].tolist(), 5)) == expected[:5]
    assert list(model.bfloat16().stream_tokens(ids, 5)) == model.generate(ids, max_new_tokens=5)[0, 7:].tolist()


@pytest.mark.parametrize("context", [1, 2, 9, CONTEXT])
@pytest.mark.parametrize("prompt", [1, 7, CONTEXT, 40])
def test_stream_tokens_reads_the_newer_half_of_a_full_context(context: int, prompt: int) -> None:
    model, ids = make_transformer(max_position_embeddings=context), random_ids(1, prompt)
    tokens, window = ids[0].tolist(), ids[0].tolist()
    for _ in range(60):
        if len(window) > context:
            window = window[-max(1, context // 2) :]
        token = int(model(torch.tensor([window])).logits[0, -1].argmax())
        tokens.append(token)
        window.append(token)
    assert list(model.stream_tokens(ids, 60)) == tokens[prompt:]


def test_stream_tokens_in_training_mode() -> None:
    model, ids = make_transformer(dropout=0.5), random_ids(1)
    expected = list(model.stream_tokens(ids, 12))
    assert list(model.train().stream_tokens(ids, 12)) == expected
    assert model.training


def test_stream_tokens_ends_and_suppresses() -> None:
    model, ids = make_transformer(), random_ids(1)
    tokens = list(model.stream_tokens(ids, 17))
    end = tokens[5]
    until = tokens[: tokens.index(end) + 1]
    assert list(model.stream_tokens(ids, 17, eos_token_id=end)) == until
    model.generation_config.eos_token_id = [end, VOCABULARY]
    assert list(model.stream_tokens(ids, 17)) == until
    for count in (5, 17):
        found = list(model.stream_tokens(ids, count, eos_token_id=(), suppress_tokens=tokens[:3]))
        expected = model.generate(ids, max_new_tokens=count, eos_token_id=None, suppress_tokens=tokens[:3])
        assert found == expected[0, 7:].tolist()
        sampled = model.stream_tokens(ids, 60, do_sample=True, eos_token_id=(), suppress_tokens=tokens[:3])
        assert not {*tokens[:3]} & {*sampled}


def test_stream_tokens_samples_with_a_seed() -> None:
    model, ids = make_transformer(), random_ids(1)

    def sample(seed: int, **options: object) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return list(model.stream_tokens(ids, 40, do_sample=True, temperature=2.0, generator=generator, **options))

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, top_k=1) == list(model.stream_tokens(ids, 40))
    coldest = model.stream_tokens(ids, 40, do_sample=True, temperature=1e-300)
    assert list(coldest) == list(model.stream_tokens(ids, 40))
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 0}
    torch.manual_seed(1)
    drawn = list(model.stream_tokens(ids, 12, **settings))
    torch.manual_seed(1)
    assert model.generate(ids, max_new_tokens=12, **settings)[0, 7:].tolist() == drawn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: expected a whole number of at least 0, got -1"),
        ({"input_ids": [VOCABULARY]}, "input_ids: expected 0 to 36"),
        ({"suppress_tokens": [VOCABULARY]}, r"suppress_tokens: expected whole numbers from 0 to 36, got \[37\]"),
        ({"suppress_tokens": [1.5]}, r"suppress_tokens: expected whole numbers from 0 to 36, got \[1.5\]"),
        ({"suppress_tokens": range(VOCABULARY)}, "suppress_tokens: expected to leave a token, got all"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_stream_tokens_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_transformer().stream_tokens(**{"input_ids": [1], "max_new_tokens": 3} | options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_stream_tokens_of_a_quantised_model() -> None:
    model = torch.ao.quantization.quantize_dynamic(make_transformer(), {torch.nn.Linear}, dtype=torch.qint8)
    ids = random_ids(1)
    assert list(model.stream_tokens(ids, 12)) == model.generate(ids, max_new_tokens=12)[0, 7:].tolist()
