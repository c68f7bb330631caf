"""Every workload: a torch module with its inputs, and the work it counts as.

Names: b(batch)_t(seq_len)_(hidden); the input has the hidden size unless i(input)_h(hidden) is given. A recurrent layer
counts 2 T B G H (I + H) flops per layer and direction, G = 3 (GRU) or 4 (LSTM) gates, and three times that in training;
element-wise work, embeddings and losses count nothing. All layers are time-major, (T, B, I).
"""

# An override says what it does by the method it overrides.
# ruff: noqa: D102

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import attention
import models
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastlm

MODES = ("forward", "training")
OPS = ("gru", "lstm")  # recurrent
ATTENTION_OPS = ("attention", "mha")
MODEL_OPS = ("cross_entropy", "dropout", "gpt2")  # generation is of its layer's op
GATES = {"gru": 3, "lstm": 4}
LAYERS = {"gru": nn.GRU, "lstm": nn.LSTM}
CELLS = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Layer:
    """One recurrent module over whole sequences of equal length; training gives the gradients of x and all weights."""

    op: str
    name: str
    batch: int
    seq_len: int
    hidden: int
    input_size: int
    layers: int = 1
    bidirectional: bool = False
    dtype: torch.dtype = torch.float32
    modes: tuple[str, ...] = MODES

    @property
    def tolerance(self) -> float:
        """How far from float64 a result may be, as a part of its largest value.

        float32 stays below 1e-5 on all workloads; bfloat16 or tf32 arithmetic, which would make a comparison unfair, is
        at 1e-3 and more. bfloat16 itself rounds weights, inputs and every state.
        """
        return 1e-4 if self.dtype == torch.float32 else 5e-2

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def steps(self) -> int:
        """Steps of one sequence element that are useful work."""
        return self.seq_len * self.batch

    def gflop(self, mode: str) -> float:
        """Useful work of one call."""
        inputs = self.input_size + (self.layers - 1) * self.directions * self.hidden
        per_step = 2 * GATES[self.op] * self.hidden * (inputs + self.layers * self.hidden) * self.directions
        return self.steps * per_step * (1 if mode == "forward" else 3) / 1e9

    def recurrent(self) -> nn.RNNBase:
        """The layer with its seeded weights."""
        torch.manual_seed(0)
        return LAYERS[self.op](self.input_size, self.hidden, num_layers=self.layers, bidirectional=self.bidirectional)

    def module(self) -> nn.Module:
        """What the providers run: the output is its result, or the first of a tuple."""
        return self.recurrent()

    def fast_module(self) -> nn.Module:
        """The same for fastlm."""
        return fastlm.replace(self.module())

    def inputs(self) -> tuple[Tensor, ...]:
        """Arguments of the module."""
        return (_randn(self.seq_len, self.batch, self.input_size),)

    def grad_output(self, output: Tensor) -> Tensor:
        """The gradient that training starts from."""
        return _randn(*output.shape).to(output.dtype)

    def comparable(self, results: Sequence[Tensor]) -> list[Tensor]:
        """The output and gradients without what no caller reads."""
        return list(results)


class Packed(nn.Module):
    """Sequences of several lengths as torch's documentation runs them."""

    def __init__(self, rnn: nn.RNNBase, lengths: Tensor) -> None:
        super().__init__()
        self.rnn, self.lengths = rnn, lengths

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, I) padded -> (T, B, H), zero past each length."""
        packed = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], total_length=x.shape[0])[0]


class Calls(nn.Module):
    """A layer called with arguments of fastlm's own."""

    def __init__(self, rnn: nn.RNNBase, **arguments: Tensor) -> None:
        super().__init__()
        self.rnn, self.arguments = rnn, arguments

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, I) -> (T, B, H)."""
        return self.rnn(x, **self.arguments)[0]


class StepsWithResets(nn.Module):
    """What reinforcement learning runs where segments may end at any step: a step at a time, states times a mask."""

    def __init__(self, rnn: nn.RNNBase, reset_mask: Tensor) -> None:
        super().__init__()
        self.rnn, self.keep = rnn, ~reset_mask

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, I) -> (T, B, H)."""
        outputs, state = [], None
        for step, keep in zip(x.split(1), self.keep, strict=True):
            if state is not None:
                keep = keep.to(x.dtype)[:, None]
                state = state * keep if isinstance(state, Tensor) else tuple(each * keep for each in state)
            output, state = self.rnn(step, state)
            outputs.append(output)
        return torch.cat(outputs)


