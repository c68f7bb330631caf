"""Workloads of language models: output layer with its loss, dropout, generation token by token, transformers' GPT-2.

The output layer counts 2 R V D flops forward and three times that in training. Generation and GPT-2 count their
products with weights; what they compare is time.
"""

# An override says what it does by the method it overrides.
# ruff: noqa: D102

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

import fastlm
from fastlm.ops import linear_cross_entropy


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Loss(nn.Module):
    """An output layer's weight and the loss of rows of hidden."""

    def __init__(self, function: Callable[..., Tensor], workload: "OutputLayer") -> None:
        super().__init__()
        self.function, self.reduction = function, workload.reduction
        weight = torch.randn(workload.vocab, workload.dim, generator=_generator(0))
        self.weight = nn.Parameter(weight / workload.dim**0.5)
        self.target = torch.randint(0, workload.vocab, (workload.rows,), generator=_generator(2))

    def forward(self, hidden: Tensor) -> Tensor:
        """(R, D) -> the loss, or (R,) losses."""
        return self.function(hidden, self.weight, self.target, reduction=self.reduction)


@dataclass(frozen=True)
class OutputLayer:
    """Linear layer and cross-entropy over R rows and V words; training gives the gradients of hidden and weight."""

    rows: int
    vocab: int
    dim: int
    reduction: str = "mean"
    dtype: torch.dtype = torch.float32

    op = "cross_entropy"
    modes = ("forward", "training")

    @property
    def name(self) -> str:
        reduction = "" if self.reduction == "mean" else f"_{self.reduction}"
        return f"{self.rows}x{self.vocab}x{self.dim}{reduction}{'_bf16' if self.dtype == torch.bfloat16 else ''}"

    @property
    def tolerance(self) -> float:
        return 1e-4 if self.dtype == torch.float32 else 5e-2

    def gflop(self, mode: str) -> float:
        return 2 * self.rows * self.vocab * self.dim * (1 if mode == "forward" else 3) / 1e9

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(self.rows, self.dim, generator=_generator(1)),)

    def grad_output(self, output: Tensor) -> Tensor:
        """1 for a mean, as loss.backward() has it."""
        ones = torch.ones_like(output)
        return ones if output.dim() == 0 else ones * torch.rand(output.shape, generator=_generator(3)).to(output.dtype)

    def comparable(self, results: Sequence[Tensor]) -> list[Tensor]:
        return [result.double() for result in results]

    def module(self) -> nn.Module:
        def loss(hidden: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
            return cross_entropy(linear(hidden, weight), target, reduction=reduction)

        return Loss(loss, self)

    def fast_module(self) -> nn.Module:
        return Loss(linear_cross_entropy, self)


@dataclass(frozen=True)
class Dropout:
    """Dropout of a tenth of R rows of a layer's output, and of the gradient that comes back."""

    rows: int
    width: int
    dtype: torch.dtype = torch.float32

    op = "dropout"
    modes = ("training",)
    tolerance = 1e-2  # of 1 / 0.9 in bfloat16
    bound_by_memory = True

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.width}{'_bf16' if self.dtype == torch.bfloat16 else ''}"

    @property
    def gbytes(self) -> float:
        """What is read and written, each way."""
        return 4 * self.rows * self.width * self.dtype.itemsize / 1e9

    def gflop(self, mode: str) -> float:
        return 2 * self.rows * self.width / 1e9

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.ones(self.rows, self.width),)

    def grad_output(self, output: Tensor) -> Tensor:
        return torch.ones_like(output)

    def comparable(self, results: Sequence[Tensor]) -> list[Tensor]:
        """The values that appear: which is where, every implementation draws for itself."""
        return [result.double().unique() for result in results]

    def module(self) -> nn.Module:
        return nn.Dropout(0.1)

    def fast_module(self) -> nn.Module:
        return fastlm.nn.Dropout(0.1)


class GreedyLoop(nn.Module):
    """The plainest way to write generation with torch modules: a token, a step, the logits, the greatest."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        super().__init__()
        self.embedding, self.rnn, self.head = model.model.embed_tokens, model.model.rnn, model.lm_head
        self.tokens = tokens

    @torch.inference_mode()
    def forward(self, prompt: Tensor) -> Tensor:
        """(1, 1) -> (tokens,)."""
        token, state, tokens = prompt, None, []
        for _ in range(self.tokens):
            output, state = self.rnn(self.embedding(token), state)
            token = self.head(output[:, -1]).argmax(-1, keepdim=True)
            tokens.append(token.item())
        return torch.tensor(tokens)


class Streamed(nn.Module):
    """The same by stream_tokens."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, prompt: Tensor) -> Tensor:
        """(1, 1) -> (tokens,)."""
        return torch.tensor(list(self.model.stream_tokens(prompt, self.tokens, eos_token_id=())))


