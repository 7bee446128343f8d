// The interface between Python and C++: structures of numbers and of pointers to contiguous
// tensors.
//
// Every function of the library takes one structure, in bf16 or in float32. The library exports the
// names of the fields, and library.py sets the fields by name. Python therefore does not need to
// know their order.

#pragma once

#include <cstddef>
#include <cstdint>

typedef uint16_t bf16;

// Define a structure with these fields, and export its fields as text and its size in bytes.
#define STRUCTURE(name, ...)                                              \
  template <typename Number>                                              \
  struct name {                                                           \
    __VA_ARGS__                                                           \
  };                                                                      \
  extern "C" const char* drivesim_fields_##name() { return #__VA_ARGS__; } \
  extern "C" size_t drivesim_size_##name() { return sizeof(name<float>); }

// Export a function in each number format. It takes a structure `given` and runs the statement
// `act`.
#define OPERATOR(name, Structure, act)                                             \
  extern "C" const char* drivesim_takes_##name() { return #Structure; }            \
  extern "C" void drivesim_##name##_bf16(const Structure<bf16>* given) { act; }    \
  extern "C" void drivesim_##name##_fp32(const Structure<float>* given) { act; }