@dataclass(frozen=True)
class Resets(Layer):
    """A layer whose sequences start anew at 5 % of the steps."""

    @cached_property
    def reset_mask(self) -> Tensor:
        """(T, B) bool."""
        return torch.rand(self.seq_len, self.batch, generator=torch.Generator().manual_seed(3)) < 0.05

    def module(self) -> nn.Module:
        return StepsWithResets(self.recurrent(), self.reset_mask)

    def fast_module(self) -> nn.Module:
        return Calls(fastlm.replace(self.recurrent()), reset_mask=self.reset_mask)


@dataclass(frozen=True)
class LastStep(Layer):
    """A layer of whose output the last step alone is used, as a classifier does: gradients vanish towards the first."""

    def grad_output(self, output: Tensor) -> Tensor:
        grad = super().grad_output(output)
        grad[:-1] = 0
        return grad


@dataclass(frozen=True)
class OneStep(Layer):
    """One step of a sequence, the state carried from call to call; fastlm runs it through a Stream."""


@dataclass(frozen=True)
class Varlen(Layer):
    """A layer over sequences of length 1..T, unsorted; only steps inside a sequence count."""

    @cached_property
    def lengths(self) -> Tensor:
        """(B,), uniform."""
        return torch.from_numpy(np.random.default_rng(0).integers(1, self.seq_len + 1, self.batch))

    @property
    def steps(self) -> int:
        return int(self.lengths.sum())

    def _inside(self, tensor: Tensor) -> Tensor:
        return tensor * (torch.arange(self.seq_len)[:, None] < self.lengths)[..., None]

    def module(self) -> nn.Module:
        return Packed(self.recurrent(), self.lengths)

    def lengths_module(self) -> nn.Module:
        """The way of fastlm alone, without packing."""
        return Calls(fastlm.replace(self.recurrent()), lengths=self.lengths)

    def grad_output(self, output: Tensor) -> Tensor:
        return self._inside(super().grad_output(output))

    def comparable(self, results: Sequence[Tensor]) -> list[Tensor]:
        return [self._inside(results[0]), *results[1:]]


class Steps(nn.Module):
    """A cell in a Python loop."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(T, B, I) -> the last state."""
        state = None
        for step in x.unbind(0):
            state = self.cell(step, state)
        return state


@dataclass(frozen=True)
class CellLoop(Layer):
    """A cell called once a step; the result is the last hidden state."""

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return Steps(CELLS[self.op](self.input_size, self.hidden))


class TokenModel(nn.Module):
    """Embedding, one recurrent layer, one linear layer on every step or on the last one."""

    def __init__(self, rnn: nn.RNNBase, vocabulary: int, outputs: int, last_only: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, rnn.input_size)
        self.rnn = rnn
        self.linear = nn.Linear(rnn.hidden_size, outputs)
        self.last_only = last_only

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, B) -> (T, B, outputs), or (B, outputs) with last_only."""
        hidden = self.rnn(self.embedding(tokens))[0]
        return self.linear(hidden[-1] if self.last_only else hidden)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the next tokens (T, B); with one output, of the two classes (B,)."""
        output = self(tokens)
        if self.last_only:
            return binary_cross_entropy_with_logits(output.flatten(), targets.to(output.dtype))
        return cross_entropy(output.flatten(0, 1), targets.flatten())


class CausalModel(nn.Module):
    """A TokenModel's weights in fastlm's own language model."""

    def __init__(self, model: TokenModel) -> None:
        from fastlm.models import RNNConfig, RNNForCausalLM  # needs the extra lm

        super().__init__()
        vocabulary, embedding = model.embedding.weight.shape
        config = RNNConfig(
            vocab_size=vocabulary,
            cell=model.rnn.mode.lower(),
            embedding_size=embedding,
            hidden_size=model.rnn.hidden_size,
            num_layers=1,
            dropout=0.0,
            tie_word_embeddings=False,
        )
        self.model = RNNForCausalLM(config)
        self.model.model.embed_tokens.load_state_dict(model.embedding.state_dict())
        self.model.model.rnn.load_state_dict(model.rnn.state_dict())
        self.model.lm_head.load_state_dict(model.linear.state_dict())

    def forward(self, tokens: Tensor) -> Tensor:
        """As TokenModel."""
        return self.model(input_ids=tokens.t(), use_cache=False).logits.transpose(0, 1)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """As TokenModel."""
        return self.model(input_ids=tokens.t(), shift_labels=targets.t(), use_cache=False, skip_logits=True).loss


VOCABULARY = 10000


