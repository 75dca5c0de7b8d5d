// The arguments of the loss ops, for the CPU and for the kernels. Plain pointers; "or null" where optional.
#pragma once
#include <stdint.h>

struct DataflexLoss {
  const void* logits;         // [rows, vocab], rows row_stride elements apart
  const int64_t* labels;      // [rows]
  const int64_t* cu_seqlens;  // [samples + 1]
  const float* token_weight;  // [rows] or null
  const float* class_weight;  // [vocab] or null
  int64_t rows, vocab, row_stride, samples;
  int64_t ignore_index, vocab_offset;
  float label_smoothing, z_loss, softcap;
  int32_t mean;     // 1: a sample's loss is divided by its count
  int32_t sharded;  // 1: the logits are a shard of the vocabulary, and a label may lie elsewhere
  int32_t dtype;    // 0, 1, 2: float, bfloat16, half
};

struct DataflexLossOut {
  float* loss;        // [samples]
  int64_t* count;     // [samples]
  float* token_loss;  // [rows]
  float* lse;         // [rows]
  float* lse_low;     // [rows], what rounding took from lse: large logits need it for an exact gradient
};

// The xor-fold of the vocabulary axis: column v goes to (v mod k1) xor keys[v / k1], negated where its bit is set.
struct DataflexSketch {
  const int32_t* keys;    // [ceil(vocab / k1)], each below k1
  const uint32_t* signs;  // [4 * ceil(vocab / 128)], bit v mod 32 of word v / 32
  const float* uniform;   // [k1], the fold of the class weights (of ones without), where labels are smoothed; or null
  float* out;             // [rows, k1]
  int64_t k1;             // a power of two
};

struct DataflexLossGrad {
  const float* lse;      // [rows], of the forward
  const float* lse_low;  // [rows], likewise
  const int64_t* count;  // [samples], of the forward
  const float* loss;     // [samples], gradients of the outputs, or null
  const float* token;    // [rows] or null
  const float* lse_grad; // [rows] or null
  void* logits;          // [rows, vocab], rows out_stride elements apart; may be the logits themselves
  int64_t out_stride;
};
