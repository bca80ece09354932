#pragma once

#include <nanobind/nanobind.h>

namespace nmcompile {

void bind_decoder(nanobind::module_& m);

}  // namespace nmcompile
