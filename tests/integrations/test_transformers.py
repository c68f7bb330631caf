"""`attn_implementation="fastlm"` against "eager": small random models of each family, no network.

Rows of padding may hold anything and are not compared: where a query sees no key, eager averages over all of them.
"""

import contextlib
import copy
import sys

import pytest
import torch
from torch import Tensor

import fastlm
from fastlm import FastlmFallbackWarning, _trace
from fastlm.integrations import transformers as integration
from tests.cache import CACHE
from tests.numerics import check, kernels_only, scaled_to_float64

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
LLAMA = {
    **SMALL,
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
}
BERT = {
    **SMALL,
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
BART = {
    **SMALL,
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64, "dropout": 0.0},
    **{"decoder_start_token_id": 2, "forced_eos_token_id": None, "forced_bos_token_id": None},
}
GPT2 = {
    **SMALL,
    **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
T5 = {
    **SMALL,
    **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 2},
}
# These two compute attention by themselves.
OWN_ATTENTION = {
    "bloom": {**SMALL, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "xglm": {**SMALL, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "dropout": 0.0},
}
# Windows of 5 are shorter than the texts, so that they and the sliding caches matter.
CONFIGS = {
    "gpt2": GPT2,
    "bert": BERT,
    "roberta": {**BERT, "max_position_embeddings": 66},
    "bart": BART,
    "marian": BART,
    "t5": T5,
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 5},
    "gemma2": {**LLAMA, "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gpt_oss": {**LLAMA, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1},
}
ENCODERS = ("bert", "roberta")
ENCODER_DECODERS = ("bart", "marian", "t5")
GENERATORS = [family for family in CONFIGS if family not in ENCODERS]
FACTORIES = {
    **dict.fromkeys(ENCODERS, "AutoModelForMaskedLM"),
    **dict.fromkeys(ENCODER_DECODERS, "AutoModelForSeq2SeqLM"),
}
# Calls of attention per forward: two layers, and for a decoder with an encoder two times two more.
CALLS = {**dict.fromkeys(CONFIGS, 2), **dict.fromkeys(ENCODER_DECODERS, 6)}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    integration.register()
    softmax = torch.nn.functional.softmax

    def kept_wide(scores: Tensor, *args: object, dtype: torch.dtype | None = None, **kwargs: object) -> Tensor:
        return softmax(scores, *args, dtype=None if scores.dtype == torch.float64 else dtype, **kwargs)

    # Eager takes softmax in float32 in some models, where float64's mask overflows: no reference.
    monkeypatch.setattr(torch.nn.functional, "softmax", kept_wide)


def make_model(family: str, implementation: str = "fastlm", **options: object) -> torch.nn.Module:
    """A model with weights large enough for attention to be far from uniform; the same at every call."""
    config = transformers.AutoConfig.for_model(family, **{**(CONFIGS | OWN_ATTENTION)[family], **options})
    factory = getattr(transformers, FACTORIES.get(family, "AutoModelForCausalLM"))
    # The default for experts, torch's grouped product, knows no float64.
    experts = {"experts_implementation": "batched_mm"} if family == "gpt_oss" else {}
    torch.manual_seed(1)
    model = factory.from_config(config, attn_implementation=implementation, **experts).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.2 * noise)
    return model


