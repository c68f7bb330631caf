"""Every operator schema of fastlm, once. Implementations attach to these names per back end."""

import torch

LIBRARY = torch.library.Library("fastlm", "FRAGMENT")

# What is seldom given comes last and has a default: a single step feels every argument that Python hands over.
#
# Either x (T, B, I), with lengths (B,) int64 and reset_mask (T, B) bool if given, or with batch_sizes (T,) int64 packed
# x (rows, I), or x (B, I) for one step; these three lie on the CPU for its kernels. h_n and c_n are (1, B, H) as a
# module's, of one step (B, H); h0 and c0 may have either form, both the same one. `save` asks for the reserve that
# backward needs, `all_cells` for every c; without it each is an empty tensor. A gradient that is not asked for (need_*,
# or `state`, of which only the shape counts) or has no input (no bias) is an empty tensor.
_SEQUENCES = "Tensor? lengths, Tensor? batch_sizes, Tensor? reset_mask"
_MAYBE_SEQUENCES = "Tensor? lengths=None, Tensor? batch_sizes=None, Tensor? reset_mask=None, bool reverse=False"
# q (B, Hq, Tq, D), k (B, Hkv, Tk, D), v (B, Hkv, Tk, Dv), or packed (rows, H, D) with q_starts and k_starts (B + 1,)
# int64. keep (bool) and bias (dtype of q) have 4 dimensions that broadcast against (B, Hq, Tq, Tk), slopes such against
# (B, Hq, 1, 1). softcap 0: none; left, right -1: unlimited. lse is (B, Hq, Tq), packed (Hq, rows). weights, not for
# packed rows, are (B, Hq, Tq, Tk), dropped ones 0, or their average over heads (B, Tq, Tk).
_ATTENTION = (
    "float scale=1.0, int right=-1, Tensor? keep=None, Tensor? bias=None, Tensor? slopes=None, Tensor? kv_lengths=None,"
    " Tensor? q_starts=None, Tensor? k_starts=None, Tensor? seed=None, float softcap=0.0, float dropout=0.0,"
    " bool lower_right=False, int left=-1"
)
# hidden (R, D), weight (V, D), bias (V,), target (R,) int64. reduction: 0 none, 1 mean, 2 sum. statistics (2, R) is
# what backward makes the logits' softmax from; gradients that forward was asked for are those of a loss's own gradient
# of 1, the rest are empty tensors.
_CROSS_ENTROPY = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
_NEEDED = "bool need_hidden, bool need_weight, bool need_bias"
SCHEMAS = (
    "gru_forward(Tensor x, Tensor? h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh,"
    f" {_MAYBE_SEQUENCES}, bool save=False) -> (Tensor output, Tensor h_n, Tensor reserve)",
    "gru_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor x, Tensor? state, Tensor w_ih, Tensor w_hh,"
    f" {_SEQUENCES}, Tensor reserve, bool reverse, bool need_x, bool need_weights, bool need_bias)"
    " -> (Tensor grad_x, Tensor grad_h0, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh)",
    "lstm_forward(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh,"
    f" {_MAYBE_SEQUENCES}, bool save=False, bool all_cells=False)"
    " -> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells, Tensor reserve)",
    "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, Tensor x,"
    f" Tensor? state, Tensor w_ih, Tensor w_hh, {_SEQUENCES}, Tensor reserve, bool reverse, bool need_x,"
    " bool need_weights, bool need_bias)"
    " -> (Tensor grad_x, Tensor grad_h0, Tensor grad_c0, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_bias)",
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_ATTENTION}) -> (Tensor output, Tensor lse)",
    f"attention_weights_forward(Tensor q, Tensor k, Tensor v, bool average, {_ATTENTION})"
    " -> (Tensor output, Tensor lse, Tensor weights)",
    "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor output, Tensor lse,"
    f" {_ATTENTION}, bool need_bias=False) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
    f"linear_cross_entropy_forward({_CROSS_ENTROPY}, int ignore_index, float label_smoothing, int reduction, {_NEEDED})"
    " -> (Tensor loss, Tensor statistics, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    f"linear_cross_entropy_backward(Tensor grad_losses, {_CROSS_ENTROPY}, Tensor statistics, int ignore_index,"
    f" float label_smoothing, {_NEEDED}) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    "gelu_forward(Tensor x) -> Tensor",
    "gelu_backward(Tensor grad_output, Tensor x) -> Tensor",
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    "gemm(Tensor a, Tensor b, bool transpose_a, bool transpose_b, Tensor? bias=None) -> Tensor",
)

for _schema in SCHEMAS:
    LIBRARY.define(_schema)
