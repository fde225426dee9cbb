// Attention as torch sees it: checks of what comes in, the order of work, sums of partial results. Which kernels run.
#include <ATen/ATen.h>
#include <torch/library.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <string>
#include <vector>

#include "threads.h"

extern "C" const swinv2::Kernels swinv2_kernels_portable, swinv2_kernels_avx2, swinv2_kernels_avx512,
    swinv2_kernels_avx512_bf16, swinv2_kernels_amx_bf16;

namespace swinv2 {

Kernels active = swinv2_kernels_portable;
std::atomic<int64_t> num_workers{0};

namespace {

using at::IntArrayRef;
using at::Tensor;

#if defined(__x86_64__)
// AMX for bfloat16: the CPU has it, and Linux lets this process use its registers, for which it has to be asked.
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h; not in older headers
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found{&swinv2_kernels_portable};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&swinv2_kernels_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")) {
    found.push_back(&swinv2_kernels_avx512);
    if (__builtin_cpu_supports("avx512bf16")) {
      found.push_back(&swinv2_kernels_avx512_bf16);
      if (has_tiles()) found.push_back(&swinv2_kernels_amx_bf16);
    }
  }
#endif
  return found;
}

std::vector<std::string> usable_kernels() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable()) names.emplace_back(kernels->name);
  return names;
}

void select_kernels(const std::string& name) {
  for (const Kernels* kernels : usable()) {
    if (kernels->name == name) {
      active = *kernels;
      for (int type = 0; type < kNumTypes; type++)
        if (!active.of[type].forward) active.of[type] = swinv2_kernels_avx512.of[type];
      return;
    }
  }
  TORCH_CHECK(false, "this CPU can't run kernels '", name, "'");
}

// The tiles of one shape: the longest axis becomes the rows.
struct Shape {
  std::vector<int> key_place, query_place, column;
  Group group{};

  Shape(IntArrayRef sides, IntArrayRef table_sides) {
    const int axes = static_cast<int>(sides.size());
    int rows = 0, n = 1;
    for (int a = 0; a < axes; a++) {
      n *= static_cast<int>(sides[a]);
      if (sides[a] > sides[rows]) rows = a;
    }
    const int h = static_cast<int>(sides[rows]), r = n / h;
    std::vector<int> place_stride(axes), table_stride(axes), place_of_column(r, 0);
    for (int a = axes - 1, p = 1, t = 1; a >= 0; a--) {
      place_stride[a] = p;
      table_stride[a] = t;
      p *= static_cast<int>(sides[a]);
      t *= static_cast<int>(table_sides[a]);
      group.centre += static_cast<int>(table_sides[a] / 2) * table_stride[a];
    }
    column.assign(r, 0);
    for (int c = 0; c < r; c++) {
      for (int a = axes - 1, rest = c; a >= 0; a--) {
        if (a == rows) continue;
        const int x = rest % static_cast<int>(sides[a]);
        rest /= static_cast<int>(sides[a]);
        place_of_column[c] += x * place_stride[a];
        column[c] += x * table_stride[a];
      }
    }
    for (int row = 0; row < h; row++)
      for (int c = 0; c < r; c++) key_place.push_back(row * place_stride[rows] + place_of_column[c]);
    for (int c = 0; c < r; c++)
      for (int row = 0; row < h; row++) query_place.push_back(row * place_stride[rows] + place_of_column[c]);
    group.n = n;
    group.h = h;
    group.r = r;
    group.row_stride = table_stride[rows];
    group.key_place = key_place.data();
    group.query_place = query_place.data();
    group.column = column.data();
  }
  Shape(const Shape&) = delete;
  Shape(Shape&&) = default;  // vectors keep their storage when they move
};

// Everything of one call but the tensors that it makes.
struct Call {
  Problem problem{};
  std::vector<Shape> shapes;
  std::vector<Item> items;
  Type type;
  at::ScalarType wide;

  Call(const Tensor& qkv, const Tensor& scale, const Tensor& table, const Tensor& order, IntArrayRef num_tiles,
       IntArrayRef sides) {
    check_tensors(qkv, scale, table, order);
    problem.qkv = qkv.const_data_ptr();
    problem.logit_scale = scale.const_data_ptr();
    problem.bias_table = table.const_data_ptr();
    problem.length = qkv.size(1);
    problem.heads = qkv.size(3);
    problem.dim = static_cast<int>(qkv.size(4));
    problem.table_size = problem.heads ? table.numel() / problem.heads : 0;
    add_shapes(table, num_tiles, sides);
    check_order(order);
    const int64_t* tokens = order.const_data_ptr<int64_t>();
    for (size_t g = 0; g < shapes.size(); g++) {
      shapes[g].group.tokens = tokens;
      shapes[g].group.tiles = num_tiles[g];
      tokens += num_tiles[g] * shapes[g].group.n;
      if (num_tiles[g] && qkv.numel()) add_items(shapes[g].group, qkv.size(0));
    }
  }

