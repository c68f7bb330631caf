// The one place where the order of gates is written (torch's order).
#pragma once

namespace fastlm {

enum GruGate { kReset, kUpdate, kNew, kGruGates };
enum LstmGate { kInput, kForget, kCell, kOutput, kLstmGates };

// The four columns of H that a step works on, before the activations (forward) or as their gradients (backward).
// GRU: r, z, the n part from the input, the n part from the state; LSTM: its gates.
constexpr int kSlots = 4;
enum GruSlot { kSlotReset, kSlotUpdate, kSlotNewInput, kSlotNewState };

// What forward keeps for backward, in columns of H.
enum GruReserve { kKeptReset, kKeptUpdate, kKeptNew, kKeptNewState, kKeptGruHidden, kGruReserve };
enum LstmReserve { kKeptGates, kKeptCell = kLstmGates, kKeptLstmHidden, kLstmReserve };

}  // namespace fastlm
