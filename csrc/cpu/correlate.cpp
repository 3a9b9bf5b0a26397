#include "correlate.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include <ATen/Parallel.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>

#include "../forward.h"
#include "../library.h"
#include "depthwise.h"
#include "direct.h"
#include "few_channels.h"
#include "gram.h"
#include "views.h"
#include "winograd.h"
#include "write.h"

namespace localsgd::cpu {
namespace {

PatchSource source_of(const at::Tensor& tensor, const Geometry& geometry) {
    return {tensor.const_data_ptr(), kind_of(tensor), geometry, strides_of(tensor)};
}

at::TensorOptions accumulator(const Layer& layer) { return at::TensorOptions().dtype(layer.accumulate); }

// D = Z^T X by BLAS, over spans of positions that both operands show as matrices. Long chains of additions cost precision: many
// positions have sums in parts, as far as these are small.
at::Tensor product_of_views(const Layer& layer, const Views& x, const Views& z, int64_t span) {
    constexpr int64_t kLeastOfPart = 8192, kMostAtOnce = 1 << 16;
    const Geometry& g = layer.geometry;
    const int64_t positions = g.positions(), most = kMostPartElements / (g.out_channels * g.in_per_group());
    const int64_t parts = std::clamp<int64_t>(std::min(positions / kLeastOfPart, most), 1, kMostParts);
    const int64_t each = ceil_div(positions, parts), at_once = std::min(each, kMostAtOnce);
    const at::Tensor sums = at::empty({parts, g.groups, g.out_per_group(), g.in_per_group()}, accumulator(layer));
    int64_t used = 0; // of the parts
    for (int64_t begin = 0; begin < positions; begin += span)
        for (int64_t first = begin, end = std::min(begin + span, positions); first < end; first += at_once) {
            const int64_t count = std::min(at_once, end - first);
            const at::Tensor a = z.at(first, count).transpose(1, 2), b = x.at(first, count);
            at::Tensor d = sums.select(0, first / each);
            const bool add = first / each < used;
            used = first / each + 1;
            if (g.groups > 1) {
                add ? d.baddbmm_(a, b) : at::bmm_out(d, a, b);
            } else {
                d = d.select(0, 0);
                add ? d.addmm_(a.select(0, 0), b.select(0, 0)) : at::mm_out(d, a.select(0, 0), b.select(0, 0));
            }
        }
    return (used == 1 ? sums.select(0, 0) : sums.narrow(0, 0, used).sum(0)).view(layer.weight.sizes());
}

template <typename Acc>
void direct_into(const DirectArgs& args, const at::Tensor& d) {
    const Geometry& g = args.x.geometry;
    const Unit unit = unit_for(sizeof(Acc) == sizeof(float) && args.x.kind == Kind::bf16 && args.z.kind == Kind::bf16);
    const Tasks tasks = direct_tasks(g, at::get_num_threads(), unit);
    const at::Tensor sums = at::empty({tasks.parts, direct_elements<Acc>(g)}, d.options());
    Acc* const partials = sums.mutable_data_ptr<Acc>();
    at::parallel_for(0, tasks.count(g), 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) direct_part(args, tasks, task, partials, unit);
    });
    at::parallel_for(0, direct_blocks(g), std::max<int64_t>(1, 1024 / g.patch()), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block)
            finish_direct(g, tasks.parts, block, partials, d.mutable_data_ptr<Acc>(), !d.is_contiguous());
    });
}

template <typename Acc>
void few_channels_into(const DirectArgs& args, const at::Tensor& d) {
    const Geometry& g = args.x.geometry;
    const int64_t parts = few_channels_parts(g);
    const at::Tensor sums = at::empty({parts, g.out_channels * g.patch()}, d.options().dtype(at::kDouble));
    double* const partials = sums.mutable_data_ptr<double>();
    const bool wide = has_wide_registers();
    at::parallel_for(0, parts, 1, [&](int64_t part, int64_t end) {
        for (; part < end; ++part) few_channels_part<Acc>(args, parts, part, wide, partials);
    });
    at::parallel_for(0, g.out_channels, std::max<int64_t>(1, (1 << 15) / (parts * g.patch())), [&](int64_t k, int64_t end) {
        for (; k < end; ++k) finish_few_channels(g, parts, k, partials, d.mutable_data_ptr<Acc>(), !d.is_contiguous());
    });
}

