// Which instruction sets this processor and this build have, and the table of kernels in use.
#include <atomic>
#include <cstring>

#include "isa.h"

#if defined(__x86_64__) || defined(_M_X64)
#define COMPRESS_X86 1
#ifdef _MSC_VER
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace compress {
namespace {

#ifdef COMPRESS_X86
struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers identify(uint32_t leaf, uint32_t part) {
  Registers r;
#ifdef _MSC_VER
  int all[4];
  __cpuid(all, 0);
  if (static_cast<uint32_t>(all[0]) < leaf) return r;
  __cpuidex(all, static_cast<int>(leaf), static_cast<int>(part));
  std::memcpy(&r, all, sizeof r);
#else
  __get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

// The registers that the operating system saves when it switches threads (XCR0).
uint64_t saved_registers() {
#ifdef _MSC_VER
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
#endif
}

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

// The first thing that is missing for the kernels of the set; null if nothing is.
const char* find_missing_x86(bool wide) {
  const Registers one = identify(1, 0);
  if (!bit(one.c, 27)) return "xsave";
  const uint64_t saved = saved_registers();
  const Registers seven = identify(7, 0);
  if ((saved & 0x6) != 0x6 || !bit(seven.b, 5)) return "avx2";
  if (!bit(one.c, 12)) return "fma";
  if (!bit(one.c, 29)) return "f16c";
  if (!wide) return nullptr;
  if ((saved & 0xe6) != 0xe6 || !bit(seven.b, 16)) return "avx512f";
  if (!bit(seven.b, 17)) return "avx512dq";
  if (!bit(seven.b, 30)) return "avx512bw";
  if (!bit(seven.b, 31)) return "avx512vl";
  if (!bit(seven.c, 11)) return "avx512_vnni";
  if (!bit(identify(7, 1).a, 5)) return "avx512_bf16";
  return nullptr;
}
#endif

const char* find_missing(bool wide) {
#ifdef COMPRESS_X86
  static const char* const found[2] = {find_missing_x86(false), find_missing_x86(true)};
  return found[wide];
#else
  return wide ? "avx512f" : "avx2";
#endif
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

// The best first. A table is asked for only where the processor can run the file that it is in.
const InstructionSet* instruction_sets() {
  static const InstructionSet sets[] = {
      {"avx512", find_missing(true), find_missing(true) ? nullptr : avx512_kernels()},
      {"avx2", find_missing(false), find_missing(false) ? nullptr : avx2_kernels()},
      {"portable", nullptr, portable_kernels()},
      {nullptr, nullptr, nullptr},
  };
  return sets;
}

bool select_kernels(const char* name) {
  const bool any = std::strcmp(name, "auto") == 0;
  for (const InstructionSet* set = instruction_sets(); set->name; ++set) {
    if (set->kernels && (any || std::strcmp(name, set->name) == 0)) {
      chosen.store(set->kernels, std::memory_order_release);
      return true;
    }
  }
  return false;
}

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (!table) {
    select_kernels("auto");
    table = chosen.load(std::memory_order_acquire);
  }
  return *table;
}

}  // namespace compress
