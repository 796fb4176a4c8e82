// SPDX-License-Identifier: Apache-2.0
// Copyright (c) dcn_plugin contributors

// Counts the edges that code compiled by GCC with -fsanitize-coverage=trace-pc
// takes. tests/fuzzing registers the counters with libFuzzer.

#include <stdint.h>

#define COUNTERS (1 << 18)

uint8_t dcn_counters[COUNTERS];
// libFuzzer wants an address and flags for each counter.
uintptr_t dcn_addresses[2 * COUNTERS];

void __sanitizer_cov_trace_pc(void) {
  const uintptr_t pc = (uintptr_t)__builtin_return_address(0);
  uint8_t* counter = &dcn_counters[(pc >> 3) % COUNTERS];
  *counter += *counter < UINT8_MAX; // a lost count of another thread is harmless
}