// Of D: contiguous, or as the weight lies.
at::Tensor result(const Layer& layer, bool as_weight) {
    const bool channels_last = layer.weight.is_contiguous(at::MemoryFormat::ChannelsLast) ||
                               layer.weight.is_contiguous(at::MemoryFormat::ChannelsLast3d);
    return as_weight && channels_last ? at::empty_like(layer.weight, accumulator(layer))
                                      : at::empty(layer.weight.sizes(), accumulator(layer));
}

at::Tensor direct(const Layer& layer, bool as_weight) {
    constexpr int64_t kLeastSpan = 256; // shorter products are all overhead
    constexpr int64_t kNarrow = 8;      // rows of D below which BLAS sums in one long chain
    const Geometry& g = layer.geometry;
    const Views x(layer.x, g, layer.accumulate), z(*layer.z, output_geometry(g), layer.accumulate);
    const int64_t span = std::min(x.span(), z.span());
    if (g.out_per_group() >= kNarrow && (span == g.positions() || span >= kLeastSpan))
        return product_of_views(layer, x, z, span);
    const DirectArgs args{source_of(layer.x, g), source_of(*layer.z, output_geometry(g))};
    const at::Tensor d = result(layer, as_weight);
    const bool bf16 = args.x.kind == Kind::bf16 && args.z.kind == Kind::bf16;
    const auto into = [&]<typename Acc>() {
        few_channels_fit<Acc>(args) && !only_bf16(unit_for(bf16)) ? few_channels_into<Acc>(args, d) : direct_into<Acc>(args, d);
    };
    layer.accumulate == at::kDouble ? into.template operator()<double>() : into.template operator()<float>();
    return d;
}

template <typename Acc>
void winograd_into(const WinogradArgs& args, const at::Tensor& d) {
    const Geometry& g = args.x.geometry;
    const int64_t threads = at::get_num_threads();
    const WinogradPlan plan = winograd_plan(g, threads);
    const int64_t each = winograd_block_elements<Acc>(g, plan), transforms = winograd_transforms(g);
    const at::Tensor blocks = at::empty({plan.apart ? threads : 1, plan.blocks * each}, d.options());
    const at::Tensor sums = at::empty({plan.parts, winograd_sum_elements<Acc>(g, plan)}, d.options());
    Acc* const frequencies = sums.mutable_data_ptr<Acc>();
    const auto run = [&](int64_t part, Acc* transformed) { // nested loops run on one thread where parts are shared out
        Acc* const of_part = frequencies + part * sums.size(1);
        for (int64_t first = plan.begin(part), end = plan.begin(part + 1), begin = first; begin < end;) {
            const int64_t count = std::min(plan.blocks * kTilesAtOnce, end - begin);
            at::parallel_for(0, ceil_div(count, kTilesAtOnce) * transforms, 1, [&](int64_t task, int64_t last) {
                for (; task < last; ++task) {
                    const int64_t block = task / transforms;
                    winograd_transform(args, plan, task % transforms, begin + block * kTilesAtOnce, transformed + block * each);
                }
            });
            at::parallel_for(0, winograd_products<Acc>(g, plan), 1, [&](int64_t task, int64_t last) {
                for (; task < last; ++task) winograd_multiply(args, plan, task, count, transformed, begin > first, of_part);
            });
            begin += count;
        }
    };
    at::parallel_for(0, plan.parts, plan.apart ? 1 : plan.parts, [&](int64_t part, int64_t last) {
        Acc* const transformed = blocks.mutable_data_ptr<Acc>() + (plan.apart ? at::get_thread_num() : 0) * blocks.size(1);
        for (; part < last; ++part) run(part, transformed);
    });
    at::parallel_for(0, winograd_finishes(g), 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
            winograd_finish(g, plan, task, frequencies, d.mutable_data_ptr<Acc>(), !d.is_contiguous());
    });
}

at::Tensor winograd(const Layer& layer, bool as_weight) {
    const Geometry& g = layer.geometry;
    const WinogradArgs args{source_of(layer.x, g), source_of(*layer.z, output_geometry(g))};
    const at::Tensor d = result(layer, as_weight);
    layer.accumulate == at::kDouble ? winograd_into<double>(args, d) : winograd_into<float>(args, d);
    return d;
}

