// compress.kernels._cpu: what compress/kernels/library.py loads.
#include "bind.h"
#include "isa.h"

namespace nb = nanobind;

namespace compress {
namespace {

// [(name, the feature that the processor lacks or None, whether its kernels are here)], the best first.
nb::list list_instruction_sets() {
  nb::list found;
  for (const InstructionSet* set = instruction_sets(); set->name; ++set) {
    nb::object missing = nb::none();
    if (set->missing) missing = nb::str(set->missing);
    found.append(nb::make_tuple(nb::str(set->name), missing, set->kernels != nullptr));
  }
  return found;
}

// Runs a body that counts on `threads` threads of the pool; the number that took part. For tests of the pool.
int count_threads(int threads) {
  nb::gil_scoped_release release;
  struct Seen {
    int total = 0;
  } seen;
  run_parallel(
      threads,
      [](void* context, int thread, int total) {
        if (thread == 0) static_cast<Seen*>(context)->total = total;
      },
      &seen);
  return seen.total;
}

}  // namespace
}  // namespace compress

NB_MODULE(_cpu, module) {
  using namespace compress;
  module.doc() = "CPU kernels. Takes addresses and sizes; compress.kernels checks tensors before it calls.";
  module.def("instruction_sets", &list_instruction_sets, "(name, missing feature or None, whether here), best first.");
  module.def("select", &select_kernels, "Use the kernels of an instruction set, or 'auto'; False if not here.");
  module.def("selected", [] { return kernels().name; }, "The instruction set in use.");
  module.def(
      "use_openmp",
      [](uintptr_t parallel, uintptr_t number, uintptr_t total) {
        use_openmp(as_pointer<void>(parallel), as_pointer<void>(number), as_pointer<void>(total));
      },
      "Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads; zeros: threads of our own.");
  module.def("count_threads", &count_threads, "How many threads run_parallel gives when asked for so many.");
  bind_weight(module);
  bind_int8(module);
  bind_decode(module);
  bind_dense(module);
  bind_causal(module);
}
