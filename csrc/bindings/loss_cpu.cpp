#include "../cpu/loss.h"
#include "loss.h"

namespace dataflex {
namespace {
// Segments of all rows and of no others, else the driver would read past them, or leave rows as they are.
void check_segments(const DataflexLoss& args) {
  STD_TORCH_CHECK(args.cu_seqlens[0] == 0 && args.cu_seqlens[args.samples] == args.rows,
                  "cu_seqlens: expected to rise from 0 to ", args.rows);
  for (int64_t s = 0; s < args.samples; s++)
    STD_TORCH_CHECK(args.cu_seqlens[s] >= 0 && args.cu_seqlens[s] <= args.cu_seqlens[s + 1] &&
                        args.cu_seqlens[s + 1] <= args.rows,
                    "cu_seqlens: expected to rise from 0 to ", args.rows);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& logits, DATAFLEX_LOSS_INPUTS,
                                                           DATAFLEX_LOSS_SCALARS, bool /*inplace*/) {
  const DataflexLoss args = DATAFLEX_LOSS_ARGUMENTS;
  check_segments(args);
  const LossTensors made(logits, args);
  loss_forward(args, nullptr, made.out());
  return {made.loss, made.count, made.token_loss, made.lse, made.lse_low};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sketch(const Tensor& logits, DATAFLEX_LOSS_INPUTS,
                                                          DATAFLEX_LOSS_SCALARS, const Tensor& keys,
                                                          const Tensor& signs, const MaybeTensor& uniform, int64_t k1,
                                                          bool /*inplace*/) {
  const DataflexLoss args = DATAFLEX_LOSS_ARGUMENTS;
  check_segments(args);
  const LossTensors made(logits, args);
  const Tensor folded = torch::stable::new_empty(logits, {args.rows, k1}, ScalarType::Float);
  const DataflexSketch tables = sketch_arguments(args, keys, signs, uniform, k1, folded);
  loss_forward(args, &tables, made.out());
  return {made.loss, made.count, made.token_loss, made.lse, made.lse_low, folded};
}

void write_gradient(const Tensor& logits, DATAFLEX_LOSS_INPUTS, DATAFLEX_LOSS_GRADS, DATAFLEX_LOSS_SCALARS,
                    const Tensor& out) {
  const DataflexLoss args = DATAFLEX_LOSS_ARGUMENTS;
  check_segments(args);
  loss_backward(args, grad_arguments(args, lse, lse_low, count, grad_loss, grad_token, grad_lse, out));
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