// The forward rounded W and b to its compute dtype, which is z's wherever that is lower (autocast).
at::Tensor as_forward_saw(const at::Tensor& parameter, const Layer& layer) {
    const bool rounded = layer.z && layer.z->element_size() < parameter.element_size();
    return rounded ? parameter.to(layer.z->scalar_type()) : parameter;
}

template <typename Acc>
void gram_into(const PatchSource& x, const Tasks& tasks, Unit unit, Acc* partials, Acc* sums) {
    const Geometry& g = x.geometry;
    at::parallel_for(0, tasks.count(g), 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) gram_part(x, tasks, task, partials, sums, unit);
    });
    at::parallel_for(0, gram_rows(g), 8, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) finish_gram(g, tasks.parts, task, partials);
    });
}

// X X^T of the rows of a matrix, in double; of meaning up to the diagonal.
at::Tensor gram_of_rows(const at::Tensor& rows) {
    Geometry g;
    g.in_channels = rows.size(0);
    g.input[2] = g.output[2] = rows.size(1);
    const PatchSource source{rows.const_data_ptr(), kind_of(rows), g, {0, rows.stride(0), {0, 0, rows.stride(1)}}};
    const Unit unit = unit_for(false);
    const Tasks tasks = gram_tasks(g, at::get_num_threads(), unit);
    const at::Tensor grams = at::empty({tasks.parts, rows.size(0), rows.size(0)}, rows.options().dtype(at::kDouble));
    gram_into<double>(source, tasks, unit, grams.mutable_data_ptr<double>(), nullptr);
    return grams.select(0, 0);
}

// W += lr Z^T X / ||Z^T X|| as one product where there are so few rows that D would be more than they are: its norm follows
// from them, as ||Z^T X||^2 = sum(Z Z^T * X X^T). Nothing where the weight or the rows do not allow it.
std::optional<bool> update_by_rows(const Layer& layer, double lr, bool normalize) {
    const Geometry& g = layer.geometry;
    const int64_t rows = g.positions(), in = g.in_channels, out = g.out_channels;
    const at::Tensor& weight = layer.weight;
    const bool dense = weight.stride(0) == in && (in == 1 || weight.stride(1) == 1) && weight.scalar_type() == at::kFloat;
    if (!few_rows(g) || !dense || layer.accumulate != at::kFloat) return std::nullopt;
    const at::Tensor wide_x = layer.x.to(at::kFloat), wide_z = layer.z->to(at::kFloat);
    const Views xs(wide_x, g, at::kFloat), zs(wide_z, output_geometry(g), at::kFloat);
    if (xs.span() < rows || zs.span() < rows) return std::nullopt;
    const at::Tensor x = xs.at(0, rows).select(0, 0), z = zs.at(0, rows).select(0, 0);
    const at::Tensor x_gram = gram_of_rows(x), z_gram = gram_of_rows(z);
    double squares = 0, most = 0; // ||D||^2, and a bound of ||D|| and of every sum on the way to an element of D
    for (int64_t i = 0; i < rows; ++i) {
        const double *const a = x_gram.const_data_ptr<double>() + i * rows, *const b =
                                                                                z_gram.const_data_ptr<double>() + i * rows;
        for (int64_t j = 0; j < i; ++j) squares += 2 * a[j] * b[j];
        squares += a[i] * b[i];
        most += std::sqrt(a[i] * b[i]);
    }
    // Not where rows cancel each other, where floats might overflow, or where something is not finite: there D itself decides.
    if (!(squares > 1e-7 * most * most && squares > 1e-60 && most < 1e30)) return std::nullopt;
    weight.as_strided({out, in}, {in, 1}).addmm_(z.t(), x, 1, normalize ? lr / std::sqrt(squares) : lr);
    return true;
}

struct Grams {
    at::Tensor matrices; // [groups, C/groups, C/groups]
    at::Tensor sums;     // [groups, 1, C/groups] of X's columns, where there is a bias
};

