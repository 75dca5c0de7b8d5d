#include "../kernels/loss.h"

#include "loss.h"

namespace dataflex {
namespace {
Tensor scratch_of(const Tensor& like, int64_t floats) {
  return torch::stable::new_empty(like, {floats}, ScalarType::Float);
}
float* pointer(const Tensor& scratch) { return scratch.numel() == 0 ? nullptr : output<float>(scratch, "scratch"); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, DATAFLEX_LOSS_INPUTS,
                                                           DATAFLEX_LOSS_SCALARS, bool /*inplace*/) {
  const OnDevice device(logits);
  const DataflexLoss args = DATAFLEX_LOSS_ARGUMENTS;
  const LossTensors made(logits, args);
  const DataflexLossOut out = made.out();
  const Tensor scratch = scratch_of(logits, dataflex_loss_scratch(&args));
  check_launch(dataflex_loss_forward(&args, &out, pointer(scratch), device.stream()), "loss_forward");
  return {made.loss, made.count, made.token_loss, made.lse, made.lse_low};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sketch(const Tensor& logits, DATAFLEX_LOSS_INPUTS,
                                                                  DATAFLEX_LOSS_SCALARS, const Tensor& keys,
                                                                  const Tensor& signs, const MaybeTensor& uniform,
                                                                  int64_t k1, bool /*inplace*/) {
  const OnDevice device(logits);
  const DataflexLoss args = DATAFLEX_LOSS_ARGUMENTS;
  const LossTensors made(logits, args);
  const DataflexLossOut out = made.out();
  const Tensor folded = torch::stable::new_empty(logits, {args.rows, k1}, ScalarType::Float);
  const DataflexSketch tables = sketch_arguments(args, keys, signs, uniform, k1, folded);
  check_launch(dataflex_loss_sketch(&args, &tables, &out, device.stream()), "loss_sketch");
  return {made.loss, made.count, made.token_loss, made.lse, made.lse_low, folded};
}

void write_gradient(const Tensor& logits, DATAFLEX_LOSS_INPUTS, DATAFLEX_LOSS_GRADS, DATAFLEX_LOSS_SCALARS,
                    const Tensor& to) {
  const OnDevice device(logits);
  const DataflexLoss args = DATAFLEX_LOSS_ARGUMENTS;
  const DataflexLossGrad grad = grad_arguments(args, lse, lse_low, count, grad_loss, grad_token, grad_lse, to);
  const Tensor scratch = scratch_of(logits, dataflex_loss_backward_scratch(&args));
  check_launch(dataflex_loss_backward(&args, &grad, pointer(scratch), device.stream()), "loss_backward");
}

Tensor backward(const Tensor& logits, DATAFLEX_LOSS_INPUTS, DATAFLEX_LOSS_GRADS, DATAFLEX_LOSS_SCALARS) {
  const Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  write_gradient(logits, labels, cu_seqlens, token_weight, class_weight, lse, lse_low, count, grad_loss, grad_token,
                 grad_lse, ignore_index, mean, label_smoothing, z_loss, softcap, vocab_offset, sharded, out);
  return out;
}

void backward_(const Tensor& logits, DATAFLEX_LOSS_INPUTS, DATAFLEX_LOSS_GRADS, DATAFLEX_LOSS_SCALARS) {
  write_gradient(logits, labels, cu_seqlens, token_weight, class_weight, lse, lse_low, count, grad_loss, grad_token,
                 grad_lse, ignore_index, mean, label_smoothing, z_loss, softcap, vocab_offset, sharded, logits);
}
}  // namespace
}  // namespace dataflex

DATAFLEX_OPS(m) {
  m.impl("loss_forward", TORCH_BOX(&dataflex::forward));
  m.impl("loss_sketch", TORCH_BOX(&dataflex::sketch));
  m.impl("loss_backward", TORCH_BOX(&dataflex::backward));
  m.impl("loss_backward_", TORCH_BOX(&dataflex::backward_));
}