def make_inputs(family: str, padding: str = "left", length: int = 9, seed: int = 2) -> dict[str, Tensor]:
    """Two texts, the second shorter by three tokens unless padding is "none"."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding != "none":
        padded = slice(0, 3) if padding == "left" else slice(length - 3, length)
        mask[1, padded], ids[1, padded] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, length - 2), generator=generator)
    return inputs


def real_rows(family: str, inputs: dict[str, Tensor]) -> Tensor:
    """Which rows of the logits belong to a text."""
    if family in ENCODER_DECODERS:
        return torch.ones_like(inputs["decoder_input_ids"], dtype=torch.bool)
    return inputs["attention_mask"].bool()


def logits(model: torch.nn.Module, family: str, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits[real_rows(family, inputs)]


def three_models(family: str, **options: object) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """The same model under "fastlm", "eager", and "eager" in float64."""
    fast, eager = (make_model(family, implementation, **options) for implementation in ("fastlm", "eager"))
    return fast, eager, eager_in_float64(eager)


def eager_in_float64(eager: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(eager).double()


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_logits(family, padding):
    inputs = make_inputs(family, padding)
    check("logits", *(logits(model, family, inputs) for model in three_models(family)))


@kernels_only
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients(family):
    def gradients(model: torch.nn.Module) -> dict[str, Tensor | None]:
        """Of several texts, one behind the other: two layers magnify how single ones happen to be rounded."""
        of_texts = []
        for seed in range(2, 10):
            model.zero_grad()
            output = logits(model.train(), family, make_inputs(family, seed=seed))
            weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
            (output * weights.to(output.dtype)).sum().backward()
            of_texts.append({name: parameter.grad for name, parameter in model.named_parameters()})
        return {
            name: None if first is None else torch.stack([gradients[name] for gradients in of_texts])
            for name, first in of_texts[0].items()
        }

    got, same_dtype, reference64 = map(gradients, three_models(family))
    assert sum(gradient is not None for gradient in got.values()) > 10
    for name, gradient in got.items():
        assert (gradient is None) == (same_dtype[name] is None), name
        if gradient is not None:
            # A bias of keys moves no weight of attention: its gradient cancels, so that of its matrix sets the size.
            weight = reference64.get(f"{name.rpartition('.')[0]}.weight")
            scale = 0.0 if weight is None else weight.abs().max().item()
            check(name, gradient, same_dtype[name], reference64[name], "gradient", scale)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_every_layer_runs_the_kernel(family):
    model, inputs = make_model(family), make_inputs(family)
    with _trace.recording() as calls:
        logits(model, family, inputs)
    assert calls == [_trace.Call("attention", None)] * CALLS[family]


def generate(model: torch.nn.Module, inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """Eight new tokens, and the logits behind each."""
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 1, **options}
    made = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    return made.sequences, torch.stack(made.logits)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", GENERATORS)
def test_generates_the_same(family, padding, cache):
    inputs = make_inputs(family, padding)
    made = [generate(model, inputs, cache_implementation=cache) for model in three_models(family)]
    sequences, scores = zip(*made, strict=True)
    assert sequences[0].shape[1] > 8
    assert torch.equal(sequences[0], sequences[1])
    check("logits", *scores)


@pytest.mark.parametrize("family", GENERATORS)
def test_every_step_runs_the_kernel(family):
    with _trace.recording() as calls:
        generate(make_model(family), make_inputs(family))
    steps = 8 * CALLS[family]
    if family in ENCODER_DECODERS:
        steps -= 7 * 2  # the encoder runs once
    assert calls == [_trace.Call("attention", None)] * steps


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_beam_search(family):
    inputs = make_inputs(family)
    (got, _), (expected, _) = (
        generate(make_model(family, implementation), inputs, num_beams=3) for implementation in ("fastlm", "eager")
    )
    assert torch.equal(got, expected)


@kernels_only
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("masked", [False, True], ids=["without_mask", "padded"])
@torch.no_grad()
def test_unused_tail_of_a_static_cache_is_not_read(family, masked):
    window = {"sliding_window": 15} if family in ("gemma2", "gpt_oss") else {}
    models = three_models(family, **window)
    inputs = make_inputs(family, "left" if masked else "none")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    results = []
    for model, tail in zip(models, (torch.nan, 0.0, 0.0), strict=True):
        cache = transformers.StaticCache(config=model.config, max_cache_len=15)
        heads = getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
        cache.early_initialization(2, heads, 8, model.dtype, model.device)
        for layer in cache.layers:
            layer.keys.fill_(tail)
            layer.values.fill_(tail)
        parts = []
        for begin, end in ((0, 6), (6, 8), (8, 9)):  # prefill, some more, one token
            seen = {"attention_mask": mask[:, :end]} if masked else {}
            parts.append(model(input_ids=ids[:, begin:end], **{CACHE: cache}, **seen).logits)
        results.append(torch.cat(parts, 1)[mask.bool()])
    check("logits", *results)


@torch.no_grad()
def test_packed_texts_do_not_see_each_other():
    ids = make_inputs("llama", "none")["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    packed = {"input_ids": ids, "position_ids": positions.expand(2, -1), "use_cache": False}
    check("logits", *(model(**packed).logits for model in three_models("llama")))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_mask_of_the_users_own(family):
    ids = make_inputs(family, "none")["input_ids"]
    mask = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(5))
    masks = {"full_attention": mask, "sliding_attention": mask} if family == "gemma2" else mask

    def run(model: torch.nn.Module) -> Tensor:
        dtype = model.dtype
        given = {k: m.to(dtype) for k, m in masks.items()} if isinstance(masks, dict) else masks.to(dtype)
        return model(input_ids=ids, attention_mask=given, use_cache=False).logits

    check("logits", *map(run, three_models(family)))


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_both_ways_to_choose_it(family):
    inputs = make_inputs(family)
    chosen, switched = make_model(family), make_model(family, "eager")
    switched.set_attn_implementation("fastlm")
    for model in (chosen, switched):
        configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
        assert {config._attn_implementation for config in configs.values()} == {"fastlm"}
    assert torch.equal(logits(chosen, family, inputs), logits(switched, family, inputs))
    switched.set_attn_implementation("sdpa")
    with _trace.recording() as calls:
        logits(switched, family, inputs)
    assert not calls


@pytest.mark.parametrize("family", ["bloom", "xglm"])
@torch.no_grad()
def test_models_with_attention_of_their_own_stay_right(family, monkeypatch):
    inputs = make_inputs(family)
    expected = logits(make_model(family, "eager"), family, inputs)
    model = make_model(family)
    with pytest.warns(FastlmFallbackWarning, match=f"modeling_{family} computes attention by itself"):
        assert torch.equal(logits(model, family, inputs), expected)
    monkeypatch.setenv("FASTLM_STRICT", "1")
    with pytest.raises(RuntimeError, match="computes attention by itself"):
        logits(model, family, inputs)


def test_registering_twice_changes_nothing():
    interfaces = (transformers.AttentionInterface, transformers.AttentionMaskInterface)
    before = [dict(interface._global_mapping) for interface in interfaces]
    integration.register()
    assert [dict(interface._global_mapping) for interface in interfaces] == before
    assert all("fastlm" in mapping for mapping in before)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "fastlm\[transformers\]"'):
        integration.register()


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "llama", "gemma2", "gpt_oss"])
def test_compiles_to_one_graph(family):
    inputs = make_inputs(family)
    model = make_model(family).train()
    expected = logits(model, family, inputs)
    expected.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    torch.compiler.reset()
    rows = real_rows(family, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(**inputs, use_cache=False).logits[rows]
    got.sum().backward()
    reference64 = copy.deepcopy(model).double()
    reference64.zero_grad()
    truth = logits(reference64, family, inputs)
    truth.sum().backward()
    check("logits", got, expected, truth)
    for (name, parameter), other in zip(model.named_parameters(), reference64.parameters(), strict=True):
        if gradients[name] is not None:
            scale = gradients[name].abs().max().item()
            check(name, parameter.grad, gradients[name], other.grad, "gradient", scale)


@torch.no_grad()
def test_compiled_decoding_with_a_static_cache():
    model, inputs = make_model("llama"), make_inputs("llama", "none")
    ids = inputs["input_ids"]

    def run(call: torch.nn.Module) -> Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=12)
        parts = [model(input_ids=ids[:, :6], **{CACHE: cache}).logits]
        parts += [call(input_ids=ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(6, 9)]
        return torch.cat(parts, 1)

    torch.compiler.reset()
    got = run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    check("logits", got, run(model), model.double()(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])
@torch.no_grad()
def test_bfloat16(family):
    fast, eager = (make_model(family, implementation).bfloat16() for implementation in ("fastlm", "eager"))
    check("logits", *(logits(model, family, make_inputs(family)) for model in (fast, eager, eager_in_float64(eager))))


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "t5"])
def test_autocast(family):
    fast, eager, reference64 = three_models(family)
    inputs = make_inputs(family)
    with torch.autocast("cpu", torch.bfloat16):
        got, same_dtype = (logits(model, family, inputs) for model in (fast, eager))
    check("logits", got, same_dtype, logits(reference64, family, inputs))
    got.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in fast.parameters())


@kernels_only
@torch.no_grad()
def test_float16_runs_the_reference_and_says_so():
    fast, eager = (make_model("llama", implementation).half() for implementation in ("fastlm", "eager"))
    inputs = make_inputs("llama")
    with pytest.warns(FastlmFallbackWarning, match="no kernel for torch.float16"):
        got = logits(fast, "llama", inputs)
    check("logits", got, *(logits(model, "llama", inputs) for model in (eager, eager_in_float64(eager))))


@torch.no_grad()
def test_float64():
    fast, eager, reference64 = three_models("gpt2")
    inputs = make_inputs("gpt2")
    truth = {"logits": logits(reference64, "gpt2", inputs)}
    same = scaled_to_float64({"logits": logits(eager, "gpt2", inputs)}, truth)
    check("logits", logits(fast.double(), "gpt2", inputs), same["logits"], truth["logits"])


@pytest.mark.parametrize("implementation", ["sdpa", "fastlm"])
@torch.no_grad()
def test_weights_of_attention_are_missing_as_under_sdpa(implementation, monkeypatch):
    said = []
    logger = type(transformers.utils.logging.get_logger())
    monkeypatch.setattr(logger, "warning_once", lambda self, text, *_: said.append(text), raising=False)
    model = make_model("llama", implementation)
    assert model(**make_inputs("llama"), output_attentions=True).attentions == ()
    assert said
    assert all(implementation in text and "output_attentions=True" in text for text in said)
    with pytest.raises(ValueError, match=implementation):
        model.config.output_attentions = True


def formula(
    query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Attention written out, in the layout of the integration."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    scores = scores if keep is None else scores.masked_fill(~keep, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


class Layer(torch.nn.Module):
    """A layer as the integration sees it."""

    def __init__(self, is_causal: bool | None = None):
        super().__init__()
        if is_causal is not None:
            self.is_causal = is_causal


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def check_call(
    layer: Layer,
    tensors: tuple[Tensor, Tensor, Tensor],
    keep: Tensor | None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    **options: object,
) -> None:
    """The integration in float32 against the formula with keep and bias; options: position_bias and so on."""
    narrow = tuple(tensor.float() for tensor in tensors)
    got, weights = integration.attention_forward(layer, *narrow, mask, **options)
    assert weights is None
    assert got.is_contiguous()
    check("output", got, formula(*narrow, keep, bias), formula(*tensors, keep, bias))


def lower_triangle(rows: int, columns: int) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool).tril()


@pytest.mark.parametrize("window", [None, 1, 3])
def test_without_a_mask_causality_counts_and_a_window_does_not(window):
    """Where a window takes something away, transformers makes a mask; OLMoE names one that it never uses."""
    tensors = normal(2, 4, 7, 8), normal(2, 2, 7, 8), normal(2, 2, 7, 8)
    options = {"sliding_window": window}
    triangle = lower_triangle(7, 7)
    check_call(Layer(), tensors, triangle, **options)
    check_call(Layer(True), tensors, triangle, **options)
    check_call(Layer(False), tensors, None, **options)
    check_call(Layer(False), tensors, triangle, is_causal=True, **options)
    check_call(Layer(True), tensors, None, is_causal=False, **options)
    one = tensors[0][:, :, :1]
    check_call(Layer(True), (one, *tensors[1:]), None, **options)


def test_with_a_mask_neither_counts():
    tensors = normal(2, 4, 7, 8), normal(2, 2, 7, 8), normal(2, 2, 7, 8)
    keep = torch.rand(2, 1, 7, 7) < 0.5
    keep[..., 0] = True
    check_call(Layer(True), tensors, keep, mask=keep, sliding_window=2)
    added = torch.randn(2, 1, 7, 7)
    check_call(Layer(True), tensors, None, added, mask=added, sliding_window=2)


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("causal", [False, True])
def test_position_bias(mask, causal):
    tensors = normal(2, 4, 5, 8), normal(2, 4, 9, 8), normal(2, 4, 9, 8)
    bias = torch.randn(1, 4, 5, 9)
    keep = torch.rand(2, 1, 5, 9) < 0.5
    keep[..., 0] = True
    if mask == "bool":
        check_call(Layer(causal), tensors, keep, bias, mask=keep, position_bias=bias)
    elif mask == "float":
        added = torch.randn(2, 1, 5, 9)
        check_call(Layer(causal), tensors, None, bias + added, mask=added, position_bias=bias)
    else:
        check_call(Layer(causal), tensors, lower_triangle(5, 9) if causal else None, bias, position_bias=bias)


@pytest.mark.parametrize("backend", ["reference", None])
def test_first_tokens_in_a_static_cache(backend):
    """What lies behind them is not written yet; the reference would read it."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    k[:, :, 5:], v[:, :, 5:] = torch.nan, torch.nan
    with contextlib.nullcontext() if backend is None else fastlm.backend(backend):
        output, _ = integration.attention_forward(Layer(True), q, k, v, None)
    assert output.isfinite().all()


