#pragma once

#include <nanobind/nanobind.h>

namespace nmcompile {

void bind_frozen_linear(nanobind::module_& m);

}  // namespace nmcompile
