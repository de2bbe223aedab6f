#define GLM5_ISA avx512bf16
#include "pairs.h"

namespace glm5 {
namespace avx512bf16 {
// Everything else is avx512's: this set is that one with other attention.
Table functions() {
  Table table = avx512::functions;
  table.name = "avx512bf16";
  table.attend_heads = attend_heads_by_pairs;
  table.select = select_by_pairs;
  return table;
}
}  // namespace avx512bf16
}  // namespace glm5