@dataclass(frozen=True)
class LanguageModel(Layer):
    """A word-level language model; training is a whole step: loss, gradients, Adam."""

    outputs = VOCABULARY
    last_only = False

    def gflop(self, mode: str) -> float:
        rows = self.batch if self.last_only else self.steps
        linear = 2 * rows * self.hidden * self.outputs * (1 if mode == "forward" else 3) / 1e9
        return super().gflop(mode) + linear

    def module(self) -> nn.Module:
        return TokenModel(self.recurrent(), VOCABULARY, self.outputs, self.last_only)

    def fast_module(self) -> nn.Module:
        model = self.module()
        return fastlm.replace(model) if self.last_only else CausalModel(model)

    def _tokens(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, VOCABULARY, (self.seq_len, self.batch), generator=generator)

    def inputs(self) -> tuple[Tensor, ...]:
        return (self._tokens(1),)

    @cached_property
    def targets(self) -> Tensor:
        """What the model is to say: random next tokens, or one of two classes."""
        return self._tokens(2)[0] % 2 if self.last_only else self._tokens(2)


@dataclass(frozen=True)
class Classifier(LanguageModel):
    """A classifier with two classes reading the last hidden state; else as the language model."""

    outputs = 1
    last_only = True


@dataclass(frozen=True)
class Product:
    """A matrix product of (M, K) and (K, N), stored as `form` says: N as is, T transposed, first letter a's."""

    m: int
    k: int
    n: int
    form: str = "NT"

    op = "gemm"
    modes = ("forward",)
    dtype = torch.float32
    tolerance = 1e-4

    @property
    def name(self) -> str:
        return f"{self.m}x{self.k}x{self.n}_{self.form.lower()}"

    @property
    def transposed(self) -> tuple[bool, bool]:
        """Whether a and b are stored transposed."""
        return self.form[0] == "T", self.form[1] == "T"

    def gflop(self, mode: str) -> float:
        return 2 * self.m * self.k * self.n / 1e9

    def inputs(self) -> tuple[Tensor, ...]:
        transpose_a, transpose_b = self.transposed
        a = _randn(*((self.k, self.m) if transpose_a else (self.m, self.k)))
        return a, _randn(*((self.n, self.k) if transpose_b else (self.k, self.n)))

    def comparable(self, results: Sequence[Tensor]) -> list[Tensor]:
        return list(results)


Workload = (
    Layer
    | Product
    | attention.Attention
    | attention.AttentionModule
    | models.OutputLayer
    | models.Generation
    | models.GPT2
)


def _layer(op: str, batch: int, seq_len: int, hidden: int) -> Layer:
    return Layer(op, f"b{batch}_t{seq_len}_{hidden}", batch, seq_len, hidden, hidden)


def _recurrent(op: str) -> tuple[Layer, ...]:
    return (
        _layer(op, 1, 1, 256),
        _layer(op, 1, 100, 256),
        _layer(op, 1, 1, 1024),
        _layer(op, 8, 128, 512),
        _layer(op, 16, 64, 256),
        Layer(op, "b32_t128_i128_h256", 32, 128, 256, 128),
        _layer(op, 64, 35, 650),
        _layer(op, 20, 70, 1150),
        _layer(op, 32, 64, 1024),
        _layer(op, 64, 128, 64),
        Layer(op, "b32_t64_256_2layer", 32, 64, 256, 256, layers=2),
        Layer(op, "b32_t64_256_bi", 32, 64, 256, 256, bidirectional=True),
        Varlen(op, "b32_t128_256_varlen", 32, 128, 256, 256),
        Resets(op, "b32_t128_256_resets", 32, 128, 256, 256),
        LastStep(op, "b32_t400_256_last", 32, 400, 256, 256, modes=("training",)),
        Layer(op, "b8_t128_512_bf16", 8, 128, 512, 512, dtype=torch.bfloat16),
        Layer(op, "b16_t64_256_bf16", 16, 64, 256, 256, dtype=torch.bfloat16),
        *(
            OneStep(op, f"stream_b1_{hidden}{suffix}", 1, 1, hidden, hidden, dtype=dtype, modes=("forward",))
            for hidden in (256, 1024)
            for dtype, suffix in ((torch.float32, ""), (torch.bfloat16, "_bf16"))
        ),
        CellLoop(op, "cell_b32_256_x50", 32, 50, 256, 256),
    )


WORKLOADS: tuple[Workload, ...] = (
    *_recurrent("gru"),
    LanguageModel("gru", "LM-A", 32, 64, 256, 128),
    *_recurrent("lstm"),
    LanguageModel("lstm", "LM-B", 32, 64, 256, 128),
    Classifier("lstm", "CLS", 32, 200, 128, 256),
    *attention.WORKLOADS,
    *models.WORKLOADS,
    # An input projection as nn.Linear stores its weight, a larger one, and the forms that gradients need.
    Product(2048, 256, 768),
    Product(2048, 1024, 3072),
    Product(2048, 256, 768, "NN"),
    Product(2048, 256, 768, "TN"),
    # One step's recurrent product, (B, H) x (H, 3H).
    *(Product(batch, hidden, 3 * hidden) for batch, hidden in ((1, 256), (8, 512), (16, 256), (32, 256), (32, 1024))),
)
