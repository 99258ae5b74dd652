// lora_linear_group on CUDA tensors. Members that share a mask, or have none, share the passes over
// x and its gradient too: their A's are set one above the other, (Σr, in), which costs a copy of
// small factors, and x is read once for all of them.

#include "ops/lora_linear_group.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "ops/cuda/low_rank_call.h"
#include "ops/rows.h"

namespace gauge_ext::cuda {
namespace {

using at::Tensor;
using at::TensorList;
using Scalings = at::ArrayRef<double>;

// Neighbours in the lists whose adapters read x through one mask
struct Bundle {
  size_t first, count;
  DropoutSource dropout;
  Tensor A;  // (Σr, in)
  std::vector<int64_t> ranks;
};

struct Group {
  std::vector<LoraLinearSizes> sizes;
  std::vector<Bundle> bundles;

  Group(const Tensor& x,
        TensorList weights,
        const OptionalTensors* biases,
        TensorList lora_As,
        TensorList lora_Bs,
        Scalings scalings,
        double dropout_p,
        TensorList seeds)
      : sizes(check_lora_linear_group(x,
                                      weights,
                                      biases,
                                      lora_As,
                                      lora_Bs,
                                      scalings,
                                      dropout_p,
                                      seeds)) {
    const size_t n = sizes.size();
    const bool shared = dropout_p == 0.0 || seeds.size() == 1;
    const size_t step = shared ? n : 1;
    for (size_t first = 0; first < n; first += step) {
      const TensorList As = lora_As.slice(first, step);
      Bundle bundle = {first,
                       step,
                       make_dropout(x, dropout_p, seed_of(seeds, first)),
                       step == 1 ? As[0] : at::cat(As),
                       {}};
      for (const Tensor& A : As) {
        bundle.ranks.push_back(A.size(0));
      }
      bundles.push_back(std::move(bundle));
    }
  }
};

std::tuple<std::vector<Tensor>, std::vector<Tensor>> forward(const Tensor& x,
                                                             TensorList weights,
                                                             const OptionalTensors& biases,
                                                             TensorList lora_As,
                                                             TensorList lora_Bs,
                                                             Scalings scalings,
                                                             double dropout_p,
                                                             TensorList seeds) {
  const auto guard = guard_of(x);
  const Group group(x, weights, &biases, lora_As, lora_Bs, scalings, dropout_p, seeds);
  const Tensor rows = rows_of(x, group.sizes[0].rows, group.sizes[0].in_features);
  std::vector<Tensor> ys, hiddens;
  dispatch(x, "x", [&](auto tag) {
    const LowRankCall<typename decltype(tag)::type> call;
    for (const Bundle& bundle : group.bundles) {
      const Tensor all = call.project(rows, bundle.A, bundle.dropout, 1.0);
      const auto parts = all.split_with_sizes(bundle.ranks, 1);
      for (size_t k = 0; k < bundle.count; ++k) {
        const size_t i = bundle.first + k;
        const Tensor hidden = parts.size() == 1 ? all : parts[k].contiguous();
        const Tensor y = call.expand(x.options(), biases.get(i), hidden, lora_Bs[i].t(),
                                     DropoutSource(), scalings[i]);
        y.addmm_(rows, weights[i].t());
        ys.push_back(y.view(output_shape(x, group.sizes[i].out_features)));
        hiddens.push_back(hidden);
      }
    }
  });
  return {ys, hiddens};
}

std::vector<Tensor> lora_linear_group(const Tensor& x,
                                      TensorList weights,
                                      const OptionalTensors& biases,
                                      TensorList lora_As,
                                      TensorList lora_Bs,
                                      Scalings scalings,
                                      double dropout_p,
                                      TensorList seeds) {
  return std::get<0>(forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seeds));
}

// grad_x is one tensor, to which torch adds each member's product.
std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> backward(TensorList grads,
                                                                      const Tensor& x,
                                                                      TensorList weights,
                                                                      TensorList lora_As,
                                                                      TensorList lora_Bs,
                                                                      TensorList hiddens,
                                                                      Scalings scalings,
                                                                      double dropout_p,
                                                                      TensorList seeds,
                                                                      bool needs_x,
                                                                      bool needs_factors) {
  const auto guard = guard_of(x);
  const Group group(x, weights, nullptr, lora_As, lora_Bs, scalings, dropout_p, seeds);
  const Tensor rows = rows_of(x, group.sizes[0].rows, group.sizes[0].in_features);
  check_lora_linear_group_grads(grads, hiddens, x, group.sizes);
  std::vector<Tensor> grad_rows, grad_As, grad_Bs;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto& n = group.sizes[i];
    grad_rows.push_back(rows_of(grads[i], n.rows, n.out_features));
  }
  Tensor grad_x = at::empty({0}, x.options());
  dispatch(x, "x", [&](auto tag) {
    const LowRankCall<typename decltype(tag)::type> call;
    for (const Bundle& bundle : group.bundles) {
      std::vector<Tensor> grad_hiddens;
      for (size_t i = bundle.first; i < bundle.first + bundle.count; ++i) {
        if (needs_factors) {
          auto [grad_hidden, grad_B] =
              call.backward_output(grad_rows[i], hiddens[i], lora_Bs[i], scalings[i]);
          grad_hiddens.push_back(grad_hidden);
          grad_Bs.push_back(grad_B);
        } else {
          grad_hiddens.push_back(
              call.project(grad_rows[i], lora_Bs[i].t(), DropoutSource(), scalings[i]));
        }
      }
      const Tensor all = grad_hiddens.size() == 1 ? grad_hiddens[0] : at::cat(grad_hiddens, 1);
      if (needs_factors) {
        const Tensor grad_A = call.backward_A(rows, all, bundle.A.options(), bundle.dropout);
        const auto parts = grad_A.split_with_sizes(bundle.ranks);
        for (size_t k = 0; k < bundle.count; ++k) {
          // A tensor of its own for each: optimizers may keep or change it.
          grad_As.push_back(bundle.count == 1 ? grad_A
                                              : parts[k].to(lora_As[bundle.first + k].options(),
                                                            /*non_blocking=*/false,
                                                            /*copy=*/true));
        }
      }
      if (needs_x) {
        const Tensor update =
            call.expand(x.options(), std::nullopt, all, bundle.A, bundle.dropout, 1.0);
        grad_x = bundle.first == 0 ? update : grad_x.add_(update);
      }
    }
  });
  if (needs_x) {
    for (size_t i = 0; i < weights.size(); ++i) {
      grad_x.addmm_(grad_rows[i], weights[i]);
    }
    grad_x = grad_x.view(x.sizes());
  }
  for (size_t i = 0; !needs_factors && i < weights.size(); ++i) {
    grad_As.push_back(at::empty({0}, lora_As[i].options()));
    grad_Bs.push_back(at::empty({0}, lora_Bs[i].options()));
  }
  return {grad_x, grad_As, grad_Bs};
}

}  // namespace

TORCH_LIBRARY_IMPL(gauge_ext, CUDA, m) {
  m.impl("lora_linear_group", &lora_linear_group);
  m.impl("lora_linear_group_forward", &forward);
  m.impl("lora_linear_group_backward", &backward);
}

}  // namespace gauge_ext::cuda
