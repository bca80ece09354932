#pragma once

#include <nanobind/nanobind.h>

namespace nmcompile {

void bind_convolution(nanobind::module_& m);

}  // namespace nmcompile
