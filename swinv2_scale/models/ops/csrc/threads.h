// The kernels that were chosen, and threads to run them, for the files that torch's operators are in.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "problem.h"

// What `#pragma omp parallel` calls. Said by name, and not linked, so that it is found in the OpenMP library that torch
// brought along, whichever compiler this is: a second one in the process would have threads of its own.
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);

namespace swinv2 {

extern Kernels active;
extern std::atomic<int64_t> num_workers;  // threads that took part in the last call

// run(i, worker) for every i < count, in any order; workers are numbered.
template <class Run>
void for_each(int64_t count, int64_t threads, const Run& run) {
  struct Shared {
    const Run& run;
    int64_t count;
    std::atomic<int64_t> next{0}, workers{0};
  } shared{run, count};
  void (*work)(void*) = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    int64_t worker = -1;
    for (int64_t i; (i = s.next++) < s.count;) {
      if (worker < 0) worker = s.workers++;
      s.run(i, worker);
    }
  };
  if (threads > 1) {
    GOMP_parallel(work, &shared, static_cast<unsigned>(threads), 0);
  } else {
    work(&shared);
  }
  num_workers = shared.workers.load();
}

inline int64_t threads_for(int64_t count) {
  return at::in_parallel_region() ? 1 : std::clamp<int64_t>(count, 1, at::get_num_threads());
}

}  // namespace swinv2
