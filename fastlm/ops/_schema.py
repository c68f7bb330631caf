"""Every operator schema of fastlm, once. Implementations attach to these names per back end."""

import torch

LIBRARY = torch.library.Library("fastlm", "FRAGMENT")

# `save` asks for the reserve that backward needs; without it the reserve is an empty tensor.
# A gradient that is not asked for (need_*) or has no input (no bias, no h0) is an empty tensor.
SCHEMAS = (
    "gru_forward(Tensor x, Tensor? h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh,"
    " bool reverse, bool save) -> (Tensor output, Tensor h_n, Tensor reserve)",
    "gru_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor x, Tensor w_ih, Tensor w_hh, Tensor reserve,"
    " bool reverse, bool need_x, bool need_h0, bool need_weights, bool need_bias)"
    " -> (Tensor grad_x, Tensor grad_h0, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b_ih, Tensor grad_b_hh)",
    "lstm_forward(Tensor x, Tensor? h0, Tensor? c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh,"
    " bool reverse, bool save) -> (Tensor output, Tensor h_n, Tensor c_n, Tensor reserve)",
    "lstm_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor w_ih, Tensor w_hh,"
    " Tensor reserve, bool reverse, bool need_x, bool need_h0, bool need_weights, bool need_bias)"
    " -> (Tensor grad_x, Tensor grad_h0, Tensor grad_c0, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_bias)",
    "gemm(Tensor a, Tensor b, bool transpose_a, bool transpose_b) -> Tensor",
)

for _schema in SCHEMAS:
    LIBRARY.define(_schema)