 private:
  void check_tensors(const Tensor& qkv, const Tensor& scale, const Tensor& table, const Tensor& order) {
    TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, "qkv must be (B, L, 3, N, D), it is ", qkv.sizes());
    const auto dtype = qkv.scalar_type();
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16,
                "qkv must be float32, float64 or bfloat16, it is ", dtype);
    type = dtype == at::kFloat ? kFloat : dtype == at::kDouble ? kDouble : kBFloat16;
    wide = type == kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK(scale.scalar_type() == wide && table.scalar_type() == wide, "logit_scale and bias_table must be ", wide,
                ", they are ", scale.scalar_type(), " and ", table.scalar_type());
    const int64_t heads = qkv.size(3), axes = table.dim() - 1;
    TORCH_CHECK(scale.dim() == 1 && scale.size(0) == heads, "logit_scale must be (", heads, "), it is ", scale.sizes());
    TORCH_CHECK(axes >= 1 && axes <= 3 && table.size(0) == heads, "bias_table must be (", heads,
                ", 2*w-1, ..) for 1 to 3 axes, it is ", table.sizes());
    for (int64_t a = 1; a <= axes; a++)
      TORCH_CHECK(table.size(a) % 2 == 1, "sides of bias_table must be odd, they are ", table.sizes());
    TORCH_CHECK(order.dim() == 1 && order.scalar_type() == at::kLong && order.size(0) == qkv.size(1),
                "order must be int64 (", qkv.size(1), "), it is ", order.scalar_type(), " ", order.sizes());
    for (const Tensor& x : {qkv, scale, table, order})
      TORCH_CHECK(x.is_contiguous() && x.device().is_cpu(), "tensors must be contiguous, and on the CPU");
    TORCH_CHECK(table.numel() < INT32_MAX && qkv.size(1) < INT32_MAX && qkv.size(4) < INT32_MAX / 16, "too large");
  }

  void add_shapes(const Tensor& table, IntArrayRef num_tiles, IntArrayRef sides) {
    const size_t axes = table.dim() - 1;
    TORCH_CHECK(sides.size() == num_tiles.size() * axes, "sides must have ", axes, " numbers for each shape of tile");
    int64_t covered = 0;
    for (size_t g = 0; g < num_tiles.size(); g++) {
      const IntArrayRef shape = sides.slice(g * axes, axes);
      int64_t n = 1;
      for (size_t a = 0; a < axes; a++) {
        const int64_t window = table.size(a + 1) / 2 + 1;
        TORCH_CHECK(shape[a] >= 1 && shape[a] <= window, "tile ", shape, " doesn't fit bias_table ", table.sizes());
        n *= shape[a];
      }
      TORCH_CHECK(num_tiles[g] >= 0 && n <= problem.length, "tiles must have 1 to L tokens, ", shape, " has not");
      TORCH_CHECK(num_tiles[g] <= (problem.length - covered) / n, "tiles hold more than L tokens");
      covered += num_tiles[g] * n;
      shapes.emplace_back(shape, table.sizes().slice(1));
    }
    TORCH_CHECK(covered == problem.length, "tiles hold ", covered, " of ", problem.length, " tokens");
  }

  // What the kernels rely on: every token once, none outside.
  void check_order(const Tensor& order) {
    std::vector<bool> seen(problem.length);
    const int64_t* tokens = order.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < problem.length; i++) {
      TORCH_CHECK(tokens[i] >= 0 && tokens[i] < problem.length && !seen[tokens[i]],
                  "order must hold every number below ", problem.length, " once");
      seen[tokens[i]] = true;
    }
  }

  // By shapes alone, never by the number of threads: which tiles are summed together decides the bits.
  void add_items(const Group& group, int64_t batch) {
    const int64_t pairs = int64_t(group.n) * group.n, tiles = batch * group.tiles;
    const int64_t expanded = int64_t(group.r) * (2 * group.h - 1) * group.r;
    // An item is worth a task, and the expansion of its head's bias.
    const int64_t wanted = std::max<int64_t>(128 * 1024, 16 * expanded);
    const int64_t chunks = std::clamp<int64_t>(tiles * pairs / wanted, 1, std::min<int64_t>(tiles, 64));
    for (int64_t c = 0; c < chunks; c++)
      for (int head = 0; head < problem.heads; head++)
        items.push_back({&group, head, tiles * c / chunks, tiles * (c + 1) / chunks});
  }
};

// run(i, scratch) for every item; each writes to places of its own.
template <class Run>
void for_each_item(const Call& call, size_t scratch_bytes, const Run& run) {
  const int64_t count = static_cast<int64_t>(call.items.size()), threads = threads_for(count);
  scratch_bytes = (scratch_bytes + 4095) / 4096 * 4096;
  const Tensor scratch = at::empty({threads * static_cast<int64_t>(scratch_bytes) + 64}, at::kByte);
  char* begin = static_cast<char*>(scratch.data_ptr());
  begin += -reinterpret_cast<uintptr_t>(begin) % 64;
  for_each(count, threads, [&](int64_t i, int64_t worker) { run(i, begin + worker * scratch_bytes); });
}