// W G as a correlation whose positions are the rows of G and of W^T: unlike BLAS, the same bits with any number of threads. 256
// rows at a time bound the panels in which D is summed before it is written.
template <typename Acc>
void product_into(const at::Tensor& w, const at::Tensor& gram, const at::Tensor& d) { // [K, C], [C, C], [K, C]
    constexpr int64_t kRows = 256;
    const int64_t in = w.size(1);
    for (int64_t first = 0; first < w.size(0); first += kRows) {
        Geometry g;
        g.in_channels = in;
        g.out_channels = std::min(kRows, w.size(0) - first);
        g.input[2] = g.output[2] = in;
        direct_into<Acc>({{gram.const_data_ptr<Acc>(), kKindOf<Acc>, g, {0, 1, {0, 0, in}}},
                          {w.const_data_ptr<Acc>() + first * in, kKindOf<Acc>, output_geometry(g), {0, in, {0, 0, 1}}}},
                         d.narrow(0, first, g.out_channels));
    }
}

// W G for each group. `w` is given away: no copy of another dtype need live beside it.
at::Tensor weighted(const Geometry& g, at::Tensor w, const at::Tensor& grams) {
    if (kind_of(w) != Kind::bf16 || grams.scalar_type() != at::kFloat || !has_tiles()) {
        w = w.to(grams.scalar_type()).contiguous();
        const at::Tensor d = at::empty(w.sizes(), w.options());
        for (int64_t group = 0; group < w.size(0); ++group)
            grams.scalar_type() == at::kDouble
                ? product_into<double>(w.select(0, group), grams.select(0, group), d.select(0, group))
                : product_into<float>(w.select(0, group), grams.select(0, group), d.select(0, group));
        return d;
    }
    const at::Tensor weights = w.contiguous(), d = at::empty(w.sizes(), grams.options());
    const auto* const from = static_cast<const uint16_t*>(weights.const_data_ptr());
    const auto* const gram = grams.const_data_ptr<float>();
    auto* const to = d.mutable_data_ptr<float>();
    at::parallel_for(0, gram_product_tasks(g), 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) gram_product(g, from, gram, task, to);
    });
    return d;
}

Grams grams_of(const Layer& layer) {
    const Geometry& g = layer.geometry;
    const int64_t in = g.in_per_group();
    const PatchSource x = source_of(layer.x, g);
    const Unit unit = unit_for(x.kind == Kind::bf16 && layer.accumulate == at::kFloat);
    const Tasks tasks = gram_tasks(g, at::get_num_threads(), unit);
    const at::Tensor partials = at::empty({tasks.parts, g.groups, in, in}, accumulator(layer));
    const at::Tensor sums = layer.bias ? at::empty({tasks.parts, g.groups, 1, in}, accumulator(layer)) : at::Tensor();
    if (layer.accumulate == at::kDouble)
        gram_into(x, tasks, unit, partials.mutable_data_ptr<double>(), layer.bias ? sums.mutable_data_ptr<double>() : nullptr);
    else
        gram_into(x, tasks, unit, partials.mutable_data_ptr<float>(), layer.bias ? sums.mutable_data_ptr<float>() : nullptr);
    return {partials.select(0, 0), layer.bias ? sums.sum(0) : sums};
}

// D = W G + b (sum x)^T with G = X^T X, since z = X W^T + b. Outputs that read padding see x = 0 and add nothing.
at::Tensor gram(const Layer& layer) {
    const Geometry& g = layer.geometry;
    const Grams grams = grams_of(layer);
    at::Tensor w = as_forward_saw(layer.weight, layer).reshape({g.groups, g.out_per_group(), g.in_per_group()});
    at::Tensor d = weighted(g, std::move(w), grams.matrices);
    if (layer.bias) {
        const at::Tensor b = as_forward_saw(*layer.bias, layer).to(layer.accumulate).reshape({g.groups, g.out_per_group(), 1});
        d.baddbmm_(b, grams.sums);
    }
    return d.view(layer.weight.sizes());
}

template <typename Acc>
void pack_halves(const at::Tensor& matrices, const at::Tensor& packed) {
    const int64_t groups = matrices.size(0), in = matrices.size(1);
    for (int64_t group = 0; group < groups; ++group)
        pack_half(matrices.const_data_ptr<Acc>() + group * in * in, in, packed.mutable_data_ptr<Acc>() + group * half(in));
}

template <typename Acc>
at::Tensor product_with_halves(const at::Tensor& packed, const at::Tensor& w) { // w [groups, K/groups, C/groups]
    const int64_t in = w.size(2);
    const at::Tensor gram = at::empty({in, in}, w.options()), d = at::empty(w.sizes(), w.options());
    for (int64_t group = 0; group < w.size(0); ++group) {
        unpack_half(packed.const_data_ptr<Acc>() + group * half(in), in, gram.mutable_data_ptr<Acc>());
        product_into<Acc>(w.select(0, group), gram, d.select(0, group));
    }
    return d;
}

