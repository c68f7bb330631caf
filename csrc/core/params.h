// What each kernel is told: sizes, pointers, flags. All tensors are dense and row-major; strides are in elements.
// T is float or double. A pointer that may be null says so.
#pragma once

#include <cstdint>

namespace fastlm {

// C (M, N) = [C +] op(A) op(B).
template <class T>
struct GemmParams {
  int64_t m, n, k;
  const T* a;        // (M, K), or (K, M) if a_transposed
  int64_t a_stride;  // between rows of A as stored
  bool a_transposed;
  const T* b;  // (K, N), or (N, K) if b_transposed
  int64_t b_stride;
  bool b_transposed;
  T* c;  // (M, N)
  int64_t c_stride;
  bool accumulate;  // add to C instead of overwriting it
};

// One layer and direction over a whole sequence. G gates: 3 (GRU: r, z, n) or 4 (LSTM: i, f, g, o).
template <class T>
struct RecurrentForwardParams {
  int64_t seq_len, batch, input_size, hidden;
  const T* x;     // (T, B, I)
  const T* h0;    // (B, H) or null: zeros
  const T* c0;    // (B, H) or null: zeros; LSTM only
  const T* w_ih;  // (G*H, I)
  const T* w_hh;  // (G*H, H)
  const T* b_ih;  // (G*H) or null
  const T* b_hh;  // (G*H) or null
  bool reverse;
  T* output;   // (T, B, H)
  T* h_n;      // (B, H)
  T* c_n;      // (B, H); LSTM only
  T* reserve;  // (T, B, R*H) or null; GRU R = 5: r, z, n, U_n h + b_hn, h before the step;
               // LSTM R = 6: i, f, g, o, c before the step, h before the step
};

template <class T>
struct RecurrentBackwardParams {
  int64_t seq_len, batch, input_size, hidden;
  const T* grad_output;  // (T, B, H) or null: zeros
  const T* grad_h_n;     // (B, H) or null: zeros
  const T* grad_c_n;     // (B, H) or null: zeros; LSTM only
  const T* x;            // (T, B, I)
  const T* w_ih;         // (G*H, I)
  const T* w_hh;         // (G*H, H)
  const T* reserve;      // as forward left it
  bool reverse;
  T* grad_x;     // (T, B, I) or null: not needed; so for all that follow
  T* grad_h0;    // (B, H)
  T* grad_c0;    // (B, H); LSTM only
  T* grad_w_ih;  // (G*H, I)
  T* grad_w_hh;  // (G*H, H)
  T* grad_b_ih;  // (G*H)
  T* grad_b_hh;  // (G*H); GRU only, an LSTM's two biases share grad_b_ih
};

}  // namespace fastlm