std::tuple<Tensor, Tensor> forward(const Tensor& qkv, const Tensor& scale, const Tensor& table, const Tensor& order,
                                   IntArrayRef num_tiles, IntArrayRef sides) {
  Call call(qkv, scale, table, order, num_tiles, sides);
  Tensor out = at::empty({qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)}, qkv.options());
  Tensor logsumexp = at::empty({qkv.size(0), qkv.size(3), qkv.size(1)}, qkv.options().dtype(call.wide));
  call.problem.out = out.data_ptr();
  call.problem.logsumexp = logsumexp.data_ptr();
  const KernelsOfType kernels = active.of[call.type];
  size_t bytes = 0;
  for (const Shape& shape : call.shapes) bytes = std::max(bytes, kernels.forward_bytes(call.problem, shape.group));
  for_each_item(call, bytes, [&](int64_t i, char* scratch) {
    kernels.forward(call.problem, call.items[i], scratch);
  });
  return {out, logsumexp};
}

template <class T>
void add_partial_sums(const Call& call, const Tensor& tables, const std::vector<double>& scales, Tensor& table,
                      Tensor& scale) {
  const int64_t size = call.problem.table_size;
  const T* from = tables.const_data_ptr<T>();
  T* to = table.data_ptr<T>();
  std::vector<double> sums(call.problem.heads, 0.0);
  for (size_t i = 0; i < call.items.size(); i++) {  // in the order of items
    const int head = call.items[i].head;
    sums[head] += scales[i];
    for (int64_t e = 0; e < size; e++) to[head * size + e] += from[static_cast<int64_t>(i) * size + e];
  }
  for (int64_t head = 0; head < call.problem.heads; head++) scale.data_ptr<T>()[head] = static_cast<T>(sums[head]);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out,
                                            const Tensor& logsumexp, const Tensor& scale, const Tensor& table,
                                            const Tensor& order, IntArrayRef num_tiles, IntArrayRef sides) {
  Call call(qkv, scale, table, order, num_tiles, sides);
  const std::vector<int64_t> out_sizes{qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4)};
  for (const Tensor& x : {grad_out, out})
    TORCH_CHECK(x.sizes() == out_sizes && x.scalar_type() == qkv.scalar_type() && x.is_contiguous(),
                "out and its gradient must be contiguous ", qkv.scalar_type(), " ", out_sizes, ", one is ",
                x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(logsumexp.sizes() == IntArrayRef({qkv.size(0), qkv.size(3), qkv.size(1)}) &&
                  logsumexp.scalar_type() == call.wide && logsumexp.is_contiguous(),
              "logsumexp must be (B, N, L), as forward gave it");
  Tensor grad_qkv = at::empty_like(qkv), grad_scale = at::zeros_like(scale), grad_table = at::zeros_like(table);
  const int64_t count = static_cast<int64_t>(call.items.size());
  const Tensor tables = at::zeros({count, call.problem.table_size}, table.options());
  std::vector<double> scales(count, 0.0);
  call.problem.out = out.data_ptr();
  call.problem.logsumexp = logsumexp.data_ptr();
  call.problem.grad_out = grad_out.const_data_ptr();
  call.problem.grad_qkv = grad_qkv.data_ptr();
  call.problem.grad_table = tables.data_ptr();
  call.problem.grad_scale = scales.data();
  const KernelsOfType kernels = active.of[call.type];
  size_t bytes = 0;
  for (const Shape& shape : call.shapes) bytes = std::max(bytes, kernels.backward_bytes(call.problem, shape.group));
  for_each_item(call, bytes, [&](int64_t i, char* scratch) {
    kernels.backward(call.problem, call.items[i], i, scratch);
  });
  if (call.wide == at::kDouble) {
    add_partial_sums<double>(call, tables, scales, grad_table, grad_scale);
  } else {
    add_partial_sums<float>(call, tables, scales, grad_table, grad_scale);
  }
  return {grad_qkv, grad_scale, grad_table};
}

}  // namespace

TORCH_LIBRARY(swinv2_scale, m) {
  m.def(
      "window_attention(Tensor qkv, Tensor logit_scale, Tensor bias_table, Tensor order, int[] num_tiles, int[] sides)"
      " -> (Tensor, Tensor)");
  m.def(
      "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor logsumexp, Tensor logit_scale, "
      "Tensor bias_table, Tensor order, int[] num_tiles, int[] sides) -> (Tensor, Tensor, Tensor)");
  m.def("usable_kernels", &usable_kernels);
  m.def("select_kernels", &select_kernels);
  m.def("num_workers", []() -> int64_t { return num_workers; });
}

TORCH_LIBRARY_IMPL(swinv2_scale, CPU, m) {
  m.impl("window_attention", &forward);
  m.impl("window_attention_backward", &backward);
}

}  // namespace swinv2
