#pragma once

#include <nanobind/nanobind.h>

namespace nmcompile {

void bind_network(nanobind::module_& m);

}  // namespace nmcompile
