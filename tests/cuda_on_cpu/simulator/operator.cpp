// One operator, OPERATOR, as torch.ops.querymask_simulated.OPERATOR and OPERATOR_backward.

#include "headers.h"

#include "operator_sources.h" // made by the build: includes its translated sources

TORCH_LIBRARY_FRAGMENT(querymask_simulated, m) {
  m.def(C10_STRINGIZE(OPERATOR), &querymask::OPERATOR::forward_cuda);
  m.def(C10_STRINGIZE(OPERATOR) "_backward", &querymask::OPERATOR::backward_cuda);
}
