// Included once for each instruction set, with GLM5_ISA set and its flags on.
#include <atomic>

#include "absorbed.h"
#include "ceilings.h"
#include "decoder.h"
#include "layers.h"
#include "rounding.h"

namespace glm5 {
namespace GLM5_ISA {
extern const Table functions;
const Table functions = {GLM5_ISA_NAME, linear,       take_rows, norm_rows,      moe,    route_only,
                         attend,        attend_heads, attend_grouped, select, decode_layer,
                         round_weights, read_all,     spin_products};
}  // namespace GLM5_ISA
}  // namespace glm5
