#pragma once

#include <nanobind/nanobind.h>

namespace nmcompile {

void bind_packed_integers(nanobind::module_& m);

}  // namespace nmcompile
