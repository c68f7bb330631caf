// What each kernel is told: sizes, pointers, flags. All tensors are dense and row-major; strides are in elements.
// T is float or double; S, what tensors store, is T or BFloat16 (core/dtype.h). A pointer that may be null says so.
#pragma once

#include <cstdint>

#include "core/dtype.h"

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
  const T* bias;    // (N), what rows of C start from, or null; null if accumulate
};

// Sequences of several lengths (cpu/sequences.h makes it). Work goes over them sorted by falling length, so that the
// rows of a step are the first ones; rows are counted step by step, "packed" as in torch's PackedSequence.
struct Ragged {
  int64_t steps;          // of the longest sequence
  const int64_t* first;   // (steps + 1): the row that a step begins with; first[steps] rows in all
  const int64_t* before;  // (B + 1): rows of all sequences before this one
  const int64_t* place;   // (rows): where a row lies in x, output and their gradients; null: in its own place
  const int64_t* order;   // (B): where a sequence lies in the batch; null: in its own place
};

// One layer and direction over a whole sequence. G gates: 3 (GRU: r, z, n) or 4 (LSTM: i, f, g, o). Where ragged has
// no `place`, (T, B) rows are its packed ones; the reserve always has these.
template <class S>
struct RecurrentForwardParams {
  using T = Compute<S>;
  int64_t seq_len, batch, input_size, hidden;
  const Ragged* ragged;  // or null: all sequences have seq_len steps
  const bool* resets;    // (T, B) or null: where the sequence of a batch row starts anew; never for packed tensors
  const S* x;            // (T, B, I)
  const S* h0;           // (B, H) or null: zeros
  const S* c0;           // (B, H) or null: zeros; LSTM only
  const S* w_ih;         // (G*H, I)
  const S* w_hh;         // (G*H, H)
  const S* b_ih;         // (G*H) or null
  const S* b_hh;         // (G*H) or null
  bool reverse;
  S* output;   // (T, B, H); 0 past a sequence's end
  S* cells;    // (T, B, H) or null: c after every step, 0 past a sequence's end; LSTM only
  S* h_n;      // (B, H)
  S* c_n;      // (B, H); LSTM only
  T* reserve;  // (T, B, R*H) or null; GRU R = 5: r, z, n, U_n h + b_hn, h before the step;
               // LSTM R = 6: i, f, g, o, c before the step, h before the step
};

template <class S>
struct RecurrentBackwardParams {
  using T = Compute<S>;
  int64_t seq_len, batch, input_size, hidden;
  const Ragged* ragged;  // as in forward, and so what follows
  const bool* resets;
  const S* grad_output;  // (T, B, H) or null: zeros
  const S* grad_cells;   // (T, B, H) or null: zeros; LSTM only
  const S* grad_h_n;     // (B, H) or null: zeros
  const S* grad_c_n;     // (B, H) or null: zeros; LSTM only
  const S* x;            // (T, B, I)
  const S* w_ih;         // (G*H, I)
  const S* w_hh;         // (G*H, H)
  const T* reserve;      // as forward left it
  bool reverse;
  S* grad_x;     // (T, B, I) or null: not needed; so for all that follow
  S* grad_h0;    // (B, H)
  S* grad_c0;    // (B, H); LSTM only
  S* grad_w_ih;  // (G*H, I)
  S* grad_w_hh;  // (G*H, H)
  S* grad_b_ih;  // (G*H)
  S* grad_b_hh;  // (G*H); GRU only, an LSTM's two biases share grad_b_ih
};

// Where the rows of a tensor (B, H, T, D) lie: strides in elements, D contiguous. Packed sequences (rows, H, D) have
// batch = 0 and begin where AttentionParams says.
template <class P>
struct Heads {
  P* data;
  int64_t batch, head, time;

  // Of row t of head h of sequence b.
  int64_t place(int64_t b, int64_t h, int64_t t) const { return b * batch + h * head + t * time; }
  P* row(int64_t b, int64_t h, int64_t t) const { return data + place(b, h, t); }
};

