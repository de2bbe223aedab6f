// Included once for each instruction set, with GLM5_ISA set and its flags on.
#include <atomic>

#include "attention.h"
#include "ceilings.h"
#include "decoder.h"
#include "layers.h"
#include "prompt.h"
#include "rounding.h"

namespace glm5 {
namespace GLM5_ISA {
extern const Table functions;
const Table functions = {GLM5_ISA_NAME, linear, norm_rows, moe, attend, attend_heads, attend_prompt, select, decode_layer, round_weights, read_all, spin_products};
}  // namespace GLM5_ISA
}  // namespace glm5
