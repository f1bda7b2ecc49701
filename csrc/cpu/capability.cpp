// Picks the instruction set of the CPU kernels when they are first used.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace molegrad::cpu {
namespace {

const KernelTable& pick() {
  const char* wish = std::getenv("MOLEGRAD_CPU_CAPABILITY");
  const bool any = wish == nullptr || *wish == '\0';
  if (!any && std::strcmp(wish, "baseline") != 0 && std::strcmp(wish, "avx2") != 0 &&
      std::strcmp(wish, "avx512") != 0)
    throw std::runtime_error(std::string("molegrad: MOLEGRAD_CPU_CAPABILITY=") + wish +
                             " is not one of baseline, avx2, avx512; unset it to use the widest.");
#ifdef MOLEGRAD_X86_VARIANTS
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool below_512 = !any && std::strcmp(wish, "avx512") != 0;
  const bool below_2 = !any && std::strcmp(wish, "baseline") == 0;
  if (has_avx512 && !below_512) return avx512::table();
  if (has_avx2 && !below_2) return avx2::table();
#endif
  return baseline::table();
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = pick();
  return table;
}

}  // namespace molegrad::cpu
