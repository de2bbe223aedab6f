#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "plan.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace glm5 {
#if defined(GLM5_X86)
namespace avx512 {
extern const Table functions;
}
#if defined(GLM5_AVX512BF16)
namespace avx512bf16 {
Table functions();
}
#endif
namespace avxvnni {
extern const Table functions;
}
namespace avx2 {
extern const Table functions;
}
#endif
#if defined(GLM5_NEON)
namespace neon {
extern const Table functions;
}
#endif
namespace portable {
extern const Table functions;
}

namespace {

std::vector<const Table*> supported() {
  std::vector<const Table*> found;
#if defined(GLM5_X86)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    found.push_back(&avx512::functions);
#if defined(GLM5_AVX512BF16)
    if (__builtin_cpu_supports("avx512bf16")) {
      static const Table with_pairs = avx512bf16::functions();
      // Twice as fast as fp32 on AMD's cores; on Intel's, whose bf16 lives in AMX, half as fast.
      found.insert(__builtin_cpu_is("amd") ? found.begin() : found.end(), &with_pairs);
    }
#endif
  }
#if defined(GLM5_AVXVNNI)
  if (fma && __builtin_cpu_supports("avxvnni")) found.push_back(&avxvnni::functions);
#endif
  if (fma) found.push_back(&avx2::functions);
#endif
#if defined(GLM5_NEON)
#if defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(&neon::functions);
#else
  found.push_back(&neon::functions);  // every Apple chip since the M1
#endif
#endif
  found.push_back(&portable::functions);
  return found;
}

const Table* chosen = nullptr;

std::string names() {
  std::string joined;
  for (const Table* each : supported()) joined += (joined.empty() ? "" : ", ") + std::string(each->name);
  return joined;
}

}  // namespace

const Table& table() {
  if (!chosen) {
    const char* asked = std::getenv("GLM5_ISA");
    if (asked && !use_table(asked))
      throw std::runtime_error(std::string("GLM5_ISA is '") + asked +
                               "', which this machine has not; it has " + names());
    if (!asked) chosen = supported().front();
  }
  return *chosen;
}

bool use_table(const char* name) {
  for (const Table* each : supported()) {
    if (std::strcmp(each->name, name) == 0) {
      chosen = each;
      return true;
    }
  }
  return false;
}

std::vector<const char*> tables() {
  std::vector<const char*> names;
  for (const Table* each : supported()) names.push_back(each->name);
  return names;
}

}  // namespace glm5
