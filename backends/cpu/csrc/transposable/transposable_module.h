#pragma once

#include <nanobind/nanobind.h>

namespace nmcompile {

void bind_transposable(nanobind::module_& m);

}  // namespace nmcompile
