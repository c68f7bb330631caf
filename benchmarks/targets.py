"""The speed to reach, and how far a run is from it."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import rows
import torch
from attention import Attention
from registry import WORKLOADS, Layer, Product

PEER_SLACK = 1.15  # what two runs of one program differ by on a shared machine


class Target(NamedTuple):
    """`measure` is "share" (of the float32 peak: bfloat16 may reach 2), "torch_ratio" or "read" (of a plain read's
    rate), at least `bound`; or at most it: "ms", or "resets", the time over that without them.
    """

    op: str
    workload: str
    mode: str
    measure: str
    bound: float


# (op, workload): (measure and bound of forward, of training).
_SINGLE = {
    ("gru", "b64_t128_64"): (("share", 0.50), ("share", 0.40)),
    ("lstm", "b64_t128_64"): (("share", 0.60), ("share", 0.50)),
    ("gru", "b1_t100_256"): (("ms", 0.65), ("torch_ratio", 10)),
    ("lstm", "b1_t100_256"): (("ms", 0.9), ("torch_ratio", 2)),
    ("gru", "b1_t1_256"): (("torch_ratio", 3), ("torch_ratio", 2)),
    ("lstm", "b1_t1_256"): (("torch_ratio", 8), ("torch_ratio", 4)),
    ("gru", "b1_t1_1024"): (("ms", 0.18), None),
    ("lstm", "b1_t1_1024"): (("ms", 0.35), ("torch_ratio", 10)),
    ("gru", "b32_t128_256_varlen"): (("share", 0.75), ("share", 0.68)),
    ("lstm", "b32_t128_256_varlen"): (("share", 0.75), ("share", 0.68)),
    ("gru", "b32_t128_256_resets"): (("resets", 1.05), ("resets", 1.1)),
    ("lstm", "b32_t128_256_resets"): (("resets", 1.05), ("resets", 1.1)),
    ("gru", "stream_b1_256"): (("ms", 0.018), None),
    ("lstm", "stream_b1_256"): (("ms", 0.022), None),
    ("gru", "stream_b1_256_bf16"): (("ms", 0.012), None),
    ("lstm", "stream_b1_256_bf16"): (("ms", 0.012), None),
    ("gru", "stream_b1_1024_bf16"): (("ms", 0.09), None),
    ("lstm", "stream_b1_1024_bf16"): (("ms", 0.13), None),
    ("gru", "cell_b32_256_x50"): (("share", 0.60), ("share", 0.50)),
    ("lstm", "cell_b32_256_x50"): (("share", 0.60), ("share", 0.50)),
}
_OUTPUT = {
    "2048x10000x256": (None, ("share", 0.82)),
    "1024x50257x768": (None, ("share", 0.82)),
    "2048x10000x256_none": (None, ("share", 0.60)),
}
_SINGLE |= {("cross_entropy", name): bounds for name, bounds in _OUTPUT.items()}
_SINGLE |= {(op, "stream_100_tokens"): (("torch_ratio", 3),) for op in ("gru", "lstm")}
# Likewise for attention, by the name without _bf16: float32 forward and training, then bfloat16.
_ATTENTION = {
    "prefill1024_full": (("share", 0.82), ("share", 0.80), ("share", 1.50), ("share", 1.30)),
    "b4_512_full": (("share", 0.82), ("share", 0.80), ("share", 1.50), ("share", 1.30)),
    "b4_512_causal": (("share", 0.68), ("share", 0.68), ("share", 1.32), ("share", 1.10)),
    "prefill1024_causal": (("share", 0.75), ("share", 0.75), ("share", 1.40), ("share", 1.10)),
    "long4096_causal": (("share", 0.82), ("share", 0.80), ("share", 1.44), ("share", 1.24)),
    "gqa2048_causal": (("share", 0.82), ("share", 0.80), ("share", 1.44), ("share", 1.24)),
    "tiny64_causal": (("torch_ratio", 2), ("torch_ratio", 2), ("torch_ratio", 2), ("torch_ratio", 3)),
    "small256_causal": (("torch_ratio", 2), ("torch_ratio", 2), ("torch_ratio", 2), ("torch_ratio", 3)),
    "keypad128": (("torch_ratio", 2), ("torch_ratio", 1.8), ("torch_ratio", 3), ("torch_ratio", 4)),
    "window256_4096": (("share", 0.55), ("share", 0.50), ("share", 0.80), ("share", 0.70)),
    "docs16_4096": (("share", 0.55), ("share", 0.50), ("share", 0.80), ("share", 0.70)),
    "bias1000_d80": (("share", 0.78), ("share", 0.70), ("share", 1.30), ("share", 1.10)),
    "varlen16x32-512": (("share", 0.65), ("share", 0.60), ("share", 0.90), ("share", 0.80)),
    "drop0.1_b4_512_causal": (("torch_ratio", 2.5), ("torch_ratio", 2.5)),
    "drop0.1_small256_causal": (("torch_ratio", 2.5), ("torch_ratio", 2.5)),
    "decode_gqa4096_hot": (("read", 0.75), ("read", 0.70)),
    "decode_gqa4096_cold": (("read", 0.75), ("read", 0.70)),
    "decode_b16_1024": (("read", 0.75), ("read", 0.70)),
    "decode_b1_128": (("torch_ratio", 1), ("torch_ratio", 3)),
}
_LARGE = {"gru": (("share", 0.84), ("share", 0.80)), "lstm": (("share", 0.86), ("share", 0.82))}


def _targets() -> Iterator[Target]:
    for workload in WORKLOADS:
        bounds = _SINGLE.get((workload.op, workload.name))
        if isinstance(workload, Product):
            large = workload.m >= 2048 and workload.form == "NT"
            bounds = (("share", 0.90) if large else ("torch_ratio", 1),)
        elif isinstance(workload, Attention):
            both = _ATTENTION[workload.name.removesuffix("_bf16")]
            count = len(workload.modes)
            bounds = both[count:] if workload.dtype == torch.bfloat16 else both[:count]
        elif bounds is None and type(workload) is Layer and workload.dtype == torch.float32:
            bounds = _LARGE[workload.op]
        for mode, bound in zip(workload.modes, bounds or (), strict=False):
            if bound is not None:
                yield Target(workload.op, workload.name, mode, *bound)


TARGETS = tuple(_targets())

# The fastest other software measured on an AMD Zen 4 server, two cores, and how many times faster than torch it was
# there: (op, workload): ((name, ratio) of forward, of training). Used where the software is no provider of the run.
PEERS = {
    ("gru", "b1_t1_256"): (("openvino", 3.22), ("torch", 1.00)),
    ("lstm", "b1_t1_256"): (("onnxruntime", 12.18), ("jax", 2.98)),
    ("gru", "b1_t100_256"): (("onnxruntime", 2.87), ("jax", 6.30)),
    ("lstm", "b1_t100_256"): (("onnxruntime", 1.46), ("torch", 1.00)),
    ("gru", "b1_t1_1024"): (("onnxruntime", 9.06), ("torch", 1.00)),
    ("lstm", "b1_t1_1024"): (("onnxruntime", 10.26), ("keras", 6.16)),
    ("gru", "b8_t128_512"): (("openvino", 2.39), ("jax", 1.21)),
    ("lstm", "b8_t128_512"): (("onnxruntime", 1.14), ("torch", 1.00)),
    ("gru", "b16_t64_256"): (("openvino", 1.94), ("torch", 1.00)),
    ("lstm", "b16_t64_256"): (("onnxruntime", 1.16), ("torch", 1.00)),
    ("gru", "b32_t128_i128_h256"): (("openvino", 1.83), ("torch", 1.00)),
    ("lstm", "b32_t128_i128_h256"): (("onnxruntime", 1.08), ("torch", 1.00)),
    ("gru", "b64_t35_650"): (("openvino", 1.56), ("torch", 1.00)),
    ("lstm", "b64_t35_650"): (("onnxruntime", 1.01), ("torch", 1.00)),
    ("gru", "b20_t70_1150"): (("onnxruntime", 2.37), ("jax", 1.43)),
    ("lstm", "b20_t70_1150"): (("onnxruntime", 1.16), ("torch", 1.00)),
    ("gru", "b32_t64_1024"): (("openvino", 1.48), ("jax", 1.13)),
    ("lstm", "b32_t64_1024"): (("torch", 1.00), ("torch", 1.00)),
    ("gru", "b64_t128_64"): (("openvino", 1.47), ("jax", 1.46)),
    ("lstm", "b64_t128_64"): (("onnxruntime", 1.48), ("torch", 1.00)),
    ("gru", "b32_t64_256_2layer"): (("openvino", 1.59), ("torch", 1.00)),
    ("lstm", "b32_t64_256_2layer"): (("onnxruntime", 1.07), ("torch", 1.00)),
    ("gru", "b32_t64_256_bi"): (("openvino", 1.56), ("keras", 1.08)),
    ("lstm", "b32_t64_256_bi"): (("onnxruntime", 1.02), ("torch", 1.00)),
    ("gru", "b32_t128_256_varlen"): (("torch", 1.00), ("torch", 1.00)),
    ("lstm", "b32_t128_256_varlen"): (("onnxruntime", 1.47), ("torch_padded", 1.52)),
    ("gru", "cell_b32_256_x50"): (("keras", 1.22), ("jax", 1.31)),
    ("lstm", "cell_b32_256_x50"): (("keras", 1.28), ("jax", 1.05)),
    ("gru", "LM-A"): (("keras", 1.57), ("keras", 1.31)),
    ("lstm", "LM-B"): (("torch_tuned", 1.35), ("torch_tuned", 1.40)),
    ("lstm", "CLS"): (("torch", 1.00), ("torch_tuned", 1.40)),
}
# More than to be matched: JAX's time halved, whole models and the output layer ahead by a margin.
_PEER_FACTOR = {
    ("gru", "b1_t100_256", "training"): 2.0,
    **{(op, name, "forward"): 1.2 for op, name in (("gru", "LM-A"), ("lstm", "LM-B"))},
    **{(op, name, "training"): 1.3 for op, name in (("gru", "LM-A"), ("lstm", "LM-B"))},
    **{("cross_entropy", name, "training"): 1.5 for name in _OUTPUT},
}


class Verdict(NamedTuple):
    """What a run says about one target: `reached` is None where the run lacks the row."""

    text: str
    reached: bool | None


def _verdict(label: str, measured: float | None, bound: float, unit: str, at_most: bool = False) -> Verdict:
    if measured is None:
        return Verdict(f"{label}: not measured (target {bound:.3g} {unit})", None)
    needed = measured / bound if at_most else bound / measured
    reached = needed <= 1
    outcome = "reached" if reached else f"MISSED, must be {needed:.2f} times as fast"
    sign = "<=" if at_most else ">="
    return Verdict(f"{label}: {outcome}: {measured:.3g}, target {sign} {bound:.3g} {unit}", reached)


def verdicts(groups: Mapping[tuple[str, str, str], rows.Group]) -> Iterator[Verdict]:
    """Every target of the table, then torch and the fastest peer on every workload that was measured."""
    units = {
        "share": "of the peak",
        "torch_ratio": "times torch",
        "read": "of a plain read",
        "ms": "ms",
        "resets": "times without resets",
    }
    for target in TARGETS:
        group = groups.get((target.op, target.workload, target.mode), {})
        label = f"{target.op}/{target.workload} {target.mode}"
        at_most = target.measure in ("ms", "resets")
        yield _verdict(label, _measured(group, target), target.bound, units[target.measure], at_most=at_most)
    for (op, workload, mode), group in groups.items():
        if op == "gemm" or "torch" not in group or rows.ours(group) is None:
            continue
        label = f"{op}/{workload} {mode}"
        if "fastlm" in group:
            yield _verdict(f"{label} against torch", group["fastlm"].torch_ratio, 1, "times torch")
        peer, limit = _peer_limit(op, workload, mode, group)
        if peer != "torch" or (op, workload, mode) in _PEER_FACTOR:
            bound = _PEER_FACTOR.get((op, workload, mode), 1 / PEER_SLACK)
            yield _verdict(f"{label} against {peer}", limit / rows.ours(group).p50, bound, "times the peer")


def _measured(group: rows.Group, target: Target) -> float | None:
    # With lengths either way to say them counts.
    either = target.workload.endswith("varlen") or target.workload.startswith(("docs", "keypad"))
    row = rows.ours(group) if either else group.get("fastlm")
    if row is None:
        return None
    if target.measure == "resets":
        return row.p50 / group["without_resets"].p50 if "without_resets" in group else None
    if target.measure == "read":
        return row.gbs / row.read_gbs if row.gbs is not None else None
    return row.p50 if target.measure == "ms" else getattr(row, target.measure)


def _peer_limit(op: str, workload: str, mode: str, group: rows.Group) -> tuple[str, float]:
    """The fastest peer and its time in milliseconds; through torch where it took no part in the run."""
    fastest = rows.fastest_peer(group)
    found = fastest.provider, fastest.p50
    if (op, workload) not in PEERS:
        return found
    name, ratio = PEERS[op, workload][mode == "training"]
    # torch_tuned means fused Adam and MALLOC_MMAP_MAX_=0; under the latter plain torch has the same inference.
    took_part = fastest.malloc_mmap_max == "0" if name == "torch_tuned" else name in group
    through_torch = f"{name} (through torch)", group["torch"].p50 / ratio
    return found if took_part else min(found, through_torch, key=lambda item: item[1])