// A mask that broadcasts against (B, Hq, Tq, Tk); strides in elements, 0 along broadcast dimensions.
template <class P>
struct AttentionMask {
  P* data;  // or null
  int64_t batch, head, query, key;
};

// What forward and backward share. Query i of sequence b stands at p = i, or i + Tk - Tq (lower_right), and sees the
// keys p - left <= j <= p + right, all of that side for a negative number. A score is
//   softcap tanh(scale q k / softcap) - slope |p - j| + bias,
// and its weight is dropped with probability `dropout`, by a generator over (seed, place of the row in lse, key).
template <class S>
struct AttentionParams {
  using T = Compute<S>;
  int64_t batch, q_heads, kv_heads, q_len, k_len, dim, v_dim;  // lengths: of the longest, for packed sequences
  const int64_t* q_starts;                                     // (B + 1) or null: not packed
  const int64_t* k_starts;                                     // (B + 1), with q_starts
  const int64_t* kv_lengths;                                   // (B) or null: keys past these play no part
  Heads<const S> q, k, v;
  AttentionMask<const bool> keep;  // False: masked
  AttentionMask<const S> bias;     // float mask
  AttentionMask<const T> slopes;   // ALiBi, (B, Hq): batch and head strides alone
  T scale, softcap;                // softcap 0: none
  bool lower_right;
  int64_t left, right;
  double dropout;
  int64_t seed;
};

template <class S>
struct AttentionForwardParams : AttentionParams<S> {
  Heads<S> output;
  Heads<Compute<S>> lse;  // (B, Hq, Tq): natural logarithm, -inf where a row sees nothing; time stride 1
  S* weights;             // (B, Hq, Tq, Tk), dropped ones 0, or their average over heads (B, Tq, Tk); or null
  bool average;
};

template <class S>
struct AttentionBackwardParams : AttentionParams<S> {
  using T = Compute<S>;
  Heads<const S> grad_output, output;
  Heads<const T> lse, grad_lse;  // grad_lse.data may be null: zeros
  Heads<S> grad_q, grad_k, grad_v;
  AttentionMask<T> grad_bias;  // or null: not needed; zeros beforehand, summed over what the bias broadcasts along
  int64_t grad_bias_numbers;   // of it, dense
};

// GELU by tanh over n values; backward where grad_output is given.
template <class S>
struct GeluParams {
  int64_t n;
  const S* x;
  const S* grad_output;  // or null
  S* result;             // the output, or the gradient of x
};

// Dropout of n values: each times 0 or 1 / (1 - probability), by a generator over (seed, place of the value).
template <class S>
struct DropoutParams {
  int64_t n;
  const S* x;
  S* result;
  double probability;
  int64_t seed;
};

// The output layer of a language model with its loss: logits = hidden weight^T + bias, never held as a whole. Forward
// (losses given) makes losses and statistics, and the gradients that are not null; backward (losses null) makes these
// from the statistics.
template <class S>
struct CrossEntropyParams {
  using T = Compute<S>;
  int64_t rows, vocab, dim;
  const S* hidden;        // (R, D)
  const S* weight;        // (V, D)
  const S* bias;          // (V) or null
  const int64_t* target;  // (R), 0 to V - 1 in the live rows
  const int64_t* live;    // (live_rows): the rows that count, rising; the others' losses and gradients are 0
  int64_t live_rows;
  T smoothing;           // of labels, 0 to 1
  const T* row_weights;  // (R): what arrives at each loss; or null: row_weight at all
  T row_weight;
  T* losses;       // (R) or null
  T* statistics;   // (2, R): a row's greatest logit, and the sum of exp(logit - greatest)
  S* grad_hidden;  // (R, D) or null, so what follows
  S* grad_weight;  // (V, D)
  S* grad_bias;    // (V)
};

}  // namespace fastlm
