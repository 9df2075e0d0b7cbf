// Precompiled by `make` in the place of the header that each kernel of mx.compile on the CPU includes.
//
// That header holds the operations, and with <complex> also strings, streams and the Bessel functions of C++17, whose
// templates g++ would instantiate for each kernel again: most of what a kernel costs. The same operations, without those.
#include <bits/c++config.h>
#undef _GLIBCXX_USE_STD_SPEC_FUNCS

#include <iosfwd>
#include <limits>
#include <type_traits>
#define _GLIBCXX_SSTREAM 1
namespace std {
struct ios_base {  // a complex number that is read says so to its stream: declared, never instantiated
  static const int failbit = 4;
};
}  // namespace std

#include "mlx/backend/cpu/compiled_preamble.h"