class Generated(Streamed):
    """The same by generate()."""

    def forward(self, prompt: Tensor) -> Tensor:
        """(1, 1) -> (tokens,)."""
        return self.model.generate(prompt, max_new_tokens=self.tokens, do_sample=False)[0, 1:]


@dataclass(frozen=True)
class Generation:
    """Greedy text of a recurrent model with 10,000 words, one sequence, 100 tokens a call."""

    op: str
    through_generate: bool = False

    modes = ("forward",)
    dtype = torch.float32
    tolerance = 0.0
    tokens = 100
    vocab, embedding, hidden = 10000, 128, 256

    @property
    def name(self) -> str:
        return "generate_100_tokens" if self.through_generate else "stream_100_tokens"

    def gflop(self, mode: str) -> float:
        gates = 3 if self.op == "gru" else 4
        per_token = gates * self.hidden * (self.embedding + self.hidden) + self.hidden * self.vocab
        return self.tokens * 2 * per_token / 1e9

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.ones(1, 1, dtype=torch.int64),)

    def comparable(self, results: Sequence[Tensor]) -> list[Tensor]:
        return [result.double() for result in results]

    def _model(self) -> nn.Module:
        from fastlm.models import RNNConfig, RNNForCausalLM  # needs the extra lm

        torch.manual_seed(0)
        sizes = {"vocab_size": self.vocab, "embedding_size": self.embedding, "hidden_size": self.hidden}
        return RNNForCausalLM(RNNConfig(**sizes, cell=self.op)).eval()

    def module(self) -> nn.Module:
        model = fastlm.restore(self._model())
        return Generated(model, self.tokens) if self.through_generate else GreedyLoop(model, self.tokens)

    def fast_module(self) -> nn.Module:
        return (Generated if self.through_generate else Streamed)(self._model(), self.tokens)


class NextToken(nn.Module):
    """A transformers model's logits of the next token, after a prompt or after one more token and a cache."""

    def __init__(self, attention: str, cached: int) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        from fastlm.integrations import transformers

        transformers.register()
        torch.manual_seed(0)
        self.model = GPT2LMHeadModel(GPT2Config(attn_implementation=attention)).eval()
        self.cached, self.cache = cached, None

    @torch.inference_mode()
    def forward(self, tokens: Tensor) -> Tensor:
        """(1, T) -> (1, V)."""
        if not self.cached:
            return self.model(tokens, use_cache=True, logits_to_keep=1).logits[:, -1]
        if self.cache is None:
            prompt = torch.randint(0, 50257, (1, self.cached), generator=_generator(2))
            _, self.cache = self.model(prompt, use_cache=True, logits_to_keep=1, return_dict=False)
        logits = self.model(tokens, self.cache, use_cache=True).logits[:, -1]
        self.cache.crop(-tokens.shape[1])
        return logits


@dataclass(frozen=True)
class GPT2:
    """GPT-2 small: a prompt of 512 tokens, or one token after a cache of 512; sdpa against fastlm."""

    decode: bool

    dtype = torch.float32
    tolerance = 1e-4
    op = "gpt2"
    modes = ("forward",)
    length = 512

    @property
    def name(self) -> str:
        return f"{'decode' if self.decode else 'prefill'}_512"

    def gflop(self, mode: str) -> float:
        layers, width, vocab = 12, 768, 50257
        tokens = 1 if self.decode else self.length
        return 2 * (tokens * layers * 12 * width**2 + vocab * width) / 1e9

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.randint(0, 50257, (1, 1 if self.decode else self.length), generator=_generator(1)),)

    def comparable(self, results: Sequence[Tensor]) -> list[Tensor]:
        return [result.double() for result in results]

    def module(self) -> nn.Module:
        return NextToken("sdpa", self.length if self.decode else 0)

    def fast_module(self) -> nn.Module:
        return NextToken("fastlm", self.length if self.decode else 0)


OUTPUT_LAYERS = (
    OutputLayer(2048, 10000, 256),
    OutputLayer(1024, 50257, 768),
    OutputLayer(2048, 10000, 256, "none"),
    OutputLayer(768, 65, 128),
    OutputLayer(4096, 100, 512),
    OutputLayer(2048, 10000, 256, dtype=torch.bfloat16),
)
DROPOUTS = tuple(Dropout(4096, 512, dtype) for dtype in (torch.float32, torch.bfloat16))
GENERATIONS = tuple(Generation(op, through) for op in ("gru", "lstm") for through in (False, True))
# float32 alone: on a CPU without instructions for bfloat16 torch's linear layers take minutes for a prompt.
TRANSFORMERS = tuple(GPT2(decode) for decode in (False, True))
WORKLOADS = (*OUTPUT_LAYERS, *DROPOUTS, *GENERATIONS, *TRANSFORMERS)
