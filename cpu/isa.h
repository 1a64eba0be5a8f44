// The instruction sets that there are kernels for.
#pragma once
#include "kernels.h"

namespace compress {

struct InstructionSet {
  const char* name;
  const char* missing;     // the first feature that the processor lacks; null: it has all
  const Kernels* kernels;  // null: the processor lacks something, or the compiler did when this was built
};

const InstructionSet* instruction_sets();  // the best first; ends with a null name

}  // namespace compress