def test_queries_shared_by_the_batch():
    check_call(Layer(False), (normal(1, 4, 5, 8), normal(3, 2, 6, 8), normal(3, 2, 6, 4)), None)


def test_dropout_reaches_the_weights():
    tensors = (torch.randn(2, 4, 5, 8), torch.randn(2, 2, 6, 8), torch.ones(2, 2, 6, 8))
    output, _ = integration.attention_forward(Layer(False), *tensors, None, dropout=0.5)
    assert output.std() > 0.1  # the rows of undropped weights sum to 1, and so would these
    output, _ = integration.attention_forward(Layer(False), *tensors, None, dropout=1.0)
    assert not output.any()


@torch.no_grad()
def test_nothing_is_copied_on_the_way(monkeypatch):
    """Keys keep their heads and their place in the cache; masks and position biases arrive as they are."""
    seen = []

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        output = attention(query, key, value, **options)
        seen.append((key, options, output))
        return output

    attention = integration.checked_attention
    monkeypatch.setattr(integration, "checked_attention", spy)
    model = make_model("llama")
    cache = transformers.StaticCache(config=model.config, max_cache_len=12)
    model(**make_inputs("llama"), **{CACHE: cache})
    for (key, options, output), layer in zip(seen, cache.layers, strict=True):
        assert key.data_ptr() == layer.keys.data_ptr()
        assert key.shape[1] == 2
        assert options["mask"].dtype == torch.bool
        assert output.transpose(1, 2).is_contiguous()
    seen.clear()
    logits(make_model("t5"), "t5", make_inputs("t5"))
    encoder = [options for _, options, _ in seen[:2]]
    assert [options["mask"].dtype for options in encoder] == [torch.bool] * 2
    assert [tuple(options["bias"].shape) for options in encoder] == [(1, 4, 9, 9)] * 2


def test_sinks_of_every_query():
    """As Inkling 2 has them: one more column of scores, without a value."""
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 5, 8), normal(2, 2, 5, 8)
    sinks, keep = normal(2, 4, 5, 1), lower_triangle(5, 5)
    output, _ = integration.attention_forward(Layer(True), q, k, v, None, sinks=sinks)
    scores = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~keep, -torch.inf)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    expected = (weights @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(output, expected)
