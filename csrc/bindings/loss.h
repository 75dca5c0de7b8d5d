// The loss ops' tensors as the structs of dataflex/loss.h, for both libraries.
#pragma once
#include "common.h"
#include "dataflex/loss.h"

namespace dataflex {
using MaybeTensor = std::optional<Tensor>;

inline void check_size(const MaybeTensor& tensor, int64_t size, const char* name) {
  STD_TORCH_CHECK(!tensor.has_value() || tensor->numel() == size, name, ": expected ", size, " elements");
}

inline DataflexLoss loss_arguments(const Tensor& logits, const Tensor& labels, const Tensor& cu_seqlens,
                                   const MaybeTensor& token_weight, const MaybeTensor& class_weight,
                                   int64_t ignore_index, bool mean, double label_smoothing, double z_loss,
                                   double softcap, int64_t vocab_offset, bool sharded) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && (logits.stride(1) == 1 || logits.size(1) == 1),
                  "logits: expected [N, V] with columns next to each other");
  STD_TORCH_CHECK(cu_seqlens.numel() >= 1, "cu_seqlens: expected [S + 1]");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check_size(labels, rows, "labels");
  check_size(token_weight, rows, "token_weight");
  check_size(class_weight, vocab, "class_weight");
  DataflexLoss args{};
  args.logits = logits.const_data_ptr();
  args.dtype = dtype_code(logits, "logits");
  args.labels = input<int64_t>(labels, "labels");
  args.cu_seqlens = input<int64_t>(cu_seqlens, "cu_seqlens");
  args.token_weight = input<float>(token_weight, "token_weight");
  args.class_weight = input<float>(class_weight, "class_weight");
  args.rows = rows;
  args.vocab = vocab;
  args.row_stride = logits.stride(0);
  args.samples = cu_seqlens.numel() - 1;
  args.ignore_index = ignore_index;
  args.vocab_offset = vocab_offset;
  args.label_smoothing = static_cast<float>(label_smoothing);
  args.z_loss = static_cast<float>(z_loss);
  args.softcap = static_cast<float>(softcap);
  args.mean = mean;
  args.sharded = sharded;
  return args;
}

struct LossTensors {
  Tensor loss, count, token_loss, lse, lse_low;
  LossTensors(const Tensor& logits, const DataflexLoss& args)
      : loss(torch::stable::new_empty(logits, {args.samples}, ScalarType::Float)),
        count(torch::stable::new_empty(logits, {args.samples}, ScalarType::Long)),
        token_loss(torch::stable::new_empty(logits, {args.rows}, ScalarType::Float)),
        lse(torch::stable::new_empty(logits, {args.rows}, ScalarType::Float)),
        lse_low(torch::stable::new_empty(logits, {args.rows}, ScalarType::Float)) {}
  DataflexLossOut out() const {
    return {output<float>(loss, "loss"), output<int64_t>(count, "count"), output<float>(token_loss, "token_loss"),
            output<float>(lse, "lse"), output<float>(lse_low, "lse_low")};
  }
};

inline DataflexSketch sketch_arguments(const DataflexLoss& args, const Tensor& keys, const Tensor& signs,
                                       const MaybeTensor& uniform, int64_t k1, const Tensor& out) {
  STD_TORCH_CHECK(k1 >= 64 && k1 <= 8192 && (k1 & (k1 - 1)) == 0, "k1: expected a power of two, 64 to 8192, got ", k1);
  STD_TORCH_CHECK(args.vocab <= INT32_MAX, "logits: expected fewer than 2^31 columns");
  check_size(keys, (args.vocab + k1 - 1) / k1, "keys");
  check_size(signs, (args.vocab + 127) / 128 * 4, "signs");
  check_size(uniform, k1, "uniform");
  STD_TORCH_CHECK(args.label_smoothing == 0.0f || (uniform.has_value() && args.softcap == 0.0f),
                  "uniform: expected with label smoothing, and no softcap then");
  return {input<int32_t>(keys, "keys"), reinterpret_cast<const uint32_t*>(input<int32_t>(signs, "signs")),
          input<float>(uniform, "uniform"), output<float>(out, "sketch"), k1};
}

inline DataflexLossGrad grad_arguments(const DataflexLoss& args, const Tensor& lse, const Tensor& lse_low,
                                       const Tensor& count, const MaybeTensor& loss, const MaybeTensor& token,
                                       const MaybeTensor& lse_grad, const Tensor& out) {
  check_size(lse, args.rows, "lse");
  check_size(lse_low, args.rows, "lse_low");
  check_size(count, args.samples, "count");
  check_size(loss, args.samples, "grad_loss");
  check_size(token, args.rows, "grad_token");
  check_size(lse_grad, args.rows, "grad_lse");
  return {input<float>(lse, "lse"),
          input<float>(lse_low, "lse_low"),
          input<int64_t>(count, "count"),
          input<float>(loss, "grad_loss"),
          input<float>(token, "grad_token"),
          input<float>(lse_grad, "grad_lse"),
          out.mutable_data_ptr(),
          out.stride(0)};
}

// What every op takes after the logits, and hands to loss_arguments.
#define DATAFLEX_LOSS_INPUTS                                                                                         \
  const Tensor &labels, const Tensor &cu_seqlens, const MaybeTensor &token_weight, const MaybeTensor &class_weight
#define DATAFLEX_LOSS_SCALARS                                                                                        \
  int64_t ignore_index, bool mean, double label_smoothing, double z_loss, double softcap, int64_t vocab_offset,      \
      bool sharded
#define DATAFLEX_LOSS_GRADS                                                                                          \
  const Tensor &lse, const Tensor &lse_low, const Tensor &count, const MaybeTensor &grad_loss,                       \
      const MaybeTensor &grad_token, const MaybeTensor &grad_lse
#define DATAFLEX_LOSS_ARGUMENTS                                                                                      \
  loss_arguments(logits, labels, cu_seqlens, token_weight, class_weight, ignore_index, mean, label_smoothing,        \
                 z_loss, softcap, vocab_offset, sharded)
}  // namespace dataflex
