// What Python and C++ hand each other: structures of numbers and of pointers to contiguous tensors.
//
// Every function of the library takes one of them, in one of the number formats. The library tells
// what fields they have, and library.py fills them by name: neither side counts on an order that
// the other one keeps.

#pragma once

#include <cstddef>
#include <cstdint>

typedef uint16_t bf16;

// A structure with these fields, and what it is made of, as text and in bytes.
#define STRUCTURE(name, ...)                                              \
  template <typename Number>                                              \
  struct name {                                                           \
    __VA_ARGS__                                                           \
  };                                                                      \
  extern "C" const char* drivesim_fields_##name() { return #__VA_ARGS__; } \
  extern "C" size_t drivesim_size_##name() { return sizeof(name<float>); }

// A function of the library, in each number format, that takes such a structure, `given`, and does
// `act`.
#define OPERATOR(name, Structure, act)                                             \
  extern "C" const char* drivesim_takes_##name() { return #Structure; }            \
  extern "C" void drivesim_##name##_bf16(const Structure<bf16>* given) { act; }    \
  extern "C" void drivesim_##name##_fp32(const Structure<float>* given) { act; }
