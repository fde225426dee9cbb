// The kernels for one instruction set: compiled once for each, with -DKERNELS=<name> and its flags.
#include "backward.h"
#include "forward.h"
#include "gelu.h"
#include "norm.h"

namespace {

// Every published variant has 32 channels a head: known at compile time where it is used, any number elsewhere.
template <class In>
#if defined(__AVX2__)
constexpr int kUsualDim = sizeof(In) < 8 ? 32 : 0;
#else
constexpr int kUsualDim = 0;
#endif

// With `Usual` instead of M for that dim.
template <class In, class M, class Usual = M>
struct Of {
  static constexpr int kUsual = kUsualDim<In>;
  static size_t forward_bytes(const Problem& p, const Group& g) {
    return p.dim == kUsual ? Forward<In, Usual, kUsual>(p, g, nullptr).bytes : Forward<In, M, 0>(p, g, nullptr).bytes;
  }
  static size_t backward_bytes(const Problem& p, const Group& g) {
    return p.dim == kUsual ? Backward<In, Usual, kUsual>(p, g, nullptr).bytes : Backward<In, M, 0>(p, g, nullptr).bytes;
  }
  static void forward(const Problem& p, const Item& item, char* scratch) {
    if (p.dim == kUsual) {
      [[maybe_unused]] const typename Usual::State state{};
      Forward<In, Usual, kUsual>(p, *item.group, scratch).run(item);
    } else {
      Forward<In, M, 0>(p, *item.group, scratch).run(item);
    }
  }
  static void backward(const Problem& p, const Item& item, int64_t index, char* scratch) {
    if (p.dim == kUsual) {
      [[maybe_unused]] const typename Usual::State state{};
      Backward<In, Usual, kUsual>(p, *item.group, scratch).run(item, index);
    } else {
      Backward<In, M, 0>(p, *item.group, scratch).run(item, index);
    }
  }
  static constexpr swinv2::KernelsOfType table() {
    swinv2::KernelsOfType found{forward_bytes, backward_bytes, forward, backward};
    if constexpr (sizeof(In) < 8) {
      found.gelu = gelu<In>;
      found.gelu_backward = gelu_backward<In>;
      found.add_norm = add_norm<In>;
      found.add_norm_backward = add_norm_backward<In>;
    }
    return found;
  }
};

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
#define NAME_OF(x) swinv2_kernels_##x
#define NAME(x) NAME_OF(x)

}  // namespace

extern "C" __attribute__((visibility("hidden"))) const swinv2::Kernels NAME(KERNELS) = {
    TEXT(KERNELS),
#if defined(__AMX_BF16__)
    {{}, {}, Of<BFloat16, Halves, Tiles>::table()},
#elif defined(__AVX512BF16__)
    {{}, {}, Of<BFloat16, Halves>::table()},  // the others are those of avx512
#else
    {Of<float, Wide<float>>::table(), Of<double, Wide<double>>::table(), Of<BFloat16, Wide<float>>::table()},
#endif
};
