#pragma once

#include <nanobind/nanobind.h>

namespace nmcompile {

void bind_gemm(nanobind::module_& m);

}  // namespace nmcompile
