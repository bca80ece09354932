#pragma once

#include <nanobind/nanobind.h>

namespace nmcompile {

void bind_prune(nanobind::module_& m);

}  // namespace nmcompile
