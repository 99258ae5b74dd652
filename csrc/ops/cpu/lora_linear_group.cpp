#include "ops/lora_linear_group.h"

#include <deque>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/cpu/adapted_layer.h"
#include "ops/cpu/chunks.h"
#include "ops/cpu/pieces.h"
#include "ops/rows.h"

namespace gauge_ext {
namespace {

using at::Tensor;
using at::TensorList;
using Scalings = at::ArrayRef<double>;

// The members of a call; deque, because a layer holds memory and cannot be moved about.
template <typename scalar_t>
std::deque<AdaptedLayer<scalar_t>> make_layers(const Tensor& x,
                                               TensorList weights,
                                               const OptionalTensors* biases,
                                               TensorList lora_As,
                                               TensorList lora_Bs,
                                               Scalings scalings,
                                               double dropout_p,
                                               TensorList seeds) {
  const auto sizes =
      check_lora_linear_group(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seeds);
  std::deque<AdaptedLayer<scalar_t>> layers;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto bias = biases != nullptr ? biases->get(i) : std::nullopt;
    layers.emplace_back(sizes[i], weights[i], bias, lora_As[i], lora_Bs[i], scalings[i],
                        make_dropout(dropout_p, seed_of(seeds, i)));
  }
  return layers;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> forward_group(const Tensor& x_any,
                                                                   TensorList weights,
                                                                   const OptionalTensors& biases,
                                                                   TensorList lora_As,
                                                                   TensorList lora_Bs,
                                                                   Scalings scalings,
                                                                   double dropout_p,
                                                                   TensorList seeds,
                                                                   bool wants_hiddens) {
  return dispatch_dtype(
      x_any, [&](auto tag) -> std::tuple<std::vector<Tensor>, std::vector<Tensor>> {
        using scalar_t = decltype(tag);
        using acc_t = typename AccOf<scalar_t>::type;
        auto layers = make_layers<scalar_t>(x_any, weights, &biases, lora_As, lora_Bs, scalings,
                                            dropout_p, seeds);
        const Tensor x = x_any.contiguous();
        std::vector<Tensor> ys, hiddens;
        for (const auto& layer : layers) {
          const auto& n = layer.sizes();
          ys.push_back(at::empty(output_shape(x, n.out_features), x.options()));
          if (wants_hiddens) {
            hiddens.push_back(
                at::empty({n.rows, n.rank}, x.options().dtype(acc_dtype<scalar_t>())));
          }
        }
        const int64_t in = layers[0].sizes().in_features;
        Buffer<acc_t> x_copy;
        std::vector<Buffer<acc_t>> y_copies(layers.size());
        for_chunks<scalar_t>(layers[0].sizes().rows, [&](int64_t first, int64_t rows) {
          const acc_t* from = wide_rows<scalar_t>(x, first, rows, in, x_copy);
          for (size_t i = 0; i < layers.size(); ++i) {
            const auto& n = layers[i].sizes();
            acc_t* h =
                wants_hiddens ? mutable_data_of<acc_t>(hiddens[i]) + first * n.rank : nullptr;
            write_rows<scalar_t>(ys[i], first, rows, n.out_features, y_copies[i],
                                 [&](acc_t* to) { layers[i].forward(from, first, rows, h, to); });
          }
        });
        return {ys, hiddens};
      });
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> forward(const Tensor& x,
                                                             TensorList weights,
                                                             const OptionalTensors& biases,
                                                             TensorList lora_As,
                                                             TensorList lora_Bs,
                                                             Scalings scalings,
                                                             double dropout_p,
                                                             TensorList seeds) {
  return forward_group(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seeds, true);
}

std::vector<Tensor> lora_linear_group(const Tensor& x,
                                      TensorList weights,
                                      const OptionalTensors& biases,
                                      TensorList lora_As,
                                      TensorList lora_Bs,
                                      Scalings scalings,
                                      double dropout_p,
                                      TensorList seeds) {
  return std::get<0>(
      forward_group(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seeds, false));
}

// grad_x is one sum over the members, made in acc_t: no tensor for each, no pass to add them.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> backward(TensorList grads,
                                                                      const Tensor& x_any,
                                                                      TensorList weights,
                                                                      TensorList lora_As,
                                                                      TensorList lora_Bs,
                                                                      TensorList hiddens,
                                                                      Scalings scalings,
                                                                      double dropout_p,
                                                                      TensorList seeds,
                                                                      bool needs_x,
                                                                      bool needs_factors) {
  using Result = std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>>;
  return dispatch_dtype(x_any, [&](auto tag) -> Result {
    using scalar_t = decltype(tag);
    using acc_t = typename AccOf<scalar_t>::type;
    auto layers = make_layers<scalar_t>(x_any, weights, nullptr, lora_As, lora_Bs, scalings,
                                        dropout_p, seeds);
    std::vector<LoraLinearSizes> sizes;
    for (const auto& layer : layers) {
      sizes.push_back(layer.sizes());
    }
    check_lora_linear_group_grads(grads, hiddens, x_any, sizes);
    const Tensor x = x_any.contiguous();
    std::vector<Tensor> gs, hs;
    std::deque<typename AdaptedLayer<scalar_t>::Sums> sums;
    const int64_t all_rows = layers[0].sizes().rows, in = layers[0].sizes().in_features;
    for (size_t i = 0; i < layers.size(); ++i) {
      gs.push_back(grads[i].contiguous());
      hs.push_back(hiddens[i].to(acc_dtype<scalar_t>()).contiguous());
      sums.push_back(layers[i].sums(all_rows, needs_x, needs_factors, needs_factors));
    }
    const Tensor grad_x = needs_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
    Buffer<acc_t> x_copy, grad_x_copy;
    std::vector<Buffer<acc_t>> g_copies(layers.size());
    for_chunks<scalar_t>(all_rows, [&](int64_t first, int64_t rows) {
      const acc_t* from = wide_rows<scalar_t>(x, first, rows, in, x_copy);
      const auto run = [&](acc_t* to) {
        for (size_t i = 0; i < layers.size(); ++i) {
          const auto& n = layers[i].sizes();
          const acc_t* g = wide_rows<scalar_t>(gs[i], first, rows, n.out_features, g_copies[i]);
          const acc_t* h = data_of<acc_t>(hs[i]) + first * n.rank;
          layers[i].backward(g, from, first, rows, h, sums[i], to, /*add=*/i > 0);
        }
      };
      if (needs_x) {
        write_rows<scalar_t>(grad_x, first, rows, in, grad_x_copy, run);
      } else {
        run(nullptr);
      }
    });
    std::vector<Tensor> grad_As, grad_Bs;
    for (size_t i = 0; i < layers.size(); ++i) {
      const auto none = [&] { return at::empty({0}, lora_As[i].options()); };
      grad_As.push_back(needs_factors ? layers[i].grad_A(sums[i]) : none());
      grad_Bs.push_back(needs_factors ? layers[i].grad_B(sums[i]) : none());
    }
    return {grad_x, grad_As, grad_Bs};
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CPU, m) {
  m.impl("lora_linear_group", &lora_linear_group);
  m.impl("lora_linear_group_forward", &forward);
  m.impl("lora_linear_group_backward", &backward);
}

}  // namespace gauge_ext