template <typename Acc>
void depthwise_into(const DepthwiseArgs& args, Acc* d) {
    const Geometry& g = args.geometry;
    if (!pixels_eligible(args)) {
        at::parallel_for(0, g.in_channels, 1, [&](int64_t begin, int64_t end) { depthwise_planes<Acc>(args, begin, end, d); });
        return;
    }
    const PixelTasks tasks = pixel_tasks(g);
    const at::Tensor partials = at::empty({tasks.parts, g.taps() * g.in_channels}, at::TensorOptions().dtype(at::kDouble));
    auto* const sums = partials.mutable_data_ptr<double>();
    at::parallel_for(0, tasks.count(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) depthwise_pixels<Acc>(args, task, sums);
    });
    const int64_t each = tasks.parts * g.taps(); // elements a channel
    at::parallel_for(0, g.in_channels, std::max<int64_t>(1, 8192 / each),
                     [&](int64_t begin, int64_t end) { reduce_pixels(g, sums, begin, end, d); });
}

at::Tensor depthwise(const Layer& layer) {
    const at::Tensor& z = *layer.z;
    const at::Tensor d = at::empty(layer.weight.sizes(), accumulator(layer));
    const DepthwiseArgs args{layer.geometry,     layer.x.const_data_ptr(),
                             kind_of(layer.x),   strides_of(layer.x),
                             z.const_data_ptr(), kind_of(z),
                             strides_of(z),      has_dots()};
    if (layer.accumulate == at::kDouble)
        depthwise_into(args, d.mutable_data_ptr<double>());
    else
        depthwise_into(args, d.mutable_data_ptr<float>());
    return d;
}

} // namespace

at::Tensor correlate(const Layer& given, Algorithm algorithm, bool as_weight) {
    Layer layer = given;
    if (algorithm != Algorithm::kGram && !layer.z) layer.z = forward(layer);
    switch (algorithm) {
    case Algorithm::kGram:
        return gram(layer);
    case Algorithm::kDepthwise:
        return depthwise(layer);
    case Algorithm::kWinograd:
        return winograd(layer, as_weight);
    case Algorithm::kDirect:
        return direct(layer, as_weight);
    default:
        return as_weight ? library_gradient(layer).to(layer.accumulate) : library_correlation(layer);
    }
}

int64_t gram_sums_size(const Geometry& g, bool bias) { return g.groups * half(g.in_per_group()) + (bias ? g.in_channels : 0); }

at::Tensor gram_sums(const Layer& layer) {
    const Geometry& g = layer.geometry;
    const Grams grams = grams_of(layer);
    const at::Tensor packed = at::empty({gram_sums_size(g, layer.bias.has_value())}, accumulator(layer));
    layer.accumulate == at::kDouble ? pack_halves<double>(grams.matrices, packed) : pack_halves<float>(grams.matrices, packed);
    if (layer.bias) packed.narrow(0, packed.numel() - g.in_channels, g.in_channels).copy_(grams.sums.view({-1}));
    return packed;
}

at::Tensor correlation_of_gram_sums(const at::Tensor& sums, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                    int64_t groups) {
    const int64_t in = weight.size(1), channels = groups * in;
    const at::Tensor packed = sums.contiguous();
    const at::Tensor w = weight.to(sums.scalar_type()).reshape({groups, -1, in}).contiguous();
    const at::Tensor d =
        sums.scalar_type() == at::kDouble ? product_with_halves<double>(packed, w) : product_with_halves<float>(packed, w);
    if (bias) // products of single numbers: again no BLAS
        d.addcmul_(bias->to(sums.scalar_type()).reshape({groups, -1, 1}),
                   packed.narrow(0, packed.numel() - channels, channels).view({groups, 1, in}));
    return d.view(weight.sizes());
}

bool update(const Layer& given, Algorithm algorithm, double lr, bool normalize) {
    Layer layer = given;
    if (algorithm == Algorithm::kDirect) {
        if (!layer.z) layer.z = forward(layer);
        if (const auto updated = update_by_rows(layer, lr, normalize)) return *updated;
    }
    return apply_updates({layer.weight}, {correlate(layer, algorithm, true)}, lr, normalize)[0];
}

} // namespace localsgd::cpu
